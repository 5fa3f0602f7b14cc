"""Estimators of the reward shift delta: frozen state, pure `(state, rewards) -> state`.

delta sits between the two classes, so the policy is asked to rank desirable above undesirable rather than to make every
desirable completion more likely and every undesirable one less (arXiv 2404.04656, theorem 2 and equation 7).
"""

from dataclasses import asdict, dataclass
from typing import Any

SHIFT_KINDS: tuple[str, ...] = ("ema", "trl", "zero")


@dataclass(frozen=True)
class RewardSums:
    """Sums of implicit rewards per class: all that any estimator needs of a batch, and addable across processes."""

    desirable_sum: float = 0.0
    desirable_count: float = 0.0
    undesirable_sum: float = 0.0
    undesirable_count: float = 0.0


@dataclass(frozen=True)
class RewardShift:
    """State of one estimator; a checkpoint holds it as JSON.

    `ema`: exponential moving averages of the two class means, updated once per optimizer step; delta is their midpoint.
    `trl`: `count` and `mean` of every reward seen so far, both classes pooled, updated by each micro-batch.
    `zero`: no state, plain binary cross-entropy.
    """

    kind: str = "ema"
    decay: float = 0.9
    desirable_mean: float = 0.0
    undesirable_mean: float = 0.0
    mean: float = 0.0
    count: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in SHIFT_KINDS:
            raise ValueError(f"reward_shift={self.kind!r} must be one of {', '.join(SHIFT_KINDS)}")
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"reward_shift_decay={self.decay} must be in [0, 1)")

    @property
    def delta(self) -> float:
        """The shift to use now. It is 0 before any update, which is exact: at step 0 policy and reference agree."""
        if self.kind == "ema":
            return (self.desirable_mean + self.undesirable_mean) / 2
        return self.mean if self.kind == "trl" else 0.0

    @property
    def updates_before_use(self) -> bool:
        """Whether a micro-batch enters delta before its own loss is computed (TRL's order) or after the step."""
        return self.kind == "trl"

    def update(self, sums: RewardSums) -> "RewardShift":
        """The state after seeing `sums`, which cover all processes; a class without rows leaves its mean alone."""
        if self.kind == "ema":
            return self._replace(
                desirable_mean=self._decayed(self.desirable_mean, sums.desirable_sum, sums.desirable_count),
                undesirable_mean=self._decayed(self.undesirable_mean, sums.undesirable_sum, sums.undesirable_count),
            )
        if self.kind == "trl":
            seen = sums.desirable_count + sums.undesirable_count
            if seen == 0:
                return self
            batch_mean = (sums.desirable_sum + sums.undesirable_sum) / seen
            count = self.count + seen
            return self._replace(mean=self.mean + (batch_mean - self.mean) * seen / count, count=count)
        return self

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready copy of the state; floats survive the round trip bit for bit."""
        return asdict(self)

    def _decayed(self, old: float, total: float, count: float) -> float:
        return old if count == 0 else self.decay * old + (1 - self.decay) * (total / count)

    def _replace(self, **changes: float) -> "RewardShift":
        return RewardShift(**{**asdict(self), **changes})
