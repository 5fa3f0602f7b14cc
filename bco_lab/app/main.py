"""The command `bco-lab`: Hydra composes, the run directory is prepared, a launcher runs it."""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bco_lab.app import run_directory, sweep
from bco_lab.app.suggestions import explain_composition_error

USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError, HydraException, OmegaConfBaseException)
EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

_SHOW_EVERYTHING = "BCO_LAB_SHOW_TRACEBACKS"  # workers of a launcher inherit it
_statuses: list[int] = []  # of the trials that ran in this process

# Here, not in main(): processes that a launcher starts import this module and resolve names themselves.
OmegaConf.register_new_resolver("trial_name", run_directory.trial_name, replace=True)
OmegaConf.register_new_resolver("name_of_sweep", run_directory.name_of_sweep, replace=True)
OmegaConf.register_new_resolver("name_of_trial", run_directory.name_of_trial, replace=True)


def conf_folder() -> Path:
    """The configuration folder: inside the package where it was installed, beside it in a source tree."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def main() -> None:
    """Entry point of the console script."""
    arguments = sys.argv[1:]
    task: Callable[[DictConfig], float | None] = train_task
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's request to stop ends as tidily as Ctrl-C
    if arguments and arguments[0] in COMMANDS:
        sys.exit(guarded(lambda: COMMANDS[arguments[0]](arguments[1:])))
    if arguments and arguments[0] == "inspect":
        arguments = arguments[1:]
        if {"-h", "--help"} & set(arguments):
            print(INSPECT_USAGE)
            sys.exit(0)
        if {"-m", "--multirun"} & set(arguments):
            print("bco-lab: error: inspect looks at one data set: leave out -m", file=sys.stderr)
            sys.exit(EXIT_USER_ERROR)
        sys.argv[1:] = with_inspect_defaults(arguments)
        task = inspect_task
    sys.exit(_compose_and_run(task))


def _compose_and_run(task: Callable[[DictConfig], float | None]) -> int:
    """Let Hydra compose the command line and call the task, once or for each trial. Returns the exit status."""
    multirun = bool({"-m", "--multirun"} & set(sys.argv[1:]))
    if multirun:
        sys.argv[1:] = sweep.with_names(sys.argv[1:])
    # Errors come back here instead of being printed by Hydra: one line for what a user can mend.
    show_everything = bool(os.environ.get("HYDRA_FULL_ERROR"))
    os.environ["HYDRA_FULL_ERROR"] = "1"
    os.environ[_SHOW_EVERYTHING] = "1" if show_everything else ""
    _statuses.clear()
    application = hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")(task)
    status = guarded(application, show_everything=show_everything) or max(_statuses, default=0)
    if not multirun:
        return status
    if sweep.last_sweep() is not None and len(_statuses) != _statuses.count(EXIT_INTERRUPTED):
        guarded(_report_last_sweep)
    failures = sweep.failures_of_last_sweep()
    for name, error in failures.items():
        print(f"bco-lab: failed: {name}: {error}", file=sys.stderr)
    return status or (EXIT_FAILED if failures else 0)


def _report_last_sweep() -> None:
    from bco_lab.app.report_command import report_sweep

    folder = sweep.last_sweep()
    assert folder is not None
    report_sweep(folder)


def train_task(cfg: DictConfig) -> float | None:
    """Hydra's task; a trial that fails says why and leaves the others to run. Returns the objective."""
    from bco_lab.app.trial import run_composed

    return _call(run_composed, cfg)


def inspect_task(cfg: DictConfig) -> float | None:
    """Hydra's task of `bco-lab inspect`."""
    return _call(inspect_one, cfg)


def _call(action: Callable[[DictConfig], float | None], cfg: DictConfig) -> float | None:
    objective: list[float | None] = [None]
    show_everything = bool(os.environ.get(_SHOW_EVERYTHING))
    status = guarded(lambda: objective.append(action(cfg)), show_everything=show_everything)
    _statuses.append(status)
    if status == EXIT_INTERRUPTED:
        sys.exit(status)
    return objective[-1]


def guarded(action: Callable[[], object], *, show_everything: bool = False) -> int:
    """Run an action; turn what a user can mend into one line on standard error. Returns the exit status."""
    try:
        action()
    except USER_ERRORS as error:
        if show_everything:
            traceback.print_exc()
        message = explain_composition_error(error, conf_folder(), sys.argv[1:])
        print(f"bco-lab: error: {message}", file=sys.stderr)
        return EXIT_USER_ERROR
    except Exception as error:  # a defect, or a device that ran out of memory: everything there is to know, and go on
        traceback.print_exc()
        print(f"bco-lab: error: {type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print("bco-lab: interrupted; `bco-lab resume RUN_DIR` goes on from the last checkpoint", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def inspect_one(cfg: DictConfig) -> float | None:
    """`bco-lab inspect`, in the folder that Hydra chose."""
    from bco_lab.app import checks
    from bco_lab.app.inspect import inspect

    hydra_cfg = HydraConfig.get()
    checks.check(cfg)
    inspect(cfg, Path(hydra_cfg.runtime.output_dir), list(hydra_cfg.overrides.task))
    return None


def with_inspect_defaults(arguments: list[str]) -> list[str]:
    """The command line with what `inspect` does otherwise than training, where the user did not say."""
    given = {argument.partition("=")[0] for argument in arguments}
    return [f"{key}={value}" for key, value in INSPECT_DEFAULTS.items() if key not in given] + arguments


def resume(arguments: list[str]) -> None:
    """`bco-lab resume DIR`, of a run or of a sweep."""
    if len(arguments) != 1 or arguments[0] in ("-h", "--help"):
        print(
            "usage: bco-lab resume DIR\n\nGo on with a run from its last whole checkpoint, or with a sweep: finished "
            "trials are kept, half-done ones go on, the others start."
        )
        sys.exit(0 if "-h" in arguments or "--help" in arguments else EXIT_USER_ERROR)
    from bco_lab.app import checks, launch

    folder = Path(arguments[0]).resolve()
    again = sweep.command_of(folder)
    if again is not None:
        sys.argv[1:] = again
        sys.exit(_compose_and_run(train_task))
    checks.check(run_directory.read_config(folder))
    launch.launch(folder)


INSPECT_DEFAULTS = {
    "udm": "lexical",
    "hydra.run.dir": "outputs/inspect/${hydra:runtime.choices.dataset}-${now:%Y%m%d-%H%M%S}",
}
INSPECT_USAGE = """usage: bco-lab inspect [group=option ...] [key=value ...]

What a data set holds, before any training: label balance, lengths, truncation, duplicates and contradictions, whether
thumbs reward length, whether thumbs-up and thumbs-down come from different prompts, and what matching would do about
that. Takes what the training command takes; dataset, udm (lexical unless you say otherwise), model (for its tokenizer)
and trainer.max_length matter. Writes inspect.html and inspect.json to hydra.run.dir (outputs/inspect/...).

  bco-lab inspect dataset=unpaired dataset.path=feedback.jsonl
  bco-lab inspect dataset=rated dataset.path=scores.csv dataset.threshold=4 udm=on model=qwen3_0_6b
"""


def cache(arguments: list[str]) -> None:
    """`bco-lab cache ls|verify|clear`."""
    from bco_lab.app.cache_command import cache_command

    cache_command(arguments)


def report(arguments: list[str]) -> None:
    """`bco-lab report DIR`."""
    from bco_lab.app.report_command import report_command

    report_command(arguments)


COMMANDS: dict[str, Callable[[list[str]], None]] = {"resume": resume, "cache": cache, "report": report}


if __name__ == "__main__":
    main()
