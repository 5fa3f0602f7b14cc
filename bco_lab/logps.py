"""Completion log-probs: the output head runs only where a completion token is predicted."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CompletionLogps(NamedTuple):
    """What one forward pass says of the completions of a batch.

    Attributes:
        logps: Summed completion log-probs, `[batch]`, float32, nats.
        token_counts: Completion tokens per row, `[batch]`, int64.
        aux_loss: Load-balancing loss of a mixture-of-experts model, a scalar, or None.
    """

    logps: Tensor
    token_counts: Tensor
    aux_loss: Tensor | None


def completion_logps(model: nn.Module, batch: dict[str, Tensor], head: nn.Module | None = None) -> CompletionLogps:
    """Log-prob of each completion given its prompt, `sum_t log p(y_t | x, y_<t)`.

    Sums are accumulated in float32 whatever the dtype of the weights: in bfloat16 the rounding of a sum over a
    completion is larger than the rewards that are computed from it.

    Args:
        model: A decoder-only language model, possibly wrapped for distribution.
        batch: `input_ids` and `attention_mask`, `[batch, tokens]`, and `completion_mask`, `[batch, tokens]` bool.
        head: The module that maps hidden states to vocabulary logits (`model.get_output_embeddings()`). With it the
            head sees completion positions only; without it all logits are computed and then selected.

    Returns:
        CompletionLogps, differentiable with respect to the model.
    """
    targets_here = batch["completion_mask"][:, 1:]
    predicting = F.pad(targets_here, (0, 1))  # position t predicts token t + 1
    targets = batch["input_ids"][:, 1:][targets_here]
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    if head is None:
        outputs = model(**inputs)
        logits = outputs.logits[predicting]
    else:
        with only_positions(head, predicting):
            outputs = model(**inputs)
        logits = outputs.logits.squeeze(0)
    # Scattered back to [batch, tokens] and summed along rows: the same order of additions on every run and device.
    values = token_logps(logits, targets)
    logps = torch.zeros(targets_here.shape, device=values.device).masked_scatter(targets_here, values).sum(dim=1)
    return CompletionLogps(logps, targets_here.sum(dim=1), getattr(outputs, "aux_loss", None))


def token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """`log softmax(logits)[targets]` in float32, nats: logits `[tokens, vocab]`, targets and result `[tokens]`."""
    return -F.cross_entropy(logits.float(), targets, reduction="none")


@contextmanager
def only_positions(head: nn.Module, mask: Tensor) -> Iterator[None]:
    """While open, `head` receives `[1, selected, hidden]`: the hidden states where `mask` (`[batch, tokens]`) is True.

    The model's own forward stays in charge, so whatever it does around its head (logit scaling, soft-capping, adapters
    on the head) still happens.
    """

    def select(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        return (hidden[mask.to(hidden.device)].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that turns hidden states into logits, or None if the model does not say."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None
