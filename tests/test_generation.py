"""Generation gives what a loop written by hand gives, and leaves no trace on the model, the tokenizer and the RNG."""

import copy
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bco_lab.generation import complete_ids, generate_completions, readable_prompt
from bco_lab.reference import reference_mode

WORDS = ["<unk>", "<s>", "</s>", "user", "assistant", ":", *(f"w{number}" for number in range(58))]
TEMPLATE = (
    "{{ bos_token }} {% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)
CHAT = [{"role": "user", "content": "w1 w2 w3"}]
PROMPTS = ["w1 w2", "w5 w6 w7 w8 w9", CHAT]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", padding_side="right"
    )
    wrapped.chat_template = TEMPLATE
    return wrapped


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=1,
        eos_token_id=2,
        attention_dropout=0.3,
        use_cache=False,
        initializer_range=0.5,  # large enough that the most probable token changes along the way
    )
    return LlamaForCausalLM(config).train()


def _argmax_loop(model: LlamaForCausalLM, text: str, tokens: int) -> str:
    """Greedy decoding without padding, cache or generate()."""
    ids = [1, *(WORDS.index(word) for word in text.split())]
    start = len(ids)
    model.eval()
    with torch.no_grad():
        for _ in range(tokens):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] == 2:
                break
    return " ".join(WORDS[index] for index in ids[start:] if index > 2)


def _generate(model: Any, tokenizer: Any, **settings: Any) -> list[str]:
    settings = {"max_new_tokens": 10, "progress": False, **settings}
    return generate_completions(model, tokenizer, settings.pop("prompts", PROMPTS), **settings)


def test_greedy_is_the_argmax_loop(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    got = _generate(model, tokenizer, temperature=0.0)
    texts = ["w1 w2", "w5 w6 w7 w8 w9", "user : w1 w2 w3 assistant :"]
    assert got == [_argmax_loop(model, text, 10) for text in texts]
    assert len(set(got)) == 3
    assert all(len(set(text.split())) > 2 for text in got)


def test_greedy_does_not_depend_on_the_batch(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    assert _generate(model, tokenizer, temperature=0.0, batch_size=1) == _generate(model, tokenizer, temperature=0.0)


def test_generation_ends_at_the_end_token(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    free = _generate(model, tokenizer, temperature=0.0, prompts=["w1 w2"])[0].split()
    stop = next(word for word in free[1:] if word != free[0])
    tokenizer.add_special_tokens({"eos_token": stop})
    ended = _generate(model, tokenizer, temperature=0.0, prompts=["w1 w2"])[0]
    assert ended.split() == free[: free.index(stop)]


def test_the_seed_decides_the_samples(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    first = _generate(model, tokenizer, seed=1)
    torch.rand(7)
    assert _generate(model, tokenizer, seed=1) == first
    assert _generate(model, tokenizer, seed=2) != first


def test_samples_follow_the_policy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """The share of each first token is its probability under the model, whatever the model's own defaults say."""
    model.generation_config.top_k = 1
    model.generation_config.repetition_penalty = 5.0
    draws = 2000
    texts = _generate(model, tokenizer, prompts=["w1 w2"] * draws, max_new_tokens=1, batch_size=draws)
    model.eval()
    with torch.no_grad():
        ids = torch.tensor([[1, WORDS.index("w1"), WORDS.index("w2")]])
        probabilities = model(input_ids=ids).logits[0, -1].softmax(-1)
    for index in range(3, len(WORDS)):
        p = probabilities[index].item()
        # five standard deviations of a binomial share, and a hair for p near 0
        assert texts.count(WORDS[index]) / draws == pytest.approx(p, abs=5 * (p * (1 - p) / draws) ** 0.5 + 2e-3)
    assert len(set(texts)) > 10


def test_nothing_is_left_changed(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    model.generation_config.top_k = 7
    model.model.layers[0].eval()  # a frozen part, in evaluation mode while the rest trains
    modes = [module.training for module in model.modules()]
    own, config = model.generation_config, copy.deepcopy(model.config.to_dict())
    own_values = copy.deepcopy(own.to_dict())
    state = torch.get_rng_state()
    _generate(model, tokenizer)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert True in modes
    assert False in modes
    assert model.generation_config is own
    assert own.to_dict() == own_values
    assert model.config.to_dict() == config
    assert tokenizer.padding_side == "right"
    assert tokenizer.pad_token is None


def test_nothing_is_left_changed_after_an_error(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    own, state = model.generation_config, torch.get_rng_state()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="probability tensor contains"):
        _generate(model, tokenizer)
    assert model.generation_config is own
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


# peft asks transformers by the property's old name
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_takes_part(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    plain = _generate(model, tokenizer, temperature=0.0)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=True, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, lora)
    assert _generate(adapted, tokenizer, temperature=0.0) == plain  # B is zero: the adapter does nothing yet
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=3.0)
    own = adapted.generation_config
    own.repetition_penalty = 5.0
    after = _generate(adapted, tokenizer, temperature=0.0)
    assert after != plain
    assert adapted.generation_config is own
    with adapted.disable_adapter():
        assert _generate(adapted, tokenizer, temperature=0.0) == plain
    merged = adapted.merge_and_unload()
    assert _generate(merged, tokenizer, temperature=0.0) == after


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_that_is_off_leaves_the_samples_of_the_bare_model() -> None:
    ids = [[2, 3, 4], [5, 6], [7]]

    def samples(written_by: Any) -> list[str]:
        return complete_ids(written_by, tiny.tokenizer(), ids, max_new_tokens=8, seed=5, progress=False)

    bare = samples(tiny.model(initializer_range=0.5))
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(1)
    adapted = get_peft_model(tiny.model(initializer_range=0.5), lora)
    with reference_mode(adapted):
        assert samples(adapted) == bare
    assert samples(adapted) != bare


@pytest.mark.parametrize("pair", [False, True], ids=["decoder", "encoder-decoder"])
def test_activation_checkpointing_keeps_the_cache(pair: bool, capfd: pytest.CaptureFixture[str]) -> None:
    model = tiny.t5(initializer_factor=20.0) if pair else tiny.model(initializer_range=0.5)
    read: list[int] = []

    def note(_module: Any, _arguments: Any, given: dict[str, Any]) -> None:
        read.append(given["decoder_input_ids" if pair else "input_ids"].shape[1])

    model.register_forward_pre_hook(note, with_kwargs=True)

    def samples() -> list[str]:
        return complete_ids(model, tiny.tokenizer(), [[2, 3, 4], [5, 6]], max_new_tokens=5, progress=False)

    plain = samples()
    without = list(read)
    read.clear()
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = False
    model.train()
    assert samples() == plain
    assert read == without == [1 if pair else 3, 1, 1, 1, 1]  # one token at a time after the prompt
    assert model.is_activation_checkpointing
    assert capfd.readouterr() == ("", "")


def test_no_warning_is_logged(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, capfd: pytest.CaptureFixture[str]
) -> None:
    model.generation_config.temperature = 0.3
    _generate(model, tokenizer, temperature=0.0)
    _generate(model, tokenizer, top_p=0.9)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_progress_counts_the_tokens(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, capfd: pytest.CaptureFixture[str]
) -> None:
    _generate(model, tokenizer, progress=True, batch_size=2, description="Before training")
    shown = capfd.readouterr().err
    assert "Before training: 100%" in shown
    assert "20/20" in shown  # two batches of up to ten tokens


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"temperature": -0.5}, r"temperature=-0.5 must be 0 \(greedy\) or larger"),
        ({"top_p": 0.0}, r"top_p=0.0 must be in \(0, 1\]"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
    ],
)
def test_settings_out_of_range(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        _generate(model, tokenizer, **settings)


def test_messages_need_a_chat_template(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="prompt 2 is a conversation, but the tokenizer has no chat template"):
        _generate(model, tokenizer)


def test_no_prompts_give_no_completions(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    assert _generate(model, tokenizer, prompts=[]) == []


def test_readable_prompt_is_what_the_user_said_last() -> None:
    talk = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": " second "},
    ]
    assert readable_prompt(talk) == "second"
    assert readable_prompt(talk[:1]) == "be brief"
    assert readable_prompt(" plain ") == "plain"


def test_token_ids_serve_as_prompts(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    ids = [tokenizer(text)["input_ids"] for text in PROMPTS[:2]]
    for temperature in (0.0, 1.0):
        texts = _generate(model, tokenizer, prompts=PROMPTS[:2], temperature=temperature, seed=3)
        same = complete_ids(model, tokenizer, ids, max_new_tokens=10, temperature=temperature, seed=3, progress=False)
        assert same == texts


def test_an_encoder_decoder_answers_what_its_encoder_reads() -> None:
    model = tiny.t5(initializer_factor=20.0)
    words = tiny.t5_tokenizer()
    prompts = ["w2 w3", "w4 w5 w6 w7"]
    found = generate_completions(model, words, prompts, max_new_tokens=6, temperature=0.0, progress=False)
    expected = []
    model.eval()
    for prompt in prompts:
        read, written = torch.tensor([words(prompt)["input_ids"]]), [0]
        with torch.no_grad():
            while len(written) < 7 and written[-1] != 1:
                logits = model(input_ids=read, decoder_input_ids=torch.tensor([written])).logits[0, -1]
                written.append(int(logits.argmax()))
        expected.append(words.decode(written, skip_special_tokens=True))
    assert found == expected
    assert found[0] != found[1]
    assert all(found)
