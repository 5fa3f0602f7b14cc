"""The model card: from what, on what, how and how well a model was trained, as the README.md beside its weights."""

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from huggingface_hub import ModelCard, ModelCardData

from bco_lab.files import write_text

logger = logging.getLogger(__name__)

CARD = "README.md"
TAGS = ("bco", "bco-lab")
CITATION = """\
@misc{jung2024binary,
  title         = {Binary Classifier Optimization for Large Language Model Alignment},
  author        = {Jung, Seungjae and Han, Gunsoo and Nam, Daniel Wontae and On, Kyoung-Woon},
  year          = {2024},
  eprint        = {2404.04656},
  archivePrefix = {arXiv}
}"""

_BEGIN = "<!-- bco-lab: begin. Text outside of begin and end is kept when this card is written again. -->"
_END = "<!-- bco-lab: end -->"
_OURS = re.compile(r"<!-- bco-lab: begin.*?-->.*?<!-- bco-lab: end -->", re.DOTALL)
# What saving a PEFT model adds to a card, its own empty template included.
_ADDED_BY_PEFT = re.compile(r"^(### Framework versions|- PEFT .*|## Training procedure)?$")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_DATA_FILES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".gz", ".zst")
_LIBRARIES = (
    ("bco-lab", "bco-lab"),
    ("PEFT", "peft"),
    ("Transformers", "transformers"),
    ("PyTorch", "torch"),
    ("Datasets", "datasets"),
    ("Tokenizers", "tokenizers"),
)
_TIMES = ("_runtime", "_samples_per_second", "_steps_per_second")


@dataclass(frozen=True)
class TrainingData:
    """What a model was trained on.

    Attributes:
        names: Hub ids, or names of files; files are named without their folders.
        desirable: Rows with a thumbs-up; None where nobody counted, as in a stream.
        undesirable: Rows with a thumbs-down, or None.
        weighted: Whether the rows carried example weights.
        details: Further words about the data, such as the configuration of a hub data set.
    """

    names: tuple[str, ...] = ()
    desirable: int | None = None
    undesirable: int | None = None
    weighted: bool = False
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class CardFacts:
    """What a model card says.

    Attributes:
        name: Of the model.
        base_model: Hub id or folder of the model that was aligned; None if it has no name.
        repository: Hub id that the model is pushed to, or None.
        adapter: Name of the PEFT adapter that was trained; None if all weights were.
        encoder_decoder: Whether the model is one.
        data: What it was trained on.
        settings: Name to value of the hyperparameters, see `training_settings`.
        metrics: Name to value of the final evaluation, see `final_metrics`; what is not finite is shown as a dash.
        header: Further metadata of the hub, such as `license` and `language`; `tags` are added to those of the method.
    """

    name: str
    base_model: str | None = None
    repository: str | None = None
    adapter: str | None = None
    encoder_decoder: bool = False
    data: TrainingData = TrainingData()
    settings: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    header: Mapping[str, Any] = field(default_factory=dict)


# ---- facts ----


def describe_data(rows: Any, names: str | Iterable[str] | None = None, details: Any = None) -> TrainingData:
    """Count the labels of prepared training rows; a stream is not counted.

    Args:
        rows: The prepared training set, a stream, or None.
        names: Of the data sets.
        details: Further words about them.
    """
    named = TrainingData(names=_listed(names), details=_listed(details))
    if not isinstance(rows, Dataset):
        return named
    labels = rows["label"][:]
    desirable = sum(map(bool, labels))
    weighted = "example_weight" in rows.column_names
    return replace(named, desirable=desirable, undesirable=len(labels) - desirable, weighted=weighted)


def training_settings(
    args: Any, state: Any, *, processes: int, optimizer: Any | None = None, peft_config: Any | None = None
) -> dict[str, Any]:
    """The hyperparameters that decide what a run computes, as a card shows them.

    Args:
        args: The BCOConfig of the run.
        state: The TrainerState: epochs and optimizer steps done.
        processes: How many took part.
        optimizer: What took the steps; None: not mentioned.
        peft_config: The adapter's configuration, or None.
    """
    sizes = (args.per_device_train_batch_size, args.gradient_accumulation_steps, processes)
    decay = f", decay {args.reward_shift_decay}" if args.reward_shift == "ema" else ""
    precision = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    settings = {
        "beta": args.beta,
        "reward_shift": args.reward_shift + decay,
        "loss_reduction": args.loss_reduction,
        "density ratio": f"{args.min_density_ratio} to {args.max_density_ratio}",
        "learning_rate": args.learning_rate,
        "schedule": getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type),
        "optimizer": type(getattr(optimizer, "optimizer", optimizer)).__name__ if optimizer is not None else None,
        "batch size": f"{math.prod(sizes)} = {sizes[0]} per device × {sizes[1]} accumulated × {sizes[2]} processes",
        "epochs": f"{state.epoch or 0:.4g}",
        "steps": state.global_step,
        "max_length": args.max_length,
        "max_completion_length": args.max_completion_length,
        "truncation": args.truncation if args.max_length is not None else None,
        "mixed precision": precision,
        "seed": args.seed,
    }
    return {name: value for name, value in {**settings, **_adapter_settings(peft_config)}.items() if value is not None}


def _adapter_settings(peft_config: Any | None) -> dict[str, Any]:
    if peft_config is None:
        return {}
    targets = getattr(peft_config, "target_modules", None)
    kind = peft_config.peft_type
    return {
        "adapter": getattr(kind, "value", kind),
        "rank": getattr(peft_config, "r", None),
        "alpha": getattr(peft_config, "lora_alpha", None),
        "adapter dropout": getattr(peft_config, "lora_dropout", None),
        "adapted modules": targets if isinstance(targets, str | None) else ", ".join(sorted(targets)),
    }


def final_metrics(log_history: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """The last value of each evaluation metric, without the prefix `eval_`; timings are left out."""
    last = {key: value for entry in log_history for key, value in entry.items() if key.startswith("eval_")}
    return {key.removeprefix("eval_"): value for key, value in last.items() if not key.endswith(_TIMES)}


def is_hub_id(name: str) -> bool:
    """Whether a name can only be that of a repository on the hub: nothing local has it, nor is it a path."""
    return bool(_HUB_ID.fullmatch(name)) and not name.endswith(_DATA_FILES) and not Path(name).exists()


# ---- the card ----


def model_card(facts: CardFacts) -> str:
    """A whole card, YAML header and text. No folder of this machine is named in it."""
    return _joined(_header(facts), f"\n{_text(facts)}\n")


def write_model_card(folder: Path, facts: CardFacts) -> Path:
    """Write `README.md`, keeping what someone else wrote in it.

    The text of bco-lab stands between two comments. A card that has them gets a new text between them, and the rest of
    it stays. To a card without them the text is added at the end, unless it is the empty template that saving a PEFT
    model leaves: that is replaced. In the header, keys that the facts do not speak of stay and tags are joined, but
    local paths, which saving a PEFT model writes there, go.

    Returns:
        The path of the card.
    """
    path = folder / CARD
    header, text = _header(facts), _text(facts)
    old_header, old_text = _read(path) if path.is_file() else ({}, "")
    write_text(path, _joined(_merged(old_header, header), _placed(old_text, text)))
    return path


def _joined(header: Mapping[str, Any], text: str) -> str:
    return f"---\n{ModelCardData(**header, ignore_metadata_errors=True).to_yaml()}\n---\n{text.rstrip()}\n"


def _header(facts: CardFacts) -> dict[str, Any]:
    base_model = facts.base_model if facts.base_model and is_hub_id(facts.base_model) else None
    header = {
        "library_name": "transformers" if facts.adapter is None else "peft",
        "model_name": _shown(facts.name),
        "base_model": base_model,
        "datasets": [name for name in facts.data.names if is_hub_id(name)] or None,
        "pipeline_tag": None if facts.encoder_decoder else "text-generation",
        **{key: value for key, value in facts.header.items() if value is not None},
        "tags": [*dict.fromkeys((*TAGS, *_listed(facts.header.get("tags"))))],
    }
    return {key: value for key, value in header.items() if value is not None}


def _text(facts: CardFacts) -> str:
    parts = (
        _introduction(facts),
        _usage(facts),
        _training(facts),
        _evaluation(facts.metrics),
        _versions(facts),
        f"## Citation\n\n```bibtex\n{CITATION}\n```",
    )
    return "\n\n".join((_BEGIN, *(part for part in parts if part), _END))


def _introduction(facts: CardFacts) -> str:
    base = "a model without a name"
    if facts.base_model:
        base = _shown(facts.base_model)
        base = f"[{base}](https://huggingface.co/{base})" if is_hub_id(facts.base_model) else f"`{base}` (a local copy)"
    part = "All weights were trained." if facts.adapter is None else "An adapter was trained, the base stayed as it is."
    return (
        f"# {_shown(facts.name)}\n\n"
        f"{base}, aligned with thumbs-up and thumbs-down by Binary Classifier Optimization "
        f"([arXiv 2404.04656](https://arxiv.org/abs/2404.04656)). {part}"
    )


def _usage(facts: CardFacts) -> str:
    auto = "AutoModelForSeq2SeqLM" if facts.encoder_decoder else "AutoModelForCausalLM"
    where = facts.repository or _shown(facts.name)
    base = _shown(facts.base_model or "BASE_MODEL")
    if facts.adapter is None:
        lines = [
            f"from transformers import {auto}, AutoTokenizer",
            "",
            f'model = {auto}.from_pretrained("{where}")',
        ]
    else:
        subfolder = "" if facts.adapter == "default" else f', subfolder="{facts.adapter}"'
        lines = [
            "from peft import PeftModel",
            f"from transformers import {auto}, AutoTokenizer",
            "",
            f'base = {auto}.from_pretrained("{base}")',
            f'model = PeftModel.from_pretrained(base, "{where}"{subfolder})',
        ]
    lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{where}")')
    return "\n".join(["## How to load it", "", "```python", *lines, "```"])


def _training(facts: CardFacts) -> str:
    settings = {k: v for k, v in facts.settings.items() if k != "density ratio" or facts.data.weighted}
    method = (
        "The implicit reward of a completion is r = β · (log π(y|x) − log π_ref(y|x)). A completion with a thumbs-up "
        "has the loss −w · log σ(r − δ), one with a thumbs-down −w · log σ(δ − r); δ is the reward shift."
    )
    parts = ["## Training", _data(facts.data), method]
    return "\n\n".join([*parts, _table("setting", settings)] if settings else parts)


def _data(data: TrainingData) -> str:
    names = ", ".join(f"`{_shown(name)}`" for name in data.names)
    described = " ".join(part for part in (names, f"({', '.join(data.details)})" if data.details else "") if part)
    if data.desirable is None or data.undesirable is None:
        counts = "rows not counted (a stream)"
    else:
        rows = data.desirable + data.undesirable
        counts = (
            f"{rows} rows, {data.desirable} desirable ({data.desirable / max(rows, 1):.0%}) and "
            f"{data.undesirable} undesirable ({data.undesirable / max(rows, 1):.0%})"
        )
    return f"Data: {described + ': ' if described else ''}{counts}{', weighted' if data.weighted else ''}."


def _evaluation(metrics: Mapping[str, float | None]) -> str:
    if not metrics:
        return ""
    return (
        "## Evaluation\n\n"
        "Rewards, log-probs and the loss are in nats. `rewards/accuracies` is the share of rows on the right side of "
        "δ, `rewards/auc` the probability that a desirable row has a larger reward than an undesirable one.\n\n"
        f"{_table('metric', {key: _figure(value) for key, value in metrics.items()})}"
    )


def _versions(facts: CardFacts) -> str:
    lines = []
    for shown, package in _LIBRARIES:
        if package != "peft" or facts.adapter is not None:
            try:
                lines.append(f"- {shown} {version(package)}")
            except PackageNotFoundError:  # run from a source tree that was never installed
                continue
    # PEFT looks for exactly this heading and line, and adds its own where they are missing.
    return "\n".join(["### Framework versions", "", *lines])


def _table(first: str, rows: Mapping[str, Any]) -> str:
    cells = [(str(name), str(value).replace("|", "\\|")) for name, value in rows.items()]
    return "\n".join([f"| {first} | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in cells)])


def _figure(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return str(round(value)) if value == round(value) and abs(value) < 1e6 else f"{value:.4g}"


def _shown(name: str) -> str:
    """A name as it may be published: of a local path its last part, anything else whole."""
    if name.startswith(("package://", "hf://", "https://")) or is_hub_id(name):
        return name
    return re.split(r"[\\/]", name.rstrip("\\/"))[-1]


def _listed(value: Any) -> tuple[str, ...]:
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)


# ---- a card that is there already ----


def _read(path: Path) -> tuple[dict[str, Any], str]:
    """Header and text of a card; where the header cannot be read, all of it is text."""
    content = path.read_text(encoding="utf-8-sig")
    try:
        card: Any = ModelCard(content, ignore_metadata_errors=True)
        return card.data.to_dict(), card.text
    except (yaml.YAMLError, ValueError, TypeError) as error:
        logger.warning("%s: the header is not valid, it is kept as text (%s)", path, " ".join(str(error).split()))
        return {}, f"\n{content}"


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in old.items() if key not in ("base_model", "datasets", "tags")}
    for key in ("base_model", "datasets"):
        names = [name for name in _listed(old.get(key)) if is_hub_id(name)]
        if names:
            kept[key] = names if isinstance(old[key], list) else names[0]
    tags = [tag for tag in _listed(old.get("tags")) if not _names_a_path(tag)]
    return {**kept, **new, "tags": [*dict.fromkeys([*new["tags"], *tags])]}


def _names_a_path(tag: str) -> bool:
    """Whether it is the tag that PEFT makes of a base model in a local folder."""
    return tag.startswith("base_model:") and not is_hub_id(tag.rsplit(":", 1)[-1])


def _placed(old: str, text: str) -> str:
    if _OURS.search(old):
        return _OURS.sub(lambda _: text, old, count=1)
    if not old.strip() or _is_empty_template(old):
        return f"\n{text}\n"
    return f"{old.rstrip()}\n\n{text}\n"


def _is_empty_template(text: str) -> bool:
    template = set(ModelCard.from_template(ModelCardData()).text.splitlines())
    return all(line in template or _ADDED_BY_PEFT.match(line) for line in text.splitlines())
