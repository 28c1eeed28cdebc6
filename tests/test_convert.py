"""Checkpoints in and out, the hub, tokenizers, text, and where to cut."""

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import BASE, GOLDEN, ROOT, random_model
from safetensors.torch import load_file, save_file

import convert
from loopus import Config, InputError, LoopUS

# ---- checkpoints


@pytest.mark.parametrize("format", ["authors", "hf"])
def test_save_and_load_keep_every_bit(model, tmp_path, format):
    convert.save(model, convert.byte_tokenizer(), tmp_path / "out", format)
    again, tokenizer = convert.load(tmp_path / "out", encoder_layers=1, decoder_layers=1)
    base = json.loads((tmp_path / "out" / "config.json").read_text())
    assert again.config == replace(model.config, base=base) and tokenizer.encode("aé") == [97, 195, 169]
    state = model.state_dict()
    for name, p in again.state_dict().items():
        if not (format == "hf" and name.startswith(("gate", "q_head"))):
            assert torch.equal(p, state[name]), name
    idx = torch.randint(0, 257, (1, 9))
    loops = 0 if format == "hf" else 3
    assert torch.equal(again(idx, loops), model(idx, loops))


def test_saved_model_loads_with_other_cuts(model, tmp_path):
    convert.save(model, None, tmp_path / "out")
    again, tokenizer = convert.load(tmp_path / "out", encoder_layers=2, decoder_layers=0)
    assert tokenizer is None and len(again.encoder) == 2 and len(again.decoder) == 0
    idx = torch.randint(0, 257, (1, 9))
    torch.testing.assert_close(again(idx, 0), model(idx, 0))
    torch.testing.assert_close(again.gate.up.weight, model.gate.up.weight)


def test_hf_format_has_the_tensor_names_of_transformers(tmp_path):
    for family, kind in dict(gpt2="gpt2", llama="llama", llama3_rope="llama", qwen3="qwen3", phi3="phi3").items():
        there = {}
        for shard in (GOLDEN / family).glob("model*.safetensors"):
            there |= load_file(shard)
        model, _ = convert.load(GOLDEN / family)
        convert.save(model, None, tmp_path / family, "hf")
        written = load_file(tmp_path / family / "model.safetensors")
        for name, tensor in there.items():
            if not name.endswith(".attn.bias"):
                assert torch.equal(written[f"transformer.{name}" if family == "gpt2" else name], tensor)
        config = json.loads((tmp_path / family / "config.json").read_text())
        assert config["model_type"] == kind and config["tie_word_embeddings"] is False
        again, _ = convert.load(tmp_path / family)
        idx = torch.randint(0, 259, (1, 20))
        assert torch.equal(again(idx, 0), model(idx, 0))


def test_load_dtype_and_untied_lm_head():
    model, _ = convert.load(GOLDEN / "llama_tied", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not model.training
    assert torch.equal(model.lm_head.weight, model.wte.weight)
    assert model.lm_head.weight.data_ptr() != model.wte.weight.data_ptr()


def test_old_tensor_names_of_the_authors_checkpoints(tmp_path):
    family = "loopus_reference_llama"
    expected = load_file(GOLDEN / family / "expected.safetensors")

    def rename(state):
        for name in list(state):
            old = name.replace("reasoning.", "plateau.").replace("gate.", "gate.module.")
            state[old if "gate" in name else f"module.{old}"] = state.pop(name)

    model, _ = convert.load(broken(tmp_path, family, rename))
    torch.testing.assert_close(model(expected["input_ids"], 4), expected["logits4"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family, biases", [("qwen2", ["qkv"]), ("llama", ["qkv", "out", "mlp"]), ("mistral", [])])
def test_families_that_differ_in_their_biases(tmp_path, family, biases):
    raw = BASE["llama"] | dict(model_type=family, vocab_size=257)
    raw |= dict(attention_bias=True, mlp_bias=True) if family == "llama" else {}
    config = convert.read_family(raw, "config.json")[1]
    assert [b for b in ("qkv", "out", "mlp") if config.get(f"{b}_bias")] == biases
    model = random_model(**config)
    convert.save(model, None, tmp_path / family, "hf")
    names = load_file(tmp_path / family / "model.safetensors").keys()
    assert ("model.layers.0.self_attn.q_proj.bias" in names) == bool(biases)
    assert ("model.layers.0.self_attn.o_proj.bias" in names) == ("out" in biases)
    again, _ = convert.load(tmp_path / family)
    idx = torch.randint(0, 257, (1, 9))
    assert torch.equal(again(idx, 0), model(idx, 0))


@pytest.mark.parametrize("family", ["loopus_reference_llama", "loopus_reference_qwen3"])
def test_authors_checkpoint_survives_load_and_save(tmp_path, command, family):
    code, _, err = command(convert, GOLDEN / family, tmp_path / "theirs", "--format=authors")
    assert code == 0, err
    there, back = (load_file(d / "model.safetensors") for d in (GOLDEN / family, tmp_path / "theirs"))
    assert there.keys() == back.keys() and all(torch.equal(there[n], back[n]) for n in there)
    there, back = (json.loads((d / "config.json").read_text()) for d in (GOLDEN / family, tmp_path / "theirs"))
    assert {k for k in there if there[k] != back[k]} <= {"base_config_dict"}
    there, back = there["base_config_dict"], back["base_config_dict"]
    assert {k for k in there if there[k] != back[k]} <= {"tie_word_embeddings"}


@pytest.mark.parametrize("family", ["llama", "phi3", "llama_tied"])
def test_convert_writes_the_authors_format(tmp_path, command, family):
    code, _, err = command(convert, GOLDEN / family, tmp_path / "theirs", "--encoder_layers=2", "--decoder_layers=1")
    assert code == 0, err
    ours, _ = convert.load(GOLDEN / family, encoder_layers=2, decoder_layers=1)
    raw = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert raw["model_type"] == "lds" and raw["base_config_dict"]["model_type"] == family.split("_")[0]
    indices = [raw[f"{stack}_layer_indices"] for stack in ("encoder", "reasoning", "decoder")]
    assert indices == [[0, 1], [2], [3]] and raw["q_threshold"] == 0.6 and raw["N"] == 8
    theirs, _ = convert.load(tmp_path / "theirs")
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    ours = {n: p for n, p in ours.state_dict().items() if not n.startswith("gate.down")}  # that one starts at random
    assert all(torch.equal(theirs.state_dict()[n], p) for n, p in ours.items())


def test_unknown_format_and_unloaded_model_are_not_written(tmp_path, command):
    code, _, err = command(convert, GOLDEN / "gpt2", tmp_path / "out", "--format=gguf")
    assert code == 2 and "invalid choice: 'gguf'" in err and err.count("\n") == 1
    with pytest.raises(InputError, match="only a model that was loaded by convert.load"):
        convert.save(random_model(base=None), None, tmp_path / "out", "hf")


def test_looped_model_is_written_as_an_unlooped_one(tmp_path, command):
    model, _ = convert.load(GOLDEN / "qwen3", encoder_layers=1, decoder_layers=1)
    torch.nn.init.normal_(model.reasoning[0].down.weight)
    convert.save(model, None, tmp_path / "looped")
    code, _, err = command(convert, tmp_path / "looped", tmp_path / "plain", "--format=hf")
    assert code == 0, err
    raw, there = (json.loads((d / "config.json").read_text()) for d in (tmp_path / "plain", GOLDEN / "qwen3"))
    assert raw == there | dict(tie_word_embeddings=False)
    plain, _ = convert.load(tmp_path / "plain")
    idx = torch.randint(0, 259, (1, 9))
    assert torch.equal(plain(idx, 0), model(idx, 0))


def test_convert_keeps_the_stored_dtype(tmp_path, command):
    convert.save(random_model().half(), None, tmp_path / "half")
    code, _, err = command(convert, tmp_path / "half", tmp_path / "out")
    assert code == 0, err
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float16}


def test_load_needs_little_more_memory_than_the_model(tmp_path):
    """In a process of its own; the pages of the mapped file count, and must not all stay."""
    model = random_model(n_layer=20, n_embd=256, n_head=32, n_kv_head=32, n_inner=1024)
    convert.save(model, None, tmp_path)
    size = sum(p.nbytes for p in model.parameters())
    command = [sys.executable, ROOT / "tests" / "benchmark_loading.py", "convert.load", tmp_path, "fp32"]
    peak = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[1])
    assert 0.5 * size < peak < 1.5 * size


def broken(tmp_path, family="llama", tensors=None, **config):
    """A copy of a golden checkpoint with changes: tensors(dict) edits the weights, config the config.json."""
    directory = tmp_path / "broken"
    shutil.copytree(GOLDEN / family, directory)
    raw = json.loads((directory / "config.json").read_text()) | config
    (directory / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v != "gone"}))
    if tensors:
        state = load_file(directory / "model.safetensors")
        tensors(state)
        save_file(state, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(model_type="mamba"), 'model_type "mamba" is not supported'),
        (dict(hidden_act="gelu"), 'hidden_act "gelu" is not supported'),
        (dict(attention_bias=True), "q_proj.bias is missing"),
        (dict(sliding_window=16), "sliding window is not supported"),
        (dict(layer_types=["sliding_attention"] * 4), "sliding window is not supported"),
        (dict(rope_scaling=dict(rope_type="yarn", factor=4.0)), 'rope_type "yarn" is not supported'),
        (dict(model_type="qwen3_moe"), 'model_type "qwen3_moe" is not supported'),
        (dict(num_hidden_layers="gone"), "num_hidden_layers is null, expected a value"),
        (dict(num_hidden_layers=3), "layers.3.input_layernorm.weight is unknown"),
        (dict(num_hidden_layers=5), "layers.4.input_layernorm.weight is missing"),
        (dict(intermediate_size=96), r"mlp.gate_proj.weight shaped \[80, 32\] instead of \[96, 32\]"),
        (dict(vocab_size=300), r"embed_tokens.weight shaped \[259, 32\] instead of \[300, 32\]"),
        (dict(num_key_value_heads=4), r"k_proj.weight shaped \[16, 32\] instead of \[32, 32\]"),
        (dict(tensors=lambda t: t.pop("model.norm.weight")), "norm.weight is missing"),
        (dict(tensors=lambda t: t.update(extra=torch.zeros(1))), "extra is unknown"),
    ],
)
def test_config_that_disagrees_with_the_weights_is_refused(tmp_path, change, message):
    with pytest.raises(InputError, match=message) as e:
        convert.load(broken(tmp_path, **change))
    assert "\n" not in str(e.value)


LLAMA3_ROPE = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(rms_norm_eps="1e-5"), 'rms_norm_eps is "1e-5", expected a positive number'),
        (dict(rms_norm_eps=float("nan")), "rms_norm_eps is NaN, expected a positive number"),
        (dict(rms_norm_eps=[1e-5]), "rms_norm_eps is .1e-05., expected a positive number"),
        (dict(rope_theta="10000.0"), 'rope_theta is "10000.0", expected a positive number'),
        (dict(hidden_size=32.5), "hidden_size is 32.5, expected a positive whole number"),
        (dict(hidden_size=True), "hidden_size is true, expected a positive whole number"),
        (dict(vocab_size=-1), "vocab_size is -1, expected a positive whole number"),
        (dict(num_hidden_layers=0), "num_hidden_layers is 0, expected a positive whole number"),
        (dict(num_hidden_layers=10**9), "config.json has 1000000000 layers, its weights"),
        (
            dict(hidden_size=2**31 - 8, head_dim="gone"),
            "config.json: the size of a head is 536870910, expected a size of",
        ),
        (dict(layer_types=3), "sliding window is not supported"),
        (dict(intermediate_size=10**300), "intermediate_size is 1000.*, expected a positive whole number"),
        (dict(head_dim="8"), 'head_dim is "8", expected a positive whole number'),
        (dict(attention_bias="no"), 'attention_bias is "no", expected true or false'),
        (dict(mlp_bias=1), "mlp_bias is 1, expected true or false"),
        (dict(tie_word_embeddings="yes"), 'tie_word_embeddings "yes" is not supported; expected false or true'),
        (dict(num_key_value_heads=3), "number of attention heads is 4, expected multiples of 3"),
        (dict(head_dim=7), "the number of rotated channels of 7 per head is 7, expected pairs"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor 0.5 is not supported; expected 1.0"),
        (dict(rms_norm_eps="gone"), "rms_norm_eps is null, expected a value"),
        (dict(vocab_size=None), "vocab_size is null, expected a value"),
        (dict(model_type=["llama"]), 'model_type ."llama". is not supported'),
        (dict(model_type="gone"), "model_type null is not supported"),
        (dict(hidden_act=["silu"]), "hidden_act .* is not supported"),
        (dict(rope_scaling="linear"), 'rope_scaling is "linear", expected an object or null'),
        (dict(rope_scaling=dict(type="linear", factor=2.0)), 'rope_type "linear" is not supported'),
        (dict(rope_scaling=dict(type="dynamic", factor=2.0)), 'rope_type "dynamic" is not supported'),
        (dict(rope_scaling=dict(rope_type="longrope", short_factor=[1.0])), 'rope_type "longrope" is not supported'),
        (dict(rope_parameters=dict(rope_type="yarn", factor=4.0)), 'rope_type "yarn" is not supported'),
        (dict(rope_parameters=dict(rope_type=3)), "rope_type 3 is not supported"),
        (
            dict(rope_parameters=dict(full_attention=dict(rope_type="default"))),
            "expected one setting for all layers: others are not supported",
        ),
        (
            dict(rope_parameters=dict(rope_theta=1e4), rope_scaling=LLAMA3_ROPE),
            "rope_parameters is .*, expected what rope_scaling says",
        ),
        (
            dict(rope_parameters=dict(rope_theta=5.0), rope_scaling=dict(type="default")),
            "rope_parameters is .*, expected what rope_scaling says",
        ),
        (
            dict(rope_scaling=LLAMA3_ROPE | dict(factor=None)),
            "factor is null, expected a value where rope_type is llama3",
        ),
        (dict(rope_scaling=LLAMA3_ROPE | dict(factor="8")), 'factor is "8", expected a positive number'),
        (
            dict(rope_scaling=LLAMA3_ROPE | dict(low_freq_factor=4.0)),
            "low_freq_factor is 4.0, expected less than high_freq_factor, 4.0",
        ),
        (dict(sliding_window="all"), 'sliding_window is "all", expected a positive whole number'),
        (
            dict(model_type="mistral", max_position_embeddings=8192),
            "sliding window is not supported",
        ),  # 4096 by default
        (dict(model_type="qwen2", use_sliding_window=True, sliding_window=16), "sliding window is not supported"),
        (dict(quantization_config=dict(quant_method="gptq", bits=4)), "gptq.*: quantized weights are not supported"),
        (dict(tensors=lambda t: t.update(a=torch.zeros(2, dtype=torch.int32))), "a holds I32: quantized weights"),
        (
            dict(tensors=lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.float8_e4m3fn)})),
            "model.norm.weight holds F8_E4M3: quantized weights are not supported",
        ),
    ],
)
def test_config_values_that_cannot_be_run_are_named(tmp_path, change, message):
    with pytest.raises(InputError, match=message) as e:
        convert.load(broken(tmp_path, **change))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "change",
    [
        dict(num_key_value_heads=2.0, intermediate_size=80.0, max_position_embeddings=128.0, rope_theta=10000),
        dict(rope_theta="gone", rope_parameters=dict(rope_theta=10000.0, rope_type="default")),
        dict(rope_theta=5.0, rope_parameters=dict(rope_theta=10000.0)),  # the inner one holds
        dict(rope_scaling=dict(type="default"), rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
        dict(rope_scaling=dict(rope_type="default", type="linear")),
        dict(rope_scaling={}),
        dict(rope_theta="gone"),
        dict(hidden_act=None, tie_word_embeddings=None, attention_bias=None, head_dim=None, layer_types=None),
        dict(use_sliding_window=False, sliding_window=16, layer_types=["sliding_attention"] * 4),
        dict(sliding_window=None),
        dict(sliding_window=128),
        dict(model_type="mistral"),
        dict(layer_types=["full_attention"] * 4),
        dict(quantization_config=None, base_config_dict=1),
        dict(partial_rotary_factor=1),
    ],
)
def test_config_values_in_other_words_are_the_same_model(tmp_path, change):
    expected = load_file(GOLDEN / "llama" / "expected.safetensors")
    model, _ = convert.load(broken(tmp_path, **change))
    torch.testing.assert_close(model(expected["input_ids"], 0), expected["logits"], atol=1e-4, rtol=0)
    convert.save(model, None, tmp_path / "again")
    again, _ = convert.load(tmp_path / "again")
    assert torch.equal(again(expected["input_ids"], 0), model(expected["input_ids"], 0))


@pytest.mark.parametrize("share", [1.5, 0.05])
def test_rotated_share_of_phi3_that_is_none_is_refused(tmp_path, share):
    with pytest.raises(InputError, match="the number of rotated channels of 8 per head is .*, expected pairs"):
        convert.load(broken(tmp_path, "phi3", rope_parameters=dict(partial_rotary_factor=share)))


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_llama3_rope_in_either_spelling(tmp_path, key):
    expected = load_file(GOLDEN / "llama3_rope" / "expected.safetensors")
    rope = LLAMA3_ROPE | dict(original_max_position_embeddings=32, rope_theta=500000.0)
    other = dict(rope_scaling="rope_parameters", rope_parameters="rope_scaling")[key]
    model, _ = convert.load(broken(tmp_path, "llama3_rope", **{"rope_theta": "gone", key: rope, other: None}))
    torch.testing.assert_close(model(expected["input_ids"], 0), expected["logits"], atol=1e-4, rtol=0)


def test_llama3_rope_without_original_context_takes_the_models(tmp_path):
    change = dict(rope_scaling=LLAMA3_ROPE, original_max_position_embeddings=8)  # transformers does not look there
    model, _ = convert.load(broken(tmp_path, "llama3_rope", **change))
    c = model.config
    for original in (c.block_size, 8):
        rope = LLAMA3_ROPE | dict(original_max_position_embeddings=original)
        angles = convert.rotary_angles(c.base, rope, c.head_dim, c.block_size)
        assert (c.rotary == angles) == (original == c.block_size)


def test_gpt2_fields_that_change_nothing_and_one_that_does(tmp_path):
    change = dict(reorder_and_upcast_attn=True, scale_attn_by_inverse_layer_idx=False)
    model, _ = convert.load(broken(tmp_path, "gpt2", **change))
    expected = load_file(GOLDEN / "gpt2" / "expected.safetensors")
    torch.testing.assert_close(model(expected["input_ids"], 0), expected["logits"], atol=1e-4, rtol=0)
    shutil.rmtree(tmp_path / "broken")
    with pytest.raises(InputError, match="scale_attn_by_inverse_layer_idx true is not supported; expected false"):
        convert.load(broken(tmp_path, "gpt2", scale_attn_by_inverse_layer_idx=True))


@pytest.mark.parametrize(
    "text, message",
    [
        ("[]", "holds a JSON list, expected an object"),
        ("null", "holds a JSON NoneType, expected an object"),
        ("{}", "model_type null is not supported"),
        ('{"model_type": "lds"}', "base_config_dict is null, expected the config of the pretrained model"),
        ("{", "is damaged .*: expected JSON"),
        ("[" * 100000, "is damaged .*: expected JSON"),
        ("\xff", "is damaged .*: expected JSON"),
    ],
)
def test_config_files_of_other_json_are_named(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=f"config.json:? {message}") as e:
        convert.load(tmp_path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(encoder_layer_indices=2), "encoder_layer_indices is 2, expected a list of layers"),
        (dict(reasoning_layer_indices="gone"), "reasoning_layer_indices is null, expected a list of layers"),
        (dict(decoder_layer_indices=[2]), "the list of all layers is .0, 1, 2, 2., expected 4 in their order"),
        (dict(encoder_layer_indices=[]), "the list of all layers is .1, 2, 3., expected 4 in"),
        (dict(base_config_dict=[]), "base_config_dict is .., expected"),
    ],
)
def test_looped_config_with_other_cuts_than_its_layers_is_refused(tmp_path, change, message):
    directory = broken(tmp_path, "loopus_reference_llama", **change)
    with pytest.raises(InputError, match=message):
        convert.load(directory)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[]", "{"])
def test_damaged_index_of_shards_is_named(tmp_path, index):
    directory = shutil.copytree(GOLDEN / "qwen3", tmp_path / "qwen3")
    (directory / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputError, match="model.safetensors.index.json"):
        convert.load(directory)


def test_a_stored_lm_head_is_used_though_the_config_says_tied(tmp_path, command):
    def untie(state):
        state["lm_head.weight"] = torch.randn_like(state["model.embed_tokens.weight"])

    directory = broken(tmp_path, "llama_tied", untie)
    head = load_file(directory / "model.safetensors")["lm_head.weight"]
    model, _ = convert.load(directory)
    assert torch.equal(model.lm_head.weight, head) and not torch.equal(model.wte.weight, head)
    code, _, err = command(convert, directory, tmp_path / "out", "--format=hf")
    assert code == 0, err
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"], head)


def test_each_tensor_keeps_its_stored_dtype(tmp_path, command):
    """Also where layers are of several, and the profile is needed to find the cut."""

    def mix(state):
        for name in state:
            if "norm" not in name:
                state[name] = state[name].to(torch.float16 if "mlp" in name else torch.bfloat16)
        state["model.layers.0.self_attn.v_proj.weight"] = state["model.layers.0.self_attn.v_proj.weight"].float()

    directory = broken(tmp_path, tensors=mix)
    code, out, err = command(convert, directory, tmp_path / "out", "--profile")
    assert code == 0 and "by the rule" in out, err
    model, _ = convert.load(directory, dtype=None)
    layer = model.layers()[0]
    assert layer.qkv.weight.dtype == torch.float32  # of three tensors, the most precise
    assert layer.up.weight.dtype == torch.float16 and layer.out.weight.dtype == model.wte.weight.dtype == torch.bfloat16
    stored, written = (load_file(d / "model.safetensors") for d in (directory, tmp_path / "out"))
    for theirs, ours in (("norm", "decoder.norm"), ("layers.3.mlp.down_proj", "decoder.layers.{}.mlp.down_proj")):
        name = ours.format(len(model.decoder) - 1) + ".weight"
        assert written[name].dtype == stored[f"model.{theirs}.weight"].dtype
        assert torch.equal(written[name], stored[f"model.{theirs}.weight"])


def test_added_tokens_beyond_the_model_are_left_out(tmp_path, capsys):
    """Llama 2 with a padding token: 32,001 tokens and 32,000 embeddings. Its name is then text like any other."""
    directory = tmp_path / "padded"
    convert.save(random_model(), convert.byte_tokenizer(), directory, "hf")
    spec = json.loads((directory / "tokenizer.json").read_text())
    spec["added_tokens"].append(spec["added_tokens"][0] | dict(id=257, content="<pad>"))
    (directory / "tokenizer.json").write_text(json.dumps(spec))
    model, tokenizer = convert.load(directory)
    assert tokenizer.n_vocab == 257 and tokenizer.encode("a<pad><|endoftext|>") == [*b"a<pad>", 256]
    assert model(torch.tensor([tokenizer.encode("a<pad>")]), 0).isfinite().all()
    assert "the model lacks the added tokens" in capsys.readouterr().err


def test_damaged_and_missing_files_are_named(tmp_path):
    directory = broken(tmp_path)
    weights = directory / "model.safetensors"
    whole = weights.read_bytes()
    for data in (whole[:-1000], whole[:5], b""):
        weights.write_bytes(data)
        with pytest.raises(InputError, match="model.safetensors is damaged"):
            convert.load(directory)
    weights.unlink()
    with pytest.raises(InputError, match="model.safetensors is missing"):
        convert.load(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(InputError, match="config.json is damaged .*: expected JSON"):
        convert.load(directory)
    (directory / "config.json").unlink()
    with pytest.raises(InputError, match="no directory with a config.json"):
        convert.load(directory)


def test_tokenizer_of_another_model_is_refused(tmp_path):
    directory = broken(tmp_path)
    shutil.copy(GOLDEN / "tokenizers" / "gpt2.json", directory / "tokenizer.json")
    with pytest.raises(InputError, match="a tokenizer of 700 and a model of 259 tokens"):
        convert.load(directory)


def test_failing_save_leaves_the_old_checkpoint_whole(tmp_path):
    """A real process runs into a limit on file sizes in the middle of the weights, as it would into a full disk."""
    out = tmp_path / "out"
    convert.save(random_model(), None, out)
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    save = f"convert.save(conftest.random_model(seed=1), None, {str(out)!r})"
    code = f"import conftest, convert; convert.run(lambda: {save})"
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000))  # noqa: E731
    environment = dict(os.environ, PYTHONPATH=str(ROOT / "tests"), PYTHONDONTWRITEBYTECODE="1")
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment, preexec_fn=limit, capture_output=True, text=True
    )
    assert ended.returncode == 1 and ended.stderr.startswith("error: cannot write") and ended.stderr.count("\n") == 1
    assert {f.name: f.read_bytes() for f in out.iterdir()} == before
    assert [f.name for f in tmp_path.iterdir() if f.name.startswith("out")] == ["out"]


def test_save_leaves_what_the_user_put_there(tmp_path, monkeypatch):
    out = tmp_path / "out"
    (out / "notes").mkdir(parents=True)
    (tmp_path / "out.new-1").mkdir()
    for file in (
        out / "README.md",
        out / "notes" / "a.txt",
        out / "model-copy.safetensors",
        tmp_path / "out.new-1" / "a",
    ):
        file.write_text("mine")
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    convert.save(random_model(), None, out)
    convert.save(random_model(seed=1), None, out)
    after = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    assert before.items() <= after.items()
    assert {f.name for f in after.keys() - before.keys()} == {"config.json", "model.safetensors"}
    assert not [d for d in tmp_path.rglob("*new-*") if d.name != "out.new-1"]


def test_save_into_the_current_directory_and_below_home(tmp_path, monkeypatch, command):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    before = sorted(tmp_path.iterdir())
    for out in (".", "./", "", "../here", "~/here", "new/sub", "~/new"):
        convert.save(random_model(), None, out)
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "new"])
    written = {f.parent for f in tmp_path.rglob("model.safetensors")}
    assert written == {tmp_path / "here", tmp_path / "here" / "new" / "sub", tmp_path / "new"}
    code, out, err = command(convert, tmp_path / "new", ".")
    assert code == 0 and " layers" in out, err


@pytest.mark.parametrize("out", ["file", "file/below", "taken"])
def test_save_where_it_cannot_be_written_changes_nothing(tmp_path, out):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "taken" / "model.safetensors").mkdir(parents=True)  # a directory of that name
    (tmp_path / "taken" / "config.json").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=f"cannot write .*{out}") as e:
        convert.save(random_model(), None, tmp_path / out)
    assert sorted(tmp_path.rglob("*")) == before and "\n" not in str(e.value)
    assert (tmp_path / "taken" / "config.json").read_text() == (tmp_path / "file").read_text() == "mine"


def test_all_or_nothing_puts_further_files_in_place_together(tmp_path):
    with convert.all_or_nothing(tmp_path / "out") as unfinished:
        convert.write_checkpoint(random_model(), None, unfinished)
        (unfinished / "settings.json").write_text("1")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "model.safetensors").exists() and (tmp_path / "out" / "settings.json").exists()
    with pytest.raises(KeyboardInterrupt):
        with convert.all_or_nothing(tmp_path / "out") as unfinished:
            (unfinished / "settings.json").write_text("2")
            raise KeyboardInterrupt
    assert (tmp_path / "out" / "settings.json").read_text() == "1" and len(list((tmp_path / "out").iterdir())) == 3


# ---- the hub, on a local server


class Hub(BaseHTTPRequestHandler):
    """Serves a directory as the hub does, and misbehaves on demand."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        state = self.server.state
        state["asked"].append((self.path, dict(self.headers)))
        prefix, _, name = self.path.rpartition("/")
        if state.get("status"):
            return self.send_error(state["status"])
        if prefix.startswith("/cdn"):
            prefix = state["repo"]
        elif name.endswith(".safetensors") and prefix == state["repo"] and (state["directory"] / name).exists():
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{self.server.server_port}/cdn/{name}")  # another host
            weights = (state["directory"] / name).read_bytes()
            self.send_header("X-Linked-Size", str(state.get("size", len(weights))))
            self.send_header("X-Linked-Etag", f'"{state.get("sha256") or hashlib.sha256(weights).hexdigest()}"')
            return self.end_headers()
        path = state["directory"] / name
        if prefix != state["repo"] or not path.exists():
            return self.send_error(404)
        data = path.read_bytes()
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if name == state.get("other"):  # another version than the one that was begun
            data = bytes(len(data))
        if name == state.get("break_off"):
            state["break_off"] = None
            data = data[: len(data) // 2]
        self.wfile.write(data[start:])


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.state = dict(asked=[], directory=GOLDEN / "llama", repo="/owner/name/resolve/main")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield server.state
    server.shutdown()
    server.server_close()


def test_download_once_with_token_and_revision(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    model, _ = convert.load("owner/name")
    expected = load_file(GOLDEN / "llama" / "expected.safetensors")
    torch.testing.assert_close(model(expected["input_ids"], 0), expected["logits"], atol=1e-4, rtol=0)
    for path, headers in hub["asked"]:  # the token goes to the hub, not to where it redirects
        assert headers.get("Authorization") == (None if path.startswith("/cdn") else "Bearer secret")
    asked = len(hub["asked"])
    convert.load("owner/name")
    assert len(hub["asked"]) == asked
    hub["repo"] = "/owner/name/resolve/v2"
    convert.load("owner/name@v2")
    assert hub["asked"][-1][0] == "/cdn/model.safetensors" and len(hub["asked"]) > asked


def test_broken_download_is_named_and_resumed(hub):
    hub["break_off"] = "model.safetensors"
    with pytest.raises(InputError, match="model.safetensors.*(broke off|cannot fetch)"):
        convert.load("owner/name")
    convert.load("owner/name")
    size = (GOLDEN / "llama" / "model.safetensors").stat().st_size
    assert hub["asked"][-1][1]["Range"] == f"bytes={size // 2}-"


@pytest.mark.parametrize("lie", [dict(sha256="0" * 64), dict(size=100)])
def test_download_with_wrong_size_or_sha256_is_deleted(hub, lie):
    hub |= lie
    with pytest.raises(InputError, match="model.safetensors is not what the hub states"):
        convert.load("owner/name")
    assert not list(convert.cache_dir().rglob("model.safetensors*"))
    for key in lie:
        del hub[key]
    convert.load("owner/name")


def test_download_shorter_than_stated_is_refused(hub):
    hub["size"] = 10**6
    with pytest.raises(InputError, match="broke off after [0-9]+ of 1000000 bytes: run it again"):
        convert.load("owner/name")


def test_resumed_download_of_another_version_is_refused(hub):
    hub["break_off"] = "model.safetensors"
    with pytest.raises(InputError):
        convert.load("owner/name")
    hub["other"] = "model.safetensors"
    with pytest.raises(InputError, match="not what the hub states"):
        convert.load("owner/name")
    hub["other"] = None
    convert.load("owner/name")


def test_hub_cache_is_used_in_place(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    kept = tmp_path / "hub" / "models--owner--name"
    shutil.copytree(GOLDEN / "qwen3", kept / "snapshots" / "abc123")
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("abc123\n")
    for name in ("owner/name", "owner/name@main", "owner/name@abc123"):
        assert convert.resolve(name) == kept / "snapshots" / "abc123"
    convert.load("owner/name")
    assert not list(convert.cache_dir().rglob("*.safetensors"))
    next((kept / "snapshots" / "abc123").glob("*-of-*")).unlink()  # no longer whole
    with pytest.raises(InputError, match="cannot fetch"):
        convert.load("owner/name")


def hub_cache(directory, family="llama"):
    """A golden checkpoint as the hub's own tools would have put it into that directory. → where it lies"""
    model = directory / "models--owner--name"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("abc123")
    return shutil.copytree(GOLDEN / family, model / "snapshots" / "abc123")


@pytest.mark.parametrize(
    "variable, value, below",
    [
        ("HF_HOME", "~/hf", "hf/hub"),
        ("HF_HUB_CACHE", "~/hub", "hub"),
        ("HUGGINGFACE_HUB_CACHE", "~/old", "old"),
        ("XDG_CACHE_HOME", "~/xdg", "xdg/huggingface/hub"),
        ("HF_HOME", "", ".cache/huggingface/hub"),
    ],
)
def test_hub_cache_is_found_by_the_hubs_own_variables(tmp_path, monkeypatch, variable, value, below):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv(variable, value)
    directory = hub_cache(tmp_path / below)
    (directory / "tokenizer.json").write_text(json.dumps(convert.byte_tokenizer().spec))
    assert convert.resolve("owner/name") == directory


@pytest.mark.parametrize(
    "variables, file",
    [
        (dict(HF_TOKEN="secret"), None),
        (dict(HUGGING_FACE_HUB_TOKEN="secret\n"), None),
        (dict(HF_TOKEN_PATH="~/my/token"), "my/token"),
        (dict(HF_HOME="~/hf"), "hf/token"),
        (dict(HF_HOME=""), ".cache/huggingface/token"),
        (dict(HF_TOKEN="secret", HF_HOME="~/hf"), "hf/other"),
    ],
)
def test_hub_token_of_the_environment_or_of_the_login(hub, tmp_path, monkeypatch, variables, file):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if file:
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text("secret\n")
    convert.resolve("owner/name")
    assert hub["asked"][0][1]["Authorization"] == "Bearer secret"


def test_hub_is_asked_without_a_token_where_there_is_none(hub):
    convert.resolve("owner/name")
    assert "Authorization" not in hub["asked"][0][1]


def test_hub_endpoint_may_end_with_a_slash_or_be_none(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", os.environ["HF_ENDPOINT"] + "/")
    convert.resolve("owner/name")
    assert hub["asked"][0][0] == "/owner/name/resolve/main/config.json"
    monkeypatch.setenv("HF_ENDPOINT", "huggingface")
    with pytest.raises(InputError, match="cannot fetch huggingface/owner/other"):
        convert.resolve("owner/other")


def test_what_the_hub_cache_lacks_is_fetched_beside_links_to_the_rest(hub, tmp_path):
    kept = hub_cache(tmp_path / "huggingface" / "hub")
    hub["directory"], hub["repo"] = tmp_path / "hub", "/owner/name/resolve/abc123"  # the commit of the copy
    hub["directory"].mkdir()
    (hub["directory"] / "tokenizer.json").write_text(json.dumps(convert.byte_tokenizer().spec))
    before = sorted(kept.iterdir())
    _, tokenizer = convert.load("owner/name")
    assert tokenizer.n_vocab == 257 and sorted(kept.iterdir()) == before
    assert (convert.resolve("owner/name") / "model.safetensors").resolve() == kept / "model.safetensors"
    asked = [path.rsplit("/", 1)[1] for path, _ in hub["asked"]]
    assert "tokenizer.json" in asked and not {"config.json", "model.safetensors"} & set(asked)
    count = len(asked)
    convert.load("owner/name")
    assert len(hub["asked"]) == count
    shutil.rmtree(tmp_path / "huggingface")  # the links lead nowhere: fetched anew
    hub["directory"], hub["repo"] = GOLDEN / "llama", "/owner/name/resolve/main"
    convert.load("owner/name")


def test_hub_cache_without_tokenizer_or_network_is_taken_as_it_is(tmp_path, monkeypatch):
    kept = hub_cache(tmp_path / "huggingface" / "hub")
    assert convert.resolve("owner/name") == kept
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert convert.resolve("owner/name") == kept


def test_hf_hub_offline_asks_nobody(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set, and .*config.json is not in the cache"):
        convert.load("owner/name")
    assert not hub["asked"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    convert.load("owner/name")
    asked = len(hub["asked"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "TRUE")
    convert.load("owner/name")
    assert len(hub["asked"]) == asked


def test_resolve_takes_a_tilde_and_names_what_is_no_model(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(GOLDEN / "llama", tmp_path / "model[1]")
    assert convert.resolve("~/model[1]") == tmp_path / "model[1]"
    with pytest.raises(InputError, match="model.safetensors is a file: name the directory it is in"):
        convert.resolve("~/model[1]/model.safetensors")
    with pytest.raises(InputError, match="no directory with a config.json"):
        convert.resolve("../model")
    with pytest.raises(InputError, match="~nobody-of-that-name/model is no directory with a config.json"):
        convert.resolve("~nobody-of-that-name/model")
    with pytest.raises(InputError, match="train.py has written no model yet"):
        convert.resolve("")
    (convert.cache_dir() / "last").write_text(str(tmp_path / "gone"))
    with pytest.raises(InputError, match="gone, which train.py wrote last, is gone: name a model with --init"):
        convert.resolve("")


def test_cache_directory_takes_a_tilde_and_xdg_cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LOOPUS_CACHE", "~/mine")
    assert convert.cache_dir() == tmp_path / "mine"
    monkeypatch.delenv("LOOPUS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert convert.cache_dir() == tmp_path / "xdg" / "loopus"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert convert.cache_dir() == tmp_path / ".cache" / "loopus"


def test_short_name_and_sharded_checkpoint(hub, tmp_path):
    state = load_file(GOLDEN / "gpt2" / "model.safetensors")
    names = sorted(state)
    hub["directory"], hub["repo"] = tmp_path / "sharded", "/openai-community/gpt2/resolve/main"
    hub["directory"].mkdir()
    shutil.copy(GOLDEN / "gpt2" / "config.json", hub["directory"])
    parts = {"a.safetensors": names[:20], "b.safetensors": names[20:]}
    for file, part in parts.items():
        save_file({n: state[n] for n in part}, hub["directory"] / file)
    index = dict(weight_map={n: file for file, part in parts.items() for n in part})
    (hub["directory"] / "model.safetensors.index.json").write_text(json.dumps(index))
    model, _ = convert.load("gpt2")
    expected = load_file(GOLDEN / "gpt2" / "expected.safetensors")
    torch.testing.assert_close(model(expected["input_ids"], 0), expected["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("status, hint", [(401, "set HF_TOKEN"), (404, "check the name"), (500, "try again later")])
def test_hub_status_codes_are_explained(hub, status, hint):
    hub["status"] = status
    with pytest.raises(InputError, match=f"the hub answered {status} for .*config.json: {hint}"):
        convert.load("owner/name")


def test_load_without_network_says_so():
    with pytest.raises(InputError, match="cannot fetch .*config.json .*go online"):
        convert.load("owner/name")
    with pytest.raises(InputError, match="no directory with a config.json here and no name on the hub"):
        convert.load("no/such/directory")


# ---- text


def test_texts_are_tokenised_once_and_cached(tmp_path):
    tokenizer, tmp_path = convert.byte_tokenizer(), tmp_path / "texts"
    tmp_path.mkdir()
    for name, text in (("b.txt", "zwei ü"), ("a.txt", "eins"), (".hidden", "no")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    expected = [*b"eins", 256, *"zwei ü".encode(), 256]
    for data in (tmp_path, f"{tmp_path}/*.txt"):
        tokens = convert.load_tokens(convert.find_files(str(data)), tokenizer)
        assert tokens.tolist() == expected and isinstance(tokens, np.memmap)
    assert len(list(convert.cache_dir().glob("*.int32"))) == 1
    (tmp_path / "a.jsonl").write_text(json.dumps(dict(text="vier\nfünf")) + "\n" + json.dumps(dict(text="")) + "\n")
    tokens = convert.load_tokens(convert.find_files(str(tmp_path)), tokenizer)
    assert tokens.tolist() == [*"vier\nfünf".encode(), 256, 256, *expected]
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "a.txt").write_text("anders")
    assert convert.load_tokens(convert.find_files(str(tmp_path)), tokenizer)[:6].tolist() == list(b"anders")


def test_texts_are_tokenised_again_where_they_begin_or_end_otherwise(tmp_path):
    tokenizer = convert.byte_tokenizer()
    (tmp_path / "a.txt").write_text("a")
    assert convert.load_tokens([tmp_path / "a.txt"], tokenizer).tolist() == [97, 256]
    tokenizer.end_of_text = 255
    assert convert.load_tokens([tmp_path / "a.txt"], tokenizer).tolist() == [97, 255]
    tokenizer.begin = [254]
    assert convert.load_tokens([tmp_path / "a.txt"], tokenizer).tolist() == [254, 97, 255]


def test_only_assistant_messages_are_learned(tmp_path):
    tokenizer, path = convert.byte_tokenizer(), tmp_path / "chats.jsonl"
    turns = [dict(role="user", content="2+2?"), dict(role="assistant", content="4"), dict(role="user", content="ok")]
    path.write_text(json.dumps(dict(messages=turns)) + "\n" + json.dumps(dict(text="plain")) + "\n")
    tokens = convert.load_tokens([path], tokenizer)
    x, y = convert.rows(tokens, [0], len(tokens) - 1)
    said = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n<|im_start|>user\nok<|im_end|>\n"
    assert tokenizer.decode(x[0].tolist()) == said + "<|endoftext|>plain"
    assert tokenizer.decode([i for i in y[0].tolist() if i >= 0]) == "4<|im_end|>plain<|endoftext|>"
    assert y[0, said.index("4") - 1] == ord("4")
    tokenizer.begin = [254, 255]  # is read and not learned, as the end of a conversation is
    assert next(convert.passages(path, tokenizer)).content[:2] == [~254, ~255]
    path.write_text(json.dumps(dict(messages=[dict(role="assistant", content=None)])))
    with pytest.raises(InputError, match='line 1 of .*chats.jsonl .its "content" is no string'):
        convert.load_tokens([path], tokenizer)


def test_only_completions_are_learned(tmp_path):
    tokenizer, path = convert.byte_tokenizer(), tmp_path / "lists.jsonl"
    records = [dict(prompt="2+2=", completion="4"), dict(prompt=["a>b b=1 b?", " a?"], completion=["1", "1"])]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    tokens = convert.load_tokens([path], tokenizer)
    x, y = convert.rows(tokens, [0], len(tokens) - 1)
    assert tokenizer.decode(x[0].tolist()) == "2+2=4<|endoftext|>a>b b=1 b?1 a?1"
    assert tokenizer.decode([i for i in y[0].tolist() if i >= 0]) == "4<|endoftext|>11<|endoftext|>"
    assert y[0, 3] == ord("4")


@pytest.mark.parametrize("name", ["llama2", "qwen3", "prefixed"])
def test_parts_of_a_document_have_the_ids_of_the_whole(tmp_path, name):
    file = GOLDEN / "tokenizers" / f"{name.replace('prefixed', 'gpt2')}.json"
    spec = json.loads(file.read_text(encoding="utf-8"))
    if name == "prefixed":
        spec["pre_tokenizer"]["add_prefix_space"] = True
    tokenizer, path = convert.Tokenizer(spec), tmp_path / "parts.jsonl"
    for prompt, completion in (("The sky is", " blue"), ("2+2=", "4"), ("x:", "\n\ny"), ("said:\n", "Hello you")):
        path.write_text(json.dumps(dict(prompt=prompt, completion=completion)))
        tokens = convert.load_tokens([path], tokenizer)
        whole = tokenizer.start(prompt + completion)
        assert np.where(tokens < 0, ~tokens, tokens)[: len(whole)].tolist() == whole
    for text in (" blue", " blue" * 20):  # what a caller does to the ids of a part changes no other part
        first = tokenizer.encode_after("The sky is", text)
        before = list(first)
        first.clear()
        assert tokenizer.encode_after("The sky is", text) == before != []


@pytest.mark.parametrize(
    "data",
    [
        b'{"text": "a"}\n\n  \n{"text": "b"}\n\n',  # blank lines
        b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}',  # a byte-order mark
        b'{"text": "a"}\r\n{"text": null}\r\n{"text": "b"}\r\n',
        b'{"text": "a", "id": 1}\n{"messages": null}\n{"messages": null, "text": "b"}\n',
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL"])
def test_jsonl_as_tools_write_it(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    tokens = convert.load_tokens([tmp_path / name], convert.byte_tokenizer())
    assert tokens.tolist() == [97, 256, 98, 256]


@pytest.mark.parametrize(
    "line, problem",
    [
        (b'{"text": "b"', "Expecting"),
        (b'{"text": "\xff"}', "utf-8"),
        (b'{"texts": "b"}', "has texts"),
        (b"{}", "has nothing"),
        (b"[]", "no object"),
        (b"null", "no object"),
        (b"[" * 100000, "recursion"),
        (b'{"text": 3}', '"text" is no string'),
        (b'{"messages": {}}', '"messages" are no list'),
        (b'{"messages": [1]}', "a message is no object"),
        (b'{"messages": [{"content": "b"}]}', '"role" is no string'),
        (b'{"messages": [{"role": "user", "content": ["b"]}]}', '"content" is no string'),
        (b'{"prompt": "b"}', '"completion" is no string'),
        (b'{"prompt": ["a", "b"], "completion": ["c"]}', "2 prompts and 1 completions"),
        (b'{"prompt": 1, "completion": "c"}', '"prompt" is no string'),
    ],
)
def test_jsonl_that_cannot_be_read_is_named_with_its_line(tmp_path, line, problem):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + line + b"\n")
    with pytest.raises(InputError, match=f"line 3 of .*a.jsonl .*{problem}.*: expected ") as e:
        convert.load_tokens([path], convert.byte_tokenizer())
    assert "\n" not in str(e.value)


def test_half_a_surrogate_pair_becomes_the_replacement_character(tmp_path):
    path, tokenizer = tmp_path / "a.jsonl", convert.byte_tokenizer()
    path.write_text('{"text": "a\\ud800b"}\n{"text": "\\ud83d\\ude00"}\n')
    assert tokenizer.decode(convert.load_tokens([path], tokenizer).tolist()) == "a\ufffdb<|endoftext|>😀<|endoftext|>"
    path.write_text('{"messages": [{"role": "assistant", "content": "\\udc00"}]}')
    assert "\ufffd" in tokenizer.decode([abs(i) for i in convert.load_tokens([path], tokenizer) if i >= 0])


def test_text_files_that_are_not_utf8_are_named(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffeins".encode())
    tokenizer = convert.byte_tokenizer()
    assert convert.load_tokens([tmp_path / "a.txt"], tokenizer).tolist() == [*b"eins", 256]
    (tmp_path / "a.txt").write_bytes("zwölf".encode("latin-1"))
    with pytest.raises(InputError, match="a.txt is not UTF-8 text .*position 2"):
        convert.load_tokens([tmp_path / "a.txt"], tokenizer)


def test_files_of_zero_bytes_hold_nothing(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "empty.bin").touch()
    with pytest.raises(InputError, match="is empty"):
        convert.find_files(str(tmp_path))
    (tmp_path / "a.txt").write_text("a")
    assert convert.find_files(str(tmp_path)) == [tmp_path / "a.txt"]
    (tmp_path / "a.jsonl").write_text("\n\n")
    for file in ("a.jsonl", "empty.bin"):
        with pytest.raises(InputError, match="there is no text in .*a.jsonl|empty.bin has 0 bytes"):
            convert.load_tokens([tmp_path / file], convert.byte_tokenizer())


def test_a_directory_is_entered_once_wherever_links_lead(tmp_path):
    data = tmp_path / "data"
    elsewhere = tmp_path / "elsewhere"
    for place in (data / "a" / "b", data / ".hidden", elsewhere):
        place.mkdir(parents=True)
        (place / "text.txt").write_text("text")
        (place / ".hidden.txt").write_text("text")
    for i in range(8):  # followed without end, or forty deep, there would be 8 ** 40 paths
        (data / "a" / f"back{i}").symlink_to(data)
    (data / "c").symlink_to(elsewhere)
    expected = [data / "a" / "b" / "text.txt", data / "c" / "text.txt"]
    begun = time.time()
    assert convert.find_files(str(data)) == convert.find_files(f"{data}/") == expected
    assert time.time() - begun < 5


def test_many_files_are_held_out_at_once(tmp_path, monkeypatch):
    files = [tmp_path / f"{i:06}.txt" for i in range(100_000)]
    monkeypatch.setattr(convert, "find_files", lambda data: list(files))
    monkeypatch.setattr(convert, "load_tokens", lambda files, tokenizer: files)
    begun = time.time()
    training, held_out = convert.load_data("many", "", None)
    assert held_out == files[::20] and len(training) == 95_000 and files[20] not in training[:100]
    assert time.time() - begun < 5


def test_find_files_takes_a_path_with_brackets_or_a_tilde(tmp_path, monkeypatch):
    (tmp_path / "[1]").mkdir()
    for name in ("[1]/a.txt", "b[1].txt", "b1.txt"):
        (tmp_path / name).write_text("text")
    assert convert.find_files(str(tmp_path / "b[1].txt")) == [tmp_path / "b[1].txt"]
    assert convert.find_files(str(tmp_path / "[1]")) == [tmp_path / "[1]" / "a.txt"]
    assert convert.find_files(str(tmp_path / "b?.txt")) == [tmp_path / "b1.txt"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert convert.find_files("~/b1.txt") == convert.find_files("~/b1*") == [tmp_path / "b1.txt"]


def test_conversations_without_an_assistant_have_nothing_to_learn(tmp_path):
    tokenizer, path = convert.byte_tokenizer(), tmp_path / "chats.jsonl"

    def conversation(role, length=4):
        return json.dumps(dict(messages=[dict(role=role, content="x" * length)])) + "\n"

    path.write_text(conversation("model") * 60)
    with pytest.raises(InputError, match='nothing to learn in .*chats.jsonl: .*"assistant" speaks'):
        convert.load_tokens([path], tokenizer)
    path.write_text(conversation("assistant") * 60 + conversation("user", 900))
    with pytest.raises(InputError, match="its last 20th, which is held out, .*: give --val"):
        convert.load_data(str(path), "", tokenizer)
    path.write_text(conversation("user", 900) + conversation("assistant") * 10)
    assert len(convert.load_data(str(path), "", tokenizer)[1]) > 0


def test_parquet_with_and_without_pyarrow(tmp_path, monkeypatch):
    tokenizer, path = convert.byte_tokenizer(), tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1")
    asked = []

    class ParquetFile:  # of pyarrow, which is an optional extra: the calls that passages makes of it
        def __init__(self, name):
            asked.append(name)

        def iter_batches(self, columns):
            assert columns == ["text"]
            for texts in (["eins", "zwei"], ["drei"]):
                yield SimpleNamespace(column=lambda i, texts=texts: SimpleNamespace(to_pylist=lambda: texts))

    monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", SimpleNamespace(ParquetFile=ParquetFile))
    tokens = convert.load_tokens([path], tokenizer)
    assert asked == [path] and tokens.tolist() == [*b"eins", 256, *b"zwei", 256, *b"drei", 256]
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    path.write_bytes(b"PAR2")
    with pytest.raises(InputError, match="rows.parquet: reading parquet needs pyarrow: pip install pyarrow"):
        convert.load_tokens([path], tokenizer)


def test_a_real_parquet_file(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table(dict(id=[1, 2, 3], text=["eins", "zwei ü", ""]))
    parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=2)
    tokens = convert.load_tokens(convert.find_files(str(tmp_path)), convert.byte_tokenizer())
    assert tokens.tolist() == [*b"eins", 256, *"zwei ü".encode(), 256, 256]
    for wrong in (dict(text=[1]), dict(words=["a"])):
        parquet.write_table(pyarrow.table(wrong), tmp_path / "wrong.PARQUET")
        with pytest.raises(InputError, match='expected parquet with a column "text" of strings'):
            convert.load_tokens([tmp_path / "wrong.PARQUET"], convert.byte_tokenizer())
    (tmp_path / "wrong.PARQUET").write_bytes(b"PAR1")
    with pytest.raises(InputError, match='expected parquet with a column "text" of strings'):
        convert.load_tokens([tmp_path / "wrong.PARQUET"], convert.byte_tokenizer())


def test_rows_do_not_learn_masked_tokens():
    """~i stands for a token i that is read and not learned: an input like any other, and no target."""
    tokens = np.arange(30, dtype=np.int32)
    tokens[5:20] = ~tokens[5:20]
    x, y = convert.rows(tokens, [0, 10], 12)
    assert x.tolist() == [[*range(12)], [*range(10, 22)]]
    assert y.tolist() == [[1, 2, 3, 4] + [-100] * 8, [-100] * 9 + [20, 21, 22]]


@pytest.mark.parametrize("dtype, n_vocab", [(np.uint16, 257), (np.uint16, 65536), (np.uint32, 65537)])
def test_bin_files_are_as_wide_as_the_vocabulary(tmp_path, dtype, n_vocab):
    tokenizer, path = convert.byte_tokenizer(), tmp_path / "tokens.bin"
    tokenizer.n_vocab = n_vocab
    ids = np.linspace(0, n_vocab - 1, 200).astype(dtype)
    ids.tofile(path)
    tokens = convert.load_tokens([path], tokenizer)
    assert tokens.tolist() == ids.tolist() and tokens.dtype == dtype and isinstance(tokens, np.memmap)
    ids[::-1].tofile(tmp_path / "more.bin")
    both = convert.load_tokens([path, tmp_path / "more.bin"], tokenizer)
    assert both.tolist() == [*ids.tolist(), *ids[::-1].tolist()]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=f"expected whole {dtype.__name__} tokens"):
        convert.load_tokens([path], tokenizer)


@pytest.mark.parametrize("dtype, n_vocab", [(np.uint16, 257), (np.uint32, 70000)])
def test_bin_file_of_a_larger_vocabulary_is_refused(tmp_path, dtype, n_vocab):
    tokenizer, path = convert.byte_tokenizer(), tmp_path / "tokens.bin"
    tokenizer.n_vocab = n_vocab
    np.arange(n_vocab + 1, dtype=dtype).tofile(path)
    with pytest.raises(InputError, match=f"holds tokens from 0 to {n_vocab}, the tokenizer has {n_vocab}"):
        convert.load_tokens([path], tokenizer)


WORDS = list(b"hello, world: these are the ids of a text, long enough to be told from chance")


@pytest.mark.parametrize("other", ["<i4", "<i8", ">i4", ">i8", "<f2", "<f4", "<f8"])
@pytest.mark.parametrize("n_vocab", [257, 50257])
def test_bin_file_of_another_type_is_refused(tmp_path, other, n_vocab):
    tokenizer, path = convert.byte_tokenizer(), tmp_path / "tokens.bin"
    tokenizer.n_vocab = n_vocab
    for ids in (WORDS, [n_vocab - 1 - i for i in WORDS], [~i for i in WORDS]):
        np.array(ids, dtype=other).tofile(path)
        with pytest.raises(InputError, match="tokens.bin .*(uint16|numpy.save)") as e:
            convert.load_tokens([path], tokenizer)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("other", ["<i8", ">i8", "<f4", "<f8", "<u2"])
def test_bin_file_of_another_type_is_refused_for_a_large_vocabulary(tmp_path, other):
    tokenizer, path = convert.byte_tokenizer(), tmp_path / "tokens.bin"
    tokenizer.n_vocab = 150000
    np.array(WORDS, dtype=other).tofile(path)
    with pytest.raises(InputError, match="tokens.bin .*uint32"):
        convert.load_tokens([path], tokenizer)


@pytest.mark.parametrize(
    "data, kind",
    [
        (np.array([20240520, 1, 100] + [0] * 253, dtype="<i4").tobytes() + bytes(range(200)), "of llm.c"),
        (b"\x93NUMPY\x01\x00" + bytes(range(200)), "a .npy file"),
        (b"PK\x03\x04" + bytes(range(200)), "a zip archive"),
        (b"\x1f\x8b" + bytes(range(200)), "compressed by gzip"),
        (b"It was the best of times,\nit was the worst of times.", "text, which needs another suffix"),
    ],
)
def test_bin_file_with_a_header_or_of_text_is_refused(tmp_path, data, kind):
    tokenizer, path = convert.byte_tokenizer(), tmp_path / "tokens.BIN"
    tokenizer.n_vocab = 65536
    path.write_bytes(data)
    with pytest.raises(InputError, match=f"tokens.BIN seems to be {kind}"):
        convert.load_tokens([path], tokenizer)


@pytest.mark.parametrize("n_vocab", [257, 32000, 50257, 65536, 151936])
def test_bin_files_of_plausible_ids_are_taken_at_any_length(tmp_path, n_vocab):
    """Most ids are small and some are large, as in texts: a few already do not look like another type."""
    tokenizer, path = convert.byte_tokenizer(), tmp_path / "tokens.bin"
    tokenizer.n_vocab = n_vocab
    ids = np.random.default_rng(0).zipf(1.2, 20000) % n_vocab
    ids = ids.astype(np.uint16 if n_vocab <= 65536 else np.uint32)
    for length in (8, 100, 10000):
        for start in range(0, 10000, 500):
            ids[start : start + length].tofile(path)
            assert np.array_equal(convert.load_tokens([path], tokenizer), ids[start : start + length])


@pytest.mark.parametrize("dtype", ["<i2", "<u2", "<i4", ">i4", "<i8", "<u8", "u1"])
def test_npy_files_name_their_own_type(tmp_path, dtype):
    tokenizer, path = convert.byte_tokenizer(), tmp_path / "tokens.NPY"
    with open(path, "wb") as file:
        np.save(file, np.array(WORDS, dtype=dtype))
    tokens = convert.load_tokens([path], tokenizer)
    assert tokens.tolist() == WORDS and isinstance(tokens, np.memmap)
    x, y = convert.rows(tokens, [0], 5)
    assert x.tolist() == [WORDS[:5]] and y.tolist() == [WORDS[1:6]]
    np.array(WORDS, dtype=np.uint16).tofile(tmp_path / "more.bin")
    assert convert.load_tokens([path, tmp_path / "more.bin"], tokenizer).tolist() == WORDS + WORDS


@pytest.mark.parametrize(
    "wrong, message",
    [
        (np.array([1.0, 2.0]), "holds float64 of shape .2.: expected a list of integers"),
        (np.array([[1, 2]]), "holds int64 of shape .1, 2.: expected a list"),
        (np.array([True]), "holds bool of shape"),
        (np.array([], dtype=int), "is no .npy file|holds int64 of shape .0."),
        (np.array([{}]), "is no .npy file"),
        (np.array([5, -1]), "holds tokens from -1 to 5"),
        (np.array([5, 257]), "holds tokens from 5 to 257, the tokenizer has 257"),
        (b"\x93NUMPY\x01", "is no .npy file"),
        (b"\x93NUMPY\x01\x00\x10\x00{'descr': '<i4',\n", "is no .npy file"),
        (b"PK\x03\x04", "tokens.npy"),
        (b"12", "is no .npy file"),
    ],
)
def test_npy_files_of_anything_else_are_refused(tmp_path, wrong, message):
    path = tmp_path / "tokens.npy"
    if isinstance(wrong, bytes):
        path.write_bytes(wrong)
    else:
        np.save(path, wrong)
    with pytest.raises(InputError, match=message) as e:
        convert.load_tokens([path], convert.byte_tokenizer())
    assert "\n" not in str(e.value)


def test_held_out_files_are_not_trained_on(tmp_path):
    tokenizer = convert.byte_tokenizer()
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text(f"{i:02}")
    train, held_out = convert.load_data(str(tmp_path), "", tokenizer)
    assert tokenizer.decode(held_out) == "00<|endoftext|>20<|endoftext|>" and len(train) == 38 * 3
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "x.txt").write_text("abcdefghij" * 10)
    train, held_out = convert.load_data(str(tmp_path / "one"), "", tokenizer)
    assert len(train) == 96 and tokenizer.decode(held_out) == "ghij<|endoftext|>"


# ---- where to cut


def test_layer_distances_of_the_golden_states():
    for family in ("gpt2", "llama"):
        expected = load_file(GOLDEN / family / "expected.safetensors")
        model, _ = convert.load(GOLDEN / family)
        h = expected["hidden_states"]
        distances = 1 - torch.nn.functional.cosine_similarity(h[:-1], h[1:], dim=-1).mean((1, 2))
        # transformers gives the last state after the final norm, so the last layer's distance is not comparable
        got = convert.layer_distances(model, expected["input_ids"])
        torch.testing.assert_close(got[:-1], distances[:-1], atol=1e-5, rtol=1e-4)


def test_choose_cuts_loops_the_plateau():
    profile = torch.tensor([1.0, 0.2, 0.04, 0.03, 0.05, 0.03, 0.04, 0.15, 0.04, 0.3])
    assert convert.choose_cuts(profile) == (2, 3)
    assert convert.choose_cuts(torch.ones(4)) == (1, 1)  # nothing stands out: all but the ends
    assert convert.choose_cuts(torch.tensor([1.0, 0.1, 0.1, 1.0, 0.1, 0.1, 1.0])) == (1, 4)  # of equals, the first
    assert convert.choose_cuts(torch.ones(1)) == (1, 1)  # too few layers to loop one: `cut` refuses that


@pytest.mark.parametrize("size, cuts", [((22, 2048), (1, 1)), ((28, 2048), (2, 1)), ((36, 4096), (6, 1))])
def test_default_cuts_are_the_papers_for_models_of_its_sizes(size, cuts):
    n_layer, n_embd = size
    with torch.device("meta"):  # sizes without memory: nothing may be computed
        model = LoopUS(Config(**sizes_of(n_layer=n_layer, n_embd=n_embd)))
    assert convert.default_cuts(model, None) == cuts


def sizes_of(**sizes):
    values = dict(vocab_size=8, block_size=8, n_head=1, n_kv_head=1, head_dim=8, n_inner=8, norm_eps=1e-5)
    return values | dict(norm="rms", mlp="swiglu", rotary=[1.0] * 4) | sizes


def test_default_cuts_of_other_sizes_follow_the_profile(tmp_path):
    model, tokenizer = convert.load(GOLDEN / "llama")
    distances = convert.layer_distances(model, convert.sample_text(model, tokenizer))
    expected = convert.choose_cuts(distances)
    assert convert.default_cuts(model, tokenizer) == expected
    assert (model.config.encoder_layers, model.config.decoder_layers) == expected
    model, _ = convert.load(GOLDEN / "llama", encoder_layers=expected[0] + 1)  # one of the two is given
    assert (model.config.encoder_layers, model.config.decoder_layers) == (expected[0] + 1, expected[1])


def test_cut_moves_the_borders_in_place():
    model, _ = convert.load(GOLDEN / "llama", encoder_layers=2, decoder_layers=1)
    assert [len(stack) for stack in (model.encoder, model.reasoning, model.decoder)] == [2, 1, 1]
    layers = model.layers()
    convert.cut(model, 0, 3)
    assert [len(stack) for stack in (model.encoder, model.reasoning, model.decoder)] == [0, 1, 3]
    assert all(a is b for a, b in zip(layers, model.layers()))
    with pytest.raises(InputError, match="no reasoning block"):
        convert.cut(model, 2, 2)


def test_a_model_of_two_layers_can_be_cut_by_hand(tmp_path):
    convert.save(random_model(n_layer=2, encoder_layers=0, decoder_layers=0), None, tmp_path / "two", "hf")
    model, _ = convert.load(tmp_path / "two", encoder_layers=1, decoder_layers=0)
    assert len(model.encoder) == len(model.reasoning) == 1


def test_a_model_without_the_config_it_was_loaded_with_cannot_be_written(tmp_path):
    with pytest.raises(InputError, match="only a model that was loaded by convert.load can be written"):
        convert.save(random_model("llama", base=None), None, tmp_path / "out")
    assert not (tmp_path / "out").exists()
