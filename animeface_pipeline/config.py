"""The settings of a training run: one table of fields, filled from a recipe (a YAML file) and from flags over it."""

import dataclasses
import difflib
import types
import typing
from argparse import BooleanOptionalAction
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .cli import BadInput, OneLineParser, resource
from .schedulers import SCHEDULERS
from .trackers import TRACKERS

Rule = tuple[str, Callable[[Any], bool]]  # what must hold, in words and as a test


def at_least(least: float) -> Rule:
    return f"must be at least {least:g}", lambda value: value >= least


def more_than(bound: float) -> Rule:
    return f"must be more than {bound:g} and finite", lambda value: bound < value < float("inf")


def within(low: float, high: float) -> Rule:
    return f"must be at least {low:g} and less than {high:g}", lambda value: low <= value < high


def one_of(*choices: str) -> Rule:
    return f"must be one of {', '.join(choices)}", lambda value: value in choices


ANYTHING: Rule = ("", lambda value: True)
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")


def recipe(help: str, rule: Rule = ANYTHING) -> Any:
    """A field that recipes set; recipes/original.yaml holds its default."""
    return dataclasses.field(metadata={"help": help, "rule": rule, "recipe": True})


def run(help: str, default: Any = None, rule: Rule = ANYTHING) -> Any:
    """A field of the single run, set by a flag only."""
    return dataclasses.field(default=default, metadata={"help": help, "rule": rule, "recipe": False})


@dataclasses.dataclass(kw_only=True)
class TrainingConfig:
    """Every setting of `train_accelerate.py`. Each field is a flag of the same name; most are keys of a recipe too."""

    # what to train on, and where to put it
    config: str = run("a recipe: the name of one in recipes/, or a YAML file", "original")
    train_data_dir: str | None = run("a folder of pictures; its folder train/ if it has one")
    dataset_name: str | None = run("a data set on the Hub, or a folder that datasets.load_dataset reads")
    streaming: bool = run("read the pictures while training; for what is larger than the disk", False)
    dataset_config_name: str | None = run("the configuration of the Hub data set")
    output_dir: str = run("the folder that the pipeline, the log and the grids are written to", "animeface-64")
    cache_dir: str | None = run("where decoded pictures are kept (default: animeface_pipeline in the user's cache)")
    overwrite_output_dir: bool = run("remove what a former run wrote to output_dir, and nothing else", False)
    fast: bool = run("turn on what is fast on this machine (a CPU keeps its precision); other flags go over it", False)
    resume_from_checkpoint: str | None = run('go on from a checkpoint: "latest", or a folder checkpoint-N')
    model_config_name_or_path: str | None = run("a JSON file of constructor arguments, a folder or a Hub name")
    pretrained_model_name_or_path: str | None = run("start from the weights of this pipeline (a folder or a Hub name)")
    report_to: str | None = run("report to a tracker, or none", None, one_of(*TRACKERS, "all"))
    push_to_hub: bool = run("push the pipeline to the Hub at the end", False)
    hub_model_id: str | None = run("the name to push to, user/name (default: the name of output_dir)")
    hub_private_repo: bool = run("make a new repository on the Hub private", False)

    # pictures
    resolution: int = recipe("height and width in pixels", at_least(1))
    value_range: tuple[float, float] = recipe("what black and white are to the network")
    random_flip: bool = recipe("mirror half of the pictures, anew each time")

    # network
    unet: dict[str, Any] = recipe("constructor arguments of AnimeFaceUNet2DModel (recipes only)")

    # noise
    prediction_type: str = recipe("what the network predicts", one_of("epsilon", "v_prediction", "sample"))
    snr_gamma: float | None = recipe(
        "min-SNR weighting (Hang et al. 2023); 5 is usual, none for plain MSE", more_than(0)
    )

    # optimisation
    train_batch_size: int = recipe("pictures per process and accumulation step", at_least(1))
    gradient_accumulation_steps: int = recipe("batches summed up before each update", at_least(1))
    num_epochs: int = recipe("how often every picture is seen", at_least(1))
    max_train_steps: int | None = recipe("updates in all; overrides num_epochs", at_least(1))
    learning_rate: float = recipe("after warm-up", more_than(0))
    lr_scheduler: str = recipe("how the learning rate changes", one_of(*LR_SCHEDULERS))
    lr_warmup_steps: int = recipe("updates until the full learning rate", at_least(0))
    adam_beta1: float = recipe("Adam's first moment decay", within(0, 1))
    adam_beta2: float = recipe("Adam's second moment decay", within(0, 1))
    adam_weight_decay: float = recipe("decoupled weight decay", within(0, float("inf")))
    adam_epsilon: float = recipe("Adam's epsilon", more_than(0))
    max_grad_norm: float | None = recipe("clip gradients to this norm, or none", more_than(0))
    use_ema: bool = recipe("average the weights; what is sampled and saved is then the average")
    ema_inv_gamma: float = recipe("inverse gamma of the EMA's warm-up", more_than(0))
    ema_power: float = recipe("power of the EMA's warm-up", more_than(0))
    ema_max_decay: float = recipe("decay of the EMA after its warm-up", within(0, 1))
    mixed_precision: str = recipe(
        "bf16 needs an Ampere GPU or newer or a CPU with AVX-512, fp16 any GPU", one_of("no", "fp16", "bf16")
    )
    channels_last: bool = recipe("keep weights and activations with the channels last in memory")
    torch_compile: str | None = recipe("compile the network in this mode, or none", one_of(*COMPILE_MODES))
    allow_tf32: bool = recipe(
        "TF32 in float32's matrix products, on an Ampere GPU or newer; convolutions always have it"
    )
    gradient_checkpointing: bool = recipe("less memory, about a third slower")
    seed: int = recipe("of weights, order, noise and flips", within(0, 2**32))

    # looking and saving
    eval_batch_size: int = recipe("pictures in a sample grid", at_least(1))
    eval_scheduler: str = recipe("the scheduler that draws the grids", one_of(*SCHEDULERS))
    ddpm_num_inference_steps: int = recipe("denoising steps of the grids", within(1, 1001))
    save_images_epochs: int = recipe("epochs between sample grids", at_least(1))
    validation_steps: int = recipe("updates between losses on the held-out split, if there is one", at_least(1))
    logging_steps: int = recipe("updates between lines of the log", at_least(1))
    checkpointing_steps: int = recipe("updates between checkpoints", at_least(1))
    checkpoints_total_limit: int = recipe("how many checkpoints are kept", at_least(1))

    given: frozenset[str] = dataclasses.field(default=frozenset(), metadata={"internal": True})

    def __post_init__(self) -> None:
        for field in settings():
            value, (words, holds) = getattr(self, field.name), field.metadata["rule"]
            if value is not None and not holds(value):
                raise BadInput(f"--{field.name} {value}: {words}")
        low, high = self.value_range
        if not -float("inf") < low < high < float("inf"):
            raise BadInput(f"--value_range {low} {high}: must be two finite numbers, the smaller one first")
        if self.resume_from_checkpoint is not None and self.overwrite_output_dir:
            raise BadInput(
                "--overwrite_output_dir: removes what --resume_from_checkpoint goes on from; give one of them"
            )
        if not self.push_to_hub and (self.hub_model_id is not None or self.hub_private_repo):
            raise BadInput("--hub_model_id and --hub_private_repo: nothing is pushed without --push_to_hub; add it")
        if self.torch_compile in CUDA_GRAPHS and self.gradient_accumulation_steps > 1:
            raise BadInput(
                f"--torch_compile {self.torch_compile}: its CUDA graphs overwrite the gradients that"
                f" --gradient_accumulation_steps {self.gradient_accumulation_steps} adds up; take default or"
                " max-autotune-no-cudagraphs"
            )

    def recipe_values(self) -> dict[str, Any]:
        """The values of all recipe keys: what this run would be if it were written down as a recipe."""
        return {field.name: getattr(self, field.name) for field in settings() if field.metadata["recipe"]}


def settings() -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(TrainingConfig) if not field.metadata.get("internal")]


def load_recipe(name_or_path: str) -> dict[str, Any]:
    r"""
    Read a recipe: a YAML mapping of [`TrainingConfig`] fields.

    Args:
        name_or_path (`str`): The name of a recipe that the package carries (`"original"`), or the path of a YAML file.

    Returns:
        `dict[str, Any]`: the values that it sets, each checked for its type.

    Raises:
        [`BadInput`]: no such recipe, not YAML, an unknown key, a value of the wrong type.
    """
    file = Path(name_or_path)
    if file.suffix not in (".yaml", ".yml"):
        names = sorted(entry.name.removesuffix(".yaml") for entry in resource("recipes").iterdir())
        if name_or_path not in names:
            raise BadInput(
                f"--config {name_or_path}: no such recipe; there are {', '.join(names)}, or give a .yaml file"
            )
        text = resource(f"recipes/{name_or_path}.yaml").read_text(encoding="utf-8")
    else:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise BadInput(f"--config {name_or_path}: {reason}") from error
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise BadInput(f"--config {name_or_path}: not YAML ({error})") from error
    if not isinstance(values, dict):
        raise BadInput(f"--config {name_or_path}: a recipe is a list of lines key: value")
    allowed = {field.name: field for field in settings() if field.metadata["recipe"]}
    for key in values:
        if key not in allowed:
            close = difflib.get_close_matches(str(key), allowed, n=1)
            hint = f", did you mean {close[0]}?" if close else f"; there are {', '.join(allowed)}"
            raise BadInput(f"--config {name_or_path}: unknown key {key}{hint}")
    return {key: _typed(allowed[key], value, f"--config {name_or_path}: {key}") for key, value in values.items()}


def parse_args(argv: Sequence[str] | None, description: str) -> TrainingConfig:
    """Flags over the chosen recipe over recipes/original.yaml."""
    parser = OneLineParser(description=description)
    defaults = load_recipe("original")
    for field in settings():
        if field.name == "unet":
            continue
        default = defaults.get(field.name, field.default)
        kind = _kind(field)
        options: dict[str, Any] = {"default": None, "help": f"{field.metadata['help']} (default: {default})"}
        if kind is bool:
            options["action"] = BooleanOptionalAction
        elif kind is tuple:
            options |= {"nargs": 2, "metavar": ("BLACK", "WHITE")}
        parser.add_argument(f"--{field.name}", **options)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    fields = {field.name: field for field in settings()}
    flags = {name: _typed(fields[name], value, f"--{name}") for name, value in given.items()}
    chosen = load_recipe(flags.get("config", "original"))
    return TrainingConfig(**{**defaults, **chosen, **flags}, given=frozenset(flags))


def _kind(field: dataclasses.Field) -> type:
    """The type of a field's value, without `None`."""
    hint = typing.get_type_hints(TrainingConfig)[field.name]
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    return typing.get_origin(hint) or hint


def _typed(field: dataclasses.Field, value: Any, shown_as: str) -> Any:
    """The value as the field's type. Flags come as text; YAML reads 1e-5 as text too."""
    kind = _kind(field)
    optional = type(None) in typing.get_args(typing.get_type_hints(TrainingConfig)[field.name])
    if optional and (value is None or value == "none"):
        return None
    try:
        if kind is tuple and isinstance(value, list) and len(value) == 2:
            return tuple(float(part) for part in value)
        if kind is dict and isinstance(value, Mapping):
            return dict(value)
        if kind in (bool, str) and isinstance(value, kind):
            return value
        if kind in (int, float) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            number = kind(value) if isinstance(value, str) or kind is float else value
            if isinstance(number, kind):
                return number
    except ValueError:
        pass
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a mapping"}
    raise BadInput(f"{shown_as} {value!r}: must be {names.get(kind, 'two numbers')}")
