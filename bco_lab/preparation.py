"""From what a user hands to BCOTrainer to what it trains on."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from bco_lab.config import BCOConfig
from bco_lab.data.pairs import unpair
from bco_lab.data.tokenization import TokenizationReport, is_tokenised, tokenize_dataset
from bco_lab.data.weights import PROBABILITY, with_density_ratio
from bco_lab.embedding import Embedder, EmbeddingFunction, embed_prompts
from bco_lab.models import check_location, load_named_model, load_pretrained, prepare_policy, with_pad_token
from bco_lab.udm import PromptMatching, match_prompts

logger = logging.getLogger(__name__)

# ---- rows ----


def unpaired_rows(dataset: Any, args: BCOConfig, name: str) -> Any:
    """A data set of single thumbs: two rows for each pair of a paired one, any other as it is; None stays None.

    Raises:
        ValueError: Neither a data set nor a stream, or a pair that breaks a rule; the message names data set and row.
    """
    if dataset is None:
        return None
    if isinstance(dataset, DatasetDict | IterableDatasetDict):
        splits = ", ".join(map(repr, dataset))
        raise ValueError(f"{name}_dataset is a dict of splits ({splits}): pass one of them, such as data['train']")
    if not isinstance(dataset, Dataset | IterableDataset):
        raise ValueError(f"{name}_dataset is a {type(dataset).__name__}, not a datasets.Dataset or IterableDataset")
    return unpair(dataset, name=name, num_proc=args.dataset_num_proc)


def prepare_rows(
    dataset: Any, tokenizer: PreTrainedTokenizerBase, args: BCOConfig, name: str, *, encoder_decoder: bool = False
) -> tuple[Any, TokenizationReport | None]:
    """Unpair, weigh and tokenise a data set; None stays None, prepared rows pass through.

    Raises:
        ValueError: A row that breaks a rule; the message names data set and row.
    """
    dataset = unpaired_rows(dataset, args, name)
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
        encoder_decoder=encoder_decoder,
    )


def prompt_embedder(
    embedding_func: EmbeddingFunction | None, embedding_tokenizer: Any | None, args: BCOConfig
) -> Embedder | None:
    """What turns prompts into embeddings for matching; None without an `embedding_func`."""
    if embedding_func is None:
        return None
    return partial(
        embed_prompts, embedding_func=embedding_func, embedding_tokenizer=embedding_tokenizer, device=args.device
    )


def match_rows(
    rows: Any, embed: Embedder, matching: PromptMatching | None, args: BCOConfig, name: str
) -> tuple[Any, PromptMatching]:
    """Add the column `p_desirable` (see `bco_lab.udm`): fitted on the first set, training rows, and applied to others.

    Every process does the same work: an `embedding_func` may hold a model that expects all of them to call it.

    Raises:
        ValueError: A stream, or rows that break a rule; the message names data set, row and column.
    """
    if matching is not None and is_tokenised(rows):
        return rows, matching  # prepared before, or without prompts: either way nothing to add
    if matching is not None:
        return rows.add_column(PROBABILITY, matching.predict(rows, embed, name=name)), matching
    matching = match_prompts(rows, embed, prompt_sample_size=args.prompt_sample_size, seed=args.seed, name=name)
    report = matching.report(min_density_ratio=args.min_density_ratio, max_density_ratio=args.max_density_ratio)
    logger.info(report.recommendation)
    return rows.add_column(PROBABILITY, matching.p_desirable), matching


def each_set(dataset: Any, name: str, prepare: Callable[[Any, str], Any]) -> Any:
    """`prepare` a data set, or each of a dict of them under its own name."""
    if isinstance(dataset, dict):
        return {key: prepare(rows, f"{name} {key}") for key, rows in dataset.items()}
    return prepare(dataset, name)


# ---- model and tokenizer ----


def prepare_model(model: Any, args: BCOConfig, peft_config: Any | None, adapter_name: str | None) -> Any:
    """Load a model that is given by name, switch off dropout and add the adapter.

    Raises:
        TypeError: `peft_config` is none.
        ValueError: An adapter that the model does not have.
    """
    policy = prepare_policy(
        load_if_named(model, args),
        peft_config,
        adapter_name=adapter_name,
        checkpointing=bool(args.gradient_checkpointing),
        dropout=not args.disable_dropout,
    )
    if hasattr(policy, "add_model_tags"):
        policy.add_model_tags(["bco", "bco-lab"])
    return policy


def load_if_named(model: Any, args: BCOConfig) -> Any:
    """A model as it is, or the one that a hub id or folder names."""
    return load_named_model(model, _init_kwargs(args), args.trust_remote_code) if isinstance(model, str) else model


def is_encoder_decoder(model: Any, args: BCOConfig) -> bool:
    """Whether a model, or the one of that name, is an encoder-decoder; a name costs reading its configuration.

    Raises:
        ValueError: `args.is_encoder_decoder` says otherwise.
    """
    config = _load(AutoConfig, model, args) if isinstance(model, str) else model.config
    found = bool(getattr(config, "is_encoder_decoder", False))
    if args.is_encoder_decoder is not None and args.is_encoder_decoder != found:
        raise ValueError(f"is_encoder_decoder={args.is_encoder_decoder}, but the model is a {type(config).__name__}")
    return found


def tokenizer_of(model: Any, args: BCOConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that a model, or a model's name, brings.

    Raises:
        ValueError: The model does not say where it came from.
    """
    name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
    if not name:
        raise ValueError("processing_class is needed: the model does not say which tokenizer is its own")
    return _load(AutoTokenizer, name, args)


def tokenizer_in(processing_class: Any) -> PreTrainedTokenizerBase:
    """The tokenizer itself, or the one inside a processor; it can pad.

    Raises:
        ValueError: There is none.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"processing_class={type(processing_class).__name__} neither is nor has a tokenizer")
    return with_pad_token(tokenizer)


def _load(auto_class: Any, name: str, args: BCOConfig) -> Any:
    check_location(name, weights=False)
    revision = _init_kwargs(args).get("revision")
    return load_pretrained(auto_class, name, revision=revision, trust_remote_code=args.trust_remote_code)


def _init_kwargs(args: BCOConfig) -> dict[str, Any]:
    return args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}


# ---- arguments ----


def check_arguments(
    *,
    model: Any,
    ref_model: Any,
    model_init: Any,
    args: BCOConfig,
    optimizers: tuple[Any, Any],
    embedding: tuple[Any, Any],
    adapters: tuple[str | None, str | None],
) -> None:
    """Refuse arguments of BCOTrainer that contradict each other, before anything is loaded.

    Args:
        model: See BCOTrainer.
        ref_model: See BCOTrainer.
        model_init: See BCOTrainer.
        args: See BCOTrainer.
        optimizers: See BCOTrainer.
        embedding: `embedding_func` and `embedding_tokenizer`.
        adapters: `model_adapter_name` and `ref_adapter_name`.

    Raises:
        ValueError: Names the arguments and the rule.
    """
    if ref_model is not None and ref_model is model and not isinstance(model, str):  # a name is loaded twice
        raise ValueError("ref_model is the same object as model: pass None, or a separate copy")
    if (model is None) == (model_init is None):
        raise ValueError("pass model, its name, or model_init: exactly one of them")
    if model_init is not None and any(part is not None for part in optimizers):
        raise ValueError("optimizers and model_init exclude each other: the optimizer would hold the first model")
    if args.model_init_kwargs and not (isinstance(model, str) or isinstance(ref_model, str)):
        raise ValueError("model_init_kwargs is for a model or ref_model given by name; both are loaded already")
    if (embedding[0] is None) != (embedding[1] is None):
        raise ValueError("embedding_func and embedding_tokenizer belong together: pass both or neither")
    policy, reference = adapters
    if reference is not None and reference == (policy or "default"):
        raise ValueError(f"ref_adapter_name={reference} is the adapter that trains: it cannot be its own reference")
    if reference is not None and ref_model is not None:
        raise ValueError(f"ref_adapter_name={reference} and ref_model are two references: pass one of them")
