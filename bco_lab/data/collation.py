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
        pad_to_multiple_of: Round padded lengths up to a multiple of this, for hardware that wants it.
        decoder_start_token_id: Of an encoder-decoder: what its decoder reads before the first completion token.
    """

    pad_token_id: int = 0
    pad_to_multiple_of: int | None = None
    decoder_start_token_id: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collate rows with `input_ids`, `prompt_length`, `label` and `example_id`.

        Returns:
            `input_ids` and `attention_mask` (int64) and `completion_mask` (bool), `[batch, tokens]`; `label` (bool) and
            `example_id` (int64), `[batch]`; `ref_logps` (nats) and `example_weight`, `[batch]` float32, if the rows
            have them. For an encoder-decoder `input_ids` and `attention_mask` are the prompts, `[batch, prompt
            tokens]`, and `decoder_input_ids`, `target_ids` (int64) and `completion_mask`, `[batch, completion tokens]`,
            what the decoder reads, what it predicts there, and where that counts.
        """
        start = self.decoder_start_token_id
        batch = self._as_one(rows) if start is None else self._apart(rows, start)
        batch["label"] = torch.tensor([bool(row["label"]) for row in rows])
        batch["example_id"] = torch.tensor([int(row["example_id"]) for row in rows])
        for column in ("ref_logps", "example_weight"):
            if column in rows[0]:
                batch[column] = torch.tensor([float(row[column]) for row in rows], dtype=torch.float32)
        return batch

    def _as_one(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        input_ids, inside = self._padded([row["input_ids"] for row in rows])
        prompt_lengths = torch.tensor([row["prompt_length"] for row in rows])
        positions = torch.arange(input_ids.shape[1])
        completion_mask = inside & (positions >= prompt_lengths.unsqueeze(1))
        return {"input_ids": input_ids, "attention_mask": inside.long(), "completion_mask": completion_mask}

    def _apart(self, rows: Sequence[Mapping[str, Any]], start: int) -> dict[str, Tensor]:
        prompts, in_prompt = self._padded([row["input_ids"][: row["prompt_length"]] for row in rows])
        targets, in_completion = self._padded([row["input_ids"][row["prompt_length"] :] for row in rows])
        decoder_input_ids = targets.roll(1, dims=1)
        decoder_input_ids[:, 0] = start
        return {
            "input_ids": prompts,
            "attention_mask": in_prompt.long(),
            "decoder_input_ids": decoder_input_ids,
            "target_ids": targets,
            "completion_mask": in_completion,
        }

    def _padded(self, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """`[batch, tokens]` ids, and where they are no padding."""
        lengths = torch.tensor([len(ids) for ids in sequences])
        width = int(lengths.max())
        if self.pad_to_multiple_of:
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        padded = torch.full((len(sequences), width), self.pad_token_id, dtype=torch.int64)
        for row, ids in zip(padded, sequences, strict=True):
            row[: len(ids)] = torch.as_tensor(ids, dtype=torch.int64)
        return padded, torch.arange(width) < lengths.unsqueeze(1)
