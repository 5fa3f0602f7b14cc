"""How right the weights of undesirable rows are, where the true density ratio is known: two Gaussians.

    python benchmarks/density_ratio.py --seeds 5

Desirable and undesirable "embeddings" are drawn from Gaussians one standard deviation apart. For each way of fitting
the table says the mean weight of undesirable rows (1 if the ratios are right, before clamping) and the correlation of
their estimated with their true log-ratio; medians over the seeds, and the range. Rows are weighed as training would
weigh them: TRL asks the classifier about rows it was fitted on, the others ask one that was not.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from tqdm.auto import tqdm

from bco_lab.prompt_classifier import FOLDS, fit_density_ratio

Floats = NDArray[np.float64]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024, help="of each class")
    parser.add_argument("--dims", type=int, nargs="+", default=[32, 384])
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    table = Table("dim", "fit", "mean weight", "range", "correlation", "range")
    cases = [(dim, name, fit) for dim in args.dims for name, fit in fits(dim).items()]
    for dim, name, fit in tqdm(cases, desc="Fitting"):
        found = [judged(fit, *gaussians(args.rows, dim, seed)) for seed in range(args.seeds)]
        cells = []
        for values in zip(*found, strict=True):
            cells += [f"{statistics.median(values):.2f}", f"{min(values):.2f} to {max(values):.2f}"]
        table.add_row(str(dim), name, *cells)
    Console().print(table)


def gaussians(rows: int, dim: int, seed: int) -> tuple[Floats, NDArray[np.bool_], Floats]:
    """Points `[2 rows, dim]`, labels and true log-ratios; the means are one standard deviation apart."""
    rng = np.random.default_rng([dim, seed])
    direction = rng.normal(size=dim)
    direction /= np.linalg.norm(direction)
    labels = np.arange(2 * rows) % 2 == 0
    points = rng.normal(size=(2 * rows, dim)) + np.where(labels, 0.5, -0.5)[:, None] * direction
    return points, labels, points @ direction


def fits(dim: int) -> dict[str, Callable[[Floats, NDArray[np.bool_]], Floats]]:
    """Ways to get log-ratios of all rows, by name."""
    ways = {
        "in sample, C = 1 (TRL)": lambda x, y: plain(x, y, x),
        "held out, C = 1": held_out,
        "as built": built,
    }
    for kept in (32, 128):
        if kept < dim:
            ways[f"as built, on {kept} principal components"] = lambda x, y, kept=kept: built(
                PCA(kept, random_state=0).fit_transform(x), y
            )
    return ways


def plain(x: Floats, y: NDArray[np.bool_], asked: Floats) -> Floats:
    """Log-ratios of `asked` by scikit-learn's default strength."""
    return LogisticRegression(class_weight="balanced", max_iter=1000).fit(x, y).decision_function(asked)


def held_out(x: Floats, y: NDArray[np.bool_]) -> Floats:
    """The same, each fold by the others."""
    logits = np.empty(len(y))
    folds = np.random.default_rng(0).permutation(len(y)) % FOLDS
    for fold in range(FOLDS):
        logits[folds == fold] = plain(x[folds != fold], y[folds != fold], x[folds == fold])
    return logits


def built(x: Floats, y: NDArray[np.bool_]) -> Floats:
    """What `udm=on` does."""
    p = fit_density_ratio(x, y, range(len(y)), prompt_sample_size=len(y), seed=0).p_desirable
    return np.log(p / (1 - p))


def judged(fit: Callable[..., Any], x: Floats, y: NDArray[np.bool_], truth: Floats) -> tuple[float, float]:
    """Mean weight of the undesirable rows, and correlation with the true log-ratio."""
    logits = fit(x, y)[~y]
    return float(np.exp(logits).mean()), float(np.corrcoef(logits, truth[~y])[0, 1])


if __name__ == "__main__":
    main()
