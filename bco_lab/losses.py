"""The BCO loss: binary cross-entropy whose logit is the implicit reward (arXiv 2404.04656).

implicit_reward  r = beta * (log pi(y|x) - log pi_ref(y|x))
loss               = -w * log sigmoid(s * (r - delta)),    s = +1 desirable, -1 undesirable
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LOSS_REDUCTIONS: tuple[str, ...] = ("class_balanced", "pooled")


def implicit_reward(policy_logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """Scaled log-ratio of policy and reference, the reward that the policy itself implies.

    Args:
        policy_logps: Summed completion log-probs under the policy, `[batch]`, nats.
        ref_logps: The same under the frozen reference, `[batch]`, nats.
        beta: Strength of the pull towards the reference, > 0.

    Returns:
        `[batch]` rewards (arXiv 2404.04656, section 3).
    """
    return beta * (policy_logps - ref_logps)


def bco_loss(rewards: Tensor, labels: Tensor, delta: Tensor | float, example_weight: Tensor | None = None) -> Tensor:
    """Per-example BCO loss, `-w * log sigmoid(s * (r - delta))` (arXiv 2404.04656, equation 8).

    Finite for every finite reward, on batches with one label only as well.

    Args:
        rewards: Implicit rewards, `[batch]`.
        labels: Thumbs, `[batch]` bool, True = desirable.
        delta: Reward shift; a constant, no gradient reaches it.
        example_weight: `[batch]` weights, 1 where absent; with underlying distribution matching the clamped density
            ratio of undesirable rows.

    Returns:
        `[batch]` losses, nats, not reduced.
    """
    if isinstance(delta, Tensor):
        delta = delta.detach()
    sign = torch.where(labels, 1.0, -1.0).to(rewards.dtype)
    losses = -F.logsigmoid(sign * (rewards - delta))
    return losses if example_weight is None else example_weight.to(losses.dtype) * losses


def reduction_weights(
    labels: Tensor, desirable_count: Tensor | float, undesirable_count: Tensor | float, reduction: str
) -> Tensor:
    """What each example's loss is multiplied by, so that a plain sum over the whole optimizer step is the loss.

    The counts cover every micro-batch and process of the step: a sum of shares does not depend on the cut.

    Args:
        labels: `[batch]` bool.
        desirable_count: Desirable rows in the whole step.
        undesirable_count: Undesirable rows in the whole step.
        reduction: `class_balanced`: mean over desirable plus mean over undesirable (arXiv 2404.04656, equation 8);
            `pooled`: one mean over all rows.

    Returns:
        `[batch]` float32 factors. A class that is absent from the step contributes nothing.
    """
    up = torch.as_tensor(desirable_count, dtype=torch.float32, device=labels.device)
    down = torch.as_tensor(undesirable_count, dtype=torch.float32, device=labels.device)
    if reduction == "class_balanced":
        return torch.where(labels, 1.0 / up.clamp(min=1), 1.0 / down.clamp(min=1))
    if reduction == "pooled":
        return (1.0 / (up + down).clamp(min=1)).expand(labels.shape)
    raise ValueError(f"loss_reduction={reduction!r} must be one of {', '.join(LOSS_REDUCTIONS)}")
