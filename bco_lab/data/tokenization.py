"""Rows of text to rows of token ids, with the boundary between prompt and completion."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from datasets import Dataset, Features, IterableDataset, List, Value
from torch.utils.data import get_worker_info

from bco_lab.data.chat import PairedText, apply_template, check_chat_template, check_pair, check_text, common_prefix
from bco_lab.data.labels import check_both_classes, parse_label

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TRUNCATIONS", "TokenizationReport", "check_both_classes", "tokenize_dataset"]

TRUNCATIONS = ("keep_start", "keep_end", "drop")

_PASSED_THROUGH = ("ref_logps", "example_weight")
_TOKENISED = ("input_ids", "prompt_length", "label", "example_id")
# Counted while mapping, summed up in the report, then removed.
_COUNTS = ("_kept", "_tokens_before", "_tokens")


@dataclass(frozen=True)
class TokenizationReport:
    """What tokenization did to a data set.

    Attributes:
        rows: Rows that went in.
        kept: Rows that came out.
        truncated: Rows that came out shorter than they were.
        dropped: Rows left out because they were longer than `max_length`.
        longest: Tokens of the longest row before truncation, dropped rows included.
        mean_tokens: Tokens per row that came out.
    """

    rows: int
    kept: int
    truncated: int
    dropped: int
    longest: int
    mean_tokens: float


def tokenize_dataset(
    dataset: Dataset | IterableDataset,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int | None,
    truncation: str = "keep_start",
    max_completion_length: int | None = None,
    num_proc: int | None = None,
    name: str = "train",
    encoder_decoder: bool = False,
) -> tuple[Dataset | IterableDataset, TokenizationReport | None]:
    """Tokenise prompts and completions, or take over rows that are tokenised already.

    Prompt and completion are tokenised as one text, so that the ids are those the model would see; a token with any
    character of the completion belongs to the completion. Rows of messages go through the chat template first.

    **BOS** is prepended where the tokenizer itself puts one before a text and the row does not start with it already
    (a chat template may have written it). Having a `bos_token` is not enough: GPT-2 never puts its `<|endoftext|>` in
    front of a text, and that of SmolLM2, `<|im_start|>`, opens a chat message. The one exception is a row with no
    prompt token, which gets any BOS there is, because something has to predict the first completion token.

    **EOS** ends every completion exactly once, unless the completion is truncated. What a chat template writes after it
    (as in `<|im_end|>\\n`) is removed. A tokenizer without EOS adds none.

    **Length**: `max_completion_length` cuts the end of a completion first. A row still longer than `max_length`, BOS
    and EOS included, is treated by `truncation`:

    - `keep_start` cuts the end of the completion;
    - `keep_end` cuts the start of the prompt, but not its BOS, or without one (and for an encoder-decoder always) not
      its last token, then the end of the completion;
    - `drop` leaves the row out.

    For an **encoder-decoder** prompt and completion are tokenised apart, each with the tokenizer's own special tokens;
    the rows look the same: the first `prompt_length` ids go to the encoder, the others to the decoder.

    Args:
        dataset: Columns `prompt`, `completion`, `label`; or `input_ids`, `prompt_length`, `label`. `example_id` is
            added as the row number if missing, `ref_logps` and `example_weight` are kept, others are removed. A column
            `origin` (file and line) names rows in errors.
        tokenizer: The policy's.
        max_length: Most tokens a row may have; None for no limit.
        truncation: One of `keep_start`, `keep_end`, `drop`.
        max_completion_length: Most tokens a completion may have; None for no limit.
        num_proc: Processes to spread the rows over.
        name: Of the data set, in the progress bar and in errors.
        encoder_decoder: Whether the model is an encoder-decoder.

    Returns:
        Rows with `input_ids` (list of ints), `prompt_length` (tokens, BOS included), `label` (bool) and `example_id`,
        and a report; for an iterable data set, which is tokenised as it is read, None in place of the report.

    Raises:
        ValueError: A limit or a column is wrong, or a row is; the message names data set, row and column.
    """
    columns = _columns(dataset, name)
    tokenise = _RowTokenizer(tokenizer, max_length, truncation, max_completion_length, name, encoder_decoder)
    tokenise.check_limits()
    removed = [column for column in columns if column not in (*_TOKENISED, *_PASSED_THROUGH)]
    if isinstance(dataset, IterableDataset):
        rows = dataset.map(tokenise, with_indices=True, batched=True, remove_columns=removed)
        return rows.filter(lambda row: row["_kept"]).remove_columns(list(_COUNTS)), None

    workers = min(num_proc or 1, len(dataset))
    mapped = dataset.map(
        tokenise,
        with_indices=True,
        batched=True,
        remove_columns=removed,
        features=_features(dataset.features),
        num_proc=workers if workers > 1 else None,
        load_from_cache_file=False,
        desc=f"Checking {name}" if "input_ids" in columns else f"Tokenizing {name}",
    )
    return _finish(mapped, name, max_length)


def is_tokenised(dataset: Dataset | IterableDataset) -> bool:
    """Whether `tokenize_dataset` would take the rows over as they are."""
    return {"input_ids", "prompt_length"} <= set(dataset.column_names or [])


def _columns(dataset: Any, name: str) -> list[str]:
    """The column names, refusing a data set without rows or without the columns that are needed."""
    columns = dataset.column_names
    if columns is None:  # a stream that has not said yet
        columns = list(next(iter(dataset), {}))
    if not columns or (isinstance(dataset, Dataset) and not len(dataset)):
        raise ValueError(f"{name}: the data set has no rows")
    tokenised = {"input_ids", "prompt_length"} <= set(columns)
    needed = ("label",) if tokenised else ("prompt", "completion", "label")
    missing = [column for column in needed if column not in columns]
    if missing:
        found = ", ".join(columns)
        raise ValueError(f"{name}: no column {', '.join(map(repr, missing))}; the data set has: {found}")
    return list(columns)


def _features(given: Features) -> Features:
    integers = {"prompt_length": Value("int64"), "example_id": Value("int64")}
    counts = {"_kept": Value("bool"), "_tokens_before": Value("int64"), "_tokens": Value("int64")}
    passed = {column: given[column] for column in _PASSED_THROUGH if column in given}
    return Features({"input_ids": List(Value("int32")), "label": Value("bool"), **integers, **passed, **counts})


def _finish(mapped: Dataset, name: str, max_length: int | None) -> tuple[Dataset, TokenizationReport]:
    """Leave out the dropped rows, sum up the counts, remove their columns."""
    kept, before, after = (list(mapped[column]) for column in _COUNTS)
    positions = [position for position, keep in enumerate(kept) if keep]
    if not positions:
        raise ValueError(
            f"{name}: all {len(kept)} rows are longer than max_length={max_length} and truncation=drop leaves none; "
            "raise max_length or use truncation=keep_end"
        )
    if len(positions) < len(kept):
        mapped = mapped.select(positions)
    report = TokenizationReport(
        rows=len(kept),
        kept=len(positions),
        truncated=sum(1 for position in positions if after[position] < before[position]),
        dropped=len(kept) - len(positions),
        longest=max(before),
        mean_tokens=sum(after[position] for position in positions) / len(positions),
    )
    mapped = mapped.remove_columns(list(_COUNTS))
    ids = list(mapped["example_id"])
    if len(set(ids)) < len(ids):
        raise ValueError(f"{name}, column 'example_id': values must be unique, {len(ids) - len(set(ids))} are repeated")
    return mapped, report


@dataclass(frozen=True)
class _RowTokenizer:
    """Tokenises a batch of rows; holds what that depends on, so that it can be sent to other processes."""

    tokenizer: "PreTrainedTokenizerBase"
    max_length: int | None
    truncation: str
    max_completion_length: int | None
    name: str
    encoder_decoder: bool

    def check_limits(self) -> None:
        if self.truncation not in TRUNCATIONS:
            raise ValueError(f"truncation={self.truncation!r} must be one of {', '.join(TRUNCATIONS)}")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length={self.max_length} must be at least 2: a token to predict and one before it")
        if self.max_completion_length is not None and self.max_completion_length < 1:
            raise ValueError(f"max_completion_length={self.max_completion_length} must be at least 1")

    def __call__(self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int]) -> dict[str, list[Any]]:
        ids = [int(i) for i in batch.get("example_id") or _row_numbers(indices)]
        where = self._where(batch, indices, ids)
        if "input_ids" in batch and "prompt_length" in batch:
            encoded = [(list(row), int(n)) for row, n in zip(batch["input_ids"], batch["prompt_length"], strict=True)]
        else:
            texts = [self._text(*row) for row in zip(batch["prompt"], batch["completion"], where, strict=True)]
            encoded = (encode_apart if self.encoder_decoder else encode)(texts, self.tokenizer)
        out: dict[str, list[Any]] = {column: [] for column in (*_TOKENISED[:3], *_COUNTS)}
        for (tokens, prompt_length), label, place in zip(encoded, batch["label"], where, strict=True):
            fitted = self._fit(tokens, prompt_length, place)
            out["_kept"].append(fitted is not None)
            out["_tokens_before"].append(len(tokens))
            tokens, prompt_length = fitted or ([], 0)
            out["_tokens"].append(len(tokens))
            out["input_ids"].append(tokens)
            out["prompt_length"].append(prompt_length)
            try:
                out["label"].append(parse_label(label))
            except ValueError as error:
                raise ValueError(f"{place}, column 'label': {error}") from error
        return {**out, "example_id": ids}

    def _where(self, batch: Mapping[str, Sequence[Any]], indices: Sequence[int], ids: Sequence[int]) -> list[str]:
        """The place of each row, for errors: file and line if the row knows them."""
        if "origin" in batch:
            return list(batch["origin"])
        named = "example_id" in batch
        return [
            f"{self.name}, row {index}" + (f" (example_id {i})" if named else "")
            for index, i in zip(indices, ids, strict=True)
        ]

    def _text(self, prompt: Any, completion: Any, where: str) -> PairedText:
        try:
            check_text(prompt, "prompt")
            check_text(completion, "completion")
            check_pair(prompt, completion)
            if isinstance(prompt, str):
                return PairedText(prompt + completion, len(prompt))
            check_chat_template(self.tokenizer)
            return apply_template(self.tokenizer, prompt, completion)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def _fit(self, tokens: list[int], prompt_length: int, where: str) -> tuple[list[int], int] | None:
        """Cut a row to the limits; None drops it."""
        if not 0 <= prompt_length < len(tokens):
            raise ValueError(
                f"{where}: no completion token, {len(tokens)} tokens of which {prompt_length} are the prompt"
            )
        if self.encoder_decoder and prompt_length == 0:
            raise ValueError(f"{where}: the prompt has no tokens, so the encoder would have nothing to read")
        if len(tokens) < 2:
            raise ValueError(f"{where}: nothing stands before its one completion token, so nothing predicts it")
        if self.max_completion_length is not None:
            tokens = tokens[: prompt_length + self.max_completion_length]
        if self.max_length is None or len(tokens) <= self.max_length:
            return tokens, prompt_length
        if self.truncation == "drop":
            return None
        if self.truncation == "keep_end":
            return self._keep_end(tokens[:prompt_length], tokens[prompt_length:], self.max_length)
        if prompt_length >= self.max_length:
            raise ValueError(
                f"{where}: the prompt has {prompt_length} tokens, which leaves no room for a completion token within "
                f"max_length={self.max_length}; raise it, or use truncation=keep_end or truncation=drop"
            )
        return tokens[: self.max_length], prompt_length

    def _keep_end(self, prompt: list[int], completion: list[int], max_length: int) -> tuple[list[int], int]:
        """Cut the prompt's start, then the completion's end; something of the prompt stays, to predict from."""
        starts_with_bos = prompt[:1] == [self.tokenizer.bos_token_id]
        # An encoder has learnt to read texts that its tokenizer marks at both ends.
        both_ends = self.encoder_decoder and starts_with_bos
        completion = completion[: max_length - min(len(prompt), max_length - 1, 2 if both_ends else 1)]
        room = max_length - len(completion)
        bos = prompt[:1] if starts_with_bos and not (both_ends and room == 1) else []
        prompt = bos + prompt[len(prompt) - (room - len(bos)) :]
        return prompt + completion, len(prompt)


def _row_numbers(indices: Sequence[int]) -> list[int]:
    """Row numbers that are unique also where several workers of a data loader each count their share of a stream."""
    worker = get_worker_info()
    return [index + (worker.id << 32 if worker else 0) for index in indices]


def encode(texts: Sequence[PairedText], tokenizer: "PreTrainedTokenizerBase") -> list[tuple[list[int], int]]:
    """Token ids and prompt length of each text, BOS and EOS in place, nothing truncated."""
    if tokenizer.eos_token is not None:
        texts = [_without_eos(pair, tokenizer.eos_token) for pair in texts]
    encoded = (_encode_fast if tokenizer.is_fast else _encode_slow)(texts, tokenizer)
    bos = tokenizer.bos_token_id
    prepends = bos is not None and tokenizer("x")["input_ids"][:1] == [bos]
    finished = []
    for tokens, prompt_length in encoded:
        if bos is not None and (prepends or prompt_length == 0):
            if tokens[:1] == [bos]:
                prompt_length = max(prompt_length, 1)
            else:
                tokens, prompt_length = [bos, *tokens], prompt_length + 1
        if tokenizer.eos_token_id is not None:
            tokens = [*tokens, tokenizer.eos_token_id]
        finished.append((tokens, prompt_length))
    return finished


def encode_apart(texts: Sequence[PairedText], tokenizer: "PreTrainedTokenizerBase") -> list[tuple[list[int], int]]:
    """Token ids and prompt length where prompt and completion are two texts, for encoder and decoder."""
    if not texts:
        return []
    if tokenizer.eos_token is not None:
        texts = [_without_eos(pair, tokenizer.eos_token) for pair in texts]
    prompts = tokenizer([pair.text[: pair.boundary] for pair in texts], verbose=False)["input_ids"]
    completions = tokenizer(text_target=[pair.text[pair.boundary :] for pair in texts], verbose=False)["input_ids"]
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [
        (prompt + completion + (eos if completion[-1:] != eos else []), len(prompt))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def _without_eos(pair: PairedText, eos: str) -> PairedText:
    """Remove EOS from the completion's end, with what white space follows it: one is added after tokenization."""
    completion = re.sub(rf"(?:{re.escape(eos)}\s*)+\Z", "", pair.text[pair.boundary :])
    return PairedText(pair.text[: pair.boundary] + completion, pair.boundary)


def _encode_fast(texts: Sequence[PairedText], tokenizer: "PreTrainedTokenizerBase") -> list[tuple[list[int], int]]:
    """A token belongs to the prompt if it ends at or before the boundary."""
    encodings = tokenizer(
        [pair.text for pair in texts],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    encoded = []
    for tokens, offsets, pair in zip(encodings["input_ids"], encodings["offset_mapping"], texts, strict=True):
        ends = enumerate(end for _start, end in offsets)
        encoded.append((tokens, next((i for i, end in ends if end > pair.boundary), len(tokens))))
    return encoded


def _encode_slow(texts: Sequence[PairedText], tokenizer: "PreTrainedTokenizerBase") -> list[tuple[list[int], int]]:
    """Without offsets: the prompt is what the whole text and the prompt alone have in common, from the left."""
    encoded = []
    for pair in texts:
        whole, alone = (
            tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            for text in (pair.text, pair.text[: pair.boundary])
        )
        encoded.append((whole, common_prefix(whole, alone)))
    return encoded
