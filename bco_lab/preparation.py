"""From what a user hands to BCOTrainer to what it trains on."""

from collections.abc import Callable
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from bco_lab.config import BCOConfig
from bco_lab.data.tokenization import TokenizationReport, tokenize_dataset
from bco_lab.data.weights import with_density_ratio
from bco_lab.models import load_named_model, local_name, prepare_policy, with_pad_token


def prepare_rows(
    dataset: Any, tokenizer: PreTrainedTokenizerBase, args: BCOConfig, name: str
) -> tuple[Any, TokenizationReport | None]:
    """Weigh and tokenise a data set; None stays None, prepared rows pass through.

    Raises:
        ValueError: A row that breaks a rule; the message names data set and row.
    """
    if dataset is None:
        return None, None
    weighted = with_density_ratio(
        dataset, min_density_ratio=args.min_density_ratio, max_density_ratio=args.max_density_ratio, name=name
    )
    return tokenize_dataset(
        weighted,
        tokenizer,
        max_length=args.max_length,
        max_completion_length=args.max_completion_length,
        truncation=args.truncation,
        num_proc=args.dataset_num_proc,
        name=name,
    )


def prepare_model(model: Any, args: BCOConfig, peft_config: Any | None, adapter_name: str | None) -> Any:
    """Load a model that is given by name, switch off dropout and add the adapter.

    Raises:
        ValueError: An encoder-decoder model.
    """
    model = load_if_named(model, args)
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is an encoder-decoder: BCOTrainer trains decoder-only models")
    return prepare_policy(
        model,
        peft_config,
        adapter_name=adapter_name,
        checkpointing=bool(args.gradient_checkpointing),
        dropout=not args.disable_dropout,
    )


def load_if_named(model: Any, args: BCOConfig) -> Any:
    """A model as it is, or the one that a hub id or folder names."""
    return load_named_model(model, _init_kwargs(args), args.trust_remote_code) if isinstance(model, str) else model


def tokenizer_of(model: Any, args: BCOConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that a model, or a model's name, brings.

    Raises:
        ValueError: The model does not say where it came from.
    """
    name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
    if not name:
        raise ValueError("processing_class is needed: the model does not say which tokenizer is its own")
    tokenizer = AutoTokenizer.from_pretrained(
        local_name(name), revision=_init_kwargs(args).get("revision"), trust_remote_code=args.trust_remote_code
    )
    return with_pad_token(tokenizer)


def each_set(dataset: Any, name: str, prepare: Callable[[Any, str], Any]) -> Any:
    """`prepare` a data set, or each of a dict of them under its own name."""
    if isinstance(dataset, dict):
        return {key: prepare(rows, f"{name} {key}") for key, rows in dataset.items()}
    return prepare(dataset, name)


def _init_kwargs(args: BCOConfig) -> dict[str, Any]:
    return args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
