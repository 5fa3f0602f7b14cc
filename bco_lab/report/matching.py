"""The picture of what matching did to a run's rows, drawn from its udm.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bco_lab.report.plots import BLUE, GREEN, GREY, VERMILION, save

_SIZE_INCHES, _DPI = (10.0, 4.2), 150


def plot_matching(content: Mapping[str, Any], path: Path) -> Path:
    """Draw p(desirable | prompt) by class on the left, the weights on the right.

    Args:
        content: What `udm.json` holds.
        path: Of the PNG, which appears whole or not at all.
    """
    figure = Figure(figsize=_SIZE_INCHES, dpi=_DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_probabilities(left, content["p_histogram"], content["classifier"])
    _draw_weights(right, content["weight_histogram"], content["weights"], content["settings"])
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylabel("share of rows")
        axes.legend(frameon=False, fontsize=8.5)
    return save(figure, path)


def _draw_probabilities(axes: Axes, histogram: Mapping[str, Any], classifier: Mapping[str, Any]) -> None:
    for name, color, style in (("desirable", BLUE, "-"), ("undesirable", VERMILION, "--")):
        axes.stairs(_shares(histogram[name]), histogram["edges"], color=color, linestyle=style, linewidth=2, label=name)
    axes.set_xlabel("p(desirable | prompt), held out")
    if classifier["auc"] is None:
        axes.set_title("prompts cannot be compared", loc="left", fontsize=10)
    else:
        interval = f"{classifier['auc_low']:.2f} to {classifier['auc_high']:.2f}"
        axes.set_title(f"prompts told apart: AUC {classifier['auc']:.2f} ({interval})", loc="left", fontsize=10)


def _draw_weights(
    axes: Axes, histogram: Mapping[str, Any], weights: Mapping[str, Any], settings: Mapping[str, Any]
) -> None:
    edges = histogram["edges"]
    axes.stairs(_shares(histogram["ratio"]), edges, color=GREY, linewidth=1.5, linestyle=":", label="density ratio")
    axes.stairs(_shares(histogram["weight"]), edges, fill=True, color=GREEN, alpha=0.6, label="weight")
    axes.set_xscale("log")
    ticks = [tick for tick in (0.01, 0.1, 0.5, 1, 2, 5, 10, 50, 100) if edges[0] <= tick <= edges[-1]]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(
        f"weight, bounds {settings['min_density_ratio']:g} and {settings['max_density_ratio']:g}"
        + (", normalised to mean 1" if settings["normalize"] else "")
    )
    share = weights["effective_sample_size"] / weights["rows"]
    axes.set_title(f"{weights['rows']} weighed rows are worth {share:.0%} of their number", loc="left", fontsize=10)


def _shares(counts: Any) -> np.ndarray:
    counts = np.asarray(counts, dtype=float)
    return np.asarray(counts / max(1.0, counts.sum()))
