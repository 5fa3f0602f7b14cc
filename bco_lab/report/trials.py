"""The trials of a sweep, read from their files: which settings were tried, what came out, which to keep."""

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bco_lab.files import read_json, write_json, write_text

METRICS = ("rewards/auc", "rewards/accuracies", "rewards/margins", "kl", "bound_gap", "delta")
REPORT_JSON, REPORT_CSV = "report.json", "report.csv"
_SEED = "seed"
_NORMAL_97_5 = 1.959963984540054


@dataclass(frozen=True)
class Trial:
    """One trial.

    Attributes:
        name: Of its folder.
        status: pending, running, finished, failed or interrupted.
        settings: Keys that differ between trials, and this one's values, as they were typed.
        metrics: Held-out metrics after training; empty where there are none.
        objective: The figure that trials are compared by; None where there is none.
        same_as: The trial whose result it shares, because both train the same.
        error: Why it failed.
        seconds: It took.
        steps: Optimizer steps.
    """

    name: str
    status: str
    settings: dict[str, str]
    metrics: dict[str, float] = field(default_factory=dict)
    objective: float | None = None
    same_as: str | None = None
    error: str | None = None
    seconds: float | None = None
    steps: int | None = None


@dataclass(frozen=True)
class Line:
    """Trials that differ in their seed alone.

    Attributes:
        settings: Without the seed.
        trials: Names of the finished ones, shared results left out.
        shared: Names of those that share a result of these.
        mean: Of each metric.
        error: Standard error of each mean; None with one seed.
        low: Lower end of the objective's 95% interval; None where it cannot be told.
        high: Upper end.
        objective: Mean.
    """

    settings: dict[str, str]
    trials: list[str]
    shared: list[str]
    mean: dict[str, float]
    error: dict[str, float | None]
    objective: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Advice:
    """Which settings to keep.

    Attributes:
        trial: A trial with these settings.
        settings: Of the line.
        rule: By which it was chosen.
        reason: What the rule found.
    """

    trial: str
    settings: dict[str, str]
    rule: str
    reason: str


@dataclass(frozen=True)
class SweepReport:
    """Everything that the files of a sweep say.

    Attributes:
        name: Of the folder.
        objective: Name of the objective.
        swept: Keys that differ between trials.
        trials: All of them.
        lines: Settings with a finished trial, best objective first.
        advice: Which to keep; None where nothing finished.
        notes: Files that could not be read.
    """

    name: str
    objective: str
    swept: list[str]
    trials: list[Trial]
    lines: list[Line]
    advice: Advice | None
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Everything by name, for JSON."""
        return asdict(self)


def read_report(folder: Path, *, max_kl: float | None = None) -> SweepReport:
    """Read a sweep, or a single run, and judge it.

    Args:
        folder: Of the sweep; it may still be running, or come from another machine.
        max_kl: Largest KL estimate (nats per completion) that settings to keep may have; None: any.

    Raises:
        FileNotFoundError: The folder holds neither a sweep nor a run.
        ValueError: `sweep.json` is damaged.
    """
    listed = read_json(folder / "sweep.json") if (folder / "sweep.json").is_file() else {}
    known: dict[str, Any] = dict(listed.get("trials", {}))
    found = {path.parent.name for path in folder.glob("*/config.yaml")}
    alone = (folder / "config.yaml").is_file()
    if not known and not found and not alone:
        raise FileNotFoundError(f"{folder} holds neither a sweep nor a run")
    notes: list[str] = []
    names = [*known, *sorted(found - set(known))] or [folder.name]
    overrides = {name: _overrides(folder if alone else folder / name, known.get(name, {}), notes) for name in names}
    swept = _differing(list(overrides.values()))
    trials = [
        _trial(name, folder if alone else folder / name, known.get(name, {}), overrides[name], swept, notes)
        for name in names
    ]
    objective = str(listed.get("objective") or _objective_name(folder, names, alone))
    lines = _lines(trials, objective)
    return SweepReport(
        name=folder.resolve().name,
        objective=objective,
        swept=swept,
        trials=trials,
        lines=lines,
        advice=advise(lines, objective, max_kl),
        notes=notes,
    )


def write_report(report: SweepReport, folder: Path) -> list[Path]:
    """Write report.json and report.csv, one line for each trial, into the sweep's folder."""
    write_json(folder / REPORT_JSON, report.to_dict())
    text = io.StringIO()
    columns = ["trial", "status", *report.swept, "objective", *METRICS, "steps", "seconds", "same_as", "error"]
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    for trial in report.trials:
        row = asdict(trial)
        cells = {name: row[name] for name in ("status", "objective", "steps", "seconds", "same_as", "error")}
        table.writerow({"trial": trial.name, **trial.settings, **cells, **{m: trial.metrics.get(m) for m in METRICS}})
    write_text(folder / REPORT_CSV, text.getvalue())
    return [folder / REPORT_JSON, folder / REPORT_CSV]


def advise(lines: Sequence[Line], objective: str, max_kl: float | None) -> Advice | None:
    """The settings to keep: the nearest to the reference among those that cannot be told from the best.

    Args:
        lines: Best objective first.
        objective: Its name.
        max_kl: See `read_report`.
    """
    within = [line for line in lines if max_kl is None or line.mean.get("kl", 0.0) <= max_kl]
    if not within:
        return None
    best = within[0]
    rivals = [line for line in within if _overlap(line, best)]
    # an estimate below 0 is chance: nothing is nearer than the reference itself
    kept = min(rivals, key=lambda line: max(0.0, line.mean.get("kl", 0.0)))
    limit = "" if max_kl is None else f" within a KL of {max_kl:g}"
    rule = (
        f"the best {objective}{limit}; of the settings whose 95% intervals reach its own, the one nearest to the "
        "reference (smallest KL estimate)"
    )
    if kept is best:
        reason = f"{objective} {best.objective:.3f}{_interval(best)} is the best, and no other as good is nearer"
    else:
        reason = (
            f"{objective} {kept.objective:.3f}{_interval(kept)} cannot be told from the best, "
            f"{best.objective:.3f}{_interval(best)}, and it is nearer to the reference: KL {kept.mean['kl']:.2f} "
            f"against {best.mean['kl']:.2f}"
        )
    return Advice(trial=kept.trials[0], settings=kept.settings, rule=rule, reason=reason)


def lower_is_better(objective: str) -> bool:
    """Whether a small value of this metric is a good one."""
    return objective.rsplit("/", 1)[-1].removeprefix("eval_") in ("loss", "kl", "kl_per_token", "bound_gap")


# ---- reading ----


def _overrides(folder: Path, known: Mapping[str, Any], notes: list[str]) -> dict[str, str]:
    typed = known.get("overrides")
    path = folder / "overrides.yaml"
    if typed is None and path.is_file():
        try:
            typed = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            notes.append(f"{path} cannot be read: {error}")
    pairs = (str(each).partition("=") for each in typed or ())
    return {key.lstrip("+"): value for key, _, value in pairs}


def _differing(overrides: Sequence[Mapping[str, str]]) -> list[str]:
    keys = dict.fromkeys(key for each in overrides for key in each)
    return [key for key in keys if len({each.get(key) for each in overrides}) > 1]


def _trial(
    name: str,
    folder: Path,
    known: Mapping[str, Any],
    overrides: Mapping[str, str],
    swept: Sequence[str],
    notes: list[str],
) -> Trial:
    result: dict[str, Any] = {}
    try:
        result = read_json(folder / "result.json") if (folder / "result.json").is_file() else {}
    except ValueError as error:
        notes.append(str(error))
    after = (result.get("metrics") or {}).get("after") or {}
    metrics = {key: float(value) for key, value in after.items() if isinstance(value, int | float)}
    finished = result.get("status") == "finished"
    objective = result.get("objective")
    return Trial(
        name=name,
        status="finished" if finished else str(known.get("status", "unknown")),
        settings={key: overrides[key] for key in swept if key in overrides},
        metrics=metrics,
        objective=float(objective) if isinstance(objective, int | float) else None,
        same_as=result.get("same_as"),
        error=known.get("error"),
        seconds=result.get("wall_seconds"),
        steps=result.get("steps"),
    )


def _objective_name(folder: Path, names: Sequence[str], alone: bool) -> str:
    for name in names:
        path = (folder if alone else folder / name) / "result.json"
        if path.is_file():
            return str(read_json(path).get("objective_name", "objective"))
    return "objective"


# ---- lines ----


def _lines(trials: Sequence[Trial], objective: str) -> list[Line]:
    groups: dict[tuple[tuple[str, str], ...], list[Trial]] = {}
    settings_of = {trial.name: tuple((k, v) for k, v in trial.settings.items() if k != _SEED) for trial in trials}
    finished = [trial for trial in trials if trial.status == "finished" and trial.objective is not None]
    for trial in finished:
        # a shared result stands with the trial that it was taken from
        groups.setdefault(settings_of.get(trial.same_as or trial.name, settings_of[trial.name]), []).append(trial)
    lines = [_line(dict(settings), members, objective) for settings, members in groups.items()]
    return sorted(lines, key=lambda line: line.objective if lower_is_better(objective) else -line.objective)


def _line(settings: dict[str, str], members: Sequence[Trial], objective: str) -> Line:
    own = [trial for trial in members if trial.same_as is None] or list(members)
    values = [trial.objective for trial in own if trial.objective is not None]
    names = [name for name in METRICS if all(name in trial.metrics for trial in own)]
    columns = {name: [trial.metrics[name] for trial in own] for name in names}
    error = _standard_error(values)
    if error is None:
        error = _sampling_error(own[0], objective)
    mean = statistics.fmean(values)
    half = None if error is None else _NORMAL_97_5 * error
    return Line(
        settings=settings,
        trials=[trial.name for trial in own],
        shared=[trial.name for trial in members if trial not in own],
        mean={name: statistics.fmean(column) for name, column in columns.items()},
        error={name: _standard_error(column) for name, column in columns.items()},
        objective=mean,
        low=None if half is None else mean - half,
        high=None if half is None else mean + half,
    )


def _standard_error(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _sampling_error(trial: Trial, objective: str) -> float | None:
    """What held-out rows alone leave open, with one seed: Hanley and McNeil (1982) for an AUC, binomial for a share."""
    up, down = (trial.metrics.get(f"count/{side}", 0.0) for side in ("chosen", "rejected"))
    value = trial.objective
    if value is None or not up or not down:
        return None
    if objective.endswith("auc"):
        first, second = value / (2 - value), 2 * value**2 / (1 + value)
        spread = value * (1 - value) + (up - 1) * (first - value**2) + (down - 1) * (second - value**2)
        return math.sqrt(max(spread, 0.0) / (up * down))
    if objective.endswith("accuracies"):
        return math.sqrt(value * (1 - value) / (up + down))
    return None


def _overlap(line: Line, best: Line) -> bool:
    if line.low is None or line.high is None or best.low is None or best.high is None:
        return line is best
    return line.high >= best.low and line.low <= best.high


def _interval(line: Line) -> str:
    return "" if line.low is None else f" ({line.low:.3f} to {line.high:.3f})"
