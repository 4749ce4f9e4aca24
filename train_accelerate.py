"""Train a DDPM on a folder of pictures; the result is a Diffusers pipeline.

    accelerate launch train_accelerate.py --train_data_dir faces --output_dir my-faces
    accelerate launch train_accelerate.py --config quickstart --train_data_dir faces --output_dir quickstart
    accelerate launch train_accelerate.py ... --resume_from_checkpoint latest

Without --config the recipe is the original's: 169 million parameters, 64×64 pixels, 50 epochs of batches of 64. A flag
goes over the recipe. Exit codes: 0 done, 2 bad input, 3 only the push failed, 4 stopped by updates that were not
finite, 128 + n stopped by signal n: the last line says whether it could save.
"""

from contextlib import nullcontext

import torch
from accelerate import Accelerator

from animeface_pipeline.cli import command
from animeface_pipeline.config import TrainingConfig, parse_args
from animeface_pipeline.dataset import stream_seed
from animeface_pipeline.run import Run, launched
from animeface_pipeline.run_folder import RunFolder
from animeface_pipeline.training import (
    build_batches,
    build_ema,
    build_optimizer,
    build_pipeline,
    describe,
    diffusion_loss,
    update,
)
from animeface_pipeline.validation import build_validation


def train(config: TrainingConfig, accelerator: Accelerator, folder: RunFolder) -> int:
    # 1. build: a pipeline is the network, the noise schedule and the value range
    pipeline = build_pipeline(config)
    noise_scheduler = pipeline.scheduler
    batches = build_batches(config, accelerator, noise_scheduler)
    total_steps = config.max_train_steps or config.num_epochs * batches.steps_per_epoch
    optimizer, lr_scheduler = build_optimizer(config, pipeline.unet, total_steps)
    unet, optimizer = accelerator.prepare(pipeline.unet, optimizer)
    ema = build_ema(config, unet)
    validation = build_validation(config, accelerator, noise_scheduler)
    run = Run(config, accelerator, folder, pipeline, unet, lr_scheduler, ema, batches, validation, total_steps)
    run.begin()
    accelerator.print(describe(config, accelerator, pipeline, batches, total_steps))

    # 2. loop: everything random in an update comes from (seed, step), so that a resumed run goes on exactly
    unet.train()
    for step in run.steps():
        torch.manual_seed(stream_seed(config.seed, f"dropout of process {accelerator.process_index}", step))
        parts = batches.of_step(step)
        for batch in parts:
            with nullcontext() if batch is parts[-1] else accelerator.no_sync(unet):
                loss, errors = diffusion_loss(unet, noise_scheduler, batch, config.snr_gamma)
                accelerator.backward(loss * batch.weight)
            run.meter.add(errors, batch.timesteps)
        grad_norm = update(accelerator, optimizer, unet, config.max_grad_norm)
        lr_scheduler.step()
        if ema is not None:
            ema.step(unet.parameters())
        run.after_update(step, grad_norm)  # log, grid, checkpoint, or stop after a signal

    # 3. save, and push if asked to: the averaged weights, if there are any
    return run.finish()


@command
def main(argv: list[str] | None = None) -> int:
    config = parse_args(argv, description=__doc__)
    with launched(config) as (accelerator, folder):
        return train(config, accelerator, folder)


if __name__ == "__main__":
    main()
