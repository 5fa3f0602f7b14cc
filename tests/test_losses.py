import math

import pytest
import torch
import torch.nn.functional as F

from bco_lab.losses import bco_loss, implicit_reward, reduction_weights


def test_implicit_reward_is_beta_times_the_log_ratio() -> None:
    rewards = implicit_reward(torch.tensor([-10.0, -3.0]), torch.tensor([-12.0, -2.0]), beta=0.25)
    assert rewards.tolist() == [0.5, -0.25]


def test_loss_by_hand() -> None:
    losses = bco_loss(torch.tensor([1.0, 1.0], dtype=torch.float64), torch.tensor([True, False]), 0.5)
    assert losses.tolist() == pytest.approx([math.log(1 + math.exp(-0.5)), math.log(1 + math.exp(0.5))], rel=1e-12)


def test_loss_is_binary_cross_entropy_whose_logit_is_reward_minus_delta() -> None:
    draw = torch.Generator().manual_seed(0)
    rewards = 3 * torch.randn(200, generator=draw, dtype=torch.float64)
    labels = torch.rand(200, generator=draw) < 0.3
    weights = torch.rand(200, generator=draw, dtype=torch.float64)
    expected = F.binary_cross_entropy_with_logits(rewards - 0.7, labels.double(), reduction="none")
    assert torch.allclose(bco_loss(rewards, labels, 0.7), expected, rtol=1e-12)
    assert torch.allclose(bco_loss(rewards, labels, torch.tensor(0.7).double(), weights), weights * expected, rtol=1e-6)


def test_gradient_is_that_of_finite_differences() -> None:
    rewards = torch.tensor([0.3, -2.0, 1.5, 0.0], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([True, True, False, False])
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda r: bco_loss(r, labels, 0.2, weights), (rewards,))


def test_gradient_by_hand_pushes_classes_apart() -> None:
    rewards = torch.tensor([0.2, 0.2], dtype=torch.float64, requires_grad=True)
    bco_loss(rewards, torch.tensor([True, False]), 0.2).sum().backward()
    assert rewards.grad is not None
    assert rewards.grad.tolist() == [-0.5, 0.5]


@pytest.mark.parametrize("label", [True, False])
def test_loss_and_gradient_are_finite_at_huge_rewards(label: bool) -> None:
    rewards = torch.tensor([1e4, -1e4], requires_grad=True)
    losses = bco_loss(rewards, torch.tensor([label, label]), 0.0)
    losses.sum().backward()
    assert losses.tolist() == ([0.0, 1e4] if label else [1e4, 0.0])
    assert rewards.grad is not None
    assert rewards.grad.tolist() == ([0.0, -1.0] if label else [1.0, 0.0])


@pytest.mark.parametrize(
    ("label", "expected"), [(True, math.log(1 + math.exp(-2))), (False, math.log(1 + math.exp(2)))]
)
def test_batch_of_one_label(label: bool, expected: float) -> None:
    losses = bco_loss(torch.full((3,), 2.0), torch.full((3,), label), 0.0)
    assert losses.tolist() == pytest.approx([expected] * 3, rel=1e-6)


def test_no_gradient_reaches_delta() -> None:
    rewards = torch.tensor([0.5, -0.5], requires_grad=True)
    delta = torch.tensor(0.1, requires_grad=True)
    bco_loss(rewards, torch.tensor([True, False]), delta).sum().backward()
    assert rewards.grad is not None
    assert delta.grad is None


def test_integer_labels_are_refused_rather_than_misread() -> None:
    with pytest.raises(RuntimeError, match="boolean"):
        bco_loss(torch.zeros(2), torch.tensor([1, 0]), 0.0)


def test_dtype_of_the_rewards_is_kept() -> None:
    labels = torch.tensor([True, False])
    for dtype in (torch.float32, torch.float64):
        assert bco_loss(torch.zeros(2, dtype=dtype), labels, 0.0, torch.ones(2)).dtype == dtype


def test_class_balanced_shares_sum_to_mean_plus_mean() -> None:
    labels = torch.tensor([True, False, True, False, False])
    losses = torch.tensor([1.0, 2.0, 4.0, 6.0, 10.0])
    shares = reduction_weights(labels, 2, 3, "class_balanced")
    assert shares.tolist() == pytest.approx([1 / 2, 1 / 3, 1 / 2, 1 / 3, 1 / 3])
    assert (shares * losses).sum().item() == pytest.approx(2.5 + 6.0)


def test_pooled_shares_sum_to_the_mean() -> None:
    labels = torch.tensor([True, False, True, False, False])
    losses = torch.tensor([1.0, 2.0, 4.0, 6.0, 10.0])
    shares = reduction_weights(labels, torch.tensor(2), torch.tensor(3), "pooled")
    assert shares.shape == labels.shape
    assert (shares * losses).sum().item() == pytest.approx(23 / 5)


@pytest.mark.parametrize("label", [True, False])
def test_an_absent_class_contributes_nothing(label: bool) -> None:
    labels = torch.full((4,), label)
    losses = torch.tensor([1.0, 2.0, 3.0, 6.0])
    counts = (4, 0) if label else (0, 4)
    for reduction in ("class_balanced", "pooled"):
        assert (reduction_weights(labels, *counts, reduction) * losses).sum().item() == pytest.approx(3.0)


@pytest.mark.parametrize("reduction", ["class_balanced", "pooled"])
@pytest.mark.parametrize("cut", [[12], [1] * 12, [5, 4, 3], [2, 10]])
def test_shares_do_not_depend_on_the_cut(reduction: str, cut: list[int]) -> None:
    draw = torch.Generator().manual_seed(1)
    labels = torch.tensor([True] * 4 + [False] * 8)[torch.randperm(12, generator=draw)]
    losses = torch.rand(12, generator=draw)
    parts = zip(labels.split(cut), losses.split(cut), strict=True)
    total = sum((reduction_weights(part, 4, 8, reduction) * loss).sum().item() for part, loss in parts)
    means = losses[labels].mean() + losses[~labels].mean() if reduction == "class_balanced" else losses.mean()
    assert total == pytest.approx(means.item(), rel=1e-6)


def test_unknown_reduction_names_value_and_rule() -> None:
    with pytest.raises(ValueError, match=r"^loss_reduction='mean' must be one of class_balanced, pooled$"):
        reduction_weights(torch.tensor([True]), 1, 0, "mean")
