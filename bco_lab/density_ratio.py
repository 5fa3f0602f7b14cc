"""Density ratio of underlying distribution matching: how much more a prompt belongs to the desirable class."""

import torch
from torch import Tensor


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
    p = probability.double()
    if not bool(((p >= 0) & (p <= 1)).all()):
        raise ValueError("a probability of the desirable class must be in [0, 1]")
    return torch.clamp(p / (1 - p), min_density_ratio, max_density_ratio)
