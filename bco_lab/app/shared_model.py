"""The base model between the trials of a sweep in one process: loaded once, its weights checked after each trial."""

import hashlib
import json
import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from bco_lab.config import BCOConfig
from bco_lab.identity import policy_identity
from bco_lab.models import Policy, PolicySource

logger = logging.getLogger(__name__)

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of an entry to integers of that size


@dataclass
class _Kept:
    """A base model without an adapter."""

    identity: str
    checksum: str
    policy: Policy


_kept: list[_Kept] = []  # one at most


def load_policy(source: PolicySource, args: BCOConfig) -> Policy:
    """The policy, with the base model of the trial before if that was the same and is as it was.

    Full fine-tuning changes the base model, so there every trial loads its own; so it is with quantised weights.

    Args:
        source: Of the policy.
        args: Of the training; settings that change the base model's modules are part of what must agree.
    """
    if source.peft is None or source.quantization is not None:
        _kept.clear()
        return source.load()
    identity = json.dumps([policy_identity(source), args.disable_dropout, args.gradient_checkpointing], sort_keys=True)
    if _kept and _kept[0].identity == identity:
        logger.info("The base model is still in memory")
        return replace(
            _kept[0].policy, tokenizer=source.load_tokenizer(), peft_config=source.adapter_for(_kept[0].policy.model)
        )
    _kept.clear()
    logger.info("Loading the model")
    policy = source.load()
    _kept.append(_Kept(identity, checksum(policy.model), policy))
    return policy


def release(model: Any) -> None:
    """Take the adapter off a trained model, and keep the base model for the next trial if its weights are untouched.

    Args:
        model: The trained one; anything but an adapter on the base model kept here is left alone.
    """
    if not _kept or not hasattr(model, "unload") or model.get_base_model() is not _kept[0].policy.model:
        _kept.clear()
        return
    base = model.unload()
    if hasattr(base, "peft_config"):
        del base.peft_config  # what marks a model that carries an adapter
    if checksum(base) != _kept[0].checksum:
        logger.warning("The weights of the base model have changed during training; the next trial loads it anew")
        _kept.clear()


def forget() -> None:
    """Keep nothing, such as after an error in the middle of a training."""
    _kept.clear()


def checksum(model: nn.Module) -> str:
    """Digest of all weights and buffers: sums of their bits as whole numbers, which every change of one moves."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        words = tensor.detach().contiguous().reshape(-1).view(_WORDS[tensor.element_size()])
        digest.update(f"{name} {tuple(tensor.shape)} {int(words.sum(dtype=torch.int64))}\n".encode())
    return digest.hexdigest()
