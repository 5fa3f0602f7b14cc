"""Models that are too large for one device: policy and reference sharded alike, by FSDP2 or by DeepSpeed's ZeRO-3."""

import copy
import importlib
import os
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from transformers.integrations import is_deepspeed_zero3_enabled

_WIDTH_DEPENDENT = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")


def enable_fsdp(accelerator: Accelerator, plugin_args: dict[str, Any] | None) -> bool:
    """Whether this run shards its models with FSDP2; sees to it that they are sharded where that was asked for.

    On CPUs accelerate passes over a request for FSDP in silence and keeps whole models on every process. torch can
    shard there too, through gloo, so the request is granted.

    Args:
        accelerator: Of the trainer, just made.
        plugin_args: Arguments of accelerate's FSDP plugin; None: those in the environment.

    Raises:
        ValueError: FSDP1 was asked for.
    """
    state = accelerator.state
    asked_for = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"  # accelerate sets it for a plugin
    if asked_for and state.distributed_type == DistributedType.MULTI_CPU:
        plugin = FullyShardedDataParallelPlugin(**(plugin_args or {}))
        if accelerator.mixed_precision != "no":
            plugin.set_mixed_precision(accelerator.mixed_precision)
        state.fsdp_plugin = plugin
        # The one is refreshed from the other, each time that somebody asks for it.
        PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
    if state.distributed_type != DistributedType.FSDP:
        return False
    if getattr(state.fsdp_plugin, "fsdp_version", 1) != 2:
        raise ValueError(
            "FSDP version 1 is not supported: set fsdp_config={'version': 2}, or fsdp_version: 2 in the accelerate "
            "configuration (FSDP_VERSION=2)"
        )
    return True


def every_process_computes(accelerator: Accelerator) -> bool:
    """Whether a forward pass gathers weights from all processes, so that none may do one alone."""
    return accelerator.distributed_type == DistributedType.FSDP or is_deepspeed_zero3_enabled()


def saves_shards(accelerator: Accelerator) -> bool:
    """Whether FSDP checkpoints hold a file per process; the Trainer's `save_model` then writes no weights at all."""
    if accelerator.distributed_type != DistributedType.FSDP:
        return False
    return "FULL" not in str(accelerator.state.fsdp_plugin.state_dict_type)


def check_reference_under_zero3(*, adapter: bool, precompute: bool) -> None:
    """For runs without `ref_model` and `ref_logps`: refuse what ZeRO-3 cannot do, copy the policy or run it too early.

    Args:
        adapter: The policy has an adapter, and is its own reference with the adapter off.
        precompute: Reference log-probs are to be computed before training.

    Raises:
        ValueError: ZeRO-3 is on, and the reference would have to be such a copy or the policy before it trains.
    """
    if not is_deepspeed_zero3_enabled() or (adapter and not precompute):
        return
    way_out = "set precompute_ref_log_probs=False" if adapter else "train an adapter"
    raise ValueError(
        "under DeepSpeed ZeRO-3 no process holds whole weights of the policy before training begins, so it can "
        f"neither be copied nor be its own reference: pass ref_model (the name of the model will do), or {way_out}"
    )


def shard_policy(accelerator: Accelerator, policy: nn.Module) -> nn.Module:
    """Shard the policy with FSDP2, or return it as it is where another scheme, or none, is in use.

    The Trainer would do it in `train()`. Now is earlier than any forward pass: no device ever holds the whole policy,
    also when it is evaluated, sampled from or asked for reference log-probs before it trains.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return policy
    # accelerate takes a model with an optimizer only; the Trainer brings the one that counts and forgets this.
    passing = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad])
    sharded: nn.Module
    sharded, _ = accelerator.prepare(policy, passing)
    accelerator.state.fsdp_plugin.activation_checkpointing = False  # done; the Trainer's prepare() would add a second
    register_fsdp_forward_method(sharded, "generate")
    return sharded


def forget_evaluation(accelerator: Accelerator, model: nn.Module) -> None:
    """Let `train()` prepare a model that an evaluation has prepared before.

    The Trainer prepares the policy for `evaluate()` without the wrapper that averages gradients over processes, and
    accelerate then takes it for prepared: without this, every process would train a model of its own, in silence.
    """
    whole = accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if accelerator.num_processes > 1 and whole and vars(model).pop("_is_accelerate_prepared", False):
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # mixed precision wraps forward; once is enough
        accelerator._models[:] = [known for known in accelerator._models if known is not model]


def reshard(model: nn.Module) -> None:
    """Give back what an FSDP2 model holds beyond its own shards; does nothing to any other model.

    After a forward pass without a backward pass it still holds the whole output head. An optimizer made then would be
    given, and would train, a head that is not the model's.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def prepare_reference(accelerator: Accelerator, reference: nn.Module) -> nn.Module:
    """Place a frozen reference as the policy is placed: sharded where the policy is, else whole on each device.

    Args:
        accelerator: Of the trainer.
        reference: In eval mode, without gradients.

    Returns:
        The model to call; between two calls an FSDP2 reference holds nothing but its own shards.
    """
    prepared: Any
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        plugin = accelerator.state.deepspeed_plugin
        config = reference_deepspeed_config(plugin.deepspeed_config, _hidden_size(reference))
        prepared, *_ = importlib.import_module("deepspeed").initialize(model=reference, config=config)
        prepared.eval()
        return prepared
    if accelerator.distributed_type == DistributedType.FSDP:
        prepared = _shard_reference(accelerator, reference)
        # The output head, and the root, would stay gathered for a backward pass that never comes.
        prepared.set_reshard_after_forward(True)
        return prepared
    return accelerator.prepare_model(reference, evaluation_mode=True)


def _shard_reference(accelerator: Accelerator, reference: nn.Module) -> Any:
    from accelerate.utils import fsdp2_prepare_model  # not in releases that know FSDP1 only

    # The plugin notes the layers of the model that it meets first; those of the policy may have another class.
    plugin = accelerator.state.fsdp_plugin
    accelerator.state.fsdp_plugin = copy.copy(plugin)
    try:
        return fsdp2_prepare_model(accelerator, reference)
    finally:
        accelerator.state.fsdp_plugin = plugin


def reference_deepspeed_config(policy_config: dict[str, Any], hidden_size: int | None) -> dict[str, Any]:
    """The DeepSpeed configuration of an inference engine for the reference, made from the policy's.

    ZeRO-3 shards weights, so the reference uses it if the policy does. The lower stages shard what only training has
    and demand an optimizer; a reference beside them is whole on each device (stage 0).

    Args:
        policy_config: Of the policy; it is left as it is.
        hidden_size: Width of the reference; sets those buckets of ZeRO-3 that the policy's configuration leaves open
            or "auto", by the formulas that transformers documents for the policy. None: DeepSpeed's own defaults.

    Returns:
        A configuration for `deepspeed.initialize(model=..., config=...)` without an optimizer.
    """
    config = copy.deepcopy(policy_config)
    for section in ("optimizer", "scheduler", "gradient_clipping", "gradient_accumulation_steps", "train_batch_size"):
        config.pop(section, None)
    config["train_micro_batch_size_per_gpu"] = 1  # one size must be named; nothing here depends on it
    zero = config.get("zero_optimization", {})
    if zero.get("stage", 0) != 3:
        return config | {"zero_optimization": {"stage": 0}}
    zero = {key: value for key, value in zero.items() if value != "auto" and key != "offload_optimizer"}
    if hidden_size is not None:
        square = hidden_size * hidden_size
        sizes = (square, int(0.9 * square), 10 * hidden_size)
        zero = dict(zip(_WIDTH_DEPENDENT, sizes, strict=True)) | zero
    return config | {"zero_optimization": zero}


def _hidden_size(model: Any) -> int | None:
    """The (largest) width of a model, also of one with parts; None if its configuration does not say."""
    for config in (model.config, getattr(model.config, "text_config", None)):
        sizes = getattr(config, "hidden_sizes", None) or [getattr(config, "hidden_size", None)]
        if sizes[0] is not None:
            return max(sizes)
    return None
