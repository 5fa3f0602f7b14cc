"""Prompts to embeddings: what of a prompt is embedded, and the call of an embedding function in batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from bco_lab.data.chat import Messages
from bco_lab.models import with_pad_token

EmbeddingFunction = Callable[..., Any]
Embedder = Callable[[Sequence[str]], NDArray[np.floating[Any]]]
"""Prompts to embeddings, `[prompts, dim]`, in the order given."""

_UNLIMITED = 10**9  # tokenizers without a limit report an astronomical one
_WANTED = "it must return one embedding per prompt, a tensor of shape [batch, dim]"
_POOL = "such as the masked mean of the last hidden state, (hidden * mask[..., None]).sum(1) / mask.sum(1)[:, None]"


@dataclass(frozen=True, eq=False)
class Embedded:
    """Prompts as an embedder sees them.

    Attributes:
        values: Embeddings, `[prompts, dim]`, in the order of the prompts.
        truncated: How many different prompts were cut to the embedder's limit.
    """

    values: NDArray[np.float32]
    truncated: int


def raw_prompt_text(prompt: str | Messages) -> str:
    """The text that stands for a prompt where the distribution of prompts matters.

    A string stands for itself. Of messages it is what users wrote, all turns, a blank line between them. System
    messages are left out because they are mostly the same for all rows and would use up the embedder's limit, the
    assistant's turns because a logged model wrote them, and the template's markup because it is the same everywhere.
    Messages without a user turn are taken whole.

    Args:
        prompt: A string, or messages with `role` and `content`.
    """
    if isinstance(prompt, str):
        return prompt
    turns = [message["content"] for message in prompt if message["role"] == "user"]
    return "\n\n".join(turns or [message["content"] for message in prompt])


def embed_prompts(
    prompts: Sequence[str],
    embedding_func: EmbeddingFunction,
    embedding_tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> NDArray[np.float32]:
    """Embed prompts by the function that BCOTrainer documents, `embedding_func(input_ids=..., attention_mask=...)`.

    Each different prompt is embedded once, in batches of like length, without gradients. The tokenizer adds its own
    special tokens and truncates to its own limit, `model_max_length`. The result does not depend on the order of the
    prompts.

    Args:
        prompts: Texts.
        embedding_func: Takes `input_ids` and `attention_mask`, int64 `[batch, tokens]`, padded; returns a tensor or an
            array `[batch, dim]`.
        embedding_tokenizer: Of the embedding model.
        batch_size: Prompts per call.
        device: Where the tensors are put.
        progress: Show a bar.

    Returns:
        `[prompts, dim]`, in the order of `prompts`.

    Raises:
        ValueError: A prompt of no tokens, or a result that is not one finite embedding per prompt.
    """
    return embed_counting(
        prompts, embedding_func, embedding_tokenizer, batch_size=batch_size, device=device, progress=progress
    ).values


def embed_counting(
    prompts: Sequence[str],
    embedding_func: EmbeddingFunction,
    embedding_tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int | None = None,
    empty: int | None = None,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Embedded:
    """`embed_prompts`, and how many prompts were cut.

    Args:
        prompts: See `embed_prompts`.
        embedding_func: See `embed_prompts`.
        embedding_tokenizer: See `embed_prompts`.
        limit: Tokens of a prompt, special ones included; None: the tokenizer's own limit.
        empty: Token that stands for a prompt of no tokens; None: such a prompt is an error.
        batch_size: See `embed_prompts`.
        device: See `embed_prompts`.
        progress: See `embed_prompts`.

    Raises:
        ValueError: See `embed_prompts`.
    """
    unique, places_of_prompts = distinct(prompts)
    tokens, truncated = _tokenize(unique, embedding_tokenizer, limit, empty)
    longest_first = sorted(range(len(unique)), key=lambda place: -len(tokens[place]))
    starts = range(0, len(unique), batch_size)
    embeddings: NDArray[np.float32] | None = None
    for start in tqdm(starts, desc="Prompt embeddings", disable=not progress, leave=False, unit="batch"):
        places = longest_first[start : start + batch_size]
        batch = embedding_tokenizer.pad(
            {"input_ids": [tokens[place] for place in places]}, return_attention_mask=True, return_tensors="pt"
        )
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            block = _as_embeddings(embedding_func(**inputs), [unique[place] for place in places])
        if embeddings is None:
            embeddings = np.empty((len(unique), block.shape[1]), dtype=np.float32)
        if block.shape[1] != embeddings.shape[1]:
            raise ValueError(
                f"embedding_func returned {block.shape[1]} entries per prompt after {embeddings.shape[1]}: {_WANTED}"
            )
        embeddings[places] = block
    assert embeddings is not None
    return Embedded(embeddings[places_of_prompts], truncated)


def distinct(prompts: Sequence[str]) -> tuple[list[str], list[int]]:
    """The different prompts, sorted, and which of them each prompt is.

    Raises:
        ValueError: There are none.
    """
    unique = sorted(set(prompts))
    if not unique:
        raise ValueError("there are no prompts to embed")
    place_of = {prompt: place for place, prompt in enumerate(unique)}
    return unique, [place_of[prompt] for prompt in prompts]


def token_limit(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Tokens that a tokenizer says its model reads, special ones included; None where it sets no limit."""
    limit: int = tokenizer.model_max_length
    return limit if limit < _UNLIMITED else None


def _tokenize(
    prompts: list[str], tokenizer: PreTrainedTokenizerBase, limit: int | None, empty: int | None
) -> tuple[list[list[int]], int]:
    """Token ids of each prompt, and how many prompts were cut."""
    with_pad_token(tokenizer)
    limit = limit or token_limit(tokenizer)
    truncation = {"truncation": True, "max_length": limit} if limit else {}
    tokens: list[list[int]] = tokenizer(prompts, **truncation)["input_ids"]
    bare = next((prompt for prompt, ids in zip(prompts, tokens, strict=True) if not ids), None)
    if bare is not None and empty is None:
        raise ValueError(f"the embedding_tokenizer makes no token of the prompt {bare!r}: drop rows without a prompt")
    if empty is not None:
        tokens = [ids or [empty] for ids in tokens]
    return tokens, _count_longer(prompts, tokens, tokenizer, limit)


def _count_longer(
    prompts: list[str], tokens: list[list[int]], tokenizer: PreTrainedTokenizerBase, limit: int | None
) -> int:
    """How many prompts have more tokens than the limit; only those that fill it have to be looked at."""
    full = [prompt for prompt, ids in zip(prompts, tokens, strict=True) if limit and len(ids) >= limit]
    return sum(len(ids) > limit for ids in tokenizer(full, verbose=False)["input_ids"]) if limit and full else 0


def _as_embeddings(result: Any, prompts: list[str]) -> NDArray[np.float32]:
    """What the function returned as float32 `[batch, dim]`."""
    if isinstance(result, Tensor):
        result = result.detach().float().cpu().numpy()
    if not isinstance(result, np.ndarray):
        raise ValueError(f"embedding_func returned a {type(result).__name__}: {_WANTED}, {_POOL}")
    if result.ndim != 2 or len(result) != len(prompts) or not result.shape[1]:
        raise ValueError(
            f"embedding_func returned the shape {list(result.shape)} for {len(prompts)} prompts: {_WANTED}, {_POOL}"
        )
    finite = np.isfinite(result).all(axis=1)
    if not finite.all():
        prompt = prompts[int(np.argmin(finite))]
        raise ValueError(f"embedding_func returned a value that is not finite for the prompt {prompt[:80]!r}")
    return result.astype(np.float32)
