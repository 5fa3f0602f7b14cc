"""A tiny model and its rows, the same in every process that imports this: what trainer tests train."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from bco_lab import BCOConfig, BCOTrainer

VOCABULARY = 60


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word: <pad> 0, <eos> 1, then w2 to w59."""
    words = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """The same words; like T5's it ends every text with <eos>."""
    made = tokenizer()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    return made


def model(seed: int = 0, **config: Any) -> LlamaForCausalLM:
    """A two-layer Llama with random float32 weights."""
    torch.manual_seed(seed)
    defaults: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    return LlamaForCausalLM(LlamaConfig(**{**defaults, **config}))


def mixtral(seed: int = 0, **config: Any) -> MixtralForCausalLM:
    """A two-layer mixture of four experts with random float32 weights."""
    torch.manual_seed(seed)
    defaults: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    return MixtralForCausalLM(MixtralConfig(**{**defaults, **config}))


def t5(seed: int = 0, **config: Any) -> T5ForConditionalGeneration:
    """An encoder-decoder with two layers on each side and random float32 weights."""
    torch.manual_seed(seed)
    defaults: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }
    return T5ForConditionalGeneration(T5Config(**{**defaults, **config}))


def rows(count: int, *, up_every: int = 3, seed: int = 0, **columns: list[Any]) -> Dataset:
    """Prepared rows of uneven length; every `up_every`-th is desirable."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        length = int(torch.randint(6, 14, (1,), generator=draw))
        ids = torch.randint(2, VOCABULARY, (length,), generator=draw).tolist()
        made.append(
            {
                "input_ids": [*ids, 1],
                "prompt_length": 2 + index % 3,
                "label": index % up_every == 0,
                "example_id": 100 + index,
            }
        )
    dataset = Dataset.from_list(made)
    for name, values in columns.items():
        dataset = dataset.add_column(name, values)
    return dataset


def config(folder: Path, **settings: Any) -> BCOConfig:
    """Settings under which a few steps move the weights visibly and nothing is random but the order of rows."""
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "precompute_ref_log_probs": True,
        "disable_tqdm": True,
        "optim": "sgd",
        "max_grad_norm": 0.0,
    }
    return BCOConfig(**{**defaults, **settings})


def trainer(folder: Path, train: Dataset, evaluation: Any = None, **settings: Any) -> BCOTrainer:
    """A trainer on the tiny model."""
    return BCOTrainer(
        model=model(),
        args=config(folder, **settings),
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer(),
    )


def logged(trained: BCOTrainer, key: str) -> list[float]:
    """The values of a metric over the training logs."""
    return [row[key] for row in trained.state.log_history if "loss" in row]


def weights(trained: BCOTrainer) -> torch.Tensor:
    """All weights as one vector, float64."""
    return torch.cat(
        [p.detach().double().flatten() for p in trained.accelerator.unwrap_model(trained.model).parameters()]
    )
