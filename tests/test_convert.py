"""Checkpoints in and out, saving, the hub, names of models, text, where to cut, and the command line."""

import json
import os
import re
import shutil
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import GOLDEN, random_model
from safetensors.torch import load_file, save_file

import convert
import sample
from convert import InputError, byte_tokenizer

FAMILIES = ["gpt2", "llama", "llama_tied", "llama3_rope", "qwen3", "phi3"]
AUTHORS = ["loopus_reference_llama", "loopus_reference_qwen3"]
EXACT = dict(atol=0, rtol=0)
PLACES = {"owner/name": "/owner/name/resolve/main", "owner/name@v2": "/owner/name/resolve/v2"}
PLACES["gpt2"] = "/openai-community/gpt2/resolve/main"
SAID = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n<|im_start|>assistant\n5<|im_end|>\n¶"


def refused(call, *named):
    """The call ends in an InputError of one line that has all these words in it."""
    with pytest.raises(InputError) as error:
        call()
    assert "\n" not in str(error.value)
    for word in named:
        assert word in str(error.value)


def weights(directory):
    return {name: tensor for file in directory.glob("model*.safetensors") for name, tensor in load_file(file).items()}


def config_of(directory):
    return json.loads((directory / "config.json").read_text())


def changed(family="llama", tensors=None, **config):
    """A copy of a golden checkpoint: tensors(dict) gives its weights, config goes into its config.json."""
    copy = Path(shutil.copytree(GOLDEN / family, "changed"))
    (copy / "config.json").write_text(json.dumps(config_of(GOLDEN / family) | config))
    if tensors:
        save_file(tensors(weights(GOLDEN / family)), copy / "model.safetensors")
    return copy


@torch.no_grad()
def assert_golden(model, family="llama"):
    expected = load_file(GOLDEN / family / "expected.safetensors")
    torch.testing.assert_close(model(expected["input_ids"], 0), expected["logits"], atol=1e-4, rtol=0)


# ---- Checkpoints
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_zero_passes_give_the_golden_logits_of_transformers(family):
    expected = load_file(GOLDEN / family / "expected.safetensors")
    model, _ = convert.load(GOLDEN / family, encoder_layers=0, decoder_layers=0)
    states = [model.encode(expected["input_ids"])]
    for block in model.layers():
        states.append(block(states[-1], model.positions([0], 24)))
    states[-1] = model.norm(states[-1])  # transformers shows the last state after the final norm
    torch.testing.assert_close(torch.stack(states), expected["hidden_states"], atol=1e-4, rtol=1e-4)
    assert_golden(model, family)


@pytest.mark.parametrize("family, biases", [("qwen2", ["qkv"]), ("llama", ["qkv", "out", "mlp"]), ("mistral", [])])
def test_families_that_differ_in_their_biases(tmp_path, family, biases):
    stated = dict(attention_bias=True, mlp_bias=True) if family == "llama" else {}
    model = random_model(base=dict(model_type=family) | stated)
    convert.save(model, None, tmp_path / "hf", "hf")
    names = weights(tmp_path / "hf").keys()
    for name, module in dict(qkv="self_attn.v_proj", out="self_attn.o_proj", mlp="mlp.gate_proj").items():
        assert (f"model.layers.0.{module}.bias" in names) == (name in biases)
    again, _ = convert.load(tmp_path / "hf", encoder_layers=1, decoder_layers=1)
    torch.testing.assert_close(again.reasoning.state_dict(), model.reasoning.state_dict(), **EXACT)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pretrained_model_is_written_as_the_authors_do_and_back(tmp_path, command, family):
    cuts = ("--encoder_layers=2", "--decoder_layers=1")
    code, out, _ = command(convert, GOLDEN / family, tmp_path / "looped", *cuts, "--profile")
    assert code == 0 and "2 + 1 + 1 layers" in out and "\nlayer  3 " in out and "taken: 2, 1" in out
    config = config_of(tmp_path / "looped")
    assert [config[f"{part}_layer_indices"] for part in ("encoder", "reasoning", "decoder")] == [[0, 1], [2], [3]]
    assert (config["model_type"], config["q_threshold"], config["N"]) == ("lds", 0.6, 8)
    assert command(convert, tmp_path / "looped", tmp_path / "back", "--format=hf")[0] == 0
    assert config_of(tmp_path / "back") == config_of(GOLDEN / family) | dict(tie_word_embeddings=False)
    back = weights(tmp_path / "back")
    for name, tensor in weights(GOLDEN / family).items():
        if not name.endswith(".attn.bias"):
            assert torch.equal(back[f"transformer.{name}" if family == "gpt2" else name], tensor), name


@pytest.mark.parametrize("family", AUTHORS)
def test_checkpoints_of_the_authors_with_new_or_old_names_are_written_back_as_theirs(tmp_path, command, family):
    def renamed(state):
        old = {name: name.replace("reasoning.", "plateau.").replace("gate.", "gate.module.") for name in state}
        return {f"module.{old[name]}": tensor for name, tensor in state.items()}

    for source, out in ((GOLDEN / family, "new"), (changed(family, renamed, N=4), "old")):
        assert command(convert, source, out)[0] == 0
        torch.testing.assert_close(weights(tmp_path / out), weights(GOLDEN / family), **EXACT)
        assert config_of(tmp_path / out).items() <= config_of(source).items()


def test_each_tensor_keeps_its_type_and_a_stored_head_is_taken_whatever_the_config_says(tmp_path, command):
    head = torch.randn(259, 32).half()
    directory = changed("llama_tied", lambda state: state | {"lm_head.weight": head})
    assert command(convert, directory, "out", "--format=hf")[0] == 0
    torch.testing.assert_close(weights(tmp_path / "out"), weights(directory), **EXACT)


def test_shards_without_an_index_are_read_by_their_names():
    directory = changed("qwen3")
    (directory / convert.INDEX).unlink()
    assert_golden(convert.load(directory)[0], "qwen3")


@pytest.mark.parametrize(
    "change, named",
    [
        (dict(model_type="qwen3_moe"), "model_type 'qwen3_moe'"),
        (dict(rope_scaling=dict(type="linear", factor=2.0)), "rope_type 'linear'"),
        (dict(rope_parameters=dict(rope_type="yarn", factor=4.0)), "rope_type 'yarn'"),
        (dict(rope_parameters=dict(full_attention=dict(rope_type="default"))), "differ between layers"),
        (dict(sliding_window=16), "sliding window"),
        (dict(model_type="mistral", sliding_window=16), "sliding window"),
        (dict(tensors=lambda state: state | dict(a=torch.zeros(2, dtype=torch.int32))), "quantized"),
        (dict(hidden_size="many"), "config.json: ValueError: invalid literal for int"),
        (dict(num_hidden_layers=5), "layers.4.input_layernorm.weight, "),
        (dict(num_hidden_layers=3), "layers.3.input_layernorm.weight, "),
        (dict(num_hidden_layers=10**9), "1000000000 layers of "),
        (dict(tensors=lambda s: s | {"model.norm.weight": torch.full([32], torch.nan)}), "norm.weight']: not finite"),
        (dict(tensors=lambda state: state | {"model.norm.weight": torch.zeros(9)}), "norm.weight"),
        (dict(tensors=lambda s: s | {"model.layers.0.mlp.up_proj.weight": torch.zeros(80, 9)}), "up_proj"),
        (dict(family=AUTHORS[0], decoder_layer_indices=[2]), "its layers are [[0], [1, 2], [2]]"),
    ],
)
def test_what_cannot_be_run_is_named_in_one_line(change, named):
    refused(lambda: convert.load(changed(**change)), named)


@pytest.mark.parametrize(
    "change",
    [
        dict(num_key_value_heads=2.0, intermediate_size=80.0, rope_theta=10000),
        dict(hidden_act=None, tie_word_embeddings=None, attention_bias=None, head_dim=None, rope_scaling={}),
        dict(rope_theta=5.0, rope_parameters=dict(rope_theta=10000.0, rope_type="default")),  # the inner one holds
        dict(model_type="mistral", sliding_window=None, layer_types=["full_attention"] * 4),
    ],
)
def test_configs_in_other_words_are_the_same_model(change):
    assert_golden(convert.load(changed(**change))[0])


def test_what_is_null_in_a_config_is_as_if_it_were_not_there():
    assert_golden(convert.load(changed("gpt2", tie_word_embeddings=None))[0], "gpt2")
    config = config_of(GOLDEN / "llama") | dict(rope_theta=5e5)
    _, outer = convert.read_family(config)
    _, inner = convert.read_family(config | dict(rope_parameters=dict(rope_type="default", rope_theta=None)))
    assert inner["rotary"] == outer["rotary"]


# ---- Saving
def content_of(directory):
    return {path: path.is_file() and path.read_bytes() for path in directory.rglob("*")}


@pytest.mark.parametrize("error, seen", [(KeyboardInterrupt, KeyboardInterrupt), (OSError, InputError)])
def test_an_exception_while_writing_leaves_what_was_there(tmp_path, error, seen):
    convert.save(random_model(), None, "out")
    Path("out/notes.txt").write_text("mine")
    before = content_of(tmp_path)
    for out in ("out", "other"):
        with pytest.raises(seen), convert.all_or_nothing(out) as unfinished:
            convert.write_checkpoint(random_model(seed=1), None, unfinished)
            raise error
    refused(lambda: convert.save(random_model(), None, "out/notes.txt/out"), "cannot write out/notes.txt/out")
    assert content_of(tmp_path) == before
    convert.save(random_model(seed=1), None, "out")
    after = content_of(tmp_path)
    assert [path.name for path in before if after[path] != before[path]] == ["model.safetensors"]


@pytest.mark.parametrize("format, out", [("authors", "."), ("hf", "~/out")])
def test_the_tokenizers_files_are_written_back_byte_for_byte(tmp_path, monkeypatch, format, out):
    monkeypatch.setenv("HOME", str(tmp_path))
    convert.save(random_model("gpt2"), byte_tokenizer(), "source", "hf")
    for name in ("tokenizer_config", "special_tokens_map", "added_tokens", "generation_config"):
        Path(f"source/{name}.json").write_bytes(b"{ }\r\n")
    Path("source/chat_template.jinja").write_bytes(b"{{ messages }}\r\n")
    convert.save(*convert.load("source"), out, format)
    for name in {path.name for path in Path("source").iterdir()} - {"config.json", "model.safetensors"}:
        assert (Path(out).expanduser() / name).read_bytes() == Path("source", name).read_bytes(), name


# ---- The hub, on a local server
class Handler(SimpleHTTPRequestHandler):
    """Serves a directory as the hub does: weights by a redirect to another host, small files by one to itself."""

    def do_GET(self):
        hub = self.server.hub
        hub.asked.append((self.path, self.headers["Authorization"]))
        place, _, name = self.path.rpartition("/")
        if place == hub.place and (hub.directory / name).exists():
            host = f"http://localhost:{self.server.server_port}/cdn" if name.endswith(".safetensors") else "/cache"
            self.send_response(302)
            self.send_header("Location", f"{host}/{name}")
            return self.end_headers()
        if place not in ("/cdn", "/cache"):
            return self.send_error(404)
        self.directory, self.path = hub.directory, f"/{name}"
        super().do_GET()

    def copyfile(self, source, outputfile):
        outputfile.write(source.read()[: 99 if self.path[1:] == self.server.hub.breaks_off else None])


@pytest.fixture
def hub(monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.hub = SimpleNamespace(asked=[], directory=GOLDEN / "llama", place=PLACES["owner/name"], breaks_off="")
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
        yield server.hub
        server.shutdown()


@pytest.mark.parametrize("name, family", [("owner/name", "llama"), ("owner/name@v2", "qwen3"), ("gpt2", "gpt2")])
def test_a_model_is_fetched_once_into_the_cache(hub, name, family):
    hub.place = PLACES[name]
    hub.directory = GOLDEN / family
    assert_golden(convert.load(name)[0], family)
    assert Path(os.environ["LOOPUS_CACHE"]) in convert.resolve(name).parents
    asked = len(hub.asked)
    assert_golden(convert.load(name)[0], family)
    assert len(hub.asked) == asked


@pytest.mark.parametrize(
    "stated_in, path, token",
    [
        ("HF_TOKEN", "/owner/name/resolve/main/config.json", "Bearer secret"),
        ("HF_HOME", "/owner/name/resolve/main/config.json", "Bearer secret"),  # where the hub's own login puts it
        ("LANG", "/owner/name/resolve/main/config.json", None),
        ("HF_TOKEN", "/cdn/model.safetensors", None),
        ("HF_TOKEN", "/cache/config.json", "Bearer secret"),
    ],
)
def test_the_token_is_sent_to_the_hub_and_to_no_other_host(hub, monkeypatch, stated_in, path, token):
    Path("token").write_text("secret\n")
    monkeypatch.setenv(stated_in, dict(HF_TOKEN="secret", HF_HOME=".", LANG="")[stated_in])
    convert.resolve("owner/name")
    assert dict(hub.asked)[path] == token


def test_what_goes_wrong_at_the_hub_is_named_in_one_line_and_leaves_nothing(hub, monkeypatch):
    refused(lambda: convert.load("owner/other"), "/owner/other/resolve/main/config.json", "404")
    for hub.breaks_off in ("model.safetensors", "config.json"):
        refused(lambda: convert.load("owner/name"), hub.breaks_off, "broke off after 99 of")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    refused(lambda: convert.load("owner/name"), "cannot fetch http://127.0.0.1:9/owner/name")
    assert not list(Path(os.environ["LOOPUS_CACHE"]).rglob("*.*"))


def test_the_hubs_own_cache_is_used_where_it_holds_the_whole_model(monkeypatch):
    monkeypatch.setenv("HF_HOME", "home")
    monkeypatch.setenv("LOOPUS_CACHE", "/proc/none")  # where nothing can be written
    model = Path("home/hub/models--owner--name")
    snapshot = shutil.copytree(GOLDEN / "qwen3", model / "snapshots" / "abc123")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("abc123\n")
    assert convert.resolve("owner/name") == convert.resolve("owner/name@abc123") == snapshot
    (snapshot / "model-00002-of-00002.safetensors").unlink()
    monkeypatch.setenv("LOOPUS_CACHE", "cache")
    refused(lambda: convert.resolve("owner/name"), "cannot fetch", "/resolve/abc123/")


def test_without_a_writable_cache_a_local_model_loads_and_a_download_says_what_to_do(hub, monkeypatch):
    Path("file").touch()
    monkeypatch.setenv("LOOPUS_CACHE", "file/cache")
    assert_golden(convert.load(GOLDEN / "llama")[0])
    refused(lambda: convert.load("owner/name"), "cannot write file/cache/owner--name@main", "LOOPUS_CACHE")


# ---- Names of models
def make_model(directory, modified):
    Path(directory).mkdir(parents=True)
    Path(directory, "config.json").write_text("{}")
    os.utime(Path(directory, "config.json"), (modified, modified))


def test_without_a_name_the_newest_finished_checkpoint_below_out_is_taken(capsys):
    refused(lambda: convert.resolve(""), "no model below ./out")
    make_model("out/z/step-0000900", modified=1000)
    make_model("out/deep/b/step-0000100", modified=2000)
    make_model("out/deep/b/step-0000200.new-12ab", modified=3000)  # of a run that was killed
    make_model("out/converted", modified=4000)  # of no run
    assert convert.resolve("") == Path("out/deep/b/step-0000100")
    assert capsys.readouterr().err == "no --init: taking the newest model, out/deep/b/step-0000100\n"


def test_a_directory_is_taken_by_its_path_and_of_a_run_its_last_step(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    make_model("run[1]/step-0000200", modified=1000)
    make_model("run[1]/step-0000100", modified=2000)
    assert convert.resolve("run[1]") == Path("run[1]/step-0000200")
    assert convert.resolve("~/run[1]/step-0000100") == tmp_path / "run[1]" / "step-0000100"
    for name in ("gone", "../gone", "no/such/model", "run[1]/step-0000100/config.json", "~/gone"):
        refused(lambda name=name: convert.resolve(name), name[2:], "is no directory with a config.json here")


# ---- Text
def golden_tokenizer(name):
    if name == "llama2":
        pytest.importorskip("tokenizers")
    return convert.Tokenizer(json.loads((GOLDEN / "tokenizers" / f"{name}.json").read_text(encoding="utf-8")))


def tokens_of(name, content, tokenizer=None):
    if isinstance(content, list):
        content = "\n".join(map(json.dumps, content))
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return convert.load_tokens([Path(name)], tokenizer or byte_tokenizer())


def read_and_learned(tokens, tokenizer):
    """What a model reads in these tokens, and what of it is learned: ¶ is the end of a text."""
    texts = [[i if i >= 0 else ~i for i in tokens], [i for i in tokens if i >= 0]]
    return [tokenizer.decode(ids).replace("<|endoftext|>", "¶") for ids in texts]


def talk(**mark):
    answers = [dict(role="assistant", content="4") | mark, dict(role="assistant", content="5")]
    return [dict(messages=[dict(role="user", content="2+2?"), *answers])]


@pytest.mark.parametrize(
    "name, content, text, learned",
    [
        ("a.jsonl", '\ufeff{"text": "a", "id": 1}\r\n\r\n{"text": null}\r\n{"text": "b"}', "a¶b¶", "a¶b¶"),
        ("a.JSON", '{"text": "a"}\n{"text": "b"}\n', "a¶b¶", "a¶b¶"),
        ("a.json", '\n [{"text": "a"},\n  {"text": "b"}]', "a¶b¶", "a¶b¶"),
        ("a.txt", "\ufeffa<|endoftext|>b", "a¶b¶", "a¶b¶"),
        ("a.jsonl", [dict(prompt="2+2=", completion="4")], "2+2=4¶", "4¶"),
        ("a.jsonl", [dict(prompt=["a?", " b?"], completion=["1", "2"])], "a?1 b?2¶", "12¶"),
        ("a.jsonl", talk(), SAID, "4<|im_end|>5<|im_end|>"),
        ("a.jsonl", talk(weight=0), SAID, "5<|im_end|>"),
        ("a.jsonl", talk(train=False), SAID, "5<|im_end|>"),
        ("a.jsonl", talk(weight=None), SAID, "4<|im_end|>5<|im_end|>"),
    ],
)
def test_what_is_read_in_a_file_and_what_of_it_is_learned(name, content, text, learned):
    assert read_and_learned(tokens_of(name, content), byte_tokenizer()) == [text, learned]


def test_each_row_of_a_parquet_file_is_a_record(monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table(dict(id=[1, 2, 3], text=["a", None, "b"]))
    pytest.importorskip("pyarrow.parquet").write_table(table, "rows.parquet", row_group_size=2)
    assert convert.load_tokens([Path("rows.parquet")], byte_tokenizer()).tolist() == [97, 256, 98, 256]
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    refused(lambda: tokens_of("a.parquet", b"PAR1"), "a.parquet", 'pip install ".[parquet]"')


@pytest.mark.parametrize("parts", [("The sky is", " blue"), ("2+2=", "4"), ("th", "e sky")])
def test_the_space_that_some_tokenizers_put_in_front_is_not_put_between_parts(parts):
    tokenizer = golden_tokenizer("llama2")
    tokens = tokens_of("a.jsonl", [dict(prompt=parts[0], completion=parts[1])], tokenizer)
    assert read_and_learned(tokens, tokenizer)[0] == "".join(parts) + "</s>"


@pytest.mark.parametrize(
    "name, content, named",
    [
        ("a.jsonl", [dict(text="a"), dict(texts="b", id=1)], "record 2: has texts, id: expected"),
        ("a.jsonl", [dict(prompt=["a", "b"], completion=["c"])], "record 1: 2 prompts and 1 completions"),
        ("a.jsonl", [dict(text="a"), dict(text=3)], "record 2"),
        ("a.jsonl", [dict(text="a"), dict(prompt="b", response="c")], "completion"),
        ("a.jsonl", [dict(messages=[dict(role="user", content="b")])], "nothing is to be learned"),
        ("a.jsonl", b'{"text": "b"', "JSON"),
        ("a.txt", b"zw\xf6lf", "utf-8"),
        ("a.parquet", b"PAR1", ""),
        ("a.bin", b"123", ""),
    ],
)
def test_text_that_cannot_be_read_is_named_in_one_line(name, content, named):
    refused(lambda: tokens_of(name, content), name, named)


def test_a_text_is_tokenised_once_and_again_when_it_or_the_tokenizer_changes():
    tokenizer = byte_tokenizer()
    for content, modified, expected in (("one", 1, b"one"), ("two", 1, b"one"), ("two", 2, b"two")):
        Path("a.txt").write_text(content)
        os.utime("a.txt", (modified, modified))
        assert convert.load_tokens([Path("a.txt")], tokenizer).tolist() == [*expected, 256]
    tokenizer.begin = [254]
    assert convert.load_tokens([Path("a.txt")], tokenizer).tolist() == [254, *b"two", 256]


def test_data_is_a_directory_a_glob_a_file_or_the_standard_library(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.txt", "b[1].txt", "b1.txt", "sub/c.txt", ".d.txt", ".sub/e.txt", "empty.txt"):
        Path("data", name).parent.mkdir(parents=True, exist_ok=True)
        Path("data", name).write_text("" if name == "empty.txt" else "text")
    assert convert.find_files("data") == [Path("data", name) for name in ("a.txt", "b1.txt", "b[1].txt", "sub/c.txt")]
    assert convert.find_files("data/**/b*") == [Path("data/b1.txt"), Path("data/b[1].txt")]
    assert convert.find_files("data/b[1].txt") == [Path("data/b[1].txt")]  # a name before a pattern
    assert convert.find_files("~/data/a*") == [tmp_path / "data" / "a.txt"]
    refused(lambda: convert.find_files("data/empty.txt"), "data/empty.txt: no file with text")
    assert {"os.py", "ast.py"} <= {path.name for path in convert.find_files("python")}
    Path("data/sub").rename("python")
    assert convert.find_files("python") == [Path("python/c.txt")]


def test_every_20th_file_is_held_out_or_the_last_20th_of_fewer():
    for i in range(40):
        Path(f"{i:02}.txt").write_text("x" * 95 + "held" if i == 7 else f"{i:02}")
    for data, val, learned, held_out in (
        ("*.txt", "", "01¶", "00¶20¶"),
        (["09.txt", "01.txt"] * 10, "", "01¶", "09¶"),  # the list of a run, as it is
        (["09.txt", "01.txt"] * 10, "02.txt", "09¶", "02¶"),
        ("07.txt", "", "xxx", "held¶"),
    ):
        tokens, held_out_tokens = convert.load_data(data, val, byte_tokenizer())
        assert read_and_learned(tokens[:3], byte_tokenizer())[0] == learned
        assert read_and_learned(held_out_tokens, byte_tokenizer())[0] == held_out


def test_bin_files_hold_ids_of_two_bytes_or_four_for_larger_vocabularies_and_npy_files_those_of_any_integer():
    tokenizer = byte_tokenizer()
    for tokenizer.n_vocab, kind in ((65536, np.uint16), (65537, np.uint32)):
        ids = np.array([tokenizer.n_vocab - 1, 0, 7, 300], kind)
        for name in ("a.bin", "b.BIN"):
            assert tokens_of(name, ids.tobytes(), tokenizer).tolist() == ids.tolist()
        assert convert.load_tokens([Path("a.bin"), Path("b.BIN")], tokenizer).tolist() == ids.tolist() * 2
        refused(lambda: tokens_of("a.bin", np.arange(99).tobytes(), tokenizer), "a.bin: every other id is 0")
    for kind in ("<i2", "u1", ">i4", "<u8"):
        np.save("ids.npy", np.array([200, 7, 97], kind))
        assert convert.load_tokens([Path("ids.npy")], tokenizer).tolist() == [200, 7, 97]
    for wrong, named in (([1.0], "float64"), ([[1]], "(1, 1)"), ([5, -1], "from -1 to 5"), ([5, 1 << 17], "to 131072")):
        np.save("ids.npy", np.array(wrong))
        refused(lambda: convert.load_tokens([Path("ids.npy")], tokenizer), "ids.npy", named)


# ---- Where to cut
def test_layer_distances_are_those_of_the_hidden_states_of_transformers():
    expected = load_file(GOLDEN / "llama" / "expected.safetensors")
    h = expected["hidden_states"][:-1]
    cosine = (h[:-1] * h[1:]).sum(-1) / (h[:-1].norm(dim=-1) * h[1:].norm(dim=-1))
    distances = convert.layer_distances(convert.load(GOLDEN / "llama")[0], expected["input_ids"])
    torch.testing.assert_close(distances[:-1], 1 - cosine.mean((1, 2)), atol=1e-5, rtol=1e-4)


def test_the_longest_run_of_layers_that_change_little_is_looped():
    for distances, cuts in (
        ([1.0, 0.2, 0.04, 0.03, 0.05, 0.03, 0.04, 0.15, 0.04, 0.3], (2, 3)),  # less than twice the median, 0.045
        ([1.0, 1.0, 1.0, 1.0], (1, 1)),  # never the first nor the last
        ([1.0, 0.1, 0.1, 1.0, 0.1, 0.1, 1.0], (1, 4)),  # of equally long ones the first
    ):
        assert convert.choose_cuts(torch.tensor(distances)) == cuts


def test_models_of_the_papers_sizes_are_cut_as_in_the_paper_and_others_by_their_profile(monkeypatch):
    model, _ = convert.load(GOLDEN / "llama")
    encoder, decoder = convert.choose_cuts(convert.layer_distances(model, convert.sample_text(model, None)))
    assert (len(model.encoder), len(model.decoder)) == (encoder, decoder)
    assert len(convert.load(GOLDEN / "llama", encoder_layers=0)[0].decoder) == decoder  # one of the two is given
    assert [convert.PAPER_CUTS[size] for size in ((28, 2048), (36, 4096))] == [(2, 1), (6, 1)]
    monkeypatch.setitem(convert.PAPER_CUTS, (model.config.n_layer, model.config.n_embd), (0, 2))
    model, _ = convert.load(GOLDEN / "llama")
    assert (len(model.encoder), len(model.decoder)) == (0, 2) != (encoder, decoder)


# ---- The command line
@pytest.mark.parametrize(
    "program, flag, named",
    [
        (convert, "--formats=hf", "--formats=hf"),
        (convert, "--format=gguf", "invalid choice: 'gguf'"),
        (convert, "--encoder_layers=2.5", "invalid int value: '2.5'"),
        (sample, "--max_loops=-1", "-1: expected at least 0"),
        (convert, "--profile", "expected: convert.py SRC OUT, or convert.py SRC --profile"),
    ],
)
def test_what_cannot_be_read_on_the_command_line_is_named_in_one_line(command, program, flag, named):
    code, _, err = command(program, flag)
    assert code != 0 and named in err and err.count("\n") == 1


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError(), RuntimeError("can't allocate memory")])
def test_what_does_not_fit_the_memory_ends_in_one_line_and_other_faults_in_a_traceback(error):
    def ends(error):
        raise error

    with pytest.raises(SystemExit, match="error: out of memory: turn down --batch"):
        convert.run(lambda: ends(error))
    with pytest.raises(RuntimeError, match="another fault"):
        convert.run(lambda: ends(RuntimeError("another fault")))


def test_progress_says_what_share_is_done(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(convert.progress("abcd", "reading", 4)) == list("abcd")
    assert re.findall(r"reading: (\d+)%", capsys.readouterr().err) == ["25", "50", "75", "100"]


def test_ids_beside_text_are_not_read_as_text(tmp_path):
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "train.bin")
    (tmp_path / "notes.txt").write_text("of the data")
    refused(lambda: convert.load_data(str(tmp_path), "", convert.byte_tokenizer()), ".bin", "name one kind")
