"""Training and evaluation metrics from one table of examples.

Every micro-batch adds its rows; nothing is reduced or moved off the device until somebody logs. Then the table is
gathered once, rows that were padded in to keep processes even are dropped by example id, and every metric is computed
in float64 on the true rows: results do not depend on the batch size or on the number of processes.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bco_lab.density_ratio import effective_sample_size

COLUMNS = ("example_id", "label", "reward", "logps", "ref_logps", "tokens", "weight", "delta", "loss")
_LARGEST_EXPONENT = 80.0  # e^80 still prints; a reward beyond it is a broken run, which other metrics show

Gather = Callable[[Tensor], Tensor]


class ExampleTable(NamedTuple):
    """One row per example, all columns `[rows]` float64 on the CPU, except `label` (bool) and `example_id` (int64)."""

    example_id: Tensor
    label: Tensor
    reward: Tensor
    logps: Tensor
    ref_logps: Tensor
    tokens: Tensor
    weight: Tensor
    delta: Tensor
    loss: Tensor


class ExampleRecorder:
    """Collects per-example results on the device until they are logged."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._aux: list[Tensor] = []

    def __len__(self) -> int:
        return sum(block.shape[0] for block in self._blocks)

    def add(self, columns: dict[str, Tensor], aux_loss: Tensor | None = None) -> None:
        """Append one micro-batch.

        Args:
            columns: One `[batch]` tensor for each of COLUMNS.
            aux_loss: Mixture-of-experts load-balancing loss of the micro-batch, a scalar.
        """
        dtype = wide_dtype(columns["reward"].device)
        self._blocks.append(torch.stack([columns[name].detach().to(dtype) for name in COLUMNS], dim=1))
        if aux_loss is not None:
            self._aux.append(aux_loss.detach().float())

    def drain(self, device: torch.device, gather: Gather) -> tuple[ExampleTable, float | None]:
        """Empty the recorder and return the rows of all processes with the mean auxiliary loss.

        Args:
            device: Where an empty table is made if this process has no rows.
            gather: Concatenates `[rows, k]` tensors of all processes along rows; every process must call it.

        Returns:
            The rows in order of arrival, and the auxiliary loss averaged over micro-batches (None without one).
        """
        width = len(COLUMNS)
        rows = (
            torch.cat(self._blocks) if self._blocks else torch.empty(0, width, dtype=wide_dtype(device), device=device)
        )
        aux = torch.stack(self._aux).to(rows.dtype) if self._aux else rows.new_empty(0)
        # One collective carries both: auxiliary values ride along as rows without an example.
        riders = rows.new_full((aux.shape[0], width), float("nan"))
        riders[:, 0], riders[:, 1] = -1, aux
        self._blocks, self._aux = [], []
        everything = gather(torch.cat([rows, riders])).cpu().double()
        is_rider = everything[:, 0] < 0
        aux_values = everything[is_rider, 1]
        return _table(everything[~is_rider]), aux_values.mean().item() if aux_values.numel() else None


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64, which also holds example ids exactly; float32 on mps, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def drop_repeats(table: ExampleTable) -> ExampleTable:
    """Keep the first row of each example id: samplers repeat rows to give every process a full batch."""
    keep = first_occurrence(table.example_id)
    return ExampleTable(*(column[keep] for column in table))


def describe_first(table: ExampleTable, mask: Tensor) -> str:
    """The first row of a table where `mask` is True, for an error message."""
    row = {name: column[mask][0].item() for name, column in table._asdict().items()}
    return (
        f"example_id={row['example_id']} has reward {row['reward']} and loss {row['loss']} "
        f"(logps {row['logps']}, ref_logps {row['ref_logps']}, weight {row['weight']})"
    )


def first_occurrence(ids: Tensor) -> Tensor:
    """`[rows]` bool mask, True where an id appears for the first time."""
    _, inverse = torch.unique(ids, return_inverse=True)
    order = torch.arange(ids.numel(), device=ids.device)
    first = torch.full((int(inverse.max()) + 1 if ids.numel() else 0,), ids.numel(), device=ids.device)
    first = first.scatter_reduce(0, inverse, order, reduce="amin")
    return first[inverse] == order


def summarize(table: ExampleTable) -> dict[str, float]:
    """Metrics of a table; the keys are always the same, NaN where a class is absent.

    `rewards/*` in nats times beta, `logps/*` in nats per completion, `kl` the mean of `logps(ref) - logps(policy)` in
    nats per completion, `kl_per_token` the same per completion token, `bound_gap` the error term of the paper's bound
    (arXiv 2404.04656): `E[exp(-(r - delta))]` over desirable plus `E[exp(r - delta)]` over undesirable rows.
    """
    up, down = table.label, ~table.label
    shifted = table.reward - table.delta
    right_side = torch.where(up, shifted, -shifted)
    log_ratio = table.ref_logps - table.logps
    weights = table.weight[down]
    chosen, rejected = _mean(table.reward[up]), _mean(table.reward[down])
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": _mean((right_side > 0).double() + 0.5 * (right_side == 0).double()),
        "rewards/auc": auc(table.reward, table.label),
        "logps/chosen": _mean(table.logps[up]),
        "logps/rejected": _mean(table.logps[down]),
        "delta": _mean(table.delta),
        "kl": _mean(log_ratio),
        "kl_per_token": (log_ratio.sum() / table.tokens.sum()).item() if len(log_ratio) else float("nan"),
        "bound_gap": _mean(torch.exp((-shifted[up]).clamp(max=_LARGEST_EXPONENT)))
        + _mean(torch.exp(shifted[down].clamp(max=_LARGEST_EXPONENT))),
        "count/chosen": float(up.sum()),
        "count/rejected": float(down.sum()),
        "udm/weight_mean": _mean(weights),
        "udm/ess": effective_sample_size(weights),
    }


def auc(rewards: Tensor, labels: Tensor) -> float:
    """Probability that a random desirable row has the larger reward, ties counting half; NaN without both classes."""
    up, down = rewards[labels].contiguous(), rewards[~labels].sort().values
    if up.numel() == 0 or down.numel() == 0:
        return float("nan")
    below = torch.searchsorted(down, up, side="left")
    not_above = torch.searchsorted(down, up, side="right")
    return ((below + not_above).double().mean() / (2 * down.numel())).item()


def _mean(values: Tensor) -> float:
    return values.double().mean().item() if values.numel() else float("nan")


def _table(rows: Tensor) -> ExampleTable:
    columns = dict(zip(COLUMNS, rows.unbind(dim=1), strict=True))
    columns["example_id"] = columns["example_id"].long()
    columns["label"] = columns["label"] > 0.5
    return ExampleTable(**columns)
