"""Reference log-probs: computed ahead as a column of the data, or on the fly from whoever plays the reference."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm

from bco_lab.logps import completion_logps, output_head
from bco_lab.losses import bco_loss
from bco_lab.metrics import ExampleTable

REF_LOGPS = "ref_logps"

Batch = dict[str, Tensor]
Collator = Callable[[Sequence[dict[str, Any]]], Batch]


@contextmanager
def reference_mode(model: nn.Module, ref_adapter_name: str | None = None) -> Iterator[nn.Module]:
    """Turn `model` into its own reference while open, in eval mode and without gradients.

    A PEFT model answers with its adapters switched off, or with `ref_adapter_name` switched on; any other model
    answers as it stands. Everything is put back on leaving, also after an error, and no parameter changes whether it is
    trainable.
    """
    modes = [(module, module.training) for module in model.modules()]
    trainable = [(p, p.requires_grad) for p in model.parameters()]
    model.eval()
    try:
        with torch.no_grad(), _reference_adapter(model, ref_adapter_name):
            # PEFT freezes an adapter that it switches off; FSDP, on its first forward pass, notes what trains.
            _set_trainable(trainable)
            yield model
    finally:
        _set_trainable(trainable)
        for module, training in modes:
            module.training = training


def _set_trainable(parameters: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, requires_grad in parameters:
        parameter.requires_grad_(requires_grad)


@contextmanager
def _reference_adapter(model: Any, name: str | None) -> Iterator[None]:
    if getattr(model, "_hf_peft_config_loaded", False):  # an adapter that transformers itself holds
        active = model.active_adapters()
        model.disable_adapters() if name is None else model.set_adapter(name)
        try:
            yield
        finally:
            model.enable_adapters()
            model.set_adapter(active)
    elif not hasattr(model, "disable_adapter"):
        yield
    elif name is None:
        with model.disable_adapter():
            yield
    else:
        active = model.active_adapter
        model.set_adapter(name)
        try:
            yield
        finally:
            model.set_adapter(active)


def add_ref_logps(
    dataset: Dataset,
    model: nn.Module,
    collator: Collator,
    *,
    batch_size: int,
    by_length: bool,
    device: torch.device,
    process_index: int = 0,
    num_processes: int = 1,
    gather: Callable[[Tensor], Tensor] = lambda rows: rows,
    ref_adapter_name: str | None = None,
    autocast: Callable[[], Any] = nullcontext,
    description: str = "Reference log-probs",
) -> Dataset:
    """Add the column `ref_logps`: summed completion log-probs under the reference, nats.

    Batches are dealt out to the processes in turn.

    Args:
        dataset: Tokenised rows (`input_ids`, `prompt_length`, `label`, `example_id`).
        model: The reference: a frozen model, or the policy before its first step (see `reference_mode`).
        collator: Turns rows into a batch.
        batch_size: Rows per forward pass and process.
        by_length: Batch rows of like length, so that little is spent on padding; else keep their order.
        device: Where the model is.
        process_index: Which process this is.
        num_processes: How many share the work.
        gather: Concatenates `[rows, 2]` tensors of all processes.
        ref_adapter_name: The PEFT adapter that is the reference; None: no adapter.
        autocast: The mixed-precision context of the training step.
        description: Shown beside the progress bar.

    Raises:
        ValueError: A reference log-prob is not finite; the message names the example.
    """
    order = list(range(len(dataset)))
    if by_length:
        order.sort(key=[-len(ids) for ids in dataset["input_ids"]].__getitem__)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    # As many batches for every process, some maybe for nothing: where weights are sharded, all must take part in each
    # forward pass.
    filled_up = math.ceil(len(batches) / num_processes) * num_processes
    mine = range(process_index, filled_up, num_processes)
    head = output_head(model)
    results = [torch.empty(0, 2, dtype=torch.float64, device=device)]
    with reference_mode(model, ref_adapter_name):
        for number in tqdm(mine, desc=description, disable=process_index > 0, leave=False, unit="batch"):
            indices = batches[number % len(batches)]
            batch = {k: v.to(device) for k, v in collator([dataset[i] for i in indices]).items()}
            with autocast():
                logps = completion_logps(model, batch, head).logps
            if number < len(batches):
                results.append(torch.stack([torch.tensor(indices, device=device).double(), logps.double()], dim=1))
    everything = gather(torch.cat(results)).cpu()
    column = torch.full((len(dataset),), float("nan"), dtype=torch.float64)
    column[everything[:, 0].long()] = everything[:, 1]
    if not torch.isfinite(column).all():
        bad = int((~torch.isfinite(column)).nonzero()[0])
        raise ValueError(
            f"reference log-prob of example_id={dataset[bad]['example_id']} is {column[bad].item()}: it must be finite"
        )
    return dataset.add_column(REF_LOGPS, column.float().tolist())


def reference_table(rows: Dataset) -> ExampleTable:
    """What a forward pass of the reference would say of rows with `ref_logps`: its rewards are 0, by definition."""
    columns = {name: torch.tensor(rows[name]) for name in ("example_id", "label", REF_LOGPS)}
    lengths = torch.tensor([len(ids) for ids in rows["input_ids"]])
    weighted = "example_weight" in rows.column_names
    nothing = torch.zeros_like(columns[REF_LOGPS])
    columns |= {
        "tokens": lengths - torch.tensor(rows["prompt_length"]),
        "logps": columns[REF_LOGPS],
        "reward": nothing,
        "delta": nothing,
        "weight": torch.tensor(rows["example_weight"]) if weighted else torch.ones_like(nothing),
    }
    columns["loss"] = bco_loss(nothing, columns["label"], 0.0, columns["weight"])
    return ExampleTable(**{k: v.double() if v.is_floating_point() else v for k, v in columns.items()})
