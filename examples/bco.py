"""Align a language model with thumbs-up and thumbs-down, from Python.

    python examples/bco.py --model_name_or_path Qwen/Qwen3-0.6B --output_dir aligned \
        --dataset feedback.jsonl --train_split 'train[:90%]' --eval_split 'train[90%:]' \
        --use_peft --learning_rate 2e-4 --num_train_epochs 1

Rows have `prompt`, `completion` and `label`, or `chosen` and `rejected`; strings or chat messages. Every field of
BCOConfig, and so of transformers.TrainingArguments, is an option; --help lists them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, HfArgumentParser

from bco_lab import BCOConfig, BCOTrainer

READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass
class ScriptArguments:
    """What BCOConfig does not hold: model, data, adapter, prompt embeddings."""

    model_name_or_path: str = field(metadata={"help": "Hub id or folder of the model to align."})
    dataset: str = field(metadata={"help": "A file (.jsonl, .json, .csv, .parquet) or the name of a hub data set."})
    train_split: str = field(default="train", metadata={"help": "Rows to train on, such as train or train[:90%%]."})
    eval_dataset: str | None = field(default=None, metadata={"help": "File or hub data set to evaluate on."})
    eval_split: str | None = field(
        default=None, metadata={"help": "Rows to evaluate on, of eval_dataset if there is one, such as train[90%%:]."}
    )
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of all weights."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(
        default=32, metadata={"help": "Scale of the adapter: its output is multiplied by lora_alpha / lora_r."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of the adapter."})
    embedding_model: str | None = field(
        default=None,
        metadata={"help": "Encoder of prompts: weights thumbs-down by how much their prompt is one of thumbs-up."},
    )


def read(name: str, split: str) -> Dataset:
    """Rows of a file, which are all in the split `train`, or of a hub data set."""
    reader = READERS.get(Path(name).suffix)
    return load_dataset(name, split=split) if reader is None else load_dataset(reader, data_files=name, split=split)


def mean_pooling(model_name: str) -> Callable[..., Tensor]:
    """A function that embeds tokenised prompts: the mean of the encoder's last hidden states."""
    encoder = AutoModel.from_pretrained(model_name).eval()

    def embed(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = encoder.to(input_ids.device)(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        inside = attention_mask.unsqueeze(-1).to(hidden.dtype)  # padding must not count
        return (hidden * inside).sum(dim=1) / inside.sum(dim=1).clamp(min=1)

    return embed


def main() -> None:
    """Train, evaluate, save."""
    script, args = HfArgumentParser((ScriptArguments, BCOConfig)).parse_args_into_dataclasses()
    evaluated = script.eval_dataset or script.eval_split
    adapter = LoraConfig(
        task_type="CAUSAL_LM",
        r=script.lora_r,
        lora_alpha=script.lora_alpha,
        lora_dropout=script.lora_dropout,
        target_modules="all-linear",
    )
    trainer = BCOTrainer(
        model=script.model_name_or_path,
        args=args,
        train_dataset=read(script.dataset, script.train_split),
        eval_dataset=read(script.eval_dataset or script.dataset, script.eval_split or "train") if evaluated else None,
        peft_config=adapter if script.use_peft else None,
        embedding_func=mean_pooling(script.embedding_model) if script.embedding_model else None,
        embedding_tokenizer=AutoTokenizer.from_pretrained(script.embedding_model) if script.embedding_model else None,
    )
    trained = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_metrics("train", trained.metrics)
    trainer.save_state()
    if evaluated:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.save_model()
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset)
    else:
        trainer.create_model_card(dataset_name=script.dataset)


if __name__ == "__main__":
    main()
