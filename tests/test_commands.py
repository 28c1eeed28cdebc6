"""The programs as a user runs them: the way from a checkpoint to text and figures, and every wrong turn in one line."""

import io
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial

import list_sentences
import numpy as np
import pytest
import torch
from conftest import GOLDEN, ROOT, random_model, typed

import convert
import eval as evaluation
import sample
import train
from loopus import Halt, InputError

SMALL = [
    "--steps=4",
    "--batch=2",
    "--accumulate=1",
    "--context=32",
    "--max_loops=4",
    "--supervised=2",
    "--eval_tokens=256",
]


slow = partial(pytest.param, marks=pytest.mark.slow)


def trained(command, checkpoint, out):
    directory, text = checkpoint
    return command(train, f"--init={directory}", f"--data={text}", f"--out={out}", *SMALL)


def test_train_eval_sample(command, checkpoint, tmp_path):
    code, out, err = trained(command, checkpoint, tmp_path / "run")
    assert code == 0 and "step 4  held_out" in out and "peak memory" in out

    code, out, _ = command(evaluation, "--max_loops=3", "--context=32", "--tokens=512", "--json")
    report = json.loads(out)
    assert code == 0 and str(tmp_path / "run") in report["init"] and report["tokens"] == 512
    assert [r["passes"] for r in report["depths"]] == [0, 1, 2, 3, "exit"]
    for r in report["depths"]:  # bytes are tokens here
        assert abs(r["bits_per_byte"] - r["loss"] / 0.693147) < 0.01 * r["loss"]
    assert sum(report["exit"]["histogram"]) == 512 and 0 <= report["exit"]["ece"] <= 1
    code, out, _ = command(evaluation, "--max_loops=3", "--context=32", "--tokens=512")
    assert code == 0 and "perplexity" in out and "passes taken with exit" in out and "(the ECE)" in out

    arguments = ["--prompt=def ", "--max_new_tokens=12", "--max_loops=3", "--seed=3"]
    code, text, line = command(sample, *arguments)
    assert code == 0 and text.startswith("def ") and "12 tokens," in line and "of at most 3" in line
    assert 0.1 < float(line.split("peak memory ")[1].split(" GB")[0]) < 10
    assert "\x1b" not in text  # no colours where nobody looks
    assert command(sample, *arguments)[1] == text
    assert command(sample, *arguments[:-1], "--seed=5")[1] != text
    code, text, _ = command(sample, "--prompt=def ", "--trace", "--max_loops=3")
    rows = text.splitlines()
    assert code == 0 and len(rows) == 5 and rows[1].startswith("base") and rows[4].split()[0] == "3"


def test_trace_marks_where_the_halting_rule_stops(command, checkpoint):
    directory, _ = checkpoint
    for rule, at in ((["--threshold=0.1"], 1), (["--threshold=2"], None), (["--halt=cdf", "--threshold=0.8"], 3)):
        # an untrained head says 0.5: Π (1 − q) is 1/2, 1/4, 1/8
        code, out, _ = command(sample, f"--init={directory}", "--prompt=def", "--trace", "--max_loops=5", *rule)
        rows = [line.split()[0] for line in out.splitlines() if "← exit" in line]
        assert code == 0 and rows == ([str(at)] if at else [])
    rule = ["--halt=convergence", "--epsilon=1e9", "--min_loops=2"]
    _, out, _ = command(sample, f"--init={directory}", "--prompt=def", "--trace", "--max_loops=5", *rule)
    assert [line.split()[0] for line in out.splitlines() if "← exit" in line] == ["2"]


def test_halting_rules_on_the_command_line(command, checkpoint):
    directory, text = checkpoint
    looped, greedy = f"--init={directory}", ["--prompt=def ", "--max_new_tokens=5", "--temperature=0"]
    code, _, line = command(sample, looped, *greedy, "--dtype=fp32", "--threshold=2", "--max_loops=3")
    assert code == 0 and "3.00 passes each" in line
    for rule in (["--halt=convergence", "--epsilon=1e9"], ["--halt=cdf", "--threshold=0"]):
        code, _, line = command(sample, looped, *greedy, "--dtype=fp32", *rule, "--min_loops=2", "--max_loops=4")
        assert code == 0 and "2.00 passes each" in line
        code, out, _ = command(evaluation, looped, f"--data={text}", "--context=32", "--tokens=64", *rule, "--json")
        report = json.loads(out)
        assert code == 0 and report["rule"] == rule[0].split("=")[1] and report["exit"]["mean_passes"] == 1


@pytest.mark.slow
def test_compiled_text_is_the_same(command, checkpoint):
    flags = [f"--init={checkpoint[0]}", "--prompt=def ", "--max_new_tokens=12", "--temperature=0", "--dtype=fp32"]
    code, expected, _ = command(sample, *flags)
    assert code == 0
    assert command(sample, *flags, "--compile")[:2] == (0, expected)


def test_depth_losses_exit_and_ece_agree_with_plain_sums(checkpoint):
    directory, text = checkpoint
    model, tokenizer = convert.load(directory)
    sequences = evaluation.windows(convert.load_tokens(convert.find_files(str(text)), tokenizer), 32, 320)
    x, y = sequences
    losses = evaluation.depth_losses(model, sequences, [0, 1, 3], 4)
    for depth, loss in losses.items():
        logits = model(x, depth)
        expected = -torch.log_softmax(logits, -1).gather(-1, y[..., None]).mean().item()
        assert abs(loss - expected) < 1e-4
    never = evaluation.exit_stats(model, sequences, 3, Halt(threshold=2.0), 4)
    assert abs(never["loss"] - losses[3]) < 1e-4 and never["mean_passes"] == 3
    h = model.encode(x)
    for _ in range(3):
        h = model.refine(h)
    right = (model.decode(h).argmax(-1) == y).float()
    q = torch.sigmoid(model.confidence(h))
    gaps = [
        (q[(q >= b / 10) & (q < (b + 1) / 10)] - right[(q >= b / 10) & (q < (b + 1) / 10)]).sum() for b in range(10)
    ]
    assert abs(sum(map(abs, gaps)) / y.numel() - never["ece"]) < 1e-5
    masked = y.clone()
    masked[:, 3:20] = -100
    some = evaluation.depth_losses(model, (x, masked), [3], 4)[3]
    chosen = torch.log_softmax(model(x, 3), -1).gather(-1, y[..., None])[..., 0][masked >= 0]
    assert abs(some + chosen.mean().item()) < 1e-4
    stats = evaluation.exit_stats(model, (x, masked), 3, Halt(threshold=2.0), 4)
    assert abs(stats["loss"] - some) < 1e-4 and sum(stats["histogram"]) == (masked >= 0).sum()


def test_speed_of_writing_and_training(command, checkpoint):
    model, cuts = checkpoint[0], ["--encoder_layers=1", "--decoder_layers=1", "--device=cpu"]
    code, out, err = command(evaluation, "--task=speed", model, "--tokens=8", *cuts)
    rows = [line.split() for line in out.splitlines()[2:6]]
    assert code == 0 and [row[0] for row in rows] == ["1", "2", "4", "8"], err
    assert all(float(x.removesuffix("%")) > 0 for row in rows for x in row[1:5])
    more = [f"--data={checkpoint[1]}", "--dtype=bf16", "--threshold=2", "--uncached", "--prompt=9"]
    code, out, err = command(evaluation, "--task=speed", model, "--tokens=8", *more, *cuts)
    assert code == 0 and out.count("held-out loss") == 5 and "uncached s" in out, err
    code, out, err = command(evaluation, "--task=speed", model, "--train", "--way=bf16", "--context=32", *cuts)
    seconds, tokens, tflop = map(float, out.split()[1:4])
    assert code == 0 and abs(tokens - 64 / seconds) < 0.5 * tokens and tflop >= 0, err


@pytest.mark.slow
def test_default_run_in_small_and_again_when_done(command, tmp_path):
    arguments = ["--steps=2", f"--out={tmp_path / 'story'}"]
    code, out, err = command(train, *arguments)
    assert code == 0, err
    assert (tmp_path / "story" / "control" / "step-0000002" / "model.safetensors").exists()
    table = out.split("share of right answers")[1].splitlines()[1:11]
    assert table[0].split() == ["base", "control", "1", "2", "4", "8", "exit", "passes"]
    assert [line.split()[0] for line in table[1:]] == [*"12345678", "mean"]
    assert all(0 <= float(share) <= 1 for line in table[1:] for share in line.split()[-8:-1])
    question = out.split('--prompt="')[1].split('"')[0]  # as the last lines suggest to ask it
    slots, asked = question.split()[:24], question.split()[24]
    for _ in range(5):
        asked = slots[train.SLOTS.index(asked)]
    assert asked in train.VALUES
    (convert.cache_dir() / "last").write_text("elsewhere")
    code, again, _ = command(train, *arguments)  # every stage is there: only the table is made again
    assert code == 0 and again.count("done before") == 3 and "lr" not in again
    assert again.split("share of right answers")[1].splitlines()[1:11] == table
    assert str(convert.resolve("")).endswith("loop/step-0000002")
    code, out, err = command(evaluation, "--tokens=490", "--json")
    by_links = json.loads(out)["accuracy"]["8 links"]
    assert f"{by_links['8']:.2f}" == table[8].split()[7] and list(by_links) == ["1", "2", "4", "8", "exit", "passes"]
    code, out, err = command(evaluation, "--tokens=490")  # the same figures, on the text that was held out
    assert code == 0, err
    assert out.split("share of right answers")[1].splitlines()[1].split() == ["1", "2", "4", "8", "exit", "passes"]


@pytest.mark.parametrize("links", [1, 2, 3, 4, 8])
def test_list_documents_answer_what_their_chains_say(links):
    chance = np.random.default_rng(links)
    for _ in range(20):
        document = train.list_document(chance, links)
        *contents, first = document["prompt"][0].split()
        holds = dict(zip(train.SLOTS, contents))
        asked = [first, *(prompt.strip() for prompt in document["prompt"][1:])]
        assert len(holds) == 24 and len(set(asked)) == 12 == len(document["completion"])
        for slot, answer, kind in zip(asked, document["completion"], document["kind"]):
            steps = 1
            content = holds[slot]
            while content in holds:
                content = holds[content]
                steps += 1
            assert answer == f" {content}" and kind == f"{steps} links" and content in train.VALUES


@pytest.mark.parametrize("links", [2, 3, 4])
def test_sentences_answer_what_their_chains_say(links):
    document = list_sentences.document(np.random.default_rng(links), links)
    said = document["prompt"][0].split(".")
    follows = dict(sentence.replace(" holds ", " asks ").strip().split(" asks ") for sentence in said[:-1])
    assert set(follows) == set(list_sentences.PEOPLE)
    prompts = [said[-1], *document["prompt"][1:]]
    for prompt, completion, kind in zip(prompts, document["completion"], document["kind"]):
        place, steps = prompt.strip(". :"), 0
        while place in follows:
            place, steps = follows[place], steps + 1
        assert completion == f" {place}" and kind == f"{steps} links"


def test_list_documents_are_windows_of_training_and_only_answers_are_learned(tmp_path):
    train.write_lists(tmp_path / "lists.jsonl", 5, [2, 3], 0)
    tokenizer = train.list_tokenizer()
    tokens = convert.load_tokens([tmp_path / "lists.jsonl"], tokenizer)
    assert len(tokens) == 5 * 49
    x, y = convert.rows(tokens, [0, 98], 49)
    documents = [json.loads(line) for line in (tmp_path / "lists.jsonl").read_text().splitlines()]
    for row_x, row_y, document in zip(x.tolist(), y.tolist(), (documents[0], documents[2])):
        parts = [part for pair in zip(document["prompt"], document["completion"]) for part in pair]
        assert tokenizer.decode(row_x) == "".join(parts) + "<|endoftext|>"
        learned = tokenizer.decode([i for i in row_y if i >= 0])
        assert learned == "".join(document["completion"]) + "<|endoftext|>"


def test_accuracy_by_kind_agrees_with_plain_counting(tmp_path):
    model = random_model("gpt2")
    tokenizer = convert.byte_tokenizer()
    records = [dict(prompt=["ab", "c"], completion=["de", "f"], kind=["two", "one"])]
    records.append(dict(prompt="abc", completion="d", kind=["one"]))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    documents = evaluation.read_answers(tmp_path / "a.jsonl", tokenizer, 1000)
    ids = [list(b"abdecf"), list(b"abcd")]
    assert [document[0] for document in documents] == ids
    table = evaluation.accuracy_by_kind(model, documents, [0, 3], Halt(threshold=2.0), max_loops=3)
    assert table["one"].keys() == {0, 3, "exit", "passes"} and table["one"]["passes"] == 3
    likeliest = [model(torch.tensor([text]), 3).argmax(-1)[0].tolist() for text in ids]
    ids[0][2:4], ids[0][5] = likeliest[0][1:3], likeliest[0][4]  # makes some answers right
    documents = [(ids[0], documents[0][1]), documents[1]]
    again = [model(torch.tensor([text]), 3).argmax(-1)[0].tolist() for text in ids]
    right = [again[0][1] == ids[0][2] and again[0][2] == ids[0][3], again[0][4] == ids[0][5], again[1][2] == ids[1][3]]
    table = evaluation.accuracy_by_kind(model, documents, [3])
    assert table["two"][3] == right[0] and table["one"][3] == (right[1] + right[2]) / 2


def test_profile_and_conversion(command, checkpoint, tmp_path):
    directory, text = checkpoint
    code, out, _ = command(convert, directory, "--profile", "--encoder_layers=1", "--decoder_layers=1")
    rows = out.splitlines()[1:6]
    assert code == 0 and [row.split()[:3] for row in rows] == [
        ["layer", "0", "encoder"],
        *(["layer", str(i), "loop"] for i in (1, 2, 3)),
        ["layer", "4", "decoder"],
    ]
    rule = convert.choose_cuts(torch.tensor([float(row.split()[3]) for row in rows]))
    assert out.splitlines()[6:] == [f"by the rule: encoder {rule[0]}, decoder {rule[1]}; taken: 1, 1"]
    code, out, _ = command(evaluation, "--task=profile", f"--init={directory}", "--dtype=fp32")
    cuts = [line.split()[1:3] for line in out.splitlines() if line.startswith("cut ")]
    assert code == 0 and len(cuts) >= 3 and "layer  4" in out and "the model itself" in out
    model, tokenizer = convert.load(directory, encoder_layers=int(cuts[1][0][:-1]), decoder_layers=int(cuts[1][1]))
    idx = convert.sample_text(model, tokenizer)
    expected = evaluation.depth_losses(model, (idx[:, :-1], idx[:, 1:]), [1, 8], 1)
    row = [line for line in out.splitlines() if line.startswith("cut ")][1].split()[3:]
    assert [float(row[0]), float(row[3])] == pytest.approx([expected[1], expected[8]], abs=1e-3)
    code, out, _ = command(convert, directory, tmp_path / "looped", "--encoder_layers=2", "--decoder_layers=1")
    assert code == 0 and "looped: 2 + 2 + 1 layers" in out
    model, _ = convert.load(tmp_path / "looped")
    assert model.config.encoder_layers == 2 and model.config.decoder_layers == 1


def wrong(ended, *expected, code=1):
    """The program ended with this code and one line, which says all that is expected."""
    found, _, err = ended
    lines = [line for line in err.splitlines() if line]
    assert found == code and len(lines) == 1 and "Traceback" not in err, err
    for words in expected:
        assert words in lines[0], lines[0]


def test_bad_input_is_one_line(command, checkpoint, tmp_path):
    directory, text = checkpoint
    init, data = f"--init={directory}", f"--data={text}"
    out, more = f"--out={tmp_path / 'run'}", "--context=32"
    empty = tmp_path / "empty.txt"
    empty.touch()
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe")
    for module in (train, sample, evaluation, convert):
        wrong(command(module, "--max_lops=8"), "unrecognized arguments: --max_lops=8", code=2)
    wrong(command(train, init, data, "--steps=many"), "--steps", "invalid int value: 'many'", code=2)
    wrong(
        command(train, init, out, more, f"--data={tmp_path}/none.txt"),
        "none.txt matches no file",
        "expected text, a directory",
    )
    wrong(command(train, init, out, more, f"--data={empty}"), "empty.txt is empty")
    wrong(command(train, init, out, more, f"--data={tmp_path}/binary.txt"), "binary.txt is not UTF-8 text")
    wrong(command(train, init, data, out, more, "--max_loops=4"), "--supervised=5", "--max_loops=4", "expected K")
    wrong(
        command(train, init, data, out, more, "--encoder_layers=4", "--decoder_layers=1"),
        "no reasoning block in 5 layers",
    )
    wrong(command(train, init, data, out, "--context=65"), "--context=65", "64")
    wrong(command(train, init, data, out, "--resume"), "--resume", "no checkpoint")
    wrong(command(train, init, data, out, "--objective=rl"), "--objective: invalid choice: 'rl'", "'lm'", code=2)
    wrong(command(train, init, data, out, "--steps=0"), "--steps=0 is too small, expected at least 1", code=2)
    wrong(command(evaluation, init, "--max_loops=-1"), "--max_loops=-1 is too small, expected at least 0", code=2)
    wrong(command(train, init, data, out, "--device=abacus"), "--device=abacus", "expected cpu")
    wrong(command(train, init, data, out, "--device=meta"), "--device=meta is not available", "expected cpu")
    wrong(command(train, init, data, out, "--lr=nan"), "--lr=nan is not a number", code=2)
    wrong(command(train, init, data, out, "--dtype=fp8"), "--dtype: invalid choice: 'fp8'", "'bf16'", code=2)
    wrong(command(train, init, data, out, more, "--gate_start=1.5"), "gate_start is 1.5")
    wrong(command(sample), "no --init")
    wrong(command(evaluation, init), "give --data")
    wrong(command(sample, init, "--prompt=" + "x" * 65), "65 tokens", "context of 64")
    wrong(command(sample, init, "--prompt=x", "--temperature=-1"), "--temperature=-1.0 is too small", code=2)
    wrong(
        command(evaluation, f"--init={tmp_path / 'nothing'}"),
        "is no directory with a config.json here and no name on the hub",
    )
    wrong(command(convert, directory), "SRC OUT")
    assert not (tmp_path / "run").exists()


def test_without_data_it_trains_on_the_standard_library_and_says_how_long(command, checkpoint, tmp_path, monkeypatch):
    library = tmp_path / "library"
    library.mkdir()
    (library / "a.py").write_text((ROOT / "loopus.py").read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(os, "__file__", str(library / "os.py"))
    flags = [f"--init={checkpoint[0]}", f"--out={tmp_path / 'run'}", *SMALL]
    code, out, err = command(train, *flags)
    assert code == 0 and "no --data: training on the source of Python's standard library" in out, err
    assert json.loads((tmp_path / "run" / "step-0000004" / "settings.json").read_text())["data"] == "python"
    assert "days on this device" not in out
    monkeypatch.setattr(train, "best_product", lambda device, dtype: 1e3)  # a very slow machine
    code, out, err = command(train, *flags, f"--out={tmp_path / 'slow'}")
    assert code == 0 and "days on this device. Short enough to try: --steps=200" in out, err


@pytest.mark.parametrize("flag", ["--trains=all", "--objective=lm", "--gate_start=s4d", "--encoder_layers=2"])
def test_resume_refuses_flags_that_cannot_change(command, checkpoint, tmp_path, flag):
    assert trained(command, checkpoint, tmp_path / "run")[0] == 0
    wrong(command(train, "--resume", f"--out={tmp_path / 'run'}", "--steps=6", flag), flag, "cannot change", "has")


def test_resume_takes_new_rates(command, checkpoint, tmp_path):
    assert trained(command, checkpoint, tmp_path / "run")[0] == 0
    assert command(train, "--resume", f"--out={tmp_path / 'run'}", "--steps=5", "--new_lr=3", "--lr=1e-4")[0] == 0
    saved = torch.load(tmp_path / "run" / "step-0000005" / "optimizer.pt", weights_only=True)
    rates = {group["new"]: group["lr"] for group in saved["optimizer"]["param_groups"]}
    assert abs(rates[True] / rates[False] - 3) < 1e-6 and rates[False] < 1e-4


def test_files_that_the_user_put_into_a_run_are_not_touched(command, checkpoint, tmp_path):
    run = tmp_path / "run"
    assert trained(command, checkpoint, run)[0] == 0
    shutil.copytree(run / "step-0000004", run / "step-0000004-best")
    (run / "step-notes.txt").write_text("better with 5e-5")
    (run / "step-link").symlink_to("step-0000004")
    (run / "step-0000004" / "samples.txt").write_text("kept")
    kept = {path: path.read_bytes() for path in (run / "step-0000004-best").iterdir()}
    assert command(train, "--resume", f"--out={run}", "--steps=6", "--eval_every=1", "--keep=1")[0] == 0
    assert {path: path.read_bytes() for path in kept} == kept and (run / "step-notes.txt").exists()
    assert [path.name for path in (run / "step-0000004").iterdir()] == ["samples.txt"]  # the rest was the run's own
    names = {"log.jsonl", "step-0000004", "step-0000004-best", "step-0000006", "step-link", "step-notes.txt"}
    assert {path.name for path in run.iterdir()} == names


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "chats"])
def test_accumulated_batches_are_one_batch(command, checkpoint, tmp_path, kind):
    """The mean is over all learned tokens of the step, however it is split."""
    data = checkpoint[1]
    if kind == "chats":
        chance = random.Random(0)
        data = tmp_path / "chats.jsonl"
        words = ["".join(chance.choice("abcdefgh ") for _ in range(chance.choice((3, 60, 200)))) for _ in range(200)]
        turns = [dict(prompt=words[i], completion=words[i + 1]) for i in range(0, 200, 2)]
        data.write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    rows = []
    for batch in (16, 4, 1):
        out = tmp_path / f"run{batch}"
        flags = [f"--init={checkpoint[0]}", f"--data={data}", f"--out={out}", *SMALL, "--steps=1", "--dtype=fp32"]
        code, _, err = command(train, *flags, f"--batch={batch}", f"--accumulate={16 // batch}")
        assert code == 0, err
        rows.append(next(row for row in map(json.loads, (out / "log.jsonl").open()) if "lm" in row))
    assert max(row["lm"] for row in rows) - min(row["lm"] for row in rows) < 1e-4
    norms = [row["grad_norm"] for row in rows]
    assert max(norms) / min(norms) < 1.02  # L_mono is of the mean of a micro-batch, and not linear


def test_a_run_is_not_overwritten_and_resumes_with_its_settings(command, checkpoint, tmp_path):
    assert trained(command, checkpoint, tmp_path / "run")[0] == 0
    broken_off = tmp_path / "run" / "step-0000005.new-123"  # what a crash in the middle of writing leaves
    broken_off.mkdir()
    for name in ("config.json", "optimizer.pt", "settings.json"):
        (broken_off / name).write_text("{")
    before = sorted((tmp_path / "run").rglob("*"))
    wrong(trained(command, checkpoint, tmp_path / "run"), "already holds a run", "--resume it")
    assert sorted((tmp_path / "run").rglob("*")) == before
    code, out, _ = command(train, "--resume", f"--out={tmp_path / 'run'}", "--steps=6")  # the other settings are kept
    assert code == 0 and "step 6  held_out" in out and "step 5  lm" in out and "step 4  lm" not in out
    wrong(command(train, "--resume", f"--out={tmp_path / 'run'}", "--steps=5"), "at step 6 already", "--steps=5")
    assert (tmp_path / "run" / "step-0000006" / "model.safetensors").exists()


def test_full_disk_leaves_the_old_checkpoint_whole(command, checkpoint, tmp_path):
    run = tmp_path / "run"
    assert trained(command, checkpoint, run)[0] == 0
    before = {f: f.read_bytes() for f in (run / "step-0000004").iterdir()}
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100000, 100000)); import sys, convert, train;"
        f"sys.argv = ['train.py', '--resume', '--out={run}', '--steps=6']; convert.run(train.main)"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=os.environ)
    wrong((ended.returncode, ended.stdout, ended.stderr), "cannot write", "untouched")
    assert {f: f.read_bytes() for f in before} == before
    assert [d.name for d in run.glob("step-*")] == ["step-0000004"]


def started(checkpoint, out, *more):
    """The training that `trained` does, as a process of its own."""
    directory, text = checkpoint
    flags = [f"--init={directory}", f"--data={text}", f"--out={out}", "--dtype=fp32", *SMALL, *more]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    return subprocess.Popen([sys.executable, "train.py", *flags], cwd=ROOT, **pipes)


def weights(run):
    """The newest checkpoint of a run: its model, and all of its optimizer."""
    newest = sorted(run.glob("step-*"))[-1]
    saved = torch.load(newest / "optimizer.pt", weights_only=True)
    moments = {f"{i} {k}": v for i, of in saved["optimizer"]["state"].items() for k, v in of.items()}
    return convert.load(newest)[0].state_dict() | moments | dict(step=torch.tensor(saved["step"]))


def same(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
@pytest.mark.parametrize("number, update", [(signal.SIGTERM, "batch"), (signal.SIGINT, "depth")])
def test_signals_save_a_checkpoint_and_resume_goes_on(checkpoint, tmp_path, number, update):
    endless = started(checkpoint, tmp_path / "run", "--steps=100000", "--log_every=1", f"--update={update}")
    while "step      3  lm" not in endless.stdout.readline():
        assert endless.poll() is None
    endless.send_signal(number)
    out, err = endless.communicate(timeout=60)
    wrong((endless.returncode, out, err), f"stopped by {number.name} after step", "--resume")
    step = int(err.split("after step ")[1].split(";")[0])
    saved = weights(tmp_path / "run")
    updates = 2 if update == "depth" else 1  # in a step, of which there is never a part
    assert saved["step"] == step >= 3
    assert max(v for k, v in saved.items() if k.endswith(" step")) == updates * step
    end = f"--steps={step + 3}"
    again = subprocess.run([sys.executable, "train.py", "--resume", f"--out={tmp_path / 'run'}", end], cwd=ROOT)
    assert again.returncode == 0 and weights(tmp_path / "run")["step"] == step + 3


@pytest.mark.slow
def test_killed_and_resumed_run_is_bit_for_bit_the_whole_run(checkpoint, tmp_path):
    """kill -9 at random moments, resumed each time: at the end every bit of model and optimizer is the same."""
    often = "--steps=40", "--eval_every=2", "--keep=2"
    whole, broken, kills, chance = tmp_path / "whole", tmp_path / "broken", 0, random.Random(7)
    assert started(checkpoint, whole, *often).wait(120) == 0
    while not (broken / "step-0000040").exists():
        resume = ["--resume"] if any(broken.glob("step-???????/optimizer.pt")) else []
        process = started(checkpoint, broken, *often, *resume)
        try:
            process.communicate(timeout=2.2 + 1.5 * chance.random() if kills < 6 else 120)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
    same(weights(whole), weights(broken))
    assert kills >= 2
    for run in (whole, broken):
        assert sorted(d.name for d in run.glob("step-*")) == ["step-0000038", "step-0000040"]


LAUNCH = """
import os, pathlib, torch.distributed as dist, convert, train
seen, shard, all_reduce, leave = dict(sharded=0, summed=0), train.shard, dist.all_reduce, os._exit
def sharded(*arguments):
    seen["sharded"] += 1
    return shard(*arguments)
def summed(x):
    seen["summed"] += x.numel() > 3  # a gradient, not a figure
    return all_reduce(x)
def end(code):
    pathlib.Path(__file__).with_suffix(".seen" + os.environ["RANK"]).write_text(repr(seen))
    leave(code)
train.shard, dist.all_reduce, os._exit = sharded, summed, end
convert.run(train.main)
"""


@pytest.mark.slow
def test_two_processes_train_as_one_plain_and_sharded(checkpoint, tmp_path, command):
    """The same losses and weights from one process and two, plain and sharded; each goes on from the other's."""

    def run(name, count, *more):
        flags = [f"--out={tmp_path / name}", *more]
        launch = [
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            "--master_port=29517",
            str(tmp_path / "launch.py"),
        ]
        if count == 1:
            code, _, err = command(train, *flags)
        else:
            ended = subprocess.run(
                [sys.executable, *launch, *flags], cwd=ROOT, capture_output=True, text=True, env=paths
            )
            code, err = ended.returncode, ended.stderr
            seen = eval((tmp_path / "launch.seen1").read_text())
            assert seen["sharded"] == ("--shard" in more)  # gradients: once per optimizer step, or each to its share
            assert 0 < seen["summed"] <= 4 * parameters or seen["sharded"] and seen["summed"] == 0
        assert code == 0 and "Warning" not in err, err
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if "lm" in row], weights(tmp_path / name)

    directory, text = checkpoint
    (tmp_path / "launch.py").write_text(LAUNCH)
    parameters, paths = len(convert.load(directory)[0].state_dict()), os.environ | dict(PYTHONPATH=str(ROOT))
    flags = [f"--init={directory}", f"--data={text}", *SMALL, "--accumulate=4", "--log_every=1", "--dtype=fp32"]
    flags += ["--trains=all", "--eval_every=3"]  # the encoder trains in some steps only; a checkpoint in the middle
    runs = dict(one=run("one", 1, *flags), two=run("two", 2, *flags), shard=run("shard", 2, *flags, "--shard"))
    shutil.copytree(tmp_path / "one", tmp_path / "one then shard")
    runs["one then shard"] = run("one then shard", 2, "--resume", "--steps=6", "--shard")
    runs["one"] = run("one", 1, "--resume", "--steps=6")
    runs["shard then one"] = run("shard", 1, "--resume", "--steps=6", "--no-shard")
    rows, final = runs.pop("one")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for name, (others, other) in runs.items():
        assert [row["step"] for row in others] == [row["step"] for row in rows[: len(others)]]
        for one, two in zip(rows, others):
            assert all(abs(one[k] - two[k]) < 1e-5 for k in ("lm", "mono", "q")), name
            assert abs(one["grad_norm"] - two["grad_norm"]) < 1e-4 * one["grad_norm"], name
        if len(others) == len(rows):
            assert other.keys() == final.keys()
            for key in final:
                torch.testing.assert_close(other[key], final[key], atol=1e-4, rtol=1e-3)


SHARE = """
import os, torch.distributed as dist, torch, train
from conftest import random_model
from loopus import deep_supervision
dist.init_process_group()
model = random_model("llama")
whole = sum(p.numel() for p in model.parameters())
train.shard(model, torch.device("cpu"), torch.bfloat16)
optimizer = train.make_optimizer(model, train.Settings(trains="all"))
x = torch.randint(0, 257, (2, 12))
for terms in deep_supervision(model, x, x, [0, 2]):
    assert all(term.dtype == torch.float32 for term in terms)
    sum(terms).backward()
for held in (model.parameters(), (p.grad for p in model.parameters())):
    parts = [part.to_local() for part in held]
    assert all(part.dtype == torch.float32 for part in parts)
    assert abs(sum(part.numel() for part in parts) / whole - 0.5) < 0.01
os._exit(0)
"""


@pytest.mark.slow
def test_sharded_process_holds_half_of_weights_and_gradients(tmp_path):
    """Of two, half of the float32 weights and gradients, while passes run in bf16."""
    (tmp_path / "share.py").write_text(SHARE)
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29518", str(tmp_path / "share.py")]
    paths = os.environ | dict(PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    ended = subprocess.run([sys.executable, *launch], cwd=ROOT, capture_output=True, text=True, env=paths)
    assert ended.returncode == 0, ended.stderr


def test_infinite_gradients_and_damaged_checkpoints_end_in_one_line(command, checkpoint, tmp_path):
    directory, text = checkpoint
    run = ["--dtype=fp32", f"--out={tmp_path / 'run'}"]
    assert command(train, f"--init={directory}", f"--data={text}", *SMALL, *run)[0] == 0
    before = {f: f.read_bytes() for f in (tmp_path / "run" / "step-0000004").iterdir()}
    ended = command(train, "--resume", *run, "--steps=100", "--lr=1e38")
    wrong(ended, "no finite gradient in 5 steps", "lower --lr")
    assert all(f"left_out {n}" in ended[1] for n in range(1, 5)) and {f: f.read_bytes() for f in before} == before
    code = command(train, "--resume", *run, "--steps=7", "--lr=1e38")[0]  # ends after two of them
    assert code == 0 and torch.load(tmp_path / "run" / "step-0000007" / "optimizer.pt")["skipped"] == 2
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON")) for line in lines]
    assert [row["grad_norm"] for row in rows if row.get("left_out")] == [None] * 4 + [None] * 2
    assert [row for row in rows if "held_out" in row][-1]["held_out"]["1"] is None
    ended = command(train, "--resume", *run, "--steps=100", "--lr=1e38")
    wrong(ended, "no finite gradient in 5 steps to 10")  # the two before the end count
    (tmp_path / "run" / "step-0000007" / "optimizer.pt").write_bytes(b"PK" + bytes(1000))
    code, out, err = command(train, "--resume", *run, "--steps=6")
    assert code == 0 and "leaving out step-0000007" in err and "trying the one before" in err and "step 5  lm" in out
    short = tmp_path / "run" / "step-0000006" / "model.safetensors"
    short.write_bytes(short.read_bytes()[:-1000])
    code, _, err = command(train, "--resume", *run, "--steps=100")
    assert code == 1 and err.count("leaving out") == 2 and "holds no checkpoint" in err and "Traceback" not in err


def test_out_of_memory_is_one_line(monkeypatch, capsys):
    for too_much in (lambda: torch.empty(1 << 50), lambda: exec("raise torch.OutOfMemoryError('CUDA out of memory')")):
        with pytest.raises(SystemExit, match="error: out of memory: turn down --batch"):
            convert.run(too_much)
    with pytest.raises(RuntimeError, match="must match"):
        convert.run(lambda: torch.ones(2) + torch.ones(3))


@pytest.mark.parametrize(
    "bug",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        NotImplementedError("not for this memory format"),
        RecursionError("maximum recursion depth exceeded"),
    ],
)
def test_a_bug_is_not_reported_as_out_of_memory(bug):
    def main():
        raise bug

    with pytest.raises(type(bug)) as raised:
        convert.run(main)
    assert raised.value is bug


@pytest.mark.parametrize("program, flags", [("convert", ["--profile"]), ("train", ["--help"])])
def test_output_that_is_not_utf8_shows_question_marks(checkpoint, program, flags):
    arguments = [sys.executable, f"{program}.py", *flags]
    if program == "convert":
        arguments.insert(2, str(checkpoint[0]))
    environment = os.environ | dict(PYTHONIOENCODING="cp1252")
    ended = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True)
    assert ended.returncode == 0 and b"?" in ended.stdout and not ended.stderr, ended.stderr


@pytest.mark.parametrize("closed", [slow("<&-"), slow(">&-"), slow("2>&-"), "<&- >&- 2>&-"])
def test_closed_standard_streams(checkpoint, tmp_path, closed):
    arguments = f"{sys.executable} convert.py {checkpoint[0]} {tmp_path / 'out'} --profile {closed}"
    ended = subprocess.run(["bash", "-c", arguments], cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert ended.returncode == 0 and not ended.stderr and (tmp_path / "out" / "config.json").exists()
    arguments = f"{sys.executable} sample.py --init={checkpoint[0]} --max_new_tokens=1 --max_loops=1 {closed}"
    ended = subprocess.run(
        ["bash", "-c", arguments], cwd=ROOT, env=os.environ, capture_output=True, text=True, input="a"
    )
    assert ended.returncode == 0 and "Traceback" not in ended.stderr


@pytest.mark.parametrize("seed", [0, 2026, 2**63 - 1, 2**63, 2**64, -1, -(2**63), 10**20, -(10**40)])
def test_valid_seed_is_taken_by_torch_and_numpy(seed):
    valid = convert.valid_seed(seed)
    torch.Generator().manual_seed(valid)
    np.random.default_rng((valid, 0))
    if 0 <= seed < 2**63:
        assert valid == seed
    assert valid == convert.valid_seed(seed) != convert.valid_seed(seed + 1)


@pytest.mark.parametrize("flag", ["--steps", "--batch", "--eval_tokens", "--keep"])
def test_numbers_beyond_all_machines_are_refused(command, checkpoint, tmp_path, flag):
    flags = [f"--init={checkpoint[0]}", f"--data={checkpoint[1]}", f"--out={tmp_path / 'run'}", *SMALL]
    wrong(command(train, *flags, f"{flag}=" + "9" * 30), f"{flag}=999", "is too large", code=2)
    wrong(command(train, *flags, "--batch=2000000000"), "--batch=2000000000 of --context=32 tokens fits no machine")
    wrong(command(train, *flags, "--lr=inf"), "--lr=inf is not a number", code=2)


@pytest.mark.parametrize(
    "name", ["settings.json", "config.json", "tokenizer.json", "model.safetensors", "optimizer.pt"]
)
@pytest.mark.parametrize("content", [b"", b"[]", b'{"steps": "many"}', b"\xff\xfe", None])
def test_resume_takes_the_step_before_a_damaged_one(command, checkpoint, tmp_path, name, content):
    run = tmp_path / "run"
    code, _, err = trained(command, checkpoint, run)
    assert code == 0, err
    shutil.copytree(run / "step-0000004", run / "step-0000005")
    saved = torch.load(run / "step-0000005" / "optimizer.pt", weights_only=True) | dict(step=5)
    torch.save(saved, run / "step-0000005" / "optimizer.pt")
    (run / "step-0000005" / name).unlink()
    if content is None:
        (run / "step-0000005" / name).mkdir()
    else:
        (run / "step-0000005" / name).write_bytes(content)
    code, out, err = command(train, "--resume", f"--out={run}", "--steps=6", "--keep=3")
    assert code == 0 and "step 5  lm" in out and err.count("\n") == 1, err
    assert "leaving out step-0000005, trying the one before" in err and name in err


def test_optimizer_of_another_step_is_left_out(command, checkpoint, tmp_path):
    run = tmp_path / "run"
    assert trained(command, checkpoint, run)[0] == 0
    shutil.copytree(run / "step-0000004", run / "step-0000009")
    code, out, err = command(train, "--resume", f"--out={run}", "--steps=6")
    assert code == 0 and "step 5  lm" in out and "does not hold the optimizer of that step" in err


def wider(state):
    state[3]["exp_avg"] = torch.zeros(3, 3)


def no_moments(state):
    state[3] = 3


def of_no_parameter(state):
    state[100] = state[3]


@pytest.mark.parametrize("spoil", [wider, no_moments, of_no_parameter])
def test_moments_that_do_not_fit_their_parameters_are_damage(command, checkpoint, tmp_path, spoil):
    run = tmp_path / "run"
    assert trained(command, checkpoint, run)[0] == 0
    shutil.copytree(run / "step-0000004", run / "step-0000005")
    path = run / "step-0000005" / "optimizer.pt"
    saved = torch.load(path, weights_only=True) | dict(step=5)
    spoil(saved["optimizer"]["state"])
    torch.save(saved, path)
    code, out, err = command(train, "--resume", f"--out={run}", "--steps=5", "--keep=3")
    assert code == 0 and "step 5  lm" in out and err.count("\n") == 1, err
    assert "leaving out step-0000005" in err and "the moments of parameter" in err


def test_out_that_is_a_file_is_named(command, checkpoint, tmp_path):
    (tmp_path / "run").write_text("mine")
    wrong(trained(command, checkpoint, tmp_path / "run"), "exists", "run")
    assert (tmp_path / "run").read_text() == "mine"


def test_messages_are_one_line_of_printable_characters(command, checkpoint):
    config = checkpoint[0] / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(model_type="a\n\x1b[0m\ud800é")))
    wrong(command(sample, f"--init={checkpoint[0]}", "--prompt=a"), 'is not supported; expected "lds"')
    wrong(command(sample, "a\nb\x00"), "unrecognized arguments: a b\\x00", code=2)


def spoiled(directory, parameter, value):
    """A looped checkpoint of which one number is no number."""
    model = random_model("gpt2")
    with torch.no_grad():
        model.state_dict()[parameter].view(-1)[0] = value
    convert.save(model, convert.byte_tokenizer(), directory)
    return f"--init={directory}"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("parameter", ["norm.weight", "reasoning.1.down.weight"])
def test_weights_that_are_no_numbers_end_in_one_line(command, checkpoint, tmp_path, parameter, value):
    init = spoiled(tmp_path / "spoiled", parameter, value)
    small = ["--max_loops=2", "--dtype=fp32"]
    wrong(command(evaluation, init, f"--data={checkpoint[1]}", "--context=32", *small), "the loss after", "damaged")
    for more in (["--temperature=0"], ["--temperature=1"], ["--trace"]):
        wrong(command(sample, init, "--prompt=a", *small, *more), "no numbers", "damaged")


def test_profile_and_confidence_of_weights_that_are_no_numbers(command, checkpoint, tmp_path):
    spoiled(tmp_path / "layer", "reasoning.1.down.weight", float("nan"))
    wrong(command(convert, tmp_path / "layer", "--profile"), "states that are no numbers", "damaged")
    init = spoiled(tmp_path / "head", "q_head.1.weight", float("nan"))
    flags = [f"--data={checkpoint[1]}", "--context=32", "--max_loops=2"]
    wrong(command(evaluation, init, *flags), "confidence is not a number", "damaged")


def test_tiny_temperature_is_greedy_and_top_k_may_be_beyond_the_vocabulary(command, checkpoint):
    flags = [f"--init={checkpoint[0]}", "--prompt=a", "--max_new_tokens=6", "--max_loops=2", "--dtype=fp32"]
    greedy = command(sample, *flags, "--temperature=0")[1]
    for temperature in ("1e-5", "1e-20", "1e-40", "1e-320"):
        assert command(sample, *flags, f"--temperature={temperature}")[:2] == (0, greedy)
    drawn = [command(sample, *flags, f"--top_k={k}")[:2] for k in (257, 258, 2_000_000_000)]
    assert drawn[0][0] == 0 and drawn[0] == drawn[1] == drawn[2]


def test_environment_of_a_cluster(command, checkpoint, tmp_path, monkeypatch):
    for name in train.LAUNCH:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")  # left over
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert trained(command, checkpoint, tmp_path / "run")[0] == 0
    for name, value in dict(RANK="first", MASTER_ADDR="127.0.0.1", MASTER_PORT="29519").items():
        monkeypatch.setenv(name, value)
    wrong(trained(command, checkpoint, tmp_path / "run2"), "RANK=first, WORLD_SIZE=4", "use torchrun, or unset them")
    chosen = []
    monkeypatch.setenv("RANK", "5")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(train.dist, "rendezvous", lambda url, timeout: iter([(train.dist.HashStore(), 5, 4)]))
    monkeypatch.setattr(train.dist, "init_process_group", lambda **place: None)
    train.join_processes()
    monkeypatch.setenv("LOCAL_RANK", "3")
    train.join_processes()
    assert chosen == [1, 3]


@pytest.mark.parametrize("number", [0, 1])
def test_variables_left_over_from_a_cluster_do_not_wait_for_ever(command, checkpoint, tmp_path, monkeypatch, number):
    monkeypatch.setattr(train, "JOIN", timedelta(seconds=1))
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    place = dict(RANK=number, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=29531)
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    begun = time.time()
    ended = trained(command, checkpoint, tmp_path / "run")
    stated = ", ".join(f"{name}={value}" for name, value in place.items())
    wrong(ended, stated, "do not start processes", "use torchrun, or unset them")
    assert time.time() - begun < 30 and "waiting for the other processes, 0:00:01 at most" in ended[1]
    wrong(command(train), "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT are set", "unset them")
    assert not (tmp_path / "run").exists()


def test_text_in_which_no_sequence_has_anything_to_learn(command, checkpoint, tmp_path):
    """Only the rest after the last whole sequence is learned, or only sequences that are not read."""
    rest = tmp_path / "rest.jsonl"
    rest.write_text(json.dumps(dict(prompt="a" * 40, completion="b")))
    middle = tmp_path / "middle.jsonl"
    middle.write_text(json.dumps(dict(prompt=["a" * 100, "c" * 100], completion=["b", ""])))
    init, out, text = f"--init={checkpoint[0]}", f"--out={tmp_path / 'run'}", f"--val={checkpoint[1]}"
    wrong(command(train, init, out, *SMALL, f"--data={rest}", text), "nothing to learn in the training text")
    flags = ["--context=32", "--max_loops=1"]
    wrong(command(evaluation, init, f"--data={rest}", *flags), "nothing to learn in the held-out text")
    wrong(command(evaluation, init, f"--data={middle}", *flags, "--tokens=32"), "1 of the 6 sequences", "--tokens")
    assert command(evaluation, init, f"--data={middle}", *flags)[0] == 0
    (tmp_path / "short.txt").write_text("short")
    wrong(command(evaluation, init, f"--data={tmp_path / 'short.txt'}", *flags), "6 tokens of held-out text", "context")


@pytest.mark.parametrize(
    "line, problem",
    [
        ("3", "no object"),
        ('{"prompt": ["a"], "completion": ["b", "c"], "kind": []}', "1 prompts and 2 completions"),
        ('{"prompt": "a", "completion": "b", "kind": [3]}', 'strings in "kind"'),
        ('{"prompt": "a", "completion": "b", "kind": ["x", "y"]}', 'strings in "kind"'),
        ('{"prompt": "a", "completion": "b", "kind": "x"}', 'strings in "kind"'),
        ('{"text": "a"}', 'strings in "kind"'),
        ('{"prompt": "%s", "completion": "b", "kind": ["x"]}' % ("a" * 1000), "1001 tokens do not fit"),
        ('{"text": "ab", "kind": ["x"]}', "as many strings"),
    ],
)
def test_answers_that_cannot_be_read_are_named_with_their_line(tmp_path, line, problem):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"prompt": "a", "completion": "b", "kind": ["x"]}\n' + line)
    with pytest.raises(InputError, match=problem) as e:
        evaluation.read_answers(path, convert.byte_tokenizer(), 1000)
    assert f"line 2 of {path}" in str(e.value)


def test_answers_without_a_prompt_or_a_token(tmp_path):
    path = tmp_path / "answers.jsonl"
    records = [dict(prompt=["", "c"], completion=["ab", ""], kind=["x", "y"]), dict(text=None)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    documents = evaluation.read_answers(path, convert.byte_tokenizer(), 1000)
    assert documents == [([256, *b"abc"], [("x", 1, 3)])]  # <|endoftext|> comes before


def test_profile_takes_device_and_precision_and_refuses_other_flags(command, checkpoint):
    flags = ["--task=profile", f"--init={checkpoint[0]}"]
    code, exact, err = command(evaluation, *flags, "--dtype=fp32", "--device=cpu")
    assert code == 0, err
    code, rounded, err = command(evaluation, *flags, "--dtype=bf16")
    assert code == 0 and len(rounded.splitlines()) == len(exact.splitlines()) and rounded != exact, err
    wrong(command(evaluation, *flags, "--device=abacus"), "--device=abacus is not available")
    for flag in ("--max_loops=3", "--data=a.txt", "--json"):
        wrong(command(evaluation, *flags, flag), f"--task=profile takes no {flag.split('=')[0]}")
    wrong(command(evaluation, "--init=a", "--limit=3"), "the loss takes no --limit")
    wrong(command(evaluation, "--tasks=piqa", "--data=a.txt"), "--tasks takes no --data")
    wrong(command(evaluation, "--figures=a", "--json"), "--figures takes no --json")


def test_speed_refuses_and_ends_in_one_line(command, checkpoint, tmp_path):
    model = checkpoint[0]
    flags = ["--task=speed", model, "--train", "--context=8"]
    wrong(command(evaluation, *flags, "--supervised=9", "--way=fp32"), "--supervised=9 of --max_loops=4")
    for flag in ("--compile", "--dtype=bf16", "--tokens=9", "--profile"):
        wrong(command(evaluation, *flags, flag), f"--train takes no {flag.split('=')[0]}")
    wrong(command(evaluation, *flags[:2], "--max_loops=2"), "speed without --train takes no --max_loops")
    code, out, err = command(evaluation, "--task", "speed", model, "--train", "--supervised=9")
    assert code == 1 and "--supervised=9 of --max_loops=4" in err
    arguments = [sys.executable, "eval.py", "--task=speed", str(tmp_path / "none"), "--train"]
    ended = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    wrong((ended.returncode, ended.stdout, ended.stderr), "none is no directory with a config.json")


@pytest.mark.parametrize(
    "piped, message", [(b"caf\xe9", "standard input is not utf-8 text"), (b"\xff\xfea", "convert it")]
)
def test_standard_input_that_is_not_text(command, checkpoint, monkeypatch, piped, message):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped), encoding="utf-8"))
    wrong(command(sample, f"--init={checkpoint[0]}", "--max_new_tokens=2", "--max_loops=1"), message)


def test_an_unfinished_file_of_lists_is_written_again(tmp_path, monkeypatch):
    write_document = train.list_document
    monkeypatch.setattr(train, "list_document", lambda chance, links: links > 2 or write_document(chance, links))
    monkeypatch.setattr(train.json, "dumps", lambda document: document[:1])  # True has no first character
    with pytest.raises((TypeError, KeyError)):  # the latter from Python 3.12 on
        train.write_lists(tmp_path / "lists.jsonl", 4, [1, 3], 0)
    monkeypatch.undo()
    train.write_lists(tmp_path / "lists.jsonl", 4, [1, 3], 0)
    assert len((tmp_path / "lists.jsonl").read_text().splitlines()) == 4


# ---- Where texts begin and end, and what a byte of them costs


def beginning_with(name, begin):
    """A golden tokenizer that begins each text with this added token."""
    spec = json.loads((GOLDEN / "tokenizers" / f"{name}.json").read_text(encoding="utf-8"))
    ids = {token["content"]: token["id"] for token in spec["added_tokens"]}
    if begin not in ids:
        ids[begin] = 703
        spec["added_tokens"].append(spec["added_tokens"][0] | dict(id=703, content=begin))
    special = dict(id=begin, ids=[ids[begin]], tokens=[begin])
    single = [dict(SpecialToken=dict(id=begin, type_id=0)), dict(Sequence=dict(id="A", type_id=0))]
    spec["post_processor"] = dict(type="TemplateProcessing", single=single, special_tokens={begin: special})
    return convert.Tokenizer(spec)


def test_a_prompt_may_bring_its_begin_of_text_along(command, tmp_path):
    begin = "<|begin_of_text|>"
    llama3 = tmp_path / "llama3"
    tokenizer = beginning_with("llama3", begin)
    convert.save(random_model("llama", vocab_size=tokenizer.n_vocab), tokenizer, llama3)
    flags = ["--max_loops=3", "--dtype=fp32"]
    traces = []
    for prompt in ("The sky", f"{begin}The sky", f"{begin}{begin}The sky"):
        code, out, err = command(sample, f"--init={llama3}", f"--prompt={prompt}", "--trace", *flags)
        assert code == 0, err
        traces.append(out)
    assert traces[0] == traces[1] != traces[2]
    model, _ = convert.load(llama3)
    ids = [tokenizer.added[begin], *tokenizer.encode("The sky")]
    probability = model(torch.tensor([ids]), 3)[0, -1].softmax(dim=-1).max().item()
    assert f"{probability:.3f}" in traces[0].splitlines()[-1]


def test_writing_stops_at_the_ends_that_the_checkpoint_states(command, checkpoint):
    flags = [f"--init={checkpoint[0]}", "--prompt=a", "--temperature=0", "--max_loops=2", "--dtype=fp32"]
    model, _ = convert.load(checkpoint[0])
    tokens, _ = model.generate([[97]], 20, max_loops=2, threshold=0.6, temperature=0)
    written = tokens[0][1:]
    code, _, line = command(sample, *flags, "--max_new_tokens=20")
    assert code == 0 and "20 tokens," in line
    stop = next(i for i, token in enumerate(written) if i > 0 and token not in written[:i])
    (checkpoint[0] / "generation_config.json").write_text(json.dumps(dict(eos_token_id=[256, written[stop]])))
    code, out, line = command(sample, *flags, "--max_new_tokens=20")
    assert code == 0 and f"{stop} tokens," in line
    assert out.rstrip("\n") == bytes([97, *written[:stop]]).decode(errors="replace")


def bits_per_byte(command, directory, data):
    """What eval.py prints after one pass: (loss, bits per byte), over all tokens but a rest."""
    flags = [f"--init={directory}", f"--data={data}", "--context=8", "--max_loops=1", "--json"]
    code, out, err = command(evaluation, *flags)
    assert code == 0, err
    row = json.loads(out)["depths"][1]
    return row["loss"], row["bits_per_byte"]


def test_bits_per_byte_are_of_the_bytes_of_the_text(command, checkpoint, tmp_path):
    """5 documents of 7 bytes and an end: 39 targets, of which 32 are read: 28 bytes and 4 ends."""
    data = tmp_path / "sevens.jsonl"
    data.write_text('{"text": "seven b"}\n' * 5)
    loss, bits = bits_per_byte(command, checkpoint[0], data)
    assert abs(bits - loss * 32 / 28 / math.log(2)) < 1e-6


def test_a_space_that_the_tokenizer_puts_in_front_is_no_byte_of_the_text(command, tmp_path):
    tokenizer = beginning_with("llama2", "<s>")
    convert.save(random_model("llama", vocab_size=tokenizer.n_vocab), tokenizer, tmp_path / "llama2")
    text = "It is so."
    data = tmp_path / "short.jsonl"
    data.write_text(json.dumps(dict(text=text)))
    ids = convert.load_tokens([data], tokenizer).tolist()
    assert tokenizer.token_bytes(ids[1]).startswith(b" ")
    flags = [f"--init={tmp_path / 'llama2'}", f"--data={data}", f"--context={len(ids) - 1}", "--max_loops=1", "--json"]
    code, out, err = command(evaluation, *flags)
    assert code == 0, err
    row = json.loads(out)["depths"][1]
    assert abs(row["bits_per_byte"] - row["loss"] * (len(ids) - 1) / len(text) / math.log(2)) < 1e-6


def test_sample_on_a_terminal_asks_and_tints(tmp_path):
    convert.save(random_model("gpt2"), convert.byte_tokenizer(), tmp_path / "tiny")
    flags = [f"--init={tmp_path / 'tiny'}", "--max_new_tokens=20", "--max_loops=4"]
    answers = [(b"\n> ", b"def f\n"), (b"\n> ", b"class\n"), (b"\n> ", b"\n")]
    code, text = typed(["sample.py", *flags], answers)
    assert code == 0 and not answers
    assert text.count("passes: ") == 2 and "\x1b[38;5;75m1\x1b[0m" in text and text.count("20 tokens,") == 2


@pytest.mark.parametrize("program", ["train", "sample", "eval", "convert"])
def test_help_lists_every_flag(program):
    ended = subprocess.run([sys.executable, f"{program}.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    module = dict(train=train, sample=sample, eval=evaluation, convert=convert)[program]
    positional = ("src", "out") if program == "convert" else ()
    assert ended.returncode == 0
    for name in module.Settings.__dataclass_fields__:
        assert (name if name in positional else f"--{name}") in ended.stdout


def test_writing_is_compiled_where_it_pays_and_a_compiler_is_there(command, checkpoint, tmp_path, monkeypatch):
    model, _ = convert.load(checkpoint[0])
    monkeypatch.setenv("CXX", sys.executable)  # is there
    per_token = sum(p.numel() for p in model.reasoning.parameters())
    monkeypatch.setattr(convert, "MUCH_TO_READ", 200 * 8 * per_token)
    assert convert.pays_to_compile(model, 200, 8) and not convert.pays_to_compile(model, 20, 8)
    assert not convert.pays_to_compile(model, 200, 1) and not convert.pays_to_compile(model.to("meta"), 200, 8)
    compiled = []
    monkeypatch.setattr(convert, "try_to_compile", lambda model: compiled.append(1) or model)
    flags = [f"--init={checkpoint[0]}", "--prompt=def ", "--max_new_tokens=4", "--dtype=fp32", "--device=cpu"]
    monkeypatch.setattr(convert, "MUCH_TO_READ", 1)
    code, text, _ = command(sample, *flags)
    assert code == 0 and len(compiled) == 1
    assert command(sample, *flags, "--no-compile")[:2] == (0, text) and len(compiled) == 1
    assert command(sample, *flags, "--trace")[0] == 0 and len(compiled) == 1
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    code, again, err = command(sample, *flags)
    assert (code, again) == (0, text) and len(compiled) == 1
    assert err.count("no-compiler), which would make writing faster") == 1
    monkeypatch.undo()
    assert "ompil" not in command(sample, *flags)[2]  # a small model writes at once
    recorded = []
    monkeypatch.setattr(convert, "record_step", recorded.append)  # a GPU's, unless it is not wanted
    for flag, count in (("--no-compile", 0), ("--trace", 0), ("--max_loops=8", 1)):
        assert command(sample, *flags, flag)[0] == 0 and len(recorded) == count, flag


@pytest.mark.parametrize("native, dtype", [(True, torch.bfloat16), (False, torch.float32)])  # emulated bf16 is slow
def test_the_gpu_that_is_named_is_the_current_one(monkeypatch, native, dtype):
    class OnTheSecond:
        device = torch.device("cuda:1")

    chosen = []
    monkeypatch.setattr(convert.torch, "empty", lambda *sizes, device: OnTheSecond)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert convert.pick_device("cuda:1", "") == (OnTheSecond.device, dtype)
    assert chosen == [OnTheSecond.device]


@pytest.mark.slow
def test_a_broken_compiler_is_one_line_and_writing_goes_on(checkpoint, tmp_path):
    flags = ["--prompt=def ", "--max_new_tokens=6", "--temperature=0", "--dtype=fp32"]
    arguments = [sys.executable, "sample.py", f"--init={checkpoint[0]}", *flags]
    environment = os.environ | dict(TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor"), CXX="false")
    runs = [
        subprocess.run([*arguments, how], cwd=ROOT, capture_output=True, text=True, env=environment)
        for how in ("--compile", "--no-compile")
    ]
    assert runs[0].returncode == runs[1].returncode == 0 and runs[0].stdout == runs[1].stdout, runs[0].stderr
    lines = [line for line in runs[0].stderr.splitlines() if line]
    assert len(lines) == 3 and lines[1].startswith("compiling failed, going on without: "), lines
