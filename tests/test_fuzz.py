"""Random damage to every file that is read, and random command lines: each ends right or in one line, within seconds.

A test runs ten cases, named by their number: the seed of `random.Random`. `pytest -m fuzz` runs all of them."""

import io
import json
import math
import random
import shutil
import signal
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch
from conftest import GOLDEN, ROOT, random_model
from safetensors.torch import load_file, save_file

import convert
import eval as evaluation
import sample
import train

CASES = 10  # per test
SECONDS = 20  # per case
TRAIN = "--batch=2 --accumulate=1 --context=16 --max_loops=3 --supervised=2 --eval_tokens=64 --dtype=fp32".split()
EVAL = "--context=16 --tokens=64 --max_loops=2 --dtype=fp32 --json".split()
SAMPLE = "--prompt=def --max_new_tokens=4 --max_loops=2 --dtype=fp32".split()


def seeds(always, count):
    """Seeds of tests: so many for every run, the rest for `pytest -m fuzz`."""
    return [*range(always), *(pytest.param(seed, marks=pytest.mark.fuzz) for seed in range(always, count))]


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Undamaged files of every kind: an unlooped and a looped checkpoint, data, and a run of two steps."""
    root = tmp_path_factory.mktemp("material")
    convert.save(random_model("gpt2"), convert.byte_tokenizer(), root / "unlooped", "hf")
    llama3 = json.loads((GOLDEN / "tokenizers" / "llama3.json").read_text(encoding="utf-8"))
    model = random_model("llama", vocab_size=703)
    convert.save(model, convert.Tokenizer(llama3), root / "looped")
    (root / "data").mkdir()
    text = (ROOT / "loopus.py").read_text(encoding="utf-8")[:3000]
    (root / "data" / "text.txt").write_text(text, encoding="utf-8")
    records = [
        dict(text=text[:500]),
        dict(messages=[dict(role="user", content="a"), dict(role="assistant", content="b")]),
    ]
    records += [dict(prompt="Say a", completion=text[i : i + 20]) for i in range(0, 400, 20)]
    (root / "data" / "lines.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    answers = [dict(prompt=["a", "b"], completion=["cd", text[i]], kind=["one", "two"]) for i in range(99)]
    (root / "data" / "answers.jsonl").write_text("".join(json.dumps(record) + "\n" for record in answers))
    ids = np.frombuffer(text.encode(), np.uint8)
    np.save(root / "data" / "ids.npy", ids.astype(np.int64))
    ids.astype(np.uint16).tofile(root / "data" / "ids.bin")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOOPUS_CACHE", str(root / "cache"))
        patch.setattr(train, "best_product", lambda device, dtype: 1e12)
        settings = train.Settings(
            init=str(root / "unlooped"), data=str(root / "data" / "text.txt"), out=str(root / "run"), steps=2, batch=2,
            accumulate=1, context=16, max_loops=3, supervised=2, eval_tokens=64, eval_every=1, dtype="fp32",
        )  # fmt: skip
        train.train(settings)
    return root


WARNINGS = ("trying the one before", "they are read as plain text")  # lines after which a program goes on


class Hang(BaseException):
    pass


@pytest.fixture
def ends(command, monkeypatch):
    """ends(module, …) → (exit code, standard output, standard error) of a program that ends right or in one line."""
    monkeypatch.setattr(train, "best_product", lambda device, dtype: 1e12)  # measuring it takes half a second

    def stop(number, frame):
        raise Hang(f"still running after {SECONDS} seconds")

    def call(module, *arguments):
        handlers = {number: signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGINT, signal.SIGTERM)}
        signal.signal(signal.SIGALRM, stop)
        signal.alarm(SECONDS)
        try:
            code, out, err = command(module, *arguments)
        finally:
            signal.alarm(0)
            for number, handler in handlers.items():
                signal.signal(number, handler)
        shown = f"{module.__name__} {' '.join(map(str, arguments))}\n{out[-1000:]}\n{err}"
        assert code in (0, 1, 2), shown
        if code != 0:
            lines = [line for line in err.splitlines() if line.strip() and not any(said in line for said in WARNINGS)]
            assert len(lines) == 1 and len(lines[0]) > 20 and "\x00" not in lines[0], shown
        else:
            check_result(module, arguments, out, shown)
        return code, out, err

    return call


def no_number(word):
    raise AssertionError(f"{word} is no JSON")


def check_result(module, arguments, out, shown):
    """What a program printed that ended with 0."""
    if module is sample or "--help" in arguments:
        assert out.strip(), shown
    elif module is evaluation and out.startswith("{"):
        report = json.loads(out, parse_constant=no_number)
        assert all(0 <= row["loss"] < 1e30 for row in report["depths"]), shown
    else:
        assert " nan" not in out or module is train, shown
        assert out.strip(), shown


# ---- Damage
VALUES = [None, True, False, 0, 1, -1, 2, 64, 256, 257, 3.5, 1e308, -1e-9, float("nan"), float("inf"), 1 << 31, 10**30]
VALUES += ["", "x", "0.5", "\ud800", "\x00", "a" * 300, [], {}, [0], [None], [[]], {"a": 1}, {"type": "x"}, ["a", "b"]]


def damaged_bytes(data, chance):
    data = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 20))):
        at = chance.randrange(len(data) + 1)
        end = at + chance.choice((1, 2, 8, 100, 5000))
        kind = chance.randrange(7)
        if kind == 0:
            data[at:end] = b""
        elif kind == 1:
            data[at:at] = data[at:end]
        elif kind == 2:
            data[at:end] = bytes(len(data[at:end]))
        elif kind == 3:
            data[at:at] = chance.randbytes(chance.choice((1, 2, 50)))
        elif kind == 4 and chance.random() < 0.3:
            del data[at:]
        elif at < len(data):
            data[at] ^= 1 << chance.randrange(8)
    return bytes(data)


def few_places(node, chance):
    """(container, key) of places in a JSON value, without most of long lists and objects, such as a vocabulary."""
    found = []
    if not isinstance(node, (dict, list)):
        return found
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    for key in chance.sample(keys, min(len(keys), 12)):
        found.append((node, key))
        found += few_places(node[key], chance)
    return found


def damage_value(value, chance):
    """Change one place of a JSON value."""
    found = few_places(value, chance)
    if not found:
        return chance.choice(VALUES)
    node, key = chance.choice(found)
    kind = chance.randrange(5)
    if kind == 0:
        del node[key]
    elif kind == 1:
        other, other_key = chance.choice(found)
        node[key] = json.loads(json.dumps(other[other_key]))
    elif kind == 2 and isinstance(node, dict):
        node[chance.choice(("x", "", "type", "id"))] = node.pop(key)
    elif kind == 3 and isinstance(node[key], (int, float)) and not isinstance(node[key], bool):
        node[key] = chance.choice(
            (node[key] + 1, node[key] - 1, -node[key], node[key] * 2, float(node[key]), str(node[key]))
        )
    else:
        node[key] = chance.choice(VALUES)
    return value


def damage_safetensors(path, chance):
    """Change a header, or a tensor."""
    if chance.random() < 0.5:
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.dumps(damage_value(json.loads(data[8 : 8 + size]), chance)).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
        return
    tensors = load_file(path)
    name = chance.choice(sorted(tensors))
    kind = chance.randrange(5)
    tensor = tensors.pop(name)
    if kind == 0:
        tensors[name + "x"] = tensor
    elif kind == 1:
        tensors[name] = tensor.to(chance.choice((torch.float64, torch.float16, torch.int8, torch.bool)))
    elif kind == 2:
        tensors[name] = torch.cat((tensor, tensor))
    elif kind == 3:
        tensor.view(-1)[chance.randrange(tensor.numel())] = chance.choice((math.nan, math.inf, -math.inf, 3e38, -1e30))
        tensors[name] = tensor
    save_file(tensors, path, metadata={"format": "pt"})


def damage(path, chance):
    """Damage a file, in one of many ways."""
    kind = chance.random()
    if kind < 0.04:
        path.unlink()
    elif kind < 0.06:
        path.unlink()
        path.mkdir()
    elif kind < 0.08:
        path.write_bytes(b"")
    elif kind < 0.10:
        path.write_bytes(b"[" * 100_000)
    elif kind < 0.4 or path.suffix in (".txt", ".bin", ".npy", ".pt"):
        path.write_bytes(damaged_bytes(path.read_bytes(), chance))
    elif path.suffix == ".safetensors":
        damage_safetensors(path, chance)
    elif path.suffix == ".jsonl":
        lines = path.read_text().splitlines()
        for _ in range(chance.choice((1, 1, 30))):
            number = chance.randrange(len(lines))
            lines[number] = json.dumps(damage_value(json.loads(lines[number]), chance))
        path.write_text("\n".join(lines))
    else:
        value = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(damage_value(value, chance)), encoding="utf-8")


def readers(material, place, path, chance):
    """A program and a command line that read a file in `place`."""
    if place.name == "run":
        return chance.choice(
            (
                (train, ["--resume", f"--out={place}", "--steps=3", *chance.choice(((), ("--lr=1e-4",)))]),
                (evaluation, [f"--init={place}", *EVAL]),
                (sample, [f"--init={place}", *SAMPLE]),
            )
        )
    init = f"--init={place}"
    data = f"--data={material / 'data' / 'text.txt'}"
    if place.name == "data":
        init = f"--init={material / 'unlooped'}"
        data = f"--data={path}"
        programs = [train, evaluation]
    else:
        programs = [train, evaluation, sample, sample, convert]
    program = chance.choice(programs)
    if program is train:
        more = chance.choice(
            ([], [], ["--objective=lm"], ["--confidence=sequence"], ["--update=depth", "--trains=all"])
        )
        return train, [init, data, f"--out={place.parent / 'out'}", "--steps=1", *TRAIN, *more]
    if program is evaluation:
        return evaluation, [init, data, *EVAL[: chance.choice((4, 5))]]
    if program is sample:
        return sample, [init, *SAMPLE, *chance.choice(([], ["--trace"], ["--temperature=0"], ["--max_loops=0"]))]
    more = chance.choice((["--profile"], ["--format=hf"], ["--encoder_layers=1", "--decoder_layers=2"]))
    return convert, [place, place.parent / "out", *more]


def cases(seed, tmp_path):
    """(number, random.Random, an empty directory) of each case."""
    for number in range(CASES * seed, CASES * (seed + 1)):
        directory = tmp_path / str(number)
        directory.mkdir()
        yield number, random.Random(number), directory
        shutil.rmtree(directory)


@pytest.mark.parametrize("seed", seeds(12, 500))
def test_damaged_files(material, ends, tmp_path, seed):
    for _, chance, directory in cases(seed, tmp_path):
        place = directory / chance.choice(("unlooped", "looped", "looped", "data", "run"))
        shutil.copytree(material / place.name, place)
        files = sorted(path for path in place.rglob("*") if path.is_file() and path.name != "log.jsonl")
        path = chance.choice(files)
        damage(path, chance)
        program, arguments = readers(material, place, path, chance)
        ends(program, *arguments)


# ---- Command lines
ODD = ["", " ", "9" * 30, "-" + "9" * 30, "\x1b[0m", "\udcff"]
ODD += "0 -1 1 2 3 7 nan inf -inf 1e-320 0.0 0.5 1e9 x １ 1_0 0x10 true None é ./ . * [ a/b -- %s {}".split()


def likely_values(setting, material):
    """Values of a flag, many of which are right."""
    if setting.metadata["choices"]:
        return [*setting.metadata["choices"]]
    if setting.type is int:
        return ["1", "2", "3", "4", "16", "-1", "0", "65"]
    if setting.type is float:
        return ["0", "1e-3", "0.3", "1", "1.5", "1e30", "1e-40", "-2"]
    data = [*map(str, sorted((material / "data").iterdir())), str(material / "data"), str(material / "data" / "*.txt")]
    models = [str(material / name) for name in ("unlooped", "looped", "run", "data")]
    named = {
        "init": models,
        "src": models,
        "data": data,
        "val": data,
        "device": ["cpu", "cuda", "cpu:0", "cpu:3", "meta", "xla"],
        "gate_start": ["0.25", "s4d", "1", "0"],
        "prompt": ["a", "<|endoftext|>", "<|begin_of_text|>Hi", "x" * 64, "x" * 65, "\n\n", "é\udcff"],
    }
    return named.get(setting.name, ["x"])


def random_flags(settings, material, directory, chance):
    """Some flags of a program, each with a value that may be right."""
    flags = []
    for setting in chance.sample(fields(settings), chance.choice((1, 2, 3, 5))):
        if setting.name in ("compile", "tasks", "shard", "src", "out", "resume"):  # slow; processes; the caller's
            continue
        if setting.type is bool:
            flags.append(chance.choice(("--", "--no-")) + setting.name)
            continue
        values = likely_values(setting, material)
        if chance.random() < 0.3:
            values = ODD[setting.name == "init" :]  # without --init train.py tells its whole story: too long
        flags.append(f"--{setting.name}={chance.choice(values)}")
    if chance.random() < 0.1:
        flags.append(
            chance.choice(
                ("--", "-x", "--halt", "--steps", "--help", "extra", "--init", "", "--resume", "--task=speed")
            )
        )
    chance.shuffle(flags)
    return flags


def command_line(material, directory, chance):
    """A program and a random command line, which would be right without some of its flags."""
    model = material / chance.choice(("unlooped", "looped", "run"))
    data = f"--data={material / 'data' / 'text.txt'}"
    program = chance.choice((train, train, evaluation, sample, convert))
    if program is train:
        out = directory / "out"
        kind = chance.randrange(6)
        if kind == 0:
            shutil.copytree(material / "run", out)
            return train, [
                "--resume",
                f"--out={out}",
                "--steps=3",
                *random_flags(train.Settings, material, directory, chance),
            ]
        if kind == 1:
            out.write_text("a file")
        flags = [f"--init={model}", data, f"--out={out}", "--steps=1", *TRAIN]
    elif program is evaluation:
        flags = [f"--init={model}", data, *EVAL[: chance.choice((4, 5))]]
    elif program is sample:
        flags = [f"--init={model}", *SAMPLE[chance.choice((0, 1)) :]]
    else:
        flags = [str(model), str(directory / "out")][: chance.choice((1, 2, 2, 2))]
    return program, [*flags, *random_flags(program.Settings, material, directory, chance)]


@pytest.mark.parametrize("seed", seeds(10, 400))
def test_random_command_lines(material, ends, tmp_path, monkeypatch, seed):
    for _, chance, directory in cases(seed, tmp_path):
        piped = chance.choice((b"", b"a", b"\xff\xfe", b"abc\n" * 30, "é".encode(), b"\x00"))
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped), encoding="utf-8"))
        monkeypatch.chdir(directory)
        program, arguments = command_line(material, directory, chance)
        ends(program, *arguments)


# ---- Changes without a meaning
def changed_in_form(path, chance):
    """Write a file otherwise, with the same meaning. → its path."""
    if path.suffix == ".json":
        value = json.loads(path.read_text(encoding="utf-8"))
        if path.name != "tokenizer.json":
            value["an unknown key"] = None
            value = dict(sorted(value.items(), key=lambda item: chance.random()))
        text = json.dumps(value, indent=chance.choice((None, 1, "\t")), ensure_ascii=chance.random() < 0.5)
        path.write_text(chance.choice(("", "\ufeff")) + text + chance.choice(("", "\n", "\r\n\r\n")), encoding="utf-8")
    elif path.suffix == ".safetensors":
        tensors = load_file(path)
        for name in tensors:
            if chance.random() < 0.3:
                tensors[name] = tensors[name].double()
        save_file(tensors, path, metadata=chance.choice((None, {"format": "pt", "x": "y"})))
    elif path.suffix == ".jsonl":
        lines = [json.dumps(json.loads(line), ensure_ascii=False) for line in path.read_text().splitlines()]
        path.write_text(chance.choice(("\n", "\r\n", "\n\n", " \n")).join(lines), encoding="utf-8")
    elif path.suffix == ".npy":
        np.save(path, np.load(path).astype(chance.choice(("<i2", ">i4", "<u8", "u1"))))
    elif path.suffix == ".bin":
        np.save(path.with_suffix(".npy"), np.fromfile(path, np.uint16))
        return path.with_suffix(".npy")
    elif path.suffix == ".txt":
        path.write_text("\ufeff" + path.read_text(encoding="utf-8"), encoding="utf-8")
    renamed = path.with_suffix(path.suffix.upper())
    if path.parent.name == "data" and chance.random() < 0.5:
        path.rename(renamed)
        return renamed
    return path


@pytest.mark.parametrize("seed", seeds(3, 100))
def test_changes_without_a_meaning_change_nothing(material, ends, tmp_path, seed):
    for _, chance, directory in cases(seed, tmp_path):
        place = directory / chance.choice(("unlooped", "looped", "data"))
        shutil.copytree(material / place.name, place)
        path = chance.choice(sorted(place.iterdir()))
        changed = changed_in_form(path, chance)
        model, data = place, material / "data" / "text.txt"
        before = [f"--init={material / place.name}", f"--data={data}", *EVAL]
        if place.name == "data":
            model, data = material / "looped", changed
            before = [f"--init={model}", f"--data={material / 'data' / path.name}", *EVAL]
        reports = []
        for arguments in (before, [f"--init={model}", f"--data={data}", *EVAL]):
            code, out, err = ends(evaluation, *arguments)
            assert code == 0, err
            report = json.loads(out)
            report.pop("init")
            reports.append(report)
        assert reports[0] == reports[1], path
