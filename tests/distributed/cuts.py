"""The same training steps and the same evaluation, cut in different ways; started by torchrun it writes its results.

torchrun --standalone --nproc-per-node 2 tests/distributed/cuts.py FOLDER
"""

import json
import sys
from pathlib import Path
from typing import Any

import tiny
import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from bco_lab import BCOTrainer
from bco_lab.losses import LOSS_REDUCTIONS

STEPS, ROWS_PER_STEP = 2, 16
# in quarters of a step 3, 1, 0, 1 and 2, 4, 1, 2 desirable rows; in halves 4, 1 and 6, 3
THUMBS = "+++- +--- ---- -+-- ++-- ++++ +--- -+-+".replace(" ", "")
CUTS_OF_TWO_PROCESSES = ((8, 1), (2, 4))
AFTER_EVALUATION = "after an evaluation"
CLOCKS = ("_runtime", "_per_second", "_time")
EVALUATION_ROWS, EVALUATION_BATCHES = 13, (1, 4, 5, 13)


class Gradients(TrainerCallback):
    """Keeps the gradient of each step, all parameters as one float64 vector, as the optimizer is about to see it."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        """Called when every micro-batch has been added up and every process has been averaged."""
        gradients = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
        self.steps.append(torch.cat(gradients).clone())


def training_rows() -> Dataset:
    """Rows with unequal counts of labels in the parts of a step, uneven weights, and rewards and delta other than 0."""
    count = STEPS * ROWS_PER_STEP
    draw = torch.Generator().manual_seed(5)
    rows = tiny.rows(count, example_weight=(0.25 + 2 * torch.rand(count, generator=draw)).tolist())
    tokens = torch.tensor([len(row["input_ids"]) - row["prompt_length"] for row in rows])
    ref_logps = -3.8 * tokens + torch.randn(count, generator=draw)
    rows = rows.add_column("ref_logps", ref_logps.tolist())
    return rows.remove_columns("label").add_column("label", [thumb == "+" for thumb in THUMBS])


def training_steps(
    folder: Path, per_device: int, accumulation: int, reduction: str, *, evaluate_first: bool = False
) -> tuple[Tensor, dict[str, Any]]:
    """Gradients `[steps, parameters]` and what the steps logged; the first step has delta 0, the second has not."""
    trainer = tiny.trainer(
        folder,
        training_rows(),
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        loss_reduction=reduction,
        train_sampling_strategy="sequential",
        max_steps=STEPS,
        beta=0.5,
    )
    gradients = Gradients()
    trainer.add_callback(gradients)
    if evaluate_first:
        trainer.evaluate(training_rows())
    trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    return torch.stack(gradients.steps), {"logs": logs, "delta": trainer.reward_shift.delta}


def evaluation(folder: Path, per_device: int) -> dict[str, float]:
    """Metrics of a policy that is not its reference, on rows that no number of processes divides."""
    trainer: BCOTrainer = tiny.trainer(
        folder,
        tiny.rows(4),
        tiny.rows(EVALUATION_ROWS, seed=1, ref_logps=[-30.0 - index for index in range(EVALUATION_ROWS)]),
        per_device_eval_batch_size=per_device,
    )
    return {key: value for key, value in trainer.evaluate().items() if not key.endswith(CLOCKS)}


def main(folder: Path) -> None:
    """Write `gradients.safetensors` and `results.json`, from the first process."""
    results: dict[str, Any] = {}
    gradients: dict[str, Tensor] = {}
    for reduction in LOSS_REDUCTIONS:
        for per_device, accumulation in CUTS_OF_TWO_PROCESSES:
            name = f"{reduction} {per_device}x{accumulation}"
            gradients[name], results[name] = training_steps(folder / "run", per_device, accumulation, reduction)
    gradients[AFTER_EVALUATION], results[AFTER_EVALUATION] = training_steps(
        folder / "run", 8, 1, LOSS_REDUCTIONS[0], evaluate_first=True
    )
    for size in EVALUATION_BATCHES:
        results[f"evaluation {size}"] = evaluation(folder / "run", size)
    results["processes"] = torch.distributed.get_world_size()
    if torch.distributed.get_rank() == 0:
        save_file(gradients, folder / "gradients.safetensors")
        (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
