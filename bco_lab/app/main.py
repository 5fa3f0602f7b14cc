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

from bco_lab.app import run_directory
from bco_lab.app.suggestions import explain_composition_error

USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError, HydraException, OmegaConfBaseException)
EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def conf_folder() -> Path:
    """The configuration folder: inside the package where it was installed, beside it in a source tree."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def main() -> None:
    """Entry point of the console script."""
    arguments = sys.argv[1:]
    task = run_one
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's request to stop ends as tidily as Ctrl-C
    if arguments and arguments[0] in COMMANDS:
        sys.exit(guarded(lambda: COMMANDS[arguments[0]](arguments[1:])))
    if arguments and arguments[0] == "inspect":
        arguments = arguments[1:]
        if {"-h", "--help"} & set(arguments):
            print(INSPECT_USAGE)
            sys.exit(0)
        sys.argv[1:] = with_inspect_defaults(arguments)
        task = inspect_one
    # Errors come back here instead of being printed by Hydra: one line for what a user can mend.
    show_everything = bool(os.environ.get("HYDRA_FULL_ERROR"))
    os.environ["HYDRA_FULL_ERROR"] = "1"
    OmegaConf.register_new_resolver("trial_name", run_directory.trial_name, replace=True)
    failed: list[int] = []

    def one_trial(cfg: DictConfig) -> float | None:
        """Hydra's task; a trial that fails says why and leaves the others to run."""
        objective: list[float | None] = [None]
        status = guarded(lambda: objective.append(task(cfg)), show_everything=show_everything)
        failed.extend([status] if status else [])
        if status == EXIT_INTERRUPTED:
            sys.exit(status)
        return objective[-1]

    application = hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")(one_trial)
    sys.exit(guarded(application, show_everything=show_everything) or max(failed, default=0))


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


def run_one(cfg: DictConfig) -> float | None:
    """One run, in the folder that Hydra chose. Returns the objective."""
    from bco_lab.app import checks, launch

    hydra_cfg = HydraConfig.get()
    run_dir = Path(hydra_cfg.runtime.output_dir)
    checks.check(cfg)
    run_directory.prepare(run_dir, cfg, list(hydra_cfg.overrides.task))
    return launch.launch(run_dir)


def inspect_one(cfg: DictConfig) -> None:
    """`bco-lab inspect`, in the folder that Hydra chose."""
    from bco_lab.app import checks
    from bco_lab.app.inspect import inspect

    hydra_cfg = HydraConfig.get()
    checks.check(cfg)
    inspect(cfg, Path(hydra_cfg.runtime.output_dir), list(hydra_cfg.overrides.task))


def with_inspect_defaults(arguments: list[str]) -> list[str]:
    """The command line with what `inspect` does otherwise than training, where the user did not say."""
    given = {argument.partition("=")[0] for argument in arguments}
    return [f"{key}={value}" for key, value in INSPECT_DEFAULTS.items() if key not in given] + arguments


def resume(arguments: list[str]) -> None:
    """`bco-lab resume RUN_DIR`."""
    if len(arguments) != 1 or arguments[0] in ("-h", "--help"):
        print("usage: bco-lab resume RUN_DIR\n\nGo on from the last whole checkpoint of a run that was interrupted.")
        sys.exit(0 if "-h" in arguments or "--help" in arguments else EXIT_USER_ERROR)
    from bco_lab.app import checks, launch

    run_dir = Path(arguments[0]).resolve()
    checks.check(run_directory.read_config(run_dir))
    launch.launch(run_dir)


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


COMMANDS: dict[str, Callable[[list[str]], None]] = {"resume": resume, "cache": cache}


if __name__ == "__main__":
    main()
