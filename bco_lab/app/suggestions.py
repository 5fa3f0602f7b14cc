"""Errors of composition, in words that help: an unknown key comes with the nearest known one."""

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

_NO_SUCH_KEY = re.compile(r"Could not override '([^']+)'")


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` with the closest of `known`, or nothing if none is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def explain_composition_error(error: BaseException, folder: Path, arguments: Sequence[str]) -> str:
    """One line for an error, with a suggestion where Hydra found a key that does not exist."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MissingMandatoryValue):
        missing = re.search(r"full_key: (\S+)", str(error))
        return f"{missing.group(1) if missing else text} must be given"
    if isinstance(error, OverrideParseException) and "=" not in error.override:
        return f"{error.override}: settings are key=value, such as dataset.path={error.override}"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: {text} (quote a value with special characters: 'key=\"a=b\"')"
    found = _NO_SUCH_KEY.search(text)
    if not isinstance(error, HydraException) or found is None:
        return text
    key = found.group(1)
    if key == "trainer.output_dir":
        return "trainer.output_dir is the run directory's: choose that with hydra.run.dir=FOLDER"
    fields = _trainer_fields() if key.startswith("trainer.") else set()
    if key.removeprefix("trainer.") in fields:
        return f"{key} is a field of BCOConfig that the YAML does not list: add it with a plus, +{key}=..."
    known = _known_keys(folder, arguments) | {f"trainer.{name}" for name in fields}
    if key in known:  # a value of the wrong form: Hydra's own words are the best there are
        return text
    return f"{key} is not a known key{nearest(key, known)} (all keys: bco-lab --cfg job)"


def _trainer_fields() -> set[str]:
    import dataclasses

    from bco_lab.config import BCOConfig

    return {field.name for field in dataclasses.fields(BCOConfig)}


def _known_keys(folder: Path, arguments: Sequence[str]) -> set[str]:
    """Every key of the configuration with the group choices of the command line, but none of its values."""
    groups = {path.name for path in folder.iterdir() if path.is_dir()}
    choices = [a for a in arguments if a.partition("=")[0].split("/")[0] in groups]
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(folder)):
        try:
            cfg = compose("config", overrides=choices, return_hydra_config=False)
        except HydraException:
            cfg = compose("config")
    return set(_paths(cfg))


def _paths(cfg: DictConfig, prefix: str = "") -> Iterable[str]:
    for key in map(str, cfg):
        path = f"{prefix}{key}"
        yield path
        node = None if OmegaConf.is_missing(cfg, key) or OmegaConf.is_interpolation(cfg, key) else cfg[key]
        if isinstance(node, DictConfig):
            yield from _paths(node, f"{path}.")
