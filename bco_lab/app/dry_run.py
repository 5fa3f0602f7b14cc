"""`dry_run=true`: what a run would do, without doing it."""

import math
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from datasets import Dataset
from omegaconf import DictConfig

from bco_lab.app import run_directory
from bco_lab.app.artifacts import reference_key
from bco_lab.app.checks import build
from bco_lab.app.pipeline import load_data, tokenized
from bco_lab.cache import Artifact, ArtifactCache, Use
from bco_lab.checkpoints import last_whole_checkpoint, step_of
from bco_lab.config import BCOConfig
from bco_lab.identity import policy_identity
from bco_lab.models import PolicySource


class _Missing(Exception):  # noqa: N818 (nothing went wrong: there is no more to see)
    """An artifact that would have to be computed."""


class _Peek(ArtifactCache):
    """A cache that is looked into, never written."""

    def _locked(self, path: Path) -> AbstractContextManager[Any]:
        raise _Missing(path.parent.name)

    def _note(self, use: Use) -> None:
        self.uses.append(use)


def describe(run_dir: Path, cfg: DictConfig) -> str:
    """One line: state, training steps, what is in the cache and what would be computed first.

    Raises:
        ValueError: Rows that break a rule.
    """
    if (run_dir / run_directory.CONFIG).is_file() and run_directory.finished_result(run_dir) is not None:
        return f"{run_dir.name}: finished already"
    args: BCOConfig = build(cfg, "trainer", output_dir=str(run_dir))
    cache = _Peek()
    rows, missing = _rows(cfg, args, cache)
    steps = training_steps(rows, args, int(cfg.launcher.get("num_processes") or 1))
    checkpoint = last_whole_checkpoint(run_dir / run_directory.CHECKPOINTS)
    start = f"goes on from step {step_of(checkpoint)} of {steps}" if checkpoint else f"{steps} training steps"
    found = ", ".join(dict.fromkeys(use.kind for use in cache.uses)) or "nothing"
    return f"{run_dir.name}: {start}; in the cache: {found}; " + (
        f"computed first: {missing} and what needs it" if missing else "nothing to compute first"
    )


def _rows(cfg: DictConfig, args: BCOConfig, cache: _Peek) -> tuple[int, str | None]:
    """Training rows, as far as can be told, and the first artifact that is not there."""
    source: PolicySource = build(cfg, "model")
    counted = 0
    try:
        data, _ = load_data(cfg, cache, quiet=True)
        counted = len(data.train)
        encoder_decoder = bool(getattr(source.load_config(), "is_encoder_decoder", False))
        rows = tokenized(data, source.load_tokenizer(), args, encoder_decoder, cache)
        counted = len(rows.train)
        if args.precompute_ref_log_probs:
            for name, split in (("train", rows.train), ("eval", rows.eval)):
                _look_for_reference(source, split, args, name, cache)
    except _Missing as missing:
        if not counted:  # matching would come first; the rows themselves are quick to read
            counted = len(load_data(cfg, cache, quiet=True, weigh=False)[0].train)
        return counted, str(missing)
    return counted, None


def _look_for_reference(source: PolicySource, rows: Dataset, args: BCOConfig, name: str, cache: _Peek) -> None:
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
    key = reference_key(policy_identity(source), rows, args, name, precision=precision)
    cache.get_or_compute(key, lambda: Artifact({}))


def training_steps(rows: int, args: BCOConfig, processes: int) -> int:
    """Optimizer steps of a training."""
    if args.max_steps > 0:
        return args.max_steps
    batches = math.ceil(rows / (args.train_batch_size * processes))
    return math.ceil(args.num_train_epochs * math.ceil(batches / args.gradient_accumulation_steps))
