"""What a run leaves behind while it goes: metrics.jsonl always, Weights & Biases where it is on, a progress bar."""

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback

from bco_lab.eval_samples import EvalSample
from bco_lab.files import json_ready, write_text
from bco_lab.matching import MatchingReport

logger = logging.getLogger(__name__)

WANDB_MODES = ("offline", "online", "disabled")
_NOT_METRICS = ("epoch", "step", "split")


@dataclass(frozen=True)
class WandbSettings:
    """How a run shows up in Weights & Biases; the API key comes from `wandb login` or WANDB_API_KEY, not from here."""

    mode: str = "offline"
    project: str = "bco-lab"
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    job_type: str | None = None
    tags: list[str] = field(default_factory=list)
    notes: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in WANDB_MODES:
            raise ValueError(f"mode={self.mode} must be one of {', '.join(WANDB_MODES)}")


def split_of(logs: dict[str, Any]) -> str:
    """`eval` for logs of an evaluation, `train` otherwise."""
    return "eval" if any(key.startswith("eval_") for key in logs) else "train"


def drop_steps_after(path: Path, step: int) -> None:
    """Forget metrics that a resumed run will write again."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:  # the line that was being written when the run was killed
            continue
    write_text(path, "".join(f"{line}\n" for line in kept))


class MetricsFile(TrainerCallback):
    """Appends every log to metrics.jsonl: one object with `step`, `split`, `epoch` and the metrics; NaN is null."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if (
            state.is_world_process_zero and logs and "train_runtime" not in logs
        ):  # the Trainer's farewell has no metrics
            row = {"step": state.global_step, "split": split_of(logs), **json_ready(logs)}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


class WandbRun:
    """A Weights & Biases run that cannot hurt: the first failure is logged, then tracking stops, training goes on."""

    def __init__(self, settings: WandbSettings, run_dir: Path, config: dict[str, Any], run_id: str | None) -> None:
        self._run: Any | None = None
        self.folder: str | None = None
        if settings.mode != "disabled":
            self._safely(lambda: self._start(settings, run_dir, config, run_id))

    def _start(self, settings: WandbSettings, run_dir: Path, config: dict[str, Any], run_id: str | None) -> None:
        import wandb

        if settings.mode == "online":
            logger.info("Connecting to Weights & Biases")
        self._run = wandb.init(
            dir=str(run_dir),
            mode=settings.mode,  # type: ignore[arg-type]
            project=settings.project,
            entity=settings.entity,
            name=settings.name,
            group=settings.group,
            job_type=settings.job_type,
            tags=settings.tags,
            notes=settings.notes,
            config=config,
            id=run_id,
            resume="allow" if settings.mode == "online" else None,
            settings=wandb.Settings(silent=True, console="off", init_timeout=20),
        )
        self.folder = str(Path(self._run.dir).parent)
        self._run.define_metric("*", step_metric="trainer/step")

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Log metrics at an optimizer step."""
        self._safely(lambda: self._run and self._run.log({**values, "trainer/step": step}))

    def log_table(self, name: str, columns: Iterable[str], rows: Iterable[list[Any]]) -> None:
        """Log a table."""

        def send() -> None:
            import wandb

            if self._run:
                self._run.log({name: wandb.Table(columns=list(columns), data=[list(row) for row in rows])})

        self._safely(send)

    def log_image(self, name: str, path: Path) -> None:
        """Log a picture."""

        def send() -> None:
            import wandb

            if self._run:
                self._run.log({name: wandb.Image(str(path))})

        self._safely(send)

    def log_matching(self, report: MatchingReport) -> None:
        """Log weights and probabilities as histograms, the other figures into the summary."""

        def send() -> None:
            import wandb

            if self._run is None:
                return
            found = report.to_dict()
            weights, p = found["weight_histogram"], found["p_histogram"]
            drawn = {
                "udm/weights": (weights["weight"], weights["edges"]),
                "udm/density_ratio": (weights["ratio"], weights["edges"]),
                "udm/p_desirable/desirable": (p["desirable"], p["edges"]),
                "udm/p_desirable/undesirable": (p["undesirable"], p["edges"]),
            }
            self._run.log({name: wandb.Histogram(np_histogram=pair) for name, pair in drawn.items()})
            self._run.summary.update(json_ready({f"udm/{name}": value for name, value in report.figures().items()}))

        self._safely(send)

    def finish(self, summary: dict[str, Any]) -> None:
        """Write final figures and close the run."""

        def send() -> None:
            if self._run:
                self._run.summary.update(json_ready(summary))
                self._run.finish()

        self._safely(send)

    def _safely(self, action: Callable[[], object]) -> None:
        try:
            action()
        # Whatever goes wrong in tracking (network, disk, a bug there) is not worth a training run.
        except Exception as error:
            self._run = None
            logger.warning("Weights & Biases failed, the run goes on without it: %s", error)


class WandbMetrics(TrainerCallback):
    """Sends every log to a W&B run, under the names of the Trainer's own W&B integration: train/..., eval/...."""

    def __init__(self, run: WandbRun) -> None:
        self.run = run

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            self.run.log(state.global_step, prefixed(logs))

    def on_eval_samples(self, samples: Sequence[EvalSample], name: str, state: Any) -> None:
        """Called by BCOTrainer where `generate_during_eval` is on."""
        rows = [asdict(sample) | {"step": state.global_step} for sample in samples]
        if rows:
            self.run.log_table(f"{name}/samples", list(rows[0]), [list(row.values()) for row in rows])


def prefixed(logs: dict[str, Any]) -> dict[str, Any]:
    """`eval_x` becomes `eval/x`, anything else `train/x`."""
    return {
        f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}": value
        for key, value in logs.items()
    }


class RunProgress(ProgressCallback):
    """One bar for training with the figures that matter at its end, one for each evaluation."""

    prediction_bar: Any
    training_bar: Any

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.training_bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="Training", dynamic_ncols=True
            )
        self.current_step = state.global_step

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and self.prediction_bar is None and eval_dataloader is not None:
            self.prediction_bar = tqdm(total=len(eval_dataloader), desc="Evaluating", leave=False, dynamic_ncols=True)
        super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            shown = {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "acc", "delta": "δ"}
            self.training_bar.set_postfix({name: f"{logs[key]:.3f}" for key, name in shown.items() if key in logs})
