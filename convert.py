"""
Everything between a model and the world: checkpoints, the hub, tokenizers, text, where to cut, the command line.

    python convert.py SRC OUT          write SRC as a LoopUS checkpoint, or for other tools (--format=hf or authors)
    python convert.py SRC --profile    show how much each layer changes the state, and the cuts that follow from it
"""

import ctypes
import glob
import hashlib
import http.client
import json
import os
import re
import shutil
import sys
import unicodedata
import urllib.request
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache, partial
from itertools import islice, takewhile
from pathlib import Path

import numpy as np
import tiktoken
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from loopus import Config, InputError, Linear, LoopUS, span

# ---- Layouts: what is particular about each kind of checkpoint. config: our field → its key in config.json, or what
# the whole family shares; only: keys of which other values are not supported; layer: the name of layer i of the
# model, j of its stack; names: our module → its names there, stacked along the outputs
KEYS = dict(vocab_size="vocab_size", block_size="max_position_embeddings", n_layer="num_hidden_layers",
    n_embd="hidden_size", n_head="num_attention_heads", n_kv_head="num_key_value_heads", head_dim="head_dim",
    n_inner="intermediate_size", norm=("rms",), norm_eps="rms_norm_eps", mlp=("swiglu",), rope_theta="rope_theta",
    mlp_bias="mlp_bias", partial_rotary="partial_rotary_factor", qkv_bias="attention_bias", out_bias="attention_bias",
)  # fmt: skip
NAMES = dict(wte="model.embed_tokens", norm="model.norm", lm_head="lm_head", ln_1="input_layernorm",
    qkv="self_attn.q_proj self_attn.k_proj self_attn.v_proj", q_norm="self_attn.q_norm", k_norm="self_attn.k_norm",
    out="self_attn.o_proj", ln_2="post_attention_layernorm", up="mlp.gate_proj mlp.up_proj", down="mlp.down_proj",
)  # fmt: skip
ONLY = dict(hidden_act=("silu",), rope_type=("default", "llama3"))
LLAMA = dict(config=KEYS, only=ONLY, layer="model.layers.{i}", names=NAMES)
FAMILIES = {
    "gpt2": dict(
        layer="transformer.h.{i}", transposed=True,  # as its linear layers lie there
        config=dict(vocab_size="vocab_size", block_size="n_positions", n_layer="n_layer", n_head="n_head",
            n_kv_head="n_head", n_embd="n_embd", n_inner="n_inner", norm=("layer",), norm_eps="layer_norm_epsilon",
            mlp=("gelu",), rope_theta=(0.0,), qkv_bias=(True,), out_bias=(True,), mlp_bias=(True,)),
        only=dict(activation_function=("gelu_new", "gelu_pytorch_tanh"), scale_attn_weights=(True,),
            scale_attn_by_inverse_layer_idx=(False,)),
        names=dict(wte="transformer.wte", wpe="transformer.wpe", norm="transformer.ln_f", lm_head="lm_head",
            ln_1="ln_1", qkv="attn.c_attn", out="attn.c_proj", ln_2="ln_2", up="mlp.c_fc", down="mlp.c_proj")),
    "llama": LLAMA, "mistral": LLAMA,
    "qwen2": LLAMA | dict(config=KEYS | dict(qkv_bias=(True,), out_bias=(False,))),
    "qwen3": LLAMA | dict(config=KEYS | dict(qk_norm=(True,))),
    "phi3": LLAMA | dict(names=NAMES | dict(qkv="self_attn.qkv_proj", up="mlp.gate_up_proj")),
}  # fmt: skip
# Looped ones, as the LoopUS authors write them: these, and the family's names within a layer; wpe is our addition.
LOOPED = dict(wte="encoder.embed_tokens", wpe="encoder.embed_positions", norm="decoder.norm", q_head="q_head",
    lm_head="decoder.lm_head", gate="reasoning.gate", gate_down="reasoning.gate.dt_input_proj",
    gate_up="reasoning.gate.delta_proj")  # fmt: skip
LDS = {of: f | dict(layer="{stack}.layers.{j}", names=f["names"] | LOOPED) for of, f in FAMILIES.items()}
HARMLESS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # buffers that old checkpoints carry
STEP = "step-" + "[0-9]" * 7  # a finished checkpoint of a training run; one being written has more to its name
# The paper's cuts (Fig. 16, 17) of Qwen3-1.7B, 4B, 8B, Phi-4, TinyLlama: (layers, width): (encoder, decoder layers).
PAPER_CUTS = {(28, 2048): (2, 1), (36, 2560): (2, 1), (36, 4096): (6, 1), (40, 5120): (6, 1), (22, 2048): (1, 1)}


def read_config(path, overrides):
    """config.json → (layout, Config, is the head tied). Raises InputError for what we cannot load."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        looped = raw["model_type"] == "lds"
        base = raw["base_config_dict"] if looped else raw
        layout, values = read_family(base, path)
        if looped:
            layout, values["base"], values["gate_start"] = LDS[base["model_type"]], raw, raw.get("gate_start", "0.5")
        cuts = {f"{stack}_layers": len(raw.get(f"{stack}_layer_indices", ())) for stack in ("encoder", "decoder")}
        config = Config(**values | cuts | overrides)
    except (json.JSONDecodeError, KeyError, TypeError) as e:
        raise InputError(f"{path} is not the config of a model we know ({e!r}): is the file intact?") from None
    return layout, config, not looped and raw.get("tie_word_embeddings", raw["model_type"] == "gpt2")


def read_family(base, path):
    """The config of an unlooped model → (layout, fields of Config)."""
    if (family := base["model_type"]) not in FAMILIES:
        raise InputError(f"{path}: model_type {family} is not supported; expected lds or {', '.join(FAMILIES)}")
    layout = FAMILIES[family]
    rope = dict(base.get("rope_parameters") or base.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    raw = base | rope
    window = raw.get("use_sliding_window", True) and raw.get("sliding_window") or float("inf")
    if "sliding_attention" in (raw.get("layer_types") or ()) or window < raw.get("max_position_embeddings", 0):
        raise InputError(f"{path}: its sliding window is not supported; expected attention to all tokens before")
    for key, allowed in layout["only"].items():
        if raw.get(key, allowed[0]) not in allowed:
            raise InputError(f"{path}: {key} {raw[key]} is not supported; expected {' or '.join(map(str, allowed))}")
    values = {ours: key[0] if isinstance(key, tuple) else raw.get(key) for ours, key in layout["config"].items()}
    values = {ours: value for ours, value in values.items() if value is not None}
    width, heads = values.get("n_embd", 0), values.get("n_head", 1)
    usual = dict(n_kv_head=heads, head_dim=width // heads, n_inner=4 * width, rope_theta=10000.0)
    return layout, usual | values | dict(rope_scaling=rope if rope["rope_type"] == "llama3" else None, base=base)


def written_config(config, format, dtype):
    """Our Config → (layout, config.json) of a checkpoint in that format."""
    if not config.base or dtype == "int8":
        raise InputError("only a model that was loaded by convert.load, not as int8, can be written")
    base = config.base.get("base_config_dict", config.base)
    base = base | {"tie_word_embeddings": False, "dtype" if "dtype" in base else "torch_dtype": dtype}
    if format == "hf":
        return FAMILIES[base["model_type"]], base
    usual = dict(N=8, q_threshold=0.6, q_eval_interval=1, halting_strategy="threshold", convergence_epsilon=0.01)
    written = usual | (config.base if "base_config_dict" in config.base else {}) | dict(base_config_dict=base)
    written |= dict(model_type="lds", vocab_size=config.vocab_size, hidden_size=config.n_embd)
    layers, start, end = [*range(config.n_layer)], config.encoder_layers, config.n_layer - config.decoder_layers
    written |= dict(encoder_layer_indices=layers[:start], reasoning_layer_indices=layers[start:end])
    written |= dict(decoder_layer_indices=layers[end:], gate_start=config.gate_start)
    return LDS[base["model_type"]], written


def sources(model, layout):
    """For each parameter that such checkpoints hold: (our name, the names there, do they lie transposed)."""
    c, names = model.config, layout["names"]
    first = dict(encoder=0, reasoning=c.encoder_layers, decoder=c.n_layer - c.decoder_layers)
    for name, p in model.named_parameters():
        module, leaf = name.rsplit(".", 1)
        stack, layer = module.split(".")[0], ""
        if stack in first:
            _, j, module = module.split(".")
            layer = layout["layer"].format(stack=stack, j=j, i=first[stack] + int(j)) + "."
        elif stack in ("gate", "q_head") and stack not in names:
            continue
        there = names.get(module.replace(".", "_")) or module.replace(stack, names.get(stack, stack), 1)
        transposed = bool(layer) and p.dim() == 2 and layout.get("transposed", False)
        yield name, [f"{layer}{n}.{leaf}" for n in there.split()], transposed


# ---- Checkpoints
def load(src, device="cpu", dtype=torch.float32, **overrides):
    """→ (model in eval mode, tokenizer or None) from `src`, a hub name or directory; dtype None: as stored, int8:
    rounded matrices, the rest float32. `overrides` are fields of Config (encoder_layers=2); −1 and "": not given.
    What was never cut gets the paper's cuts, or those of `choose_cuts`. InputError: missing, misshapen, unsupported."""
    overrides = {name: value for name, value in overrides.items() if value not in (-1, "")}
    cuts = {name: overrides.pop(name) for name in ("encoder_layers", "decoder_layers") if name in overrides}
    directory = resolve(src)
    layout, config, tied = read_config(directory / "config.json", overrides)
    tokenizer = load_tokenizer(directory)
    if tokenizer and tokenizer.n_vocab > config.vocab_size:
        raise InputError(f"{directory}: a tokenizer of {tokenizer.n_vocab} and a model of {config.vocab_size} tokens")
    model = read_model(directory, layout, config, tied, device, torch.float32 if dtype == torch.int8 else dtype).eval()
    encoder, decoder = config.encoder_layers, config.decoder_layers
    if "gate" not in layout["names"] and len(cuts) < 2:  # never cut before, nor now
        paper = PAPER_CUTS.get((config.n_layer, config.n_embd))
        encoder, decoder = paper or choose_cuts(layer_distances(model, sample_text(model, tokenizer)))
    cut(model, cuts.get("encoder_layers", encoder), cuts.get("decoder_layers", decoder))
    for layer in (m for m in model.modules() if isinstance(m, Linear) and dtype == torch.int8):
        layer.scale = layer.weight.abs().amax(dim=1).clamp(min=1e-12) / 127
        layer.weight = torch.nn.Parameter((layer.weight / layer.scale[:, None]).round().to(dtype), requires_grad=False)
    return model, tokenizer


def read_model(directory, layout, config, tied, device, dtype):
    """The model of `config` with the weights of the directory, each tensor copied from the mapped file once."""
    with torch.device("meta"):
        model = LoopUS(config)
    files, state, disagree = tensor_files(directory), {}, f"the weights in {directory} disagree with its config.json:"
    opened, unused = lru_cache(maxsize=1)(partial(safe_open, framework="pt")), set(files)
    for count, (name, there, transposed) in enumerate(sources(model, layout)):
        if count % 8 == 0:
            opened.cache_clear()  # what was read of a file stays in memory until it is closed
        there, shape = [bare(n) for n in there], model.get_parameter(name).shape
        unused.difference_update(there)
        if tied and name == "lm_head.weight":
            there = [bare(layout["names"]["wte"]) + ".weight"]
        if missing := [n for n in there if n not in files]:
            raise InputError(f"{disagree} {' and '.join(missing)} missing")
        parts = [opened(file).get_tensor(n) for file, n in (files[n] for n in there)]
        parts = [part.T if transposed else part for part in parts]
        rows = [len(part) for part in parts]
        if any((sum(rows), *part.shape[1:]) != shape for part in parts):
            found = " + ".join(str(list(part.shape)) for part in parts)
            raise InputError(f"{disagree} {' + '.join(there)} shaped {found} instead of {list(shape)}")
        dtype = dtype or parts[0].dtype
        state[name] = torch.empty(shape, device=device, dtype=dtype)
        for target, part in zip(state[name].split(rows), parts):
            target.copy_(part)
    if unused:
        raise InputError(f"{disagree} {', '.join(sorted(unused)[:3])} unknown")
    new = {name: p.shape for name, p in model.named_parameters() if name not in state}
    state |= {name: torch.empty(shape, device=device, dtype=dtype) for name, shape in new.items()}
    model.load_state_dict(state, assign=True)
    if new:
        model.reset_new_parameters()
    return model


def bare(name):
    """A tensor's name without the prefixes that some checkpoints write and others do not; plateau is an old name."""
    name = re.sub(r"(^|\.)module\.", r"\1", name).replace("plateau.", "reasoning.")
    return re.sub(r"^(transformer|model)\.", "", name)


def shards(directory):
    """The weight files of a checkpoint; they lie beside the index, whatever it says."""
    index, whole = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if whole.exists() or not index.exists():
        return [whole]
    return sorted({directory / Path(name).name for name in json.loads(index.read_text())["weight_map"].values()})


def tensor_files(directory):
    """{bare name: (file, name in it)} over all safetensors files of a checkpoint."""
    found = {}
    for path in shards(directory):
        if not path.exists():
            raise InputError(f"{path} is missing: expected safetensors (pickled .bin files can run code: not read)")
        try:
            with safe_open(path, "pt") as file:
                found |= {bare(name): (path, name) for name in file.keys() if not name.endswith(HARMLESS)}
        except SafetensorError as e:
            raise InputError(f"{path} is damaged ({e}): fetch or write it again") from None
    return found


def save(model, tokenizer, out_dir, format="authors", weights=None, **more):
    """Write config.json, model.safetensors, tokenizer.json and, for each of more, name=write, what write(path) writes
    into the directory out_dir. format "authors": looped, as the LoopUS authors have it; "hf": encoder, loop and decoder
    put back as one unlooped model, as on the hub. All of it is put in place, or nothing: raises InputError."""
    c, tensors, out_dir, weights = model.config, {}, Path(out_dir), weights or model.state_dict()
    layout, config = written_config(c, format, str(model.lm_head.weight.dtype).removeprefix("torch."))
    rows = {2: [c.n_inner] * 2, 3: [n * c.head_dim for n in (c.n_head, c.n_kv_head, c.n_kv_head)]}
    for name, there, transposed in sources(model, layout):
        whole = weights[name]
        for n, part in zip(there, whole.split(rows.get(len(there), len(whole)))):
            tensors[n] = (part.T if transposed else part).contiguous()
    new = out_dir.with_name(f"{out_dir.name}.new-{os.getpid()}")
    try:
        new.mkdir(parents=True)
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if tokenizer:
            (new / "tokenizer.json").write_text(json.dumps(tokenizer.spec, ensure_ascii=False), encoding="utf-8")
        save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
        for name, write in more.items():
            write(new / name)
        if not out_dir.exists():
            new.rename(out_dir)
        else:
            for file in new.iterdir():
                file.replace(out_dir / file.name)
    except (OSError, SafetensorError, RuntimeError) as e:
        raise InputError(f"cannot write {out_dir} ({e}): make room there; what it held is untouched") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


# ---- The hub
def cache_dir():
    """Where downloads and tokenised texts are kept: LOOPUS_CACHE, or loopus in the user's cache directory."""
    path = Path(os.environ.get("LOOPUS_CACHE") or Path.home() / ".cache" / "loopus")
    path.mkdir(parents=True, exist_ok=True)
    return path


def resolve(src):
    """`src` → the directory of its checkpoint: itself, a run's newest step, a download; "": the last of train.py."""
    if not src and not (cache_dir() / "last").exists():
        raise InputError("no --init, and train.py has written no model yet: run python train.py, or name a model")
    path = Path(src or (cache_dir() / "last").read_text())
    for config in (path / "config.json", *sorted(path.glob(f"{STEP}/config.json"), reverse=True)):
        if config.exists():
            return config.parent
    name, _, revision = str(src).partition("@")
    name = re.sub(r"^gpt2(-medium|-large|-xl)?$", r"openai-community/\g<0>", name)
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise InputError(f"{src} is no directory with a config.json here and no name on the hub (owner/name, gpt2)")
    return download(name, revision or "main")


def download(name, revision):
    """→ the directory of a model on the hub: where the hub's own tools have put it, or in our cache, weights last."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    theirs = Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub"), f"models--{name.replace('/', '--')}")
    commit = theirs / "refs" / revision
    theirs = theirs / "snapshots" / (commit.read_text().strip() if commit.exists() else revision)
    directory = cache_dir() / "hub" / f"{name}@{revision}".replace("/", "--")
    for kept in (theirs, directory):
        if (kept / "config.json").exists() and all(shard.exists() for shard in shards(kept)):
            return kept
    url = f"{os.environ.get('HF_ENDPOINT') or 'https://huggingface.co'}/{name}/resolve/{revision}/"
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors.index.json"):
        fetch(url, name, directory, optional=name != "config.json")
    for shard in shards(directory):
        fetch(url, shard.name, directory)
    return directory


class Redirects(urllib.request.HTTPRedirectHandler):  # to where a file lies; keeps what the hub states of it before
    stated = {}

    def redirect_request(self, request, answer, code, message, headers, url):
        self.stated = self.stated | {key.lower(): value for key, value in headers.items()}
        return super().redirect_request(request, answer, code, message, headers, url)


def fetch(url, name, directory, optional=False):
    """Download url + name, or its rest, unless optional and not there; check size and SHA-256 as stated by the hub."""
    target, part, redirects = directory / name, directory / f"{name}.part", Redirects()
    if target.exists():
        return
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url + name, headers={"Range": f"bytes={have}-"} if have else {})
    if token := os.environ.get("HF_TOKEN"):
        request.add_unredirected_header("Authorization", f"Bearer {token}")  # for the hub alone
    try:
        with urllib.request.build_opener(redirects).open(request, timeout=30) as answer:
            have = have if answer.status == 206 else 0  # 206: the rest is coming; else all of it
            stated = {key.lower(): value for key, value in answer.headers.items()} | redirects.stated
            size = int(stated.get("x-linked-size") or have + int(answer.headers["Content-Length"] or 0))
            with open(part, "ab" if have else "wb") as out:
                while block := answer.read(1 << 20):
                    have += out.write(block)
                    progress(f"fetching {name}", have, size)
    except urllib.error.HTTPError as e:
        if e.code == 404 and optional:
            return
        if e.code == 416:  # there is no rest to send: what lies here is not the beginning of that file
            part.unlink()
        hints = {401: "set HF_TOKEN", 403: "set HF_TOKEN", 404: "check the name, and that it has safetensors"}
        raise InputError(f"the hub answered {e.code} for {url}{name}: {hints.get(e.code, 'try again later')}") from None
    except (OSError, http.client.HTTPException) as e:
        raise InputError(f"cannot fetch {url}{name} ({e}): go online and run it again, or give a directory") from None
    if have < size:
        raise InputError(f"{url}{name} broke off after {have} of {size} bytes: run it again to go on from there")
    sha256 = stated.get("x-linked-etag", "").strip('"')
    with open(part, "rb") as file:
        same = len(sha256) != 64 or hashlib.file_digest(file, "sha256").hexdigest() == sha256
    if have > size > 0 or not same:
        part.unlink()
        raise InputError(f"{url}{name} is not what the hub states ({size} bytes, SHA-256 {sha256}): run it again")
    part.replace(target)


# ---- Tokenizers
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same after every digit has been set apart: a run of spaces then also ends, whole, before a digit.
DIGITS_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
SPACE, NFC = "▁", dict(type="NFC")  # what sentencepiece writes for a space; the normalizer that others may have
WORDS, WHOLE = r" +[^ ]*|[^ ]+", r"[\s\S]+"  # sentencepiece: text as words, or where tokens join words as a whole
PREPEND = [dict(type="Prepend", prepend=SPACE), dict(type="Replace", pattern=dict(String=" "), content=SPACE)]
# Byte-level BPE writes bytes as printable characters: the visible ones of Latin-1 as they are.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
ALPHABET = {b: chr(b) for b in VISIBLE} | {b: chr(256 + i) for i, b in enumerate(sorted({*range(256)} - {*VISIBLE}))}


def byte_level(model):
    """→ {bytes: its ids} in the order of merging; a byte that the vocabulary lacks has none, and vanishes."""
    byte_of, vocab = {ord(character): b for b, character in ALPHABET.items()}, model["vocab"]
    whole = (t for t in vocab if model.get("ignore_merges") and byte_of.keys() >= set(map(ord, t)))
    tokens = [*ALPHABET.values(), *model["merged"], *whole]
    return {t.translate(byte_of).encode("latin-1"): (vocab[t],) if t in vocab else () for t in tokens}


def sentencepiece(model):
    """The same for BPE over characters, where bytes stand in for those that the vocabulary lacks. tiktoken begins with
    bytes: it first puts each character of the vocabulary together, and what is left of another falls apart again."""
    vocab = model["vocab"]
    ids = {bytes([b]): (vocab[f"<0x{b:02X}>"],) for b in range(256)}
    for character in (token for token in vocab if len(token) == 1):
        data = character.replace(SPACE, " ").encode()
        for n in range(2, len(data)):
            ids[data[:n]] = tuple(vocab[f"<0x{b:02X}>"] for b in data[:n])
        ids[data] = (vocab[character],)
    for token in model["merged"]:
        ids.setdefault(token.replace(SPACE, " ").encode(), (vocab[token],))
    return ids


class Tokenizer:
    """tiktoken's byte-pair encoding with the ids of a tokenizer.json: `encode(text)` → ids, `decode(ids)` → text.
    tiktoken numbers tokens in the order of their merges; real vocabularies do not always: `ids` has their numbers."""

    def __init__(self, spec, where="tokenizer.json"):
        self.spec, model, vocab = spec, dict(spec["model"]), spec["model"]["vocab"]
        # the tokens that merges make, in their order; a merge is "a b" or, in newer files, ["a", "b"]
        model["merged"] = ["".join(m.split(" ") if isinstance(m, str) else m) for m in model.get("merges", ())]
        (split, self.prefix), self.nfc = text_style(spec, model, where), spec.get("normalizer") == NFC
        ids_of = sentencepiece(model) if self.prefix else byte_level(model)
        self.ids = list(ids_of.values())
        ranks = {data: rank for rank, data in enumerate(ids_of)}
        self.encoding = tiktoken.Encoding("loopus", pat_str=split, mergeable_ranks=ranks, special_tokens={})
        # where a long text may be cut, since no token reaches across
        self.pieces = re.compile(r"(?s).+" if self.prefix else r"(?s).{1048576}.*?\S\n(?=\w)|.+")
        added = sorted(spec.get("added_tokens") or [], key=lambda t: -len(t["content"]))
        self.added = {t["content"]: t["id"] for t in added}
        found = [r"\s*" * t["lstrip"] + re.escape(t["content"]) + r"\s*" * t["rstrip"] for t in added]
        self.is_added = re.compile(f"({'|'.join(found)})" if added else "(?!)")
        self.n_vocab = 1 + max([*vocab.values(), *self.added.values()])
        self.bytes_of = [b""] * self.n_vocab
        for data, ids in (*ids_of.items(), *((content.encode(), [i]) for content, i in self.added.items())):
            if len(ids) == 1:
                self.bytes_of[ids[0]] = data
        after = spec.get("post_processor") or {}
        template = next((step for step in after.get("processors", [after]) if "special_tokens" in step), {})
        before = takewhile(lambda item: "SpecialToken" in item, template.get("single", ()))
        self.begin = [i for item in before for i in template["special_tokens"][item["SpecialToken"]["id"]]["ids"]]
        ends = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<|im_end|>")
        self.end_of_text = next((self.added[name] for name in ends if name in self.added), None)

    def encode(self, text):
        """Text → ids; ids stay as they are."""
        if not isinstance(text, str):
            return text
        ids = []
        for i, part in enumerate(self.is_added.split(text)):
            if i % 2:
                ids.append(self.added[part if part in self.added else part.strip()])
                continue
            part = unicodedata.normalize("NFC", part) if self.nfc else part
            if self.prefix and part:
                spaced = self.prefix == "never" or part[0] in (" ", SPACE) and self.prefix != "each"
                part = " " * (not spaced and (i == 0 or self.prefix != "first")) + part.replace(SPACE, " ")
            ids += [i for rank in self.encoding.encode_ordinary(part) for i in self.ids[rank]]
        return ids

    def chat(self, messages):
        """Messages of a "role" and "content" as ChatML → ids as `rows` reads them: only the assistant's are learned."""
        for message in messages:
            head, said = self.encode(f"<|im_start|>{message['role']}\n"), self.encode(message["content"] + "<|im_end|>")
            said = said if message["role"] == "assistant" else [~i for i in said]
            yield [*(~i for i in head), *said, *(~i for i in self.encode("\n"))]

    def decode(self, ids):
        return b"".join(self.bytes_of[i] for i in ids).decode(errors="replace").removeprefix(" " if self.prefix else "")


def text_style(spec, model, where):
    """→ (what cuts text before BPE, where sentencepiece puts a space: each part, always, first, never; others: "")."""
    normalizer, splitter = spec.get("normalizer"), spec.get("pre_tokenizer") or dict(type="none")
    steps = splitter["pretokenizers"] if splitter["type"] == "Sequence" else [splitter]
    words = WHOLE if any(re.search(f"[^{SPACE}]{SPACE}", token) for token in model["merged"]) else WORDS
    plain, level = normalizer in (None, NFC), dict(type="ByteLevel", use_regex=True, add_prefix_space=False).items()
    match model.get("byte_fallback") or model.get("type", "BPE"), [dict(level) | step for step in steps]:
        case True, [{"type": "none"}] if normalizer == dict(type="Sequence", normalizers=PREPEND):
            return words, "each"
        case True, [{"type": "Metaspace", "split": False}] if normalizer is None:
            return words, steps[0].get("prepend_scheme", "always")
        case "BPE", [step] if plain and step.items() >= level:
            return GPT2_SPLIT, ""
        case "BPE", [{"type": "Digits", "individual_digits": True}, step] if plain and step.items() >= level:
            return DIGITS_SPLIT, ""
        case "BPE", [{"behavior": "Isolated", "pattern": {"Regex": split}}, {"type": "ByteLevel"}] if plain:
            return split, ""
    found = f"{model.get('type')} after {normalizer and normalizer['type']} and {' + '.join(s['type'] for s in steps)}"
    raise InputError(f"{where}: {found} is not supported; expected BPE as GPT-2, SmolLM2, Llama or Qwen have it")


def byte_tokenizer():
    """One token per byte, id = byte, and <|endoftext|> as 256: for models that are trained from nothing."""
    end = dict(id=256, content="<|endoftext|>", special=True, normalized=False, lstrip=False, rstrip=False)
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    model = dict(type="BPE", vocab={character: b for b, character in ALPHABET.items()}, merges=[])
    return Tokenizer(dict(version="1.0", added_tokens=[end], pre_tokenizer=level, decoder=level, model=model))


def load_tokenizer(src):
    """The tokenizer of a hub name or directory, from its tokenizer.json; None without."""
    path = resolve(src) / "tokenizer.json"
    try:
        return Tokenizer(json.loads(path.read_text(encoding="utf-8")), path) if path.exists() else None
    except (json.JSONDecodeError, KeyError, TypeError) as e:
        raise InputError(f"{path} is no tokenizer that can be read ({e!r}): fetch it again") from None


# ---- Text
def rows(tokens, starts, context):
    """Inputs and next tokens as targets, (n, context) each, of the windows of `tokens` that begin at `starts`. A token
    i that is to be read and not learned stands in `tokens` as ~i; as a target it is −100."""
    ids = torch.from_numpy(np.stack([tokens[i : i + context + 1] for i in starts]).astype(np.int64))
    return ids.where(ids >= 0, ~ids)[:, :-1], ids.masked_fill(ids < 0, -100)[:, 1:]


def find_files(data):
    """A file, a directory (all its files), a glob, or "python": the source of its standard library → sorted paths."""
    data = f"{Path(os.__file__).parent}/*.py" if data == "python" else data
    found = [data] if Path(data).is_file() else glob.glob(f"{data}/**" if Path(data).is_dir() else data, recursive=True)
    found = sorted(f for f in map(Path, found) if f.is_file() and not f.name.startswith("."))
    if not any(f.stat().st_size for f in found):
        raise InputError(f"{data} {'is empty' if found else 'matches no file'}: expected text, a directory, a glob")
    return found


def load_data(data, val, tokenizer):
    """→ (training, held-out tokens). Without `val` every 20th file is held out, of a single one the last 20th."""
    files = find_files(data)
    held_out = find_files(val) if val else files[::20] if len(files) >= 20 else []
    tokens = load_tokens([f for f in files if val or f not in held_out], tokenizer)
    if held_out:
        return tokens, load_tokens(held_out, tokenizer)
    return np.split(tokens, [len(tokens) - len(tokens) // 20])


def load_tokens(files, tokenizer):
    """Text, .jsonl, .parquet or .bin files → one memory-mapped array of tokens, as `rows` reads it. Texts are tokenised
    once, on all cores, and kept in the cache. Raises InputError for anything else."""
    if tokenizer is None:
        raise InputError("the model has no tokenizer.json: text cannot be read or written without one")
    if [f.suffix for f in files] == [".bin"]:
        return map_tokens(files[0], tokenizer)
    stamp = [tokenizer.spec, *((f.resolve(), f.stat().st_size, f.stat().st_mtime_ns) for f in files)]
    path = cache_dir() / f"{hashlib.sha256(repr(stamp).encode()).hexdigest()[:32]}.int32"
    if not path.exists():
        total, done, part = sum(f.stat().st_size for f in files), 0, path.with_suffix(f".{os.getpid()}")
        work = (passage for f in files for passage in passages(f, tokenizer))
        try:
            with open(part, "wb") as out, ThreadPoolExecutor() as pool:
                while some := list(islice(work, 64)):
                    for text, ids in zip(some, pool.map(tokenizer.encode, some)):
                        np.array(ids, dtype=np.int32).tofile(out)
                        done += len(text.encode() if isinstance(text, str) else text)
                    progress("tokenising", done, total)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    return np.memmap(path, dtype=np.int32, mode="r")


def passages(path, tokenizer):
    """The texts of a file in pieces, or ids: the "text" of each line of .jsonl or row of .parquet, or all of it."""
    end = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    try:
        if path.suffix == ".bin":
            return (yield map_tokens(path, tokenizer))
        if path.suffix == ".parquet":
            from pyarrow.parquet import ParquetFile

            batches = ParquetFile(path).iter_batches(columns=["text"])
            texts = (text for batch in batches for text in batch.column(0).to_pylist())
        elif path.suffix == ".jsonl":
            lines = (json.loads(line) for line in path.open(encoding="utf-8"))
            texts = (line["messages" if "messages" in line else "text"] for line in lines)
        else:
            texts = [path.read_text(encoding="utf-8")]
        for text in texts:
            if isinstance(text, str):
                yield from (tokenizer.begin, *tokenizer.pieces.findall(text), end)
            else:
                yield from ([~i for i in tokenizer.begin], *tokenizer.chat(text), [~i for i in end])
    except ImportError:
        raise InputError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
    except (ValueError, LookupError, TypeError) as e:
        raise InputError(
            f'{path} is not UTF-8 text, or lines or rows with a "text" or "messages" ({e!s:.80})'
        ) from None


def map_tokens(path, tokenizer):
    """Map a .bin file of uint16 ids or of int32, as `rows` reads it, and make sure that they are this tokenizer's."""
    head = np.fromfile(path, dtype=np.uint16, count=4096)
    wide = len(head) > 1 and np.isin(head[1::2], (0, 0xFFFF)).all()  # the upper halves of int32
    dtype = np.int32 if wide or tokenizer.n_vocab > 1 << 16 else np.uint16
    if path.stat().st_size % dtype().itemsize:
        raise InputError(f"{path} has {path.stat().st_size} bytes: expected whole {dtype.__name__} tokens")
    tokens = np.memmap(path, dtype, mode="r")
    if (largest := max(int(tokens.max()), ~int(tokens.min()))) >= tokenizer.n_vocab:
        raise InputError(f"{path} holds token {largest}, the tokenizer has {tokenizer.n_vocab}: for another model?")
    return tokens


# ---- Where to cut, §3.1 and Fig. 1
def sample_text(model, tokenizer):
    """Tokens (1, T) to look at a model with: this project's own words or, without a tokenizer, any numbers."""
    ids = tokenizer.encode(sys.modules[LoopUS.__module__].__doc__) if tokenizer else [i * 7919 for i in range(256)]
    ids = torch.tensor([ids[: min(256, model.config.block_size)]], device=model.wte.weight.device)
    return ids % model.config.vocab_size


@torch.no_grad()
def layer_distances(model, idx):
    """1 − cos of the states entering and leaving each layer, mean over the tokens idx (B, T): (n_layer,)."""
    at = span(model.config, [0], idx.size(1), idx.device)
    h, distances = model.embed(idx, at), []
    for block in model.layers():
        before, h = h, block(h, at)
        distances.append(1 - torch.cosine_similarity(before.float(), h.float(), dim=-1).mean())
    return torch.stack(distances).cpu()


def choose_cuts(distances):
    """The rule: loop the plateau, the longest run of layers that each change the state less than twice what the median
    layer does; never the first and the last, as in the paper. → layers before it (encoder), after it (decoder)."""
    last = len(distances) - 1
    borders = sorted({0, last, *torch.nonzero(distances >= 2 * distances.median()).flatten().tolist()})
    before, after = max(zip(borders, borders[1:]), key=lambda pair: pair[1] - pair[0], default=(0, last))
    return before + 1, last + 1 - after


def cut(model, encoder, decoder):
    """Move the borders between encoder, reasoning block and decoder, in place."""
    model.config = replace(model.config, encoder_layers=encoder, decoder_layers=decoder)
    layers, end = model.layers(), model.config.n_layer - decoder
    stacks = map(torch.nn.ModuleList, (layers[:encoder], layers[encoder:end], layers[end:]))
    model.encoder, model.reasoning, model.decoder = stacks


# ---- The command line, the same for all programs
def flag(default, help, least=None, choices=None):
    """A setting, its help text and the values it may have: the fields of a dataclass become flags in `parse`."""
    return field(default=default, metadata={"help": help, "least": least, "choices": choices})


def parse(settings, *positional):
    """The command line as {field: value} of the dataclass `settings`, given ones only; refuses unknown flags."""
    parser = ArgumentParser(description=settings.__doc__, allow_abbrev=False, argument_default=SUPPRESS)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}; --help lists what there is\n")
    for f in fields(settings):
        text = f.metadata["help"].replace("%", "%%") + (f" (default {f.default})" if f.default != "" else "")
        kind = dict(type=f.type, metavar=f.type.__name__.upper(), choices=f.metadata["choices"])
        kind = dict(action=BooleanOptionalAction) if f.type is bool else kind
        name, kind = (f.name, dict(nargs="?")) if f.name in positional else (f"--{f.name}", kind)
        parser.add_argument(name, help=text, **kind)
    for name, value in (given := vars(parser.parse_args())).items():
        least = settings.__dataclass_fields__[name].metadata["least"]
        if least is not None and value < least:
            parser.error(f"--{name}={value} is too small, expected at least {least}")
    return given


def run(main):
    """Call main(); what the user can mend, and Ctrl-C, end it with one line and a non-zero exit code."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 1 << 30)  # keep freed memory: getting it anew costs a CPU much
        libc.mallopt(-1, (1 << 31) - 1)
    try:
        main()
    except BrokenPipeError:
        os._exit(1)  # whoever read the output, such as `head`, has left
    except (InputError, OSError) as e:
        sys.exit(f"error: {' '.join(str(e).split())}")
    except (MemoryError, RuntimeError) as e:
        if type(e) is RuntimeError and "memory" not in str(e):
            raise
        sys.exit("error: out of memory: turn down --batch or --context, or turn on train.py's --checkpointing")
    except (KeyboardInterrupt, EOFError):  # Ctrl-C, or Ctrl-D at a prompt
        sys.exit("\ninterrupted")


def pick_device(name, dtype):
    """→ device and dtype of --device and --dtype; by itself bf16 where the device is good at it."""
    name = name or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        raise InputError(f"--device={name} is not to be had here: expected cpu, cuda or mps") from None
    native = {"cuda": torch.cuda.is_bf16_supported, "cpu": getattr(torch.cpu, "_is_avx512_bf16_supported", bool)}
    dtype = dtype or ("bf16" if native.get(device.type, bool)() else "fp32")
    return device, dict(bf16=torch.bfloat16, fp32=torch.float32, int8=torch.int8)[dtype]


def peak_memory(device):
    """Most memory that this process has held, in GB: of the GPU, or its resident set."""
    if device.type == "cuda" or sys.platform == "win32":  # which does not tell
        return torch.cuda.max_memory_allocated() / 1e9 or float("nan")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def progress(what, done, total):
    """One line on a terminal that fills up and goes when it is full; nothing where the output is a file."""
    if sys.stderr.isatty():
        line = f"{what} {'█' * int(30 * done / max(total, done, 1)):30} {done:,}"
        print("\r" + (line if done < total else " " * len(line) + "\r"), end="", flush=True, file=sys.stderr)


@dataclass
class Inference:  # what sample.py and eval.py have in common
    init: str = flag("", "model: directory or hub name; empty: the one train.py wrote last")
    max_loops: int = flag(8, "most passes per token; 8 is the paper's budget, 0 the pretrained model", 0)
    halt: str = flag("threshold", "how a token stops: or convergence, cdf", None, ("threshold", "convergence", "cdf"))
    threshold: float = flag(0.6, "confidence at which a token stops (paper: 0.6); above 1: never")
    epsilon: float = flag(1.0, "for convergence: length of a step at which it stops (paper: 0.1 … 100)", 0)
    min_loops: int = flag(1, "passes that each token takes at least", 1)
    device: str = flag("", "cpu, cuda or mps; empty: the best there is")
    dtype: str = flag("", "empty: bf16 where the device is good at it", None, ("bf16", "fp32", "int8"))


@dataclass
class Settings:
    """Write a pretrained model as a LoopUS checkpoint, or show where --profile would cut it."""

    src: str = flag("", "hub name or directory of the model")
    out: str = flag("", "directory to write")
    format: str = flag("authors", "looped, as its authors have it; hf: unlooped, for any tool", None, ("authors", "hf"))
    profile: bool = flag(False, "show how much each layer changes the state, the cuts, and the untrained losses")
    encoder_layers: int = flag(-1, "layers before the loop; -1: the paper's cut, or by the profile")
    decoder_layers: int = flag(-1, "layers after the loop; -1: likewise")


def show_profile(model, tokenizer):
    """Print a bar per layer, the cuts, and the untrained losses of these and of their neighbours."""
    from eval import depth_losses  # eval.py reads models through this file

    idx, n = sample_text(model, tokenizer), model.config.n_layer
    encoder, decoder, distances = len(model.encoder), len(model.decoder), layer_distances(model, idx[:, :-1])
    print("1 − cos between the states that enter and leave each layer")
    for i, d in enumerate(distances.tolist()):
        part = "encoder" if i < encoder else "decoder" if i >= n - decoder else "loop"
        print(f"layer {i:>2}  {part:7}  {d:6.3f}  {'█' * round(50 * d / distances.max().item())}")
    print("by the rule: encoder {}, decoder {};".format(*choose_cuts(distances)), f"taken: {encoder}, {decoder}")
    print("\nuntrained loss after    1        2        4        8 passes")
    for e, d in [(encoder + a, decoder + b) for a, b in ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))]:
        if min(e, d) >= 0 and e + d < n:
            cut(model, e, d)
            losses = depth_losses(model, (idx[:, :-1], idx[:, 1:]), [0, 1, 2, 4, 8], 8)
            print(f"cut {e:>2}, {d:<2}        " + "".join(f"{losses[b]:9.3f}" for b in (1, 2, 4, 8)), flush=True)
    print(f"the model itself  {losses[0]:9.3f}")


def main():
    s = Settings(**parse(Settings, "src", "out"))
    if not s.src or not (s.out or s.profile):
        raise InputError("expected: convert.py SRC OUT, or convert.py SRC --profile")
    model, tokenizer = load(s.src, "cpu", None, encoder_layers=s.encoder_layers, decoder_layers=s.decoder_layers)
    if s.out:
        save(model, tokenizer, s.out, s.format)
        print(f"{s.out}: {' + '.join(str(len(x)) for x in (model.encoder, model.reasoning, model.decoder))} layers")
    if s.profile:
        show_profile(model, tokenizer)


if __name__ == "__main__":
    run(main)
