"""BCOConfig: every setting of BCOTrainer, on top of transformers.TrainingArguments."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, get_args, get_type_hints

import torch
from transformers import TrainingArguments

from bco_lab.data.tokenization import TRUNCATIONS
from bco_lab.losses import LOSS_REDUCTIONS
from bco_lab.reward_shift import SHIFT_KINDS

_KINDS = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text", type(None): "null"}
# Fields of TrainingArguments whose values are checked here as well, before anything is loaded.
_COUNTED = (
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size"),
    *("gradient_accumulation_steps", "warmup_steps", "weight_decay", "max_grad_norm", "eval_steps", "save_steps"),
    *("save_total_limit", "seed", "data_seed", "ddp_find_unused_parameters"),
)

# What TRL 1.13.0's BCOTrainer did where BCOTrainer departs from it; lora_dropout=0 and equally full micro-batches are
# the caller's part (docs/migration-from-trl.md).
TRL_RECIPE = {"reward_shift": "trl", "loss_reduction": "pooled", "train_sampling_strategy": "sequential"}


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class BCOConfig(TrainingArguments):
    """Arguments of BCOTrainer.

    Holds all fields of `transformers.TrainingArguments`. Their defaults are kept except `logging_steps` (10),
    `gradient_checkpointing` (True), `bf16` (True where the device is good at it and `fp16` is not set), `learning_rate`
    (5e-7, the paper's for full fine-tuning) and `logging_nan_inf_filter` (False: a non-finite loss stops the run).

    Raises:
        ValueError: A field is out of its range; the message names field, value and rule.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    learning_rate: float = _option(5e-7, "Peak learning rate; LoRA needs one 100 to 1000 times the default.")
    logging_steps: float = _option(10, "Optimizer steps between two logs; below 1 a share of all steps.")
    logging_nan_inf_filter: bool = _option(False, "Kept for compatibility: BCOTrainer stops at a non-finite loss.")
    gradient_checkpointing: bool | None = _option(
        True, "Recompute activations in the backward pass: less memory, about a third more time."
    )
    bf16: bool | None = _option(
        None, "bfloat16 autocast; unset: on where the device is good at it and fp16 is not set."
    )

    max_length: int | None = _option(1024, "Hard cap on the tokens of prompt + completion, special tokens included.")
    max_completion_length: int | None = _option(None, "Cap on the completion's tokens alone.")
    truncation: str = _option(
        "keep_start",
        "Rows over max_length: keep_start cuts the completion's end, keep_end the prompt's start, drop leaves out.",
    )
    beta: float = _option(0.1, "Pull towards the reference; higher means less deviation.")
    reward_shift: str = _option(
        "ema",
        "Estimator of delta: ema (moving averages of both class means), trl (TRL's running mean), zero (none).",
    )
    reward_shift_decay: float = _option(0.9, "Share of the old moving average kept by each optimizer step (ema).")
    loss_reduction: str = _option(
        "class_balanced", "class_balanced: mean over desirable + mean over undesirable rows; pooled: one mean."
    )
    disable_dropout: bool = _option(True, "Switch off dropout in policy and reference; lora_dropout stays.")
    generate_during_eval: bool = _option(
        False, "At each evaluation sample completions of policy and reference and log them side by side."
    )
    is_encoder_decoder: bool | None = _option(
        None, "Whether model_init makes an encoder-decoder; unset: the model is asked."
    )
    precompute_ref_log_probs: bool = _option(
        False, "Compute reference log-probs before the first step and keep no reference model in memory."
    )
    model_init_kwargs: dict[str, Any] | str | None = _option(
        None, "Keyword arguments of from_pretrained where model or ref_model is a string."
    )
    trust_remote_code: bool = _option(False, "Run Python code that a model repository ships. Trust it first.")
    dataset_num_proc: int | None = _option(None, "Processes that tokenise the data.")
    prompt_sample_size: int = _option(
        1024, "Prompts per class, at most, that the density ratio's classifier is fitted on."
    )
    min_density_ratio: float = _option(0.5, "Lower clamp of the density ratio.")
    max_density_ratio: float = _option(10.0, "Upper clamp of the density ratio.")

    def __post_init__(self) -> None:
        self._check()
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and _good_at_bf16()
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False  # without a GPU it does nothing but warn
        names = {f.name for f in dataclasses.fields(self)}
        for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
            new = old.replace("gradient", "activation")
            # newer releases of transformers renamed both and warn about the old names, the documented ones here
            if new in names and getattr(self, new) is None:
                setattr(self, new, getattr(self, old))
                setattr(self, old, None)
        super().__post_init__()

    @classmethod
    def like_trl(cls, **settings: Any) -> "BCOConfig":
        """Settings under which losses, rewards and delta are those of TRL 1.13.0's BCOTrainer, step by step."""
        return cls(**{**TRL_RECIPE, **settings})

    def _check_types(self) -> None:
        own = BCOConfig.__annotations__
        hints = get_type_hints(type(self))
        for name in (*own, *_COUNTED):
            kinds = set(get_args(hints[name])) or {hints[name]}
            if kinds <= {int, float, bool, str, type(None)} and not _fits(getattr(self, name), kinds):
                wanted = " or ".join(sorted(_KINDS[kind] for kind in kinds))
                raise ValueError(f"{name}={getattr(self, name)} must be {wanted}")

    def _check(self) -> None:
        self._check_types()
        _require(self.beta > 0, "beta", self.beta, "must be > 0")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "must be >= 1")
        _require(self.max_steps == -1 or self.max_steps >= 1, "max_steps", self.max_steps, "must be >= 1, or -1")
        epochs = self.num_train_epochs
        _require(self.max_steps > 0 or epochs > 0, "num_train_epochs", epochs, "must be > 0")
        for name in ("learning_rate", "weight_decay", "warmup_steps"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "must be >= 0")
        _require(0 <= self.seed < 2**32, "seed", self.seed, "must be in [0, 2^32)")
        _require(self.max_length is None or self.max_length >= 2, "max_length", self.max_length, "must be >= 2 or null")
        for name, known in (
            ("reward_shift", SHIFT_KINDS),
            ("loss_reduction", LOSS_REDUCTIONS),
            ("truncation", TRUNCATIONS),
        ):
            _require(getattr(self, name) in known, name, getattr(self, name), f"must be one of {', '.join(known)}")
        _require(0 <= self.reward_shift_decay < 1, "reward_shift_decay", self.reward_shift_decay, "must be in [0, 1)")
        for name in ("max_completion_length", "dataset_num_proc"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "must be >= 1 or null")
        # fewer cannot be split into a part to fit on and a part to check with
        _require(self.prompt_sample_size >= 2, "prompt_sample_size", self.prompt_sample_size, "must be >= 2")
        _require(
            0 < self.min_density_ratio <= self.max_density_ratio,
            "min_density_ratio",
            self.min_density_ratio,
            f"must be in (0, max_density_ratio={self.max_density_ratio}]",
        )


def _fits(value: Any, kinds: set[type]) -> bool:
    """Whether a value is of one of the kinds; True is no number, and a number is finite."""
    if value is None or isinstance(value, bool | str):
        return type(value) in kinds
    if isinstance(value, int):
        return bool(kinds & {int, float})
    return isinstance(value, float) and math.isfinite(value) and float in kinds


def _require(holds: bool, name: str, value: Any, rule: str) -> None:
    if not holds:
        raise ValueError(f"{name}={value} {rule}")


def _good_at_bf16() -> bool:
    # On a CPU without bfloat16 units autocast is slower than float32; there it stays a choice of the user.
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return hasattr(torch, "xpu") and torch.xpu.is_available()
