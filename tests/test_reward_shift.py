import itertools
import json
import random
from dataclasses import FrozenInstanceError

import pytest
import torch

from bco_lab.reward_shift import RewardShift, RewardSums


def sums(rewards: list[float], labels: list[bool]) -> RewardSums:
    up = [r for r, label in zip(rewards, labels, strict=True) if label]
    down = [r for r, label in zip(rewards, labels, strict=True) if not label]
    return RewardSums(sum(up), len(up), sum(down), len(down))


@pytest.mark.parametrize("kind", ["ema", "trl", "zero"])
def test_delta_is_zero_before_the_first_update(kind: str) -> None:
    assert RewardShift(kind).delta == 0.0


def test_ema_by_hand_over_three_steps_with_an_absent_class() -> None:
    shift = RewardShift("ema", decay=0.75)
    shift = shift.update(RewardSums(8.0, 2.0, -8.0, 4.0))  # means 4 and -2
    assert (shift.desirable_mean, shift.undesirable_mean, shift.delta) == (1.0, -0.5, 0.25)
    shift = shift.update(RewardSums(3.0, 1.0, 0.0, 0.0))  # no undesirable rows: their mean stays
    assert (shift.desirable_mean, shift.undesirable_mean, shift.delta) == (1.5, -0.5, 0.5)
    shift = shift.update(RewardSums(0.0, 0.0, 3.0, 2.0))  # no desirable ones
    assert (shift.desirable_mean, shift.undesirable_mean, shift.delta) == (1.5, 0.0, 0.75)
    assert shift.update(RewardSums()) == shift


def test_ema_weighs_classes_equally_whatever_their_counts() -> None:
    shift = RewardShift("ema", decay=0.0).update(sums([2.0] * 99 + [0.0], [True] * 99 + [False]))
    assert shift.delta == 1.0


def test_ema_has_forgotten_its_zero_start_in_the_limit() -> None:
    shift = RewardShift("ema", decay=0.9)
    for step in range(1, 21):
        shift = shift.update(RewardSums(2.0, 1.0, 12.0, 3.0))
        assert shift.delta == pytest.approx(3.0 * (1 - 0.9**step), rel=1e-12)


@pytest.mark.parametrize("cut", [[12], [1] * 12, [5, 4, 3], [2, 10]])
def test_trl_is_the_mean_of_everything_seen_however_it_is_cut(cut: list[int]) -> None:
    generator = random.Random(0)
    rewards = [generator.gauss(1, 3) for _ in range(12)]
    labels = [generator.random() < 0.3 for _ in rewards]
    shift, begin = RewardShift("trl"), 0
    for end in itertools.accumulate(cut):
        shift = shift.update(sums(rewards[begin:end], labels[begin:end]))
        assert shift.delta == pytest.approx(sum(rewards[:end]) / end, rel=1e-12)
        begin = end
    assert shift.count == 12


def test_trl_is_the_mean_of_its_running_moments() -> None:
    generator = torch.Generator().manual_seed(0)
    shift, mean, count = RewardShift("trl"), 0.0, 1e-24
    for size in (1, 4, 7, 2, 16):
        rewards = torch.randn(size, generator=generator) + 0.5
        labels = (torch.rand(size, generator=generator) < 0.5).tolist()
        shift = shift.update(sums(rewards.tolist(), labels))
        # RunningMoments.update of trl 1.13.0, on one process
        difference = rewards.mean() - mean
        total = count + size
        mean += (difference * size / total).item()
        count = total
        assert shift.delta == pytest.approx(mean, abs=1e-6)


def test_trl_ignores_an_empty_batch() -> None:
    shift = RewardShift("trl").update(RewardSums(3.0, 2.0, 1.0, 2.0))
    assert shift.update(RewardSums()) == shift
    assert (shift.delta, shift.count) == (1.0, 4.0)
    assert RewardShift("trl").update(RewardSums()).delta == 0.0


def test_zero_stays_zero() -> None:
    assert RewardShift("zero").update(RewardSums(5.0, 1.0, 7.0, 1.0)) == RewardShift("zero")
    assert RewardShift("zero").update(RewardSums(5.0, 1.0, 7.0, 1.0)).delta == 0.0


def test_only_trl_updates_before_use() -> None:
    assert {kind: RewardShift(kind).updates_before_use for kind in ("ema", "trl", "zero")} == {
        "ema": False,
        "trl": True,
        "zero": False,
    }


def test_update_keeps_kind_and_decay_and_leaves_the_old_state_alone() -> None:
    old = RewardShift("ema", decay=0.5)
    new = old.update(RewardSums(2.0, 1.0, 4.0, 1.0))
    assert new == RewardShift("ema", 0.5, 1.0, 2.0)
    assert old == RewardShift("ema", 0.5)
    with pytest.raises(FrozenInstanceError):
        old.mean = 1.0  # type: ignore[misc]


def test_unknown_kind_names_value_and_rule() -> None:
    with pytest.raises(ValueError, match=r"^reward_shift='mean' must be one of ema, trl, zero$"):
        RewardShift("mean")


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5, float("nan")])
def test_decay_outside_its_range_names_value_and_rule(decay: float) -> None:
    with pytest.raises(ValueError, match=rf"^reward_shift_decay={decay} must be in \[0, 1\)$"):
        RewardShift("ema", decay=decay)


@pytest.mark.parametrize("kind", ["ema", "trl", "zero"])
def test_state_survives_json_bit_for_bit(kind: str) -> None:
    generator = random.Random(3)
    shift = RewardShift(kind, decay=0.97)
    for _ in range(5):
        shift = shift.update(RewardSums(generator.gauss(0, 1) / 3, 3.0, generator.gauss(0, 1) / 7, 5.0))
    restored = RewardShift(**json.loads(json.dumps(shift.state_dict())))
    assert restored == shift
    assert restored.delta.hex() == shift.delta.hex()
    more = RewardSums(0.1, 3.0, 0.7, 1.0)
    assert restored.update(more).delta.hex() == shift.update(more).delta.hex()
