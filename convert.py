"""
Everything between a model and the world: checkpoints, the hub, tokenizers, text, where to cut, the command line.

    python convert.py SRC OUT          write SRC as a LoopUS checkpoint: config.json, model.safetensors, tokenizer.json
    python convert.py SRC --profile    show how much each layer changes the state, and the cuts that follow from it

SRC is a name on the Hugging Face hub (owner/name[@revision], or gpt2), a directory in its layout, or one of our own.
"""

import glob
import hashlib
import http.client
import json
import math
import os
import re
import shutil
import sys
import sysconfig
import unicodedata
import urllib.error
import urllib.request
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction
from contextlib import contextmanager, nullcontext
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import loopus
from loopus import Config, InputError, LoopUS, span

# ---------------------------------------------------------------------------------------------------------------------
# Layouts: what is particular about each kind of checkpoint
#   config   our field → the key in config.json, or its value where the whole family shares one
#   only     keys whose other values we do not support
#   layer    the name of layer i of the model, j of its stack
#   names    our module → its names there, stacked along the outputs

KEYS = dict(
    vocab_size="vocab_size", block_size="max_position_embeddings", n_layer="num_hidden_layers", n_embd="hidden_size",
    n_head="num_attention_heads", n_kv_head="num_key_value_heads", head_dim="head_dim", n_inner="intermediate_size",
    norm=("rms",), norm_eps="rms_norm_eps", mlp=("swiglu",), rope_theta="rope_theta", mlp_bias="mlp_bias",
    partial_rotary="partial_rotary_factor", qkv_bias="attention_bias", out_bias="attention_bias",
)  # fmt: skip
NAMES = dict(
    wte="model.embed_tokens", norm="model.norm", lm_head="lm_head", ln_1="input_layernorm", out="self_attn.o_proj",
    qkv="self_attn.q_proj self_attn.k_proj self_attn.v_proj", q_norm="self_attn.q_norm", k_norm="self_attn.k_norm",
    ln_2="post_attention_layernorm", up="mlp.gate_proj mlp.up_proj", down="mlp.down_proj",
)  # fmt: skip
ONLY = dict(hidden_act=("silu",), rope_type=("default", "llama3"))
LLAMA = dict(architecture="LlamaForCausalLM", config=KEYS, only=ONLY, layer="model.layers.{i}", names=NAMES)
FAMILIES = {
    "gpt2": dict(
        architecture="GPT2LMHeadModel",
        transposed=True,  # as its linear layers lie there
        config=dict(
            vocab_size="vocab_size", block_size="n_positions", n_layer="n_layer", n_head="n_head", n_kv_head="n_head",
            n_embd="n_embd", n_inner="n_inner", norm=("layer",), norm_eps="layer_norm_epsilon", mlp=("gelu",),
            rope_theta=(0.0,), qkv_bias=(True,), out_bias=(True,), mlp_bias=(True,),
        ),
        only=dict(
            activation_function=("gelu_new", "gelu_pytorch_tanh"), scale_attn_weights=(True,),
            scale_attn_by_inverse_layer_idx=(False,),
        ),
        layer="transformer.h.{i}",
        names=dict(
            wte="transformer.wte", wpe="transformer.wpe", norm="transformer.ln_f", lm_head="lm_head", ln_1="ln_1",
            qkv="attn.c_attn", out="attn.c_proj", ln_2="ln_2", up="mlp.c_fc", down="mlp.c_proj",
        ),
    ),
    "llama": LLAMA,
    "mistral": LLAMA | dict(architecture="MistralForCausalLM"),
    "qwen2": LLAMA | dict(architecture="Qwen2ForCausalLM", config=KEYS | dict(qkv_bias=(True,), out_bias=(False,))),
    "qwen3": LLAMA | dict(architecture="Qwen3ForCausalLM", config=KEYS | dict(qk_norm=(True,))),
    "phi3": LLAMA
    | dict(architecture="Phi3ForCausalLM", names=NAMES | dict(qkv="self_attn.qkv_proj", up="mlp.gate_up_proj")),
}  # fmt: skip
# Ours: every module under its own name, layers numbered through so that the model can be cut anew.
OURS = dict(layer="layers.{i}", names=dict(gate="gate", q_head="q_head"))
# The authors': these, and the names of the base model's family within a layer.
AUTHORS = dict(wte="encoder.embed_tokens", norm="decoder.norm", lm_head="decoder.lm_head", q_head="q_head")
AUTHORS |= dict(gate="reasoning.gate", gate_down="reasoning.gate.dt_input_proj", gate_up="reasoning.gate.delta_proj")
HARMLESS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # buffers that old checkpoints carry
STEP = "step-" + "[0-9]" * 7  # a finished checkpoint of a training run; one being written has more to its name
GPT2_ALIASES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")

# The paper's cuts (Fig. 16, 17) by layers and width of the model: encoder and decoder layers.
PAPER_CUTS = {
    (28, 2048): (2, 1),  # Qwen3-1.7B
    (36, 2560): (2, 1),  # Qwen3-4B
    (36, 4096): (6, 1),  # Qwen3-8B
    (40, 5120): (6, 1),  # Phi-4
    (22, 2048): (1, 1),  # TinyLlama-1.1B
}


def read_config(path):
    """config.json → (layout, fields of Config, is the head tied). Raises InputError for what we cannot load."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        family = raw["model_type"]
        if family == "loopus":
            layout, values = OURS, {f.name: raw[f.name] for f in fields(Config) if f.name in raw}
        elif family == "lds":
            layout, values = read_family(raw["base_config_dict"], path)
            values |= {f"{stack}_layers": len(raw[f"{stack}_layer_indices"]) for stack in ("encoder", "decoder")}
            layout = layout | dict(layer="{stack}.layers.{j}", names=layout["names"] | AUTHORS)
        else:
            layout, values = read_family(raw, path)
    except (json.JSONDecodeError, KeyError, TypeError) as e:
        raise InputError(f"{path} is not a model's config ({e!r}): expected JSON with a model_type") from None
    missing = [f.name for f in fields(Config) if f.default is MISSING and values.get(f.name) is None]
    if missing:
        raise InputError(f"{path} does not say {', '.join(missing)} of the {family} model: is the file intact?")
    return layout, values, "gate" not in layout["names"] and raw.get("tie_word_embeddings", family == "gpt2")


def read_family(raw, path):
    """The config of an unlooped model → (layout, fields of Config)."""
    family = raw["model_type"]
    if family not in FAMILIES:
        expected = f"expected one of {', '.join(FAMILIES)}, or a looped one: loopus, lds"
        raise InputError(f"{path}: model_type {family} is not supported; {expected}")
    layout = FAMILIES[family]
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    raw = raw | rope
    window = raw.get("use_sliding_window", True) and raw.get("sliding_window") or math.inf
    if "sliding_attention" in (raw.get("layer_types") or ()) or window < raw.get("max_position_embeddings", 0):
        raise InputError(f"{path}: its sliding window is not supported; expected attention to all tokens before")
    for key, allowed in layout["only"].items():
        if raw.get(key, allowed[0]) not in allowed:
            expected = " or ".join(map(str, allowed))
            raise InputError(f"{path}: {key} {raw[key]} is not supported; expected {expected}")
    values = {ours: key[0] if isinstance(key, tuple) else raw.get(key) for ours, key in layout["config"].items()}
    values = {ours: value for ours, value in values.items() if value is not None}
    width, heads = values.get("n_embd", 0), values.get("n_head", 1)
    usual = dict(n_kv_head=heads, head_dim=width // heads, n_inner=4 * width, rope_theta=10000.0)
    return layout, usual | values | dict(rope_scaling=rope if rope["rope_type"] == "llama3" else None)


def hub_config(config, end_of_text):
    """Our Config → (layout, config.json) of the unlooped model as the hub has it."""
    c = config
    family = "qwen3" if c.qk_norm else "qwen2" if c.qkv_bias and not c.out_bias else "llama"
    family = "gpt2" if c.norm == "layer" else "phi3" if c.partial_rotary != 1 else family
    of = FAMILIES[family]
    raw = dict(model_type=family, architectures=[of["architecture"]], tie_word_embeddings=False, torch_dtype="float32")
    raw |= {key: getattr(c, ours) for ours, key in of["config"].items() if isinstance(key, str)}
    raw |= {key: allowed[0] for key, allowed in of["only"].items() if key != "rope_type"}
    if c.rope_theta:
        raw["rope_scaling"] = c.rope_scaling
    return of, raw | dict(bos_token_id=end_of_text, eos_token_id=end_of_text)


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


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def load(src, device="cpu", dtype=torch.float32, **overrides):
    """
    → (model in eval mode, tokenizer or None) from `src`, a hub name or a directory. `overrides` are fields of Config,
    such as encoder_layers=2. A checkpoint that was never cut gets the paper's cuts, or those of `choose_cuts`.
    Raises InputError for what is missing, surplus, misshapen or unsupported.
    """
    directory = resolve(src)
    layout, values, tied = read_config(directory / "config.json")
    unknown = set(overrides) - {f.name for f in fields(Config)}
    if unknown:
        raise InputError(
            f"{', '.join(unknown)} is no field of Config: expected {', '.join(f.name for f in fields(Config))}"
        )
    tokenizer = load_tokenizer(directory) if (directory / "tokenizer.json").exists() else None
    if tokenizer and tokenizer.n_vocab > values["vocab_size"]:
        found = f"{tokenizer.n_vocab} tokens, the model embeds {values['vocab_size']}"
        raise InputError(f"{directory / 'tokenizer.json'} has {found}: they do not belong together")
    config = Config(**dict(encoder_layers=0, decoder_layers=0) | values | overrides)
    model = read_model(directory, layout, config, tied, device, dtype).eval()
    if "gate" not in layout["names"] and not {"encoder_layers", "decoder_layers"} <= set(overrides):
        cuts = PAPER_CUTS.get((config.n_layer, config.n_embd))
        encoder, decoder = cuts or choose_cuts(layer_distances(model, sample_text(model, tokenizer)))
        cut(model, overrides.get("encoder_layers", encoder), overrides.get("decoder_layers", decoder))
    return model, tokenizer


def read_model(directory, layout, config, tied, device, dtype):
    """The model of `config` with the weights of the directory, each tensor copied from the mapped file once."""
    with torch.device("meta"):
        model = LoopUS(config)
    tensors, state, used, problems = open_tensors(directory), {}, set(), []
    for name, there, transposed in sources(model, layout):
        there = [bare(n) for n in there]
        used.update(there)
        if tied and name == "lm_head.weight":
            there = [bare(layout["names"]["wte"]) + ".weight"]
        shape = model.get_parameter(name).shape
        missing = [n for n in there if n not in tensors]
        parts = [tensors[n]().T if transposed else tensors[n]() for n in there if n in tensors]
        rows = [len(p) for p in parts]
        if missing:
            problems.append(f"{' and '.join(missing)} missing")
        elif any((sum(rows), *p.shape[1:]) != shape for p in parts):
            found = " + ".join(str(list(p.shape)) for p in parts)
            problems.append(f"{' + '.join(there)} shaped {found} instead of {list(shape)}")
        else:
            state[name] = torch.empty(shape, device=device, dtype=dtype)
            for target, part in zip(state[name].split(rows), parts):
                target.copy_(part)
    problems += [f"{n} unknown" for n in sorted(set(tensors) - used)]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise InputError(f"the weights in {directory} disagree with its config.json: {'; '.join(problems[:3])}{more}")
    new = {name: p for name, p in model.named_parameters() if name not in state}
    state |= {name: torch.empty(p.shape, device=device, dtype=dtype) for name, p in new.items()}
    model.load_state_dict(state, assign=True)
    if new:
        model.reset_new_parameters()
    return model


def bare(name):
    """A tensor's name without the prefixes that some checkpoints write and others do not; plateau is an old name."""
    name = re.sub(r"(^|\.)module\.", r"\1", name).replace("plateau.", "reasoning.")
    return name.removeprefix("transformer.").removeprefix("model.")


def open_tensors(directory):
    """{bare name: function that maps the tensor from its file} over all safetensors files of a checkpoint."""
    index, shards = directory / "model.safetensors.index.json", ["model.safetensors"]
    if index.exists() and not (directory / shards[0]).exists():
        shards = shard_names(index)
    tensors = {}
    for path in (directory / shard for shard in shards):
        if not path.exists():
            raise InputError(f"{path} is missing: expected weights as safetensors (pickled .bin files are not read)")
        try:
            file = safe_open(path, "pt")
        except SafetensorError as e:
            raise InputError(f"{path} is damaged ({e}): fetch or write it again") from None
        for name in file.keys():
            if not name.endswith(HARMLESS):
                tensors[bare(name)] = lambda file=file, name=name: file.get_tensor(name)
    return tensors


def shard_names(index):
    """The files that a model.safetensors.index.json speaks of; they lie beside it, whatever it says."""
    return sorted({Path(name).name for name in json.loads(index.read_text())["weight_map"].values()})


def save(model, tokenizer, out_dir, hub_layout=False):
    """`write` to out_dir, put in place when it is whole: a failure leaves what was there intact."""
    with replaced(out_dir) as new:
        write(model, tokenizer, new, hub_layout)


def write(model, tokenizer, directory, hub_layout=False):
    """
    Write config.json, model.safetensors and tokenizer.json into a directory, as a LoopUS checkpoint or, with
    hub_layout, as the plain unlooped model that other tools load too.
    """
    c = model.config
    layout, config = OURS, dict(model_type="loopus") | asdict(c)
    if hub_layout:
        layout, config = hub_config(c, tokenizer.end_of_text if tokenizer else None)
    qkv = [c.n_head * c.head_dim, c.n_kv_head * c.head_dim, c.n_kv_head * c.head_dim]
    tensors = {}
    for name, there, transposed in sources(model, layout):
        whole = model.get_parameter(name).detach()
        rows = {1: [len(whole)], 2: [c.n_inner, c.n_inner], 3: qkv}[len(there)]
        for n, part in zip(there, whole.split(rows)):
            tensors[n] = (part.T if transposed else part).contiguous()
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if tokenizer:
        (directory / "tokenizer.json").write_text(json.dumps(tokenizer.spec, ensure_ascii=False), encoding="utf-8")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@contextmanager
def replaced(out_dir):
    """A directory to write into. Its files go to out_dir when the block ends well; if not, nothing has happened."""
    out_dir = Path(out_dir)
    new = out_dir.with_name(f"{out_dir.name}.new-{os.getpid()}")
    try:
        new.mkdir(parents=True)
        yield new
        if not out_dir.exists():
            new.rename(out_dir)
        else:
            for file in new.iterdir():
                file.replace(out_dir / file.name)
    except (OSError, SafetensorError, RuntimeError) as e:
        raise InputError(f"cannot write {out_dir} ({e}): make room there; what it held is untouched") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------------------
# The hub


def cache_dir():
    """Where downloads and tokenised texts are kept: LOOPUS_CACHE, or loopus in the user's cache directory."""
    return Path(os.environ.get("LOOPUS_CACHE") or Path.home() / ".cache" / "loopus")


def resolve(src):
    """`src` → the directory of its checkpoint: a directory, the newest step of a training run, or a download."""
    path = Path(src)
    if (path / "config.json").exists():
        return path
    if steps := sorted(path.glob(f"{STEP}/config.json")):
        return steps[-1].parent
    if path.exists():
        raise InputError(f"{src} holds no config.json: expected a directory with a checkpoint, or a name on the hub")
    name, _, revision = str(src).partition("@")
    if name in GPT2_ALIASES:
        name = f"openai-community/{name}"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise InputError(f"{src} is no directory here and no name on the hub: expected owner/name, gpt2 or a directory")
    return download(name, revision or "main")


def download(name, revision):
    """Fetch a model from the hub (HF_ENDPOINT, HF_TOKEN) into the cache, once → its directory."""
    directory = cache_dir() / "hub" / f"{name}@{revision}".replace("/", "--")
    url = f"{os.environ.get('HF_ENDPOINT') or 'https://huggingface.co'}/{name}/resolve/{revision}/"
    if (directory / "complete").exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    fetch(url, "config.json", directory)
    fetch(url, "tokenizer.json", directory, optional=True)
    if not fetch(url, "model.safetensors", directory, optional=True):
        index = "model.safetensors.index.json"
        if not fetch(url, index, directory, optional=True):
            raise InputError(f"{name}@{revision} has no safetensors on the hub: pickled weights are not read")
        for shard in shard_names(directory / index):
            fetch(url, shard, directory)
    (directory / "complete").touch()
    return directory


def fetch(url, name, directory, optional=False):
    """Download url + name, going on where a try broke off. → False if it is optional and not there."""
    part = directory / f"{name}.part"
    if (directory / name).exists():
        return True
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url + name, headers={"Range": f"bytes={have}-"} if have else {})
    if token := os.environ.get("HF_TOKEN"):
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            have = have if answer.status == 206 else 0  # 206: the rest is coming; else all of it
            total = have + int(answer.headers.get("Content-Length") or 0)
            with open(part, "ab" if have else "wb") as out:
                while block := answer.read(1 << 20):
                    have += out.write(block)
                    progress(f"fetching {name}", have, total)
    except urllib.error.HTTPError as e:
        if e.code == 404 and optional:
            return False
        if e.code == 416:  # there is no rest to send: what lies here is not the beginning of that file
            part.unlink()
        hint = {401: "set HF_TOKEN", 403: "set HF_TOKEN", 404: "check the name"}.get(e.code, "try again later")
        raise InputError(f"the hub answered {e.code} for {url}{name}: {hint}") from None
    except (OSError, http.client.HTTPException) as e:
        raise InputError(f"cannot fetch {url}{name} ({e}): go online and run it again, or give a directory") from None
    if total and have != total:
        raise InputError(f"{url}{name} broke off after {have} of {total} bytes: run it again to go on from there")
    part.replace(directory / name)
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers

GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same after every digit has been set apart: a run of spaces then also ends, whole, before a digit.
DIGITS_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"


def byte_alphabet():
    """Byte-level BPE writes bytes as printable characters: {byte: character}, visible Latin-1 as itself."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(rest)}


class Tokenizer:
    """
    tiktoken's byte-pair encoding with the ids of a tokenizer.json: `encode(text)` → ids, `decode(ids)` → text.
    tiktoken takes the order of merges for ids; real vocabularies do not always, so `ids` maps its numbers to theirs.
    """

    def __init__(self, spec, where="tokenizer.json"):
        self.spec, model = spec, spec["model"]
        split, self.nfc = split_pattern(spec, where)
        alphabet = byte_alphabet()
        byte_of = {character: b for b, character in alphabet.items()}
        merges = ["".join(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
        ranks, ids = {}, []
        for token in dict.fromkeys([*alphabet.values(), *merges]):
            ranks[bytes(byte_of[character] for character in token)] = len(ids)
            ids.append(model["vocab"].get(token, -1))  # −1: a byte that the vocabulary lacks vanishes
        added = {t["content"]: t["id"] for t in spec.get("added_tokens") or []}
        special = {content: len(ids) + i for i, content in enumerate(added)}
        self.encoding = tiktoken.Encoding("loopus", pat_str=split, mergeable_ranks=ranks, special_tokens=special)
        self.ids = np.array([*ids, *added.values()])
        self.n_vocab = int(self.ids.max()) + 1
        self.bytes_of = [b""] * self.n_vocab
        for token, i in (*zip(ranks, ids), *((content.encode(), i) for content, i in added.items())):
            if i >= 0:
                self.bytes_of[i] = token
        ends = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<|im_end|>")
        self.end_of_text = next((added[name] for name in ends if name in added), None)

    def encode(self, text):
        text = unicodedata.normalize("NFC", text) if self.nfc else text
        ids = self.ids[self.encoding.encode_to_numpy(text, allowed_special="all")]
        return ids[ids >= 0].tolist()

    def decode_bytes(self, ids):
        return b"".join(self.bytes_of[i] for i in ids)

    def decode(self, ids):
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


def split_pattern(spec, where):
    """→ (the regular expression that cuts text before BPE, is the text brought to Unicode's NFC before)."""
    normalizer, splitter = spec.get("normalizer"), spec.get("pre_tokenizer") or dict(type="none")
    steps = splitter["pretokenizers"] if splitter["type"] == "Sequence" else [splitter]
    kinds = [step["type"] for step in steps]
    nfc = normalizer == {"type": "NFC"}
    plain = steps[-1].get("use_regex", True) and not steps[-1].get("add_prefix_space")
    if spec["model"].get("type", "BPE") == "BPE" and (nfc or normalizer is None):
        if kinds == ["ByteLevel"] and plain:
            return GPT2_SPLIT, nfc
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and plain:
            return DIGITS_SPLIT, nfc
        if kinds == ["Split", "ByteLevel"] and steps[0]["behavior"] == "Isolated" and "Regex" in steps[0]["pattern"]:
            return steps[0]["pattern"]["Regex"], nfc
    found = f"{spec['model'].get('type')} after {normalizer and normalizer['type']} and {' + '.join(kinds)}"
    raise InputError(f"{where}: {found} is not supported; expected byte-level BPE as GPT-2, SmolLM2 or Qwen have it")


def byte_tokenizer():
    """One token per byte, id = byte, and <|endoftext|> as 256: for models that are trained from nothing."""
    end = dict(id=256, content="<|endoftext|>", special=True, normalized=False, single_word=False)
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    bpe = dict(type="BPE", vocab={character: b for b, character in byte_alphabet().items()}, merges=[])
    added = [end | dict(lstrip=False, rstrip=False)]
    return Tokenizer(dict(version="1.0", added_tokens=added, pre_tokenizer=level, decoder=level, model=bpe))


def load_tokenizer(src):
    """The tokenizer of a hub name or directory, from its tokenizer.json."""
    path = resolve(src) / "tokenizer.json"
    try:
        return Tokenizer(json.loads(path.read_text(encoding="utf-8")), path)
    except (json.JSONDecodeError, KeyError, TypeError) as e:
        raise InputError(f"{path} is no tokenizer that can be read ({e!r}): fetch it again") from None


# ---------------------------------------------------------------------------------------------------------------------
# Text


def find_files(data):
    """A file, a directory (all its files), a glob, or "python": the source of its standard library → sorted paths."""
    if data == "python":
        library, skip = Path(sysconfig.get_paths()["stdlib"]), {"site-packages", "test", "tests", "idle_test"}
        found = [f for f in library.rglob("*.py") if not skip & set(f.relative_to(library).parts)]
    elif Path(data).is_dir():
        found = Path(data).rglob("*")
    else:
        found = [Path(data)] if Path(data).exists() else map(Path, glob.glob(data, recursive=True))
    found = sorted(f for f in found if f.is_file() and not f.name.startswith("."))
    if not any(f.stat().st_size for f in found):
        state = "is empty" if found else "matches no file"
        raise InputError(f"{data} {state}: expected a text file, a directory, a glob, or .bin token files")
    return found


def load_data(data, val, tokenizer):
    """→ (training, held-out tokens). Without `val` every 20th file is held out, of a single one the last 20th."""
    files = find_files(data)
    if val:
        return load_tokens(files, tokenizer), load_tokens(find_files(val), tokenizer)
    if len(files) >= 20:
        return load_tokens(sorted(set(files) - set(files[::20])), tokenizer), load_tokens(files[::20], tokenizer)
    tokens = load_tokens(files, tokenizer)
    border = len(tokens) - len(tokens) // 20
    return tokens[:border], tokens[border:]


def load_tokens(files, tokenizer):
    """
    Text or .bin files → one memory-mapped array of token ids. Texts are tokenised once, each closed by end-of-text,
    and kept in the cache, as uint16 or, for large vocabularies, uint32. Raises InputError for anything else.
    """
    small = np.uint16 if tokenizer.n_vocab <= 1 << 16 else np.uint32
    if [f.suffix for f in files] == [".bin"]:
        return map_tokens(files[0], small, tokenizer)
    stamp = hashlib.sha256(json.dumps(tokenizer.spec, sort_keys=True).encode())
    for f in files:
        stamp.update(f"{f.resolve()} {f.stat().st_size} {f.stat().st_mtime_ns}\n".encode())
    path = cache_dir() / "tokens" / f"{stamp.hexdigest()[:32]}.bin"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        total, done, part = sum(f.stat().st_size for f in files), 0, path.with_suffix(f".{os.getpid()}")
        end = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
        try:
            with open(part, "wb") as out:
                for f in files:
                    if f.suffix == ".bin":
                        map_tokens(f, small, tokenizer).astype(small).tofile(out)
                        continue
                    for piece in pieces(f):
                        np.array(tokenizer.encode(piece), dtype=small).tofile(out)
                        done += len(piece.encode())
                        progress("tokenising", done, total)
                    np.array(end, dtype=small).tofile(out)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    return np.memmap(path, dtype=small, mode="r")


def map_tokens(path, small, tokenizer):
    """Map a .bin file of uint16 or uint32 ids, and make sure that they are this tokenizer's."""
    head = np.fromfile(path, dtype=np.uint16, count=4096)
    wide = small == np.uint32 or (len(head) > 1 and not head[1::2].any())  # ids under 65,536 as uint32: half are zeros
    if path.stat().st_size % (4 if wide else 2):
        raise InputError(f"{path} has {path.stat().st_size} bytes: expected whole uint{32 if wide else 16} tokens")
    tokens = np.memmap(path, dtype=np.uint32 if wide else np.uint16, mode="r")
    if (largest := int(tokens.max())) >= tokenizer.n_vocab:
        raise InputError(f"{path} holds token {largest}, the tokenizer has {tokenizer.n_vocab}: for another model?")
    return tokens


def pieces(path, size=1 << 20):
    """A text file in pieces of about `size` characters, cut between lines, where no tokenizer joins them."""
    try:
        text, start = path.read_text(encoding="utf-8"), 0
    except UnicodeDecodeError as e:
        raise InputError(f"{path} is not UTF-8 text (byte {e.start}): give text, or tokens as .bin") from None
    border = re.compile(r"(?<=\S\n)(?=\w)")
    while start < len(text):
        match = border.search(text, start + size)
        end = match.start() if match else len(text)
        yield text[start:end]
        start = end


# ---------------------------------------------------------------------------------------------------------------------
# Where to cut, §3.1 and Fig. 1


def sample_text(model, tokenizer):
    """Tokens (1, T) to look at a model with: this project's own words or, without a tokenizer, any numbers."""
    length = min(256, model.config.block_size)
    ids = tokenizer.encode(loopus.__doc__) if tokenizer else [i * 7919 for i in range(length)]
    return torch.tensor([ids[:length]], device=model.wte.weight.device) % model.config.vocab_size


@torch.no_grad()
def layer_distances(model, idx):
    """1 − cos of the states entering and leaving each layer, mean over the tokens idx (B, T): (n_layer,)."""
    at = span(model.config, 0, idx.size(1), idx.device)
    h, distances = model.embed(idx), []
    for block in model.layers():
        before, h = h, block(h, at)
        distances.append(1 - F.cosine_similarity(before.float(), h.float(), dim=-1).mean())
    return torch.stack(distances).cpu()


def choose_cuts(distances):
    """
    The rule: the reasoning block is the plateau, the longest run of layers that each change the state less than twice
    what the median layer does; never the first and the last layer, as in all of the paper's cuts.
    → layers before it (encoder), layers after it (decoder).
    """
    last = len(distances) - 1
    loud = torch.nonzero(distances >= 2 * distances.median()).flatten().tolist()
    borders = sorted({0, last, *loud})
    before, after = max(zip(borders, borders[1:]), key=lambda pair: pair[1] - pair[0], default=(0, last))
    return before + 1, last + 1 - after


def cut(model, encoder, decoder):
    """Move the borders between encoder, reasoning block and decoder, in place."""
    model.config = replace(model.config, encoder_layers=encoder, decoder_layers=decoder)
    layers, end = model.layers(), model.config.n_layer - decoder
    stacks = layers[:encoder], layers[encoder:end], layers[end:]
    model.encoder, model.reasoning, model.decoder = (torch.nn.ModuleList(stack) for stack in stacks)


# ---------------------------------------------------------------------------------------------------------------------
# The command line, the same for all programs


def flag(default, help, least=None):
    """A setting, its help text and the least value it may have: the fields of a dataclass become flags in `parse`."""
    return field(default=default, metadata={"help": help, "least": least})


def parse(settings, *positional):
    """The command line as {field: value} of the dataclass `settings`, given ones only; refuses unknown flags."""
    parser = ArgumentParser(description=settings.__doc__, allow_abbrev=False, argument_default=SUPPRESS)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}; --help lists what there is\n")
    for f in fields(settings):
        text = f.metadata["help"].replace("%", "%%") + (f" (default {f.default})" if f.default != "" else "")
        if f.name in positional:
            parser.add_argument(f.name, help=text, nargs="?")
        elif f.type is bool:
            parser.add_argument(f"--{f.name}", help=text, action=BooleanOptionalAction)
        else:
            parser.add_argument(f"--{f.name}", help=text, type=f.type, metavar=f.type.__name__.upper())
    given = vars(parser.parse_args())
    for f in fields(settings):
        least = f.metadata["least"]
        if least is not None and given.get(f.name, least) < least:
            parser.error(f"--{f.name}={given[f.name]} is too small, expected at least {least}")
    return given


def run(main):
    """Call main(); what the user can mend, and Ctrl-C, end it with one line and a non-zero exit code."""
    try:
        main()
    except BrokenPipeError:
        os._exit(1)  # whoever read the output, such as `head`, has left
    except (InputError, OSError) as e:
        sys.exit(f"error: {' '.join(str(e).split())}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted")


def pick_device(name, dtype):
    """→ (torch device, dtype) of --device and --dtype; by itself bf16 where the device is good at it."""
    if not name:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise InputError(f"--device={name} is not to be had here: expected cpu, cuda or mps") from None
    if not dtype:
        native = {"cuda": torch.cuda.is_bf16_supported, "cpu": getattr(torch.cpu, "_is_avx512_bf16_supported", bool)}
        dtype = "bf16" if native.get(device.type, bool)() else "fp32"
    if dtype not in ("bf16", "fp32"):
        raise InputError(f"--dtype={dtype} is not known: expected bf16 or fp32")
    return device, torch.bfloat16 if dtype == "bf16" else torch.float32


def remember(directory):
    """Note the checkpoint that was written last, for `last_model`."""
    cache_dir().mkdir(parents=True, exist_ok=True)
    (cache_dir() / "last").write_text(str(Path(directory).resolve()))


def last_model():
    """The checkpoint that train.py wrote last, for programs that are not told which to take."""
    note = cache_dir() / "last"
    if not note.exists():
        raise InputError("no --init, and train.py has written no model yet: run python train.py, or name a model")
    return note.read_text()


def progress(what, done, total):
    """One line on a terminal that fills up and goes when it is full; nothing where the output is a file."""
    if sys.stderr.isatty():
        line = f"{what} {'█' * int(30 * done / max(total, done, 1)):30} {done:,}"
        print("\r" + (line if done < total else " " * len(line) + "\r"), end="", flush=True, file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Settings:
    """Write a pretrained model as a LoopUS checkpoint, or show where --profile would cut it."""

    src: str = flag("", "hub name or directory of the model")
    out: str = flag("", "directory to write")
    profile: bool = flag(False, "show how much each layer changes the state, the cuts, and the untrained losses")
    data: str = flag("", "text to profile on; empty: a page about LoopUS")
    encoder_layers: int = flag(-1, "layers before the loop; -1: the paper's cut, or by the profile")
    decoder_layers: int = flag(-1, "layers after the loop; -1: likewise")
    gate_start: str = flag("0.5", "first α of every channel, or s4d: the authors' start")


def show_profile(model, tokenizer, data):
    """Print a bar per layer, the cuts, and the untrained losses of these and of their neighbours."""
    from eval import depth_losses, windows  # eval.py reads models through this file

    sequences = sample_text(model, tokenizer)
    if data:
        sequences = windows(load_tokens(find_files(data), tokenizer), min(256, model.config.block_size), 2048)
    distances = layer_distances(model, sequences[:, :-1])
    n, encoder, decoder = model.config.n_layer, model.config.encoder_layers, model.config.decoder_layers
    print("1 − cos between the states that enter and leave each layer")
    for i, d in enumerate(distances.tolist()):
        part = "encoder" if i < encoder else "decoder" if i >= n - decoder else "loop"
        print(f"layer {i:>2}  {part:7}  {d:6.3f}  {'█' * round(50 * d / distances.max().item())}")
    print("by the rule: encoder {}, decoder {};".format(*choose_cuts(distances)), f"taken: {encoder}, {decoder}")
    print("\nuntrained loss after    1        2        4        8 passes")
    for e, d in ((encoder + a, decoder + b) for a, b in ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))):
        if e >= 0 and d >= 0 and e + d < n:
            cut(model, e, d)
            losses = depth_losses(model, sequences, [1, 2, 4, 8], 8, nullcontext)
            print(f"cut {e:>2}, {d:<2}        " + "".join(f"{loss:9.3f}" for loss in losses.values()), flush=True)
    print(f"the model itself  {depth_losses(model, sequences, [0], 8, nullcontext)[0]:9.3f}")


def main():
    s = Settings(**parse(Settings, "src", "out"))
    if not s.src or not (s.out or s.profile):
        raise InputError("expected: convert.py SRC OUT, or convert.py SRC --profile")
    cuts = {k: getattr(s, k) for k in ("encoder_layers", "decoder_layers") if getattr(s, k) >= 0}
    model, tokenizer = load(s.src, **cuts, gate_start=s.gate_start)
    if s.profile:
        show_profile(model, tokenizer, s.data)
    if s.out:
        save(model, tokenizer, s.out)
        c = model.config
        print(f"{s.out}: {c.encoder_layers} encoder, {c.reasoning_layers} looped and {c.decoder_layers} decoder layers")


if __name__ == "__main__":
    run(main)
