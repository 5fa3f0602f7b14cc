"""Completion log-probs: the output head runs only where a completion token is predicted."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_ELEMENTS_AT_ONCE = 2**24  # 64 MiB of float32 beside the logits


class CompletionLogps(NamedTuple):
    """What one forward pass says of the completions of a batch.

    Attributes:
        logps: Summed completion log-probs, `[batch]`, float32, nats.
        token_counts: Completion tokens per row, `[batch]`, int64.
        aux_loss: Load-balancing loss of a mixture-of-experts model, a scalar, or None. That of an encoder-decoder is
            the sum of both sides.
    """

    logps: Tensor
    token_counts: Tensor
    aux_loss: Tensor | None


def completion_logps(model: nn.Module, batch: dict[str, Tensor], head: nn.Module | None = None) -> CompletionLogps:
    """Log-prob of each completion given its prompt, `sum_t log p(y_t | x, y_<t)`.

    Sums are accumulated in float32 whatever the dtype of the weights: in bfloat16 the rounding of a sum over a
    completion is larger than the rewards that are computed from it.

    Args:
        model: A language model, possibly wrapped for distribution.
        batch: `input_ids` and `attention_mask`, `[batch, tokens]`, and `completion_mask`, `[batch, tokens]` bool; for
            an encoder-decoder as well `decoder_input_ids` and `target_ids` (see `FeedbackCollator`).
        head: The module that maps hidden states to vocabulary logits (`model.get_output_embeddings()`). With it the
            head sees completion positions only; without it all logits are computed and then selected.

    Returns:
        CompletionLogps, differentiable with respect to the model.
    """
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
    if "decoder_input_ids" in batch:
        # No decoder mask: padding stands on the right, where no completion token of a causal decoder looks.
        inputs["decoder_input_ids"] = batch["decoder_input_ids"]
        inputs |= _router_logits(model)
        predicting = targets_here = batch["completion_mask"]
        targets = batch["target_ids"][targets_here]
    else:
        targets_here = batch["completion_mask"][:, 1:]
        predicting = F.pad(targets_here, (0, 1))  # position t predicts token t + 1
        targets = batch["input_ids"][:, 1:][targets_here]
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
    return CompletionLogps(logps, targets_here.sum(dim=1), _aux_loss(outputs))


def _router_logits(model: nn.Module) -> dict[str, bool]:
    """The argument with which an encoder-decoder of experts, unlike others, has to be asked for its auxiliary loss."""
    config = getattr(getattr(model, "module", model), "config", None)
    return {"output_router_logits": True} if getattr(config, "output_router_logits", False) else {}


def _aux_loss(outputs: Any) -> Tensor | None:
    parts = [getattr(outputs, name, None) for name in ("aux_loss", "encoder_aux_loss", "decoder_aux_loss")]
    losses = [part for part in parts if isinstance(part, Tensor)]  # a side without experts says 0
    return torch.stack([loss.to(losses[0].device) for loss in losses]).sum() if losses else None


def token_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """`log softmax(logits)[targets]` in float32, nats: logits `[tokens, vocab]`, targets and result `[tokens]`.

    The logits are the largest tensor of a step by far, so none of their size is made beside them: the backward pass
    writes their gradient over them. Whoever needs them after that must copy them before; autograd itself notices.
    """
    values: Tensor = _TokenLogps.apply(logits, targets)  # type: ignore[no-untyped-call]
    return values


class _TokenLogps(torch.autograd.Function):
    """`log softmax(logits)[targets]`; the gradient with respect to the logits is `one_hot(target) - softmax`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        highest = logits.amax(dim=1).float()  # subtracted first, as a sum of exponentials and its log need it
        parts = zip(*(torch.split(tensor, _rows_at_once(logits)) for tensor in (logits, highest)), strict=True)
        totals = torch.cat([(part.float() - high[:, None]).exp_().sum(dim=1) for part, high in parts])
        ctx.save_for_backward(logits, targets, highest, totals)
        return logits.gather(1, targets[:, None])[:, 0].float() - highest - totals.log()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, targets, highest, totals = ctx.saved_tensors
        rows = _rows_at_once(logits)
        columns = (logits, targets, highest, -gradient / totals, gradient)
        for part, target, high, scale, own in zip(*(torch.split(c, rows) for c in columns), strict=True):
            wide = part.float()  # the same memory where it is float32 already
            wide.sub_(high[:, None]).exp_().mul_(scale[:, None])
            wide.scatter_add_(1, target[:, None], own[:, None])
            part.copy_(wide)
        return logits, None


def _rows_at_once(logits: Tensor) -> int:
    return max(1, _ELEMENTS_AT_ONCE // logits.shape[1])


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
