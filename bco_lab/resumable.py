"""A Trainer whose runs can be killed at any moment and whose results load anywhere: checkpoints, saving, card."""

import logging
import math
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

from bco_lab import checkpoints
from bco_lab.config import BCOConfig
from bco_lab.distributed import enable_fsdp, forget_evaluation, reshard, saves_shards
from bco_lab.model_card import CARD, CardFacts, describe_data, final_metrics, training_settings, write_model_card
from bco_lab.reward_shift import RewardShift

logger = logging.getLogger(__name__)


class ResumableTrainer(Trainer):
    """What BCOTrainer does besides computing losses: the reward shift is part of a checkpoint, half a one is none.

    Attributes:
        reward_shift: State of the delta estimator, set by the subclass.
        is_encoder_decoder: Whether the model is one, set by the subclass.
        model_adapter_name: The adapter that trains, set by the subclass; None for "default", or without one.
    """

    args: BCOConfig
    model: Any
    train_dataset: Any
    reward_shift: RewardShift
    is_encoder_decoder: bool
    model_adapter_name: str | None

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator; a request for FSDP is granted on CPUs too."""
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = enable_fsdp(self.accelerator, getattr(self.args, "fsdp_plugin_args", None))

    def fresh_reward_shift(self) -> RewardShift:
        """The delta estimator as it is before the first step."""
        return RewardShift(kind=self.args.reward_shift, decay=self.args.reward_shift_decay)

    def steps_per_epoch(self, loader: Any) -> int:
        """Optimizer steps of an epoch on a training data loader."""
        return max(1, math.ceil(len(loader) / self.args.gradient_accumulation_steps))

    def _planned_steps(self) -> int:
        """Optimizer steps that `args` ask for in all."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        return math.ceil(self.args.num_train_epochs * self.steps_per_epoch(self.get_train_dataloader()))

    # ---- checkpoints ----

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train; `resume_from_checkpoint=True` continues from the newest whole checkpoint in `args.output_dir`."""
        if resume_from_checkpoint is True:
            found = checkpoints.last_whole_checkpoint(Path(self.args.output_dir))
            if found is None:
                raise FileNotFoundError(f"no whole checkpoint in {self.args.output_dir}")
            resume_from_checkpoint = str(found)
        reshard(self.model)
        forget_evaluation(self.accelerator, self.model)
        if self.model_init is not None:
            self.reward_shift = self.fresh_reward_shift()
        if resume_from_checkpoint:
            if not any(Path(resume_from_checkpoint).glob("*optim*")) and not self.is_deepspeed_enabled:
                logger.warning("%s has no optimizer state (save_only_model): it starts afresh", resume_from_checkpoint)
            self.reward_shift = RewardShift(**checkpoints.load_reward_shift(Path(resume_from_checkpoint)))
            saved = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))
            if saved.global_step >= self._planned_steps():
                return self._restore_finished(str(resume_from_checkpoint), saved)
        return super().train(resume_from_checkpoint or None, trial, ignore_keys_for_eval)

    def _restore_finished(self, checkpoint: str, saved: TrainerState) -> TrainOutput:
        """Take over a checkpoint of the last step; the Trainer's own loop would take one step too many from there."""
        self._load_from_checkpoint(checkpoint)
        self.state = saved
        return TrainOutput(saved.global_step, 0.0, {})

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save whole weights (or the adapter) that load on one process, also where checkpoints are sharded."""
        if not _internal_call and saves_shards(self.accelerator):
            self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))
        super().save_model(output_dir, _internal_call)
        if not _internal_call and self.is_world_process_zero():
            self._write_card(Path(output_dir or self.args.output_dir))

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | list[str] | None = None,
        tags: str | list[str] | None = None,
        *,
        language: str | None = None,
        license: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write README.md to `args.output_dir`: method, paper, data, hyperparameters, final metrics, versions.

        Args:
            model_name: Title of the card; None: the hub id or the folder's name.
            dataset_name: Hub id of the data.
            tags: Added to those of the method.
            language: Metadata of the hub.
            license: Metadata of the hub.
            finetuned_from: The model that was aligned; None: what the model says of itself.
            tasks: Metadata of the hub.
            dataset_tags: The Trainer's name for `dataset_name`.
            dataset: Another of its names.
            dataset_args: Further words about the data.
        """
        if not self.is_world_process_zero():
            return
        header = {"language": language, "license": license, "tags": tags}
        header["pipeline_tag"] = tasks if isinstance(tasks, str) else next(iter(tasks or ()), None)
        self._write_card(
            Path(self.args.output_dir),
            name=model_name,
            base_model=finetuned_from,
            data=describe_data(self.train_dataset, dataset_name or dataset_tags or dataset, dataset_args),
            header=header,
        )

    def _write_card(self, folder: Path, **facts: Any) -> None:
        policy = self.accelerator.unwrap_model(self.model)
        adapter = (self.model_adapter_name or "default") if hasattr(policy, "peft_config") else None
        known = {
            "name": self.hub_model_id or folder.resolve().name,
            "base_model": getattr(policy.config, "_name_or_path", None),
            "repository": self.hub_model_id,
            "adapter": adapter,
            "encoder_decoder": self.is_encoder_decoder,
            "data": describe_data(self.train_dataset),
            "settings": training_settings(
                self.args,
                self.state,
                processes=self.accelerator.num_processes,
                optimizer=self.optimizer,
                peft_config=policy.peft_config[adapter] if adapter else None,
            ),
            "metrics": final_metrics(self.state.log_history),
        }
        write_model_card(folder, CardFacts(**(known | {key: value for key, value in facts.items() if value})))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        had_card = (folder / CARD).exists()
        super()._save(output_dir, state_dict)
        # A pickle that nothing reads: the settings are in trainer_state.json and, from the command line, config.yaml.
        (folder / "training_args.bin").unlink(missing_ok=True)
        if not had_card:
            (folder / CARD).unlink(missing_ok=True)  # the empty form that PEFT leaves with every adapter

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
