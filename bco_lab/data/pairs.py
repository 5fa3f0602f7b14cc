"""Paired preferences to single thumbs: the chosen completion is desirable, the rejected one is not."""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, IterableDataset

from bco_lab.data.chat import common_prefix

ANSWER_MARK = "\n\nAssistant:"  # ends the prompt in transcripts such as those of hh-rlhf

Text = str | list[Any]


def unpair(dataset: Dataset | IterableDataset, *, name: str, num_proc: int | None = None) -> Dataset | IterableDataset:
    """Turn rows with `chosen` and `rejected` into two rows with `completion` and `label` each; others stay as they are.

    Both rows of a pair follow each other, the desirable one first, and share the prompt:

    - the column `prompt`, if it is of the same kind as the completions (text, or messages). Messages that repeat the
      prompt in front of the answer lose it.
    - else what both completions have in common from the start: leading messages, or leading characters up to the last
      `\\n\\nAssistant:` if there is one, and without the space that the answers start with.

    Other columns are copied to both rows; `example_id` becomes `2 * example_id` and `2 * example_id + 1`, the numbers
    that the rows of a data set without ids get.

    Args:
        dataset: In memory or streamed.
        name: Of the data set, in the progress bar and in errors.
        num_proc: Processes to spread the pairs over.

    Raises:
        ValueError: A pair that breaks a rule; the message names data set, row and column.
    """
    columns = dataset.column_names
    if columns is None:  # a stream that has not said yet
        columns = list(next(iter(dataset), {}))
    if not {"chosen", "rejected"} <= set(columns):
        return dataset
    for column in ("completion", "ref_logps"):
        if column in columns:
            raise ValueError(
                f"{name}: the data set has pairs (chosen, rejected) and a column {column!r}: remove either"
            )

    def split(batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        made: dict[str, list[Any]] = {column: [] for column in (*kept, "prompt", "completion", "label")}
        for place, index in enumerate(indices):
            row = {column: values[place] for column, values in batch.items()}
            prompt, *completions = _split_pair(row, f"{name}, row {index}")
            for number, completion in enumerate(completions):
                for column in kept:
                    value = row[column]
                    made[column].append(2 * int(value) + number if column == "example_id" else value)
                made["prompt"].append(prompt)
                made["completion"].append(completion)
                made["label"].append(number == 0)
        return made

    kept = [column for column in columns if column not in ("prompt", "chosen", "rejected", "label")]
    options: dict[str, Any] = {"with_indices": True, "batched": True, "remove_columns": columns}
    if isinstance(dataset, Dataset):
        workers = min(num_proc or 1, max(1, len(dataset)))
        options |= {"num_proc": workers if workers > 1 else None, "desc": f"Unpairing {name}"}
        options["load_from_cache_file"] = False
    return dataset.map(split, **options)


def _split_pair(row: Mapping[str, Any], where: str) -> tuple[Text, Text, Text]:
    """Prompt, chosen and rejected completion of a pair."""
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    for column in ("chosen", "rejected"):
        if not row[column] or not isinstance(row[column], str | list):
            raise ValueError(f"{where}, column {column!r}: must be text or a list of messages, not {row[column]!r}")
    if type(chosen) is not type(rejected):
        raise ValueError(f"{where}: chosen and rejected must be of one kind, text or messages")
    if chosen == rejected:
        raise ValueError(f"{where}: chosen and rejected are equal, so the pair says nothing")
    if prompt is not None and type(prompt) is type(chosen):
        return (prompt, *(_without(prompt, text) for text in (chosen, rejected)))
    length = common_prefix(chosen, rejected)
    if isinstance(chosen, str):
        length = _end_of_prompt(chosen[:length])
    elif length == 0:
        raise ValueError(f"{where}: chosen and rejected share no message, so there is no prompt")
    return chosen[:length], chosen[length:], rejected[length:]


def _without(prompt: Text, text: Text) -> Text:
    """A conversation without the prompt it starts with."""
    repeated = isinstance(text, list) and len(text) > len(prompt) and text[: len(prompt)] == prompt
    return text[len(prompt) :] if repeated else text


def _end_of_prompt(shared: str) -> int:
    mark = shared.rfind(ANSWER_MARK)
    if mark >= 0:
        return mark + len(ANSWER_MARK)
    return len(shared) - 1 if shared.endswith(" ") else len(shared)
