"""Policy, adapter and tokenizer: everything that turns a name into something that can be trained."""

import copy
import importlib.util
import json
import os
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from bco_lab.cache import cache_folder

PACKAGE_SCHEME = "package://"
DTYPES = ("auto", "float32", "bfloat16", "float16")
_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "*.gguf")


@dataclass(frozen=True)
class Policy:
    """A model to align, with what it needs.

    Attributes:
        model: The language model, not yet wrapped in an adapter.
        tokenizer: Its tokenizer, with a pad token.
        peft_config: The adapter that training puts on it; None trains all weights.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    peft_config: Any | None


@dataclass(frozen=True)
class RandomWeights:
    """A model drawn at random, for trying things out.

    Args:
        config: Configuration of the model; vocabulary and special tokens come from the tokenizer.
        tokenizer: Hub id, folder or `package://` name of a tokenizer.
        seed: Seed of the weights.
    """

    config: PreTrainedConfig
    tokenizer: str
    seed: int = 0


@dataclass(frozen=True)
class PolicySource:
    """Where a policy comes from; checks what can be checked before anything heavy is loaded.

    Args:
        name_or_path: Hub id, local folder, or inside an installed package a folder, `package://MODULE/FOLDER`, or a
            GGUF file, `package://MODULE/FILE.gguf` (converted once to safetensors in the cache). None: `random`.
        random: What to build where `name_or_path` is None.
        tokenizer: Tokenizer to use instead of the model's own; same forms as `name_or_path`.
        revision: Hub branch, tag or commit.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        attn_implementation: `sdpa`, `flash_attention_2`, `eager`; None: the library's choice.
        config_overrides: Model configuration values to change, such as `output_router_logits`.
        chat_template: Jinja chat template, or None for the tokenizer's own.
        quantization: A transformers quantization configuration, or None.
        peft: A PEFT configuration, or None for full fine-tuning.
        trust_remote_code: Run Python code that a model repository ships.

    Raises:
        FileNotFoundError: A local folder without weights, or a package that is not installed.
        ValueError: Neither a name nor a configuration.
    """

    name_or_path: str | None
    random: RandomWeights | None = None
    tokenizer: str | None = None
    revision: str | None = None
    dtype: str = "auto"
    attn_implementation: str | None = None
    config_overrides: dict[str, Any] | None = None
    chat_template: str | None = None
    quantization: Any | None = None
    peft: Any | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype} must be one of {', '.join(DTYPES)}")
        if self.name_or_path is None and self.quantization is not None:
            raise ValueError("model.quantization is for weights that are loaded: give model.name_or_path")
        if self.name_or_path is None and self.random is None:
            raise ValueError("model.name_or_path=null must be a hub id or a folder: model.random is null as well")
        if self.name_or_path is not None:
            check_location(self.name_or_path, weights=True)
        check_location(self._tokenizer_name, weights=False)

    @property
    def _tokenizer_name(self) -> str:
        own = self.name_or_path if self.random is None else self.name_or_path or self.random.tokenizer
        name = self.tokenizer or own
        assert name is not None
        return name

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer alone, in a second or two: rows are tokenised and checked before the model is loaded."""
        tokenizer = load_pretrained(
            AutoTokenizer, self._tokenizer_name, revision=self.revision, trust_remote_code=self.trust_remote_code
        )
        if self.chat_template is not None:
            tokenizer.chat_template = self.chat_template
        return with_pad_token(tokenizer)

    def load_config(self) -> PreTrainedConfig:
        """The model's configuration alone, with the overrides."""
        if self.name_or_path is None:
            assert self.random is not None
            config = copy.deepcopy(self.random.config)
        else:
            config = load_pretrained(
                AutoConfig, self.name_or_path, revision=self.revision, trust_remote_code=self.trust_remote_code
            )
        override_config(config, self.config_overrides)
        return config

    def load(self) -> Policy:
        """Model, tokenizer and adapter configuration, ready for BCOTrainer."""
        tokenizer = self.load_tokenizer()
        model = self._random_model(tokenizer) if self.name_or_path is None else self._pretrained_model()
        return Policy(model, tokenizer, self.adapter_for(model))

    def adapter_for(self, model: PreTrainedModel) -> Any | None:
        """The adapter's configuration; one written for decoders is told if it sits on an encoder-decoder."""
        if self.peft is None or not model.config.is_encoder_decoder or self.peft.task_type != "CAUSAL_LM":
            return self.peft
        adapter = copy.copy(self.peft)
        adapter.task_type = "SEQ_2_SEQ_LM"
        return adapter

    def _pretrained_model(self) -> PreTrainedModel:
        assert self.name_or_path is not None
        name = self.name_or_path
        config = self.load_config()
        options = {"attn_implementation": self.attn_implementation, "quantization_config": self.quantization}
        model, report = load_pretrained(
            auto_class_of(config),
            name,
            output_loading_info=True,
            config=config,
            revision=self.revision,
            dtype=self.dtype,
            trust_remote_code=self.trust_remote_code,
            **{key: value for key, value in options.items() if value is not None},
        )
        if report["missing_keys"]:
            missing = sorted(report["missing_keys"])
            raise ValueError(
                f"model.name_or_path={name} lacks {len(missing)} weights of its config, such as {missing[0]}"
            )
        return model

    def _random_model(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        assert self.random is not None
        config = self.load_config()
        config.vocab_size = len(tokenizer)
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
        override_config(config, self.config_overrides)  # they have the last word
        set_seed(self.random.seed)
        dtype = torch.float32 if self.dtype == "auto" else getattr(torch, self.dtype)
        return auto_class_of(config).from_config(config, dtype=dtype, attn_implementation=self.attn_implementation)


def load_pretrained(auto_class: Any, name: str, **options: Any) -> Any:
    """`from_pretrained` of one of the Auto classes, with the name that was asked for in front of whatever goes wrong.

    Args:
        auto_class: Such as AutoConfig.
        name: Hub id, folder or `package://` name.
        **options: For `from_pretrained`.

    Raises:
        ValueError: It cannot be loaded.
    """
    try:
        return auto_class.from_pretrained(local_name(name), **options)
    # Every library below has errors of its own for damaged files, unknown architectures and closed networks.
    except Exception as error:
        text = " ".join(str(error).split())
        raise ValueError(f"model {name} cannot be loaded ({auto_class.__name__}): {text[:400]}") from error


def override_config(config: PreTrainedConfig, overrides: dict[str, Any] | None) -> None:
    """Change values of a model configuration.

    Raises:
        ValueError: The configuration of this architecture has no such key.
    """
    for key, value in (overrides or {}).items():
        if not hasattr(config, key):
            raise ValueError(f"model.config_overrides.{key}: {type(config).__name__} has no such key")
        setattr(config, key, value)


def check_location(name: str, *, weights: bool) -> None:
    """Fail early on a local model folder that cannot be loaded; hub ids are left to the hub.

    Raises:
        FileNotFoundError: The folder is missing, has no config.json or, where `weights`, no weight files.
    """
    packaged = name.startswith(PACKAGE_SCHEME)
    path = package_file(name) if packaged else Path(name).expanduser()
    if packaged and path.is_file():
        return
    if not path.is_dir():
        looks_local = name.startswith((".", "/", "~", os.sep)) or name.count("/") > 1 or path.exists()
        if looks_local:
            raise FileNotFoundError(f"model folder {name} does not exist or is not a folder")
        return
    if not weights:
        return
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"model folder {name} has no config.json: save a model there with save_pretrained")
    if not any(True for pattern in _WEIGHT_FILES for _ in path.glob(pattern)):
        raise FileNotFoundError(f"model folder {name} has no weights ({', '.join(_WEIGHT_FILES)})")


def local_name(name: str) -> str:
    """What `from_pretrained` understands: hub ids and folders as they are, packaged GGUF files converted first."""
    if not name.startswith(PACKAGE_SCHEME):
        return str(Path(name).expanduser())
    path = package_file(name)
    return str(path if path.is_dir() else converted_gguf(path))


def package_file(name: str) -> Path:
    """The file or folder behind `package://MODULE/NAME`, found without importing the module.

    Raises:
        FileNotFoundError: The package is not installed or has nothing of that name.
    """
    module, _, inside = name.removeprefix(PACKAGE_SCHEME).partition("/")
    folder = _package_folder(name)
    if folder is None:
        package = module.replace("_", "-")
        raise FileNotFoundError(f"{name}: package {package} is not installed; pip install --no-deps {package}")
    path = folder / inside
    if not (inside and path.exists()):
        raise FileNotFoundError(f"{name}: package {module} is installed but has no file or folder {inside!r}")
    return path


def package_installed(name: str) -> bool:
    """Whether there is a package behind `package://MODULE/NAME`, whatever it holds."""
    return _package_folder(name) is not None


def _package_folder(name: str) -> Path | None:
    module = name.removeprefix(PACKAGE_SCHEME).partition("/")[0]
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # the parent of a dotted name
        spec = None
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def converted_gguf(source: Path) -> Path:
    """A safetensors copy of a GGUF file: dequantised to float32 once, then read from the cache.

    A GGUF model that stays quantised cannot be trained or saved. The copy appears in the cache whole or not at all; of
    several processes one converts and the others wait.
    """
    size = source.stat().st_size
    target = cache_folder() / "models" / f"{source.stem}-{size}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not (target / "source.json").is_file():
            _convert_gguf(source, target, size)
    return target


def _convert_gguf(source: Path, target: Path, size: int) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
        half_done = Path(temporary) / "model"
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            gguf_file=source.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        # how it was stored is no property of the copy
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(half_done)
        tokenizer.save_pretrained(half_done)
        (half_done / "source.json").write_text(json.dumps({"file": source.name, "bytes": size}) + "\n")
        shutil.rmtree(target, ignore_errors=True)
        half_done.replace(target)


def with_pad_token(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer that can pad: padding is masked everywhere, so the end-of-sequence token will do."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no pad, end-of-sequence or unknown token: set tokenizer.pad_token")
    return tokenizer


def load_named_model(name: str, model_init_kwargs: dict[str, Any] | None, trust_remote_code: bool) -> PreTrainedModel:
    """A model from a hub id, folder or `package://` name, for BCOTrainer's string arguments.

    Raises:
        FileNotFoundError: A folder that is not there or holds no weights.
        ValueError: A dtype that torch does not have, or a model that cannot be loaded.
    """
    check_location(name, weights=True)
    options = {"trust_remote_code": trust_remote_code, **(model_init_kwargs or {})}
    dtype = options.get("dtype", "auto")
    if dtype != "auto" and not isinstance(
        getattr(torch, dtype, None) if isinstance(dtype, str) else dtype, torch.dtype
    ):
        raise ValueError(f"model_init_kwargs.dtype={dtype!r} must be 'auto' or name a torch.dtype, such as 'bfloat16'")
    shared = {key: options[key] for key in ("revision", "trust_remote_code") if key in options}
    return load_pretrained(auto_class_of(load_pretrained(AutoConfig, name, **shared)), name, **options)


def auto_class_of(config: PreTrainedConfig) -> Any:
    """The Auto class of language models with such a configuration."""
    return AutoModelForSeq2SeqLM if getattr(config, "is_encoder_decoder", False) else AutoModelForCausalLM


def prepare_policy(
    model: PreTrainedModel, peft_config: Any | None, *, adapter_name: str | None, checkpointing: bool, dropout: bool
) -> Any:
    """Dropout, quantised weights, adapter and activation checkpointing, in the order in which they work.

    Args:
        model: The bare model.
        peft_config: The adapter to add, or None.
        adapter_name: Its name.
        checkpointing: Whether activations will be recomputed.
        dropout: Whether the model keeps its dropout; the adapter's own stays in any case.

    Raises:
        TypeError: `peft_config` is no PeftConfig.
        ValueError: `peft_config` for a model that already carries an adapter, or an `adapter_name` that it lacks.
    """
    if not dropout:
        switch_off_dropout(model)
    if peft_config is None and adapter_name is not None:
        _activate(model, adapter_name)
    if peft_config is not None:
        from peft import PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training

        if not isinstance(peft_config, PeftConfig):
            raise TypeError(f"peft_config is a {type(peft_config).__name__}, not a PeftConfig such as LoraConfig")
        if isinstance(model, PeftModel):
            raise ValueError(
                "peft_config with a model that is a PeftModel: pass one or the other, "
                "or merge the adapter first with model.merge_and_unload()"
            )
        if getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False):
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
        with warnings.catch_warnings():
            # peft asks a property that newer releases of transformers have renamed, and for all-linear adapters on
            # fused experts prepares values for a module that is a parameter there, which it then adapts all the same
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
            model = get_peft_model(model, peft_config, adapter_name=adapter_name or "default")
    if checkpointing and hasattr(model, "peft_config"):
        # a frozen embedding has no gradient to carry into the first recomputed block
        model.enable_input_require_grads()
    return model


def _activate(model: Any, adapter_name: str) -> None:
    """Make one of a PEFT model's adapters the one that trains."""
    check_adapter(model, adapter_name, "model_adapter_name")
    model.set_adapter(adapter_name)


def check_adapter(model: Any, name: str, argument: str) -> None:
    """Refuse the name of an adapter that a model does not have.

    Raises:
        ValueError: Names the argument and the adapters that there are.
    """
    known = list(getattr(model, "peft_config", {}))
    if name not in known:
        raise ValueError(f"{argument}={name}: the model has {'the adapters ' + ', '.join(known) if known else 'none'}")


def switch_off_dropout(model: nn.Module) -> None:
    """Set every dropout probability of a model to 0, those that attention layers hold as plain numbers too.

    Dropout inside an adapter (`lora_dropout`) is left alone: it regularises the adapter, not the reference.
    """
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            continue
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for attribute, value in vars(module).items():
            if "dropout" in attribute and isinstance(value, float):
                setattr(module, attribute, 0.0)


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy that never trains: the reference of full fine-tuning."""
    return copy.deepcopy(model).eval().requires_grad_(False)
