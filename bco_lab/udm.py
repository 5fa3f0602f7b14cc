"""Underlying distribution matching: what weighs the examples before training."""

from dataclasses import dataclass

from bco_lab.data.sources import FeedbackData


@dataclass(frozen=True)
class NoMatching:
    """Matching switched off: every example keeps the weight it came with, 1 where it has none."""

    def weigh(self, data: FeedbackData) -> FeedbackData:
        """Return the data as they are."""
        return data
