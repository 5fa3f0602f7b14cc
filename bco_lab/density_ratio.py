"""Density ratio of underlying distribution matching: how much more a prompt belongs to the desirable class."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

TARGETS = ("desirable", "undesirable", "mixture")


@dataclass(frozen=True)
class WeightSummary:
    """What the weights of a set of rows amount to.

    Attributes:
        rows: Rows that are weighed: the undesirable ones, unless another target was asked for.
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
    return _clamped(_odds(probability), min_density_ratio, max_density_ratio)


def matching_ratio(probability: Tensor, label: Tensor, target: str = "desirable") -> tuple[Tensor, Tensor]:
    """How much more each prompt belongs to the distribution that matching aims at than to its own class's.

    - `desirable` (the paper, and TRL): undesirable rows get `p / (1 - p)`.
    - `undesirable`: desirable rows get `(1 - p) / p`.
    - `mixture`: both classes are drawn to half of each, desirable rows get `1 / (2 p)`, undesirable ones
      `1 / (2 (1 - p))`; no ratio is below 1/2.

    Args:
        probability: `p(desirable | prompt)` with both classes equally frequent, `[rows]`, in [0, 1].
        label: True is desirable, `[rows]`.
        target: One of TARGETS.

    Returns:
        Ratios before clamping, float64 `[rows]`, 1 for rows that are not weighed; and which rows are, bool `[rows]`.

    Raises:
        ValueError: A probability outside [0, 1], or no such target.
    """
    if target not in TARGETS:
        raise ValueError(f"target={target} must be one of {', '.join(TARGETS)}")
    p = _checked(probability)
    own = torch.where(label, p, 1 - p)
    if target == "mixture":
        return 0.5 / own, torch.ones_like(label)
    weighed = ~label if target == "desirable" else label
    return torch.where(weighed, (1 - own) / own, 1.0), weighed


def matching_weights(
    probability: Tensor, label: Tensor, min_density_ratio: float, max_density_ratio: float, target: str = "desirable"
) -> tuple[Tensor, WeightSummary]:
    """Clamped ratios of all rows, and what those of the rows that are weighed amount to.

    Args:
        probability: See `matching_ratio`.
        label: See `matching_ratio`.
        min_density_ratio: Lower clamp, > 0.
        max_density_ratio: Upper clamp, >= min_density_ratio.
        target: See `matching_ratio`.

    Returns:
        Weights, float64 `[rows]`, 1 for rows that are not weighed; and their summary.

    Raises:
        ValueError: See `matching_ratio`; bounds in the wrong order; no row to weigh.
    """
    ratio, weighed = matching_ratio(probability, label, target)
    weights = torch.where(weighed, _clamped(ratio, min_density_ratio, max_density_ratio), 1.0)
    return weights, _summary(ratio[weighed], min_density_ratio, max_density_ratio)


def summarize_weights(probability: Tensor, min_density_ratio: float, max_density_ratio: float) -> WeightSummary:
    """Summarise the weights that undesirable rows get.

    Args:
        probability: `p(desirable | prompt)` of undesirable rows, `[rows]`, in [0, 1].
        min_density_ratio: Lower clamp, > 0.
        max_density_ratio: Upper clamp, >= min_density_ratio.

    Raises:
        ValueError: See `density_ratio`; or no rows.
    """
    return _summary(_odds(probability), min_density_ratio, max_density_ratio)


def effective_sample_size(weights: Tensor) -> float:
    """Kish's effective sample size, `(Σw)² / Σw²`; NaN without rows."""
    return (weights.sum() ** 2 / (weights**2).sum()).item() if weights.numel() else float("nan")


def _summary(ratio: Tensor, min_density_ratio: float, max_density_ratio: float) -> WeightSummary:
    if not ratio.numel():
        raise ValueError("there are no rows to weigh")
    weights = _clamped(ratio, min_density_ratio, max_density_ratio)
    return WeightSummary(
        rows=ratio.numel(),
        mean=weights.mean().item(),
        unclamped_mean=ratio.mean().item(),
        effective_sample_size=effective_sample_size(weights),
        share_below_min=(ratio < min_density_ratio).double().mean().item(),
        share_above_max=(ratio > max_density_ratio).double().mean().item(),
    )


def _clamped(ratio: Tensor, min_density_ratio: float, max_density_ratio: float) -> Tensor:
    if not 0 < min_density_ratio <= max_density_ratio:
        raise ValueError(f"min_density_ratio={min_density_ratio} must be in (0, max_density_ratio={max_density_ratio}]")
    return torch.clamp(ratio, min_density_ratio, max_density_ratio)


def _odds(probability: Tensor) -> Tensor:
    p = _checked(probability)
    return p / (1 - p)


def _checked(probability: Tensor) -> Tensor:
    p = probability.double()
    if not bool(((p >= 0) & (p <= 1)).all()):
        raise ValueError("a probability of the desirable class must be in [0, 1]")
    return p
