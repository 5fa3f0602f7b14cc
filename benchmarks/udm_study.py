"""Does underlying distribution matching (UDM) help? Thumbs from different prompts, real film reviews, a small model.

    python benchmarks/udm_study.py --seeds 6 --divergence 0.5 0.7 0.9

Trains each arm with `BCOTrainer` on the same rows from the same model in the same order; only the weights of the
undesirable rows differ. A finished run is a line in a file and is not run again. Writes figures, table and plot into
docs/; docs/udm-study.md says what is measured and why.
"""

import argparse
import dataclasses
import json
import logging
import multiprocessing
import os
import random
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

# One thread per run and as many runs at once as there are cores: a tiny model has no work for more.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bco_lab import BCOConfig, BCOTrainer
from bco_lab.data.reviews import _read_reviews
from bco_lab.density_ratio import density_ratio, effective_sample_size
from bco_lab.metrics import auc
from bco_lab.udm import match_prompts

Floats = NDArray[np.float64]

# ---- the setting ----

ARMS = ("off", "trl", "ours", "oracle", "oracle, wide bounds")
BOUNDS = (0.5, 10.0)  # what TRL and BCOConfig clamp the weights to unless told otherwise
WIDE_BOUNDS = (0.05, 20.0)  # hold the true ratio at every divergence here
KINDS = ("line", "either", "closing")


@dataclass(frozen=True)
class Setting:
    """What every run of the study shares; chosen with UDM off, on seeds that the study does not use."""

    neutral: float = 0.2  # share of prompts that may be answered by either source, in both classes
    train_per_class: int = 1500
    eval_rows: int = 2000
    reference_rows: int = 6000
    reference_epochs: int = 2
    reference_learning_rate: float = 3e-3
    vocabulary: int = 4096
    hidden_size: int = 96
    layers: int = 2
    embedding_dim: int = 128
    prompt_sample_size: int = 1024
    beta: float = 0.1
    learning_rate: float = 1e-3
    epochs: int = 3
    batch_size: int = 16


# ---- prompts ----

# Words are shared between the kinds, so that no single one gives a kind away.
_OPENINGS = (
    "I have just watched {film}, a {kind} that {name} recommended.",
    "Last {day} {name} and I went to see {film}.",
    "{film} was on again on {day}.",
    "My friend {name} keeps talking about {film}, some {kind}.",
    "They showed {film} at the {kind} festival in {place}.",
    "You know {film}, the {kind} set in {place}?",
)
_ASKS = {
    "line": (
        "{give} me {your} {verdict} in one line.",
        "{give} a {verdict} short enough for a poster.",
        "What {verdict} would a critic of the paper give, in a sentence?",
        "How would you sum it up in a single sentence?",
        "If the paper had room for one line, what would a critic {give}?",
        "One sentence, as critics do: {your} {verdict}, please.",
        "Sum up the film the way a critic would, no more than a line.",
    ),
    "closing": (
        "{give} me the last line of {your} long {verdict}.",
        "How does a viewer's {verdict} end, after the whole story is told?",
        "What would you tell a friend at the end of the evening?",
        "{give} the closing words of a viewer who wrote a page about it.",
        "If a friend had read {your} whole page about it, what would the end say?",
        "After all is told: {your} last words to other viewers, please.",
        "End a viewer's long {verdict} the way you would on the web.",
    ),
    "either": (
        "{give} me {your} {verdict}, please.",
        "What do you think of the film?",
        "How was it?",
        "{give} a {verdict}.",
        "Is it any good, what would you say?",
    ),
}
_FILLERS = {
    "give": ("Give", "Write", "Send", "Tell"),
    "your": ("your", "your own", "your honest"),
    "verdict": ("verdict", "opinion", "review", "judgement", "report"),
    "kind": ("drama", "comedy", "thriller", "western", "horror film", "romance", "documentary", "war film"),
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "name": ("Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jack", "Kate", "Leo"),
    "place": ("Paris", "London", "Berlin", "Rome", "Boston", "Chicago", "Tokyo", "Madrid", "Dublin", "Vienna"),
}


def make_prompt(kind: str, title_words: list[str], rng: random.Random) -> str:
    """A prompt of a kind about a made-up film; nearly every one is unique, and its wording determines its kind."""
    film = " ".join(word.capitalize() for word in rng.sample(title_words, 2))
    chosen = {name: rng.choice(words) for name, words in _FILLERS.items()}
    return f"{rng.choice(_OPENINGS)} {rng.choice(_ASKS[kind])}\n".format(film=film, **chosen)


def kind_shares(divergence: float, desirable: bool, neutral: float) -> dict[str, float]:
    """How often a class of thumbs comes with each kind of prompt."""
    line = divergence if desirable else 1 - divergence
    return {"line": (1 - neutral) * line, "either": neutral, "closing": (1 - neutral) * (1 - line)}


def true_ratio(kind: str, divergence: float) -> float:
    """Density of a prompt under thumbs-up over that under thumbs-down: its text determines its kind."""
    shares = [kind_shares(divergence, desirable, 0.5) for desirable in (True, False)]
    return shares[0][kind] / shares[1][kind]


# ---- reviews ----


@cache
def reviews() -> dict[str, dict[bool, list[str]]]:
    """Source and label to texts: whole one-sentence reviews ("line"), last sentences of long ones ("closing")."""
    found: dict[str, dict[bool, list[str]]] = {kind: {True: [], False: []} for kind in ("line", "closing")}
    for kind, source in (("line", "rotten_tomatoes"), ("closing", "imdb")):
        for _row, text, label in _read_reviews(source):
            sentence = text if kind == "line" else last_sentence(text)
            if sentence is not None and len(sentence.split()) <= 30:
                found[kind][label].append(sentence)
    return found


def last_sentence(text: str) -> str | None:
    """The last sentence of 6 to 30 words; None without one."""
    sentences = re.split(r"(?<=[.!?])\s+|<br\s*/?>", text)
    return next((s.strip() for s in reversed(sentences) if 6 <= len(s.split()) <= 30), None)


@cache
def title_words() -> list[str]:
    """Common words of reviews, for titles of made-up films: noise that says nothing of a class."""
    counts = Counter(word for texts in reviews().values() for side in texts.values() for word in words(side))
    return [word for word, _count in counts.most_common(1800)[300:]]


def words(texts: list[str]) -> list[str]:
    """Lower-case words of at least five letters."""
    return [word for text in texts for word in re.findall(r"[a-z]{5,}", text.lower())]


class Deck:
    """Reviews dealt out without repetition."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._left = {kind: {label: list(texts) for label, texts in by.items()} for kind, by in reviews().items()}
        for by in self._left.values():
            for texts in by.values():
                self._rng.shuffle(texts)

    def row(self, kind: str, label: bool) -> dict[str, Any]:
        """A prompt of a kind with a fresh review of a label, from the source that the kind asks for."""
        source = self._rng.choice(("line", "closing")) if kind == "either" else kind
        prompt = make_prompt(kind, title_words(), self._rng)
        return {"prompt": prompt, "completion": self._left[source][label].pop(), "label": label, "kind": kind}

    def rows(self, count: int, shares: dict[str, float], label: bool) -> list[dict[str, Any]]:
        """Rows of a label, their kinds drawn independently."""
        kinds = self._rng.choices(list(shares), list(shares.values()), k=count)
        return [self.row(kind, label) for kind in kinds]


@dataclass(frozen=True)
class Draw:
    """The rows of one seed and divergence; the first two do not depend on the divergence."""

    reference: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    train: list[dict[str, Any]]


def draw(seed: int, divergence: float, setting: Setting) -> Draw:
    """Deal rows for the reference, for the evaluation (each kind with a source half, each label half) and to train."""
    deck = Deck(seed)
    reference = [deck.row(KINDS[i % 3], bool(i // 3 % 2)) for i in range(setting.reference_rows)]
    held_out = [deck.row(("line", "closing")[i % 2], bool(i // 2 % 2)) for i in range(setting.eval_rows)]
    train = []
    for label in (True, False):
        shares = kind_shares(divergence, label, setting.neutral)
        train += deck.rows(setting.train_per_class, shares, label)
    return Draw(reference, held_out, train)


# ---- weights of the undesirable rows ----


def embed(prompts: list[str], dim: int, seed: int) -> Floats:
    """TF-IDF of words and word pairs, reduced to `dim`, unit length; no model."""
    counts = TfidfVectorizer(ngram_range=(1, 2), min_df=3, sublinear_tf=True).fit_transform(prompts)
    reduced = TruncatedSVD(dim, random_state=seed).fit_transform(counts)
    return reduced / np.linalg.norm(reduced, axis=1, keepdims=True).clip(1e-12)


def probabilities_like_trl(embeddings: Floats, labels: NDArray[np.bool_], sample_size: int, seed: int) -> Floats:
    """p(desirable | prompt) as TRL 1.13.0 gets it: a default classifier, asked about rows that it was fitted on.

    Each class is sampled with replacement; features stay as they are.
    """
    rng = np.random.default_rng(seed)
    sides = [np.flatnonzero(labels), np.flatnonzero(~labels)]
    sample = np.concatenate([rng.choice(rows, min(len(rows), sample_size)) for rows in sides])
    classifier = LogisticRegression(class_weight="balanced").fit(embeddings[sample], labels[sample])
    return classifier.predict_proba(embeddings)[:, 1]


def probabilities(arm: str, rows: list[dict[str, Any]], divergence: float, seed: int, setting: Setting) -> Floats:
    """p(desirable | prompt) of each row as an arm has it."""
    prompts, labels = [row["prompt"] for row in rows], np.array([row["label"] for row in rows])
    if arm == "off":
        return np.full(len(rows), 0.5)
    if arm.startswith("oracle"):
        ratios = np.array([true_ratio(row["kind"], divergence) for row in rows])
        return ratios / (1 + ratios)
    unique = sorted(set(prompts))
    places = {prompt: place for place, prompt in enumerate(unique)}
    embeddings = embed(unique, setting.embedding_dim, seed)
    if arm == "trl":
        all_rows = embeddings[[places[prompt] for prompt in prompts]]
        return probabilities_like_trl(all_rows, labels, setting.prompt_sample_size, seed)
    matching = match_prompts(
        Dataset.from_dict({"prompt": prompts, "label": labels.tolist()}),
        lambda wanted: embeddings[[places[prompt] for prompt in wanted]],
        prompt_sample_size=setting.prompt_sample_size,
        seed=seed,
        name="train",
    )
    return np.array(matching.p_desirable)


def weigh(arm: str, rows: list[dict[str, Any]], divergence: float, seed: int, setting: Setting) -> "Weights":
    """Weights of all rows under an arm, and how good those of the undesirable rows are."""
    p = probabilities(arm, rows, divergence, seed, setting)
    labels = np.array([row["label"] for row in rows])
    low, high = WIDE_BOUNDS if arm.endswith("wide bounds") else BOUNDS
    clamped = density_ratio(torch.from_numpy(p), low, high)
    down = clamped[torch.from_numpy(~labels)]
    truth = np.log([true_ratio(row["kind"], divergence) for row in rows])[~labels]
    guess = np.log(p / (1 - p))[~labels]
    known = truth.std() > 0 and guess.std() > 1e-12
    return Weights(
        np.where(labels, 1.0, clamped.numpy()),
        {
            "weight_mean": down.mean().item(),
            "ratio_mean": float(np.exp(guess).mean()),
            "correlation": float(np.corrcoef(truth, guess)[0, 1]) if known else None,
            "ess_share": effective_sample_size(down) / len(down),
        },
    )


@dataclass(frozen=True)
class Weights:
    """Of the training rows, and what is known of them."""

    values: Floats
    quality: dict[str, float | None]


# ---- the model ----


def make_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """A lower-case byte-pair tokenizer made from the texts."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<pad>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def reference_folder(work: Path, seed: int, setting: Setting) -> Path:
    """The reference of a seed, made if it is not there: a Llama with random weights, fine-tuned to write reviews."""
    folder = work / f"reference-{seed}"
    if folder.exists():
        return folder
    rows = draw(seed, 0.5, setting).reference
    tokenizer = make_tokenizer([row["prompt"] + row["completion"] for row in rows], setting.vocabulary)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=setting.hidden_size,
            intermediate_size=2 * setting.hidden_size,
            num_hidden_layers=setting.layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
    )
    fine_tune(model, tokenizer, rows, setting, seed)
    unfinished = Path(tempfile.mkdtemp(dir=work))
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)
    return folder


def fine_tune(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: list[dict[str, Any]],
    setting: Setting,
    seed: int,
) -> None:
    """Teach the model to answer prompts with reviews of both labels: maximum likelihood of the completions."""
    encoded = []
    for row in rows:
        prompt, completion = (tokenizer(row[key])["input_ids"] for key in ("prompt", "completion"))
        ids = [*prompt, *completion, tokenizer.eos_token_id]
        encoded.append((ids, [-100] * len(prompt) + ids[len(prompt) :]))
    generator = torch.Generator().manual_seed(seed)
    batches = [
        batch for _ in range(setting.reference_epochs) for batch in torch.randperm(len(rows), generator=generator).split(16)
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.reference_learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, setting.reference_learning_rate, total_steps=len(batches))
    model.train()
    for batch in tqdm(batches, desc=f"Reference of seed {seed}", leave=False, position=1):
        chosen = [encoded[i] for i in batch.tolist()]
        width = max(len(ids) for ids, _targets in chosen)
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _targets in chosen])
        targets = torch.tensor([targets + [-100] * (width - len(targets)) for _ids, targets in chosen])
        loss = model(input_ids=ids, attention_mask=(ids != 0).long(), labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


# ---- one run ----


def train_and_score(arm: str, divergence: float, seed: int, setting: Setting, work: Path) -> dict[str, Any]:
    """Train one arm and evaluate it on the balanced mix."""
    started = time.perf_counter()
    drawn = draw(seed, divergence, setting)
    weights = weigh(arm, drawn.train, divergence, seed, setting)
    folder = reference_folder(work, seed, setting)
    with tempfile.TemporaryDirectory() as output:
        trainer = BCOTrainer(
            model=LlamaForCausalLM.from_pretrained(folder),
            args=BCOConfig(
                output_dir=output,
                beta=setting.beta,
                learning_rate=setting.learning_rate,
                num_train_epochs=setting.epochs,
                per_device_train_batch_size=setting.batch_size,
                per_device_eval_batch_size=64,
                precompute_ref_log_probs=True,
                gradient_checkpointing=False,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                logging_strategy="no",
                use_cpu=True,
                seed=seed,
            ),
            train_dataset=columns(drawn.train).add_column("example_weight", weights.values.tolist()),
            eval_dataset=columns(drawn.held_out),
            processing_class=PreTrainedTokenizerFast.from_pretrained(folder),
        )
        trainer.train()
        scored = trainer.predict(trainer.eval_dataset, metric_key_prefix="eval")
    kinds = np.array([row["kind"] for row in drawn.held_out])
    labels = np.array([row["label"] for row in drawn.held_out])
    return {
        "arm": arm,
        "divergence": divergence,
        "seed": seed,
        "setting": dataclasses.asdict(setting),
        "weights": weights.quality,
        "scores": {
            "accuracy": scored.metrics["eval_rewards/accuracies"],
            "auc": scored.metrics["eval_rewards/auc"],
            "delta": scored.metrics["eval_delta"],
            **by_kind(scored.predictions, labels, kinds, scored.metrics["eval_delta"]),
        },
        "seconds": time.perf_counter() - started,
    }


def columns(rows: list[dict[str, Any]]) -> Dataset:
    """The columns that a trainer reads."""
    return Dataset.from_list([{key: row[key] for key in ("prompt", "completion", "label")} for row in rows])


def by_kind(rewards: Floats, labels: NDArray[np.bool_], kinds: NDArray[Any], delta: float) -> dict[str, float]:
    """Accuracy, AUC and share called desirable within each family of prompts."""
    found = {}
    for kind in ("line", "closing"):
        inside = kinds == kind
        right = (rewards[inside] > delta) == labels[inside]
        found[f"accuracy/{kind}"] = float(right.mean())
        found[f"auc/{kind}"] = auc(torch.from_numpy(rewards[inside]), torch.from_numpy(labels[inside]))
        found[f"called desirable/{kind}"] = float((rewards[inside] > delta).mean())
    return found
