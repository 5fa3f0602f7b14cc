"""What models and tokenizers are, whatever they are called: equal identities, equal numbers."""

import hashlib
import json
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from transformers import PreTrainedTokenizerBase as Tokenizer

from bco_lab.models import PACKAGE_SCHEME, PolicySource, package_file

_MODEL_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "*.gguf", "*.py")


def policy_identity(source: PolicySource) -> dict[str, Any]:
    """Everything that the log-probs and hidden states of the untrained policy depend on, for JSON; no adapter.

    Raises:
        ValueError: Configuration or tokenizer cannot be loaded.
    """
    if source.name_or_path is not None:
        model: dict[str, Any] = model_identity(source.name_or_path, source.revision)
    else:
        assert source.random is not None
        model = {"random": json.loads(source.load_config().to_json_string()), "seed": source.random.seed}
    return {
        "model": model,
        "tokenizer": tokenizer_digest(source.load_tokenizer()),
        "dtype": source.dtype,
        "attn_implementation": source.attn_implementation,
        "config_overrides": source.config_overrides or {},
        "quantization": None if source.quantization is None else json.loads(source.quantization.to_json_string()),
    }


def is_local(name: str) -> bool:
    """Whether a name is that of a folder or of what lies in a package, not of the hub."""
    return name.startswith(PACKAGE_SCHEME) or Path(name).expanduser().is_dir()


def model_identity(name: str, revision: str | None) -> dict[str, Any]:
    """What the weights are, wherever they lie: the commit of a hub model, a digest of files."""
    if not is_local(name):
        snapshot = Path(hf_hub_download(name, "config.json", revision=revision)).parent
        return {"hub": name, "commit": snapshot.name}
    path = package_file(name) if name.startswith(PACKAGE_SCHEME) else Path(name).expanduser()
    files = [path] if path.is_file() else sorted({file for pattern in _MODEL_FILES for file in path.glob(pattern)})
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            digest.update(f"{file.name} {hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
    return {"sha256": digest.hexdigest()}


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """SHA-256 of what turns a text into ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = json.dumps(tokenizer.get_vocab(), sort_keys=True) if backend is None else backend.to_str()
    return hashlib.sha256(f"{tokenizer.eos_token_id} {content}".encode()).hexdigest()
