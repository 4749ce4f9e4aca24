"""The log of a run as one picture: a panel for each thing that a person looks at."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Title → which entries of log.jsonl, whether on a logarithmic axis. A panel without any value is left out.
PANELS: dict[str, tuple[tuple[str, ...], bool]] = {
    "loss": (("loss", "validation_loss", "validation_loss_ema"), True),
    "loss by quartile of t": (tuple(f"loss_quartile_{k}" for k in (1, 2, 3, 4)), True),
    "gradient norm": (("grad_norm",), True),
    "learning rate": (("learning_rate",), False),
    "pictures per second": (("pictures_per_second",), False),
    "memory, GiB": (("memory_gib",), False),
}
POINTS = 500  # a longer log is averaged to so many points


def flat(entry: Mapping[str, Any]) -> dict[str, float]:
    """An entry of the log as plain numbers: the list of losses by quartile becomes loss_quartile_1 to 4."""
    quartiles = {f"loss_quartile_{k}": value for k, value in enumerate(entry.get("loss_by_quartile", []), start=1)}
    values = {**entry, **quartiles}
    return {key: value for key, value in values.items() if isinstance(value, (int, float))}


def draw_curves(entries: Sequence[Mapping[str, Any]]) -> bytes:
    r"""
    Plot a training log.

    Args:
        entries (`Sequence[Mapping[str, Any]]`): Entries of `log.jsonl`, each with its `step`; other keys may lack.

    Returns:
        `bytes`: a PNG.
    """
    from matplotlib.figure import Figure  # slow to load; Figure alone needs no display

    numbers = [flat(entry) for entry in entries]
    lines = {key: [(e["step"], e[key]) for e in numbers if key in e] for keys, _ in PANELS.values() for key in keys}
    panels = {title: panel for title, panel in PANELS.items() if any(lines[key] for key in panel[0])}
    columns = max(1, min(len(panels), 2))
    rows = max(1, -(-len(panels) // columns))  # of an empty log a picture as well
    figure = Figure(figsize=(7 if columns == 1 else 12, 3 * rows), layout="constrained")
    for number, (title, (keys, logarithmic)) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, columns, number)
        for key in keys:
            if lines[key]:
                parts = np.array_split(np.array(lines[key], dtype=float), min(len(lines[key]), POINTS))
                steps, values = np.array([part.mean(axis=0) for part in parts]).T
                axes.plot(steps, values, linewidth=1, marker="." if len(steps) < 20 else None, label=key)
        axes.set(xlabel="step", ylabel=title, yscale="log" if logarithmic else "linear")
        axes.grid(which="both", alpha=0.3)
        if len(keys) > 1:
            axes.legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120 if columns == 1 else 80)
    return buffer.getvalue()
