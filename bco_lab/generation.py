"""Completions sampled from a model; the model, the tokenizer and all random states are left as they were."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GenerationConfig

from bco_lab.data.chat import PairedText
from bco_lab.data.tokenization import encode, encode_apart

Prompt = str | list[dict[str, Any]]


def readable_prompt(prompt: Prompt) -> str:
    """A plain prompt itself, or the last user message of a conversation (its last message if no user spoke)."""
    if isinstance(prompt, str):
        return prompt.strip()
    spoken = [message for message in prompt if message.get("role") == "user"] or prompt
    return str(spoken[-1]["content"]).strip() if spoken else ""


def generate_completions(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 48,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 48,
    progress: bool = True,
    description: str = "Generating",
) -> list[str]:
    """Sample one completion per prompt; model, tokenizer and the global random state are left as they were.

    The same arguments give the same completions; another batch size draws other random numbers and so gives others,
    unless decoding is greedy. The sampling settings that a model ships in its generation config (top-k, repetition
    penalty, ...) are ignored: the samples come from the policy itself.

    Args:
        model: A language model, also with an adapter around it; not wrapped for data-parallel training.
        tokenizer: Its tokenizer; the chat template is needed only for prompts made of messages.
        prompts: Texts, or conversations to be continued by the assistant.
        max_new_tokens: Longest completion, in tokens; it ends earlier at the tokenizer's end-of-sequence token.
        temperature: Divides the logits; 0 decodes greedily.
        top_p: Samples from the most probable tokens that together have this probability.
        seed: Of the sampling.
        batch_size: Prompts decoded together.
        progress: Whether to show a progress bar.
        description: Its title.

    Returns:
        The completions, without special tokens and surrounding white space.

    Raises:
        ValueError: A setting out of its range, a prompt without tokens, or messages without a chat template.
    """
    check_sampling(max_new_tokens, temperature, top_p)
    apart = _is_encoder_decoder(model)
    return complete_ids(
        model,
        tokenizer,
        [_encode(tokenizer, prompt, row, apart=apart) for row, prompt in enumerate(prompts)],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
        description=description,
    )


def complete_ids(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 48,
    progress: bool = True,
    description: str = "Generating",
) -> list[str]:
    """`generate_completions` for prompts that are token ids already; those of an encoder-decoder go to its encoder.

    Raises:
        ValueError: A setting out of its range.
    """
    check_sampling(max_new_tokens, temperature, top_p)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    policy: Any = model  # a model or an adapter around one; nn.Module does not know generate()
    apart = _is_encoder_decoder(model)
    config = _plain_config(tokenizer, max_new_tokens, temperature, top_p)
    if apart:
        config.decoder_start_token_id = policy.config.decoder_start_token_id
    completions: list[str] = []
    starts = range(0, len(prompts), batch_size)
    with (
        _generating(model, config),
        _forked_rng(),
        torch.no_grad(),
        # counted in tokens: one batch often holds all samples, and a bar that jumps from nothing to all tells nothing
        tqdm(total=len(starts) * max_new_tokens, desc=description, unit="token", disable=not progress) as bar,
    ):
        torch.manual_seed(seed)
        for batch, start in enumerate(starts, 1):
            chunk = list(prompts[start : start + batch_size])
            input_ids, attention_mask = _padded(chunk, config.pad_token_id, _device(model), left=not apart)
            output = policy.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                generation_config=config,
                streamer=_TokenCounter(bar),
            )
            # a decoder alone repeats the prompt, the decoder of a pair begins with one token of its own
            new_tokens = output[:, 1 if apart else input_ids.shape[1] :].tolist()
            completions += [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in new_tokens]
            bar.update(batch * max_new_tokens - bar.n)  # a batch may have ended early
    return completions


class _TokenCounter:
    """A streamer, as generate() calls it for each token of a batch; moves a progress bar."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._prompt_seen = False

    def put(self, _tokens: Tensor) -> None:
        if self._prompt_seen:
            self._bar.update(1)
        self._prompt_seen = True  # the first call brings the prompt

    def end(self) -> None:
        pass


def check_sampling(max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Refuse settings that cannot be sampled with.

    Raises:
        ValueError: Names the setting, its value and the rule.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or larger")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be in (0, 1]")


def _is_encoder_decoder(model: Any) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))


def _encode(tokenizer: Any, prompt: Prompt, row: int, *, apart: bool) -> list[int]:
    """Token ids of a prompt as the model meets it in training."""
    if isinstance(prompt, str):
        text = prompt
    elif tokenizer.chat_template is None:
        raise ValueError(f"prompt {row} is a conversation, but the tokenizer has no chat template")
    else:
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    tokens, length = (encode_apart if apart else encode)([PairedText(text, len(text))], tokenizer)[0]
    ids = tokens[:length]
    if not ids:
        raise ValueError(f"prompt {row} has no tokens: {prompt!r}")
    return ids


def _plain_config(tokenizer: Any, max_new_tokens: int, temperature: float, top_p: float) -> GenerationConfig:
    eos = tokenizer.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos
    # Padding is masked, so any id serves where the tokenizer names none.
    ends = {"eos_token_id": eos, "pad_token_id": pad if pad is not None else 0}
    if temperature == 0:
        return GenerationConfig(do_sample=False, max_new_tokens=max_new_tokens, use_cache=True, **ends)
    # top_k=0 is said aloud: left unset, it would become 50
    return GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_p=top_p,
        top_k=0,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        **ends,
    )


def _padded(sequences: list[list[int]], pad_id: int, device: torch.device, *, left: bool) -> tuple[Tensor, Tensor]:
    """`[batch, tokens]` input ids and attention mask; by hand, so the tokenizer's padding side is never touched."""
    width = max(map(len, sequences))
    input_ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(sequences):
        where = slice(width - len(ids), width) if left else slice(0, len(ids))
        input_ids[row, where] = torch.tensor(ids)
        attention_mask[row, where] = 1
    return input_ids.to(device), attention_mask.to(device)


def _device(model: nn.Module) -> torch.device:
    """Where the input goes: the embeddings' device, also for a model spread over several."""
    return next(model.parameters()).device


@contextmanager
def _generating(model: nn.Module, config: GenerationConfig) -> Iterator[None]:
    """Evaluation mode and `config` as the model's own generation config; both put back on the way out.

    transformers fills every value that a passed config leaves unset from the model's own, so passing a fresh one is
    not enough. Each module's mode is kept: in training, frozen parts may well be in evaluation mode.
    """
    # An adapter hands the attribute through on reading only, so it is replaced on the model inside.
    owner: Any = model
    if hasattr(owner, "get_base_model"):
        owner = owner.get_base_model()
    modes = [(module, module.training) for module in model.modules()]
    own_config = owner.generation_config
    model.eval()
    owner.generation_config = config
    try:
        yield
    finally:
        owner.generation_config = own_config
        for module, training in modes:
            module.training = training


@contextmanager
def _forked_rng() -> Iterator[None]:
    """Random state of the CPU and of every accelerator, put back on the way out."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        with torch.random.fork_rng(devices=[]):
            yield
    else:
        devices = range(torch.accelerator.device_count())
        with torch.random.fork_rng(devices=devices, device_type=accelerator.type):
            yield
