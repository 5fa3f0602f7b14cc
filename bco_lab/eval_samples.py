"""What policy and reference write during an evaluation, side by side: chosen, sampled, written to a file, tracked."""

import json
import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from torch import nn

from bco_lab.data.splits import stratified_sample
from bco_lab.files import write_text
from bco_lab.generation import complete_ids

logger = logging.getLogger(__name__)

FOLDER = "eval_samples"
COUNT = 8  # prompts of each evaluation set
NEW_TOKENS = 128  # where max_completion_length does not say
_OF_A_STREAM = 256  # rows at its start, among which the prompts are chosen


@dataclass(frozen=True)
class EvalSample:
    """A prompt with what was written to it.

    Attributes:
        example_id: Of the row.
        label: Its thumb, True = desirable.
        prompt: As the model reads it, special tokens included.
        policy: A completion by the policy.
        reference: One by the reference; None where no reference was left to ask.
    """

    example_id: int
    label: bool
    prompt: str
    policy: str
    reference: str | None


def choose_rows(rows: Dataset | IterableDataset, *, seed: int, count: int = COUNT) -> list[dict[str, Any]]:
    """A seeded choice of tokenised rows that have a prompt, with both labels if both are there.

    Of a stream, the choice is among its first rows.
    """
    if isinstance(rows, IterableDataset):
        rows = Dataset.from_list(list(rows.take(_OF_A_STREAM)))
    usable = [place for place, length in enumerate(rows["prompt_length"]) if length > 0]
    labels = rows["label"]
    chosen = stratified_sample([labels[place] for place in usable], count, seed=seed)
    return [rows[usable[place]] for place in chosen]


def prompt_ids(row: dict[str, Any]) -> list[int]:
    """The prompt's tokens of a tokenised row."""
    ids: list[int] = row["input_ids"][: row["prompt_length"]]
    return ids


def complete_rows(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    *,
    max_length: int | None,
    max_completion_length: int | None,
    seed: int,
    progress: bool = True,
    description: str = "Sampling",
) -> list[str]:
    """Sample a completion to the prompt of each row, at temperature 1; equal arguments give equal texts.

    Args:
        model: Policy or reference, not wrapped for data-parallel training.
        tokenizer: Its tokenizer.
        rows: Tokenised rows (`input_ids`, `prompt_length`).
        max_length: Most tokens of prompt and completion together; one token is sampled in any case. A model that knows
            fewer positions sets the limit itself.
        max_completion_length: Most tokens of a completion; None: 128.
        seed: Of the sampling.
        progress: Whether to show a bar.
        description: Its title.
    """
    # Rows with equal room share a batch: one that is almost full must not cut the others short.
    of_room: defaultdict[int, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        rooms = [max_completion_length or NEW_TOKENS, _positions_left(model, row["prompt_length"])]
        if max_length is not None:
            rooms.append(max_length - row["prompt_length"])
        of_room[max(1, int(min(rooms)))].append(place)
    completions = [""] * len(rows)
    for room, places in of_room.items():
        texts = complete_ids(
            model,
            tokenizer,
            [prompt_ids(rows[place]) for place in places],
            max_new_tokens=room,
            seed=seed,
            progress=progress,
            description=description,
        )
        for place, text in zip(places, texts, strict=True):
            completions[place] = text
    return completions


def _positions_left(model: Any, prompt_length: int) -> float:
    """Tokens that a model can write: rows that fit into a table of positions may still leave less than was asked."""
    known = getattr(model.config, "max_position_embeddings", None)
    if known is None or known < 1:  # some without a limit say -1
        return math.inf
    # a decoder beside an encoder counts from its own first token
    return int(known) - (1 if getattr(model.config, "is_encoder_decoder", False) else prompt_length)


def side_by_side(
    rows: Sequence[dict[str, Any]], tokenizer: Any, policy: Sequence[str], reference: Sequence[str] | None
) -> list[EvalSample]:
    """Join rows with the completions of policy and reference."""
    others: Sequence[str | None] = [None] * len(rows) if reference is None else reference
    return [
        EvalSample(int(row["example_id"]), bool(row["label"]), tokenizer.decode(prompt_ids(row)), written, other)
        for row, written, other in zip(rows, policy, others, strict=True)
    ]


def write_samples(samples: Sequence[EvalSample], folder: Path, name: str, step: int) -> Path:
    """Write `FOLDER/NAME-step-STEP.jsonl`, one object a line, whole or not at all."""
    path = folder / FOLDER / f"{name}-step-{step:06d}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples))
    return path


def track_samples(samples: Sequence[EvalSample], report_to: Sequence[str], name: str, step: int) -> None:
    """Log a table to the trackers of `report_to` that have a run open: Weights & Biases, Comet.

    A failure there is logged, never raised: it is not worth a training run.
    """
    for tracker, send in (("wandb", _to_wandb), ("comet_ml", _to_comet)):
        if tracker in report_to or "all" in report_to:
            try:
                send(name, samples, step)
            except Exception as error:  # whatever a tracker raises
                logger.warning("%s did not take the samples of step %d: %s", tracker, step, error)


def _to_wandb(name: str, samples: Sequence[EvalSample], step: int) -> None:
    import wandb

    if wandb.run is not None:
        table = wandb.Table(columns=[*_columns()], data=[*_values(samples)])
        # the step metric of transformers' own integration
        wandb.run.log({f"{name}/samples": table, "train/global_step": step})


def _to_comet(name: str, samples: Sequence[EvalSample], step: int) -> None:
    import comet_ml

    experiment = comet_ml.get_running_experiment()
    if experiment is not None:
        experiment.log_table(f"{name}-samples-step-{step:06d}.csv", list(_values(samples)), headers=list(_columns()))


def _columns() -> tuple[str, ...]:
    return tuple(EvalSample.__dataclass_fields__)


def _values(samples: Sequence[EvalSample]) -> Iterator[list[Any]]:
    return (list(asdict(sample).values()) for sample in samples)
