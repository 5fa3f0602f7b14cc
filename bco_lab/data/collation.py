"""Tokenised rows to padded tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class FeedbackCollator:
    """Pads tokenised rows on the right.

    Attributes:
        pad_token_id: Fills `input_ids` where `attention_mask` is 0.
        pad_to_multiple_of: Round the padded length up to a multiple of this, for hardware that wants it.
    """

    pad_token_id: int = 0
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collate rows with `input_ids`, `prompt_length`, `label` and `example_id`.

        Returns:
            `input_ids` and `attention_mask` (int64) and `completion_mask` (bool), `[batch, tokens]`; `label` (bool) and
            `example_id` (int64), `[batch]`; `ref_logps` (nats) and `example_weight`, `[batch]` float32, if the rows
            have them.
        """
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        prompt_lengths = torch.tensor([row["prompt_length"] for row in rows])
        width = int(lengths.max())
        if self.pad_to_multiple_of:
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        input_ids = torch.full((len(rows), width), self.pad_token_id, dtype=torch.int64)
        for padded, row in zip(input_ids, rows, strict=True):
            padded[: len(row["input_ids"])] = torch.as_tensor(row["input_ids"], dtype=torch.int64)
        positions = torch.arange(width).unsqueeze(0)
        inside = positions < lengths.unsqueeze(1)
        batch = {
            "input_ids": input_ids,
            "attention_mask": inside.long(),
            "completion_mask": inside & (positions >= prompt_lengths.unsqueeze(1)),
            "label": torch.tensor([bool(row["label"]) for row in rows]),
            "example_id": torch.tensor([int(row["example_id"]) for row in rows]),
        }
        for column in ("ref_logps", "example_weight"):
            if column in rows[0]:
                batch[column] = torch.tensor([float(row[column]) for row in rows], dtype=torch.float32)
        return batch
