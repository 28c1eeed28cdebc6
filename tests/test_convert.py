"""Checkpoints in and out, the hub, tokenizers, text, and where to cut."""

import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import BASE, GOLDEN, ROOT, random_model
from safetensors.torch import load_file, save_file

import convert
from loopus import InputError

# ---- checkpoints


@pytest.mark.parametrize("format", ["authors", "hf"])
def test_saved_and_loaded_again_no_bit_is_lost(model, tmp_path, format):
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


def test_a_saved_model_can_be_cut_anew(model, tmp_path):
    convert.save(model, None, tmp_path / "out")
    again, tokenizer = convert.load(tmp_path / "out", encoder_layers=2, decoder_layers=0)
    assert tokenizer is None and len(again.encoder) == 2 and len(again.decoder) == 0
    idx = torch.randint(0, 257, (1, 9))
    torch.testing.assert_close(again(idx, 0), model(idx, 0))
    torch.testing.assert_close(again.gate.up.weight, model.gate.up.weight)


def test_hub_layout_has_the_names_of_transformers(tmp_path):
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


def test_wanted_dtype_and_untied_head():
    model, _ = convert.load(GOLDEN / "llama_tied", dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not model.training
    assert torch.equal(model.lm_head.weight, model.wte.weight)
    assert model.lm_head.weight.data_ptr() != model.wte.weight.data_ptr()


def test_old_names_of_the_authors_checkpoints(tmp_path):
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
def test_the_authors_format_goes_in_and_out(tmp_path, command, family):
    code, _, err = command(convert, GOLDEN / family, tmp_path / "theirs", "--format=authors")
    assert code == 0, err
    there, back = (load_file(d / "model.safetensors") for d in (GOLDEN / family, tmp_path / "theirs"))
    assert there.keys() == back.keys() and all(torch.equal(there[n], back[n]) for n in there)
    there, back = (json.loads((d / "config.json").read_text()) for d in (GOLDEN / family, tmp_path / "theirs"))
    assert {k for k in there if there[k] != back[k]} <= {"base_config_dict"}
    there, back = there["base_config_dict"], back["base_config_dict"]
    assert {k for k in there if there[k] != back[k]} <= {"tie_word_embeddings"}


@pytest.mark.parametrize("family", ["llama", "phi3", "llama_tied"])
def test_a_model_of_ours_in_the_authors_format(tmp_path, command, family):
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


def test_formats_that_cannot_be_written(tmp_path, command):
    code, _, err = command(convert, GOLDEN / "gpt2", tmp_path / "out", "--format=gguf")
    assert code == 2 and "invalid choice: 'gguf'" in err and err.count("\n") == 1
    with pytest.raises(InputError, match="only a model that was loaded by convert.load"):
        convert.save(random_model(base=None), None, tmp_path / "out", "hf")


def test_a_trained_middle_as_a_plain_model(tmp_path, command):
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


def test_weights_stay_as_stored(tmp_path, command):
    convert.save(random_model().half(), None, tmp_path / "half")
    code, _, err = command(convert, tmp_path / "half", tmp_path / "out")
    assert code == 0, err
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float16}


def test_loading_needs_little_more_memory_than_the_model(tmp_path):
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
        (dict(model_type="mamba"), "model_type mamba is not supported"),
        (dict(hidden_act="gelu"), "hidden_act gelu is not supported"),
        (dict(attention_bias=True), "q_proj.bias and .* missing"),
        (dict(sliding_window=16), "sliding window is not supported"),
        (dict(layer_types=["sliding_attention"] * 4), "sliding window is not supported"),
        (dict(rope_scaling=dict(rope_type="yarn", factor=4.0)), "rope_type yarn is not supported"),
        (dict(model_type="qwen3_moe"), "model_type qwen3_moe is not supported"),
        (dict(num_hidden_layers="gone"), "not the config of a model we know .*n_layer"),
        (dict(num_hidden_layers=3), "layers.3.input_layernorm.weight, .* unknown"),
        (dict(num_hidden_layers=5), "layers.4.input_layernorm.weight missing"),
        (dict(intermediate_size=96), r"mlp.gate_proj.weight \+ layers.0.mlp.up_proj.weight shaped \[80, 32\]"),
        (dict(vocab_size=300), r"embed_tokens.weight shaped \[259, 32\] instead of \[300, 32\]"),
        (dict(num_key_value_heads=3), r"v_proj.weight shaped .* instead of \[80, 32\]"),
        (dict(tensors=lambda t: t.pop("model.norm.weight")), "norm.weight missing"),
        (dict(tensors=lambda t: t.update(extra=torch.zeros(1))), "extra unknown"),
    ],
)
def test_checkpoints_that_contradict_themselves_are_refused(tmp_path, change, message):
    with pytest.raises(InputError, match=message) as e:
        convert.load(broken(tmp_path, **change))
    assert "\n" not in str(e.value)


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
    with pytest.raises(InputError, match="config.json is not the config of a model we know"):
        convert.load(directory)
    (directory / "config.json").unlink()
    with pytest.raises(InputError, match="no directory with a config.json"):
        convert.load(directory)


def test_tokenizer_of_another_model_is_refused(tmp_path):
    directory = broken(tmp_path)
    shutil.copy(GOLDEN / "tokenizers" / "gpt2.json", directory / "tokenizer.json")
    with pytest.raises(InputError, match="a tokenizer of 703 and a model of 259 tokens"):
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
def test_a_file_that_is_not_what_the_hub_states_is_thrown_away(hub, lie):
    hub |= lie
    with pytest.raises(InputError, match="model.safetensors is not what the hub states"):
        convert.load("owner/name")
    assert not list(convert.cache_dir().rglob("model.safetensors*"))
    for key in lie:
        del hub[key]
    convert.load("owner/name")


def test_a_file_shorter_than_stated_is_not_taken(hub):
    hub["size"] = 10**6
    with pytest.raises(InputError, match="broke off after [0-9]+ of 1000000 bytes: run it again"):
        convert.load("owner/name")


def test_a_rest_of_another_version_is_found_out(hub):
    hub["break_off"] = "model.safetensors"
    with pytest.raises(InputError):
        convert.load("owner/name")
    hub["other"] = "model.safetensors"
    with pytest.raises(InputError, match="not what the hub states"):
        convert.load("owner/name")
    hub["other"] = None
    convert.load("owner/name")


def test_a_copy_of_the_hubs_own_tools_is_used_in_place(tmp_path, monkeypatch):
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
def test_what_the_hub_refuses(hub, status, hint):
    hub["status"] = status
    with pytest.raises(InputError, match=f"the hub answered {status} for .*config.json: {hint}"):
        convert.load("owner/name")


def test_offline_says_so():
    with pytest.raises(InputError, match="cannot fetch .*config.json .*go online"):
        convert.load("owner/name")
    with pytest.raises(InputError, match="no directory with a config.json here and no name on the hub"):
        convert.load("no/such/directory")


# ---- tokenizers


@pytest.mark.parametrize("family", ["gpt2", "llama3", "qwen3", "smollm2", "llama2"])
def test_ids_and_text_of_the_tokenizers_library(family):
    tokenizer = convert.Tokenizer(json.loads((GOLDEN / "tokenizers" / f"{family}.json").read_text(encoding="utf-8")))
    expected = json.loads((GOLDEN / "tokenizers" / f"{family}.expected.json").read_text(encoding="utf-8"))
    assert len(expected) > 5
    for row in expected:
        assert tokenizer.encode(row["text"]) == row["ids"]
        assert tokenizer.decode(row["ids"]) == row["decoded"]
    assert tokenizer.n_vocab == (703 if family in ("gpt2", "llama3", "qwen3") else 700)


def golden_spec(family):
    return json.loads((GOLDEN / "tokenizers" / f"{family}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(pre_tokenizer=dict(type="Whitespace")), "BPE after Sequence and Whitespace is not supported"),
        (dict(normalizer=dict(type="Lowercase")), "BPE after Lowercase and none is not supported"),
        (dict(model=dict(type="Unigram", vocab={})), "Unigram after Sequence and none is not supported"),
    ],
)
def test_unsupported_tokenizers_are_named(change, message):
    with pytest.raises(InputError, match=message):
        convert.Tokenizer(golden_spec("llama2") | change)


def test_sentencepiece_puts_a_space_where_the_file_says():
    words = dict(type="Metaspace", replacement="▁", split=False)
    text = "the<s>the <s> the"
    wanted = {"always": " the<s> the <s> the", "first": " the<s>the <s> the", "never": "the<s>the <s> the"}
    for scheme, spaced in wanted.items():
        spec = golden_spec("llama2") | dict(normalizer=None, pre_tokenizer=words | dict(prepend_scheme=scheme))
        tokenizer = convert.Tokenizer(spec)
        assert b"".join(tokenizer.bytes_of[i] for i in tokenizer.encode(text)).decode() == spaced
    tokenizer = convert.Tokenizer(golden_spec("llama2"))  # the older kind puts one before every part
    assert b"".join(tokenizer.bytes_of[i] for i in tokenizer.encode(text)).decode() == " the<s> the <s>  the"
    assert tokenizer.decode(tokenizer.encode("the")) == "the"


def test_tokens_that_join_words():
    spec = golden_spec("llama2")
    spec["model"]["vocab"] |= {"e▁t": 700}
    spec["model"]["merges"].insert(0, ["e", "▁t"])
    tokenizer = convert.Tokenizer(spec)
    assert 700 in tokenizer.encode("the tee") and tokenizer.pieces.findall("a\nb") == ["a\nb"]


def test_added_tokens_take_the_spaces_that_they_are_to():
    spec = golden_spec("gpt2")
    for token in spec["added_tokens"]:
        token["lstrip"], token["rstrip"] = token["id"] == 701, token["id"] != 700
    tokenizer = convert.Tokenizer(spec)
    a = tokenizer.encode("a")
    assert tokenizer.encode("a <|im_start|> a") == [*a, 701, *a]
    assert tokenizer.encode("a<|im_end|>  a") == [*a, 702, *a]
    assert tokenizer.encode("a<|endoftext|> a") == [*a, 700, *tokenizer.encode(" a")]


def test_whole_words_without_merges():
    spec = golden_spec("llama3")
    spec["model"]["vocab"] |= {"Ġxyzzy": 703}
    spec["model"]["ignore_merges"] = True
    assert convert.Tokenizer(spec).encode("a xyzzy")[1:] == [703]


def test_what_stands_before_each_text(tmp_path):
    spec = golden_spec("llama2")
    single = [dict(SpecialToken=dict(id="<s>", type_id=0)), dict(Sequence=dict(id="A", type_id=0))]
    template = dict(type="TemplateProcessing", single=single, special_tokens={"<s>": dict(id="<s>", ids=[1])})
    for processor in (template, dict(type="Sequence", processors=[dict(type="ByteLevel"), template])):
        tokenizer = convert.Tokenizer(spec | dict(post_processor=processor))
        assert tokenizer.begin == [1]
    (tmp_path / "a.txt").write_text("the")
    assert convert.load_tokens([tmp_path / "a.txt"], tokenizer).tolist() == [1, *tokenizer.encode("the"), 2]


def test_bytes_are_their_own_tokens():
    tokenizer = convert.byte_tokenizer()
    text = "def f():\n\treturn 'ü€'  # \x00\n\n"
    assert tokenizer.encode(text) == list(text.encode()) and tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("a<|endoftext|>") == [97, 256] and tokenizer.end_of_text == 256


# ---- text


def test_texts_become_tokens_once(tmp_path):
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
    for wrong in ('{"texts": 1}', "[]", '{"text": 3}', "{"):
        (tmp_path / "a.jsonl").write_text(wrong)
        with pytest.raises(InputError, match='a.jsonl is not UTF-8 text, or lines or rows with a "text"'):
            convert.load_tokens(convert.find_files(str(tmp_path)), tokenizer)
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "a.txt").write_text("anders")
    assert convert.load_tokens(convert.find_files(str(tmp_path)), tokenizer)[:6].tolist() == list(b"anders")


@pytest.mark.parametrize("family", ["gpt2", "llama3", "qwen3", "smollm2", "llama2"])
def test_pieces_do_not_change_the_tokens(tmp_path, family):
    tokenizer = convert.Tokenizer(json.loads((GOLDEN / "tokenizers" / f"{family}.json").read_text(encoding="utf-8")))
    path = tmp_path / "text.txt"
    verse = "".join(f"Line {i} of it,\nit's; {i * i}\n" for i in range(300)) + "x\r\ny\n\n\n z.\n9\n'll _\n_"
    text = verse.replace("\r", " ") + (ROOT / "loopus.py").read_text(encoding="utf-8")
    path.write_text(text, encoding="utf-8")
    tokenizer.pieces = re.compile(tokenizer.pieces.pattern.replace("1048576", "100"))
    passages = list(convert.passages(path, tokenizer))[1:-1]
    assert len(passages) > 50 or tokenizer.prefix and len(passages) == 1
    assert "".join(passages) == text
    assert [i for passage in passages for i in tokenizer.encode(passage)] == tokenizer.encode(text)


def test_of_messages_what_the_assistant_says_is_learned(tmp_path):
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
    assert next(convert.passages(path, tokenizer)) == [~254, ~255]
    path.write_text(json.dumps(dict(messages=[dict(role="assistant", content=None)])))
    with pytest.raises(InputError, match="chats.jsonl is not UTF-8 text, or lines"):
        convert.load_tokens([path], tokenizer)


def test_parquet_and_the_line_without_pyarrow(tmp_path, monkeypatch):
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


def test_tokens_that_are_read_and_not_learned(tmp_path):
    """~i in a file of int32: the token i, which is no target; it counts neither in training nor in evaluation."""
    ids = np.arange(30, dtype=np.int32)
    ids[5:20] = ~ids[5:20]
    ids.tofile(tmp_path / "tokens.bin")
    tokens = convert.load_tokens([tmp_path / "tokens.bin"], convert.byte_tokenizer())
    x, y = convert.rows(tokens, [0, 10], 12)
    assert x.tolist() == [[*range(12)], [*range(10, 22)]]
    assert y.tolist() == [[1, 2, 3, 4] + [-100] * 8, [-100] * 9 + [20, 21, 22]]
    ids[7] = ~300
    ids.tofile(tmp_path / "tokens.bin")
    with pytest.raises(InputError, match="holds token 300, the tokenizer has 257"):
        convert.load_tokens([tmp_path / "tokens.bin"], convert.byte_tokenizer())


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_token_files(tmp_path, dtype):
    path = tmp_path / "tokens.bin"
    np.arange(200, dtype=dtype).tofile(path)
    tokens = convert.load_tokens([path], convert.byte_tokenizer())
    assert tokens.tolist() == list(range(200)) and tokens.dtype == dtype
    np.arange(300, dtype=dtype).tofile(path)
    with pytest.raises(InputError, match="holds token 299, the tokenizer has 257"):
        convert.load_tokens([path], convert.byte_tokenizer())
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "more.bin")
    np.arange(200, dtype=dtype).tofile(path)
    both = convert.load_tokens([tmp_path / "more.bin", path], convert.byte_tokenizer())
    assert both.tolist() == [*range(100), *range(200)]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="expected whole"):
        convert.load_tokens([path], convert.byte_tokenizer())


def test_held_out_text_is_never_trained_on(tmp_path):
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


def test_layer_distances_are_those_of_the_golden_states():
    for family in ("gpt2", "llama"):
        expected = load_file(GOLDEN / family / "expected.safetensors")
        model, _ = convert.load(GOLDEN / family)
        h = expected["hidden_states"]
        distances = 1 - torch.nn.functional.cosine_similarity(h[:-1], h[1:], dim=-1).mean((1, 2))
        # transformers gives the last state after the final norm, so the last layer's distance is not comparable
        got = convert.layer_distances(model, expected["input_ids"])
        torch.testing.assert_close(got[:-1], distances[:-1], atol=1e-5, rtol=1e-4)


def test_the_plateau_is_looped():
    profile = torch.tensor([1.0, 0.2, 0.04, 0.03, 0.05, 0.03, 0.04, 0.15, 0.04, 0.3])
    assert convert.choose_cuts(profile) == (2, 3)
    assert convert.choose_cuts(torch.ones(4)) == (1, 1)  # nothing stands out: all but the ends


def test_cuts_of_the_paper_by_size(tmp_path):
    model, _ = convert.load(GOLDEN / "llama", encoder_layers=2)
    assert model.config.encoder_layers == 2
    convert.cut(model, 0, 3)
    assert [len(s) for s in (model.encoder, model.reasoning, model.decoder)] == [0, 1, 3]
    with pytest.raises(InputError, match="no reasoning block"):
        convert.cut(model, 2, 2)
