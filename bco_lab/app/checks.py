"""Everything that can be said against a configuration before anything heavy is loaded."""

import importlib.util
import inspect
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from bco_lab.app.suggestions import nearest

GROUPS = ("model", "dataset", "udm", "optimizer", "launcher", "trainer", "wandb")
TOP_LEVEL = (*GROUPS, "generation", "name", "seed", "objective", "dry_run")
_INSTANTIATE_KEYS = {"_target_", "_partial_", "_recursive_", "_convert_", "_args_"}
_EXTRAS = {"bitsandbytes": "bitsandbytes", "lion_pytorch": "lion"}  # package that a target lives in: our extra
_SECRETS = ("hub_token", "api_key", "password", "secret")


def check(cfg: DictConfig) -> None:
    """Check keys, then each group, then what groups ask of each other.

    Raises:
        ValueError: An unknown key, a value that breaks a rule, or groups that do not fit together.
        FileNotFoundError: A model folder that cannot be loaded.
        ImportError: A target whose package is not installed.
    """
    check_keys(cfg)
    require_given(cfg)
    for key in ("model", "generation", "wandb", "launcher", "udm"):
        build(cfg, key)
    if inspect.isclass(get_object(cfg.dataset["_target_"])):  # a function would read the rows here and now
        build(cfg, "dataset")
    arguments = build(cfg, "trainer", output_dir="unused")
    build(cfg, "optimizer")
    check_across(cfg, arguments)


def check_keys(cfg: DictConfig) -> None:
    """Every key must be one that its target takes, also one that was added with `+`."""
    for key in map(str, cfg):
        if key not in TOP_LEVEL:
            raise ValueError(f"{key} is not a known key{nearest(key, TOP_LEVEL)}")
    for group in (*GROUPS, "generation"):
        if not isinstance(cfg.get(group), DictConfig):
            raise ValueError(f"{group} must be a group of settings, not {cfg.get(group)!r}")
        _check_node(cfg[group], group)


def _check_node(node: DictConfig, path: str) -> None:
    for key in map(str, node):
        if any(secret in key.lower() for secret in _SECRETS) and node.get(key):
            raise ValueError(f"{path}.{key} would be written into the run directory: give secrets in the environment")
    if "_target_" in node:
        known = _parameters(node["_target_"], path)
        for key in map(str, node):
            if known is not None and key not in known | _INSTANTIATE_KEYS:
                suggestion = nearest(f"{path}.{key}", [f"{path}.{name}" for name in known])
                raise ValueError(f"{path}.{key} is not a known key of {node['_target_']}{suggestion}")
    for key in map(str, node):
        child = None if OmegaConf.is_missing(node, key) else node.get(key)
        if isinstance(child, DictConfig):
            _check_node(child, f"{path}.{key}")


def _parameters(target: str, path: str) -> set[str] | None:
    """Names that a target takes; None if it takes any."""
    root = target.split(".")[0]
    if importlib.util.find_spec(root) is None:
        extra = _EXTRAS.get(root)
        how = f"pip install 'bco-lab[{extra}]'" if extra else f"install the package that holds {root}"
        raise ImportError(f"{path}._target_={target}: package {root} is not installed; {how}")
    try:
        parameters = inspect.signature(get_object(target)).parameters
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}._target_={target} cannot be found: {error}") from None
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return None
    return set(parameters)


def require_given(cfg: DictConfig) -> None:
    """Every `???` must have got a value."""
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ValueError(f"{missing[0]} must be given, such as {missing[0]}=...")


def build(cfg: DictConfig, key: str, **extra: Any) -> Any:
    """Instantiate one group; what its target says against a value comes back with the group's name in front."""
    try:
        return instantiate(cfg[key], _convert_="all", **extra)
    except InstantiationException as error:
        cause = error.__cause__ or error
        text = " ".join(str(cause).split())
        if any(text.startswith((f"{name}=", f"{key}.")) for name in cfg[key]):
            text = text if text.startswith(f"{key}.") else f"{key}.{text}"
        else:
            text = f"{key}: {text}"
        kind = type(cause) if isinstance(cause, OSError | ImportError) else ValueError
        raise kind(text) from error


def check_across(cfg: DictConfig, arguments: Any) -> None:
    """Rules that no single group can know."""
    if OmegaConf.select(cfg, "trainer.output_dir") is not None:
        raise ValueError("trainer.output_dir is the run directory's: choose that with hydra.run.dir=FOLDER")
    if arguments.report_to:
        raise ValueError(f"trainer.report_to={arguments.report_to} is the wandb group's: set wandb.mode there")
    if cfg.optimizer["_target_"].endswith(".Muon") and cfg.model.get("peft") is None:
        raise ValueError("optimizer=muon updates matrices only: it needs an adapter (model/adapter=lora)")
    if cfg.model.get("quantization") is not None and cfg.model.get("peft") is None:
        raise ValueError("model.quantization needs an adapter (model/adapter=lora): quantised weights do not train")
    if not str(cfg.objective).startswith("eval_"):
        raise ValueError(f"objective={cfg.objective} must be a held-out metric, such as eval_rewards/auc")
    if arguments.load_best_model_at_end and cfg.trainer.get("eval_strategy") in (None, "no"):
        raise ValueError("trainer.load_best_model_at_end=true needs trainer.eval_strategy=steps or epoch")
