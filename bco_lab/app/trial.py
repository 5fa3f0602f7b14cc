"""One run as Hydra calls it: alone, or as a trial of a sweep that skips what is done and goes on with what is not."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from filelock import FileLock
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from bco_lab.app import checks, launch, run_directory
from bco_lab.app.sweep import SweepLog
from bco_lab.files import read_json, write_json

logger = logging.getLogger(__name__)

_PROBLEMS = ".problems"


def run_composed(cfg: DictConfig) -> float | None:
    """Run what Hydra composed, in the folder that it chose. Returns the objective."""
    hydra_cfg = HydraConfig.get()
    run_dir, overrides = Path(hydra_cfg.runtime.output_dir), [str(each) for each in hydra_cfg.overrides.task]
    alone = hydra_cfg.mode != RunMode.MULTIRUN
    if cfg.dry_run:
        from bco_lab.app.dry_run import describe

        checks.check(cfg)
        print(describe(run_dir, cfg))
        return None
    if alone:
        checks.check(cfg)
        run_directory.prepare(run_dir, cfg, overrides)
        return launch.launch(run_dir)
    log = SweepLog(run_dir.parent)
    with log.running(run_dir.name, overrides) as facts:
        checks.check(cfg)
        facts |= _run_trial(run_dir, cfg, overrides)
    objective: float | None = facts["objective"]
    return objective


def _run_trial(run_dir: Path, cfg: DictConfig, overrides: list[str]) -> dict[str, Any]:
    """Run a trial, or what is left of it; the facts that sweep.json keeps."""
    if (run_dir / run_directory.CONFIG).is_file():
        check_same_settings(run_dir, cfg)
        known = run_directory.finished_result(run_dir)
        if known is not None:
            print(f"{run_dir.name} is finished already.")
            return {"objective": known["objective"], "same_as": known.get("same_as"), "seconds": known["wall_seconds"]}
    else:
        run_directory.prepare(run_dir, cfg, overrides)
    problem = effective_problem(cfg)
    if problem is None:
        return {"objective": launch.launch(run_dir)}
    folder = run_dir.parent / _PROBLEMS
    folder.mkdir(exist_ok=True)
    # Held while it trains: a trial of the same problem, started beside it, waits and takes its result.
    with FileLock(folder / f"{problem}.lock"):
        twin = _finished_twin(run_dir, folder / f"{problem}.json")
        if twin is not None:
            return _share_result(run_dir, cfg, twin)
        objective = launch.launch(run_dir)
        write_json(folder / f"{problem}.json", {"trial": run_dir.name})
        return {"objective": objective}


def check_same_settings(run_dir: Path, cfg: DictConfig) -> None:
    """Refuse a folder that holds a trial of other settings.

    Raises:
        FileExistsError: It does; the message names the first key that differs.
    """
    theirs = run_directory.read_config(run_dir)
    ours = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    assert isinstance(ours, DictConfig)
    if run_directory.config_hash(theirs) == run_directory.config_hash(ours):
        return
    there, here = (_flat(OmegaConf.to_container(each)) for each in (theirs, ours))
    for key in run_directory.PLACES:
        there, here = ({k: v for k, v in each.items() if k.split(".")[0] != key} for each in (there, here))
    key = next(key for key in sorted({*there, *here}) if there.get(key) != here.get(key))
    raise FileExistsError(
        f"{run_dir} holds a trial of other settings ({key}={there.get(key)} there, {here.get(key)} here): choose "
        "another hydra.sweep.dir"
    )


def effective_problem(cfg: DictConfig) -> str | None:
    """Hash of what is trained, where settings of matching may make no difference; None where every setting counts.

    Clamp bounds that never bind give the same weights. Embeddings and probabilities come from the cache, so that asking
    costs little more than reading the rows.
    """
    from bco_lab.app.pipeline import load_data
    from bco_lab.cache import ArtifactCache
    from bco_lab.data.weights import WEIGHT
    from bco_lab.matching import DistributionMatching

    if not isinstance(checks.build(cfg, "udm"), DistributionMatching):
        return None
    data, _ = load_data(cfg, ArtifactCache(), quiet=True)
    content = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(content, dict)
    bounds = ("min_density_ratio", "max_density_ratio")
    trainer = {key: value for key, value in content["trainer"].items() if key not in bounds}
    kept = {key: value for key, value in content.items() if key not in (*run_directory.PLACES, "udm", "trainer")}
    weights = [list(rows[WEIGHT]) for rows in (data.train, data.eval) if rows is not None]
    text = json.dumps([kept, trainer, weights], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _finished_twin(run_dir: Path, note: Path) -> Path | None:
    """The trial of the same problem that is finished."""
    if not note.is_file():
        return None
    twin = run_dir.parent / str(read_json(note)["trial"])
    return twin if twin != run_dir and run_directory.finished_result(twin) is not None else None


def _share_result(run_dir: Path, cfg: DictConfig, twin: Path) -> dict[str, Any]:
    """Take over the result of a trial with the same rows, weights and settings."""
    result = run_directory.finished_result(twin)
    assert result is not None
    print(f"{run_dir.name} has the same weights as {twin.name}: trained once.")
    result |= {"same_as": twin.name, "config_hash": run_directory.config_hash(run_directory.read_config(run_dir))}
    result |= {"wall_seconds": 0.0, "artifacts": []}
    write_json(run_dir / run_directory.RESULT, result)
    return {"objective": result["objective"], "same_as": twin.name}


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys to values."""
    if not isinstance(content, dict):
        return {prefix[:-1]: content}
    found: dict[str, Any] = {}
    for key, value in content.items():
        found |= _flat(value, f"{prefix}{key}.")
    return found
