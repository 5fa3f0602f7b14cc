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
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput

from bco_lab.config import BCOConfig
from bco_lab.data.collation import FeedbackCollator
from bco_lab.data.tokenization import TokenizationReport
from bco_lab.distributed import (
    check_reference_under_zero3,
    every_process_computes,
    prepare_reference,
    shard_policy,
)
from bco_lab.eval_samples import choose_rows, complete_rows, prompt_ids, side_by_side, track_samples, write_samples
from bco_lab.logps import completion_logps, output_head
from bco_lab.losses import bco_loss, implicit_reward, reduction_weights
from bco_lab.metrics import ExampleRecorder, ExampleTable, describe_first, drop_repeats, summarize
from bco_lab.models import check_adapter, frozen_copy
from bco_lab.preparation import (
    check_arguments,
    each_set,
    is_encoder_decoder,
    load_if_named,
    match_rows,
    prepare_model,
    prepare_rows,
    prompt_embedder,
    tokenizer_in,
    tokenizer_of,
    unpaired_rows,
)
from bco_lab.reference import REF_LOGPS, add_ref_logps, reference_mode, reference_table
from bco_lab.resumable import ResumableTrainer
from bco_lab.reward_shift import RewardSums
from bco_lab.steps import OptimizerStep, plan_step, reward_totals, true_rows
from bco_lab.udm import PromptMatching

logger = logging.getLogger(__name__)

MODEL_COLUMNS = ["input_ids", "prompt_length", "label", "example_id", REF_LOGPS, "example_weight"]
_FILLER = -2.0  # marks rows that only make processes' tables equally long


class BCOTrainer(ResumableTrainer):
    """Align a language model with unpaired thumbs-up and thumbs-down (arXiv 2404.04656).

    The loss is `-w * log sigmoid(s * (r - delta))` with the implicit reward `r = beta * (log pi - log pi_ref)`; see
    `bco_lab.losses` for the equation, `bco_lab.reward_shift` for delta. Gradients, delta and metrics are those of the
    whole optimizer step, however it is cut into micro-batches and processes.

    Args:
        model: The policy, or its hub id or folder.
        ref_model: The reference, or its name. None: the policy with its adapter off (PEFT), nothing at all where
            `args.precompute_ref_log_probs` or a `ref_logps` column answers for it, else a frozen copy of the policy.
        args: Settings.
        train_dataset: Rows with `prompt`, `completion` and `label`, strings or chat messages; pairs with `chosen`,
            `rejected` and maybe `prompt`; or rows that `tokenize_dataset` prepared; in memory or streamed. A column
            `example_weight` weights rows, `p_desirable` is turned into the clamped density ratio of undesirable rows.
        eval_dataset: The same, or a dict of them.
        processing_class: The tokenizer, or a processor with one inside; None: the model's own.
        data_collator: Turns rows into a batch; None: right padding.
        model_init: Makes a fresh model, instead of `model`, and again for each call of `train()`; it must bring the
            same weights each time, since the reference is that of the first.
        callbacks: Further callbacks.
        optimizers: Optimizer and learning-rate scheduler.
        preprocess_logits_for_metrics: Called with rewards and labels of an evaluation batch before `compute_metrics`.
        peft_config: Adapter to train instead of all weights.
        compute_metrics: Receives implicit rewards as predictions and labels.
        model_adapter_name: Name of the adapter that trains.
        ref_adapter_name: Name of an adapter that is the reference.
        embedding_func: Underlying distribution matching: called with `input_ids` and `attention_mask`, `[batch,
            tokens]`, of prompts; returns embeddings, `[batch, dim]`. Undesirable training rows are weighted by the
            clamped density ratio that a classifier on the embeddings finds (see `bco_lab.udm`).
        embedding_tokenizer: Tokenises prompts for `embedding_func`.
        optimizer_cls_and_kwargs: Optimizer class and its arguments.

    Raises:
        ValueError: Arguments that contradict each other, or rows that break a rule (dataset, row and column are named).
    """

    args: BCOConfig
    model_init: Callable[..., PreTrainedModel] | None
    model: Any
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
        model_init: Callable[..., PreTrainedModel] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        peft_config: Any | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        model_adapter_name: str | None = None,
        ref_adapter_name: str | None = None,
        embedding_func: Callable[..., Tensor] | None = None,
        embedding_tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
    ) -> None:
        args = args if args is not None else BCOConfig(output_dir="bco_output")
        check_arguments(
            model=model,
            ref_model=ref_model,
            model_init=model_init,
            args=args,
            optimizers=optimizers,
            embedding=(embedding_func, embedding_tokenizer),
            adapters=(model_adapter_name, ref_adapter_name),
        )
        self._peft_config = peft_config
        self.model_adapter_name = model_adapter_name
        self.ref_adapter_name = ref_adapter_name
        set_seed(args.seed)
        if model_init is not None:
            self.model_init = model_init
            model = super().call_model_init()
        # Rows before weights: a row that breaks a rule should not cost the loading of a model.
        self.is_encoder_decoder = is_encoder_decoder(model, args)
        processing_class = processing_class or tokenizer_of(model, args)
        self._tokenizer = tokenizer_in(processing_class)
        self.args = args
        self.reward_shift = self.fresh_reward_shift()
        self.tokenization: dict[str, TokenizationReport | None] = {}
        self._step: OptimizerStep | None = None
        self._train_rows, self._eval_rows = ExampleRecorder(), ExampleRecorder()
        self._given_reference_gone = False
        self._known_texts: dict[tuple[tuple[int, ...], ...], list[str]] = {}
        self._embed = prompt_embedder(embedding_func, embedding_tokenizer, args)
        self.matching: PromptMatching | None = None
        train_rows = self._prepared(train_dataset, "train")
        eval_rows = each_set(eval_dataset, "eval", self._prepared)
        if ref_model is None and not _ref_logps_known(train_rows, eval_rows):
            adapter = peft_config is not None or hasattr(model, "peft_config")
            check_reference_under_zero3(adapter=adapter, precompute=args.precompute_ref_log_probs)

        set_seed(args.seed)  # before the adapter is drawn
        policy = prepare_model(model, args, peft_config, model_adapter_name)
        if ref_adapter_name is not None:
            check_adapter(policy, ref_adapter_name, "ref_adapter_name")
        super().__init__(
            model=policy,
            args=args,
            data_collator=data_collator or self._collator(policy),
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            compute_metrics=compute_metrics,
        )
        self.model_init = model_init
        # The loss of a micro-batch is already its share of the whole step; both names are read, by different releases.
        self.loss_is_scaled_for_ga = self.model_accepts_loss_kwargs = True
        self.label_names = ["label"]
        self._aux_coef = float(getattr(policy.config, "router_aux_loss_coef", 0.0) or 0.0)
        if getattr(policy.config, "output_router_logits", False) and not self._aux_coef:
            logger.warning("output_router_logits is on but router_aux_loss_coef is 0: the auxiliary loss has no effect")
        self.ref_model = self._reference_model(load_if_named(ref_model, args))
        self.model_wrapped = self.model = shard_policy(self.accelerator, self.model)
        if args.precompute_ref_log_probs:
            self.train_dataset = self._with_ref_logps(self.train_dataset, "train")
            self.eval_dataset = each_set(self.eval_dataset, "eval", self._with_ref_logps)
        own = self.ref_model is None and not hasattr(self.model, "peft_config")
        if args.generate_during_eval and (own or args.precompute_ref_log_probs):  # while there is somebody to ask
            each_set(self.eval_dataset, "eval", self._keep_reference_texts)
        if args.precompute_ref_log_probs:
            self._given_reference_gone = ref_model is not None  # the caller's, not a copy of the policy
            self.ref_model = None

    # ---- set-up ----

    def _prepared(self, dataset: Any, name: str) -> Any:
        rows = unpaired_rows(dataset, self.args, name)
        if self._embed is not None and rows is not None:
            rows, self.matching = match_rows(rows, self._embed, self.matching, self.args, name)
        rows, self.tokenization[name] = prepare_rows(
            rows, self._tokenizer, self.args, name, encoder_decoder=self.is_encoder_decoder
        )
        return rows

    def _collator(self, policy: Any) -> FeedbackCollator:
        if not self.is_encoder_decoder:
            return FeedbackCollator(pad_token_id=self._tokenizer.pad_token_id)
        start = policy.config.decoder_start_token_id
        return FeedbackCollator(pad_token_id=self._tokenizer.pad_token_id, decoder_start_token_id=start)

    def call_model_init(self, trial: Any = None) -> Any:
        """A fresh policy from `model_init`, with dropout and adapter as asked for."""
        return prepare_model(super().call_model_init(trial), self.args, self._peft_config, self.model_adapter_name)

    def _reference_model(self, ref_model: Any) -> nn.Module | None:
        if ref_model is None:
            precompute, adapter = self.args.precompute_ref_log_probs, hasattr(self.model, "peft_config")
            # DeepSpeed moves the policy to its device when training begins: too late for what is computed ahead.
            own = (precompute and not self.is_deepspeed_enabled) or (adapter and not precompute)
            if own or _ref_logps_known(self.train_dataset, self.eval_dataset):
                return None
            ref_model = frozen_copy(self.model)
        return prepare_reference(self.accelerator, ref_model.eval().requires_grad_(False))

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
        batch_in_epoch = (self.state.global_step % self.steps_per_epoch(loader)) * accumulation + micro_batch
        return true_rows(batch_size, batch_in_epoch, self.accelerator.process_index, processes, len(self.train_dataset))

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
        # The reference first: its logits are gone before those of the policy, which wait for the backward pass, come.
        ref_logps = inputs[REF_LOGPS] if REF_LOGPS in inputs else self._ref_logps(model, inputs)
        policy = completion_logps(model, inputs, self._head(model))
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
        if self._given_reference_gone or not hasattr(self.model, "peft_config"):
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
        raise FloatingPointError(
            f"{where}: {describe_first(table, bad)}; {int(bad.sum())} example(s) in all. "
            "A lower learning_rate or max_grad_norm usually helps"
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
        if self.args.generate_during_eval and prefix.startswith("eval"):
            self._sample_both((args[0] if args else kwargs["dataloader"]).dataset, prefix)
        output = super().evaluation_loop(*args, **kwargs)
        table, aux_loss = self._eval_rows.drain(self.args.device, self._gather_rows)
        metrics = self._metrics(drop_repeats(table), aux_loss)
        metrics["loss"] = metrics.pop("bco_loss") + self._aux_coef * (aux_loss or 0.0)
        output.metrics.update({f"{prefix}_{name}": value for name, value in metrics.items()})
        return output

    def _sample_both(self, rows: Any, name: str) -> None:
        """Completions of policy and reference to a fixed choice of prompts: into a file and to the trackers."""
        if self._draws_samples:
            chosen = choose_rows(rows, seed=self.args.seed)
            texts = self._texts_of(self.model, chosen)
            samples = side_by_side(chosen, self._tokenizer, texts, self._reference_texts(chosen))
            if self.is_world_process_zero():
                write_samples(samples, Path(self.args.output_dir), name, self.state.global_step)
                track_samples(samples, self.args.report_to, name, self.state.global_step)
                for callback in self.callback_handler.callbacks:
                    if hasattr(callback, "on_eval_samples"):
                        callback.on_eval_samples(samples, name, self.state)
        self.accelerator.wait_for_everyone()

    def _keep_reference_texts(self, rows: Any, _name: str) -> None:
        if rows is not None and self._draws_samples:
            self._reference_texts(choose_rows(rows, seed=self.args.seed))

    @property
    def _draws_samples(self) -> bool:
        """Where weights are sharded all processes draw the same samples, else one does."""
        return self.is_world_process_zero() or every_process_computes(self.accelerator)

    def _reference_texts(self, chosen: list[dict[str, Any]]) -> list[str] | None:
        """Neither the reference nor the choice changes during a run: sampled once."""
        key = tuple(tuple(prompt_ids(row)) for row in chosen)
        if key not in self._known_texts:
            reference = self.ref_model if self.ref_model is not None else self.model
            moved = self.state.global_step > 0 or self.is_in_train
            moved_on = not hasattr(self.model, "peft_config") and moved
            if self.ref_model is None and (self._given_reference_gone or moved_on):
                return None  # it is gone, and these rows come too late
            with reference_mode(self.accelerator.unwrap_model(reference), self.ref_adapter_name):
                self._known_texts[key] = self._texts_of(reference, chosen)
        return self._known_texts[key]

    def _texts_of(self, model: nn.Module, chosen: list[dict[str, Any]]) -> list[str]:
        with self.accelerator.autocast():
            return complete_rows(
                self.accelerator.unwrap_model(model),
                self._tokenizer,
                chosen,
                max_length=self.args.max_length,
                max_completion_length=self.args.max_completion_length,
                seed=self.args.seed,
                progress=self.is_world_process_zero() and not self.args.disable_tqdm,
            )

    def reference_metrics(self) -> dict[str, float]:
        """What `evaluate()` says of the reference itself, from the column `ref_logps`, without a forward pass.

        Every reward of the reference is 0, by definition; a policy that has not been trained is the reference.

        Raises:
            ValueError: There is no single evaluation set with reference log-probs.
        """
        rows = self.eval_dataset
        if not isinstance(rows, Dataset) or REF_LOGPS not in rows.column_names:
            raise ValueError("reference_metrics needs one eval_dataset with ref_logps (precompute_ref_log_probs=True)")
        metrics = self._metrics(reference_table(rows), None)
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
            eval_dataset = each_set(eval_dataset, "eval", self._prepared)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test") -> Any:
        """Implicit rewards (`predictions`), labels and metrics of raw or prepared rows."""
        return super().predict(self._prepared(test_dataset, "test"), ignore_keys, metric_key_prefix)


def _ref_logps_known(train: Any, evaluation: Any) -> bool:
    sets = [train, *(evaluation.values() if isinstance(evaluation, dict) else [evaluation])]
    return all(REF_LOGPS in (rows.column_names or []) for rows in sets if rows is not None)
