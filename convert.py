"""
All that is read from disk or written there and, at the end of the file, the command line that the programs share.

    python convert.py SRC OUT          write SRC as a LoopUS checkpoint, or with --format=hf as an unlooped model
    python convert.py SRC --profile    show how much each layer changes the state, and where that cuts the model
"""

import copy
import glob
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
import unicodedata
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import HTTPRedirectHandler, Request, build_opener

import numpy as np
import regex  # comes with tiktoken
import tiktoken
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import loopus
from loopus import RULES, Config, Halt, InputError, LoopUS


# ---- Reading
@contextmanager
def reading(path):
    """The one place where what goes wrong while a file is read becomes one line: its name, and what was said of it."""
    try:
        yield
    except InputError as e:
        raise InputError(f"{path}: {e}") from None
    except Exception as e:  # of many types: whatever a library raises
        raise InputError(f"{path}: {type(e).__name__}: {one_line(e):.200}") from None


def refuse(condition, message):
    """Raise InputError where the condition holds: one line that says what was found, what was expected, what to do."""
    if condition:
        raise InputError(message)


def read_json(path):
    with reading(path):
        return dict(json.loads(path.read_bytes())) if path.exists() else {}


def listed(x):
    return x if isinstance(x, list) else [x]


def expand(path):
    return Path(os.path.expanduser(path))


# ---- Families of models and their config.json
class Family(NamedTuple):
    """How the checkpoints of one family of models spell what we call by our own names."""

    keys: dict  # field of our Config → its key in config.json
    constants: dict  # fields of our Config that are the same in the whole family
    supported: dict  # key in config.json → the values of it that we can run; without it the first one holds
    layer: str  # prefix of a layer's tensors: {i} counts over the whole model, {j} within its {stack}
    modules: dict  # module of ours → the one there, or a list: the rows of several lie one below the other in ours
    looped: bool = False  # checkpoints have the gate and the confidence head, too


GPT2 = Family(
    keys=dict(
        vocab_size="vocab_size", block_size="n_positions", n_layer="n_layer", n_head="n_head", n_embd="n_embd",
        n_inner="n_inner", norm_eps="layer_norm_epsilon",
    ),
    constants=dict(norm="layer", mlp="gelu", rotary=None, qkv_bias=True, out_bias=True, mlp_bias=True),
    supported=dict(
        activation_function=["gelu_new", "gelu_pytorch_tanh"], scale_attn_weights=[True],
        scale_attn_by_inverse_layer_idx=[False], tie_word_embeddings=[True, False],
    ),
    layer="transformer.h.{i}.",
    modules=dict(
        wte="transformer.wte", wpe="transformer.wpe", norm="transformer.ln_f", lm_head="lm_head",
        ln_1="ln_1", qkv="attn.c_attn", out="attn.c_proj", ln_2="ln_2", up="mlp.c_fc", down="mlp.c_proj",
    ),
)  # fmt: skip
LLAMA = Family(
    keys=dict(
        vocab_size="vocab_size", block_size="max_position_embeddings", n_layer="num_hidden_layers",
        n_head="num_attention_heads", n_kv_head="num_key_value_heads", head_dim="head_dim", n_embd="hidden_size",
        n_inner="intermediate_size", norm_eps="rms_norm_eps",
        qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias",
    ),
    constants=dict(norm="rms", mlp="swiglu"),
    supported=dict(
        hidden_act=["silu", "swish"], rope_type=["default", "llama3"], partial_rotary_factor=[1.0],
        use_sliding_window=[True, False],  # a window of sliding_window tokens, if that has a value
        tie_word_embeddings=[False, True],
    ),
    layer="model.layers.{i}.",
    modules=dict(
        wte="model.embed_tokens", norm="model.norm", lm_head="lm_head",
        ln_1="input_layernorm", qkv=["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        q_norm="self_attn.q_norm", k_norm="self_attn.k_norm", out="self_attn.o_proj",
        ln_2="post_attention_layernorm", up=["mlp.gate_proj", "mlp.up_proj"], down="mlp.down_proj",
    ),
)  # fmt: skip
QWEN = LLAMA._replace(supported=LLAMA.supported | dict(use_sliding_window=[False, True]))
FAMILIES = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": QWEN._replace(constants=QWEN.constants | dict(qkv_bias=True, out_bias=False)),
    "qwen3": QWEN._replace(constants=QWEN.constants | dict(qk_norm=True)),
    "phi3": LLAMA._replace(modules=LLAMA.modules | dict(qkv="self_attn.qkv_proj", up="mlp.gate_up_proj")),
}
# The LoopUS authors' checkpoints: within a layer the family's own names, and these outside. wpe is our addition.
LOOPED_MODULES = {
    "wte": "encoder.embed_tokens", "wpe": "encoder.embed_positions",
    "gate": "reasoning.gate", "gate.down": "reasoning.gate.dt_input_proj", "gate.up": "reasoning.gate.delta_proj",
    "norm": "decoder.norm", "lm_head": "decoder.lm_head", "q_head.0": "q_head.0", "q_head.1": "q_head.1",
}  # fmt: skip
# What the authors' code reads at inference, for models that they have not written.
LOOPED_DEFAULTS = dict(N=8, q_threshold=0.6, q_eval_interval=1, halting_strategy="threshold", convergence_epsilon=0.01)
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # of old checkpoints; they hold no weights


def looped(family):
    """The same family as the LoopUS authors store it."""
    return family._replace(layer="{stack}.layers.{j}.", modules=family.modules | LOOPED_MODULES, looped=True)


def read_config(path):
    """config.json → (Family, Config). An unlooped model is not cut yet. Raises InputError for what we cannot run."""
    raw = read_json(path)
    with reading(path):
        family, values = read_family(raw.get("base_config_dict", raw))
        if raw.get("model_type") != "lds":
            return family, Config(**values, encoder_layers=0, decoder_layers=0)
        stacks = [raw[f"{stack}_layer_indices"] for stack in ("encoder", "reasoning", "decoder")]
        in_order = sum(stacks, []) == list(range(values["n_layer"]))
        refuse(not in_order, f"its layers are {stacks}: expected all {values['n_layer']} in their order")
        values |= {"encoder_layers": len(stacks[0]), "decoder_layers": len(stacks[2]), "base": raw}
        return looped(family), Config(**values, q_threshold=float((LOOPED_DEFAULTS | raw)["q_threshold"]))


def read_family(base):
    """The config of an unlooped model → (Family, fields of our Config). Raises InputError for what we cannot run."""
    family = FAMILIES.get(base.get("model_type"))
    refuse(not family, f"model_type {base.get('model_type')!r} is not supported: expected {', '.join(FAMILIES)}")
    rope = base.get("rope_scaling") or base.get("rope_parameters") or {}  # the older spelling, the newer one
    refuse("full_attention" in rope, "rotary positions that differ between layers are not supported")
    raw = [*base.items(), ("rope_type", rope.get("type")), *rope.items()]
    raw = {key: value for key, value in raw if value is not None}
    for key, choices in family.supported.items():
        raw.setdefault(key, choices[0])
        refuse(raw[key] not in choices, f"{key} {raw[key]!r} is not supported: expected one of {choices}")
    values = {name: Config.__annotations__[name](raw[key]) for name, key in family.keys.items() if key in raw}
    width, heads = values["n_embd"], values["n_head"]
    defaults = dict(n_kv_head=heads, head_dim=width // heads, n_inner=4 * width)
    base = base | {"tie_word_embeddings": raw["tie_word_embeddings"]}
    values = defaults | values | family.constants | {"base": base}
    windowed = raw.get("use_sliding_window") and raw.get("sliding_window", math.inf) < values["block_size"]
    refuse(windowed, "a sliding window is not supported: expected attention to all earlier tokens")
    if "rotary" not in values:
        values["rotary"] = rotary_angles(raw, values["head_dim"])
    return family, values


def rotary_angles(raw, head_dim):
    """By what angle one position turns each pair of a head's channels. Llama 3 stretches wavelengths over original /
    low_freq_factor by `factor`, none under original / high_freq_factor, and those between smoothly."""
    angle = raw.get("rope_theta", 10000.0) ** -(torch.arange(0, head_dim, 2) / head_dim)
    if raw["rope_type"] == "llama3":
        low, high = raw["low_freq_factor"], raw["high_freq_factor"]
        turns = raw["original_max_position_embeddings"] * angle / (2 * torch.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        angle = torch.lerp(angle / raw["factor"], angle, kept)
    return angle.tolist()


def config_to_write(config, format, dtype):
    """Our Config → (Family, config.json) of a checkpoint in that format, with weights of that dtype."""
    base = config.base.get("base_config_dict", config.base)
    family = FAMILIES[base["model_type"]]
    dtype_key = "dtype" if "dtype" in base else "torch_dtype"  # since transformers 5, and before
    # not tied: the output projection trains, the embedding does not
    base = base | {dtype_key: str(dtype).removeprefix("torch."), "tie_word_embeddings": False}
    if format == "hf":
        return family, base
    layers = list(range(config.n_layer))
    end = config.n_layer - config.decoder_layers
    before = config.base if "base_config_dict" in config.base else LOOPED_DEFAULTS
    return looped(family), before | {
        "model_type": "lds",
        "base_config_dict": base,
        "q_threshold": config.q_threshold,
        "encoder_layer_indices": layers[: config.encoder_layers],
        "reasoning_layer_indices": layers[config.encoder_layers : end],
        "decoder_layer_indices": layers[end:],
    }


# ---- Checkpoints
def load(src, device="cpu", dtype=torch.float32, encoder_layers=-1, decoder_layers=-1):
    """→ (model in eval mode, tokenizer or None) from `src`, a hub name or a directory. dtype None: each tensor as it is
    stored. Layers of −1: as the checkpoint is cut or, if it was never looped, as the paper cut a model of its size,
    else by `choose_cuts`. Raises InputError for what is missing, misshapen or unsupported."""
    directory = resolve(src)
    family, config = read_config(directory / "config.json")
    tokenizer = load_tokenizer(directory, config.vocab_size)
    model = read_model(directory, family, config, device, dtype).eval()
    cuts = (config.encoder_layers, config.decoder_layers)
    asked = (encoder_layers, decoder_layers)
    if not family.looped and -1 in asked:
        size = (config.n_layer, config.n_embd)
        cuts = PAPER_CUTS.get(size) or choose_cuts(layer_distances(model, sample_text(model, tokenizer)))
    cut(model, *[own if layers == -1 else layers for own, layers in zip(cuts, asked)])
    return model, tokenizer


def stored_names(model, family):
    """{name of a parameter of ours: its tensors, whose rows lie one below the other, in the checkpoints of a family}"""
    c = model.config
    first_layer = {"encoder": 0, "reasoning": c.encoder_layers, "decoder": c.n_layer - c.decoder_layers}
    stored = {}
    for name in model.state_dict():
        module, leaf = name.rsplit(".", 1)
        stack, *place = module.split(".")
        prefix = ""
        if stack in first_layer:  # encoder.3.qkv, say
            j, module = place
            prefix = family.layer.format(stack=stack, j=j, i=first_layer[stack] + int(j))
        if module in family.modules:
            stored[name] = [f"{prefix}{stored_module}.{leaf}" for stored_module in listed(family.modules[module])]
    return stored


def turned(name, tensor):
    """A tensor as GPT-2 stores it, or back: the matrices of its layers, called c_…, lie there as (inputs, outputs)."""
    return tensor.t() if ".c_" in name else tensor


def read_model(directory, family, config, device, dtype):
    """The model of `config` with the weights of a directory. Raises InputError where these disagree with it."""
    tensors = read_tensors(directory)
    with reading(f"the weights and the config.json in {directory}"):
        refuse(config.n_layer > len(tensors), f"{config.n_layer} layers of {len(tensors)} tensors")
        with torch.device("meta"):
            model = LoopUS(config)
        stored = stored_names(model, family)
        if not family.looped and config.base["tie_word_embeddings"] and "lm_head.weight" not in tensors:
            stored["lm_head.weight"] = stored["wte.weight"]
        wanted = {bare(tensor_name) for names in stored.values() for tensor_name in names}
        odd = sorted(wanted ^ tensors.keys())
        refuse(odd, f"{', '.join(odd[:3])}: in one of them, but not in the other")
        state = {}
        for name, parameter in progress(model.named_parameters(), "loading", len(stored)):
            if name in stored:
                with reading(stored[name]):
                    parts = [turned(tensor_name, tensors[bare(tensor_name)][:]) for tensor_name in stored[name]]
                    state[name] = torch.cat(parts).to(device=device, dtype=dtype)
                    refuse(not state[name].isfinite().all(), "not finite: is the file damaged?")
            else:  # the gate and the confidence head, where the model was never looped
                state[name] = torch.empty_like(parameter, dtype=state["wte.weight"].dtype, device=device)
        model.load_state_dict(state, assign=True)
    if not family.looped:
        model.reset_new_parameters()
    return model


def bare(name):
    """A tensor's name without the prefixes that some checkpoints write and others do not; plateau is an old name."""
    return re.sub(r"\b(module|transformer|model)\.", "", name).replace("plateau.", "reasoning.")


WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def shards(directory):
    """The weight files of a checkpoint, by its index or their names. They lie beside the index, whatever it states."""
    whole = directory / WEIGHTS
    if whole.exists():
        return [whole]
    index = read_json(directory / INDEX)
    with reading(directory / INDEX):
        named = {directory / Path(name).name for name in index.get("weight_map", {}).values()}
    return sorted(named or directory.glob("model-*-of-*.safetensors")) or [whole]


def read_tensors(directory):
    """{bare name: tensor, read from the disk by [:]} of a checkpoint's weights. InputError: some are not floats."""
    tensors = {}
    for path in shards(directory):
        with reading(path):
            file = safe_open(path, "pt")
            for name in file.keys():
                if not name.endswith(BUFFERS):
                    tensor = file.get_slice(name)
                    floats = tensor.get_dtype() in ("F16", "BF16", "F32", "F64")
                    refuse(not floats, f"{name} is not of floats: quantized weights are not supported")
                    tensors[bare(name)] = tensor
    return tensors


# What says how a model reads, talks and is drawn from: read beside the weights, and written back with them unchanged.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "generation_config.json",
)  # fmt: skip
STEP = "step-" + "[0-9]" * 7  # a finished checkpoint of a training run; one being written has more to its name


def save(model, tokenizer, out_dir, format="authors"):
    """Write a checkpoint, all of it or nothing: `write_checkpoint` into the directory out_dir. Raises InputError."""
    with all_or_nothing(out_dir) as unfinished:
        write_checkpoint(model, tokenizer, unfinished, format)


@contextmanager
def all_or_nothing(out_dir):
    """A new directory to write into. At the end of the `with` block its files take their place in out_dir, beside those
    of other names; after an exception in it nothing there has changed. Raises InputError where writing fails."""
    target = expand(out_dir).resolve()
    name = f"{target.name}.new-{os.urandom(4).hex()}"
    unfinished = target / name if target.exists() else target.parent / name  # beside it may lie another disk
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        if target.exists():
            for file in unfinished.iterdir():
                file.replace(target / file.name)
        else:
            unfinished.rename(target)
    except (OSError, SafetensorError, RuntimeError) as e:
        raise InputError(f"cannot write {out_dir}: {e}; name another --out or LOOPUS_CACHE") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_checkpoint(model, tokenizer, directory, format="authors", weights=None):
    """Write config.json, the weights and the tokenizer's files. format "authors": looped, as the LoopUS authors have
    it; "hf": unlooped, as on the hub. `weights`: {name: tensor}, where each process holds but a share of them."""
    weights = weights or model.state_dict()
    family, config = config_to_write(model.config, format, model.lm_head.weight.dtype)
    keys = model.config.n_kv_head * model.config.head_dim
    tensors = {}
    for name, names in stored_names(model, family).items():
        parts = weights[name].chunk(len(names))
        if len(names) == 3:
            parts = weights[name].tensor_split((-2 * keys, -keys))  # queries, keys and values
        for tensor_name, part in zip(names, parts):
            tensors[tensor_name] = turned(tensor_name, part).contiguous()
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    for name, content in tokenizer.files.items() if tokenizer else ():
        (directory / name).write_bytes(content)


# ---- The hub
def cache_dir():
    """Where downloads and tokenised texts are kept."""
    return expand(os.environ.get("LOOPUS_CACHE") or "~/.cache/loopus")


def resolve(src):
    """`src` → the directory of its checkpoint: itself, a run's newest step, a download; "": the newest below ./out."""
    if not src:
        configs = sorted(Path("out").glob(f"**/{STEP}/config.json"), key=os.path.getmtime)
        refuse(not configs, "no --init, and no model below ./out: run python train.py, or name a model")
        src = configs[-1].parent
        print(f"no --init: taking the newest model, {src}", file=sys.stderr)
    path = expand(src)
    configs = [*path.glob("config.json")] or sorted(path.glob(f"{STEP}/config.json"))
    if configs:
        return configs[-1].parent
    name, _, revision = str(src).partition("@")
    if re.fullmatch("gpt2(-medium|-large|-xl)?", name):
        name = f"openai-community/{name}"
    on_hub = re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) and not path.exists()
    refuse(not on_hub, f"{path} is no directory with a config.json here and no name on the hub (owner/name, gpt2)")
    return download(name, revision or "main")


def download(name, revision):
    """→ the directory of a model on the hub: where the hub's own tools keep it, or a copy in our cache."""
    home = expand(os.environ.get("HF_HOME") or "~/.cache/huggingface")
    model = home / "hub" / f"models--{name.replace('/', '--')}"
    ref = model / "refs" / revision
    commit = ref.read_text().strip() if ref.exists() else revision
    target = cache_dir() / f"{name}@{revision}".replace("/", "--")
    for directory in (model / "snapshots" / commit, target):
        if all(map(Path.exists, [directory / "config.json", *shards(directory)])):
            return directory
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    url = f"{endpoint.rstrip('/')}/{name}/resolve/{quote(commit, safe='')}/"
    login = home / "token"
    token = os.environ.get("HF_TOKEN") or (login.read_text() if login.is_file() else "")
    with all_or_nothing(target) as unfinished:
        for file in ("config.json", INDEX, *TOKENIZER_FILES):
            fetch(url, unfinished / file, token.strip())
        for shard in shards(unfinished):
            fetch(url, shard, token.strip())
    return target


class SameHost(HTTPRedirectHandler):
    """Follows redirects, and sends the token to the hub only."""

    def redirect_request(self, request, *answer):
        followed = super().redirect_request(request, *answer)
        if (followed.type, followed.host) != (request.type, request.host):
            followed.remove_header("Authorization")
        return followed


def fetch(url, target, token):
    """Download the file of target's name from below url. Raises InputError. Only config and weights must exist."""
    request = Request(url + target.name)
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    with reading(f"cannot fetch {request.full_url}"):
        try:
            with build_opener(SameHost).open(request, timeout=30) as answer, open(target, "wb") as out:
                size = int(answer.headers["Content-Length"] or 0)
                for block in progress(iter(partial(answer.read, 1 << 20), b""), f"fetching {target.name}", size, len):
                    out.write(block)
                refuse(out.tell() < size, f"it broke off after {out.tell()} of {size} bytes")
        except HTTPError as e:
            if e.code != 404 or target.name not in (INDEX, *TOKENIZER_FILES):
                raise


# ---- Tokenizers: tiktoken for byte-level BPE that cuts words by a pattern we know, the tokenizers package for others
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SMOLLM2_SPLIT = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"  # one digit each
LLAMA3_SPLIT = (  # and cl100k's, Phi-4's
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = (LLAMA3_SPLIT, LLAMA3_SPLIT.replace("{1,3}", ""), O200K_SPLIT)  # the second: Qwen's
# Byte-level BPE writes each byte as one printable character: the visible ones of Latin-1 as they are.
spare = count(256)  # for the bytes of no visible character
BYTE_OF = {chr(b if b > 32 and chr(b).isprintable() else next(spare)): b for b in range(256)}


def steps_of(node, key):
    """A part of a tokenizer.json → its steps in order; those of a Sequence are listed under `key`."""
    return node.get(key, [node]) if node else []


def known_split(spec):
    """The pattern by which tiktoken cuts words as a tokenizer.json does. LookupError: it would not give the same ids;
    the file must be plain byte-level BPE, whose added tokens are cut out of a text as they are."""
    model = spec["model"]
    normalizers = [step["type"] for step in steps_of(spec.get("normalizer"), "normalizers")]
    *before, level = steps_of(spec.get("pre_tokenizer"), "pretokenizers") or [{}]
    odd = [model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")]
    odd += [model.get("type", "BPE") != "BPE", model.get("unk_token") and BYTE_OF.keys() - model["vocab"]]
    odd += [normalizers not in ([], ["NFC"]), level["type"] != "ByteLevel", level["add_prefix_space"]]
    for token in spec["added_tokens"]:
        odd += [token["single_word"], token["lstrip"], token["rstrip"], token["normalized"] and normalizers]
    if not any(odd):
        match before, level.get("use_regex", True):
            case [], True:
                return GPT2_SPLIT
            case [{"individual_digits": True}], True:
                return SMOLLM2_SPLIT
            case [{"pattern": {"Regex": pattern}, "behavior": way, "invert": inverted}], False:
                # the two ways are the same where all text matches
                if pattern in SPLITS and (way, inverted) in (("Isolated", False), ("Removed", True)):
                    return pattern
    raise LookupError


class ByteLevel:
    """A byte-level tokenizer.json run by tiktoken. The file lists pairs that merge; tiktoken merges any neighbours that
    are a token together. These are the same, since tiktoken is given only what the listed merges make of a token's own
    bytes, by the rank of the last merge: what happens within its borders does not depend on what is around. With
    ignore_merges tiktoken also takes whole words. Raises LookupError where merges could then come near them, and as
    `known_split` does."""

    def __init__(self, spec, added):
        model = spec["model"]
        vocab = model["vocab"]
        self.pattern = known_split(spec)
        rank_of = {}
        for rank, pair in enumerate(model["merges"]):
            if isinstance(pair, str):
                pair = pair.split(" ")
            rank_of[tuple(pair)] = rank
        order = dict.fromkeys(BYTE_OF, -1)
        for token in vocab:
            parts = list(token)  # of its characters, the pair of the lowest rank merges first
            last = -1
            while merges := [(rank_of[pair], at) for at, pair in enumerate(zip(parts, parts[1:])) if pair in rank_of]:
                last, at = min(merges)
                parts[at : at + 2] = [parts[at] + parts[at + 1]]
            if len(parts) == 1:
                order[token] = last
            elif model.get("ignore_merges"):
                order[token] = math.inf
                if len(parts) == 2:
                    raise LookupError
        tokens = sorted(order, key=order.get)
        numbers = {bytes(BYTE_OF[character] for character in token): n for n, token in enumerate(tokens)}
        self.encoding = tiktoken.Encoding("loopus", pat_str=self.pattern, mergeable_ranks=numbers, special_tokens={})
        self.ids = [vocab.get(token) for token in tokens]  # None: a byte that the vocabulary lacks
        self.composes = steps_of(spec.get("normalizer"), "normalizers")  # NFC, if any
        self.added = added
        self.vocab = vocab | added
        any_added = "|".join(map(re.escape, sorted(added, key=len, reverse=True)))  # the longest first
        self.split = re.compile(f"({any_added or '(?!)'})").split

    def encode(self, text, typed, first):
        if typed:
            return self.encode_words(text)
        ids = []
        for part in self.split(text):
            ids += [self.added[part]] if part in self.added else self.encode_words(part)
        return ids

    def encode_words(self, text):
        if self.composes:
            text = unicodedata.normalize("NFC", text)
        too_long = re.search(r"(?<!\s)\s{500000}", text)
        refuse(too_long, "a text has 500,000 white characters in a row, more than tiktoken can take")
        ids = [self.ids[n] for n in self.encoding.encode_ordinary(text)]
        if None in ids:  # such bytes are left out, and what is around them merges
            lacked = bytes(b for character, b in BYTE_OF.items() if character not in self.vocab)
            words = [word.encode().translate(None, lacked) for word in regex.findall(self.pattern, text)]
            ids = [self.ids[n] for word in filter(None, words) for n in self.encoding._encode_single_piece(word)]
        return ids


class Package:
    """Any other tokenizer.json, read by the tokenizers package. Raises InputError where that is missing."""

    def __init__(self, spec):
        with reading('this one needs the tokenizers package: pip install ".[tokenizers]"'):
            from tokenizers import Tokenizer as Reader
        special = [token | {"special": True} for token in spec["added_tokens"]]
        spec = json.dumps(spec | {"added_tokens": special, "truncation": None, "padding": None})
        self.readers = [Reader.from_str(spec), Reader.from_str(spec)]
        self.readers[True].encode_special_tokens = True  # of typed text: as plain text, that is
        self.vocab = self.readers[0].get_vocab()

    def encode(self, text, typed, first):
        for before in [""] if first else ["\n", ".", "a", ""]:  # one of them does not merge with the text
            head = self.ids(before, typed)
            whole = self.ids(before + text, typed)
            if whole[: len(head)] == head:
                return whole[len(head) :]

    def ids(self, text, typed):
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # half a pair is no character
        return self.readers[typed].encode(text, add_special_tokens=False).ids


class Tokenizer:
    """A tokenizer.json (its content is `spec`) with the configs and files beside it: text to ids and back, with the ids
    of the tokenizers library.

    n_vocab: 1 + the largest id; added: {content: id} of the added tokens; begin: ids before each text; end_of_text: id
    between documents, or None; ends: ids at which writing stops; prefix: id to put before a text where something must
    stand there, or None; template: the Template of its conversations, or None; stated_template: what the model itself
    states; files: {name: bytes} of TOKENIZER_FILES"""

    def __init__(self, spec, configs=({},), files=None):
        tokens = [ADDED | token for token in spec.get("added_tokens") or [] if token["content"]]
        self.spec = spec | {"added_tokens": tokens}
        self.files = files or {"tokenizer.json": json.dumps(spec, ensure_ascii=False).encode()}
        self.added = {token["content"]: token["id"] for token in tokens}
        try:
            self.model = ByteLevel(self.spec, self.added)
        except LookupError:
            self.model = Package(self.spec)
        self.content = {i: token for token, i in self.model.vocab.items()}
        self.n_vocab = 1 + max(self.content)
        self.begin = []
        for step in steps_of(spec.get("post_processor"), "processors"):
            for item in step.get("single", []):
                if "SpecialToken" not in item:
                    break
                self.begin += step["special_tokens"][item["SpecialToken"]["id"]]["ids"]
        self.puts_space = b"".join(map(self.token_bytes, self.encode("a"))) == b" a"
        ends = self.stated_ids("eos", configs) or [self.added[name] for name in ENDS if name in self.added][:1]
        self.ends = set(ends)
        self.end_of_text = next(iter(ends), None)
        alone = configs[:1] if configs[0] else configs  # as elsewhere, tokenizer_config.json tells how a text begins
        self.prefix = [*self.begin, *self.stated_ids("bos", alone), self.end_of_text][0]
        template = self.files.get("chat_template.jinja", b"").decode()
        self.stated_template = template or str(configs[0].get("chat_template") or "")
        self.template = find_template(self)

    def stated_ids(self, name, configs):
        """The known ids that tokenizer_config.json, generation_config.json and config.json state as eos or bos."""
        token = configs[0].get(f"{name}_token")
        if isinstance(token, dict):
            token = token["content"]
        ids = [self.model.vocab.get(token)]
        for config in configs[1:]:
            config = config.get("base_config_dict", config)  # of a looped checkpoint
            ids += listed(config.get(f"{name}_token_id"))
        return [i for i in ids if i in self.content]

    def encode(self, text, typed=False, first=True):
        """Text → ids. typed: somebody has typed it, so that special tokens such as <|im_end|> in it are plain text.
        first: it begins a document, where some tokenizers put a space in front."""
        return self.model.encode(text, typed, first)

    def start(self, text):
        """Text → ids with `begin` in front, which a text may also bring along itself; never without any."""
        return encode_document([Segment(text, True)], self, self.begin) or [self.prefix or 0]

    def token_bytes(self, i):
        """The bytes that an id stands for; b"" for ids of no token: a model may be padded to a round size."""
        token = self.content.get(i, "")
        if token in self.added:
            return token.encode()
        if "<0x00>" not in self.model.vocab and BYTE_OF.keys() >= set(token):
            return bytes(BYTE_OF[character] for character in token)
        if re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes.fromhex(token[3:5])
        return token.replace("▁", " ").encode()  # what sentencepiece writes for a space

    def decode(self, ids):
        text = b"".join(map(self.token_bytes, ids)).decode(errors="replace")
        return text.removeprefix(" ") if self.puts_space else text


# Names of the token between documents, for tokenizers without a config that tells it.
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<|im_end|>", "<｜end▁of▁sentence｜>", "<|eot_id|>")
ADDED = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)


def byte_tokenizer():
    """One token per byte, id = byte, and <|endoftext|> as 256: for models that are trained from nothing."""
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    model = dict(type="BPE", vocab=dict(BYTE_OF), merges=[])
    end = ADDED | dict(id=256, content="<|endoftext|>", special=True)
    return Tokenizer(dict(version="1.0", added_tokens=[end], pre_tokenizer=level, decoder=level, model=model))


def load_tokenizer(src, vocab_size=math.inf):
    """The tokenizer of a hub name or directory, by its tokenizer.json and the files beside it; None without the first.
    Added tokens beyond a model of vocab_size are left out, and a line says so. Raises InputError."""
    directory = resolve(src)
    names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json")
    spec, *configs = [read_json(directory / name) for name in names]
    if not spec:
        return None
    with reading(directory / "tokenizer.json and what is beside it"):
        tokens = {token["content"]: token for token in spec.get("added_tokens") or []}
        vocab = spec["model"]["vocab"]
        beside = configs[0].get("added_tokens_decoder") or {}
        for i in sorted(beside, key=int):  # what stands there alone gets the next free id, as in transformers
            content = beside[i]["content"]
            free = max([len(vocab), *(1 + token["id"] for token in tokens.values())])
            tokens.setdefault(content, beside[i] | {"id": vocab.get(content, free)})
        known = [token for token in tokens.values() if token["id"] < vocab_size]
        if len(known) < len(tokens):
            print(f"{directory}: the model lacks {len(tokens) - len(known)} of the added tokens", file=sys.stderr)
        files = {name: (directory / name).read_bytes() for name in TOKENIZER_FILES if (directory / name).exists()}
        tokenizer = Tokenizer(spec | {"added_tokens": known}, configs, files)
        found = f"it has {tokenizer.n_vocab} tokens, and the model {vocab_size}"
        refuse(tokenizer.n_vocab > vocab_size, f"{found}: is it another model's?")
        return tokenizer


# ---- Text: the records of a file → segments, learned or only read → ids → a memory-mapped array → rows
class Segment(NamedTuple):
    text: str  # a part of a document
    learned: bool  # or only read
    typed: bool = False  # special tokens in it are plain text


class Template(NamedTuple):
    """How a family of models writes the messages of a conversation."""

    opening: str  # before what somebody says; {role}: who it is
    end: str  # after it
    after: str  # between two messages

    def segments(self, role, content, learned):
        """A message; of a learned one, its content and its end are learned."""
        opening = Segment(self.opening.format(role=role), False)
        return [opening, Segment(content, learned, True), Segment(self.end, learned), Segment(self.after, False)]


CHATML = Template("<|im_start|>{role}\n", "<|im_end|>", "\n")  # SmolLM2, Qwen
TEMPLATES = (
    Template("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", ""),  # Llama 3
    Template("<|im_start|>{role}<|im_sep|>", "<|im_end|>", ""),  # Phi-4
    CHATML,
)


def find_template(tokenizer):
    """The first Template whose special tokens the tokenizer and, where the model states a template, this one has."""
    for template in TEMPLATES:
        written = "".join(template)
        stated = tokenizer.stated_template or written
        if all(token in tokenizer.added and token in stated for token in re.findall(r"<\|\w+\|>", written)):
            return template


RECORD_KEYS = ("messages", "prompt", "completion", "text")


def read_records(path):
    """The records of a file: the lines of .jsonl, those or the list of .json, the rows of .parquet; of another file
    {"text": its content}."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        with reading('reading parquet needs pyarrow: pip install ".[parquet]"'):
            from pyarrow.parquet import ParquetFile
        with ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in RECORD_KEYS]
            for batch in file.iter_batches(columns=columns or None):
                yield from batch.to_pylist()
    elif suffix in (".json", ".jsonl"):
        with open(path, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                with reading(f"line {number}"):
                    if line.lstrip().startswith("["):
                        yield from json.loads(line + lines.read())  # after which no line is left
                    elif line.strip():
                        yield json.loads(line)
    else:
        yield {"text": path.read_text(encoding="utf-8-sig")}


def segments_of(record, tokenizer):
    """The Segments of a record, none where its text is null. Raises InputError where it has none of these keys:

    "messages", each with a "role" and "content": written in the model's template, ChatML where it has none; learned is
    what the assistant says, unless its "weight" or "train" is 0 or false. "prompt" and "completion": only the
    completion is learned; either may be a list, whose strings then alternate. "text": all of it is learned."""
    messages, prompt, completion, text = map(record.get, RECORD_KEYS)
    segments = []
    if messages is not None:
        unknown = tokenizer.stated_template and not tokenizer.template
        refuse(unknown, "the model's chat template is none of ChatML, Llama 3's and Phi-4's: write it as text")
        template = tokenizer.template or CHATML
        for message in messages:
            learned = message["role"] == "assistant" and 0 not in (message.get("weight"), message.get("train"))
            segments += template.segments(message["role"], message["content"], learned)
    elif prompt is not None and completion is not None:
        prompts, completions = listed(prompt), listed(completion)
        refuse(len(prompts) != len(completions), f"{len(prompts)} prompts and {len(completions)} completions")
        for read, learned in zip(prompts, completions):
            segments += [Segment(read, False), Segment(learned, True)]
    elif text is not None:
        segments = [Segment(text, True)]
    else:
        known = {"text", "messages"} & record.keys()
        refuse(not known, f'has {", ".join(record)}: expected "text", "messages", or "prompt" and "completion"')
    refuse(not all(isinstance(segment.text, str) for segment in segments), "its text is not a string")
    return segments


def encode_document(segments, tokenizer, begin=(), end=()):
    """The ids of a document, as `rows` reads them: those that are only read and not learned as ~i. `begin` is put in
    front, unless the document begins so itself, and `end` after it."""
    ids = []
    for segment in segments:
        part = tokenizer.encode(segment.text, segment.typed, not ids)
        if not ids and part[: len(begin)] != begin:
            part = [*begin, *part]
        if segment is segments[-1]:
            part += end
        ids += part if segment.learned else [~i for i in part]
    return ids


def read_documents(files, tokenizer):
    """All documents of all files, each as its Segments."""
    for file in files:
        with reading(file):
            for number, record in enumerate(read_records(file), start=1):
                with reading(f"record {number}"):
                    yield segments_of(record, tokenizer)


def tokenise(files, tokenizer, path):
    """Write the ids of all files to `path` as int32, on all cores."""
    documents = read_documents(files, tokenizer)
    batches = iter(lambda: list(islice(documents, 64)), [])
    end = {tokenizer.end_of_text} - {None}
    encode = partial(encode_document, tokenizer=tokenizer, begin=tokenizer.begin, end=end)
    pool = ThreadPoolExecutor()
    size = sum(file.stat().st_size for file in files)
    with all_or_nothing(path.parent) as unfinished, open(unfinished / path.name, "wb") as out:
        for batch in progress(batches, "tokenising", size, lambda batch: sum(len(s.text) for d in batch for s in d)):
            for ids in pool.map(encode, batch):
                np.array(ids, np.int32).tofile(out)


def map_tokens(path, tokenizer):
    """The ids in a .npy file, or in a .bin without a header, uint16 where the vocabulary has at most 65,536, else
    uint32. Raises InputError unless they are this tokenizer's."""
    with reading(path):
        if path.suffix.lower() == ".npy":
            tokens = np.load(path, mmap_mode="r")
        else:
            tokens = np.memmap(path, np.uint16 if tokenizer.n_vocab <= 1 << 16 else np.uint32, "r")
            wider = len(tokens) > 3 and not tokens[1:4096:2].any()
            refuse(wider, f"every other id is 0: expected {tokens.dtype}; write wider integers with numpy.save")
        least, most = tokens.min(), tokens.max()
        fit = tokens.ndim == 1 and tokens.dtype.kind in "iu" and 0 <= least <= most < tokenizer.n_vocab
        found = f"it holds {tokens.dtype} of shape {tokens.shape}, from {least} to {most}"
        refuse(not fit, f"{found}: expected a list of ids below {tokenizer.n_vocab}, as the tokenizer has")
        return tokens


def load_tokens(files, tokenizer):
    """Files → one array of ids, as `rows` reads it. .bin and .npy hold ids; the records of other files are tokenised
    once, and kept in the cache. Raises InputError where nothing is to be learned."""
    refuse(tokenizer is None, "the model has no tokenizer.json: text cannot be read or written without one")
    hold_ids = [file.suffix.lower() in (".bin", ".npy") for file in files]
    if any(hold_ids):
        refuse(not all(hold_ids), f"{files[0].parent} has ids (.bin, .npy) and other files: name one kind by a glob")
        parts = [map_tokens(file, tokenizer) for file in files]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)
    stamp = [tokenizer.spec, tokenizer.begin, tokenizer.end_of_text, tokenizer.template]
    stamp += [(file.resolve(), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    path = cache_dir() / f"{hashlib.sha256(repr(stamp).encode()).hexdigest()}.int32"
    if not path.exists():
        tokenise(files, tokenizer, path)
    with reading(files[0]):
        tokens = np.memmap(path, np.int32, "r")  # ValueError: it is empty
        refuse(tokens.max() < 0, 'nothing is to be learned: give "text", or what an "assistant" says')
        return tokens


def find_files(data):
    """A file, a directory (all its files), a glob, or else "python": the source of its standard library → sorted paths.
    Hidden files and files of zero bytes are left out. Raises InputError where nothing remains."""
    path = expand(data)
    if data and path.is_dir():
        paths = [p for p in path.rglob("*") if "/." not in f"/{p.relative_to(path).as_posix()}"]
    elif path.exists():
        paths = [path]
    elif data == "python":
        paths = Path(os.__file__).parent.glob("*.py")
    else:
        paths = map(Path, glob.glob(str(path), recursive=True))
    files = sorted(path for path in paths if path.is_file() and path.stat().st_size > 0)
    refuse(not files, f"{data or 'no name'}: no file with text in it is there; expected a file, a directory, a glob")
    return files


def load_data(data, val, tokenizer):
    """→ (training, held-out tokens) of `data`, as `find_files` takes it or a list of files. Without `val` every 20th
    file is held out, or the last 20th of fewer files."""
    files = list(map(Path, data)) if isinstance(data, list) else find_files(data)
    if val:
        held_out = find_files(val)
    elif len(files) >= 20:
        held_out = files[::20]
        del files[::20]
    else:
        tokens = load_tokens(files, tokenizer)
        end = len(tokens) - len(tokens) // 20
        return tokens[:end], tokens[end:]
    return load_tokens(files, tokenizer), load_tokens(held_out, tokenizer)


def rows(tokens, starts, context):
    """Inputs and next tokens as targets, (n, context) each, of the windows of `tokens` that begin at `starts`. A token
    i that is to be read and not learned stands in `tokens` as ~i; as a target it is −100."""
    windows = [tokens[start : start + context + 1] for start in starts]
    ids = torch.from_numpy(np.array(windows, np.int64))
    inputs = torch.maximum(ids, ~ids)
    targets = ids.masked_fill(ids < 0, -100)
    return inputs[:, :-1], targets[:, 1:]


def windows(tokens, context, limit):
    """At most `limit` held-out tokens as evenly spread `rows`. Raises InputError for too few, or none learned."""
    count = (len(tokens) - 1) // context
    refuse(count < 1, f"{len(tokens)} tokens of held-out text do not fill one context of {context}: give more text")
    wanted = max(1, min(count, limit // context))
    starts = np.linspace(0, count - 1, wanted, dtype=int) * context
    inputs, targets = rows(tokens, starts, context)
    refuse(targets.max() < 0, f"nothing is to be learned in {targets.numel()} held-out tokens: read more or other text")
    return inputs, targets


# ---- Where to cut, §3.1 and Fig. 1
PAPER_CUTS = {  # Fig. 16, 17: (layers, width) of the model → (encoder layers, decoder layers)
    (28, 2048): (2, 1),  # Qwen3-1.7B
    (36, 2560): (2, 1),  # Qwen3-4B
    (36, 4096): (6, 1),  # Qwen3-8B
    (40, 5120): (6, 1),  # Phi-4
    (22, 2048): (1, 1),  # TinyLlama
}


def sample_text(model, tokenizer):
    """Tokens (1, T) to look at a model with: this project's own words or, without a tokenizer, arbitrary tokens."""
    ids = tokenizer.encode(loopus.__doc__) if tokenizer else range(model.config.vocab_size)
    ids = ids[: min(256, model.config.block_size)]
    return torch.tensor([ids], device=model.device)


@torch.no_grad()
def layer_distances(model, idx):
    """1 − cos of the states entering and leaving each layer, mean over the tokens idx (B, T): (n_layer,)."""
    at = model.positions([0], idx.size(1))
    h = model.wte(idx).float()
    if model.config.rotary is None:
        h = h + model.wpe(at.position)
    distances = []
    for block in model.layers():
        after = copy.deepcopy(block).float()(h, at)  # a checkpoint may store tensors of several dtypes
        distances.append(1 - torch.cosine_similarity(h, after, dim=-1).mean())
        h = after
    return torch.stack(distances).cpu()


def choose_cuts(distances):
    """The rule: loop the plateau, the longest run of layers that each change the state less than twice what the median
    layer does; never the first and the last, as in the paper. → layers before it (encoder), after it (decoder)."""
    last = len(distances) - 1
    steep = np.flatnonzero(distances >= 2 * distances.median()).tolist()
    borders = sorted([0, last, *steep])
    widest = np.argmax(np.diff(borders))
    return borders[widest] + 1, last + 1 - borders[widest + 1]


def cut(model, encoder, decoder):
    """Move the borders between encoder, reasoning block and decoder, in place."""
    model.config = replace(model.config, encoder_layers=encoder, decoder_layers=decoder)
    layers = model.layers()
    end = len(layers) - decoder
    model.encoder, model.reasoning, model.decoder = layers[:encoder], layers[encoder:end], layers[end:]


# ---- The command line, the same for all programs
def flag(default, help, least=None, choices=None):
    """A setting, its help text and the values it may have: the fields of a dataclass become flags in `parse`."""
    return field(default=default, metadata={"help": help, "least": least, "choices": choices})


def one_line(message):
    return " ".join(str(message).split())


def parse(settings, *positional):
    """The command line as {field: value} of the dataclass `settings`, given ones only."""
    parser = ArgumentParser(description=settings.__doc__, allow_abbrev=False, argument_default=SUPPRESS)
    parser.error = lambda message: refuse(True, f"{message}; --help lists all flags")
    for setting in fields(settings):
        help, _, choices = setting.metadata.values()
        add = partial(parser.add_argument, help=f"{help} (default {setting.default!r})".replace("%", "%%"))
        if setting.name in positional:
            add(setting.name, nargs="?")
        elif setting.type is bool:
            add(f"--{setting.name}", action=BooleanOptionalAction)
        else:
            add(f"--{setting.name}", type=setting.type, choices=choices)
    given = vars(parser.parse_args())
    for setting in fields(settings):
        least = setting.metadata["least"]
        value = given.get(setting.name, least)
        out_of_range = least is not None and not least <= value < 1 << 31
        refuse(out_of_range, f"--{setting.name}={value}: expected at least {least}, and less than 2^31")
    return given


def run(main):
    """Call main(); what the user can mend, and Ctrl-C, end it with one line and a non-zero exit code."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="replace")  # for what the terminal's encoding lacks
    try:
        main()
    except BrokenPipeError:
        os._exit(1)  # whoever read the output, such as `head`, has left
    except (InputError, OSError, UnicodeError) as e:
        sys.exit(f"error: {one_line(e)}")
    except (MemoryError, RuntimeError) as e:  # torch.OutOfMemoryError comes from a GPU, a plain one from the CPU
        if not re.search("MemoryError|not enough memory|can't allocate memory", repr(e)):
            raise
        sys.exit("error: out of memory: turn down --batch or --context, or turn on train.py's --checkpointing")
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        os._exit(1)  # without waiting for what other threads still do


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def pick_device(name, dtype):
    """→ device and dtype of --device and --dtype; where empty, the best device, and bf16 if it is good at that."""
    best = torch.accelerator.is_available() and torch.accelerator.current_accelerator()
    with reading(f"--device={name}"):
        device = torch.empty(0, device=name or best or "cpu").device
    native_bf16 = device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    if device.type == "cuda":
        torch.cuda.set_device(device)  # graphs, memory and waiting are those of the current one
        native_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return device, DTYPES[dtype or ("bf16" if native_bf16 else "fp32")]


def progress(items, what, total, size=lambda item: 1):
    """The items, while a line on a terminal says how much of `total` is done and how long the rest will take."""
    if not sys.stderr.isatty():
        return (yield from items)
    begun = time.time()
    done = 0
    for item in items:
        yield item
        done += size(item)
        share = min(1, max(1, done) / max(1, total))
        left = (time.time() - begun) * (1 / share - 1) / 60
        print(f"\r\x1b[K{what}: {share:.0%}, {left:.1f} minutes left\r", end="", file=sys.stderr)
    print("\r\x1b[K", end="", file=sys.stderr)


@dataclass
class Inference:
    """The settings that sample.py and eval.py share."""

    init: str = flag("", "model: directory or hub name; empty: the newest checkpoint below ./out")
    max_loops: int = flag(8, "most passes per token; 8 is the paper's budget, 0 the pretrained model", 0)
    halt: str = flag("threshold", "the rule to stop a token by: or convergence, cdf", None, RULES)
    threshold: float = flag(None, "confidence at which a token stops; above 1: never; empty: what suits the model")
    epsilon: float = flag(1.0, "for convergence: length of a step at which it stops (paper: 0.1 … 100)", 0)
    min_loops: int = flag(1, "fewest passes per token", 1)
    device: str = flag("", "cpu, cuda or mps; empty: the best there is")
    dtype: str = flag("", "empty: bf16 where the device is good at it", None, DTYPES)

    def rule(self):
        return Halt(self.halt, self.threshold, self.epsilon, self.min_loops)

    def load(self, directory):
        """→ the model and the tokenizer of a directory, to read and write text with; and fill in the threshold."""
        model, tokenizer = load(directory, *pick_device(self.device, self.dtype))
        refuse(tokenizer is None, f"{directory} has no tokenizer.json: text cannot be read or written without one")
        if self.max_loops > 0 and not model.q_head[1].weight.any():
            print(f"{directory}: its loop was never trained; --max_loops=0 runs it unlooped", file=sys.stderr)
        if self.threshold is None:
            self.threshold = model.config.q_threshold
            if self.threshold != Config.q_threshold:
                print(f"--threshold={self.threshold}, as the model was trained", file=sys.stderr)
        return model, tokenizer


# ---- convert.py itself
@dataclass
class Settings:
    """Write a pretrained model as a LoopUS checkpoint, or with --profile show where it would be cut."""

    src: str = flag("", "hub name or directory of the model")
    out: str = flag("", "directory to write")
    format: str = flag("authors", "looped, as its authors have it; hf: unlooped, for any tool", None, ("authors", "hf"))
    profile: bool = flag(False, "show how much each layer changes the state, and the cuts")
    encoder_layers: int = flag(-1, "layers before the loop; -1: as it is cut, by the paper, or by its layer profile")
    decoder_layers: int = flag(-1, "layers after the loop; -1: likewise")


def main():
    s = Settings(**parse(Settings, "src", "out"))
    refuse(not s.src or not (s.out or s.profile), "expected: convert.py SRC OUT, or convert.py SRC --profile")
    model, tokenizer = load(s.src, "cpu", None, s.encoder_layers, s.decoder_layers)
    if s.out:
        save(model, tokenizer, s.out, s.format)
        print(f"{s.out}: {len(model.encoder)} + {len(model.reasoning)} + {len(model.decoder)} layers")
    if s.profile:
        distances = layer_distances(model, sample_text(model, tokenizer))
        print("1 − cos between the states that enter and leave each layer")
        for layer, distance in enumerate(distances / distances.max()):
            print(f"layer {layer:>2}  {distances[layer]:6.3f}  {'█' * round(50 * distance.item())}")
        encoder, decoder = choose_cuts(distances)
        print(f"by the rule: encoder {encoder}, decoder {decoder}; taken: {len(model.encoder)}, {len(model.decoder)}")


if __name__ == "__main__":
    run(main)
