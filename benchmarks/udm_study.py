"""Does underlying distribution matching (UDM) help? Thumbs from different prompts, real film reviews, a small model.

    python benchmarks/udm_study.py --seeds 6 --divergence 0.5 0.7 0.9

Trains each arm with `BCOTrainer` on the same rows from the same model in the same order; only the weights of the
undesirable rows differ. A finished run is a line in a file and is not run again. Writes figures, table and plot into
docs/; docs/udm-study.md says what is measured and why.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
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
import transformers
from datasets import Dataset
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import stats
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback

from bco_lab import BCOConfig, BCOTrainer
from bco_lab.data.reviews import _read_reviews
from bco_lab.density_ratio import density_ratio, effective_sample_size
from bco_lab.metrics import auc
from bco_lab.udm import match_prompts

Floats = NDArray[np.float64]

# ---- the setting ----

KINDS = ("line", "either", "closing")
FAMILIES = ("line", "closing")
BOUNDS = (0.5, 10.0)  # what TRL and BCOConfig clamp the weights to unless told otherwise
WIDE_BOUNDS = (0.05, 20.0)  # hold every true ratio of this study


@dataclass(frozen=True)
class Arm:
    """One way of weighing the undesirable rows: where p(desirable | prompt) comes from, and the clamp."""

    name: str
    source: str
    bounds: tuple[float, float] = BOUNDS


ARMS = (
    Arm("UDM off", "off"),
    Arm("TRL's weights", "trl"),
    Arm("UDM as built here", "ours"),
    Arm("true ratio", "oracle"),
    Arm("UDM as built here, wide clamp", "ours", WIDE_BOUNDS),
    Arm("true ratio, wide clamp", "oracle", WIDE_BOUNDS),
)
OFF = ARMS[0].name


def arms_at(divergence: float) -> list[Arm]:
    """What is run: without divergence the true ratio is UDM off; a wide clamp is for ratios far outside the usual."""
    ratio = true_ratio("closing", divergence)
    return [
        arm
        for arm in ARMS
        if not (arm.source == "oracle" and ratio == 1) and not (arm.bounds == WIDE_BOUNDS and ratio > BOUNDS[0] / 2)
    ]


@dataclass(frozen=True)
class Setting:
    """What every run of the study shares; chosen with UDM off, on seeds that the study does not use."""

    neutral: float = 0.2  # share of prompts that may be answered by either source, in both classes
    train_per_class: int = 1500
    eval_rows: int = 2000
    reference_rows: int = 6000
    reference_epochs: int = 3
    reference_learning_rate: float = 3e-3
    vocabulary: int = 4096
    hidden_size: int = 64
    layers: int = 2
    embedding_dim: int = 128
    prompt_sample_size: int = 1024
    beta: float = 0.3
    learning_rate: float = 1e-3
    epochs: int = 2
    batch_size: int = 32


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


@dataclass(frozen=True)
class Weights:
    """Of the training rows, and what is known of those of the undesirable ones."""

    values: Floats
    quality: dict[str, float | None]


def weigh(arm: Arm, rows: list[dict[str, Any]], divergence: float, seed: int, setting: Setting) -> Weights:
    """Weights of all rows under an arm, and how good those of the undesirable rows are."""
    p, classifier = probabilities(arm.source, rows, divergence, seed, setting)
    labels = np.array([row["label"] for row in rows])
    clamped = density_ratio(torch.from_numpy(p), *arm.bounds)
    down = clamped[torch.from_numpy(~labels)]
    truth = np.log([true_ratio(row["kind"], divergence) for row in rows])[~labels]
    guess = np.log(p / (1 - p))[~labels]
    both_vary = truth.std() > 1e-9 and guess.std() > 1e-9
    quality: dict[str, float | None] = {
        "mean weight": down.mean().item(),
        "mean ratio": float(np.exp(guess).mean()),
        "correlation": float(np.corrcoef(truth, guess)[0, 1]) if both_vary else None,
        "ess": effective_sample_size(down) / len(down),
        "raised": float((guess < np.log(arm.bounds[0])).mean()),
    }
    return Weights(np.where(labels, 1.0, clamped.numpy()), {**quality, **classifier})


def probabilities(
    source: str, rows: list[dict[str, Any]], divergence: float, seed: int, setting: Setting
) -> tuple[Floats, dict[str, float | None]]:
    """p(desirable | prompt) of each row, and what a cross-fitted classifier says of itself."""
    if source == "off":
        return np.full(len(rows), 0.5), {}
    if source == "oracle":
        ratios = np.array([true_ratio(row["kind"], divergence) for row in rows])
        return ratios / (1 + ratios), {}
    prompts, labels = [row["prompt"] for row in rows], np.array([row["label"] for row in rows])
    unique = sorted(set(prompts))
    of_prompt = dict(zip(unique, embed(unique, setting.embedding_dim, seed), strict=True))
    if source == "trl":
        embeddings = np.stack([of_prompt[prompt] for prompt in prompts])
        return probabilities_like_trl(embeddings, labels, setting.prompt_sample_size, seed), {}
    matching = match_prompts(
        Dataset.from_dict({"prompt": prompts, "label": labels.tolist()}),
        lambda wanted: np.stack([of_prompt[prompt] for prompt in wanted]),
        prompt_sample_size=setting.prompt_sample_size,
        seed=seed,
        name="train",
    )
    found = matching.fit.diagnostics
    return np.array(matching.p_desirable), {"auc": found.auc, "auc low": found.auc_low, "auc high": found.auc_high}


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


def make_reference(seed: int, setting: Setting, work: Path) -> Path:
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
        batch
        for _ in range(setting.reference_epochs)
        for batch in torch.randperm(len(rows), generator=generator).split(16)
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.reference_learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, setting.reference_learning_rate, total_steps=len(batches))
    model.train()
    for batch in tqdm(batches, desc=f"Reference of seed {seed}", leave=False):
        chosen = [encoded[i] for i in batch.tolist()]
        width = max(len(ids) for ids, _targets in chosen)
        input_ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _targets in chosen])
        targets = torch.tensor([targets + [-100] * (width - len(targets)) for _ids, targets in chosen])
        loss = model(input_ids=input_ids, attention_mask=(input_ids != 0).long(), labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


# ---- one run ----


def train_and_score(arm: Arm, divergence: float, seed: int, setting: Setting, work: Path) -> dict[str, Any]:
    """Train one arm and evaluate it on the balanced mix."""
    started = time.perf_counter()
    drawn = draw(seed, divergence, setting)
    weights = weigh(arm, drawn.train, divergence, seed, setting)
    folder = make_reference(seed, setting, work)
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
                logging_strategy="no",
                disable_tqdm=True,
                use_cpu=True,
                seed=seed,
            ),
            train_dataset=columns(drawn.train).add_column("example_weight", weights.values.tolist()),
            eval_dataset=columns(drawn.held_out),
            processing_class=PreTrainedTokenizerFast.from_pretrained(folder),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        scored = trainer.predict(trainer.eval_dataset, metric_key_prefix="eval")
    delta = scored.metrics["eval_delta"]
    return {
        "arm": arm.name,
        "divergence": divergence,
        "seed": seed,
        "scores": {
            "accuracy": scored.metrics["eval_rewards/accuracies"],
            "auc": scored.metrics["eval_rewards/auc"],
            "delta": delta,
            **scores_by_family(scored.predictions - delta, drawn.held_out),
        },
        "weights": weights.quality,
        "seconds": time.perf_counter() - started,
    }


def columns(rows: list[dict[str, Any]]) -> Dataset:
    """The columns that a trainer reads."""
    return Dataset.from_list([{key: row[key] for key in ("prompt", "completion", "label")} for row in rows])


def scores_by_family(shifted: Floats, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Accuracy and AUC within each family, their mean AUC, and by how much more one family is called desirable."""
    labels, kinds = np.array([row["label"] for row in rows]), np.array([row["kind"] for row in rows])
    found: dict[str, float] = {}
    called = {}
    for family in FAMILIES:
        inside = kinds == family
        called[family] = (shifted[inside] > 0).mean()
        found[f"accuracy {family}"] = float(((shifted[inside] > 0) == labels[inside]).mean())
        found[f"auc {family}"] = auc(torch.from_numpy(shifted[inside]), torch.from_numpy(labels[inside]))
    found["auc within"] = sum(found[f"auc {family}"] for family in FAMILIES) / len(FAMILIES)
    found["prompt bias"] = float(called["line"] - called["closing"])
    return found


# ---- all runs ----

Run = tuple[str, float, int]


def run_all(
    seeds: list[int], divergences: list[float], setting: Setting, work: Path, workers: int
) -> list[dict[str, Any]]:
    """Run what has not been run yet; return the records of all runs asked for."""
    wanted = [(arm, divergence, seed) for seed in seeds for divergence in divergences for arm in arms_at(divergence)]
    log = work / "runs.jsonl"
    left = [run for run in wanted if (run[0].name, *run[1:]) not in read_log(log)]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=be_quiet) as pool:
        first = {pool.submit(make_reference, seed, setting, work): seed for seed in sorted({run[2] for run in left})}
        for done in tqdm(as_completed(first), desc="References", total=len(first)):
            done.result()
        later = [pool.submit(train_and_score, *run, setting, work) for run in left]
        for finished in tqdm(as_completed(later), desc="Runs", total=len(wanted), initial=len(wanted) - len(left)):
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finished.result()) + "\n")
    records = read_log(log)
    return [records[arm.name, divergence, seed] for arm, divergence, seed in wanted]


def read_log(log: Path) -> dict[Run, dict[str, Any]]:
    """Finished runs; a line that was cut short when the study was stopped does not count."""
    found = {}
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            found[record["arm"], record["divergence"], record["seed"]] = record
    return found


def be_quiet() -> None:
    """Leave the terminal to the bar of the study; what goes wrong in a run comes back as an exception."""
    sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115  for as long as the process lives
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


# ---- what came out ----


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with the half-width of its 95% interval (Student's t)."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: list[float]) -> "Interval":
        """Of one value per seed."""
        error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
        return cls(float(np.mean(values)), float(stats.t.ppf(0.975, len(values) - 1) * error))

    def text(self, *, signed: bool = False) -> str:
        """Mean and half-width, three digits."""
        mean = f"{self.mean:{'+' if signed else ''}.3f}".replace("-", "−")
        return f"{mean} ± {self.half:.3f}"


Cells = dict[tuple[float, str], dict[str, Interval]]


def summarize(records: list[dict[str, Any]]) -> Cells:
    """Divergence and arm to intervals; `x - off` are paired differences to UDM off on the same seeds."""
    by_seed = {(r["divergence"], r["arm"], r["seed"]): r for r in records}
    cells: Cells = {}
    for divergence, arm in dict.fromkeys((r["divergence"], r["arm"]) for r in records):
        own = [r for r in records if (r["divergence"], r["arm"]) == (divergence, arm)]
        found = {key: Interval.of([r["scores"][key] for r in own]) for key in own[0]["scores"]}
        for key, value in own[0]["weights"].items():
            if value is not None:
                found[f"weights: {key}"] = Interval.of([r["weights"][key] for r in own])
        if arm != OFF:
            pairs = [(r["scores"], by_seed[divergence, OFF, r["seed"]]["scores"]) for r in own]
            found |= {f"{key} - off": Interval.of([a[key] - b[key] for a, b in pairs]) for key in own[0]["scores"]}
        cells[divergence, arm] = found
    return cells


def results_table(cells: Cells) -> str:
    """Scores of each arm and their paired differences to UDM off."""
    shown = {
        "accuracy": "accuracy",
        "accuracy - off": "accuracy − off",
        "auc": "AUC",
        "auc - off": "AUC − off",
        "auc within": "AUC within a family",
        "prompt bias": "prompt bias",
    }
    return _table(cells, shown, lambda arm: True)


def families_table(cells: Cells) -> str:
    """Accuracy and AUC within each family."""
    scores = {"accuracy": "accuracy", "auc": "AUC"}
    shown = {f"{score} {family}": f"{name}, {family}" for family in FAMILIES for score, name in scores.items()}
    return _table(cells, shown, lambda arm: True)


CONTRASTS = (
    ("UDM as built here", "TRL's weights"),
    ("UDM as built here", "true ratio"),
    ("UDM as built here, wide clamp", "UDM as built here"),
    ("UDM as built here, wide clamp", "true ratio, wide clamp"),
)


def contrasts_table(records: list[dict[str, Any]]) -> str:
    """Paired differences between two arms that are not UDM off."""
    by_run = {(r["divergence"], r["arm"], r["seed"]): r["scores"] for r in records}
    lines = ["| divergence | arm | minus | accuracy | AUC |", "|---:|---|---|---:|---:|"]
    for divergence in dict.fromkeys(r["divergence"] for r in records):
        for arm, other in CONTRASTS:
            seeds = [s for d, a, s in by_run if (d, a) == (divergence, arm) and (d, other, s) in by_run]
            if seeds:
                pairs = [(by_run[divergence, arm, seed], by_run[divergence, other, seed]) for seed in seeds]
                found = (Interval.of([a[score] - b[score] for a, b in pairs]) for score in ("accuracy", "auc"))
                cells = " | ".join(interval.text(signed=True) for interval in found)
                lines.append(f"| {divergence:g} | {arm} | {other} | {cells} |")
    return "\n".join(lines)


def weights_table(cells: Cells) -> str:
    """How good the weights are."""
    shown = {
        "weights: mean ratio": "mean ratio",
        "weights: mean weight": "mean weight",
        "weights: correlation": "correlation",
        "weights: ess": "ESS, share of rows",
        "weights: raised": "raised by the clamp, share of rows",
        "weights: auc": "AUC of the classifier",
        "weights: auc low": "its lower end",
    }
    return _table(cells, shown, lambda arm: arm != OFF)


def _table(cells: Cells, shown: dict[str, str], wanted: Callable[[str], bool]) -> str:
    lines = [
        "| divergence | arm | " + " | ".join(shown.values()) + " |",
        "|---:|---|" + "---:|" * len(shown),
    ]
    for (divergence, arm), found in cells.items():
        if wanted(arm):
            values = [found[key].text(signed=key.endswith("- off")) if key in found else "–" for key in shown]
            lines.append(f"| {divergence:g} | {arm} | " + " | ".join(values) + " |")
    return "\n".join(lines)


_COLOURS = ("#333333", "#E69F00", "#0072B2", "#009E73", "#56B4E9", "#AA4499")
_MARKERS = ("o", "s", "D", "^", "d", "v")


def plot(records: list[dict[str, Any]], cells: Cells, path: Path) -> None:
    """Accuracy and AUC of each arm, and below them the paired differences to UDM off."""
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    titles = {"accuracy": "Held-out reward accuracy", "auc": "Held-out reward AUC"}
    grid = figure.subplots(2, 2, sharex=True)
    for axes, (score, title) in zip(grid.T, titles.items(), strict=True):
        for place, key in enumerate((score, f"{score} - off")):
            _panel(axes[place], records if place == 0 else [], cells, key)
            axes[place].set_ylabel(title if place == 0 else "difference to UDM off, paired")
        axes[0].set_title(title)
        axes[0].axhline(0.5, color="#999999", linewidth=1, linestyle=":")
        axes[1].axhline(0, color="#999999", linewidth=1, linestyle=":")
        axes[1].set_xlabel("divergence q (0.5: none)")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle("Does matching help? Mean over seeds with 95% interval, each seed a small dot", fontsize=12)
    figure.savefig(path, dpi=130)


def _panel(axes: Axes, records: list[dict[str, Any]], cells: Cells, key: str) -> None:
    divergences = list(dict.fromkeys(divergence for divergence, _arm in cells))
    present = {d: [arm.name for arm in ARMS if (d, arm.name) in cells] for d in divergences}
    for place, arm in enumerate(ARMS):
        at = [
            (divergence, x + 0.13 * (present[divergence].index(arm.name) - (len(present[divergence]) - 1) / 2))
            for x, divergence in enumerate(divergences)
            if key in cells.get((divergence, arm.name), {})
        ]
        if not at:
            continue
        found = [cells[divergence, arm.name][key] for divergence, _x in at]
        axes.errorbar(
            [x for _d, x in at],
            [interval.mean for interval in found],
            [interval.half for interval in found],
            color=_COLOURS[place],
            marker=_MARKERS[place],
            label=arm.name,
            linestyle="none",
            capsize=3,
        )
        for divergence, x in at:
            dots = [r["scores"][key] for r in records if (r["divergence"], r["arm"]) == (divergence, arm.name)]
            axes.plot([x + 0.045] * len(dots), dots, ".", color=_COLOURS[place], alpha=0.35, markersize=4)
    axes.set_xticks(range(len(divergences)), [f"{divergence:g}" for divergence in divergences])
    axes.set_xlim(-0.5, len(divergences) - 0.5)
    axes.grid(axis="y", alpha=0.3)


def fill(page: Path, tables: str) -> None:
    """Put the tables between the page's two markers; a page that is not there is made of them alone."""
    begin, end = "<!-- tables of benchmarks/udm_study.py -->", "<!-- end of tables -->"
    before, after = "", "\n"
    if page.exists():
        before, rest = page.read_text(encoding="utf-8").split(begin)
        after = rest.split(end)[1]
    page.write_text(f"{before}{begin}\n\n{tables}\n\n{end}{after}", encoding="utf-8")


# ---- the command ----


def main() -> None:
    """Run the study and write what came out."""
    options = parse(sys.argv[1:])
    setting = Setting()
    name = hashlib.sha256(repr(setting).encode()).hexdigest()[:8]  # other settings, other models and runs
    work = options.work / name
    work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    seeds = list(range(options.seeds))
    records = run_all(seeds, options.divergence, setting, work, options.workers)
    cells = summarize(records)
    summary = [
        {"divergence": d, "arm": arm, **{key: dataclasses.asdict(value) for key, value in found.items()}}
        for (d, arm), found in cells.items()
    ]
    content = {"setting": dataclasses.asdict(setting), "seeds": seeds, "summary": summary, "runs": records}
    (options.out / "udm-study.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    tables = "\n\n".join(
        f"{heading}\n\n{table}"
        for heading, table in (
            ("### Held-out scores", results_table(cells)),
            ("### Arm against arm, paired", contrasts_table(records)),
            ("### Within each family", families_table(cells)),
            ("### The weights of the undesirable rows", weights_table(cells)),
        )
    )
    fill(options.out / "udm-study.md", tables)
    plot(records, cells, options.out / "udm-study.png")
    print(tables)
    print(f"\nWritten: udm-study.md, udm-study.json and udm-study.png in {options.out}/; runs are kept in {work}/")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6, help="seeds, from 0 on")
    parser.add_argument("--divergence", type=float, nargs="+", default=[0.5, 0.7, 0.9], help="0.5: none")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of figures, table and plot")
    parser.add_argument("--work", type=Path, default=Path("outputs/udm-study"), help="folder of runs and references")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at once")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
