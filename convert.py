"""
Everything between a model and the world: checkpoints, the hub, tokenizers, text, where to cut, the command line.

    python convert.py SRC OUT          write SRC as a LoopUS checkpoint, or with --format=hf as an unlooped model
    python convert.py SRC --profile    show how much each layer changes the state, and where that cuts the model
"""

import copy
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
import urllib.error
import urllib.parse
import urllib.request
from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache, partial, reduce
from itertools import islice, takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from loopus import RULES, Config, Halt, InputError, LoopUS, Positions, attend


# ---- Families of models and their config.json
@dataclass(frozen=True)
class Family:
    """How the checkpoints of one family of models spell what we call by our own names."""

    keys: dict  # field of our Config → its key in config.json
    constants: dict  # fields of our Config that are the same in the whole family
    supported: dict  # key in config.json → the values of it that we can run; without it the first one holds
    layer: str  # prefix of a layer's tensors: {i} counts over the whole model, {j} within its {stack}
    modules: dict  # module of ours → modules there; the rows of several lie one below the other in ours
    sliding_window: int | None = None  # where config.json has no such key
    transposed: bool = False  # the matrices of layers are stored as (inputs, outputs)
    looped: bool = False  # checkpoints have the gate and the confidence head, too


# fmt: off
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
        wte=["transformer.wte"], wpe=["transformer.wpe"], norm=["transformer.ln_f"], lm_head=["lm_head"],
        ln_1=["ln_1"], qkv=["attn.c_attn"], out=["attn.c_proj"], ln_2=["ln_2"], up=["mlp.c_fc"], down=["mlp.c_proj"],
    ),
    transposed=True,
)
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
        wte=["model.embed_tokens"], norm=["model.norm"], lm_head=["lm_head"],
        ln_1=["input_layernorm"], qkv=["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        q_norm=["self_attn.q_norm"], k_norm=["self_attn.k_norm"], out=["self_attn.o_proj"],
        ln_2=["post_attention_layernorm"], up=["mlp.gate_proj", "mlp.up_proj"], down=["mlp.down_proj"],
    ),
)
# fmt: on
QWEN = replace(LLAMA, supported=LLAMA.supported | dict(use_sliding_window=[False, True]))  # none where it says nothing
FAMILIES = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": replace(LLAMA, sliding_window=4096),
    "qwen2": replace(QWEN, constants=QWEN.constants | dict(qkv_bias=True, out_bias=False)),
    "qwen3": replace(QWEN, constants=QWEN.constants | dict(qk_norm=True)),
    "phi3": replace(
        LLAMA,
        supported={key: values for key, values in LLAMA.supported.items() if key != "partial_rotary_factor"},
        modules=LLAMA.modules | dict(qkv=["self_attn.qkv_proj"], up=["mlp.gate_up_proj"]),
    ),
}
# The LoopUS authors' checkpoints: within a layer the family's own names, and these outside. wpe is our addition.
LOOPED_LAYER = "{stack}.layers.{j}."
# fmt: off
LOOPED_MODULES = {
    "wte": ["encoder.embed_tokens"], "wpe": ["encoder.embed_positions"],
    "gate": ["reasoning.gate"], "gate.down": ["reasoning.gate.dt_input_proj"], "gate.up": ["reasoning.gate.delta_proj"],
    "norm": ["decoder.norm"], "lm_head": ["decoder.lm_head"], "q_head.0": ["q_head.0"], "q_head.1": ["q_head.1"],
}
# fmt: on
# What the authors' code reads at inference, for models that they have not written.
LOOPED_DEFAULTS = dict(N=8, q_threshold=0.6, q_eval_interval=1, halting_strategy="threshold", convergence_epsilon=0.01)
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # of old checkpoints; they hold no weights
STEP = "step-" + "[0-9]" * 7  # a finished checkpoint of a training run; one being written has more to its name


def looped(family):
    """The same family as the LoopUS authors store it."""
    return replace(family, layer=LOOPED_LAYER, modules=family.modules | LOOPED_MODULES, looped=True)


def expect(fits, where, name, value, expected):
    """Raise InputError unless `fits`: the field `name` of the file `where` is this value, not what is expected."""
    if not fits:
        raise InputError(f"{where}: {name} is {json.dumps(value, default=str)[:60]}, expected {expected}")


def check_supported(where, name, value, choices):
    """Raise InputError unless `value`, the field `name` of the file `where`, is one of `choices`."""
    if value not in choices:
        expected = " or ".join(map(json.dumps, choices))
        raise InputError(f"{where}: {name} {json.dumps(value)[:60]} is not supported; expected {expected}")


def read_json(path):
    """The object in a JSON file. Raises InputError where the file is damaged or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path} is damaged ({e!s:.80}): expected JSON; fetch or write it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a JSON {type(value).__name__}, expected an object: is it the right file?")
    return value


def write_json(path, value, indent=2):
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def read_config(path, overrides):
    """config.json → (Family, Config, is the output projection tied to the embedding). An unlooped model is not cut yet.
    Raises InputError for what we cannot run."""
    raw = read_json(path)
    if raw.get("model_type") == "lds":
        family, values = read_looped(raw, path)
        tied = False
    else:
        family, values = read_family(raw, path)
        values |= {"encoder_layers": 0, "decoder_layers": 0}
        tied = value_or_default(raw, family, "tie_word_embeddings")
    return family, Config(**values | overrides), tied


def read_looped(raw, path):
    """The config of the authors' checkpoints → (Family, fields of our Config)."""
    base = raw.get("base_config_dict")
    expect(isinstance(base, dict), path, "base_config_dict", base, "the config of the pretrained model")
    family, values = read_family(base, path)
    layers = []
    for stack in ("encoder", "reasoning", "decoder"):
        key = f"{stack}_layer_indices"
        expect(isinstance(raw.get(key), list), path, key, raw.get(key), "a list of layers")
        layers += raw[key]
    n_layer = values["n_layer"]
    fits = len(layers) == n_layer and layers == list(range(n_layer))
    expect(fits, path, "the list of all layers", layers, f"{n_layer} in their order")
    values["encoder_layers"] = len(raw["encoder_layer_indices"])
    values["decoder_layers"] = len(raw["decoder_layer_indices"])
    values["gate_start"] = str(raw.get("gate_start", "0.5"))
    values["base"] = raw
    return looped(family), values


REQUIRED = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "norm_eps")  # fields that no default stands for
TYPES = {f.name: f.type for f in fields(Config)}


def read_family(base, path):
    """The config of an unlooped model → (Family, fields of our Config)."""
    check_supported(path, "model_type", base.get("model_type"), ["lds", *FAMILIES])
    family = FAMILIES[base["model_type"]]
    rope = read_rope(base, path)
    raw = base | rope
    quantization = raw.get("quantization_config")
    expect(not quantization, path, "quantization_config", quantization, "none: quantized weights are not supported")
    for key, choices in family.supported.items():
        check_supported(path, key, value_or_default(raw, family, key), choices)
    values = dict(family.constants)
    for name, key in family.keys.items():
        if name not in values and raw.get(key) is not None:
            values[name] = read_value(raw, key, TYPES[name], path)
        expect(name in values or name not in REQUIRED, path, key, None, "a value: is it the config of a model?")
    values.setdefault("n_kv_head", values["n_head"])
    values.setdefault("head_dim", values["n_embd"] // values["n_head"])
    values.setdefault("n_inner", 4 * values["n_embd"])
    heads_fit = values["n_head"] % values["n_kv_head"] == 0
    expect(heads_fit, path, "the number of attention heads", values["n_head"], f"multiples of {values['n_kv_head']}")
    expect(values["head_dim"] <= 1 << 16, path, "the size of a head", values["head_dim"], "a size of some model")
    check_window(family, raw, values["block_size"], path)
    if "rotary" not in values:
        values["rotary"] = rotary_angles(base, rope, values["head_dim"], values["block_size"], path)
    values["base"] = base
    return family, values


def read_value(raw, key, kind, path):
    """raw[key] as that type: int, float or bool. Raises InputError where it is of another one, or not positive."""
    value = raw[key]
    if isinstance(value, bool):
        fits = kind is bool
    elif isinstance(value, (int, float)) and kind is not bool:
        fits = 0 < value < 1 << 31 and kind(value) == value  # 2.0 is whole
    else:
        fits = False
    expected = {int: "a positive whole number", float: "a positive number", bool: "true or false"}
    expect(fits, path, key, value, expected[kind])
    return kind(value)


def value_or_default(raw, family, key):
    """What a config says or, where it says nothing or null, means."""
    if raw.get(key) is None:
        return family.supported.get(key, [None])[0]
    return raw[key]


def without_null(settings):
    return {key: value for key, value in settings.items() if value is not None}


def read_rope(base, path):
    """What a config says of rotary positions as {key: value}: in rope_scaling, the older spelling, or rope_parameters.
    Raises InputError where the two contradict each other, or differ between kinds of layers."""
    readings = []
    for key in ("rope_scaling", "rope_parameters"):
        settings = base.get(key) or {}
        expect(isinstance(settings, dict), path, key, settings, "an object or null")
        one_for_all = not any(isinstance(value, dict) for value in settings.values())
        expect(one_for_all, path, key, settings, "one setting for all layers: others are not supported")
        if settings:
            settings = without_null(settings)
            older_name = settings.pop("type", "default")
            readings.append({"rope_theta": base.get("rope_theta"), "rope_type": older_name} | settings)
    agree = readings[1:] in ([], readings[:1])
    expect(agree, path, "rope_parameters", readings[1:], "what rope_scaling says: delete one of them")
    return readings[0] if readings else {}


def rotary_angles(base, rope, head_dim, context, path="config.json"):
    """By what angle one position turns each pair of a head's channels. Llama 3 stretches wavelengths over original /
    low_freq_factor by `factor`, none under original / high_freq_factor, and those between smoothly."""
    raw = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0} | without_null(base) | without_null(rope)
    theta = read_value(raw, "rope_theta", float, path)
    channels = int(head_dim * read_value(raw, "partial_rotary_factor", float, path))
    fits = channels % 2 == 0 and 0 < channels <= head_dim
    expect(fits, path, f"the number of rotated channels of {head_dim} per head", channels, "pairs")
    angle = theta ** -(torch.arange(0, channels, 2).float() / channels)
    if rope.get("rope_type") == "llama3":
        rope = {"original_max_position_embeddings": context} | rope
        values = {}
        for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
            expect(key in rope, path, key, None, "a value where rope_type is llama3: is the file intact?")
            values[key] = read_value(rope, key, float, path)
        low = values["low_freq_factor"]
        high = values["high_freq_factor"]
        expect(low < high, path, "low_freq_factor", low, f"less than high_freq_factor, {high}")
        turns = values["original_max_position_embeddings"] * angle / (2 * torch.pi)  # within the original context
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        angle = angle * (kept + (1 - kept) / values["factor"])
    return angle.tolist()


def check_window(family, raw, context, path):
    """Raise InputError where some layer does not attend to all earlier tokens of a context."""
    if not value_or_default(raw, family, "use_sliding_window"):
        return
    window = context
    if raw.get("sliding_window", family.sliding_window):
        window = read_value({"sliding_window": family.sliding_window} | raw, "sliding_window", int, path)
    kinds = raw.get("layer_types") or []
    full = isinstance(kinds, list) and kinds.count("full_attention") == len(kinds)
    if window < context or not full:
        raise InputError(f"{path}: its sliding window is not supported; expected attention to all earlier tokens")


def config_to_write(config, format, dtype):
    """Our Config → (Family, config.json) of a checkpoint in that format, with weights of that dtype."""
    if not config.base:
        raise InputError("only a model that was loaded by convert.load can be written")
    looped_config = {}
    base = config.base
    if base["model_type"] == "lds":
        looped_config = config.base
        base = config.base["base_config_dict"]
    dtype_key = "dtype" if "dtype" in base else "torch_dtype"  # since transformers 5, and before
    # not tied: the output projection trains, the embedding does not
    base = base | {dtype_key: str(dtype).removeprefix("torch."), "tie_word_embeddings": False}
    family = FAMILIES[base["model_type"]]
    if format == "hf":
        return family, base
    layers = list(range(config.n_layer))
    end = config.n_layer - config.decoder_layers
    ours = {
        "model_type": "lds",
        "base_config_dict": base,
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "encoder_layer_indices": layers[: config.encoder_layers],
        "reasoning_layer_indices": layers[config.encoder_layers : end],
        "decoder_layer_indices": layers[end:],
        "gate_start": config.gate_start,
    }
    return looped(family), LOOPED_DEFAULTS | looped_config | ours


# ---- Checkpoints
def load(src, device="cpu", dtype=torch.float32, **overrides):
    """→ (model in eval mode, tokenizer or None) from `src`, a hub name or a directory.

    dtype None: each tensor as it is stored. `overrides` are fields of Config (encoder_layers=2); −1 and "" mean not
    given. A model that was never looped is cut by `default_cuts`. Raises InputError for what is missing, misshapen or
    unsupported."""
    given = {name: value for name, value in overrides.items() if value not in (-1, "")}
    start = given.get("gate_start", "0.5")
    if start != "s4d" and not re.fullmatch(r"0?\.0*[1-9]\d*", start):
        raise InputError(f"gate_start is {start}: give a number between 0 and 1 (the first α), or s4d")
    encoder = given.pop("encoder_layers", None)
    decoder = given.pop("decoder_layers", None)
    directory = resolve(src)
    family, config, tied = read_config(directory / "config.json", given)
    tokenizer = load_tokenizer(directory)
    model = read_model(directory, family, config, tied, device, dtype).eval()
    if tokenizer and tokenizer.n_vocab > config.vocab_size:
        tokenizer = without_added_tokens(tokenizer, config.vocab_size, directory)
    cuts = config.encoder_layers, config.decoder_layers
    if not family.looped and None in (encoder, decoder):
        cuts = default_cuts(model, tokenizer)
    if encoder is None:
        encoder = cuts[0]
    if decoder is None:
        decoder = cuts[1]
    cut(model, encoder, decoder)
    return model, tokenizer


def without_added_tokens(tokenizer, vocab_size, directory):
    """The tokenizer without added tokens that the model lacks, such as a padding token, and a line that says so. Raises
    InputError where more is beyond the model than these."""
    known = [token for token in tokenizer.spec["added_tokens"] if token["id"] < vocab_size]
    reduced = Tokenizer(tokenizer.spec | {"added_tokens": known}, directory / "tokenizer.json")
    if reduced.n_vocab > vocab_size:
        raise InputError(f"{directory}: a tokenizer of {reduced.n_vocab} and a model of {vocab_size} tokens")
    names = ", ".join(sorted(tokenizer.added.keys() - reduced.added.keys())[:5])
    print(f"{directory}: the model lacks the added tokens {names}: they are read as plain text", file=sys.stderr)
    reduced.ends = {i for i in tokenizer.ends if i < vocab_size}
    if tokenizer.end_of_text in reduced.ends:
        reduced.end_of_text = tokenizer.end_of_text
    if tokenizer.prefix is not None and tokenizer.prefix < vocab_size:
        reduced.prefix = tokenizer.prefix
    return reduced


class Stored(NamedTuple):
    """How a checkpoint keeps one parameter of ours."""

    names: list  # its tensors there, whose rows lie one below the other in ours
    rows: list  # how many rows each of them has
    transposed: bool  # they are stored as (inputs, outputs)


def stored_as(model, family):
    """{name of a parameter of ours: Stored} for all that the checkpoints of a family hold."""
    config = model.config
    # the layer of the whole model that each stack begins with
    first = {"encoder": 0, "reasoning": config.encoder_layers, "decoder": config.n_layer - config.decoder_layers}
    stored = {}
    for name, parameter in model.named_parameters():
        module, leaf = name.rsplit(".", 1)
        prefix = ""
        stack = name.split(".")[0]
        if stack in first:  # encoder.3.qkv.weight, say
            _, j, module = module.split(".")
            prefix = family.layer.format(stack=stack, j=j, i=first[stack] + int(j))
        if module in family.modules:
            names = [f"{prefix}{stored_module}.{leaf}" for stored_module in family.modules[module]]
            rows = [len(parameter) // len(names)] * len(names)
            if len(names) == 3:
                keys = config.n_kv_head * config.head_dim
                rows = [len(parameter) - 2 * keys, keys, keys]  # queries, keys and values
            stored[name] = Stored(names, rows, family.transposed and prefix != "" and parameter.dim() == 2)
    return stored


def read_model(directory, family, config, tied, device, dtype):
    """The model of `config` with the weights of a directory, each tensor copied from the mapped file once."""
    files = tensor_files(directory)
    if config.n_layer > len(files):
        raise InputError(f"{directory}: its config.json has {config.n_layer} layers, its weights {len(files)} tensors")
    try:
        with torch.device("meta"):
            model = LoopUS(config)
    except RuntimeError as e:
        raise InputError(f"{directory}: its config.json has sizes of no model ({e!s:.80}): is it intact?") from None
    stored = stored_as(model, family)
    if tied and "lm_head.weight" not in files:
        stored["lm_head.weight"] = stored["wte.weight"]
    wanted = [bare(tensor_name) for parameter in stored.values() for tensor_name in parameter.names]
    problems = [f"{name} is missing" for name in wanted if name not in files]
    problems += [f"{name} is unknown" for name in sorted(files.keys() - set(wanted))]
    if problems:
        raise InputError(f"the weights in {directory} disagree with its config.json: {', '.join(problems[:3])}")
    state = {}
    for count, (name, parameter) in enumerate(model.named_parameters()):
        if count % 8 == 0:
            open_files = {}  # path → open file; what was read of a file stays in memory until it is closed
        if name in stored:
            state[name] = read_parameter(stored[name], parameter.shape, files, open_files, device, dtype)
        else:  # the gate and the confidence head, where the model was never looped
            state[name] = torch.empty(parameter.shape, device=device, dtype=dtype or state["wte.weight"].dtype)
    model.load_state_dict(state, assign=True)
    if not family.looped:
        model.reset_new_parameters()
    return model


def read_parameter(stored, shape, files, open_files, device, dtype):
    """Put a parameter of that shape together from its tensors. Raises InputError where they are of other shapes."""
    parts = []
    for name, rows in zip(stored.names, stored.rows):
        path, full_name = files[bare(name)]
        if path not in open_files:
            open_files[path] = safe_open(path, "pt")
        part = open_files[path].get_tensor(full_name)
        if stored.transposed:
            part = part.mT
        expected = [rows, *shape[1:]]
        if list(part.shape) != expected:
            problem = f"{bare(name)} shaped {list(part.shape)} instead of {expected}"
            raise InputError(f"the weights in {path.parent} disagree with its config.json: {problem}")
        parts.append(part)
    dtype = dtype or reduce(torch.promote_types, [part.dtype for part in parts])
    parameter = torch.empty(shape, device=device, dtype=dtype)
    for rows, part in zip(parameter.split(stored.rows), parts):
        rows.copy_(part)
    return parameter


def bare(name):
    """A tensor's name without the prefixes that some checkpoints write and others do not; plateau is an old name."""
    name = re.sub(r"(^|\.)module\.", r"\1", name).replace("plateau.", "reasoning.")
    return re.sub(r"^(transformer|model)\.", "", name)


def shards(directory):
    """The weight files of a checkpoint. They lie beside the index, whatever path it states."""
    whole = directory / "model.safetensors"
    index = directory / "model.safetensors.index.json"
    if whole.exists() or not index.exists():
        return [whole]
    names = read_json(index).get("weight_map")
    fits = isinstance(names, dict) and all(isinstance(name, str) for name in names.values())
    expect(fits, index, "weight_map", names, "tensors and their files: fetch or write it again")
    return sorted({directory / Path(name).name for name in names.values()})


def tensor_files(directory):
    """{bare name: (file, name in it)} of a checkpoint's weights. Raises InputError for files that are not whole."""
    files = {}
    for path in shards(directory):
        if not path.exists():
            raise InputError(f"{path} is missing: expected safetensors (pickled .bin files can run code: not read)")
        try:
            with safe_open(path, "pt") as file:
                types = {name: file.get_slice(name).get_dtype() for name in file.keys() if not name.endswith(BUFFERS)}
        except (SafetensorError, OSError) as e:
            raise InputError(f"{path} is damaged ({e}): fetch or write it again") from None
        for name, kind in types.items():
            if kind not in ("F16", "BF16", "F32", "F64"):
                raise InputError(f"{path}: {name} holds {kind}: quantized weights are not supported, only floats")
            files[bare(name)] = (path, name)
    return files


def save(model, tokenizer, out_dir, format="authors", weights=None):
    """Write a checkpoint, all of it or nothing: `write_checkpoint` into the directory out_dir. Raises InputError."""
    with all_or_nothing(out_dir) as unfinished:
        write_checkpoint(model, tokenizer, unfinished, format, weights)


WRITTEN = [  # by a training run
    "config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "optimizer.pt", "settings.json"
]  # fmt: skip


def remove_checkpoint(directory):
    """Delete the files that a training run wrote into a directory, and the directory if it holds nothing else."""
    for name in WRITTEN:
        (directory / name).unlink(missing_ok=True)
    if not any(directory.iterdir()):
        directory.rmdir()


@contextmanager
def all_or_nothing(out_dir):
    """A new directory to write into. At the end of the `with` block its files take their place in out_dir, beside those
    of other names; after an exception nothing there has changed. Raises InputError where writing fails."""
    target = expand(out_dir).resolve()
    unfinished = target.parent / f"{target.name}.new-{os.urandom(4).hex()}"
    if target.exists():  # within it, since beside it may lie another disk
        unfinished = target / f".new-{os.urandom(4).hex()}"
    try:
        unfinished.mkdir(parents=True)
    except OSError as e:
        raise InputError(f"cannot write {out_dir} ({e.strerror}): name another directory") from None
    try:
        yield unfinished
        if not target.exists():
            unfinished.rename(target)
            return
        for file in unfinished.iterdir():
            if (target / file.name).is_dir():
                raise IsADirectoryError(f"{file.name} there is a directory")
        for file in unfinished.iterdir():
            file.replace(target / file.name)
    except (OSError, SafetensorError, RuntimeError) as e:
        raise InputError(f"cannot write {out_dir} ({e}): make room there; what it held is untouched") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_checkpoint(model, tokenizer, directory, format="authors", weights=None):
    """Write config.json, model.safetensors and tokenizer.json. format "authors": looped, as the LoopUS authors have it;
    "hf": encoder, reasoning block and decoder as one unlooped model, as on the hub. `weights` {name: tensor} stand in
    for the model's own, where each process holds a share of these."""
    weights = weights or model.state_dict()
    family, config = config_to_write(model.config, format, model.lm_head.weight.dtype)
    tensors = {}
    for name, stored in stored_as(model, family).items():
        for tensor_name, part in zip(stored.names, weights[name].split(stored.rows)):
            if stored.transposed:
                part = part.T
            tensors[tensor_name] = part.contiguous()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    write_json(directory / "config.json", config)
    if tokenizer:
        write_json(directory / "tokenizer.json", tokenizer.spec, indent=None)
        between = {tokenizer.end_of_text} - {None}
        ends = [*between, *sorted(tokenizer.ends - between)]
        write_json(directory / "generation_config.json", {"eos_token_id": ends, "bos_token_id": tokenizer.prefix})


# ---- The hub
def expand(path):
    """The path, with a ~ at its beginning as the user's home. (Path.expanduser fails for users that there are not.)"""
    return Path(os.path.expanduser(path))


def from_environment(*names):
    """The value of the first of these variables that has one, or ""."""
    return next(filter(None, map(os.environ.get, names)), "")


def user_cache():
    return expand(from_environment("XDG_CACHE_HOME") or "~/.cache")


def cache_dir():
    """Where downloads and tokenised texts are kept: LOOPUS_CACHE, or loopus in the user's cache directory."""
    path = expand(from_environment("LOOPUS_CACHE") or user_cache() / "loopus")
    path.mkdir(parents=True, exist_ok=True)
    return path


def remember(directory):
    """Have sample.py and eval.py take the model in this directory where no --init is given."""
    (cache_dir() / "last").write_text(str(directory.resolve()), encoding="utf-8")


def resolve(src):
    """`src` → the directory of its checkpoint: itself, a run's newest step, a download; "": the last of train.py."""
    path = expand(src)
    last = cache_dir() / "last"
    if not src:
        if not last.exists():
            raise InputError("no --init, and train.py has written no model yet: run python train.py, or name a model")
        path = Path(last.read_text(encoding="utf-8"))
        if not path.exists():
            raise InputError(f"no --init, and {path}, which train.py wrote last, is gone: name a model with --init")
    newest_first = sorted(path.glob(f"{STEP}/config.json"), reverse=True)
    for config in [path / "config.json", *newest_first]:
        if config.exists():
            return config.parent
    if path.is_file():
        raise InputError(f"{path} is a file: name the directory it is in, with its config.json")
    name, _, revision = str(src).partition("@")
    if re.fullmatch("gpt2(-medium|-large|-xl)?", name):
        name = f"openai-community/{name}"
    if path.exists() or not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise InputError(f"{path} is no directory with a config.json here and no name on the hub (owner/name, gpt2)")
    return download(name, revision or "main")


def hub_home():
    """The directory of the hub's own tools."""
    return expand(from_environment("HF_HOME") or user_cache() / "huggingface")


def hub_copy(name, revision):
    """Where the hub's own tools keep a model, if they have fetched it → (directory, commit)."""
    models = expand(from_environment("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE") or hub_home() / "hub")
    model = models / f"models--{name.replace('/', '--')}"
    commit = model / "refs" / revision
    if commit.exists():
        revision = commit.read_text().strip()
    return model / "snapshots" / revision, revision


def hub_token():
    """The user's token for the hub, as its own tools find it: in the environment, or where their login has put it."""
    token = from_environment("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    path = expand(from_environment("HF_TOKEN_PATH") or hub_home() / "token")
    if not token and path.is_file():
        token = path.read_text()
    return token.strip()


def is_whole(directory):
    """Is the checkpoint in a directory complete? (Not every model has a tokenizer.)"""
    return (directory / "config.json").exists() and all(shard.exists() for shard in shards(directory))


OPTIONAL = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors.index.json")


def download(name, revision):
    """→ the directory of a model on the hub: where the hub's own tools have put it, or one in our cache."""
    snapshot, commit = hub_copy(name, revision)
    directory = cache_dir() / "hub" / f"{name}@{revision}".replace("/", "--")
    if is_whole(snapshot) and (snapshot / "tokenizer.json").exists():
        return snapshot
    if is_whole(directory):
        return directory
    endpoint = from_environment("HF_ENDPOINT") or "https://huggingface.co"
    url = f"{endpoint.rstrip('/')}/{name}/resolve/{urllib.parse.quote(commit, safe='')}/"
    directory.mkdir(parents=True, exist_ok=True)
    try:
        for file in ("config.json", *OPTIONAL):
            link_or_fetch(snapshot, url, file, directory)
        for shard in shards(directory):  # last, so that a directory with all of them is whole
            link_or_fetch(snapshot, url, shard.name, directory)
    except InputError:
        if is_whole(snapshot):  # all but its tokenizer
            return snapshot
        raise
    return directory


def link_or_fetch(snapshot, url, name, directory):
    """Put a file into a directory: a link to the copy of the hub's own tools or, where they have none, a download."""
    target = directory / name
    if target.exists():
        return
    if (snapshot / name).exists():
        target.unlink(missing_ok=True)  # a link to a copy that is gone
        target.symlink_to((snapshot / name).resolve())
    else:
        fetch(url + name, target)


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to where a file lies, and keeps what the hub states of it on the way."""

    def __init__(self):
        self.stated = {}

    def redirect_request(self, request, answer, code, message, headers, url):
        self.stated |= lower_keys(headers)
        return super().redirect_request(request, answer, code, message, headers, url)


def lower_keys(headers):
    return {key.lower(): value for key, value in headers.items()}


def fetch(url, target):
    """Download a file, or the rest of it; one of OPTIONAL may be absent from the hub. Raises InputError where the
    download fails, or is not what the hub states."""
    part = target.with_name(f"{target.name}.part")
    if from_environment("HF_HUB_OFFLINE").upper() in ("1", "ON", "YES", "TRUE"):
        raise InputError(f"HF_HUB_OFFLINE is set, and {url} is not in the cache: unset it, or give a directory")
    try:
        size, sha256 = receive(url, part)
    except urllib.error.HTTPError as e:
        if e.code == 404 and target.name in OPTIONAL:
            return
        if e.code == 416:  # there is no rest to send: the part is not the beginning of that file
            part.unlink()
        hints = {401: "set HF_TOKEN", 403: "set HF_TOKEN", 404: "check the name, and that it has safetensors"}
        raise InputError(f"the hub answered {e.code} for {url}: {hints.get(e.code, 'try again later')}") from None
    except (OSError, http.client.HTTPException, ValueError) as e:
        raise InputError(f"cannot fetch {url} ({e}): go online and run it again, or give a directory") from None
    received = part.stat().st_size
    if received < size:
        raise InputError(f"{url} broke off after {received} of {size} bytes: run it again to go on from there")
    if received > size or (sha256 and sha256 != hashlib.sha256(np.memmap(part, np.uint8, "r")).hexdigest()):
        part.unlink()
        raise InputError(f"{url} is not what the hub states ({size} bytes, SHA-256 {sha256}): run it again")
    part.replace(target)


def receive(url, part):
    """Add what is missing to the file `part` of a download. → size in bytes and SHA-256 of the whole, as the hub states
    them ("" where it states no SHA-256)."""
    request = urllib.request.Request(url)
    received = part.stat().st_size if part.exists() else 0
    if received > 0:
        request.add_header("Range", f"bytes={received}-")
    token = hub_token()
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")  # for the hub alone
    redirects = Redirects()
    with urllib.request.build_opener(redirects).open(request, timeout=30) as answer:
        mode = "ab"
        if answer.status != 206:  # not the rest but all of it
            mode = "wb"
            received = 0
        stated = lower_keys(answer.headers) | redirects.stated
        length = int(answer.headers["Content-Length"] or 0)
        size = int(stated.get("x-linked-size") or received + length)
        with open(part, mode) as out:
            while block := answer.read(1 << 20):
                received += out.write(block)
                progress(f"fetching {part.stem}", received, size)
    sha256 = stated.get("x-linked-etag", "").strip('"')
    if len(sha256) != 64:  # the etag of a small file is another kind of hash
        sha256 = ""
    return size or received, sha256


# ---- Tokenizers
# A tokenizer.json is followed as the tokenizers library follows it: a text is cut at added tokens, normalized, cut into
# words by the pre-tokenizer; BPE turns each word into ids. What would change the ids and is not followed is refused by
# its name.
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
WHOLE = r"(?s:.)+"
SPACE = "▁"  # what sentencepiece writes for a space
SPACED_WORDS = f"{SPACE}+[^{SPACE}]*|[^{SPACE}]+"
WHITESPACE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
CATEGORY = r"\\[pP]\{(L[ultmo]?|M[nce]?|N[dlo]?|P[cdseifo]?|S[mcko]?|Z[slp]?)\}"
# What Python's `re`, Oniguruma (the library's engine) and fancy-regex (tiktoken's) do not read alike.
REFUSED = r"\\[^\W_fnrtv].*|[$^]|\}\+|\(\?(?![is]$).+"
REFUSED_IN_CLASS = r"\\[^\W_fnrtv].*|\[|&&|--|~~"
# Byte-level BPE writes each byte as one printable character: the visible ones of Latin-1 as they are.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = sorted(set(range(256)) - set(VISIBLE))
ALPHABET = {b: chr(b) for b in VISIBLE} | {b: chr(256 + i) for i, b in enumerate(HIDDEN)}
BYTE_OF = {ord(character): b for b, character in ALPHABET.items()}
NEVER = 1 << 62  # rank of two tokens that do not merge
MOST_IDS = 1 << 24  # no vocabulary is larger: a larger id is damage
PIECE = 1 << 18  # characters of a long text that are encoded at a time
LONGEST = 1 << 19  # characters that tiktoken is given at most: its regex panics near a million spaces
CUT = re.compile(rf"\S\n(?=\w)|[^\s{SPACE}](?= \w)")  # where a long text may be cut, if its words agree
# What a pattern is tried on: none may match the empty string.
PROBE = "Don't  stop\n\n 12345 naïve 中文 かな 😀 e\u0301 x_y (a+b)==c; \t\r\n..."
# Names of the token between documents, for tokenizers without a config that tells it.
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<|im_end|>", "<｜end▁of▁sentence｜>", "<|eot_id|>")


def flat(node, key):
    """A part of a tokenizer.json → its steps in order; those of a Sequence are listed under `key`."""
    if node is None:
        return []
    if node["type"] != "Sequence":
        return [node]
    return [step for inner in node[key] for step in flat(inner, key)]


# The normalizer, and the pre-tokenizer
def read_normalizers(node, where):
    """The "normalizer" of a tokenizer.json → its steps."""
    steps = flat(node, "normalizers")
    for step in steps:
        check_supported(where, "normalizer", step["type"], ("NFC", "NFD", "NFKC", "NFKD", "Prepend", "Replace"))
        if step["type"] == "Replace":
            check_supported(where, "Replace.pattern", [*step["pattern"]], (["String"],))
            expect(step["pattern"]["String"] != "", where, "Replace.pattern", "", "the text to replace")
    normalize("a", steps)  # fails here, and not at the first text, where something else is damaged
    return steps


def normalize(text, steps):
    for step in steps:
        if step["type"] == "Replace":
            text = text.replace(step["pattern"]["String"], step["content"])
        elif step["type"] != "Prepend":
            text = unicodedata.normalize(step["type"], text)
        elif text:
            text = step["prepend"] + text
    return text


@lru_cache(maxsize=64)
def members(category):
    r"""The characters of \p{category}, as the inside of a character class of Python's `re`."""
    assigned = [*range(0x40000), *range(0xE0000, 0xE0200)]
    codes = np.array([code for code in assigned if unicodedata.category(chr(code)).startswith(category)])
    ranges = np.split(codes, np.flatnonzero(np.diff(codes) > 1) + 1)
    return "".join(rf"\U{codes[0]:08x}-\U{codes[-1]:08x}" for codes in ranges)


def python_pattern(pattern):
    """A Split pattern → the same for Python's `re`, which knows no Unicode categories. ValueError names what the
    engines do not read alike."""
    parts = []
    in_class = False
    for item in re.findall(r"\\[pP]\{\w*\}|\}\+|&&|--|~~|\(\?[A-Za-z-]+|\\.|(?s:.)", pattern):
        inside = ""
        if category := re.fullmatch(CATEGORY, item.replace(r"\d", r"\p{Nd}")):
            inside = members(category.group(1))
        elif item in (r"\s", r"\S"):
            inside = WHITESPACE
        inverted = item[1:2] in ("P", "S")
        if inside and not in_class:
            parts.append(f"[^{inside}]" if inverted else f"[{inside}]")
        elif inside and not inverted:
            parts.append(inside)
        elif re.fullmatch(REFUSED_IN_CLASS if in_class else REFUSED, item):
            raise ValueError(item)
        else:
            parts.append(item)
            in_class = item == "[" or in_class and item != "]"
    return "".join(parts)


@dataclass
class Step:
    """One step of the pre-tokenizer: puts a space in front of a text, if the file says so, and cuts it into words."""

    pattern: str  # of a word
    matches_only: bool = False  # or what lies between two matches is a word, too
    space: str = " "  # put in front of a text that does not begin with it; SPACE: each " " becomes SPACE as well
    prefix: str = "never"  # when it is put there: always, first (at the start of the whole text) or never
    where: str = "tokenizer.json"

    def __post_init__(self):
        what = f"the Split pattern {self.pattern[:80]!r}"
        try:
            self.compiled = re.compile(self.complete(python_pattern(self.pattern)))
        except (ValueError, OverflowError, RecursionError, re.error) as e:
            raise InputError(f"{self.where}: {e} in {what} is not supported; expected one like Llama 3's") from None
        if "" in self.words(PROBE):
            raise InputError(f"{self.where}: {what} matches empty text, which is not supported")

    def complete(self, pattern):
        """The pattern of a word → one that also matches what lies between two of them, if that is kept."""
        return pattern if self.matches_only else f"{pattern}|(?:(?!{pattern})(?s:.))+"

    def begin(self, text, at_start):
        """The text, with the space that this step puts in front of it."""
        if self.space == SPACE:
            text = text.replace(" ", SPACE)
        wanted = self.prefix == "always" or (self.prefix == "first" and at_start)
        if wanted and text and not text.startswith(self.space):
            return self.space + text
        return text

    def words(self, text):
        """The words of a text. tiktoken finds the same ones, faster, but not in texts of any length."""
        return [match.group() for match in self.compiled.finditer(text)]


def read_step(node, where):
    """One step of the "pre_tokenizer" of a tokenizer.json → Step."""
    kind = node["type"]
    check_supported(where, "pre_tokenizer", kind, ("Split", "Digits", "ByteLevel", "Metaspace"))
    if kind == "Digits":
        return Step(r"\p{N}" if node["individual_digits"] else r"\p{N}+")
    if kind == "ByteLevel":
        pattern = GPT2_SPLIT if node.get("use_regex", True) else WHOLE
        return Step(pattern, prefix="always" if node.get("add_prefix_space") else "never")
    if kind == "Metaspace":
        prefix = node.get("prepend_scheme", "always")
        puts_space = prefix != "never"
        check_supported(where, "Metaspace.replacement", node["replacement"], (SPACE,))
        check_supported(where, "Metaspace.prepend_scheme", prefix, ("always", "first", "never"))
        check_supported(where, "Metaspace.add_prefix_space", node.get("add_prefix_space", puts_space), (puts_space,))
        words = f"{SPACE}[^{SPACE}]*|[^{SPACE}]+"
        return Step(words if node.get("split", True) else WHOLE, space=SPACE, prefix=prefix)
    check_supported(where, "Split.pattern", [*node["pattern"]], (["Regex"], ["String"]))
    pattern = node["pattern"].get("Regex") or re.escape(node["pattern"]["String"])
    cutting = [node["behavior"], node.get("invert", False)]
    choices = (["Isolated", False], ["Isolated", True], ["Removed", True])
    check_supported(where, "Split behavior, invert", cutting, choices)
    return Step(pattern, matches_only=cutting == ["Removed", True], where=where)


def join_digits(steps):
    """Digits, then the words of GPT-2: as one step, which is faster. A digit ends a text, also for spaces before it."""
    patterns = [step.pattern for step in steps]
    if patterns in ([r"\p{N}", GPT2_SPLIT], [r"\p{N}+", GPT2_SPLIT]) and steps[1].prefix == "never":
        words = GPT2_SPLIT.replace(r" ?\p{N}+|", "").replace(r"(?!\S)", r"(?![^\s\p{N}])")
        return [Step(f"{patterns[0]}|{words}")]
    return steps


def cut_text(text, size, words):
    """A long text → pieces of `size` characters or some more. It is cut only where the function `words`, text → words,
    shows that no word goes across."""
    start = 0
    end = 0
    while match := CUT.search(text, end + size):
        end = match.end()
        left = text[max(0, end - 1000) : end]
        right = text[end : end + 1000]
        if words(left + right) == words(left) + words(right):
            yield text[start:end]
            start = end
    yield text[start:]


# The model
def read_merges(model, where):
    """The "merges" of a model, each "a b" or ["a", "b"] → {(a, b): rank}; the lowest rank merges first."""
    ranks = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks[left, right] = rank
        for token in (left, right, left + right):
            if token not in model["vocab"]:
                raise InputError(f"{where}: model.merges has {token[:80]!r}, which model.vocab lacks: fetch it again")
    return ranks


def last_merge(token, ranks):
    """Merge the characters of a token as the file says: the pair of the lowest rank first, the leftmost of several.
    → the rank of the last merge, or NEVER if this does not end in the token alone."""
    parts = list(token)
    pair_ranks = [ranks.get(pair, NEVER) for pair in zip(parts, parts[1:])]
    rank = NEVER
    while pair_ranks:
        rank = min(pair_ranks)
        if rank == NEVER:
            break
        at = pair_ranks.index(rank)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        del pair_ranks[at]
        if at > 0:
            pair_ranks[at - 1] = ranks.get((parts[at - 1], parts[at]), NEVER)
        if at < len(pair_ranks):
            pair_ranks[at] = ranks.get((parts[at], parts[at + 1]), NEVER)
    return rank


MODEL = {  # field of the "model" of a tokenizer.json → the values of it that are followed
    "type": ("BPE", None),
    "dropout": (None, 0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "fuse_unk": (None, False, True),
    "byte_fallback": (None, False, True),
    "ignore_merges": (None, False, True),
}


class BPE:
    """The "model" of a tokenizer.json, and the last step of its pre-tokenizer: text → ids.

    The file lists pairs of tokens that merge; tiktoken merges any neighbours that together are one of its tokens. These
    are the same if tiktoken knows only the tokens that the listed merges make of their own characters, each with the
    rank of the last of these merges. For while no merge crosses the borders of a token's characters, what happens
    between them does not depend on what is around: two neighbours that form the token are the pair that made it when
    it stood alone, and two that form a token which alone is never made are no listed pair.

    byte_level (GPT-2, Llama 3, Qwen): BPE reads the bytes of a word, each written as one character of ALPHABET. Others
    (sentencepiece: Llama 2, Mistral, Yi): it reads characters, SPACE for a space; one that the vocabulary lacks is
    spelled out in the tokens <0x00> to <0xFF> of its bytes.
    """

    def __init__(self, model, byte_level, step, where):
        for name, choices in MODEL.items():
            check_supported(where, f"model.{name}", model.get(name), choices)
        self.where = where
        self.byte_level = byte_level
        self.vocab = model["vocab"]
        self.unknown = model.get("unk_token")
        expect(isinstance(self.unknown, str | None), where, "model.unk_token", self.unknown, "a string")
        self.fuses_unknown = model.get("fuse_unk")
        self.takes_whole_words = model.get("ignore_merges")
        byte_names = [f"<0x{b:02X}>" for b in range(256)]
        self.byte_ids = [None] * 256
        if model.get("byte_fallback"):
            self.byte_ids = [self.vocab.get(name) for name in byte_names]
        if len({i is None for i in self.byte_ids}) > 1:
            raise InputError(f"{where}: model.vocab has some of <0x00> … <0xFF> for byte_fallback, expected all")
        ranks = read_merges(model, where)
        if not {part for pair in ranks for part in pair}.isdisjoint(byte_names):
            raise InputError(f"{where}: model.merges has merges of <0x00> … <0xFF>, which are not supported")
        self.step = step
        if not byte_level and step.pattern == WHOLE and self.spaces_begin_words(ranks):
            self.step = replace(step, pattern=SPACED_WORDS)
        self.make_encodings(ranks)
        self.encode_word = lru_cache(maxsize=1 << 16)(self.encode_word)

    def spaces_begin_words(self, ranks):
        """Whether a text may be cut before each run of SPACE, since no merge goes across."""
        joined = any(SPACE in "".join(pair).lstrip(SPACE) for pair in ranks)
        vanishing = self.unknown is None and None in self.byte_ids
        return SPACE in self.vocab and not (joined or vanishing or self.takes_whole_words)

    def spell(self, word):
        """The characters that BPE reads for a word."""
        return "".join(ALPHABET[b] for b in word.encode()) if self.byte_level else word

    def bytes_of(self, token):
        """What a token stands for in a word, as bytes; None if no word is ever spelled like this."""
        if not self.byte_level:
            return token.encode()
        if not BYTE_OF.keys() >= set(map(ord, token)):
            return None
        return token.translate(BYTE_OF).encode("latin-1")

    def shown(self, token):
        """The bytes that a token stands for in a text."""
        if self.byte_level:
            return self.bytes_of(token) or token.encode()
        if re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return token.replace(SPACE, " ").encode()

    def units(self):
        """What merging begins with: {bytes: ids}, None for an id that the vocabulary lacks. tiktoken begins with bytes:
        it first puts the characters of the vocabulary together, and others stay in parts."""
        if self.byte_level:
            return {bytes([b]): [self.vocab.get(character)] for b, character in ALPHABET.items()}
        units = {bytes([b]): [i] for b, i in enumerate(self.byte_ids)}
        for character in filter(lambda token: len(token) == 1, self.vocab):
            data = character.encode()
            for n in range(2, len(data)):
                units[data[:n]] = [self.byte_ids[b] for b in data[:n]]
            units[data] = [self.vocab[character]]
        return units

    def make_encodings(self, ranks):
        """tiktoken's numbers of the tokens are the order of their merges; `ids` has the ids of each number."""
        made = {token: last_merge(token, ranks) for token in dict.fromkeys(map("".join, ranks))}
        ids_of = self.units()
        for token in sorted(made, key=made.get):
            data = self.bytes_of(token)
            if made[token] != NEVER and data is not None:
                ids_of[data] = [self.vocab[token]]
        self.encoding = self.merging = self.make_encoding(ids_of)
        if self.takes_whole_words:
            for data in filter(None, map(self.bytes_of, self.vocab)):
                ids_of.setdefault(data, [None])
            self.encoding = self.make_encoding(ids_of)
        self.ids = list(ids_of.values())
        # what `encode_word` must decide: bytes that the vocabulary lacks, and tokens that only whole words may become
        self.undecided = {number for number, ids in enumerate(self.ids) if None in ids}

    def make_encoding(self, ids_of):
        numbers = {data: number for number, data in enumerate(ids_of)}
        pattern = self.step.complete(self.step.pattern)
        try:
            return tiktoken.Encoding("loopus", pat_str=pattern, mergeable_ranks=numbers, special_tokens={})
        except ValueError as e:
            raise InputError(f"{self.where}: tiktoken does not take the Split pattern {pattern[:80]!r}: {e}") from None

    def encode(self, text):
        """A normalized text without added tokens → ids."""
        ids = []
        for piece in cut_text(text, PIECE, self.step.words):
            if len(piece) <= LONGEST:
                numbers = self.encoding.encode_ordinary(piece)
                if self.undecided.isdisjoint(numbers):
                    ids += [i for number in numbers for i in self.ids[number]]
                    continue
            ids += [i for word in self.step.words(piece) for i in self.encode_word(word)]
        return ids

    def encode_word(self, word):
        """One word → ids, whatever is in it: characters that the vocabulary lacks become their bytes, or else the
        unknown token, or else nothing, and what is around them merges."""
        spelled = self.spell(word)
        if self.takes_whole_words and spelled in self.vocab:
            return [self.vocab[spelled]]
        ids = []
        mergeable = bytearray()
        for character in spelled:
            if character in self.vocab:
                mergeable += self.bytes_of(character)
                continue
            others = self.ids_of_unknown(character)
            if others:
                ids += self.merge(mergeable)
                mergeable.clear()
            fused = self.fuses_unknown and ids[-1:] == others == [self.vocab.get(self.unknown)]
            if not fused:
                ids += others
        return ids + self.merge(mergeable)

    def ids_of_unknown(self, character):
        """The ids for a character that the vocabulary lacks."""
        byte_ids = [self.byte_ids[b] for b in character.encode()]
        if None not in byte_ids:
            return byte_ids
        if self.unknown is None:
            return []
        if self.unknown not in self.vocab:
            problem = f"{character!r} is not in model.vocab, nor is model.unk_token {self.unknown!r}"
            raise InputError(f"{self.where}: {problem}")
        return [self.vocab[self.unknown]]

    def merge(self, data):
        """Bytes of characters of the vocabulary, which need be no valid UTF-8 → ids."""
        if not data:
            return []
        return [i for number in self.merging._encode_single_piece(bytes(data)) for i in self.ids[number]]


# The whole
@dataclass
class AddedToken:
    """A token that is cut out of a text before BPE."""

    content: str
    id: int
    single_word: bool = False  # not within a word
    lstrip: bool = False  # takes the white space before it
    rstrip: bool = False  # takes the white space after it
    normalized: bool = False  # is looked for in the normalized text


class TokenFinder:
    """Cuts texts at added tokens: the longest of those that begin leftmost."""

    def __init__(self, tokens):
        """tokens: {text to look for: AddedToken}"""
        self.tokens = tokens
        longest_first = sorted(tokens, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def split(self, text):
        """→ [(text, None) or ("", id of an added token)] in order, without empty texts."""
        parts = []
        done = 0
        for match in self.pattern.finditer(text):
            token = self.tokens[match.group()]
            start, end = match.span()
            if token.single_word and (is_word(text[start - 1 : start]) or is_word(text[end : end + 1])):
                continue
            if token.lstrip:
                while start > done and text[start - 1] in WHITESPACE:
                    start -= 1
                start = max(start, done)  # the token before may have taken it
            while token.rstrip and end < len(text) and text[end] in WHITESPACE:
                end += 1
            if done < start:
                parts.append((text[done:start], None))
            if start < end:
                parts.append(("", token.id))
            done = end
        if done < len(text):
            parts.append((text[done:], None))
        return parts


def whole_characters(text):
    """The text with U+FFFD for each half of a surrogate pair."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def is_word(character):
    r"""Whether one character is what the library's \w matches; "" is none."""
    category = unicodedata.category(character) if character else "Cn"
    return category[0] in "LM" or category in ("Nd", "Nl", "Pc") or character in ("\u200c", "\u200d")


def read_begin(node, where):
    """The "post_processor" of a tokenizer.json → ids before each text. What it puts after one is `end_of_text`."""
    begin = []
    for step in flat(node, "processors"):
        kinds = ("ByteLevel", "TemplateProcessing", "BertProcessing", "RobertaProcessing")
        check_supported(where, "post_processor", step["type"], kinds)
        ids = []
        if step["type"] == "TemplateProcessing":
            for item in takewhile(lambda item: "SpecialToken" in item, step["single"]):
                ids += step["special_tokens"][item["SpecialToken"]["id"]]["ids"]
        elif step["type"] != "ByteLevel":
            ids.append(step["cls"][1])
        begin = ids + begin
    return begin


class Tokenizer:
    """A tokenizer.json (its content is `spec`): text to ids and back, with the ids of the tokenizers library.

    n_vocab       1 + the largest id
    added         {content: id} of the added tokens
    bytes_of      the bytes that each id stands for in a text; b"" for ids that no token has
    begin         ids before each text
    end_of_text   id between documents, or None
    ends          ids at which writing stops
    prefix        id to put before a text where something must stand there, or None
    template      the Template of its conversations, or None
    InputError: the file, named `where`, contradicts itself or asks for something that is not supported.
    """

    def __init__(self, spec, where="tokenizer.json"):
        self.spec = spec
        self.normalizers = read_normalizers(spec.get("normalizer"), where)
        nodes = flat(spec.get("pre_tokenizer"), "pretokenizers")
        steps = join_digits([read_step(node, where) for node in nodes] or [Step(WHOLE)])
        kinds = [node["type"] for node in nodes]
        if "ByteLevel" in kinds[:-1]:
            raise InputError(f"{where}: pre_tokenizer {kinds[-1]} after ByteLevel is not supported")
        self.first_steps = steps[:-1]
        self.bpe = BPE(spec["model"], "ByteLevel" in kinds, steps[-1], where)
        self.read_added_tokens(spec.get("added_tokens") or [], where)
        self.puts_space = self.words("a") == [f"{SPACE}a"]
        self.changes_beginnings = self.words("a") != ["a"]
        self.begin = read_begin(spec.get("post_processor"), where)
        known = set(range(self.n_vocab))
        expect(known.issuperset(self.begin), where, "post_processor: what it puts first", self.begin, "known ids")
        self.end_of_text = next((self.added[name] for name in ENDS if name in self.added), None)
        self.ends = {self.end_of_text} - {None}
        self.prefix = self.begin[0] if self.begin else self.end_of_text
        self.template = None
        self.encode_again = lru_cache(maxsize=1 << 12)(self.encode)  # for short texts that come again, such as answers

    def read_added_tokens(self, nodes, where):
        """Read the "added_tokens" of a tokenizer.json, and list the bytes of all ids."""
        names = [f.name for f in fields(AddedToken)]
        tokens = [AddedToken(**{name: node[name] for name in names if name in node}) for node in nodes]
        for token in tokens:
            is_whole = all(isinstance(getattr(token, name), bool) for name in names[2:])
            expect(is_whole, where, "an added token", vars(token), "true or false for each of its settings")
        self.added = {token.content: token.id for token in tokens}
        token_of_id = {}
        for content, i in [*self.bpe.vocab.items(), *self.added.items()]:
            is_only_id = token_of_id.setdefault(i, content) == content and self.bpe.vocab.get(content, i) == i
            if not (is_only_id and 0 <= i < MOST_IDS):
                raise InputError(f"{where}: the id of {content[:80]!r} is {i}, expected one id for each token")
        self.n_vocab = 1 + max(token_of_id, default=-1)
        self.bytes_of = [b""] * self.n_vocab
        for content, i in self.bpe.vocab.items():
            self.bytes_of[i] = self.bpe.shown(content)
        for content, i in self.added.items():
            self.bytes_of[i] = content.encode()
        raw = {token.content: token for token in tokens if token.content and not token.normalized}
        normalized = [token for token in tokens if token.content and token.normalized]
        token_of = {normalize(token.content, self.normalizers): token for token in normalized}
        if len(token_of) < len(normalized) or "" in token_of:
            raise InputError(f"{where}: added_tokens are not told apart once they are normalized: not supported")
        self.raw_finder = TokenFinder(raw)
        self.normalized_finder = TokenFinder(token_of)

    def parts(self, text, plain=""):
        """→ [(normalized text for BPE, None) or ("", id of an added token)] in order; `plain`: see `encode`."""
        raw_parts = self.raw_finder.split(whole_characters(text))
        if plain:
            before = ""
            if raw_parts and raw_parts[-1][1] is None:
                before, _ = raw_parts.pop()
            raw_parts.append((before + whole_characters(plain), None))
        parts = []
        for raw, raw_id in raw_parts:
            if raw_id is not None:
                parts.append(("", raw_id))
            for part, i in self.normalized_finder.split(normalize(raw, self.normalizers)):
                if i is not None:
                    parts.append(("", i))
                    continue
                pieces = [part]
                for step in self.first_steps:
                    begun = [step.begin(piece, not parts and j == 0) for j, piece in enumerate(pieces)]
                    pieces = [word for piece in begun for word in step.words(piece)]
                parts += [(self.bpe.step.begin(piece, not parts and j == 0), None) for j, piece in enumerate(pieces)]
        return parts

    def words(self, text):
        """The words of a text, which BPE turns into ids each by itself; "" for added tokens."""
        words = []
        for part, i in self.parts(text):
            words += self.bpe.step.words(part) if i is None else [""]
        return words

    def encode(self, text, plain=""):
        """Text → ids. `plain` is more of the text, in which an added token such as <|im_end|> is none: what a user has
        typed. (Those few that are looked for only in the normalized text are found there, too.)"""
        ids = []
        for part, i in self.parts(text, plain):
            ids += self.bpe.encode(part) if i is None else [i]
        return ids

    def encode_after(self, before, text):
        """Text that follows other text → ids: without the space that some tokenizers put before all that they read."""
        if not self.changes_beginnings:
            if len(text) <= 32:
                return list(self.encode_again(text))
            return self.encode(text)
        head = self.encode(before)
        ids = self.encode(before + text)
        if ids[: len(head)] != head:
            return self.encode(text)
        return ids[len(head) :]

    def start(self, text):
        """Text → ids with `begin` in front, which a text may also bring along itself."""
        ids = self.encode(text)
        if ids[: len(self.begin)] == self.begin:
            return ids
        return self.begin + ids

    def pieces(self, text, size=PIECE):
        """A long text → texts of about `size` characters whose ids, one after the other, are the ids of the whole."""
        return list(cut_text(text, size, self.words))

    def token_bytes(self, i):
        """The bytes that an id stands for; b"" also beyond the vocabulary, as a model may be padded to a round size."""
        return self.bytes_of[i] if 0 <= i < self.n_vocab else b""

    def decode(self, ids):
        text = b"".join(map(self.token_bytes, ids)).decode(errors="replace")
        return text.removeprefix(" ") if self.puts_space else text


def byte_tokenizer():
    """One token per byte, id = byte, and <|endoftext|> as 256: for models that are trained from nothing."""
    end = dict(id=256, content="<|endoftext|>", special=True)
    end |= dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    model = dict(type="BPE", vocab={character: b for b, character in ALPHABET.items()}, merges=[])
    return Tokenizer(dict(version="1.0", added_tokens=[end], pre_tokenizer=level, decoder=level, model=model))


def stated_ends(directory, tokenizer):
    """The ids at which a text ends by the configs beside a tokenizer.json, the one between documents first. Those that
    the tokenizer lacks are left out."""
    known = tokenizer.bpe.vocab | tokenizer.added
    ends = [known.get(stated_token(directory, "eos_token"))]
    for name in ("generation_config.json", "config.json"):
        ids = stated_id(directory / name, "eos_token_id")
        for i in ids if isinstance(ids, list) else [ids]:
            expect(isinstance(i, int | None), directory / name, "eos_token_id", i, "an id or several")
            ends.append(i)
    known_ids = set(known.values())
    return [i for i in ends if i in known_ids]


def stated_begin(directory, tokenizer):
    """The id at which a text begins by the configs beside a tokenizer.json, or None. As in other tools a
    tokenizer_config.json, where there is one, decides alone."""
    known = tokenizer.bpe.vocab | tokenizer.added
    if (directory / "tokenizer_config.json").exists():
        return known.get(stated_token(directory, "bos_token"))
    for name in ("generation_config.json", "config.json"):
        i = stated_id(directory / name, "bos_token_id")
        if i in known.values():
            return i
    return None


def stated_token(directory, name):
    """The text of a token in a tokenizer_config.json, or None."""
    path = directory / "tokenizer_config.json"
    token = read_json(path).get(name) if path.exists() else None
    if isinstance(token, dict):
        token = token.get("content")
    expect(isinstance(token, str | None), path, name, token, "a string")
    return token


def stated_id(path, name):
    """The id, or the list of ids, of this name in a config, or in the one of its base model; None without."""
    config = read_json(path) if path.exists() else {}
    base = config.get("base_config_dict") or {}  # of a looped checkpoint
    return config.get(name, base.get(name))


def load_tokenizer(src):
    """The tokenizer of a hub name or directory, from its tokenizer.json and the ends that the configs beside it state;
    None without the file. InputError: a file is damaged, or asks for something that is not supported."""
    directory = resolve(src)
    path = directory / "tokenizer.json"
    if not path.exists():
        return None
    spec = read_json(path)
    try:
        tokenizer = Tokenizer(spec, path)
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as e:
        raise InputError(f"{path} is no tokenizer.json as we know it ({e!r:.120}): fetch it again") from None
    ends = stated_ends(directory, tokenizer)
    if ends:
        tokenizer.end_of_text = ends[0]
        tokenizer.ends = set(ends)
    begin = stated_begin(directory, tokenizer)
    if not tokenizer.begin:
        tokenizer.prefix = tokenizer.end_of_text if begin is None else begin
    tokenizer.template = find_template(directory, tokenizer)
    return tokenizer


# ---- Text
def rows(tokens, starts, context):
    """Inputs and next tokens as targets, (n, context) each, of the windows of `tokens` that begin at `starts`. A token
    i that is to be read and not learned stands in `tokens` as ~i; as a target it is −100."""
    windows = [tokens[start : start + context + 1] for start in starts]
    ids = torch.from_numpy(np.stack(windows).astype(np.int64))
    inputs = torch.where(ids < 0, ~ids, ids)[:, :-1]
    targets = ids.masked_fill(ids < 0, -100)[:, 1:]
    return inputs, targets


def find_files(data):
    """A file, a directory (all its files), a glob, or "python": the source of its standard library → sorted paths.
    Hidden files and files of zero bytes are left out. Raises InputError where nothing remains."""
    pattern = os.path.expanduser(data)
    if data == "python":
        pattern = f"{glob.escape(os.path.dirname(os.__file__))}/*.py"
    elif os.path.isfile(pattern):  # also where its name looks like a glob: text[1].txt
        pattern = glob.escape(pattern)
    if os.path.isdir(pattern):
        paths = files_below(pattern)
    else:
        paths = map(Path, glob.glob(pattern, recursive=True))
    files = sorted(path for path in paths if path.is_file() and not path.name.startswith("."))
    filled = [file for file in files if file.stat().st_size > 0]
    if not filled:
        problem = "is empty" if files else "matches no file"
        raise InputError(f"{data} {problem}: expected text, a directory, a glob")
    return filled


def files_below(directory):
    """The paths of all files in a directory and those in it, also where links lead. Each directory is entered once:
    links can lead in a circle, as those in /proc do."""
    entered = set()
    for place, directories, names in os.walk(directory, followlinks=True):
        status = os.stat(place)
        key = (status.st_dev, status.st_ino)
        if key in entered:
            directories.clear()
            continue
        entered.add(key)
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        for name in names:
            yield Path(place, name)


def load_data(data, val, tokenizer):
    """→ (training, held-out tokens). Without `val` every 20th file is held out, or the last 20th of fewer files."""
    files = find_files(data)
    if val:
        held_out = find_files(val)
    elif len(files) >= 20:
        held_out = files[::20]
        del files[::20]
    else:
        tokens = load_tokens(files, tokenizer)
        end = len(tokens) - len(tokens) // 20
        if not any_learned(tokens[:end]) or (end < len(tokens) and not any_learned(tokens[end:])):
            raise InputError(f"{data}: its last 20th, which is held out, or its rest has nothing to learn: give --val")
        return tokens[:end], tokens[end:]
    return load_tokens(files, tokenizer), load_tokens(held_out, tokenizer)


def load_tokens(files, tokenizer):
    """Files → one memory-mapped array of tokens, as `rows` reads it. Texts are tokenised once, on all cores, and kept
    in the cache. The suffix of a file, in upper or lower case, says what it holds; raises InputError where it does not:

    .bin        ids without a header: uint16 where the vocabulary has at most 65,536, else uint32
    .npy        ids of any integer type, which the file names
    .jsonl      per line a "text", "messages", or a "prompt" and its "completion": see `document_of`
    .parquet    per row a "text"
    others      UTF-8 text, a text per file"""
    if tokenizer is None:
        raise InputError("the model has no tokenizer.json: text cannot be read or written without one")
    if len(files) == 1 and is_token_file(files[0]):
        return map_tokens(files[0], tokenizer)
    stamp = [tokenizer.spec, tokenizer.begin, tokenizer.end_of_text, tokenizer.template]
    for file in files:
        stamp.append((str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns))
    name = hashlib.sha256(repr(stamp).encode()).hexdigest()[:32]
    path = cache_dir() / f"{name}.int32"
    if not path.exists():
        tokenise(files, tokenizer, path)
    if path.stat().st_size == 0:
        raise InputError(f"there is no text in {files[0]}: give text to read")
    tokens = np.memmap(path, dtype=np.int32, mode="r")
    if not any_learned(tokens):
        problem = f"there is nothing to learn in {files[0]}"
        raise InputError(f'{problem}: give conversations in which the role "assistant" speaks, or "text"')
    return tokens


def any_learned(tokens):
    """Is at least one of these tokens to be learned, not only read?"""
    parts = range(0, len(tokens), 1 << 20)  # the first usually tells
    return any((tokens[start : start + (1 << 20)] >= 0).any() for start in parts)


def tokenise(files, tokenizer, path):
    """Write the tokens of all files to `path` as int32, on all cores."""
    part = path.with_suffix(f".{os.getpid()}")
    total = sum(file.stat().st_size for file in files)
    done = 0
    try:
        with open(part, "wb") as out, ThreadPoolExecutor() as pool:
            work = (passage for file in files for passage in passages(file, tokenizer))
            while batch := list(islice(work, 64)):
                for encoded in [pool.submit(passage.encode, passage.content) for passage in batch]:
                    np.array(encoded.result(), dtype=np.int32).tofile(out)
                done += sum(len(passage.content) for passage in batch)
                progress("tokenising", done, total)
        progress("tokenising", total, total)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


class Passage(NamedTuple):
    """A part of a file: a text and the function that encodes it, or ids as `rows` reads them and np.asarray."""

    encode: object
    content: object


def passages(path, tokenizer):
    """The Passages of a file, each document between its beginning and its end."""
    if is_token_file(path):
        tokens = map_tokens(path, tokenizer)
        for start in range(0, len(tokens), 1 << 20):
            yield Passage(np.asarray, tokens[start : start + (1 << 20)])
        return
    end = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    for segments in read_documents(path, tokenizer.template):
        if len(segments) == 1:
            beginning, *pieces = tokenizer.pieces(segments[0].text)
            yield Passage(tokenizer.start, beginning)
            for text in pieces:
                yield Passage(tokenizer.encode, text)
            yield Passage(np.asarray, end)
        else:
            ids = []
            for segment, part in encoded(segments, tokenizer):
                ids += mark(part, segment.learned)
            yield Passage(np.asarray, ids + mark(end, segment.learned))


def encoded(segments, tokenizer):
    """(Segment, ids) of each part of a document."""
    first, *others = segments
    yield first, tokenizer.start(first.text)
    before = first.text
    for segment in others:
        yield segment, tokenizer.encode_after(before, segment.text)
        before = segment.text


def mark(ids, learned):
    """ids as `rows` reads them: those to be learned as they are, those that are only read as ~i."""
    return ids if learned else [~i for i in ids]


class Segment(NamedTuple):
    """A part of a document, and whether it is to be learned or only read."""

    text: str
    learned: bool


def read_documents(path, template):
    """The documents of a file, one by one, each as a list of Segments; conversations are written as `template` says
    (None: ChatML). Raises InputError naming file and line."""
    kind = path.suffix.lower()
    if kind == ".parquet":
        yield from read_parquet(path)
    elif kind != ".jsonl":
        try:
            yield [Segment(path.read_text(encoding="utf-8-sig"), True)]
        except UnicodeDecodeError as e:
            raise InputError(f"{path} is not UTF-8 text ({e}): convert it, or leave it out") from None
    else:
        for number, record in read_records(path):
            try:
                segments = document_of(record, template)
            except ValueError as e:
                expected = 'expected a "text", "messages", or a "prompt" and its "completion"'
                raise InputError(f"line {number} of {path} ({e!s:.80}): {expected}") from None
            if segments:
                yield segments


def read_records(path):
    """(line number, JSON) of the lines of a .jsonl file that are not blank."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError) as e:
                    raise InputError(f"line {number} of {path} ({e!s:.80}): expected JSON in UTF-8") from None


def document_of(record, template):
    """The Segments of a line of .jsonl, none where its text is null. Raises ValueError for anything else.

    "text": all of it is learned. "messages", each with a "role" and "content": written as the template says (None:
    ChatML), and only what the assistant says is learned. "prompt" and "completion": only the completion is learned;
    either may be a list, whose strings then alternate."""
    require(isinstance(record, dict), "no object")
    if record.get("messages") is not None:
        return chat_segments(record["messages"], template)
    if record.get("prompt") is not None:
        return completion_segments(record["prompt"], record.get("completion"))
    has_known_key = not record.keys().isdisjoint(("text", "messages", "prompt"))
    require(has_known_key, f"has {', '.join(record) or 'nothing'}")
    if record.get("text") is None:
        return []
    return [Segment(string(record["text"], "text"), True)]


def require(fits, problem):
    if not fits:
        raise ValueError(problem)


def string(text, name):
    require(isinstance(text, str), f'its "{name}" is no string')
    return text


class Template(NamedTuple):
    """How a family of models writes the messages of a conversation."""

    opening: str  # before what somebody says; {role}: who it is
    end: str  # after it
    after: str  # between two messages


CHATML = Template("<|im_start|>{role}\n", "<|im_end|>", "\n")  # SmolLM2, Qwen
TEMPLATES = (
    Template("<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>", ""),  # Llama 3
    Template("<|im_start|>{role}<|im_sep|>", "<|im_end|>", ""),  # Phi-4
    CHATML,
)


def find_template(directory, tokenizer):
    """The Template of a checkpoint: the first whose special tokens the tokenizer has and, where tokenizer_config.json
    holds a template, this one, too. None where there is none."""
    path = directory / "tokenizer_config.json"
    stated = read_json(path).get("chat_template") if path.exists() else None
    for template in TEMPLATES:
        tokens = re.findall(r"<\|\w+\|>", "".join(template))
        if tokenizer.added.keys() >= set(tokens) and (not stated or all(token in str(stated) for token in tokens)):
            return template
    return None


def chat_segments(messages, template):
    require(isinstance(messages, list), 'its "messages" are no list')
    template = template or CHATML
    segments = []
    for message in messages:
        require(isinstance(message, dict), "a message is no object")
        role = string(message.get("role"), "role")
        content = string(message.get("content"), "content")
        segments.append(Segment(template.opening.format(role=role), False))
        segments.append(Segment(content + template.end, role == "assistant"))
        segments.append(Segment(template.after, False))
    return segments


def completion_segments(prompt, completion):
    prompts = prompt if isinstance(prompt, list) else [prompt]
    completions = completion if isinstance(completion, list) else [completion]
    require(len(prompts) == len(completions), f"{len(prompts)} prompts and {len(completions)} completions")
    segments = []
    for prompt, completion in zip(prompts, completions):
        segments.append(Segment(string(prompt, "prompt"), False))
        segments.append(Segment(string(completion, "completion"), True))
    return segments


def read_parquet(path):
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InputError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
    try:
        for batch in ParquetFile(path).iter_batches(columns=["text"]):
            for text in batch.column(0).to_pylist():
                if text is not None:
                    yield [Segment(string(text, "text"), True)]
    except (ValueError, LookupError) as e:
        raise InputError(f'{path} ({e!s:.80}): expected parquet with a column "text" of strings') from None


def is_token_file(path):
    return path.suffix.lower() in (".bin", ".npy")


def map_tokens(path, tokenizer):
    """The ids in a .bin or .npy file, mapped. Raises InputError unless they are this tokenizer's."""
    if path.suffix.lower() == ".npy":
        tokens = map_npy(path)
    else:
        tokens = map_bin(path, tokenizer.n_vocab)
    smallest = int(tokens.min())
    largest = int(tokens.max())
    if smallest < 0 or largest >= tokenizer.n_vocab:
        content = f"holds tokens from {smallest} to {largest}, the tokenizer has {tokenizer.n_vocab}"
        raise InputError(f"{path} {content}: is it of another model, or of another type ({tokens.dtype} was read)?")
    return tokens


def map_npy(path):
    try:
        tokens = np.lib.format.open_memmap(path, mode="r")
    except Exception as e:  # of many types: numpy parses the header as Python does
        raise InputError(f"{path} is no .npy file of integers ({e!s:.80}): write it with numpy.save") from None
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or tokens.size == 0:
        raise InputError(f"{path} holds {tokens.dtype} of shape {list(tokens.shape)}: expected a list of integers")
    return tokens


LLM_C = "of llm.c, with a header of 1,024 bytes"
HEADERS = {  # first bytes of files that are no bare ids
    b"\x93NUMPY": "a .npy file, which needs that suffix",
    b"PK\x03\x04": "a zip archive (.npz or pickled weights)",
    b"\x1f\x8b": "compressed by gzip",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    (20240520).to_bytes(4, "little"): LLM_C,
    (20240801).to_bytes(4, "little"): LLM_C,
}
OTHER_TYPES = {  # what .bin files are often written as by mistake
    np.uint16: ["<i4", "<i8", ">i4", ">i8", "<f2", "<f4", "<f8"],
    np.uint32: ["<i8", ">i8", "<f8"],
}


def map_bin(path, n_vocab):
    """The ids in a .bin file. Raises InputError where its beginning shows that it is something else."""
    dtype = np.uint16 if n_vocab <= 1 << 16 else np.uint32
    size = path.stat().st_size
    if size == 0 or size % dtype().itemsize:
        raise InputError(f"{path} has {size} bytes: expected whole {dtype.__name__} tokens")
    tokens = np.memmap(path, dtype, mode="r")
    head = tokens[:4096].tobytes()
    seen = [kind for first_bytes, kind in HEADERS.items() if head.startswith(first_bytes)]
    if head.isascii() and head.decode("ascii").replace("\n", "").replace("\t", "").isprintable():
        seen.append("text, which needs another suffix")
    seen += [np.dtype(other).name for other in OTHER_TYPES[dtype] if looks_like(head, other, n_vocab)]
    if seen:
        advice = f"write ids as {dtype.__name__}, or as .npy of any integer type"
        raise InputError(f"{path} seems to be {seen[0]}: with {n_vocab} tokens in the vocabulary {advice}")
    return tokens


def looks_like(head, dtype, n_vocab):
    """Are these bytes, read as that type, ids of a vocabulary (or, in an older format, ~id)? By chance they are not."""
    with np.errstate(invalid="ignore"):  # NaN, where they are no numbers of that type
        numbers = np.frombuffer(head, dtype, len(head) // np.dtype(dtype).itemsize).astype(np.float64)
        are_ids = (numbers >= -n_vocab) & (numbers < n_vocab) & (numbers == np.trunc(numbers))
    return are_ids.all() and (numbers != 0).any()


# ---- Where to cut, §3.1 and Fig. 1
PAPER_CUTS = {  # Fig. 16, 17: (layers, width) of the model → (encoder layers, decoder layers)
    (28, 2048): (2, 1),  # Qwen3-1.7B
    (36, 2560): (2, 1),  # Qwen3-4B
    (36, 4096): (6, 1),  # Qwen3-8B
    (40, 5120): (6, 1),  # Phi-4
    (22, 2048): (1, 1),  # TinyLlama
}


def default_cuts(model, tokenizer):
    """→ encoder and decoder layers: the paper's cut where it has cut a model of this size, else `choose_cuts`."""
    size = (model.config.n_layer, model.config.n_embd)
    if size in PAPER_CUTS:
        return PAPER_CUTS[size]
    return choose_cuts(layer_distances(model, sample_text(model, tokenizer)))


def sample_text(model, tokenizer):
    """Tokens (1, T) to look at a model with: this project's own words or, without a tokenizer, arbitrary tokens."""
    if tokenizer:
        ids = tokenizer.encode(sys.modules[LoopUS.__module__].__doc__)
    else:
        ids = [i * 7919 for i in range(256)]
    length = min(256, model.config.block_size)
    return torch.tensor([ids[:length]], device=model.wte.weight.device) % model.config.vocab_size


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
    distances = torch.stack(distances).cpu()
    if not distances.isfinite().all():
        raise InputError("the model computes states that are no numbers: are its weights damaged?")
    return distances


def choose_cuts(distances):
    """The rule: loop the plateau, the longest run of layers that each change the state less than twice what the median
    layer does; never the first and the last, as in the paper. → layers before it (encoder), after it (decoder)."""
    last = len(distances) - 1
    steep = torch.nonzero(distances >= 2 * distances.median()).flatten().tolist()
    borders = sorted([0, last, *steep])
    widest = int(np.argmax(np.diff(borders)))
    return borders[widest] + 1, last + 1 - borders[widest + 1]


def cut(model, encoder, decoder):
    """Move the borders between encoder, reasoning block and decoder, in place."""
    model.config = replace(model.config, encoder_layers=encoder, decoder_layers=decoder)
    layers = model.layers()
    end = len(layers) - decoder
    model.encoder = torch.nn.ModuleList(layers[:encoder])
    model.reasoning = torch.nn.ModuleList(layers[encoder:end])
    model.decoder = torch.nn.ModuleList(layers[end:])


# ---- The command line, the same for all programs
def flag(default, help, least=None, choices=None):
    """A setting, its help text and the values it may have: the fields of a dataclass become flags in `parse`."""
    return field(default=default, metadata={"help": help, "least": least, "choices": choices})


class OneLineParser(ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {one_line(message)}; --help lists all flags\n")


def one_line(message):
    """A message as one line of printable characters; others, of damaged files say, are escaped."""
    words = " ".join(str(message).split())
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in words)


def parse(settings, *positional):
    """The command line as {field: value} of the dataclass `settings`, given ones only; refuses unknown flags."""
    parser = OneLineParser(description=settings.__doc__, allow_abbrev=False, argument_default=SUPPRESS)
    for setting in fields(settings):
        help = setting.metadata["help"].replace("%", "%%")
        if setting.default not in ("", None):
            help += f" (default {setting.default})"
        name = f"--{setting.name}"
        if setting.name in positional:
            parser.add_argument(setting.name, nargs="?", help=help)
        elif setting.type is bool:
            parser.add_argument(name, action=BooleanOptionalAction, help=help)
        else:
            choices = setting.metadata["choices"]
            metavar = setting.type.__name__.upper()
            parser.add_argument(name, type=setting.type, metavar=metavar, choices=choices, help=help)
    given = vars(parser.parse_args())
    for setting in fields(settings):
        if setting.name in given:
            value = given[setting.name]
            problem = problem_with(setting, value)
            if problem:
                parser.error(f"--{setting.name}={value} {problem}")
    return given


def problem_with(setting, value):
    """What is wrong with a value of a field that `flag` has made, or "" if nothing is."""
    least = setting.metadata["least"]
    choices = setting.metadata["choices"]
    if type(value) is not setting.type:
        return f"is no {setting.type.__name__}"
    if choices and value not in (setting.default, *choices):
        return f"is unknown, expected one of {', '.join(choices)}"
    if setting.type is float and not np.isfinite(value):
        return "is not a number"
    if least is not None and value < least:
        return f"is too small, expected at least {least}"
    if least is not None and value >= 1 << 31 and setting.type is int:
        return f"is too large, expected less than {1 << 31}"
    return ""


def valid_seed(seed):
    """Any integer → one that torch and numpy take; those that both take by themselves stay as they are."""
    return seed % (1 << 63)


def run(main):
    """Call main(); what the user can mend, and Ctrl-C, end it with one line and a non-zero exit code."""
    keep_freed_memory()
    mend_streams()
    try:
        main()
    except BrokenPipeError:
        os._exit(1)  # whoever read the output, such as `head`, has left
    except (InputError, OSError) as e:
        sys.exit(f"error: {one_line(e)}")
    except (MemoryError, RuntimeError) as e:
        if not is_out_of_memory(e):
            raise
        sys.exit("error: out of memory: turn down --batch or --context, or turn on train.py's --checkpointing")
    except (KeyboardInterrupt, EOFError):  # Ctrl-C, or Ctrl-D at a prompt
        sys.exit("\ninterrupted")


def mend_streams():
    """Stand in for standard streams that are closed, print a question mark for what an encoding lacks, and take no
    input that is not in it, as Python does in some locales."""
    sys.stdin = sys.stdin or open(os.devnull)
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream, errors in ((sys.stdout, "replace"), (sys.stdin, "strict")):
        if hasattr(stream, "reconfigure") and stream.errors != errors:
            stream.reconfigure(errors=errors)


def is_out_of_memory(error):
    """torch.OutOfMemoryError comes from a GPU; the CPU's allocator raises a plain RuntimeError."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(words in str(error) for words in ("can't allocate memory", "not enough memory", "out of memory"))


def keep_freed_memory():
    """Have glibc keep what is freed: getting large blocks of memory anew costs a CPU much time."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl has none
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def pick_device(name, dtype):
    """→ device and dtype of --device and --dtype; where empty, the best device, and bf16 if it is good at that."""
    if not name and torch.cuda.is_available():
        name = "cuda"
    elif not name and torch.backends.mps.is_available():
        name = "mps"
    try:
        device = torch.empty(0, device=name or "cpu").device
        available = device.type in ("cpu", "cuda", "mps")
    except (RuntimeError, AssertionError):
        available = False
    if not available:
        raise InputError(f"--device={name} is not available: expected cpu, cuda or mps")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # graphs, memory and waiting are those of the current one
    if dtype:
        return device, DTYPES[dtype]
    native_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and hasattr(torch.cpu, "_is_avx512_bf16_supported"):
        native_bf16 = torch.cpu._is_avx512_bf16_supported()
    if native_bf16:
        return device, torch.bfloat16
    return device, torch.float32


def peak_memory(device):
    """The most memory that this process has held, in GB: of the GPU, or its resident set; NaN where nobody counts."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    if sys.platform == "win32":
        return float("nan")
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform != "darwin":  # there it is in bytes, elsewhere in KiB
        largest *= 1024
    return largest / 1e9


def progress(what, done, total):
    """One line on a terminal that fills up and goes when it is full; nothing where the output is a file."""
    if not sys.stderr.isatty():
        return
    bar = "█" * int(30 * done / max(total, done, 1))
    line = f"{what} {bar:30} {done:,}"
    if done >= total:
        line = " " * len(line) + "\r"
    print("\r" + line, end="", flush=True, file=sys.stderr)


@dataclass
class Inference:
    """The settings that sample.py and eval.py share."""

    init: str = flag("", "model: directory or hub name; empty: the one train.py wrote last")
    max_loops: int = flag(8, "most passes per token; 8 is the paper's budget, 0 the pretrained model", 0)
    halt: str = flag("threshold", "the rule to stop a token by: or convergence, cdf", None, RULES)
    threshold: float = flag(0.6, "confidence at which a token stops (paper: 0.6); above 1: never")
    epsilon: float = flag(1.0, "for convergence: length of a step at which it stops (paper: 0.1 … 100)", 0)
    min_loops: int = flag(1, "fewest passes per token", 1)
    device: str = flag("", "cpu, cuda or mps; empty: the best there is")
    dtype: str = flag("", "empty: bf16 where the device is good at it", None, tuple(DTYPES))

    def rule(self):
        return Halt(self.halt, self.threshold, self.epsilon, self.min_loops)


# ---- For speed alone: compiled writing. A first reading may skip this.
class SumLinear(torch.nn.Module):
    """A linear layer that is a sum for one token: compiled for a CPU it reads the matrix at the memory's speed, twice
    as fast as torch's product."""

    def __init__(self, linear):
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias

    def forward(self, x):
        if x.numel() > x.size(-1):
            return torch.nn.functional.linear(x, self.weight, self.bias)
        y = (self.weight.float() * x.float()[..., None, :]).sum(dim=-1)
        if self.bias is not None:
            y = y + self.bias
        return y.type_as(x)


def attend_with_sums(q, k, v, mask):
    """`attend` for one token in a cache, T = 1."""
    B, T, n, hd = q.shape
    if T > 1 or mask is None:
        return attend(q, k, v, mask)
    m = k.size(2)
    q = q.view(B, 1, m, n // m, hd)
    scores = (q * k[:, :, :, None]).sum(dim=-1) * hd**-0.5  # (B, S, m, n/m)
    scores = scores.masked_fill(~mask[:, 0, 0, :, None, None], -torch.inf)
    y = (scores.softmax(dim=1)[..., None] * v[:, :, :, None]).sum(dim=1)
    return y.view(B, 1, n, hd)


def compile_step(model):
    """Compile, in place, what one token of each text runs through when it is written: once for all layers, passes,
    positions and numbers of texts. Prompts run as before. On a CPU, sums take the place of the products."""
    if model.wte.weight.device.type == "cpu":
        for block in model.layers():
            block.attend = attend_with_sums
            for name in ("qkv", "out", "up", "down"):
                setattr(block, name, SumLinear(getattr(block, name)))
        model.lm_head = SumLinear(model.lm_head)
    # A norm is to be stored before a matrix reads it, not computed again for each row of the matrix.
    options = {"realize_acc_reads_threshold": 2, "size_asserts": False}
    for block in model.layers():
        compiled = torch.compile(block.forward, dynamic=True, options=options)
        block.forward = partial(compiled_for_one_token, block.forward, compiled)
    model.lm_head.compile(dynamic=True, options=options)
    record_step(model)


class Recorded:
    """A part of the model on a GPU, called as plain(x, at, cache). What it does for one token of each text is recorded
    as a CUDA graph, once for each cache and number of texts, and from then on started as a whole: its kernels run for a
    few microseconds each, and starting them one by one takes longer."""

    recording = False  # then the parts that a part calls run plainly

    def __init__(self, plain):
        self.plain = plain

    def __call__(self, x, at=None, cache=None):
        if Recorded.recording or cache is None or x.size(1) > 1:
            return self.plain(x, at, cache)
        graphs = cache.__dict__.setdefault("graphs", {})  # which end with their cache
        which = (self, x.shape)
        if which not in graphs:
            result, graphs[which] = self.record(x, at, cache)
            return result
        graph, places, output = graphs[which]
        for place, value in zip(places, (x, *at)):
            if value is not None:
                place.copy_(value)
        graph.replay()
        return output.clone()

    def record(self, x, at, cache):
        """→ the result, and for the next time the graph, the places from which it reads x and `at`, and its output."""
        Recorded.recording = True
        try:
            result = self.plain(x, at, cache)  # compiles what is to be compiled
            places = [value if value is None else value.clone() for value in (x, *at)]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = self.plain(places[0], Positions(*places[1:]), cache)
        finally:
            Recorded.recording = False
        return result, (graph, places, output)


def record_step(model):
    """On a GPU, have what one token of each text runs through recorded when it is written: from then on the model stays
    where it is and as it is cut."""
    if model.wte.weight.device.type == "cuda":
        for name in ("encode", "propose", "refine", "decode"):
            setattr(model, name, Recorded(getattr(model, name)))


def compiled_for_one_token(plain, compiled, x, at, kv=None):
    if x.size(1) == 1:
        return compiled(x, at, kv)
    return plain(x, at, kv)


MUCH_TO_READ = 100e9  # weights, as 124 tokens of SmolLM2-135M at 8 passes read: then the first compiling has paid


def pays_to_compile(model, tokens, max_loops):
    """Is writing so many tokens work enough on this device to compile it? Where it is and there is no compiler, a line
    says so."""
    if model.wte.weight.device.type != "cpu":
        return False
    ends = [*model.encoder, *model.decoder, model.lm_head]
    per_token = count_weights(ends) + max(1, max_loops) * count_weights(model.reasoning)
    if tokens * per_token < MUCH_TO_READ:
        return False
    default = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    compiler = from_environment("CXX") or default
    if not shutil.which(compiler):
        print(f"no C++ compiler ({compiler}), which would make writing faster: going on without", file=sys.stderr)
        return False
    return True


def count_weights(modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def try_to_compile(model):
    """→ the model with its step compiled, a copy that shares its weights; or, with a line that says why, the model."""
    print("compiling, which takes some seconds (--no-compile leaves it out)", file=sys.stderr)
    shared = {id(p): p for p in model.parameters()}
    compiled = copy.deepcopy(model, shared)
    compile_step(compiled)
    idx = torch.zeros(1, 1, dtype=torch.long, device=model.wte.weight.device)
    size = min(13, model.config.block_size)  # the size of no layer: torch would fix it as that
    try:
        compiled.advance(idx, [0], compiled.new_cache(1, size, 1), 1, Halt())
    except Exception as e:  # of many types: of torch, of the compiler, of the disk
        if is_out_of_memory(e):
            raise
        print(f"compiling failed, going on without: {one_line(e):.200}", file=sys.stderr)
        record_step(model)
        return model
    return compiled


# ---- convert.py itself
@dataclass
class Settings:
    """Write a pretrained model as a LoopUS checkpoint, or show where --profile would cut it."""

    src: str = flag("", "hub name or directory of the model")
    out: str = flag("", "directory to write")
    format: str = flag("authors", "looped, as its authors have it; hf: unlooped, for any tool", None, ("authors", "hf"))
    profile: bool = flag(False, "show how much each layer changes the state, and the cuts")
    encoder_layers: int = flag(-1, "layers before the loop; -1: the paper's cut, or by the profile")
    decoder_layers: int = flag(-1, "layers after the loop; -1: likewise")


def show_profile(model, tokenizer):
    """Print a bar per layer, the cuts by the rule, and those that the model has."""
    distances = layer_distances(model, sample_text(model, tokenizer))
    shares = distances / distances.max().clamp(min=1e-9)  # of the largest
    parts = ["encoder"] * len(model.encoder) + ["loop"] * len(model.reasoning) + ["decoder"] * len(model.decoder)
    print("1 − cos between the states that enter and leave each layer")
    for layer, (part, distance, share) in enumerate(zip(parts, distances.tolist(), shares.tolist())):
        bar = "█" * round(50 * share)
        print(f"layer {layer:>2}  {part:7}  {distance:6.3f}  {bar}")
    encoder, decoder = choose_cuts(distances)
    print(f"by the rule: encoder {encoder}, decoder {decoder}; taken: {len(model.encoder)}, {len(model.decoder)}")


def main():
    s = Settings(**parse(Settings, "src", "out"))
    if not s.src or not (s.out or s.profile):
        raise InputError("expected: convert.py SRC OUT, or convert.py SRC --profile")
    model, tokenizer = load(s.src, dtype=None, encoder_layers=s.encoder_layers, decoder_layers=s.decoder_layers)
    if s.out:
        save(model, tokenizer, s.out, s.format)
        print(f"{s.out}: {len(model.encoder)} + {len(model.reasoning)} + {len(model.decoder)} layers")
    if s.profile:
        show_profile(model, tokenizer)


if __name__ == "__main__":
    run(main)
