"""The programs as a user runs them: the way from a checkpoint to text and figures, and every wrong turn in one line."""

import json
import os
import pty
import random
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, random_model

import convert
import eval as evaluation
import sample
import train
from loopus import Halt

SMALL = [
    "--steps=4",
    "--batch=2",
    "--accumulate=1",
    "--context=32",
    "--max_loops=4",
    "--supervised=2",
    "--eval_tokens=256",
]


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
    assert (
        command(sample, *arguments, "--shared", "--max_loops=1")[1] == command(sample, *arguments, "--max_loops=1")[1]
    )
    assert "\x1b" not in text  # no colours where nobody looks
    assert command(sample, *arguments)[1] == text
    assert command(sample, *arguments[:-1], "--seed=5")[1] != text
    code, text, _ = command(sample, "--prompt=def ", "--trace", "--max_loops=3")
    rows = text.splitlines()
    assert code == 0 and len(rows) == 5 and rows[1].startswith("base") and rows[4].split()[0] == "3"


def test_the_trace_marks_where_the_rule_stops(command, checkpoint):
    directory, _ = checkpoint
    for rule, at in ((["--threshold=0.1"], 1), (["--threshold=2"], None), (["--halt=cdf", "--threshold=0.8"], 3)):
        # an untrained head says 0.5: Π (1 − q) is 1/2, 1/4, 1/8
        code, out, _ = command(sample, f"--init={directory}", "--prompt=def", "--trace", "--max_loops=5", *rule)
        rows = [line.split()[0] for line in out.splitlines() if "← exit" in line]
        assert code == 0 and rows == ([str(at)] if at else [])
    rule = ["--halt=convergence", "--epsilon=1e9", "--min_loops=2"]
    _, out, _ = command(sample, f"--init={directory}", "--prompt=def", "--trace", "--max_loops=5", *rule)
    assert [line.split()[0] for line in out.splitlines() if "← exit" in line] == ["2"]


def test_rules_on_the_command_line(command, checkpoint):
    directory, text = checkpoint
    looped, greedy = f"--init={directory}", ["--prompt=def ", "--max_new_tokens=5", "--temperature=0"]
    code, _, line = command(sample, looped, *greedy, "--compile", "--dtype=fp32", "--threshold=2", "--max_loops=3")
    assert code == 0 and "3.00 passes each" in line
    for rule in (["--halt=convergence", "--epsilon=1e9"], ["--halt=cdf", "--threshold=0"]):
        code, _, line = command(sample, looped, *greedy, "--dtype=fp32", *rule, "--min_loops=2", "--max_loops=4")
        assert code == 0 and "2.00 passes each" in line
        code, out, _ = command(evaluation, looped, f"--data={text}", "--context=32", "--tokens=64", *rule, "--json")
        report = json.loads(out)
        assert code == 0 and report["rule"] == rule[0].split("=")[1] and report["exit"]["mean_passes"] == 1


def test_evaluation_agrees_with_plain_sums(checkpoint):
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
    model, cuts = checkpoint[0], ["--encoder_layers=1", "--decoder_layers=1"]
    code, out, err = command(evaluation, "--task=speed", model, "--tokens=8", *cuts)
    rows = [line.split() for line in out.splitlines()[2:6]]
    assert code == 0 and [row[0] for row in rows] == ["1", "2", "4", "8"], err
    assert all(float(x) > 0 for row in rows for x in row[1:4])
    more = [f"--data={checkpoint[1]}", "--dtype=int8", "--threshold=2", "--uncached"]
    code, out, err = command(evaluation, "--task=speed", model, "--tokens=8", *more, *cuts)
    assert code == 0 and out.count("held-out loss") == 5 and "uncached s" in out, err
    code, out, err = command(evaluation, "--task=speed", model, "--train", "--way=bf16", "--context=32", *cuts)
    seconds, tokens, tflop = map(float, out.split()[1:4])
    assert code == 0 and abs(tokens - 64 / seconds) < 0.5 * tokens and tflop >= 0, err


def test_the_whole_story_in_small(command, tmp_path):
    arguments = ["--steps=2", "--eval_tokens=1024", f"--out={tmp_path / 'story'}"]
    code, out, err = command(train, *arguments)
    assert code == 0, err
    assert (tmp_path / "story" / "base" / "step-0000006" / "model.safetensors").exists()
    table = out.split("held-out loss, nats per byte")[1].splitlines()
    assert [line.split()[0] for line in table[1:9]] == ["base", "control"] + ["looped"] * 6
    assert all(0 < float(line.split()[-1]) < 7 for line in table[1:9])
    begun = time.time()
    (convert.cache_dir() / "last").write_text("elsewhere")
    code, again, _ = command(train, *arguments)  # every stage is there: only the table is made again
    assert code == 0 and again.count("done before") == 3 and "lr" not in again
    assert again.split("nats per byte")[1].splitlines()[1:9] == table[1:9] and time.time() - begun < 120
    assert str(convert.resolve("")).endswith("loop/step-0000002")


def test_profile_and_conversion(command, checkpoint, tmp_path):
    directory, text = checkpoint
    code, out, _ = command(convert, directory, "--profile", "--encoder_layers=1", "--decoder_layers=1")
    assert code == 0 and out.count("layer ") == 5 and "by the rule" in out and out.count("cut ") == 5
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
    wrong(command(train, init, out), "no --data")
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


def test_a_run_is_not_overwritten(command, checkpoint, tmp_path):
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


def test_full_disk_ends_training_with_the_old_checkpoint_whole(command, checkpoint, tmp_path):
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


@pytest.mark.parametrize("number, update", [(signal.SIGTERM, "batch"), (signal.SIGINT, "depth")])
def test_asked_to_stop_it_saves_and_goes_on_later(checkpoint, tmp_path, number, update):
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
def test_killed_again_and_again_it_is_the_run_that_never_was(checkpoint, tmp_path):
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
def test_two_processes_are_one(checkpoint, tmp_path, command):
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
    flags += ["--trains=all"]  # the encoder: in some steps only
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
def test_each_process_holds_its_share(tmp_path):
    """Of two, half of the float32 weights and gradients, while passes run in bf16."""
    (tmp_path / "share.py").write_text(SHARE)
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29518", str(tmp_path / "share.py")]
    paths = os.environ | dict(PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    ended = subprocess.run([sys.executable, *launch], cwd=ROOT, capture_output=True, text=True, env=paths)
    assert ended.returncode == 0, ended.stderr


def test_no_finite_gradient_and_damage_end_in_one_line(command, checkpoint, tmp_path):
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
    assert code == 0 and "step-0000007 is damaged" in err and "trying the one before" in err and "step 5  lm" in out
    short = tmp_path / "run" / "step-0000006" / "model.safetensors"
    short.write_bytes(short.read_bytes()[:-1000])
    code, _, err = command(train, "--resume", *run, "--steps=100")
    assert code == 1 and err.count("is damaged") == 2 and "holds no checkpoint" in err and "Traceback" not in err


def test_out_of_memory_is_one_line(monkeypatch, capsys):
    for too_much in (lambda: torch.empty(1 << 50), lambda: exec("raise torch.OutOfMemoryError('CUDA out of memory')")):
        with pytest.raises(SystemExit, match="error: out of memory: turn down --batch"):
            convert.run(too_much)
    with pytest.raises(RuntimeError, match="must match"):
        convert.run(lambda: torch.ones(2) + torch.ones(3))


def test_on_a_terminal_it_asks_and_tints(tmp_path):
    convert.save(random_model("gpt2"), convert.byte_tokenizer(), tmp_path / "tiny")
    ours, theirs = pty.openpty()
    arguments = [sys.executable, "sample.py", f"--init={tmp_path / 'tiny'}", "--max_new_tokens=20", "--max_loops=4"]
    process = subprocess.Popen(arguments, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ)
    os.close(theirs)
    seen, asked = b"", 0
    deadline = time.time() + 60
    while time.time() < deadline:
        if select.select([ours], [], [], 0.2)[0]:
            try:
                seen += os.read(ours, 65536)
            except OSError:
                break
        if seen.count(b"\n> ") > asked:
            asked += 1
            os.write(ours, [b"def f\n", b"class\n", b"\n"][asked - 1])
    process.wait(10)
    text = seen.decode("utf-8", "replace")
    assert process.returncode == 0 and asked == 3
    assert text.count("passes: ") == 2 and "\x1b[38;5;75m1\x1b[0m" in text and text.count("20 tokens,") == 2


@pytest.mark.parametrize("program", ["train", "sample", "eval", "convert"])
def test_help_lists_every_flag(program):
    ended = subprocess.run([sys.executable, f"{program}.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    module = dict(train=train, sample=sample, eval=evaluation, convert=convert)[program]
    positional = ("src", "out") if program == "convert" else ()
    assert ended.returncode == 0
    for name in module.Settings.__dataclass_fields__:
        assert (name if name in positional else f"--{name}") in ended.stdout
