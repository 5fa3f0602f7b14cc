"""BCOTrainer: Binary Classifier Optimization on top of transformers.Trainer."""

import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerState,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput, TrainOutput, rotate_checkpoints

from bco_lab import checkpoints
from bco_lab.config import BCOConfig
from bco_lab.data.collation import FeedbackCollator
from bco_lab.data.tokenization import TokenizationReport
from bco_lab.logps import completion_logps, output_head
from bco_lab.losses import bco_loss, implicit_reward, reduction_weights
from bco_lab.metrics import ExampleRecorder, ExampleTable, drop_repeats, summarize
from bco_lab.models import frozen_copy, with_pad_token
from bco_lab.preparation import each_set, load_if_named, prepare_model, prepare_rows, tokenizer_of
from bco_lab.reference import REF_LOGPS, add_ref_logps, reference_mode
from bco_lab.reward_shift import RewardShift, RewardSums
from bco_lab.steps import OptimizerStep, plan_step, reward_totals, true_rows

logger = logging.getLogger(__name__)

MODEL_COLUMNS = ["input_ids", "prompt_length", "label", "example_id", REF_LOGPS, "example_weight"]
_FILLER = -2.0  # marks rows that only make processes' tables equally long


class BCOTrainer(Trainer):
    """Align a language model with unpaired thumbs-up and thumbs-down (arXiv 2404.04656).

    The loss is `-w * log sigmoid(s * (r - delta))` with the implicit reward `r = beta * (log pi - log pi_ref)`; see
    `bco_lab.losses` for the equation, `bco_lab.reward_shift` for delta. Gradients, delta and metrics are those of the
    whole optimizer step, however it is cut into micro-batches and processes.

    Args:
        model: The policy, or its hub id or folder.
        ref_model: The reference, or its name. None: the policy with its adapter off (PEFT), nothing at all where
            `args.precompute_ref_log_probs` or a `ref_logps` column answers for it, else a frozen copy of the policy.
        args: Settings.
        train_dataset: Rows with `prompt`, `completion` and `label`, strings or chat messages; or rows that
            `tokenize_dataset` prepared. A column `example_weight` weights rows, `p_desirable` is turned into the
            clamped density ratio of undesirable rows.
        eval_dataset: The same, or a dict of them.
        processing_class: The tokenizer; None: the model's own.
        data_collator: Turns rows into a batch; None: right padding.
        model_init: Makes a fresh model, instead of `model`.
        callbacks: Further callbacks.
        optimizers: Optimizer and learning-rate scheduler.
        preprocess_logits_for_metrics: Called with rewards and labels of an evaluation batch before `compute_metrics`.
        peft_config: Adapter to train instead of all weights.
        compute_metrics: Receives implicit rewards as predictions and labels.
        model_adapter_name: Name of the adapter that trains.
        ref_adapter_name: Name of an adapter that is the reference.
        optimizer_cls_and_kwargs: Optimizer class and its arguments.

    Raises:
        ValueError: Arguments that contradict each other, or rows that break a rule (dataset, row and column are named).
    """

    args: BCOConfig
    train_dataset: Any
    eval_dataset: Any

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | str | None = None,
        ref_model: PreTrainedModel | nn.Module | str | None = None,
        args: BCOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        data_collator: Callable[[Any], dict[str, Tensor]] | None = None,
        model_init: Callable[[], PreTrainedModel] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        peft_config: Any | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        model_adapter_name: str | None = None,
        ref_adapter_name: str | None = None,
        *,
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
    ) -> None:
        args = args if args is not None else BCOConfig(output_dir="bco_output")
        if ref_model is not None and ref_model is model:
            raise ValueError("ref_model is the same object as model: pass None, or a separate copy")
        set_seed(args.seed)  # before the adapter is drawn
        if model is None:
            if model_init is None:
                raise ValueError("pass model, its name, or model_init")
            model = model_init()
        tokenizer = processing_class or tokenizer_of(model, args)
        policy = prepare_model(model, args, peft_config, model_adapter_name)
        self.ref_adapter_name = ref_adapter_name
        self.reward_shift = RewardShift(kind=args.reward_shift, decay=args.reward_shift_decay)
        self.tokenization: dict[str, TokenizationReport | None] = {}
        self._step: OptimizerStep | None = None
        self._train_rows, self._eval_rows = ExampleRecorder(), ExampleRecorder()

        super().__init__(
            model=policy,
            args=args,
            data_collator=data_collator or FeedbackCollator(pad_token_id=with_pad_token(tokenizer).pad_token_id),
            train_dataset=self._prepared(train_dataset, "train", tokenizer, args),
            eval_dataset=each_set(eval_dataset, "eval", lambda rows, name: self._prepared(rows, name, tokenizer, args)),
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            compute_metrics=compute_metrics,
        )
        # The loss of a micro-batch is already its share of the whole step; both names are read, by different releases.
        self.loss_is_scaled_for_ga = self.model_accepts_loss_kwargs = True
        self.label_names = ["label"]
        self._aux_coef = float(getattr(policy.config, "router_aux_loss_coef", 0.0) or 0.0)
        self.ref_model = self._reference_model(load_if_named(ref_model, args))
        if args.precompute_ref_log_probs:
            self.train_dataset = self._with_ref_logps(self.train_dataset, "train")
            self.eval_dataset = each_set(self.eval_dataset, "eval", self._with_ref_logps)
            self.ref_model = None

    # ---- set-up ----

    def _prepared(self, dataset: Any, name: str, tokenizer: PreTrainedTokenizerBase, args: BCOConfig) -> Any:
        rows, self.tokenization[name] = prepare_rows(dataset, tokenizer, args, name)
        return rows

    def _reference_model(self, ref_model: Any) -> nn.Module | None:
        if ref_model is None:
            own = self.args.precompute_ref_log_probs or hasattr(self.model, "peft_config")
            datasets_ = [
                self.train_dataset,
                *(self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]),
            ]
            if own or all(REF_LOGPS in (d.column_names or []) for d in datasets_ if d is not None):
                return None
            ref_model = frozen_copy(self.model)
        ref_model.eval().requires_grad_(False)
        prepared: nn.Module = self.accelerator.prepare_model(ref_model, evaluation_mode=True)
        return prepared

    def _with_ref_logps(self, dataset: Any, name: str) -> Any:
        if dataset is None or REF_LOGPS in (dataset.column_names or []):
            return dataset
        if isinstance(dataset, IterableDataset):
            raise ValueError(f"{name}: precompute_ref_log_probs needs a data set with a length, not a stream")
        # Evaluation batches are the ones of evaluate(): a policy that has not moved then has rewards of exactly 0.
        training = name == "train"
        return add_ref_logps(
            dataset,
            self.ref_model if self.ref_model is not None else self.model,
            self.data_collator,
            batch_size=2 * self.args.train_batch_size if training else self.args.eval_batch_size,
            by_length=training,
            device=self.args.device,
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
            gather=self._gather_rows,
            ref_adapter_name=self.ref_adapter_name,
            autocast=self.accelerator.autocast,
            description=f"Reference log-probs ({name})",
        )

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = MODEL_COLUMNS

    # ---- one optimizer step ----

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """Fetch the micro-batches of an optimizer step and count its true rows per class over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step = self._plan_step(batches, device)
        return batches, torch.tensor(self._step.desirable_count + self._step.undesirable_count, device=device)

    def _plan_step(self, batches: list[dict[str, Tensor]], device: torch.device) -> OptimizerStep:
        labels = [batch["label"] for batch in batches]
        true = [self._true_rows(index, len(label)).to(label.device) for index, label in enumerate(labels)]
        return plan_step(labels, true, device, self._sum_over_processes)

    def _true_rows(self, micro_batch: int, batch_size: int) -> Tensor:
        loader = self.callback_handler.train_dataloader
        processes = self.accelerator.num_processes
        if processes == 1 or loader is None or isinstance(self.train_dataset, IterableDataset):
            return torch.ones(batch_size, dtype=torch.bool)
        accumulation = self.args.gradient_accumulation_steps
        batch_in_epoch = (self.state.global_step % self._steps_per_epoch(loader)) * accumulation + micro_batch
        return true_rows(batch_size, batch_in_epoch, self.accelerator.process_index, processes, len(self.train_dataset))

    def _steps_per_epoch(self, loader: Any) -> int:
        return max(1, math.ceil(len(loader) / self.args.gradient_accumulation_steps))

    def _planned_steps(self) -> int:
        """Optimizer steps that `args` ask for in all."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        return math.ceil(self.args.num_train_epochs * self._steps_per_epoch(self.get_train_dataloader()))

    def _sum_over_processes(self, values: Tensor) -> Tensor:
        total: Tensor = self.accelerator.reduce(values, reduction="sum")
        return total

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one micro-batch; after the step's last one, delta moves."""
        loss = super().training_step(model, inputs, num_items_in_batch=num_items_in_batch)
        step = self._step
        assert step is not None
        step.done += 1
        if step.finished:
            self._finish_step(step)
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This process's share of the step's loss, times the number of processes: averaging gradients divides by it."""
        labels = inputs["label"]
        step = self._step or self._plan_step([inputs], labels.device)
        true = step.true_rows[step.done].to(labels.device)
        columns, aux_loss = self._score(model, inputs)
        totals = reward_totals(columns["reward"], labels, true)
        if self.reward_shift.updates_before_use and model.training:
            pooled = self._sum_over_processes(totals).tolist()
            self.reward_shift = self.reward_shift.update(RewardSums(*pooled))
        self._add_losses(columns)
        shares = reduction_weights(labels, step.desirable_count, step.undesirable_count, self.args.loss_reduction)
        loss = (columns["loss"] * shares)[true].sum()
        if aux_loss is not None:
            loss = loss + self._aux_coef * aux_loss * (true.sum() / step.rows)
        step.totals += torch.cat([totals, loss.detach().to(totals.dtype).reshape(1)])
        self._train_rows.add({name: column[true] for name, column in columns.items()}, aux_loss)
        loss = loss * self.accelerator.num_processes
        return (loss, {"rewards": columns["reward"].detach()}) if return_outputs else loss

    def _score(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor | None]:
        """Rewards of a batch, with the columns of `bco_lab.metrics` but for delta and loss, and the auxiliary loss."""
        policy = completion_logps(model, inputs, self._head(model))
        ref_logps = inputs[REF_LOGPS] if REF_LOGPS in inputs else self._ref_logps(model, inputs)
        reward = implicit_reward(policy.logps, ref_logps, self.args.beta)
        columns = {
            "example_id": inputs["example_id"],
            "label": inputs["label"],
            "reward": reward,
            "logps": policy.logps,
            "ref_logps": ref_logps,
            "tokens": policy.token_counts,
            "weight": inputs.get("example_weight", torch.ones_like(reward)),
        }
        return columns, policy.aux_loss

    def _add_losses(self, columns: dict[str, Tensor]) -> None:
        delta = self.reward_shift.delta
        columns["delta"] = torch.full_like(columns["reward"], delta)
        columns["loss"] = bco_loss(columns["reward"], columns["label"], delta, columns["weight"])

    def _ref_logps(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        if self.ref_model is not None:
            with torch.no_grad():
                return completion_logps(self.ref_model, inputs, self._head(self.ref_model)).logps
        if not hasattr(self.model, "peft_config"):
            raise ValueError(
                "these rows have no ref_logps and no reference model is left to compute them: "
                "pass the data set as eval_dataset to the trainer, or set precompute_ref_log_probs=False"
            )
        unwrapped = self.accelerator.unwrap_model(model)
        with reference_mode(unwrapped, self.ref_adapter_name):
            return completion_logps(unwrapped, inputs, self._head(unwrapped)).logps

    def _head(self, model: nn.Module) -> nn.Module | None:
        return output_head(self.accelerator.unwrap_model(model))

    def _finish_step(self, step: OptimizerStep) -> None:
        # The one moment of a step when the host waits for the device.
        *sums, loss = self._sum_over_processes(step.totals).tolist()
        if not all(math.isfinite(value) for value in (*sums, loss)):
            self._stop_at_non_finite()
        if not self.reward_shift.updates_before_use:
            self.reward_shift = self.reward_shift.update(RewardSums(*sums))
        self._step = None

    def _stop_at_non_finite(self) -> None:
        table, aux_loss = self._train_rows.drain(self.args.device, self._gather_rows)
        bad = ~(torch.isfinite(table.reward) & torch.isfinite(table.loss))
        where = f"step {self.state.global_step + 1}"
        if not bool(bad.any()):
            raise FloatingPointError(f"{where}: the loss is not finite (aux_loss={aux_loss})")
        row = {name: column[bad][0].item() for name, column in table._asdict().items()}
        raise FloatingPointError(
            f"{where}: example_id={row['example_id']} has reward {row['reward']} and loss {row['loss']} "
            f"(logps {row['logps']}, ref_logps {row['ref_logps']}, weight {row['weight']}); "
            f"{int(bad.sum())} example(s) in all. A lower learning_rate or max_grad_norm usually helps"
        )

    # ---- evaluation and logging ----

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Score a batch: mean loss, implicit rewards `[batch]` and labels `[batch]`."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            columns, aux_loss = self._score(model, inputs)
            self._add_losses(columns)
        self._eval_rows.add(columns, aux_loss)
        loss = columns["loss"].mean()
        return (loss, None, None) if prediction_loss_only else (loss, columns["reward"], inputs["label"])

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Evaluate, then replace the mean of batch losses by metrics over every row once."""
        prefix = kwargs.get("metric_key_prefix", "eval")
        output = super().evaluation_loop(*args, **kwargs)
        table, aux_loss = self._eval_rows.drain(self.args.device, self._gather_rows)
        metrics = self._metrics(drop_repeats(table), aux_loss)
        metrics["loss"] = metrics.pop("bco_loss") + self._aux_coef * (aux_loss or 0.0)
        output.metrics.update({f"{prefix}_{name}": value for name, value in metrics.items()})
        return output

    def reference_metrics(self) -> dict[str, float]:
        """What `evaluate()` says of the reference itself, from the column `ref_logps`, without a forward pass.

        Every reward of the reference is 0, by definition; a policy that has not been trained is the reference.

        Raises:
            ValueError: There is no single evaluation set with reference log-probs.
        """
        rows = self.eval_dataset
        if not isinstance(rows, Dataset) or REF_LOGPS not in rows.column_names:
            raise ValueError("reference_metrics needs one eval_dataset with ref_logps (precompute_ref_log_probs=True)")
        columns = {name: torch.tensor(rows[name]) for name in ("example_id", "label", REF_LOGPS)}
        lengths = torch.tensor([len(ids) for ids in rows["input_ids"]])
        columns["tokens"] = lengths - torch.tensor(rows["prompt_length"])
        columns["logps"] = columns[REF_LOGPS]
        columns["reward"] = torch.zeros_like(columns["logps"])
        weighted = "example_weight" in rows.column_names
        columns["weight"] = torch.tensor(rows["example_weight"]) if weighted else torch.ones_like(columns["logps"])
        columns["delta"] = torch.zeros_like(columns["logps"])
        columns["loss"] = bco_loss(columns["reward"], columns["label"], 0.0, columns["weight"])
        table = ExampleTable(**{k: v.double() if v.is_floating_point() else v for k, v in columns.items()})
        metrics = self._metrics(table, None)
        metrics["loss"] = metrics.pop("bco_loss")
        return {f"eval_{name}": value for name, value in metrics.items()}

    def _metrics(self, table: ExampleTable, aux_loss: float | None) -> dict[str, float]:
        metrics = summarize(table)
        shares = reduction_weights(
            table.label,
            metrics["count/chosen"],
            metrics["count/rejected"],
            self.args.loss_reduction,
        )
        metrics["bco_loss"] = (table.loss * shares).sum().item()
        if aux_loss is not None:
            metrics["aux_loss"] = aux_loss
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics of the examples since the last log to a training log."""
        if "loss" in logs:
            table, aux_loss = self._train_rows.drain(self.args.device, self._gather_rows)
            logs.update(self._metrics(table, aux_loss))
            logs.pop("bco_loss")  # the Trainer's own `loss` is the mean over the window's steps
        super().log(logs, start_time)

    def _gather_rows(self, rows: Tensor) -> Tensor:
        """Concatenate `[rows, k]` tensors of all processes; every process must call this."""
        if self.accelerator.num_processes == 1:
            return rows
        padded = self.accelerator.pad_across_processes(rows, dim=0, pad_index=_FILLER)
        gathered: Tensor = self.accelerator.gather(padded)
        return gathered[gathered[:, 0] != _FILLER]

    # ---- data sets that arrive late ----

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Metrics on `eval_dataset` (raw or prepared rows, or a dict of them) or on the trainer's own."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = each_set(eval_dataset, "eval", self._late)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test") -> Any:
        """Implicit rewards (`predictions`), labels and metrics of raw or prepared rows."""
        return super().predict(self._late(test_dataset, "test"), ignore_keys, metric_key_prefix)

    def _late(self, dataset: Any, name: str) -> Any:
        return self._prepared(dataset, name, self.processing_class, self.args)

    # ---- checkpoints ----

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train; `resume_from_checkpoint=True` continues from the newest whole checkpoint in `args.output_dir`."""
        if resume_from_checkpoint is True:
            found = checkpoints.last_whole_checkpoint(Path(self.args.output_dir))
            if found is None:
                raise FileNotFoundError(f"no whole checkpoint in {self.args.output_dir}")
            resume_from_checkpoint = str(found)
        if resume_from_checkpoint:
            if not any(Path(resume_from_checkpoint).glob("*optim*")) and not self.is_deepspeed_enabled:
                logger.warning("%s has no optimizer state (save_only_model): it starts afresh", resume_from_checkpoint)
            self.reward_shift = RewardShift(**checkpoints.load_reward_shift(Path(resume_from_checkpoint)))
            saved = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))
            if saved.global_step >= self._planned_steps():
                return self._restore_finished(str(resume_from_checkpoint), saved)
        return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)

    def _restore_finished(self, checkpoint: str, saved: TrainerState) -> TrainOutput:
        """Take over a checkpoint of the last step; the Trainer's own loop would take one step too many from there."""
        self._load_from_checkpoint(checkpoint)
        self.state = saved
        return TrainOutput(saved.global_step, 0.0, {})

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        # A pickle that nothing reads: the settings are in trainer_state.json and, from the command line, config.yaml.
        (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            checkpoints.unmark(folder)
        # Older checkpoints go only after the new one is whole: a kill in between must leave one to resume from.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoints.save_reward_shift(folder, self.reward_shift.state_dict())
            checkpoints.mark_whole(folder)
            rotate_checkpoints(
                output_dir=str(folder.parent),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )
