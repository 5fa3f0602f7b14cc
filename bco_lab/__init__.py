"""bco-lab: align language models from thumbs-up and thumbs-down by Binary Classifier Optimization."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bco_lab.config import BCOConfig
    from bco_lab.trainer import BCOTrainer

try:
    __version__ = version("bco-lab")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["BCOConfig", "BCOTrainer", "__version__"]

_HOMES = {"BCOConfig": "bco_lab.config", "BCOTrainer": "bco_lab.trainer"}


def __getattr__(name: str) -> Any:
    # Loaded on first use: importing transformers takes seconds, and `bco-lab --help` should not wait for it.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
