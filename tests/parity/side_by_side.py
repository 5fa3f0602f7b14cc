"""TRL 1.13.0's BCOTrainer and ours on the same model and the same rows: what both of them log at each step."""

import copy
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from bco_lab import BCOConfig, BCOTrainer
from bco_lab.logps import completion_logps

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # TRL announces on import that this part of it may go
from trl.experimental import bco as trl

STEPS, ROWS_PER_STEP = 10, 8
# What both log. TRL leaves out a class that a step does not have; the auxiliary loss it adds but does not log.
KEYS = (
    *("loss", "delta", "rewards/chosen", "rewards/rejected", "rewards/margins"),
    *("logps/chosen", "logps/rejected", "grad_norm", "learning_rate"),
)
ALWAYS = ("loss", "delta", "grad_norm", "learning_rate")


@dataclass(frozen=True)
class Case:
    """One way of training, which both trainers take.

    Attributes:
        lora: Train a LoRA adapter, not all weights.
        explicit_reference: Hand over a `ref_model` with other weights than the policy's.
        accumulation: Micro-batches per optimizer step.
        one_sided: Rows sorted by label, so that most steps hold one label only.
        precompute: Reference log-probs ahead, not on the fly.
        mixtral: A mixture of experts with its auxiliary loss, not a Llama.
    """

    lora: bool = False
    explicit_reference: bool = False
    accumulation: int = 1
    one_sided: bool = False
    precompute: bool = False
    mixtral: bool = False

    def __str__(self) -> str:
        """The settings that are on, as an id of a test."""
        parts = ["lora" if self.lora else "full", f"accumulation={self.accumulation}"]
        flags = ("explicit_reference", "one_sided", "precompute", "mixtral")
        return ",".join([*parts, *(name for name in flags if getattr(self, name))])


@dataclass(frozen=True)
class Run:
    """What one trainer did.

    Attributes:
        trainer: The trainer, after training.
        logs: One row per step, as logged.
        start: The weights that train, before the first step, by name.
    """

    trainer: Trainer
    logs: list[dict[str, float]]
    start: dict[str, Tensor] = field(repr=False)


def text_rows(count: int = 64, *, one_sided: bool = False, seed: int = 0) -> Dataset:
    """Text of known words with a thumb; prompts of 2 to 5 words, completions of 1 to 6."""
    draw = torch.Generator().manual_seed(seed)

    def words(least: int, most: int) -> list[str]:
        length = int(torch.randint(least, most + 1, (1,), generator=draw))
        return [f"w{i}" for i in torch.randint(2, tiny.VOCABULARY, (length,), generator=draw).tolist()]

    rows = [
        {"prompt": " ".join(words(2, 5)), "completion": " " + " ".join(words(1, 6)), "label": index % 5 in (0, 3)}
        for index in range(count)
    ]
    return Dataset.from_list(sorted(rows, key=lambda row: not row["label"]) if one_sided else rows)


def model(case: Case, seed: int = 0) -> PreTrainedModel:
    """The policy (seed 0), or another with its shape."""
    if not case.mixtral:
        return tiny.model(seed)
    return tiny.mixtral(seed, output_router_logits=True, router_aux_loss_coef=0.25)


def train_both(case: Case, folder: Path, rows: Dataset | None = None) -> tuple[Run, Run]:
    """Train with TRL's trainer, then with ours under the compatibility recipe."""
    return train_theirs(case, folder / "trl", rows), train_ours(case, folder / "ours", rows)


def train_theirs(case: Case, folder: Path, rows: Dataset | None = None) -> Run:
    """Train with TRL's trainer."""
    return _train(trl.BCOTrainer, trl.BCOConfig(**_settings(case, folder)), case, rows)


def train_ours(case: Case, folder: Path, rows: Dataset | None = None, **settings: Any) -> Run:
    """Train with ours under the compatibility recipe, but for `settings`."""
    return _train(BCOTrainer, BCOConfig.like_trl(**_settings(case, folder), **settings), case, rows)


def largest_difference(theirs: Run, ours: Run, key: str) -> float:
    """Over the steps at which TRL logged `key`."""
    steps = zip(theirs.logs, ours.logs, strict=True)
    return max((abs(a[key] - b[key]) for a, b in steps if key in a), default=0.0)


def reward_movement(ours: Run) -> float:
    """How far training with our trainer moved the implicit reward of a row, on average."""
    trainer = ours.trainer
    before = copy.deepcopy(trainer.model)
    before.load_state_dict(ours.start, strict=False)
    batch = trainer.data_collator(list(trainer.train_dataset))
    with torch.no_grad():
        change = completion_logps(trainer.model, batch).logps - completion_logps(before, batch).logps
    return float(trainer.args.beta * change.abs().mean())


def _train(make: type[Trainer], args: TrainingArguments, case: Case, rows: Dataset | None) -> Run:
    policy, reference = model(case), model(case, seed=7) if case.explicit_reference else None
    torch.manual_seed(args.seed)  # the adapter is drawn in the constructor
    trainer = make(
        model=policy,
        ref_model=reference,
        args=args,
        train_dataset=rows if rows is not None else text_rows(one_sided=case.one_sided),
        processing_class=tiny.tokenizer(),
        peft_config=_lora() if case.lora else None,
    )
    trainer.remove_callback(PrinterCallback)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    return Run(trainer, [row for row in trainer.state.log_history if "loss" in row], start)


def _settings(case: Case, folder: Path) -> dict[str, Any]:
    """What both configurations take: enough learning for rewards to move, and nothing random."""
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": ROWS_PER_STEP // case.accumulation,
        "gradient_accumulation_steps": case.accumulation,
        "learning_rate": 2e-2 if case.lora else 2e-3,
        "lr_scheduler_type": "linear",
        "optim": "adamw_torch",
        "beta": 0.5,
        "max_length": 32,
        "precompute_ref_log_probs": case.precompute,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "remove_unused_columns": False,
    }


def _lora() -> LoraConfig:
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, lora_dropout=0.0, target_modules=targets)
