"""Random damage to each file that is read: the program that reads it ends well, or in one line that names the file.

`pytest -m fuzz` runs more seeds."""

import json
import random
import shutil
import signal
from functools import partial

import numpy as np
import pytest
import torch
from conftest import GOLDEN, random_model, seeds

import convert
import eval as evaluation
import sample
import train

VALUES = (None, True, -1, 0, 3, 1 << 31, 10**30, 0.5, 1e308, "", "x", "\ud800\x00\n", [], [None], [[0]], {}, {"a": 1})
SMALL = ["--max_loops=2", "--dtype=fp32", "--device=cpu"]
SAMPLE = (sample, ["--prompt=def", "--max_new_tokens=3", *SMALL])
TRAIN = (train, ["--resume", "--steps=2", "--no-compile"])
EVAL = (evaluation, ["--context=16", "--tokens=64", *SMALL])
READERS = dict.fromkeys(("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"), SAMPLE)
READERS |= {"model.safetensors": SAMPLE, "optimizer.pt": TRAIN, "settings.json": TRAIN}
READERS |= dict.fromkeys(("answers.jsonl", "answers.json", "ids.bin", "ids.npy"), EVAL)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A run of one step, with all that a checkpoint can hold, and the files of text that it read."""
    root = tmp_path_factory.mktemp("material")
    spec = json.loads((GOLDEN / "tokenizers" / "smollm2.json").read_text(encoding="utf-8"))
    convert.save(random_model(vocab_size=700), convert.Tokenizer(spec), root / "model")
    stated = dict(eos_token="<|im_end|>", bos_token="<|im_start|>", chat_template="<|im_start|><|im_end|>")
    (root / "model" / "tokenizer_config.json").write_text(json.dumps(stated))
    (root / "model" / "generation_config.json").write_text(json.dumps(dict(eos_token_id=[0, 2], bos_token_id=1)))
    records = [dict(prompt=["a", "b"], completion=["cd", f"{i}"], kind=["one", "two"]) for i in range(30)]
    records += [dict(messages=[dict(role="user", content="a"), dict(role="assistant", content="b", weight=1)])]
    (root / "answers.json").write_text(json.dumps(records))
    (root / "answers.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    np.save(root / "ids.npy", np.arange(400) % 7)
    (np.arange(400) % 7).astype(np.uint16).tofile(root / "ids.bin")
    sizes = dict(steps=1, batch=1, accumulate=1, context=16, max_loops=2, supervised=1, eval_tokens=16, dtype="fp32")
    files = dict(init=str(root / "model"), data=str(root / "ids.npy"), val=str(root / "answers.jsonl"))
    return root, train.train(train.Settings(**files, **sizes, out=str(root / "run")))


def with_another_value(value, chance):
    """A JSON value of which one place has a value of another type."""
    if isinstance(value, (dict, list)) and value and chance.random() < 0.9:
        key = chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
        value[key] = with_another_value(value[key], chance)
        return value
    return chance.choice([other for other in VALUES if type(other) is not type(value)])


def start_of_tensors(data):
    return 8 + int.from_bytes(data[:8], "little")


def damaged(data, name, chance):
    """The bytes of a file with some flipped, or without their end, or with another value in JSON."""
    kind = chance.choice(("flipped", "truncated", "other value"))
    start = start_of_tensors(data) if name == "model.safetensors" else len(data)
    if kind == "truncated":
        return data[: chance.randrange(len(data))]
    if kind == "other value" and name == "model.safetensors":
        header = json.dumps(with_another_value(json.loads(data[8:start]), chance)).encode()
        return len(header).to_bytes(8, "little") + header + data[start:]
    if kind == "other value" and name.endswith(".json"):
        return json.dumps(with_another_value(json.loads(data), chance)).encode()
    if kind == "other value" and name.endswith(".jsonl"):
        lines = data.splitlines()
        i = chance.randrange(len(lines))
        lines[i] = json.dumps(with_another_value(json.loads(lines[i]), chance)).encode()
        return b"\n".join(lines)
    flipped = bytearray(data)
    for _ in range(chance.choice((1, 3, 30))):
        flipped[chance.randrange(chance.choice((start, len(data))))] ^= 1 << chance.randrange(8)
    return bytes(flipped)


@pytest.mark.parametrize("seed", seeds(120))
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_ends_well_or_in_one_line_that_names_it(material, command, request, tmp_path, name, seed):
    root, checkpoint = material
    shutil.copytree(root, tmp_path / "copy")
    place = tmp_path / "copy" / checkpoint.relative_to(root)
    path = (place if (place / name).exists() else tmp_path / "copy") / name
    data = path.read_bytes()
    path.write_bytes(damaged(data, name, random.Random(f"{name} {seed}")))
    program, flags = READERS[name]
    where = {train: [f"--out={place.parent}"], sample: [f"--init={place}"]}
    where[evaluation] = [f"--init={place}", f"--data={path}"]
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("still running after 20 seconds"))
    signal.alarm(20)
    request.addfinalizer(partial(signal.alarm, 0))
    code, _, err = command(program, *flags, *where[program])
    if code != 0:
        line = err.splitlines()[-1]
        assert line.startswith("error: ") and err.count("error: ") == 1
        blamed = (name, str(place), "context of 0", "give more text")  # the file, its checkpoint, what is in it
        assert name == "settings.json" or any(words in line for words in blamed), line  # which names other files
    elif name == "model.safetensors" and path.read_bytes().endswith(data[start_of_tensors(data) :]):
        idx = torch.arange(10)[None]
        assert torch.equal(convert.load(place)[0](idx, 2), convert.load(checkpoint)[0](idx, 2))
