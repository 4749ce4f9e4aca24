"""The verbs of the training loop: build, loss, update, average, sample."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object, reduce
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, compute_snr
from PIL import Image
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from .cli import BadInput
from .config import TrainingConfig
from .dataset import Batch, Batches, load_pictures, stream_seed
from .images import denoising_strips, image_grid
from .pipeline_animeface import AnimeFacePipeline
from .schedulers import original_scheduler, switch_scheduler
from .speed import prepare_for_training
from .streaming import build_streamed_batches
from .unet_animeface import AnimeFaceUNet2DModel

# ---- building ----


def build_pipeline(config: TrainingConfig) -> AnimeFacePipeline:
    """A new network with the original's schedule, or the saved pipeline that fine-tuning starts from.

    The network's size, the value range and the schedule of a saved pipeline take the place of the config's.
    """
    pipeline = _new_or_saved_pipeline(config)
    for name in ("in_channels", "out_channels"):
        if (channels := pipeline.unet.config[name]) != 3:
            raise BadInput(f"the network's {name} is {channels}: pictures have 3")
    try:
        switch_scheduler(pipeline.scheduler, config.eval_scheduler)
    except ValueError as error:
        raise BadInput(f"--eval_scheduler: {error}") from error
    if config.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
    prepare_for_training(pipeline.unet, config)
    return pipeline


def _new_or_saved_pipeline(config: TrainingConfig) -> AnimeFacePipeline:
    if config.pretrained_model_name_or_path is not None:
        name = config.pretrained_model_name_or_path
        try:
            pipeline = AnimeFacePipeline.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise BadInput(f"--pretrained_model_name_or_path {error}") from error
        size = pipeline.unet.config.sample_size
        if "resolution" in config.given and config.resolution != size:
            raise BadInput(f"--resolution {config.resolution}: {name} was trained at {size}; leave the flag out")
        config.resolution, config.value_range = size, pipeline.value_range
        config.prediction_type = pipeline.scheduler.config.prediction_type
        most = pipeline.scheduler.config.num_train_timesteps
        if "ddpm_num_inference_steps" in config.given and config.ddpm_num_inference_steps > most:
            raise BadInput(f"--ddpm_num_inference_steps: must be at most {most}, as in the training of {name}")
        config.ddpm_num_inference_steps = min(config.ddpm_num_inference_steps, most)
        config.unet = {key: value for key, value in pipeline.unet.config.items() if not key.startswith("_")}
        pipeline.scheduler = switch_scheduler(pipeline.scheduler, "ddpm")
        return pipeline
    if config.model_config_name_or_path is not None:
        config.unet = _read_network_config(config.model_config_name_or_path)
    torch.manual_seed(stream_seed(config.seed, "weights", 0))
    try:
        unet = AnimeFaceUNet2DModel(**{**config.unet, "sample_size": config.resolution})
    except (TypeError, ValueError) as error:
        raise BadInput(f"the network cannot be built for --resolution {config.resolution}: {error}") from error
    scheduler = original_scheduler(prediction_type=config.prediction_type)
    return AnimeFacePipeline(unet, scheduler, value_range=config.value_range)


def _read_network_config(name_or_path: str) -> dict[str, Any]:
    """The constructor arguments in a JSON file, in a folder (of a network or a pipeline), or on the Hub."""
    path = Path(name_or_path)
    try:
        if path.is_file():
            values = json.loads(path.read_text(encoding="utf-8"))
        else:
            subfolder = "unet" if (path / "unet").is_dir() or not path.is_dir() else None
            values = AnimeFaceUNet2DModel.load_config(name_or_path, subfolder=subfolder)
    except (OSError, ValueError) as error:
        raise BadInput(f"--model_config_name_or_path {name_or_path}: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise BadInput(f"--model_config_name_or_path {name_or_path}: must hold one JSON object")
    return {key: value for key, value in values.items() if not key.startswith("_") and key != "sample_size"}


def build_batches(config: TrainingConfig, accelerator: Accelerator, noise_scheduler: DDPMScheduler) -> Batches:
    """Decode the pictures once on each machine, put them on the GPU if they take less than a quarter of its memory."""
    options: dict[str, Any] = {
        "value_range": config.value_range,
        "random_flip": config.random_flip,
        "num_train_timesteps": noise_scheduler.config.num_train_timesteps,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "num_processes": accelerator.num_processes,
        "process_index": accelerator.process_index,
        "device": accelerator.device,
    }
    if config.streaming:
        return build_streamed_batches(config, **options)
    pictures = load_split(config, accelerator, "train")
    if len(pictures) < accelerator.num_processes:
        raise BadInput(f"{len(pictures)} pictures are too few for {accelerator.num_processes} processes; start fewer")
    if accelerator.device.type == "cuda" and pictures.nbytes < torch.cuda.mem_get_info(accelerator.device)[0] / 4:
        pictures = pictures.to(accelerator.device)
    return Batches(pictures, config.train_batch_size, config.seed, **options)


def load_split(config: TrainingConfig, accelerator: Accelerator, split: str) -> torch.Tensor:
    """The decoded pictures of a split; the first process of each machine decodes them for all."""
    refusal: BadInput | None = None
    with accelerator.local_main_process_first():
        try:
            pictures = load_pictures(
                config.train_data_dir,
                config.dataset_name,
                config.dataset_config_name,
                split=split,
                resolution=config.resolution,
                cache_dir=config.cache_dir,
                show_progress=accelerator.is_local_main_process,
            )
        except BadInput as error:
            refusal = error  # raised in here, it would leave the other processes waiting for ever
    if refusals := [each for each in gather_object([refusal]) if each is not None]:  # perhaps of another machine
        raise refusals[0]
    return pictures


def build_optimizer(
    config: TrainingConfig, unet: torch.nn.Module, total_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW (with weight decay 0: Adam) in its fused form, which can skip an update without waiting for the GPU."""
    optimizer = torch.optim.AdamW(unet.parameters(), lr=config.learning_rate, **adam_settings(config), fused=True)
    name = config.lr_scheduler
    if name == "constant" and config.lr_warmup_steps > 0:
        name = "constant_with_warmup"
    lr_scheduler = get_scheduler(
        name, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=total_steps
    )
    return optimizer, lr_scheduler


def adam_settings(config: TrainingConfig) -> dict[str, Any]:
    return {
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }


def settings_over_state(config: TrainingConfig, lr_scheduler: Any, ema: "EMA | None") -> None:
    """Loading a checkpoint brings its settings and its memory layout back too; the command's go over them."""
    for weight, state in lr_scheduler.optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            if state[name].stride() != weight.stride():  # the fused update would mix up the weights' moments
                state[name] = torch.empty_like(weight).copy_(state[name])
    lr_scheduler.base_lrs = [config.learning_rate]
    factor = lr_scheduler.lr_lambdas[0](lr_scheduler.last_epoch)
    rates = {"initial_lr": config.learning_rate, "lr": config.learning_rate * factor}
    for group in lr_scheduler.optimizer.param_groups:
        group.update(adam_settings(config) | rates)
    if ema is not None:
        ema.decay, ema.inv_gamma, ema.power = config.ema_max_decay, config.ema_inv_gamma, config.ema_power


class EMA(EMAModel):
    """Diffusers' moving average of the weights, saved whole and loaded in place, also when they are sharded."""

    shadow_params: list[torch.Tensor]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "shadow_params": [whole(tensor) for tensor in self.shadow_params]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        in_place = self.shadow_params  # on their device, sharded as the weights are
        super().load_state_dict(state_dict)
        for tensor, loaded in zip(in_place, self.shadow_params):
            loaded = loaded.to(tensor.device)
            if isinstance(tensor, DTensor):
                loaded = distribute_tensor(loaded, tensor.device_mesh, tensor.placements)
            tensor.copy_(loaded)
        self.shadow_params = in_place


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or (on all processes together) what its shards make up."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def build_ema(config: TrainingConfig, unet: torch.nn.Module) -> EMA | None:
    """The moving average of the weights, if the config wants one."""
    if not config.use_ema:
        return None
    return EMA(
        unet.parameters(),
        decay=config.ema_max_decay,
        use_ema_warmup=True,
        inv_gamma=config.ema_inv_gamma,
        power=config.ema_power,
        foreach=not any(isinstance(tensor, DTensor) for tensor in unet.parameters()),  # there it lacks a copy
    )


# ---- one update ----


def diffusion_loss(
    unet: torch.nn.Module, noise_scheduler: DDPMScheduler, batch: Batch, snr_gamma: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    The training loss: the mean squared error of the prediction (Ho et al. 2020, eq. 14), in float32.

    Args:
        unet ([`AnimeFaceUNet2DModel`]): The network; under mixed precision only its forward pass is in half.
        noise_scheduler ([`DDPMScheduler`]): Gives x_t and, by its `prediction_type`, the target.
        batch ([`Batch`]): Clean pictures, noise and timesteps.
        snr_gamma (`float`, *optional*): γ of min-SNR weighting (Hang et al. 2023, eq. 8); `None` for plain MSE.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the loss (0-d, weighted) and every picture's own error `(B,)`,
        unweighted and detached, for the log.
    """
    # x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε  (Ho et al. 2020, eq. 4)
    noisy = noise_scheduler.add_noise(batch.clean, batch.noise, batch.timesteps)
    prediction = unet(noisy, batch.timesteps).sample.float()
    target = {
        "epsilon": lambda: batch.noise,
        "v_prediction": lambda: noise_scheduler.get_velocity(batch.clean, batch.noise, batch.timesteps),
        "sample": lambda: batch.clean,
    }[noise_scheduler.config.prediction_type]()
    errors = F.mse_loss(prediction, target, reduction="none").mean(dim=(1, 2, 3))
    if snr_gamma is None:
        return errors.mean(), errors.detach()
    return (errors * min_snr_weights(noise_scheduler, batch.timesteps, snr_gamma)).mean(), errors.detach()


def min_snr_weights(noise_scheduler: DDPMScheduler, timesteps: torch.Tensor, snr_gamma: float) -> torch.Tensor:
    """min(SNR, γ) as a weight on the error in x_0, converted to the error that the network is trained on."""
    snr = compute_snr(noise_scheduler, timesteps)
    per_unit = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}
    return snr.clamp(max=snr_gamma) / per_unit[noise_scheduler.config.prediction_type]


def update(
    accelerator: Accelerator, optimizer: Any, unet: torch.nn.Module, max_grad_norm: float | None
) -> torch.Tensor:
    """Clip and step; if a gradient is not finite, leave the weights as they are. Returns the norm before clipping.

    The fused optimizer reads `found_inf` on the device, so nothing waits. In fp16 Accelerate's scaler does the same.
    """
    if max_grad_norm is None:
        accelerator.unscale_gradients()  # in fp16
        gradients = [tensor.grad for tensor in unet.parameters() if tensor.grad is not None]
        grad_norm = torch.nn.utils.get_total_norm(gradients)
    else:
        grad_norm = accelerator.clip_grad_norm_(unet.parameters(), max_grad_norm)
    if accelerator.scaler is None:
        optimizer.optimizer.grad_scale = None
        optimizer.optimizer.found_inf = (~torch.isfinite(grad_norm)).float()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return whole(grad_norm.detach())


class Meter:
    """Sums between two lines of the log, on the device: errors by timestep quartile, and updates that were skipped."""

    def __init__(self, num_train_timesteps: int, device: torch.device) -> None:
        self.quarter = num_train_timesteps / 4
        self.sums = torch.zeros(2, 4, dtype=torch.float64, device=device)  # errors and how many, by quartile
        self.skipped = torch.zeros(2, dtype=torch.int64, device=device)  # in all, and in a row until now

    def add(self, errors: torch.Tensor, timesteps: torch.Tensor) -> None:
        finite = torch.isfinite(errors)
        quartiles = (timesteps / self.quarter).long()
        rows = torch.stack([torch.where(finite, errors, 0), finite.float()]).double()
        self.sums.index_add_(1, quartiles, rows)

    def add_update(self, grad_norm: torch.Tensor) -> None:
        bad = (~torch.isfinite(grad_norm)).long()
        self.skipped[0] += bad
        self.skipped[1] = (self.skipped[1] + bad) * bad

    def read(self, accelerator: Accelerator) -> dict[str, Any]:
        """The means over all processes; begins anew. Waits for the device."""
        total, count = accelerator.reduce(self.sums).cpu()
        self.sums.zero_()
        means = [round(float(mean), 6) for mean in total / count]
        skipped, in_a_row = self.skipped.tolist()
        loss = float(total.sum() / count.sum())
        return {
            "loss": loss,
            "loss_by_quartile": [mean if math.isfinite(mean) else None for mean in means],
            "skipped_updates": skipped,
            "skipped_in_a_row": in_a_row,
        }

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Every process goes on with an equal share of what all of them have seen. To be called by all of them."""
        return {"sums": reduce(self.sums, "mean"), "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.sums.copy_(state["sums"])
        self.skipped.copy_(state["skipped"])


# ---- looking ----


@contextmanager
def averaged_weights(unet: torch.nn.Module, ema: EMA | None) -> Iterator[None]:
    """Within, the network holds the averaged weights (if any) and is in eval mode; after, it is as it was."""
    unet.eval()
    if ema is not None:
        ema.store(unet.parameters())
        ema.copy_to(unet.parameters())
    try:
        yield
    finally:
        for module in unet.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # some weights stay whole after a forward pass
        if ema is not None:
            ema.restore(unet.parameters())
        unet.train()


def with_weights(pipeline: AnimeFacePipeline, weights: dict[str, torch.Tensor]) -> AnimeFacePipeline:
    """The pipeline around a network of its own that holds these very tensors."""
    with torch.device("meta"):
        unet = AnimeFaceUNet2DModel.from_config(pipeline.unet.config)
    unet.load_state_dict(weights, assign=True)
    return AnimeFacePipeline(unet.eval(), pipeline.scheduler, pipeline.value_range)


def sample_grid(pipeline: AnimeFacePipeline, config: TrainingConfig) -> tuple[Image.Image, Image.Image]:
    """Pictures from the same noise every time, in true colours: as a grid, and how each came about."""
    scheduler = switch_scheduler(pipeline.scheduler, config.eval_scheduler, config.ddpm_num_inference_steps)
    sampler = AnimeFacePipeline(pipeline.unet, scheduler, pipeline.value_range)
    sampler.set_progress_bar_config(desc="sampling", leave=False)
    seeds = (stream_seed(config.seed, "grid", k) for k in range(config.eval_batch_size))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    images, strips = denoising_strips(
        sampler,
        batch_size=config.eval_batch_size,
        generator=generators,
        num_inference_steps=config.ddpm_num_inference_steps,
    )
    return image_grid(images), image_grid(strips, columns=1)


def describe(
    config: TrainingConfig, accelerator: Accelerator, pipeline: AnimeFacePipeline, batches: Batches, total_steps: int
) -> str:
    """What a person wants to know before waiting: device, network, pictures, steps, recipe."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    parameters = sum(parameter.numel() for parameter in pipeline.unet.parameters())
    size = pipeline.unet.config.sample_size
    number = "a stream" if batches.num_pictures is None else f"{batches.num_pictures:,}"
    lines = {
        "device": f"{accelerator.num_processes} × {name}, mixed precision {config.mixed_precision}",
        "network": f"{parameters:,} parameters, {size}×{size}, values in {pipeline.value_range}",
        "pictures": f"{number} from {config.train_data_dir or config.dataset_name}",
        "steps": f"{total_steps:,} of {batches.total_batch_size} pictures, {batches.steps_per_epoch:,} an epoch",
        "recipe": f"{config.config}, learning rate {config.learning_rate:g}, EMA {'on' if config.use_ema else 'off'}",
    }
    return "\n".join(f"  {key + ':':10}{value}" for key, value in lines.items())


def memory_gib(device: torch.device) -> float:
    """What the GPU held at most until now, or (on a CPU) what this process holds now, in GiB."""
    held = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    return round(held / 2**30, 3)


def unused_gpu() -> str | None:
    """A warning if there is an NVIDIA card that this torch cannot use."""
    has_card = shutil.which("nvidia-smi") is not None or os.path.exists("/proc/driver/nvidia/version")
    if not has_card or torch.cuda.is_available():
        return None
    build = (
        f"torch {torch.__version__} is built for CUDA {torch.version.cuda}"
        if torch.version.cuda
        else (f"torch {torch.__version__} is a CPU build")
    )
    return (
        f"warning: there is an NVIDIA card, but {build} and cannot use it; see https://pytorch.org/get-started/locally"
    )
