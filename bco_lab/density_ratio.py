"""Density ratio of underlying distribution matching: how much more a prompt belongs to the desirable class."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class WeightSummary:
    """What the weights of a set of undesirable rows amount to.

    Attributes:
        rows: Undesirable rows.
        mean: Mean weight, after clamping.
        unclamped_mean: Mean density ratio before clamping; 1 in expectation where the probabilities are right.
        effective_sample_size: Kish's, of the clamped weights, in rows.
        share_below_min: Share of rows whose ratio is below the lower bound.
        share_above_max: Share of rows whose ratio is above the upper bound.
    """

    rows: int
    mean: float
    unclamped_mean: float
    effective_sample_size: float
    share_below_min: float
    share_above_max: float

    def to_dict(self) -> dict[str, float]:
        """All fields by name."""
        return asdict(self)


def density_ratio(probability: Tensor, min_density_ratio: float, max_density_ratio: float) -> Tensor:
    """`p / (1 - p)`, clamped (arXiv 2404.04656, section 4.3).

    With as many rows of both classes, `p / (1 - p)` is the ratio of the prompt densities, desirable over undesirable.

    Args:
        probability: `p(desirable | prompt)`, any shape, in [0, 1].
        min_density_ratio: Lower clamp, > 0.
        max_density_ratio: Upper clamp, >= min_density_ratio.

    Returns:
        Weights of undesirable rows, float64, the shape of `probability`.

    Raises:
        ValueError: A probability outside [0, 1], or bounds in the wrong order.
    """
    if not 0 < min_density_ratio <= max_density_ratio:
        raise ValueError(f"min_density_ratio={min_density_ratio} must be in (0, max_density_ratio={max_density_ratio}]")
    return torch.clamp(_odds(probability), min_density_ratio, max_density_ratio)


def summarize_weights(probability: Tensor, min_density_ratio: float, max_density_ratio: float) -> WeightSummary:
    """Summarise the weights that undesirable rows get.

    Args:
        probability: `p(desirable | prompt)` of undesirable rows, `[rows]`, in [0, 1].
        min_density_ratio: Lower clamp, > 0.
        max_density_ratio: Upper clamp, >= min_density_ratio.

    Raises:
        ValueError: See `density_ratio`; or no rows.
    """
    if not probability.numel():
        raise ValueError("there are no undesirable rows to weigh")
    weights = density_ratio(probability, min_density_ratio, max_density_ratio)
    odds = _odds(probability)
    return WeightSummary(
        rows=probability.numel(),
        mean=weights.mean().item(),
        unclamped_mean=odds.mean().item(),
        effective_sample_size=effective_sample_size(weights),
        share_below_min=(odds < min_density_ratio).double().mean().item(),
        share_above_max=(odds > max_density_ratio).double().mean().item(),
    )


def effective_sample_size(weights: Tensor) -> float:
    """Kish's effective sample size, `(Σw)² / Σw²`; NaN without rows."""
    return (weights.sum() ** 2 / (weights**2).sum()).item() if weights.numel() else float("nan")


def _odds(probability: Tensor) -> Tensor:
    p = probability.double()
    if not bool(((p >= 0) & (p <= 1)).all()):
        raise ValueError("a probability of the desirable class must be in [0, 1]")
    return p / (1 - p)
