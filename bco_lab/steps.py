"""One optimizer step as a whole: what its micro-batches on all processes add up to."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bco_lab.metrics import wide_dtype

Sum = Callable[[Tensor], Tensor]


@dataclass
class OptimizerStep:
    """What is known of one optimizer step before its first forward pass, and what it adds up while it goes.

    Attributes:
        true_rows: Per micro-batch of this process, `[batch]` bool, False for rows repeated only to fill a batch.
        desirable_count: True desirable rows over all micro-batches and processes.
        undesirable_count: The same for undesirable rows.
        totals: This process's running `[5]`: reward sum and count of desirable rows, of undesirable rows, loss.
        done: Micro-batches finished.
    """

    true_rows: list[Tensor]
    desirable_count: float
    undesirable_count: float
    totals: Tensor
    done: int = 0

    @property
    def rows(self) -> float:
        """True rows of the step, at least 1."""
        return max(1.0, self.desirable_count + self.undesirable_count)

    @property
    def finished(self) -> bool:
        """Whether every micro-batch is done."""
        return self.done == len(self.true_rows)


def plan_step(
    labels: list[Tensor], true_rows: list[Tensor], device: torch.device, sum_over_processes: Sum
) -> OptimizerStep:
    """Count the true rows of each class in a step.

    Args:
        labels: Per micro-batch of this process, `[batch]` bool.
        true_rows: See OptimizerStep.
        device: Where the counts are summed.
        sum_over_processes: Adds a tensor up over all processes.
    """
    counts = torch.zeros(2, device=device)
    for label, true in zip(labels, true_rows, strict=True):
        counts += torch.stack([(label & true).sum(), (~label & true).sum()]).to(device)
    desirable, undesirable = sum_over_processes(counts).tolist()
    return OptimizerStep(true_rows, desirable, undesirable, torch.zeros(5, dtype=wide_dtype(device), device=device))


def true_rows(batch_size: int, batch_in_epoch: int, process: int, processes: int, dataset_rows: int) -> Tensor:
    """Which rows of a process's micro-batch belong to the epoch.

    Batches are dealt to the processes in turn; to give each of them equally many full ones, the last ones are filled up
    with rows from the start of the epoch. Those must not count twice.

    Args:
        batch_size: Rows of the micro-batch.
        batch_in_epoch: How many micro-batches this process had in this epoch before.
        process: Which process this is.
        processes: How many there are.
        dataset_rows: Rows of an epoch.

    Returns:
        `[batch]` bool.
    """
    first = (batch_in_epoch * processes + process) * batch_size
    return first + torch.arange(batch_size) < dataset_rows


def reward_totals(rewards: Tensor, labels: Tensor, true: Tensor) -> Tensor:
    """`[4]`: reward sum and count of true desirable rows, then of true undesirable rows; no gradient."""
    values = rewards.detach().to(wide_dtype(rewards.device))
    up, down = labels & true, ~labels & true
    return torch.stack([values[up].sum(), up.sum().to(values), values[down].sum(), down.sum().to(values)])
