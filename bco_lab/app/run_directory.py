"""The run directory: what is written into it before a run starts, and what may be read back."""

import hashlib
import json
import platform
import subprocess
import sys
import uuid
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from bco_lab import __version__
from bco_lab.files import read_json, write_json, write_text

CONFIG = "config.yaml"
OVERRIDES = "overrides.yaml"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
RESULT = "result.json"
BEFORE = "before.json"
LOG = "run.log"
REJECTED = "rejected_rows.jsonl"
CHECKPOINTS = "checkpoints"
MODEL = "model"
BASE = "base"
PLOTS = "plots"
UDM = "udm.json"

_PACKAGES = ("torch", "transformers", "datasets", "accelerate", "peft", "hydra-core", "omegaconf", "wandb")
PLACES = ("name", "wandb", "launcher", "dry_run")  # say where a run happens, not what it computes


def prepare(run_dir: Path, cfg: DictConfig, overrides: list[str]) -> None:
    """Write the resolved configuration, the overrides and the environment.

    Raises:
        FileExistsError: The folder already holds a run that has begun to train.
    """
    if any((run_dir / name).exists() for name in (BEFORE, METRICS, CHECKPOINTS, MODEL, RESULT)):
        raise FileExistsError(f"{run_dir} already holds a run: `bco-lab resume` it, or choose another hydra.run.dir")
    resolved = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    assert isinstance(resolved, DictConfig)
    write_json(
        run_dir / ENVIRONMENT,
        {
            "bco_lab": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "packages": {name: _version(name) for name in _PACKAGES},
            "git": git_state(Path.cwd()),
            "seed": cfg.seed,
            "config_hash": config_hash(resolved),
            "wandb_run_id": uuid.uuid4().hex[:8],
            "command": ["bco-lab", *sys.argv[1:]],
        },
    )
    write_text(run_dir / OVERRIDES, OmegaConf.to_yaml(OmegaConf.create(overrides)))
    write_text(run_dir / CONFIG, OmegaConf.to_yaml(resolved))


def read_config(run_dir: Path) -> DictConfig:
    """The resolved configuration of a run.

    Raises:
        FileNotFoundError: The folder holds no run.
        ValueError: The file is damaged.
    """
    path = run_dir / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{run_dir} holds no run: {CONFIG} is missing")
    try:
        cfg = OmegaConf.load(path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged, not YAML: {error}") from error
    if not isinstance(cfg, DictConfig) or not cfg:
        raise ValueError(f"{path} is damaged: it holds no configuration")
    return cfg


def read_environment(run_dir: Path) -> dict[str, Any]:
    """What `prepare` noted of the machine and the packages."""
    path = run_dir / ENVIRONMENT
    content: dict[str, Any] = read_json(path) if path.is_file() else {}
    return content


def finished_result(run_dir: Path) -> dict[str, Any] | None:
    """The result of a finished run: `result.json`, if it is there and belongs to this configuration."""
    path = run_dir / RESULT
    if not path.is_file():
        return None
    result: dict[str, Any] = read_json(path)
    return result if result.get("config_hash") == config_hash(read_config(run_dir)) else None


def config_hash(cfg: DictConfig) -> str:
    """Fingerprint of everything in a resolved configuration that can change the numbers of a run."""
    content = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(content, dict)
    kept = {key: value for key, value in content.items() if key not in PLACES}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def trial_name(overrides: str, longest: int = 120) -> str:
    """A readable folder name for one trial of a sweep; what does not fit is replaced by a hash."""
    name = overrides.replace("/", "-") or "defaults"
    if len(name.encode()) <= longest and (name == overrides or not overrides):
        return name
    # a path and the same text with dashes are two trials
    kept = name.encode()[: longest - 13].decode(errors="ignore")
    return f"{kept}-{hashlib.sha256(overrides.encode()).hexdigest()[:12]}"


def name_of_sweep(otherwise: str) -> str:
    """The name of the folder of the sweep that Hydra runs; outside of one the other name."""
    return Path(HydraConfig.get().sweep.dir).name if _in_sweep() else otherwise


def name_of_trial(otherwise: str) -> str:
    """The name of the folder of the trial that Hydra runs; outside of a sweep the other name."""
    return Path(HydraConfig.get().runtime.output_dir).name if _in_sweep() else otherwise


def _in_sweep() -> bool:
    return bool(HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN)


def data_fingerprint(datasets: dict[str, Any]) -> str:
    """Hash of the rows that a run trains and is judged on."""
    digest = hashlib.sha256()
    for name, dataset in sorted(datasets.items()):
        digest.update(name.encode())
        for row in dataset or ():
            row.pop("origin", None)  # a file may move
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def git_state(folder: Path) -> dict[str, Any] | None:
    """Revision and dirty flag of the repository that a folder is in; None outside one."""
    try:
        revision = _git(folder, "rev-parse", "HEAD")
        return {"revision": revision, "dirty": bool(_git(folder, "status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
