"""Training: its steps, its log, runs that go on where they ended, their directories, signals, processes, the story."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, random_model
from speed import step_flops
from test_sample import refused
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import convert
import eval as evaluation
import sample
import train
from train import Settings

pytestmark = pytest.mark.usefixtures("checkpoint")  # each test in a directory of its own, with a model and text.txt
EXACTLY = dict(atol=0, rtol=0, equal_nan=True)


def small(out="run", **more):
    """Settings of a run that takes a second."""
    values = dict(init="tiny", data="text.txt", out=out, steps=6, batch=2, accumulate=2, context=32, max_loops=4)
    values |= dict(supervised=2, log_every=1, eval_every=3, eval_tokens=256, device="cpu", dtype="fp32")
    return Settings(**values | more)


def flags(s):
    """Settings as a user types them."""
    given = asdict(s).items() - asdict(Settings()).items()
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in given]


def log(out="run"):
    """The lines of a run's log.jsonl: those of its steps, and those of its evaluations."""
    rows = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    return [row for row in rows if "held_out" not in row], [row for row in rows if "held_out" in row]


def saved(out="run"):
    return sorted(path.name for path in Path(out).glob("step-*"))


def state(directory):
    """All tensors of a checkpoint: weights, and what the optimizer keeps of each."""
    kept = torch.load(directory / "optimizer.pt", weights_only=True)["optimizer"]["state"]
    weights = convert.load(directory)[0].state_dict()
    return weights | {f"{i} {name}": x for i, moments in kept.items() for name, x in moments.items()}


# ---- A step
def test_which_parameters_train(model):
    frozen = {"wte", "wpe", "encoder"} & {name.split(".")[0] for name, _ in model.named_parameters()}
    for given, still in (({}, frozen), (dict(trains="all"), set()), (dict(objective="lm"), {"gate", "q_head"})):
        optimizer = train.make_optimizer(model, Settings(**given))
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, p in model.named_parameters():
            assert p.requires_grad == (id(p) in trained) == (name.split(".")[0] not in still), name


def test_micro_batches_read_each_window_once_per_epoch_in_a_new_order():
    s = Settings(batch=2, context=10)
    batches = [train.micro_batch(np.arange(101), s, i) for i in range(10)]
    starts = [int(row[0]) for x, _ in batches for row in x]
    assert sorted(starts[:10]) == sorted(starts[10:]) == list(range(0, 100, 10))
    assert starts[:10] != starts[10:]
    assert all(torch.equal(y, x + 1) for x, y in batches)
    assert not torch.equal(batches[3][0], train.micro_batch(np.arange(101), replace(s, seed=1), 3)[0])


def test_the_learning_rate_warms_up_and_decays_to_a_tenth():
    s = Settings(lr=1.0, steps=1000, warmup=100)
    rates = [train.learning_rate(s, step) for step in (0, 99, 100, 550, 999)]
    assert rates == pytest.approx([0.01, 1, 1, 0.55, 0.1], abs=1e-3)
    assert train.learning_rate(replace(s, steps=100), 9) == 1.0  # it warms up in a tenth of the steps at most


@pytest.mark.parametrize("span, supervised", [(1, [1, 3]), (2, [2, 1]), (3, [4]), (1, [0]), (9, [2])])
def test_step_flops_are_those_that_torch_counts(span, supervised):
    model = random_model("llama")
    run = train.Run(model, model, None, None, None, None, False, [])
    x = torch.randint(0, 257, (2, 12))
    for more in (dict(span=span), dict(span=span, trains="all"), dict(objective="lm")):
        s = Settings(batch=2, accumulate=1, context=12, **more)
        train.make_optimizer(model, s)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            for terms in train.supervised_losses(run, s, x, x, supervised):
                sum(terms).backward()
        flops = step_flops(model, s, supervised)
        model.config.n_head = 0
        attention = flops - step_flops(model, s, supervised)
        model.config.n_head = 4
        counted = counter.get_total_flops()  # attention also to later tokens, which is as much again
        assert flops + attention == pytest.approx(counted, rel=0.01)


def test_bf16_gradients_and_losses_follow_fp32():
    exact, coarse = (state(train.train(small(of, dtype=of, lr=3e-3, steps=10))) for of in ("fp32", "bf16"))
    for name in exact:
        a, b = exact[name].flatten(), coarse[name].flatten()
        assert a.dtype == b.dtype == torch.float32
        if name.endswith("exp_avg"):  # a mean of gradients
            assert a @ b >= 0.97 * a.norm() * b.norm(), name
    for row, expected in zip(log("bf16")[0], log("fp32")[0], strict=True):
        assert [row["lm"], row["grad_norm"]] == pytest.approx([expected["lm"], expected["grad_norm"]], rel=0.04)


@pytest.mark.parametrize("objective, close", [("lm", 1e-5), ("loop", 0.02)])  # L_mono is not linear in L_LM
@pytest.mark.parametrize("data", ["text.txt", "chats.jsonl"])
def test_a_step_is_the_same_however_it_is_split_into_micro_batches(data, objective, close):
    turns = [dict(prompt="ab" * (7 * i % 60), completion="cd" * (11 * i % 50)) for i in range(99)]
    Path("chats.jsonl").write_text("\n".join(map(json.dumps, turns)))  # windows with much, little, nothing to learn
    for size in (16, 4, 1):
        train.train(small(f"of {size}", data=data, objective=objective, batch=size, accumulate=16 // size, steps=1))
        [row], [whole] = log(f"of {size}")[0], log("of 16")[0]
        assert row["lm"] == pytest.approx(whole["lm"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(whole["grad_norm"], rel=close)


def test_confidence_and_span_change_the_run():
    choices = ({}, dict(confidence="sequence"), dict(span=2))
    ends = [state(train.train(small(str(more), steps=2, **more)))["lm_head.weight"].sum() for more in choices]
    assert len(set(map(float, ends))) == 3


def test_checkpointing_keeps_less_for_the_same_run():
    def kept_in(s):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.nbytes) or x, lambda x: x):
            train.train(s)
        return sum(sizes)

    assert kept_in(small(checkpointing=True)) < 0.4 * kept_in(small("plain"))
    torch.testing.assert_close(*(state(Path(out, "step-0000006")) for out in ("run", "plain")), **EXACTLY)


def test_a_step_whose_gradient_is_not_finite_is_left_out_and_logged():
    model = random_model("gpt2")
    model.wte.weight.data[1] = 3e38  # for whoever reads this byte
    convert.save(model, convert.byte_tokenizer(), "huge")
    Path("once.txt").write_bytes(b"a" * 99 + b"\x01" + b"a" * 285)  # 12 windows: an epoch
    train.train(small(init="huge", data="once.txt", val="text.txt", accumulate=1, eval_every=1, keep=9))
    steps, _ = log()
    [i] = [row["step"] - 1 for row in steps if row["lm"] is row["grad_norm"] is None]
    before, after, later = (state(path) for path in train.checkpoints("run")[i - 1 : i + 2])
    torch.testing.assert_close(after, before, **EXACTLY)
    assert not torch.equal(later["lm_head.weight"], after["lm_head.weight"])


def test_the_log_has_the_losses_and_speed_of_steps_and_the_held_out_loss_of_each_depth(monkeypatch, capsys):
    seconds = [0]
    train_step = train.train_step
    monkeypatch.setattr(train.time, "time", lambda: sum(seconds))
    monkeypatch.setattr(train, "train_step", lambda *given: seconds.append(2) or train_step(*given))
    train.train(small(lr=1e-3, log_every=2))
    steps, held_out = log()
    for row, step in zip(steps, (1, 2, 4, 6), strict=True):
        assert list(row)[:6] == ["step", "lm", "mono", "q", "grad_norm", "tokens_per_second"]
        expected = dict(step=step, tokens_per_second=2 * 2 * 32 / 2, seconds_left=2 * (6 - step))
        assert expected.items() <= row.items()
    assert [(row["step"], *row["held_out"]) for row in held_out] == [(step, *"0124") for step in (0, 3, 6)]
    assert held_out[2]["held_out"]["1"] < held_out[0]["held_out"]["1"]  # it learns
    out = capsys.readouterr().out
    assert f"step 4  lm {steps[2]['lm']}  mono" in out
    table = [f"{row['step']:>11}" + "".join(f"{x:>11}" for x in row["held_out"].values()) for row in held_out]
    assert table[0] in out and table[1] not in out and table[2] in out  # at the end: before, and after


@pytest.mark.parametrize("sure", [True, False])
def test_a_run_ends_in_a_threshold_that_suits_the_model_and_other_programs_take_it(command, monkeypatch, sure):
    enough = {0.9: 1.005, 0.95: 1.0} if sure else {2.0: 1.0}

    def held_out_losses(model, held_out, batch, depths, halt=None, max_loops=4):
        losses = dict.fromkeys(depths, 1.0)
        return losses | ({"exit": enough.get(halt.threshold, 9.0)} if halt else {}), torch.ones(5)

    monkeypatch.setattr(train, "held_out_losses", held_out_losses)
    directory = train.train(small())
    model, _ = convert.load(directory)
    assert model.config.q_threshold == (0.9 if sure else 2.0)
    _, _, err = command(sample, f"--init={directory}", "--prompt=a", "--max_new_tokens=1")
    assert f"--threshold={model.config.q_threshold}, as the model was trained\n" in err
    convert.save(model, None, "again")
    assert convert.load("again")[0].config.q_threshold == model.config.q_threshold


def test_ids_in_a_bin_file_are_trained_on():
    convert.load_tokens([Path("text.txt")], convert.byte_tokenizer()).astype(np.uint16).tofile("ids.bin")
    ends = [train.train(small(out, data=data, steps=1)) for out, data in (("bin", "ids.bin"), ("text", "text.txt"))]
    torch.testing.assert_close(*map(state, ends), **EXACTLY)


# ---- A run that goes on
@pytest.mark.parametrize("objective", ["loop", "lm"])
def test_a_resumed_run_is_bit_for_bit_the_run_that_was_never_interrupted(objective):
    whole = train.train(small("whole", objective=objective))
    shutil.copytree("whole/step-0000003", "run/step-0000003")
    resumed = train.train(small(objective=objective, resume=True))
    torch.testing.assert_close(state(resumed), state(whole), **EXACTLY)
    assert [row["step"] for row in log()[0]] == [4, 5, 6]


def test_a_gate_start_starts_the_gate_of_a_checkpoint_anew_but_not_in_a_resumed_run():
    s = small(init=str(train.train(small("control", objective="lm"))), gate_start="0.25", lr=1e-2)
    gate = train.setup(s).model.gate
    torch.testing.assert_close(gate.alpha(torch.randn(1, 2, 32)), torch.full((1, 2, 32), 0.25))
    end, _ = convert.load(train.train(s))
    assert torch.equal(train.setup(replace(s, resume=True)).model.gate.up.bias, end.gate.up.bias)


def test_resume_refuses_what_it_cannot_go_on_with_and_says_the_way_out(command):
    resume = partial(command, train, "--resume", "--out=run")
    refused(resume(), "--resume: run holds no checkpoint; start without --resume")
    end = train.train(small())
    refused(resume("--steps=5"), "run is at step 6, beyond --steps=5")
    fixed = ("init=gpt2", "objective=lm", "trains=all", "encoder_layers=2", "decoder_layers=2", "gate_start=s4d")
    for given in (*fixed, "data=tiny", "recipe=paper"):
        refused(resume(f"--{given}"), f"--{given.split('=')[0]} cannot change in a resumed run", "leave it out")
    stated = (end / "settings.json").read_text()
    for other in (stated.replace('"span"', '"through"'), stated.replace('"steps": 6', '"steps": "6"'), "{}"):
        (end / "settings.json").write_text(other)
        refused(resume(), "run/step-0000006/settings.json: ")
    (end / "settings.json").write_text(stated)
    (end / "optimizer.pt").write_bytes(b"PK" + bytes(1000))
    refused(resume(), "run/step-0000006/optimizer.pt (without step-0000006, --resume takes the one before)")
    end.rename("damaged")
    resume()
    assert [row["step"] for row in log()[0]] == [1, 2, 3, 4, 5, 6, 4, 5, 6]


def test_a_checkpoint_remembers_its_settings_and_the_files_of_data(command):
    Path("texts").mkdir()
    Path("texts/a.txt").write_text("a text " * 999)
    s = small(data="texts", steps=1)
    train.train(s)
    Path("texts/b.txt").write_text("another one " * 99)
    _, out, _ = command(train, "--resume", "--out=run", "--steps=2", "--new_lr_factor=3")
    assert " 6,645 tokens, " in out  # of 7 × 999 + 1, without the last 20th
    changed = dict(resume=True, steps=2, new_lr_factor=3, files=[str(Path("texts/a.txt").resolve())])
    assert json.loads(Path("run/step-0000002/settings.json").read_text()) == asdict(s) | changed
    for group in torch.load("run/step-0000002/optimizer.pt")["optimizer"]["param_groups"]:
        assert group["lr"] == train.learning_rate(replace(s, steps=2), 1) * (3 if group["new"] else 1)


# ---- The directory of a run
@pytest.mark.parametrize("more, expected", [
    (dict(out="tiny"), "--out=tiny holds a model: name a directory for the run"),
    (dict(out="old"), "old holds a run, at step-0000009: --resume it, or name another --out"),
    (dict(supervised=6), "--supervised=6 of --max_loops=4: expected K, 1 to B"),
    (dict(context=65), "65 tokens do not fit the model's context of 64"),
    (dict(data="none.txt"), "none.txt: no file with text"),
    (dict(data=""), "no name: no file with text"),  # as of a variable that is not set
    (dict(data="short.txt", val="text.txt"), "5 tokens do not fill a context of 32"),
])  # fmt: skip
def test_what_cannot_be_trained_is_refused_in_one_line(command, more, expected):
    Path("old/step-0000009").mkdir(parents=True)  # whatever it holds
    Path("short.txt").write_text("four")
    refused(command(train, *flags(small(**more))), expected)


def test_keep_checkpoints_stay_and_all_that_the_user_put_beside_them(command):
    train.train(small(steps=4, eval_every=1, keep=2))
    assert saved() == ["step-0000003", "step-0000004"]
    run = Path("run")
    shutil.copytree(run / "step-0000004", run / "step-0000004-best")
    shutil.copytree(run / "step-0000004", run / "step-0000004.new-lr")
    shutil.copytree(run / "step-0000004", run / "step-0000004.new-12ab34cd")  # which a crash leaves
    (run / "step-0000001").symlink_to(Path("tiny").resolve())
    (run / "step-0000002").write_text("mine, and no directory")
    mine = [*Path("tiny").iterdir(), *(run / "step-0000004-best").iterdir(), run / "step-0000002"]
    before = [path.read_bytes() for path in mine]
    assert command(train, "--resume", "--out=run", "--steps=6")[0] == 0
    assert [path.read_bytes() for path in mine] == before
    assert saved() == [f"step-000000{n}" for n in ("1", "2", "4-best", "4.new-lr", "5", "6")]


# ---- Signals
def interrupted(s, line, number, meanwhile=lambda: None):
    """Train in another process and, when it has printed this line, send it a signal. → exit code, standard error"""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, ROOT / "train.py", *flags(s)], **pipes) as process:
        assert any(line in printed for printed in process.stdout)
        meanwhile()
        process.send_signal(number)
        _, err = process.communicate()
    return process.returncode, err


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_during_a_step_saves_what_is_done_and_says_how_to_go_on(command, number):
    code, err = interrupted(small(steps=2000, accumulate=1, eval_every=2000), "step 3  lm", number)
    step = log()[0][-1]["step"]
    last = f"stopped by a signal after step {step}; --resume --out=run goes on"  # between steps the only line
    assert (code, err.splitlines()[-1]) == (1, last)
    assert saved() == [f"step-{step:07d}"]
    assert command(train, "--resume", "--out=run", f"--steps={step + 2}")[0] == 0
    assert [row["step"] for row in log()[0]] == list(range(1, step + 3))


def test_a_signal_before_the_first_step_saves_nothing_and_says_so():
    s = small(val="text.txt", eval_tokens=10**6)  # whose first evaluation takes seconds
    ended = interrupted(s, "loop: 1 + 3 + 1 layers", signal.SIGINT, lambda: time.sleep(0.5))
    assert ended == (1, "stopped by a signal after step 0; nothing is saved yet\n")
    assert saved() == []


@pytest.mark.slow
def test_a_run_that_is_killed_twenty_times_while_it_saves_and_rotates_ends_as_the_one_that_was_not(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["train"])  # torch is imported once
    often = dict(steps=200, accumulate=1, max_loops=2, eval_every=1, eval_tokens=32)
    whole = train.train(small("whole", **often))
    for _ in range(20):
        process = processes.Process(target=train.train, args=[small(resume=bool(train.checkpoints("run")), **often)])
        before = saved()
        process.start()
        while process.is_alive() and saved() == before:
            time.sleep(0.01)
        process.join(np.random.uniform(0, 0.1))
        process.kill()
        process.join()
    end = train.train(small(resume=True, **often))
    torch.testing.assert_close(state(end), state(whole), **EXACTLY)
    assert saved() == ["step-0000199", "step-0000200"]


# ---- Several processes
PROGRAM = """
import sys, convert, train
tokenise, save_checkpoint = convert.tokenise, train.save_checkpoint
def share(run):
    own = [p.to_local() if run.sharded else p for p in run.model.parameters()]
    return sum(part.numel() for part in own) / sum(p.numel() for p in run.model.parameters())
convert.tokenise = lambda *given: print("tokenised by", train.rank(), file=sys.stderr) or tokenise(*given)
train.save_checkpoint = lambda run, s: print(f"holds {share(run):.1f}", file=sys.stderr) or save_checkpoint(run, s)
convert.run(train.main)
"""


def launched(processes, *given, code=0):
    """train.py in one process or two ends with this code. → its standard error"""
    Path("program.py").write_text(PROGRAM)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if processes == 2 else []
    paths = os.environ | dict(PYTHONPATH=str(ROOT))
    ended = subprocess.run([sys.executable, *launcher, "program.py", *given], env=paths, capture_output=True, text=True)
    assert ended.returncode == code and "Warning" not in ended.stderr, ended.stderr
    return ended.stderr


@pytest.mark.slow
def test_one_process_two_two_that_share_the_weights_and_a_compiled_one_train_alike_and_go_on_from_each_other():
    s = dict(steps=4, eval_every=2, accumulate=4, trains="all")
    assert "cannot be shared by 2 processes" in launched(2, *flags(small(accumulate=3)), code=1)
    said = launched(2, *flags(small("two", **s)))
    assert said.count("tokenised by") == said.count("tokenised by 0") == 1  # the other one waits
    assert launched(2, *flags(small("shared", shard=True, **s))).count("holds 0.5") == 6
    assert launched(1, *flags(small("one", **s))).count("holds 1.0") == 3
    launched(1, *flags(small("compiled", compile=True, **s)))
    shutil.copytree("one/step-0000002", "one then shared/step-0000002")
    launched(2, "--resume", "--out=one then shared", "--shard")
    shutil.copytree("shared/step-0000002", "shared then one/step-0000002")
    launched(1, "--resume", "--out=shared then one", "--no-shard")
    expected, _ = log("one")
    for out, first in (("two", 0), ("shared", 0), ("compiled", 0), ("one then shared", 2), ("shared then one", 2)):
        for row, one in zip(log(out)[0], expected[first:], strict=True):
            for name in ("lm", "mono", "q"):
                assert row[name] == pytest.approx(one[name], abs=1e-5)
            assert row["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
        ends = [state(Path(run, "step-0000004")) for run in (out, "one")]
        torch.testing.assert_close(*ends, atol=1e-4, rtol=1e-3)
    convert.save(random_model("llama"), convert.byte_tokenizer(), "rotary", "hf")  # whose angles stay in float32
    for processes, out in ((1, "one in bf16"), (2, "two in bf16")):
        launched(processes, *flags(small(out, init="rotary", dtype="bf16", steps=1, shard=processes == 2)))
    assert log("two in bf16")[1][0]["held_out"] == pytest.approx(log("one in bf16")[1][0]["held_out"], abs=1e-4)


# ---- The whole story, without --init
def test_the_answers_of_a_list_follow_from_its_text_and_alone_are_learned_and_it_is_asked_as_it_was_read():
    path = Path("lists.jsonl")
    train.write_lists(path, 6, [1, 2, 3, 4, 8], 0)
    tokenizer = train.list_tokenizer()
    rows = convert.rows(convert.load_tokens([path], tokenizer), range(0, 245, 49), 49)  # a document fills a window
    for line, x, y, asked in zip(path.open(), *rows, evaluation.read_answers(path, tokenizer, 49)):
        document = json.loads(line)
        *contents, question = document["prompt"][0].split()
        holds = dict(zip(train.SLOTS, contents, strict=True))
        slots = [question, *(prompt.strip() for prompt in document["prompt"][1:])]
        assert len(set(slots)) == 12
        for slot, answer, kind in zip(slots, document["completion"], document["kind"], strict=True):
            distance = 1
            while holds[slot] in holds:
                slot = holds[slot]
                distance += 1
            assert (answer, kind) == (f" {holds[slot]}", f"{distance} links")
        pairs = [prompt + answer for prompt, answer in zip(document["prompt"], document["completion"])]
        assert tokenizer.decode(x.tolist()) == "".join(pairs) + "<|endoftext|>"
        assert tokenizer.decode(y[y >= 0].tolist()) == "".join(document["completion"]) + "<|endoftext|>"
        assert asked[0] == x[:48].tolist()


@pytest.mark.slow
def test_the_story_ends_with_a_table_and_is_trained_neither_twice_nor_with_other_settings(command):
    refused(command(train, "--data=text.txt"), "--data without --init: name the model that is to be trained")
    tables = []
    config = Path("story/loop/step-0000002/config.json")

    def without_its_threshold():
        config.write_text(json.dumps(json.loads(config.read_text()) | dict(q_threshold=0.123)))

    for broken_off in (lambda: shutil.rmtree("story/loop"), without_its_threshold, lambda: None):
        _, out, _ = command(train, "--out=story", "--steps=2")
        tables.append([line.split() for line in out.split("share of right answers")[1].splitlines()[1:11]])
        broken_off()
    for name in ("base", "control", "loop"):
        log = [json.loads(line) for line in Path("story", name, "log.jsonl").read_text().splitlines()]
        assert [record["step"] for record in log if "lm" in record] == [1, 2]
    assert tables[0] == tables[1] == tables[2]
    assert json.loads(config.read_text())["q_threshold"] in train.THRESHOLDS
    names, *rows = tables[0]
    assert set(names) == {"base", "control", "1", "2", "4", "8", "exit", "passes"}
    assert [" ".join(row[:-8]) for row in rows] == [*(f"{n} links" for n in range(1, 9)), "mean"]
    for other in ("--lr=1e-3", "--steps=3"):
        refused(command(train, "--out=story", "--steps=2", other), "trained with other settings: name another --out")
