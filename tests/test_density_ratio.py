import math

import pytest
import torch

from bco_lab.density_ratio import (
    density_ratio,
    effective_sample_size,
    matching_ratio,
    matching_weights,
    summarize_weights,
)


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


# Odds 1/4, 1, 3, 4, 19 and, clamped to [0.5, 5], weights 0.5, 1, 3, 4, 5: Σw = 13.5, Σw² = 51.25.
PROBABILITIES = torch.tensor([0.2, 0.5, 0.75, 0.8, 0.95], dtype=torch.float64)


def test_summary_by_hand() -> None:
    found = summarize_weights(PROBABILITIES, 0.5, 5.0)
    assert found.rows == 5
    assert found.mean == pytest.approx(2.7, rel=1e-12)
    assert found.unclamped_mean == pytest.approx(27.25 / 5, rel=1e-12)
    assert found.effective_sample_size == pytest.approx(13.5**2 / 51.25, rel=1e-12)
    assert (found.share_below_min, found.share_above_max) == (0.2, 0.2)
    assert found.to_dict()["share_above_max"] == 0.2


def test_ratios_on_a_bound_are_not_clamped() -> None:
    found = summarize_weights(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64), 1 / 3, 3.0)
    assert (found.share_below_min, found.share_above_max) == (0.0, 0.0)


def test_certain_rows_are_clamped_and_show_in_the_unclamped_mean() -> None:
    found = summarize_weights(torch.tensor([1.0, 0.5, 0.0]), 0.5, 2.0)
    assert found.mean == pytest.approx((2 + 1 + 0.5) / 3)
    assert found.unclamped_mean == math.inf
    assert (found.share_below_min, found.share_above_max) == pytest.approx((1 / 3, 1 / 3))


def test_a_summary_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^there are no rows to weigh$"):
        summarize_weights(torch.empty(0), 0.5, 10.0)


def test_effective_sample_size_counts_equal_weights_fully_and_ignores_their_scale() -> None:
    assert effective_sample_size(torch.full((7,), 0.3)) == pytest.approx(7.0)
    weights = torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64)
    assert effective_sample_size(weights) == pytest.approx(16 / 6)
    assert effective_sample_size(10 * weights) == pytest.approx(16 / 6)
    assert math.isnan(effective_sample_size(torch.empty(0)))


P = torch.tensor([0.9, 0.2, 0.75, 0.5])
LABEL = torch.tensor([True, False, False, True])


@pytest.mark.parametrize(
    ("target", "ratio", "weighed"),
    [
        ("desirable", [1, 0.25, 3, 1], [False, True, True, False]),
        ("undesirable", [1 / 9, 1, 1, 1], [True, False, False, True]),
        ("mixture", [5 / 9, 0.625, 2, 1], [True] * 4),
    ],
)
def test_ratios_by_target_worked_out_by_hand(target, ratio, weighed) -> None:
    found, mask = matching_ratio(P, LABEL, target)
    assert found.tolist() == pytest.approx(ratio, rel=1e-6)
    assert mask.tolist() == weighed


def test_weights_are_clamped_where_rows_are_weighed_and_one_elsewhere() -> None:
    weights, summary = matching_weights(P, LABEL, 1.5, 2.0, "desirable")
    assert weights.tolist() == [1, 1.5, 2, 1]
    assert (summary.rows, summary.mean, summary.unclamped_mean) == (2, 1.75, pytest.approx(1.625, rel=1e-6))
    assert (summary.share_below_min, summary.share_above_max) == (0.5, 0.5)


def test_weighting_makes_the_classes_share_their_prompts() -> None:
    """Two kinds of prompts, thumbs-up from them as 3 to 1, thumbs-down as 1 to 3: weighted counts agree."""
    kinds = torch.tensor([0] * 3 + [1] + [0] + [1] * 3)
    label = torch.tensor([True] * 4 + [False] * 4)
    p = torch.where(kinds == 0, 0.75, 0.25)
    for target, share in (("desirable", 0.75), ("undesirable", 0.25), ("mixture", 0.5)):
        weights, _ = matching_weights(p, label, 1e-3, 1e3, target)
        for value in (True, False):
            rows = label == value
            assert (weights[rows & (kinds == 0)].sum() / weights[rows].sum()).item() == pytest.approx(share)


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^target=up must be one of desirable, undesirable, mixture$"):
        matching_ratio(P, LABEL, "up")
