"""Paired preferences to single thumbs: the chosen completion is desirable, the rejected one is not."""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, Features, IterableDataset, List, Value

from bco_lab.data.chat import check_text, common_prefix
from bco_lab.data.feedback import RecordError

ANSWER_MARK = "\n\nAssistant:"  # ends the prompt in transcripts such as those of hh-rlhf

Text = str | list[dict[str, str]]

_PAIR = ("chosen", "rejected")


def unpair(dataset: Dataset | IterableDataset, *, name: str, num_proc: int | None = None) -> Dataset | IterableDataset:
    """Turn rows with `chosen` and `rejected` into two rows with `completion` and `label` each; others stay as they are.

    Both rows of a pair follow each other, the desirable one first, and share the prompt:

    - the column `prompt`, if it is of the same kind as the completions (text, or messages). Completions that repeat it
      in front of the answer lose it: messages always, text if both do and the prompt has several lines, as a transcript
      has. An answer may well begin with the words of a short prompt; it keeps them.
    - else, without that column or with a prompt of text beside messages, what both completions have in common from the
      start: leading messages, or leading characters up to the last `\\n\\nAssistant:` if there is one, and without the
      space that the answers start with. Texts may have nothing in common; their prompt is empty.

    Other columns are copied to both rows, except that a `label` of the pair is replaced. `example_id` becomes
    `2 * example_id` and `2 * example_id + 1`, the numbers that the rows of a data set without ids get.

    Args:
        dataset: In memory or streamed.
        name: Of the data set, in the progress bar and in errors.
        num_proc: Processes to spread the pairs over.

    Raises:
        ValueError: A column that single rows have beside the pairs, or a pair that breaks a rule: a null, messages
            beside text, equal completions, messages without a common prompt or without an answer after it. The message
            names data set, row and column.
    """
    columns = dataset.column_names
    if columns is None:  # a stream that has not said yet
        columns = list(next(iter(dataset), {}))
    if not set(_PAIR) <= set(columns):
        return dataset
    for column in ("completion", "input_ids", "ref_logps"):
        if column in columns:
            raise ValueError(
                f"{name}: the data set has pairs (chosen, rejected) and a column {column!r}: remove either"
            )

    def split(batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        made: dict[str, list[Any]] = {column: [] for column in (*kept, "prompt", "completion", "label")}
        for place, index in enumerate(indices):
            where = f"{name}, row {index}"
            row = {column: values[place] for column, values in batch.items()}
            try:
                prompt, *completions = split_pair(row)
            except RecordError as error:
                raise ValueError(f"{where}, {error}" if error.column is not None else f"{where}: {error}") from error
            for number, completion in enumerate(completions):
                for column in kept:
                    value = row[column]
                    made[column].append(_own_id(value, number, where) if column == "example_id" else value)
                made["prompt"].append(prompt)
                made["completion"].append(completion)
                made["label"].append(number == 0)
        return made

    kept = [column for column in columns if column not in ("prompt", *_PAIR, "label")]
    options: dict[str, Any] = {"with_indices": True, "batched": True, "remove_columns": columns}
    options["features"] = _features(dataset.features, kept)
    if isinstance(dataset, Dataset):
        workers = min(num_proc or 1, max(1, len(dataset)))
        options |= {"num_proc": workers if workers > 1 else None, "desc": f"Unpairing {name}"}
        options["load_from_cache_file"] = False
    return dataset.map(split, **options)


def _features(given: Features | None, kept: Sequence[str]) -> Features | None:
    """Types of the rows, so that they do not depend on what the first pairs hold; None for a stream without types."""
    if given is None:
        return None
    messages = List({"role": Value("string"), "content": Value("string")})
    text = given["chosen"] if isinstance(given["chosen"], Value) else messages
    copied = {column: Value("int64") if column == "example_id" else given[column] for column in kept}
    return Features({**copied, "prompt": text, "completion": text, "label": Value("bool")})


def split_pair(row: Mapping[str, Any]) -> tuple[Text, Text, Text]:
    """Prompt, chosen and rejected completion of a pair, as `unpair` tells them apart.

    Args:
        row: `chosen`, `rejected` and maybe `prompt`.

    Raises:
        RecordError: The pair breaks a rule.
    """
    chosen, rejected = (_read(row, column) for column in _PAIR)
    prompt = _read(row, "prompt") if "prompt" in row else None
    if type(chosen) is not type(rejected):
        raise RecordError(None, "chosen and rejected must be of one kind, text or messages")
    if chosen == rejected:
        raise RecordError(None, "chosen and rejected are equal, so the pair says nothing")
    if isinstance(prompt, list) and isinstance(chosen, str):
        raise RecordError(None, "prompt is a list of messages but chosen and rejected are text; make all of one kind")
    if prompt is not None and type(prompt) is type(chosen):
        completions = _without(prompt, chosen, rejected)
    else:
        shared = _shared_prompt(chosen, rejected)
        prompt, completions = chosen[:shared], (chosen[shared:], rejected[shared:])
    for column, completion in zip(_PAIR, completions, strict=True):
        try:
            check_text(completion, "completion")
        except ValueError as error:
            raise RecordError(column, f"after the prompt: {error}") from error
    return (prompt, *completions)


def _read(row: Mapping[str, Any], column: str) -> Text:
    """Text, or messages with nothing but role and content: keys that are null in one column may lack in another."""
    value = row[column]
    try:
        check_text(value, column)
    except ValueError as error:
        raise RecordError(column, str(error)) from error
    if isinstance(value, str):
        return value
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _without(prompt: Text, chosen: Text, rejected: Text) -> tuple[Text, Text]:
    """The completions without the prompt that they repeat."""
    repeat = [len(text) > len(prompt) and text[: len(prompt)] == prompt for text in (chosen, rejected)]
    if isinstance(prompt, str) and not (all(repeat) and "\n" in prompt.strip()):
        return chosen, rejected
    return chosen[len(prompt) * repeat[0] :], rejected[len(prompt) * repeat[1] :]


def _shared_prompt(chosen: Text, rejected: Text) -> int:
    """Characters or messages of the prompt that both start with."""
    length = common_prefix(chosen, rejected)
    if isinstance(chosen, str):
        return _end_of_prompt(chosen[:length])
    if length == 0:
        raise RecordError(None, "chosen and rejected share no message, so there is no prompt of messages")
    return length


def _end_of_prompt(shared: str) -> int:
    mark = shared.rfind(ANSWER_MARK)
    if mark >= 0:
        return mark + len(ANSWER_MARK)
    return len(shared) - 1 if shared.endswith(" ") else len(shared)


def _own_id(value: Any, number: int, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 2**62:
        raise ValueError(
            f"{where}, column 'example_id': {value!r} must be a whole number between -2**62 and 2**62, "
            "so that both rows of the pair get one of their own"
        )
    return 2 * value + number
