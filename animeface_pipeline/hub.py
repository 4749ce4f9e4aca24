"""The Hub: the model card with its pictures, and a command that pushes a saved pipeline.

    python -m animeface_pipeline.hub out/anime-faces --hub_model_id user/anime-faces
    python -m animeface_pipeline.hub out/anime-faces --hub_model_id somebody/anime-faces --create_pr

Training and conversion push by themselves with `--push_to_hub`; when the Hub could not be reached then, this command
makes up for it. One commit holds weights, scheduler, code, card and pictures, and neither checkpoints nor logs.

How the folder is laid out, loaded and pushed is in pipeline_animeface.py, which stands alone.
"""

import io
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, get_session
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from PIL import Image

from .cli import EXIT_DONE, EXIT_PUSH_FAILED, BadInput, OneLineParser, command, resource
from .curves import draw_curves
from .files import write_aside
from .pipeline_animeface import (
    AnimeFacePipeline,
    check_folder,
    explain_hub_error,
    is_our_card,
    sign_card,
    unsigned_card,
    upload_folder_as_pipeline,
)

HUB_TIMEOUT = 60.0  # seconds without a single byte; the client itself would wait for ever


@dataclass(frozen=True, kw_only=True)
class TrainingSummary:
    r"""
    What a card tells about the origin of weights. Every entry is optional; the card is silent about what is left out.

    Parameters:
        recipe (`str`): The recipe's name, e.g. `"original"`.
        settings (`Mapping[str, Any]`): The recipe's values. They are published: no paths, no secrets.
        dataset (`str`): What the pictures are, in words or by their name on the Hub.
        hub_dataset (`str`): Their name on the Hub, if they are there; for the card's `datasets:`.
        dataset_size (`int`): How many pictures were trained on.
        steps (`int`), epochs (`float`), samples_seen (`int`), batch_size (`int`): How long it was trained.
        hours (`float`): How long the updates took, without sampling and saving.
        ema_decay (`float`): The decay of the averaged weights that are saved; None if they are the trained ones.
        hardware (`str`), commit (`str`), versions (`Mapping[str, str]`): What it was trained on and with.
        losses (`Sequence[tuple[int, float]]`): (step, training loss), for the curve.
        base_model (`str`): The model that training went on from: `user/name` on the Hub, or how a local one is called.
        converted_from (`str`): The file of the original's weights, if they were trained with the original's code.
        license (`str`, defaults to `"other"`): One of the Hub's licences; `other` where the pictures have none.
    """

    recipe: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    dataset: str | None = None
    hub_dataset: str | None = None
    dataset_size: int | None = None
    steps: int | None = None
    epochs: float | None = None
    samples_seen: int | None = None
    batch_size: int | None = None
    hours: float | None = None
    ema_decay: float | None = None
    hardware: str | None = None
    commit: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    losses: Sequence[tuple[int, float]] = ()
    base_model: str | None = None
    converted_from: str | None = None
    license: str = "other"


def render_card(
    pipe: AnimeFacePipeline, summary: TrainingSummary = TrainingSummary(), samples: Image.Image | None = None
) -> dict[str, str | bytes]:
    r"""
    Write the model card of a pipeline, from the template model_card.md.

    Args:
        pipe ([`AnimeFacePipeline`]): The pipeline that the card is for.
        summary ([`TrainingSummary`], *optional*): Where its weights come from.
        samples (`PIL.Image.Image`, *optional*): A grid of pictures that it drew.

    Returns:
        `dict[str, str | bytes]`: by file name the signed card and its pictures, for `save_pretrained(card=...)`. The
        examples name the repository `USER/NAME` until it is pushed.

    Example:

    ```py
    >>> from animeface_pipeline.hub import TrainingSummary, render_card

    >>> card = render_card(pipe, TrainingSummary(recipe="original", steps=61_500, batch_size=64))
    >>> pipe.save_pretrained("anime-faces", card=card)
    ```
    """
    template = resource("model_card.md").read_text(encoding="utf-8")
    data = card_data(summary, fixed=yaml.safe_load(template.split("---")[1]))
    card = ModelCard.from_template(
        data,
        template_str=template,
        size=pipe.unet.config.sample_size,
        parameters=f"{pipe.unet.num_parameters():,}",
        train_timesteps=pipe.scheduler.config.num_train_timesteps,
        has_samples=samples is not None,
        has_losses=bool(summary.losses),
        converted_from=summary.converted_from,
        training=training_table(summary),
        settings=yaml.safe_dump(dict(summary.settings), sort_keys=False).strip() if summary.settings else "",
        times_seen=times_seen(summary),
        dropout_stayed=summary.converted_from is None and pipe.unet.config.dropout > 0,
        attention_norm=pipe.unet.config.attention_norm,
        trailing=pipe.scheduler.config.get("timestep_spacing") == "trailing",
        version=version("animeface-pipeline"),
    )
    files: dict[str, str | bytes] = {"README.md": sign_card(re.sub(r"\n{3,}", "\n\n", str(card)))}
    if samples is not None:
        files["assets/samples.png"] = png(samples)
    if summary.losses:
        files["assets/loss_curve.png"] = draw_curves([{"step": step, "loss": loss} for step, loss in summary.losses])
    return files


def card_data(summary: TrainingSummary, fixed: Mapping[str, Any]) -> ModelCardData:
    """The card's front matter: the `fixed` entries of the template, and those of the run."""
    known = {
        "license": summary.license,
        "datasets": [summary.hub_dataset] if summary.hub_dataset else None,
        "base_model": summary.base_model if "/" in (summary.base_model or "") else None,
    }
    return ModelCardData(**{**fixed, **known})


# How the metrics are called in the card's table, by their names on the Hub.
METRIC_NAMES = {"fid": "FID", "kid": "KID", "in-domain-frechet-distance": "in-domain Fréchet distance"}
MEASURED_BY = "Measured by animeface_pipeline.evaluate"
_RESULTS_SECTION = re.compile(rf"\n## Results\n((?!\n## ).)*{re.escape(MEASURED_BY)}.*?(?=\n## |\Z)", re.DOTALL)


def add_results(folder: Path, metrics: Mapping[str, float], how: str) -> None:
    r"""
    Write measured results into the card of a saved pipeline: its front matter, and its section "Results".

    They take the place of all that `evaluate` wrote before, because they may be of another model or another number of
    pictures. What else the card says stays; an edited card stays somebody's own.

    Args:
        folder (`Path`): The pipeline's folder, with its `README.md`.
        metrics (`Mapping[str, float]`): By their names on the Hub, keys of `METRIC_NAMES`.
        how (`str`): How they were measured: the end of the sentence "Measured by animeface_pipeline.evaluate …".

    Raises:
        [`BadInput`]: there is no card, or its front matter cannot be read.
    """
    readme = folder / "README.md"
    try:
        text = readme.read_text(encoding="utf-8")
        card = ModelCard(unsigned_card(text))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise BadInput(f"{readme}: cannot be read as a model card ({error}); save the pipeline again") from error
    results = [
        EvalResult(
            task_type="unconditional-image-generation",
            dataset_type="image-folder",
            dataset_name="the reference pictures",
            metric_type=name,
            metric_name=METRIC_NAMES[name],
            metric_value=value,
        )
        for name, value in metrics.items()
    ]
    data: Any = card.data
    results = [result for result in data.eval_results or [] if result.metric_type not in METRIC_NAMES] + results
    data.model_name = data.model_name or "AnimeFacePipeline"
    data.eval_results, data.metrics = results, [result.metric_type for result in results]
    rows = "\n".join(f"| {METRIC_NAMES[name]} | {value:.4g} |" for name, value in metrics.items())
    section = f"\n## Results\n\n| measure | value |\n| --- | --- |\n{rows}\n\n{MEASURED_BY} {how}\n"
    body = _RESULTS_SECTION.sub("", card.text).rstrip() + "\n"
    limits = body.find("\n## Limits and biases")
    card.text = body[:limits] + section + body[limits:] if limits >= 0 else body + section
    write_aside(readme, (sign_card(str(card)) if is_our_card(text) else str(card)).encode())


def training_table(summary: TrainingSummary) -> dict[str, str]:
    """The rows of "How it was trained" that are known."""
    trained = summary.steps is not None
    averaged = "no" if summary.ema_decay is None else f"yes, decay {summary.ema_decay:g}"
    rows = {
        "recipe": summary.recipe,
        "started from": summary.base_model,
        "data": summary.dataset or summary.hub_dataset,
        "pictures": summary.dataset_size and f"{summary.dataset_size:,}",
        "batch size": summary.batch_size and f"{summary.batch_size:,}",
        "steps": summary.steps and f"{summary.steps:,}",
        "epochs": summary.epochs and f"{summary.epochs:g}",
        "pictures seen": summary.samples_seen and f"{summary.samples_seen:,}",
        "hours": summary.hours and f"{summary.hours:.2g}",
        "averaged weights (EMA)": averaged if trained else None,
        "hardware": summary.hardware,
        "software": ", ".join(f"{name} {number}" for name, number in summary.versions.items()),
        "commit of the code": summary.commit,
    }
    return {name: str(value).replace("|", "\\|") for name, value in rows.items() if value}


def times_seen(summary: TrainingSummary) -> int | None:
    """How often training saw each picture, on average."""
    if not summary.samples_seen or not summary.dataset_size:
        return None
    return max(1, round(summary.samples_seen / summary.dataset_size))


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


# ---- what a run knows of the machine and the software it runs on ----


def hardware_name() -> str:
    """The GPU, or how many CPU cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"


def library_versions() -> dict[str, str]:
    """The versions of what decides over the result."""
    libraries = ("animeface-pipeline", "torch", "diffusers", "accelerate")
    return {"Python": platform.python_version(), **{name: version(name) for name in libraries}}


def code_commit() -> str | None:
    """The commit of a clone that the package is used from; None for an installed package or without git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], check=True, capture_output=True)
        commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True).returncode
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}, with changes" if changed else commit


# ---- pushing ----


def check_repo_id(repo_id: str) -> None:
    """
    Refuse a name that no repository can have, before any work is done for it.

    Raises:
        [`BadInput`]: not `name` or `user/name` of letters, digits, `-`, `_` and `.`.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise BadInput(f"--hub_model_id {repo_id}: {error}") from error


def push_or_explain(folder: str | os.PathLike, repo_id: str, private: bool = False) -> int:
    r"""
    Push a saved pipeline at the end of a run; a failure costs nothing but the push.

    Args:
        folder (`str` or `os.PathLike`): The folder that `save_pretrained` wrote; it is only read.
        repo_id (`str`): `user/name`, or `name` in your own namespace.
        private (`bool`, *optional*, defaults to `False`): Whether a new repository is private.

    Returns:
        `int`: the exit code, 0, or 3 after one line on stderr with the reason and the command that pushes it later.
    """
    try:
        return _push(Path(folder), repo_id, private=private)
    except Exception as error:  # whatever it was, the run is done and on disk: it must not end in a traceback
        return _explain(error, Path(folder), repo_id, private)


def _push(folder: Path, repo_id: str, private: bool, **options: Any) -> int:
    get_session().timeout = HUB_TIMEOUT
    # None leaves it to the Hub: an organisation may make its new repositories private by default
    commit = upload_folder_as_pipeline(folder, repo_id, private=private or None, **options)
    print(f"pushed {folder} to {commit.pr_url or commit.commit_url}")
    return EXIT_DONE


def _explain(
    error: Exception,
    folder: Path,
    repo_id: str,
    private: bool,
    create_pr: bool = False,
    commit_message: str | None = None,
    include: Sequence[str] = (),
) -> int:
    arguments = ["python", "-m", "animeface_pipeline.hub", folder.resolve().as_posix(), "--hub_model_id", repo_id]
    arguments += ["--private"] * private + ["--create_pr"] * create_pr
    arguments += ["--commit_message", commit_message] if commit_message else []
    arguments += ["--include", *include] if include else []
    later = subprocess.list2cmdline(arguments) if os.name == "nt" else shlex.join(arguments)
    reason = explain_hub_error(error)
    print(f"error: not pushed to {repo_id}: {reason}. All is saved; push it later with: {later}", file=sys.stderr)
    return EXIT_PUSH_FAILED


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = OneLineParser(description=__doc__, prog="python -m animeface_pipeline.hub")
    parser.add_argument("folder", type=Path, help="a folder that save_pretrained or training wrote")
    parser.add_argument("--hub_model_id", required=True, metavar="USER/NAME", help="created if it is not there")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--commit_message", help="default: Upload AnimeFacePipeline")
    parser.add_argument("--include", nargs="+", default=(), metavar="PATTERN", help='push more, e.g. "logs/**/*"')
    args = parser.parse_args(argv)
    check_repo_id(args.hub_model_id)
    if not args.folder.is_dir():
        raise BadInput(f"{args.folder}: no such folder; give one that save_pretrained or training wrote")
    try:
        check_folder(args.folder)
    except (OSError, ValueError) as error:
        raise BadInput(str(error)) from error
    options = {name: getattr(args, name) for name in ("private", "create_pr", "commit_message", "include")}
    try:
        return _push(args.folder, args.hub_model_id, **options)
    except Exception as error:
        if isinstance(error, ValueError) and not isinstance(error, HfHubHTTPError):
            raise BadInput(str(error)) from error  # we refused it, not the Hub
        return _explain(error, args.folder, args.hub_model_id, **options)


if __name__ == "__main__":
    main()
