"""Pictures of one run, drawn from its metrics.jsonl."""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Series = tuple[list[int], list[float]]

SMOOTH_FROM = 30  # more train points than this get a smoothed line
_SIZE_INCHES, _DPI = (10.0, 6.0), 150
_LONGEST_TITLE = 90

# Okabe and Ito's palette, told apart with any kind of colour vision; line styles differ as well.
BLUE, VERMILION, _BLACK, GREEN, _PURPLE = "#0072B2", "#D55E00", "#333333", "#009E73", "#AA4499"
GREY = "#666666"
_UPPER = (
    ("rewards/chosen", "chosen (thumbs-up)", BLUE, "-", "o"),
    ("rewards/rejected", "rejected (thumbs-down)", VERMILION, "-", "s"),
    ("delta", "reward shift δ", _BLACK, "--", "D"),
)
_MARGIN = ("rewards/margins", "margin", GREEN, "-", "o")
_ACCURACY = ("rewards/accuracies", "accuracy", _PURPLE, "-", "s")
_KEYS = [spec[0] for spec in (*_UPPER, _MARGIN, _ACCURACY)]


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read a metrics.jsonl: one JSON object per line with `step`, `split` and any metrics.

    Where a step of a split was logged twice, by a run that was resumed, the later line wins. A last line that a killed
    run left half written is passed over.

    Returns:
        The rows in order of their steps, train before eval within a step.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line that is not an object with a step and a split, named by file and line number.
    """
    lines = Path(path).read_bytes().split(b"\n")
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:  # bad JSON, or a character cut in the middle
            if number == len(lines):  # no line feed after it: the run was killed while writing
                break
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        if not (isinstance(row, dict) and isinstance(row.get("step"), int) and row.get("split") in ("train", "eval")):
            raise ValueError(f'{path}, line {number}: needs an integer "step" and a "split" of "train" or "eval"')
        rows[row["step"], row["split"]] = row
    return [rows[key] for key in sorted(rows, key=lambda key: (key[0], key[1] != "train"))]


def plot_rewards(metrics_path: str | os.PathLike[str], png_path: str | os.PathLike[str]) -> Path:
    """Draw rewards and δ above, margin and accuracy below, over the steps of a run.

    Train metrics are lines (with a smoothed one on top when there are many points), eval metrics are markers.

    Returns:
        The path of the PNG, which appears whole or not at all.

    Raises:
        ValueError: The file holds nothing to draw.
    """
    rows = read_metrics(metrics_path)
    if not any(_points(rows, key, split)[0] for key in _KEYS for split in ("train", "eval")):
        raise ValueError(f"{metrics_path} holds no rewards to draw")
    figure = Figure(figsize=_SIZE_INCHES, dpi=_DPI, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    accuracy = lower.twinx()
    for spec in _UPPER:
        _draw(upper, rows, *spec)
    _draw(lower, rows, *_MARGIN)
    _draw(accuracy, rows, *_ACCURACY)
    upper.set_ylabel("implicit reward (nats)")
    lower.set_ylabel("margin (nats)", color=GREEN)
    accuracy.set_ylabel("accuracy (share of rows)", color=_PURPLE)
    for axes in (upper, lower, accuracy):
        _tidy(axes, is_twin=axes is accuracy)
    _step_axis(lower, rows)
    _legend(upper, [upper])
    _legend(lower, [lower, accuracy])
    upper.set_title(_reading_help(rows), loc="right", fontsize=8.5, color="#666666")
    figure.suptitle(_title(Path(metrics_path)), x=0.02, ha="left", fontsize=12, fontweight="bold", parse_math=False)
    return save(figure, Path(png_path))


def _points(rows: list[dict[str, Any]], key: str, split: str) -> Series:
    """Steps and finite values of one metric; rows without it, as of a batch with one label only, are left out."""
    name = f"eval_{key}" if split == "eval" else key
    steps: list[int] = []
    values: list[float] = []
    for row in rows:
        value = row.get(name)
        if row["split"] == split and isinstance(value, int | float) and math.isfinite(value):
            steps.append(row["step"])
            values.append(float(value))
    return steps, values


def _draw(axes: Axes, rows: list[dict[str, Any]], key: str, label: str, color: str, line: str, marker: str) -> None:
    steps, values = _points(rows, key, "train")
    if len(steps) > SMOOTH_FROM:
        axes.plot(steps, values, color=color, linestyle=line, linewidth=0.8, alpha=0.3)
        axes.plot(steps, _smoothed(values), color=color, linestyle=line, linewidth=2.2, label=label)
    elif steps:
        alone = marker if len(steps) == 1 else None  # a line needs two points to be seen
        axes.plot(steps, values, color=color, linestyle=line, linewidth=1.8, marker=alone, markersize=4, label=label)
    named = bool(steps)
    steps, values = _points(rows, key, "eval")
    if steps:
        name = "_nolegend_" if named else label  # one entry per metric keeps the legend on one row
        (points,) = axes.plot(steps, values, linestyle="none", marker=marker, markersize=6.5, zorder=3, label=name)
        points.set(markerfacecolor="white", markeredgecolor=color, markeredgewidth=1.6)


def _smoothed(values: list[float]) -> np.ndarray:
    """Centred moving average over about a tenth of the points; at the ends, over those that are there."""
    window = np.ones(2 * max(2, len(values) // 20) + 1)
    sums = np.convolve(values, window, mode="same")
    counts = np.convolve(np.ones(len(values)), window, mode="same")
    return np.asarray(sums / counts)


def _tidy(axes: Axes, *, is_twin: bool) -> None:
    axes.spines["top"].set_visible(False)
    axes.spines["right"].set_visible(is_twin)
    if not axes.lines:
        axes.set_yticks([])
        return
    if is_twin:
        axes.set_ylim(-0.03, 1.03)
        axes.axhline(0.5, color=_PURPLE, linewidth=0.8, linestyle=":", alpha=0.7)  # what a coin would get
    else:
        axes.grid(color="#DDDDDD", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.axhline(0.0, color="#999999", linewidth=0.8, zorder=1)


def _step_axis(axes: Axes, rows: list[dict[str, Any]]) -> None:
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    steps = {row["step"] for row in rows}
    if len(steps) == 1:
        axes.set_xlim(min(steps) - 1, min(steps) + 1)


def _reading_help(rows: list[dict[str, Any]]) -> str:
    notes = []
    if any(len(_points(rows, key, "train")[0]) > SMOOTH_FROM for key in _KEYS):
        notes += ["thin: as logged", "thick: smoothed"]
    if any(row["split"] == "eval" for row in rows):
        notes.append("markers: evaluation")
    return " · ".join(notes)


def _legend(panel: Axes, sources: list[Axes]) -> None:
    """One row above the panel, where it can hide no data."""
    found = [pair for axes in sources for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    if found:
        handles, labels = zip(*found, strict=True)
        panel.legend(
            handles,
            labels,
            loc="lower left",
            bbox_to_anchor=(0.0, 1.0),
            borderaxespad=0.2,
            ncols=len(found),
            frameon=False,
            fontsize=8.5,
            columnspacing=1.4,
        )


def _title(metrics_path: Path) -> str:
    name = metrics_path.resolve().parent.name
    return name if len(name) <= _LONGEST_TITLE else name[: _LONGEST_TITLE - 1] + "…"


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        FigureCanvasAgg(figure)
        figure.savefig(temporary, format="png", dpi=_DPI)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
