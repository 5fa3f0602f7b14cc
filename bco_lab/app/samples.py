"""What the model writes: completions sampled from it, before and after training, side by side."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bco_lab.app.judge import Judge
from bco_lab.generation import Prompt, check_sampling, readable_prompt


@dataclass(frozen=True)
class GenerationSettings:
    """How many completions to sample before and after training, and how.

    Raises:
        ValueError: A value out of its range.
    """

    count: int = 48
    max_new_tokens: int = 48
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"count={self.count} must be >= 0")
        check_sampling(self.max_new_tokens, self.temperature, self.top_p)

    def sampling(self) -> dict[str, Any]:
        """The arguments of `generate_completions`."""
        return {name: value for name, value in asdict(self).items() if name != "count"}


@dataclass(frozen=True)
class SampleComparison:
    """Completions of the same prompts before and after training, and what a judge says of them.

    Attributes:
        prompts: What a person would read as the prompt, one per sample.
        before: Completions of the untrained policy.
        after: Completions of the trained policy.
        judge_accuracy: How often the judge is right on its own held-out rows; None without a judge.
        positive_before: Share of `before` judged positive; None without a judge.
        positive_after: Share of `after` judged positive; None without a judge.
    """

    prompts: list[str]
    before: list[str]
    after: list[str]
    judge_accuracy: float | None = None
    positive_before: float | None = None
    positive_after: float | None = None

    def to_rows(self) -> list[dict[str, str]]:
        """One `{"prompt", "before", "after"}` per sample."""
        triples = zip(self.prompts, self.before, self.after, strict=True)
        return [{"prompt": prompt, "before": before, "after": after} for prompt, before, after in triples]

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain JSON values."""
        return {
            "count": len(self.prompts),
            "positive_before": self.positive_before,
            "positive_after": self.positive_after,
            "judge_accuracy": self.judge_accuracy,
            "pairs": self.to_rows(),
        }


def compare_samples(
    prompts: Sequence[Prompt], before: Sequence[str], after: Sequence[str], judge: Judge | None = None
) -> SampleComparison:
    """Put two lists of completions side by side and let the judge, if there is one, count the positive ones.

    Raises:
        ValueError: The three lists differ in length.
    """
    if not len(prompts) == len(before) == len(after):
        raise ValueError(f"got {len(prompts)} prompts, {len(before)} completions before and {len(after)} after")
    return SampleComparison(
        prompts=[readable_prompt(prompt) for prompt in prompts],
        before=list(before),
        after=list(after),
        judge_accuracy=judge.accuracy if judge else None,
        positive_before=judge.share_positive(before) if judge and before else None,
        positive_after=judge.share_positive(after) if judge and after else None,
    )
