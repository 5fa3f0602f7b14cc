"""A sweep: the list of its trials in sweep.json, and what keeps two trials apart."""

import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from bco_lab.app.run_directory import trial_name
from bco_lab.files import read_json, write_json

SWEEP = "sweep.json"
PENDING, RUNNING, FINISHED, FAILED, INTERRUPTED = "pending", "running", "finished", "failed", "interrupted"
_EXCLUDED = "hydra.job.config.override_dirname.exclude_keys"
_BASIC_SWEEPER = "BasicSweeper"


class SweepLog:
    """What is known of a sweep's trials: `sweep.json`, changed by one process at a time.

    Args:
        folder: Of the sweep.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / SWEEP

    def read(self) -> dict[str, Any]:
        """The content; empty if there is none.

        Raises:
            ValueError: The file is damaged.
        """
        if not self.path.is_file():
            return {}
        content = read_json(self.path)
        if not isinstance(content, dict) or not isinstance(content.get("trials"), dict):
            raise ValueError(f"{self.path} is damaged: it lists no trials")
        return content

    def begin(
        self, overrides: Sequence[str], typed: Sequence[str], trials: dict[str, list[str]], objective: str
    ) -> None:
        """Note the command and the trials to come; those that are known keep what is known of them.

        Args:
            overrides: Of the trials, swept ones with all their values.
            typed: Those and Hydra's own, as they were typed.
            trials: Name to overrides, of those known beforehand.
            objective: What trials are compared by.
        """

        def change(content: dict[str, Any]) -> None:
            swept = set(content.get("swept", ())) | set(swept_keys(overrides))
            content |= {"version": 1, "overrides": list(overrides), "objective": objective}
            content |= {"typed": [each for each in typed if not each.startswith(_EXCLUDED)], "cwd": str(Path.cwd())}
            content["swept"] = sorted(swept)
            content.setdefault("created", datetime.now(UTC).isoformat(timespec="seconds"))
            for name, own in trials.items():
                content["trials"].setdefault(name, _trial(own))

        self._change(change)

    def note(self, name: str, overrides: Sequence[str], **facts: Any) -> None:
        """Note something of a trial."""
        self._change(lambda content: content["trials"].setdefault(name, _trial(overrides)).update(facts))

    @contextmanager
    def running(self, name: str, overrides: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Note how a trial goes; what is put into the dict is noted at its end."""
        started = time.monotonic()
        facts: dict[str, Any] = {}
        self.note(name, overrides, status=RUNNING, error=None, pid=os.getpid())
        try:
            yield facts
        except (KeyboardInterrupt, SystemExit):
            self.note(name, overrides, status=INTERRUPTED, seconds=_since(started))
            raise
        except BaseException as error:
            text = " ".join(str(error).split()) or type(error).__name__
            self.note(name, overrides, status=FAILED, error=text, seconds=_since(started))
            raise
        self.note(name, overrides, status=FINISHED, **{"seconds": _since(started), **facts})

    def failures(self) -> dict[str, str]:
        """Name to error of the trials that failed."""
        trials = self.read().get("trials", {})
        return {name: trial["error"] for name, trial in trials.items() if trial["status"] == FAILED}

    def _change(self, change: Callable[[dict[str, Any]], None]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".sweep.lock"):
            content = self.read() or {"trials": {}}
            change(content)
            write_json(self.path, content)


def _trial(overrides: Sequence[str]) -> dict[str, Any]:
    return {
        "status": PENDING,
        "overrides": list(overrides),
        "error": None,
        "same_as": None,
        "seconds": None,
        "objective": None,
    }


def _since(started: float) -> float:
    return round(time.monotonic() - started, 1)


_ended: list[Path] = []  # sweeps that this process has run


def last_sweep() -> Path | None:
    """The folder of the sweep that ended last in this process; None if there was none."""
    return _ended[-1] if _ended else None


def failures_of_last_sweep() -> dict[str, str]:
    """Name to error of the trials that failed in the sweep that ended last in this process."""
    return SweepLog(_ended[-1]).failures() if _ended else {}


def command_of(folder: Path) -> list[str] | None:
    """The command line that goes on with a sweep; None for a folder that is none.

    Raises:
        FileNotFoundError: The sweep was started in a folder that is gone, which its paths refer to.
    """
    content = SweepLog(folder).read()
    if not content:
        return None
    if not Path(content["cwd"]).is_dir():
        raise FileNotFoundError(f"{folder}: its sweep was started in {content['cwd']}, which is not there any more")
    os.chdir(content["cwd"])
    return [
        "-m",
        *(each for each in content["typed"] if not each.startswith("hydra.sweep.dir=")),
        f"hydra.sweep.dir={folder}",
    ]


class SweepCallback(Callback):
    """Lists the trials before the first one starts, and tidies up after a dry run."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra before the sweeper."""
        if config.get("dry_run"):
            return
        overrides = [str(each) for each in config.hydra.overrides.task]
        typed = [*overrides, *(str(each) for each in config.hydra.overrides.hydra)]
        excluded = list(config.hydra.job.config.override_dirname.exclude_keys)
        known = str(config.hydra.sweeper.get("_target_", "")).endswith(_BASIC_SWEEPER)
        trials = expected_trials(overrides, excluded) if known else {}
        SweepLog(Path(config.hydra.sweep.dir)).begin(overrides, typed, trials, str(config.objective))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Called by Hydra after the last trial."""
        folder = Path(config.hydra.sweep.dir)
        if not config.get("dry_run"):
            _ended.append(folder)
        else:
            _remove_what_hydra_made(folder)


def _remove_what_hydra_made(folder: Path) -> None:
    """Empty folders of trials that a dry run did not start, and the sweep's if nothing else is in it."""
    for path in folder.glob("*/"):
        if not any(path.iterdir()):
            path.rmdir()
    if folder.is_dir() and {path.name for path in folder.iterdir()} <= {"multirun.yaml"}:
        (folder / "multirun.yaml").unlink(missing_ok=True)
        folder.rmdir()


# ---- names ----


def swept_keys(overrides: Sequence[str]) -> list[str]:
    """Keys that have more than one value."""
    return [str(each.key_or_group) for each in _parsed(overrides) if each.is_sweep_override()]


def with_names(arguments: Sequence[str]) -> list[str]:
    """A multirun's command line, with what names its trials: the swept keys, those of an earlier call included.

    Keys that have the same value in all trials would make the names long and hide what differs.
    """
    overrides = _overrides_in(arguments)
    try:
        parsed = _parsed(overrides)
    except HydraException:  # Hydra itself says what is wrong
        return list(arguments)
    given = {str(each.key_or_group): each.get_value_element_as_str() for each in parsed if not each.is_sweep_override()}
    earlier = SweepLog(Path(given["hydra.sweep.dir"])).read().get("swept", []) if "hydra.sweep.dir" in given else []
    fixed = [key for key in given if not key.startswith("hydra.") and key not in earlier]
    if _EXCLUDED in given or not fixed:
        return list(arguments)
    last = max(place for place, each in enumerate(arguments) if each in overrides)  # beside the others, not after -m
    return [*arguments[: last + 1], f"{_EXCLUDED}=[{','.join(fixed)}]", *arguments[last + 1 :]]


def expected_trials(overrides: Sequence[str], excluded: Sequence[str]) -> dict[str, list[str]]:
    """Name to overrides of every combination, in the order in which Hydra's own sweeper runs them."""
    choices: dict[str, list[Override]] = {}
    for each in _parsed(overrides):
        key = each.get_key_element()
        values = list(each.sweep_string_iterator()) if each.is_sweep_override() else [each.get_value_element_as_str()]
        choices[key] = _parsed([f"{key}={value}" for value in values])
    trials = {}
    for combination in itertools.product(*choices.values()):
        kept = sorted(str(each.input_line) for each in combination if each.key_or_group not in excluded)
        trials[trial_name(",".join(kept))] = [str(each.input_line) for each in combination]
    return trials


def _overrides_in(arguments: Sequence[str]) -> list[str]:
    return [each for each in arguments if "=" in each and not each.startswith("-")]


def _parsed(overrides: Sequence[str]) -> list[Override]:
    return OverridesParser.create().parse_overrides(list(overrides))
