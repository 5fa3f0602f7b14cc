"""One run from its folder's configuration to result.json; every process of a distributed run goes through here."""

import json
import logging
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from omegaconf import DictConfig, OmegaConf
from transformers import ProgressCallback
from transformers.utils import logging as transformers_logging

from bco_lab.app import run_directory
from bco_lab.app.artifacts import SharingTrainer, tokenized_rows
from bco_lab.app.checks import build
from bco_lab.app.judge import Judge, fit_judge
from bco_lab.app.samples import GenerationSettings, SampleComparison, compare_samples
from bco_lab.app.shared_model import forget, load_policy, release
from bco_lab.app.tracking import MetricsFile, RunProgress, WandbMetrics, WandbRun, drop_steps_after
from bco_lab.cache import ArtifactCache
from bco_lab.checkpoints import last_whole_checkpoint, step_of
from bco_lab.config import BCOConfig
from bco_lab.data.labels import check_both_classes
from bco_lab.data.rows import NothingToHoldOutError
from bco_lab.data.sources import FeedbackData, FeedbackSource
from bco_lab.data.tokenization import TokenizationReport
from bco_lab.distributed import every_process_computes
from bco_lab.files import read_json, write_json, write_text
from bco_lab.generation import generate_completions
from bco_lab.matching import MatchingReport
from bco_lab.models import Policy, PolicySource, auto_class_of
from bco_lab.reference import REF_LOGPS
from bco_lab.report.matching import plot_matching
from bco_lab.report.plots import plot_rewards
from bco_lab.trainer import BCOTrainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """Tokenised rows of a run and what tokenisation did to them."""

    train: Any
    eval: Any
    reports: dict[str, TokenizationReport]


def run(run_dir: Path) -> None:
    """Train what `run_dir/config.yaml` describes, or go on from its last whole checkpoint; ends with result.json."""
    started = time.monotonic()
    cfg = run_directory.read_config(run_dir)
    arguments: BCOConfig = build(cfg, "trainer", output_dir=str(run_dir / run_directory.CHECKPOINTS))
    state = PartialState()
    log_to(run_dir, main=state.is_main_process)
    try:
        _run(run_dir, cfg, arguments, started)
    except BaseException:
        forget()
        logger.debug("the run stopped", exc_info=True)  # the traceback is for run.log, the console gets one line
        raise


def _run(run_dir: Path, cfg: DictConfig, arguments: BCOConfig, started: float) -> None:
    source: PolicySource = build(cfg, "model")
    cache = ArtifactCache()
    data, matching = load_data(cfg, cache)
    note_data(run_dir, data)
    if matching is not None:
        note_matching(run_dir, matching)
    with PartialState().local_main_process_first():  # one process converts a model, the others read it
        tokenizer = source.load_tokenizer()
        encoder_decoder = bool(getattr(source.load_config(), "is_encoder_decoder", False))
    rows = tokenized(data, tokenizer, arguments, encoder_decoder, cache)
    policy = load_policy(source, arguments)
    if source.name_or_path is None:
        keep_base(run_dir, policy)
    with Tracked(run_dir, cfg) as tracked:
        trainer = make_trainer(cfg, source, policy, rows, arguments, tracked, cache)
        resumed_from = last_whole_checkpoint(run_dir / run_directory.CHECKPOINTS)
        comparison = Comparison(run_dir, cfg, trainer, data)
        before = comparison.before()
        check_objective(cfg, before["metrics"])
        if resumed_from is not None:
            logger.info("Resuming from %s", resumed_from.name)
        if tracked.main:
            drop_steps_after(run_dir / run_directory.METRICS, step_of(resumed_from) if resumed_from else 0)
        trainer.train(resume_from_checkpoint=str(resumed_from) if resumed_from else None)
        after = comparison.after()
        trainer.save_model(str(run_dir / run_directory.MODEL))
        if tracked.main:
            result = collect(run_dir, cfg, trainer, before, after, comparison.samples(before, after))
            result["tokenization"] = {name: vars(report) for name, report in rows.reports.items()}
            result["udm"] = matching.figures() if matching is not None else None
            result["artifacts"] = [use.to_dict() for use in cache.uses]
            finish(run_dir, tracked.wandb, result, matching, started)
        trainer.accelerator.wait_for_everyone()
    release(trainer.accelerator.unwrap_model(trainer.model))


def keep_base(run_dir: Path, policy: Policy) -> None:
    """Save random weights: an adapter in `model/` is of no use without what it was trained on."""
    base = run_dir / run_directory.BASE
    if PartialState().is_main_process:
        policy.model.save_pretrained(base)
    policy.model.config.name_or_path = policy.model.name_or_path = str(base)


def log_to(run_dir: Path, *, main: bool) -> None:
    """Messages to the console and, with time stamps and tracebacks, to run.log; only the main process speaks."""
    root = logging.getLogger("bco_lab")
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    root.setLevel(logging.DEBUG)
    root.propagate = False
    logging.captureWarnings(True)
    file = logging.FileHandler(run_dir / run_directory.LOG, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    file.setLevel(logging.DEBUG if main else logging.WARNING)
    root.addHandler(file)
    for name in ("py.warnings", "transformers"):
        logging.getLogger(name).addHandler(file)
    if main:
        console = logging.StreamHandler(sys.stderr)
        console.setFormatter(logging.Formatter("%(message)s"))
        console.setLevel(logging.INFO)
        root.addHandler(console)
    transformers_logging.set_verbosity_warning()


def load_data(
    cfg: DictConfig, cache: ArtifactCache, *, quiet: bool = False, weigh: bool = True
) -> tuple[FeedbackData, MatchingReport | None]:
    """Rows of the dataset group, weighed by the udm group; and what that found.

    Args:
        cfg: Of the run.
        cache: Where embeddings and probabilities are kept.
        quiet: Log nothing.
        weigh: False leaves the weights out.

    Raises:
        ValueError: A row that breaks a rule, or one class only.
    """
    level = logging.DEBUG if quiet else logging.INFO
    read = read_data(cfg, level)
    check_both_classes(read.train["label"], f"dataset {read.name}, train")
    held_out = len(read.eval) if read.eval is not None else 0
    rows = (read.name, len(read.train), held_out, read.split_by)
    logger.log(level, "%s: %d rows to train on, %d held out (split by %s)", *rows)
    if not weigh:
        return read, None
    matching = build(cfg, "udm")
    try:
        data, report = matching.weigh(read, cache)
    except (OSError, ImportError) as error:
        raise type(error)(f"udm: {error}") from error
    except ValueError as error:
        raise ValueError(f"udm: {error}") from error
    for line in report.notes() if report is not None else ():
        logger.log(level, "%s", line)
    return data, report


def read_data(cfg: DictConfig, level: int = logging.INFO, *, few_rows: bool = False) -> FeedbackData:
    """Rows of the dataset group.

    Args:
        cfg: Of the run.
        level: Of the messages.
        few_rows: Whether rows that are too few to hold some out will do.

    Raises:
        ValueError: A row that breaks a rule; the message begins with the group's name.
    """
    found = build(cfg, "dataset")
    if not isinstance(found, FeedbackSource):
        return found
    try:
        try:
            data = found.load()
        except NothingToHoldOutError as error:
            if not few_rows:
                raise
            logger.warning("A run would stop here: %s", error)
            data = replace(found, eval_fraction=0.0).load()
    except OSError as error:
        raise type(error)(f"dataset: {error}") from error
    except ValueError as error:
        raise ValueError(f"dataset: {error}") from error
    assert data.report is not None
    for line in data.report.notes():
        logger.log(level, "%s: %s", data.name, line)
    return data


def note_data(run_dir: Path, data: FeedbackData) -> None:
    """Write what the run trains on into environment.json."""
    if PartialState().is_main_process:
        environment = run_directory.read_environment(run_dir)
        fingerprint = run_directory.data_fingerprint({"train": data.train, "eval": data.eval})
        known = environment.get("data", {}).get("fingerprint", fingerprint)
        if known != fingerprint and (run_dir / run_directory.BEFORE).exists():
            raise ValueError(
                f"the rows of dataset {data.name} have changed since this run began (fingerprint {known}, now "
                f"{fingerprint}): bring the old rows back, or start another run"
            )
        environment["data"] = {
            "name": data.name,
            "split_by": data.split_by,
            "train_rows": len(data.train),
            "eval_rows": len(data.eval) if data.eval is not None else 0,
            "fingerprint": fingerprint,
            "report": data.report.to_dict() if data.report is not None else None,
        }
        if data.rejected:
            write_text(run_dir / run_directory.REJECTED, "".join(f"{json.dumps(row)}\n" for row in data.rejected))
        write_json(run_dir / run_directory.ENVIRONMENT, environment)


def note_matching(run_dir: Path, report: MatchingReport) -> None:
    """Write udm.json and its picture."""
    if PartialState().is_main_process:
        content = report.to_dict()
        write_json(run_dir / run_directory.UDM, content)
        plot_matching(content, run_dir / run_directory.PLOTS / "udm.png")


def tokenized(
    data: FeedbackData, tokenizer: Any, arguments: BCOConfig, encoder_decoder: bool, cache: ArtifactCache
) -> Rows:
    """Tokenise both splits, so that a row that does not fit is found before a model is loaded."""
    rows: dict[str, Any] = {"train": None, "eval": None}
    reports: dict[str, TokenizationReport] = {}
    for name, split in (("train", data.train), ("eval", data.eval)):
        if split is not None and len(split):
            rows[name], report = tokenized_rows(
                split, tokenizer, arguments, name, encoder_decoder=encoder_decoder, cache=cache
            )
            reports[name] = report
            if report.truncated or report.dropped:
                logger.info(
                    "%s: of %d rows %d truncated, %d dropped at max_length=%s (longest %d tokens)",
                    *(name, report.rows, report.truncated, report.dropped, arguments.max_length, report.longest),
                )
    if rows["eval"] is not None:
        rows["eval"] = by_length(rows["eval"])
    return Rows(rows["train"], rows["eval"], reports)


def by_length(rows: Dataset) -> Dataset:
    """Rows of like length side by side: batches of an evaluation, whose order does not matter, need little padding."""
    lengths = [len(ids) for ids in rows["input_ids"]]
    return rows.select(sorted(range(len(rows)), key=lambda i: -lengths[i]))


class Tracked:
    """The callbacks of a run; open, it also holds the W&B run of the main process."""

    def __init__(self, run_dir: Path, cfg: DictConfig) -> None:
        self.main = PartialState().is_main_process
        self.wandb: WandbRun | None = None
        self.callbacks: list[Any] = []
        if self.main:
            environment = run_directory.read_environment(run_dir)
            config = OmegaConf.to_container(cfg, resolve=True)
            assert isinstance(config, dict)
            named = {str(key): value for key, value in config.items()}
            self.wandb = WandbRun(build(cfg, "wandb"), run_dir, named, environment.get("wandb_run_id"))
            self.callbacks = [MetricsFile(run_dir / run_directory.METRICS), WandbMetrics(self.wandb)]

    def __enter__(self) -> "Tracked":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self.wandb is not None:
            self.wandb.finish({"status": "failed"})


def make_trainer(
    cfg: DictConfig,
    source: PolicySource,
    policy: Policy,
    rows: Rows,
    arguments: BCOConfig,
    tracked: Tracked,
    cache: ArtifactCache,
) -> BCOTrainer:
    """Assemble the trainer from the components."""
    optimizer = build(cfg, "optimizer")
    trainer = SharingTrainer(
        source=source,
        cache=cache,
        model=policy.model,
        args=arguments,
        train_dataset=rows.train,
        eval_dataset=rows.eval,
        processing_class=policy.tokenizer,
        peft_config=policy.peft_config,
        callbacks=tracked.callbacks,
        optimizer_cls_and_kwargs=(optimizer.func, optimizer.keywords),
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(RunProgress)
    return trainer


class Comparison:
    """Held-out metrics and samples, before and after training."""

    def __init__(self, run_dir: Path, cfg: DictConfig, trainer: BCOTrainer, data: FeedbackData) -> None:
        self._file = run_dir / run_directory.BEFORE
        self._trainer = trainer
        self._data = data
        self._settings: GenerationSettings = build(cfg, "generation")
        self._main = trainer.accelerator.is_main_process

    def before(self) -> dict[str, Any]:
        """The untrained policy; a resumed run reads what its first start wrote."""
        if self._file.is_file():
            content: dict[str, Any] = read_json(self._file)
            self._trainer.accelerator.wait_for_everyone()
            return content
        metrics = self._untrained_metrics() if self._trainer.eval_dataset is not None else {}
        content = {"metrics": metrics, "completions": self._sample("before training")}
        if self._main:
            write_json(self._file, content)
        self._trainer.accelerator.wait_for_everyone()
        return content

    def _untrained_metrics(self) -> dict[str, Any]:
        if REF_LOGPS not in self._trainer.eval_dataset.column_names:
            return self._trainer.evaluate()
        # An untrained policy is the reference: its figures need no forward pass.
        metrics = self._trainer.reference_metrics()
        self._trainer.log(dict(metrics))
        return metrics

    def after(self) -> dict[str, Any]:
        """The trained policy."""
        metrics = self._trainer.evaluate() if self._trainer.eval_dataset is not None else {}
        return {"metrics": metrics, "completions": self._sample("after training")}

    def samples(self, before: dict[str, Any], after: dict[str, Any]) -> SampleComparison | None:
        """Completions side by side, judged where the data bring rows to train a judge on."""
        if not self._settings.count:
            return None
        return compare_samples(self._prompts(), before["completions"], after["completions"], self._judge())

    def _sample(self, when: str) -> list[str]:
        accelerator = self._trainer.accelerator
        completions: list[str] = []
        # Where weights are sharded, all processes draw the same samples.
        if self._settings.count and (self._main or every_process_computes(accelerator)):
            completions = generate_completions(
                accelerator.unwrap_model(self._trainer.model),
                self._trainer.processing_class,
                self._prompts(),
                description=f"Sampling {when}",
                progress=self._main,
                **self._settings.sampling(),
            )
        accelerator.wait_for_everyone()
        return completions

    def _prompts(self) -> list[Any]:
        rows = self._data.eval if self._data.eval is not None and len(self._data.eval) else self._data.train
        return [rows[index % len(rows)]["prompt"] for index in range(self._settings.count)]

    def _judge(self) -> Judge | None:
        rows = self._data.judge
        return None if rows is None else fit_judge(rows["text"], rows["label"], seed=self._settings.seed)


def check_objective(cfg: DictConfig, metrics: dict[str, Any]) -> None:
    """The objective must be one of the held-out metrics, if there are held-out rows.

    Raises:
        ValueError: It is not; the message lists those there are.
    """
    if metrics and cfg.objective not in metrics:
        raise ValueError(f"objective={cfg.objective} is not among the held-out metrics: {', '.join(metrics)}")


def collect(
    run_dir: Path,
    cfg: DictConfig,
    trainer: BCOTrainer,
    before: dict[str, Any],
    after: dict[str, Any],
    samples: SampleComparison | None,
) -> dict[str, Any]:
    """Everything that result.json says, but for the times."""
    objective = after["metrics"].get(cfg.objective)
    last = [row for row in trainer.state.log_history if "loss" in row]
    return {
        "status": "finished",
        "objective": objective,
        "objective_name": cfg.objective,
        "config_hash": run_directory.config_hash(cfg),
        "steps": trainer.state.global_step,
        "delta": trainer.reward_shift.delta,
        "eval_rows": len(trainer.eval_dataset) if trainer.eval_dataset is not None else 0,
        "metrics": {
            "before": _without_prefix(before["metrics"]),
            "after": _without_prefix(after["metrics"]),
            "train": last[-1] if last else {},
        },
        "samples": samples.to_dict() if samples is not None else None,
        "model_class": auto_class_of(trainer.model.config).__name__,
        "wandb_mode": cfg.wandb.mode,
        "paths": {
            "run_dir": str(run_dir),
            "model": str(run_dir / run_directory.MODEL),
            "metrics": str(run_dir / run_directory.METRICS),
        },
    }


def finish(
    run_dir: Path,
    wandb: WandbRun | None,
    result: dict[str, Any],
    matching: MatchingReport | None,
    started: float,
) -> None:
    """Draw the picture, close W&B and write result.json, last of all."""
    pictures = {"rewards": plot_rewards(run_dir / run_directory.METRICS, run_dir / run_directory.PLOTS / "rewards.png")}
    if matching is not None:
        pictures["udm"] = run_dir / run_directory.PLOTS / "udm.png"
    paths = [str(picture) for picture in pictures.values()]
    result["paths"] |= {"plots": paths, "wandb": wandb.folder if wandb else None}
    if wandb is not None:
        for name, picture in pictures.items():
            wandb.log_image(name, picture)
        if matching is not None:
            wandb.log_matching(matching)
        if result["samples"]:
            pairs = result["samples"]["pairs"]
            wandb.log_table("samples", list(pairs[0]), [list(pair.values()) for pair in pairs])
        wandb.finish({"objective": result["objective"], "status": "finished", **_flat(result["metrics"]["after"])})
    result["wall_seconds"] = round(time.monotonic() - started, 1)
    write_json(run_dir / run_directory.RESULT, result)


def _without_prefix(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("eval_"): value for name, value in metrics.items()}


def _flat(metrics: dict[str, Any]) -> dict[str, Any]:
    return {f"final/{name}": value for name, value in metrics.items()}
