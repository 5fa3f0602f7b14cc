import pytest
import torch

from bco_lab.density_ratio import density_ratio


def test_ratio_by_hand() -> None:
    weights = density_ratio(torch.tensor([0.5, 0.75, 0.8, 0.4], dtype=torch.float64), 0.1, 100.0)
    assert weights.tolist() == pytest.approx([1.0, 3.0, 4.0, 2 / 3], rel=1e-12)
    assert weights.dtype == torch.float64


def test_both_bounds_clamp_and_certainty_is_no_division_by_zero() -> None:
    weights = density_ratio(torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0]), 0.5, 2.0)
    assert weights.tolist() == [0.5, 0.5, 1.0, 2.0, 2.0]


def test_equal_bounds_make_every_weight_the_same() -> None:
    assert density_ratio(torch.tensor([[0.0], [1.0]]), 3.0, 3.0).tolist() == [[3.0], [3.0]]


def test_clamping_wider_bounds_again_is_clamping_once() -> None:
    probability = torch.linspace(0, 1, 101, dtype=torch.float64)
    once = density_ratio(probability, 0.5, 2.0)
    assert torch.equal(density_ratio(probability, 0.1, 10.0).clamp(0.5, 2.0), once)
    assert bool((once.diff() >= 0).all())


@pytest.mark.parametrize("probability", [-1e-9, 1.0 + 1e-9, float("nan"), float("inf")])
def test_a_value_that_is_no_probability_is_refused(probability: float) -> None:
    with pytest.raises(ValueError, match=r"^a probability of the desirable class must be in \[0, 1\]$"):
        density_ratio(torch.tensor([0.5, probability], dtype=torch.float64), 0.5, 10.0)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-1.0, 1.0), (20.0, 10.0), (float("nan"), 1.0)])
def test_bounds_in_the_wrong_order_name_value_and_rule(low: float, high: float) -> None:
    message = rf"^min_density_ratio={low} must be in \(0, max_density_ratio={high}\]$"
    with pytest.raises(ValueError, match=message):
        density_ratio(torch.tensor([0.5]), low, high)
