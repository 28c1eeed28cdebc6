"""Training: the losses of §3.2, where gradients go and where not, bf16, memory, data order, schedule, resume."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import random_model
from torch.utils.flop_counter import FlopCounterMode

import convert
import train
from loopus import deep_supervision, losses, precise
from train import Settings


def batch(T=12):
    torch.manual_seed(3)
    idx = torch.randint(0, 257, (2, T + 1))
    return idx[:, :-1], idx[:, 1:]


def one_pass(model, x):
    """A state without graph, and the one that a pass makes of it."""
    h_before = model.encode(x).detach()
    return h_before, model.refine(h_before)


def test_losses_are_those_of_a_plain_computation(model):
    x, y = batch()
    h_before, h = one_pass(model, x)
    lm, mono, q_loss = losses(model, h, h_before, y, y)

    def nll(h):  # the mean over tokens of −log p(next token), written out
        return -torch.log_softmax(model.decode(h), -1).gather(-1, y[..., None]).mean()

    right = (model.decode(h).argmax(-1) == y).float()
    q = torch.sigmoid(model.confidence(h))
    bce = -(right * q.log() + (1 - right) * (1 - q).log()).mean()
    difference = nll(h) - nll(h_before)
    torch.testing.assert_close(lm, nll(h))
    torch.testing.assert_close(mono, difference * torch.sigmoid(difference))
    torch.testing.assert_close(q_loss, bce)


def test_masked_targets_do_not_count(model):
    x, y = batch()
    h_before, h = one_pass(model, x)
    masked = y.clone()
    masked[:, :5] = -100
    lm, _, q_loss = losses(model, h, h_before, masked, masked)
    logits = model.decode(h)[:, 5:]
    torch.testing.assert_close(lm, F.cross_entropy(logits.flatten(0, 1), y[:, 5:].flatten()))
    right = (logits.argmax(-1) == y[:, 5:]).float()
    torch.testing.assert_close(q_loss, F.binary_cross_entropy_with_logits(model.confidence(h)[:, 5:], right))


def test_confidence_per_sequence_is_equation_13(model):
    x, y = (part.clone() for part in batch())
    y[1, 3:] = -100
    h_before, h = one_pass(model, x)
    right = (model.decode(h).argmax(-1) == y).float()
    q = torch.sigmoid(model.confidence(h)[:, -1])  # of the last token
    share = torch.stack((right[0].mean(), right[1, :3].mean()))
    bce = -(share * q.log() + (1 - share) * (1 - q).log())
    q_loss = losses(model, h, h_before, y, y, train.sequence_confidence_loss)[2]
    torch.testing.assert_close(q_loss, bce.mean())
    y[1] = -100  # nothing to learn there
    q_loss = losses(model, h, h_before, y, y, train.sequence_confidence_loss)[2]
    torch.testing.assert_close(q_loss, bce[0])


def test_an_update_per_supervised_pass(model):
    """Fig. 4: the optimizer steps after each; the loss before the next one is then that of the new weights."""
    x, y = batch()
    by_hand = random_model("gpt2" if model.config.norm == "layer" else "llama")
    optimizers = [train.make_optimizer(m, Settings()) for m in (model, by_hand)]
    for terms in deep_supervision(model, x, y, [1, 2]):
        sum(terms).backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
    h = by_hand.refine(by_hand.encode(x)).detach()
    for _ in (1, 2):
        h_before, h = h, by_hand.refine(h)
        expected = losses(by_hand, h, h_before, y, y)
        sum(expected).backward()
        h = h.detach()
        optimizers[1].step()
        optimizers[1].zero_grad()
    torch.testing.assert_close(torch.stack(terms), torch.stack(expected))
    for p, q in zip(model.parameters(), by_hand.parameters()):
        torch.testing.assert_close(p, q)


def test_confidence_of_tokens_that_are_only_read_is_trained(model):
    """L_Q is over all tokens whose next one is known, learned or not; the others' terms are over the learned ones."""
    x, y = batch()
    masked = y.clone()
    masked[:, :7] = -100
    masked[1, -1] = -100  # nobody knows what follows
    [(lm, _, q_loss)] = deep_supervision(model, x, masked, [0])
    h = model.refine(model.encode(x))
    logits = model.decode(h)
    torch.testing.assert_close(lm, F.cross_entropy(logits.flatten(0, 1), masked.flatten()))
    right = (logits.argmax(-1) == y).float()
    bce = F.binary_cross_entropy_with_logits(model.confidence(h), right, reduction="none")
    torch.testing.assert_close(q_loss, (bce.sum() - bce[1, -1]) / (y.numel() - 1))


def gradients(model, run):
    """The gradients of all parameters after run(), and none left."""
    run()
    found = {name: p.grad for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = None
    return found


def plain_deep_supervision(model, x, y, supervised, span):
    """One graph for each supervised pass, from a state without graph: what came before is run anew for each."""
    last = -1
    for b in sorted(supervised):
        first = max(b - span + 1, last + 1, 0)  # of the passes with gradient
        with torch.set_grad_enabled(first == 0 and b - span < 0):
            h = model.encode(x)
        with torch.no_grad():
            for _ in range(first):
                h = model.refine(h)
        for _ in range(first, b + 1):
            h_before, h = h, model.refine(h)
        logits = model.decode(h)
        lm = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        before = F.cross_entropy(model.decode(h_before).flatten(0, 1), y.flatten()).item()  # a number: no gradient
        q = F.binary_cross_entropy_with_logits(model.confidence(h), (logits.argmax(-1) == y).float())
        (lm + F.silu(lm - before) + q).backward()
        last = b


@pytest.mark.parametrize("trained", ["middle", "all"])
@pytest.mark.parametrize("supervised", [[0], [3], [4, 1], [1, 2], [0, 5, 3]])
@pytest.mark.parametrize("span", [1, 2, 3, 9])
def test_gradients_cross_the_span_and_no_more(model, trained, supervised, span):
    """Never past the last supervised pass, nor past h⁰ unless the encoder trains; none through the loss before."""
    x, y = batch(6)
    train.make_optimizer(model, Settings(trains=trained))

    def run():
        for terms in deep_supervision(model, x, y, supervised, span):
            sum(terms).backward()

    found = gradients(model, run)
    expected = gradients(model, lambda: plain_deep_supervision(model, x, y, supervised, span))
    for name, gradient in expected.items():
        assert (gradient is None) == (found[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-3, msg=name)
    reaches = trained == "all" and min(supervised) < span
    for name in found:
        if name.startswith(("wte", "wpe", "encoder")):
            assert (found[name] is not None) == reaches, name
    assert found["gate.down.weight"].abs().max() > 0 and found["reasoning.0.qkv.weight"].abs().max() > 0


def test_passes_after_the_last_supervised_one_do_not_run(model):
    x, y = batch(2)
    calls, refine = [], model.refine
    model.refine = lambda *arguments: calls.append(1) or refine(*arguments)
    for supervised in ([1, 3], [2, 1], [0]):
        calls.clear()
        assert len(list(deep_supervision(model, x, y, supervised))) == len(supervised)
        assert len(calls) == max(supervised) + 1


def saved_bytes(model, x, y, passes, span=1):
    """Most bytes that the graph of random deep supervision held at once."""
    held = {"now": 0, "most": 0}

    class Kept:
        def __init__(self, t):
            self.t, self.size = t, t.numel() * t.element_size()
            held["now"] += self.size
            held["most"] = max(held["most"], held["now"])

        def __del__(self):
            held["now"] -= self.size

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.t):
        for terms in deep_supervision(model, x, y, [passes - 2, passes - 1], span):
            sum(terms).backward()
    return held["most"]


def test_memory_depends_on_the_span_and_not_on_the_passes(model):
    x, y = batch()
    few, many = saved_bytes(model, x, y, 4), saved_bytes(model, x, y, 20)
    assert few > 10000 and abs(many / few - 1) < 0.05
    spanned = saved_bytes(model, x, y, 20, span=4)
    assert spanned > 1.5 * few and abs(saved_bytes(model, x, y, 8, span=4) / spanned - 1) < 0.05
    train.checkpoint_layers(model)
    assert saved_bytes(model, x, y, 4) < 0.4 * few


def gradients_of(dtype):
    """Gradients of the first step in a dtype, and its loss terms after some optimizer steps."""
    model = random_model("llama").train()
    for p in model.parameters():
        p.data *= 0.5  # tame enough for 8 bits of mantissa
    optimizer = train.make_optimizer(model, Settings(lr=3e-3))
    fast = model if dtype == torch.float32 else train.computing_copy(model, dtype)
    x, y = batch()
    first = None
    for step in range(20):
        for terms in deep_supervision(fast, x, y, random.Random(step).sample(range(6), 3)):
            (sum(terms) / 3).backward()
        assert all(p.grad is None for p in fast.parameters()) or fast is model
        first = first or {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for p, q in zip(model.parameters(), fast.parameters()):
                q.copy_(p)
    return first, torch.stack(terms).detach()


def test_bf16_gradients_and_losses_follow_fp32():
    (exact, terms), (coarse, coarse_terms) = gradients_of(torch.float32), gradients_of(torch.bfloat16)
    assert exact.keys() == coarse.keys()
    for name, g in exact.items():
        assert coarse[name].dtype == torch.float32
        assert F.cosine_similarity(g.flatten(), coarse[name].flatten(), dim=0) > 0.97, name
        assert 0.9 < coarse[name].norm() / g.norm() < 1.1, name
    assert terms[0] < 4.5  # it learned: 257 symbols are 5.5 nats
    torch.testing.assert_close(terms, precise(coarse_terms), atol=0.1, rtol=0.03)


def test_which_parameters_train(model):
    train.make_optimizer(model, Settings(objective="loop"))
    still = {n.split(".")[0] for n, p in model.named_parameters() if not p.requires_grad}
    assert still == {"wte", "encoder"} | ({"wpe"} if model.config.norm == "layer" else set())
    train.make_optimizer(model, Settings(trains="all"))
    assert all(p.requires_grad for p in model.parameters())
    optimizer = train.make_optimizer(model, Settings(objective="lm"))
    assert {n.split(".")[0] for n, p in model.named_parameters() if not p.requires_grad} == {"gate", "q_head"}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == sum(p.requires_grad for p in model.parameters())


def test_micro_batches_read_each_window_once_per_epoch():
    tokens, s = np.arange(101), Settings(batch=2, context=10)
    epochs = [
        [int(row[0]) for i in range(5 * e, 5 * e + 5) for row in train.micro_batch(tokens, s, i)[0]] for e in (0, 1)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(0, 100, 10)) and epochs[0] != epochs[1]
    x, y = train.micro_batch(tokens, s, 3)
    assert torch.equal(x + 1, y)
    assert torch.equal(x, train.micro_batch(tokens, s, 3)[0])
    assert not torch.equal(x, train.micro_batch(tokens, Settings(batch=2, context=10, seed=1), 3)[0])


@pytest.mark.parametrize(
    "trained, span, supervised",
    [("middle", 1, [1, 3]), ("middle", 2, [2, 1]), ("middle", 3, [4]), ("all", 1, [0]), ("all", 9, [2])],
)
def test_step_flops_are_those_that_torch_counts(trained, span, supervised):
    """Against torch's count of matrix products."""
    model, (x, y) = random_model("llama"), batch()
    s = Settings(batch=2, accumulate=1, context=12, trains=trained, through=span)
    lm = replace(s, objective="lm")
    train.make_optimizer(model, s)
    with FlopCounterMode(display=False) as looped_counter:
        for terms in deep_supervision(model, x, y, supervised, span):
            sum(terms).backward()
    train.make_optimizer(model, lm)
    with FlopCounterMode(display=False) as lm_counter:
        model.loss(model.propose(model.encode(x)), y)[0].backward()
    whole = train.step_flops(model, lm, supervised)
    heads, model.config.n_head = model.config.n_head, 0  # torch does not count this attention
    assert abs(looped_counter.get_total_flops() / train.step_flops(model, s, supervised) - 1) < 0.01
    assert abs(lm_counter.get_total_flops() / train.step_flops(model, lm, supervised) - 1) < 0.01
    attention = 3 * 5 * 24 * 2 * 12 * heads * 8  # 2 T n hd per token and layer, thrice
    assert whole - train.step_flops(model, lm, supervised) == attention


def test_learning_rate_warms_up_and_decays():
    s = Settings(lr=1.0, steps=1000, warmup=100)
    rates = [train.learning_rate(s, i) for i in range(1000)]
    assert rates[0] == 0.01 and rates[99] == 1.0 and max(rates) == 1.0
    assert rates[100:] == sorted(rates[100:], reverse=True) and abs(rates[-1] - 0.1) < 0.01


def small_run(checkpoint, out, **more):
    directory, text = checkpoint
    values = dict(init=str(directory), data=str(text), out=str(out), steps=6, batch=2, accumulate=2, context=32)
    return Settings(**values | dict(max_loops=4, supervised=2, log_every=1, eval_every=3, eval_tokens=256) | more)


@pytest.mark.parametrize("objective", ["loop", "lm"])
def test_resumed_run_is_the_run_that_was_never_stopped(checkpoint, tmp_path, objective, monkeypatch):
    whole = train.train(small_run(checkpoint, tmp_path / "whole", dtype="fp32", objective=objective))
    broken = small_run(checkpoint, tmp_path / "broken", dtype="fp32", objective=objective)
    calls, learning_rate = [], train.learning_rate
    monkeypatch.setattr(
        train, "learning_rate", lambda s, step: calls.append(step) or (1 / (step != 4)) * learning_rate(s, step)
    )
    with pytest.raises(ZeroDivisionError):
        train.train(broken)  # falls over in step 4; the checkpoint of step 3 is there
    monkeypatch.undo()
    assert [d.name for d in (tmp_path / "broken").glob("step-*")] == ["step-0000003"]
    resumed = train.train(small_run(checkpoint, tmp_path / "broken", dtype="fp32", objective=objective, resume=True))
    assert whole.name == resumed.name == "step-0000006"
    a, b = (convert.load(d)[0].state_dict() for d in (whole, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_gate_start_that_is_given_starts_the_gate_of_a_checkpoint_anew(checkpoint, tmp_path):
    control = train.train(small_run(checkpoint, tmp_path / "control", dtype="fp32", objective="lm", steps=1))
    for start, alpha in (("", 0.5), ("0.25", 0.25)):
        s = small_run(checkpoint, tmp_path / f"loop-{start}", dtype="fp32", init=str(control), gate_start=start)
        gate = train.setup(s).model.gate.cpu()
        assert torch.allclose(gate.alpha(torch.randn(1, 2, 32)), torch.tensor(alpha))
    s = replace(s, steps=1)
    trained, _ = convert.load(train.train(s))
    resumed = train.setup(replace(s, resume=True)).model.cpu()  # which is no start
    assert torch.equal(trained.gate.up.bias, resumed.gate.up.bias)


def test_log_lines_have_losses_speed_and_mfu(checkpoint, tmp_path):
    s = small_run(checkpoint, tmp_path / "run")
    model, _ = convert.load(train.train(s))
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = [r for r in rows if "lm" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6]
    assert {"lm", "mono", "q", "lr", "grad_norm", "tokens_per_second", "mfu", "seconds_left"} <= steps[0].keys()
    drawn = [train.supervised_passes(s, r["step"] - 1) for r in steps]
    assert (
        all(len(set(passes)) == 2 and set(passes) <= {0, 1, 2, 3} for passes in drawn) and len(set(map(str, drawn))) > 1
    )
    per_token = [train.step_flops(model, s, passes) / (2 * 2 * 32) for passes in drawn]
    peaks = [flops * r["tokens_per_second"] / r["mfu"] for flops, r in zip(per_token, steps)]
    assert all(0 < r["mfu"] < 1 for r in steps) and max(peaks) < 1.0001 * min(peaks)
    evaluations = [r["held_out"] for r in rows if "held_out" in r]
    assert len(evaluations) == 3 and list(evaluations[0]) == ["0", "1", "2", "4", "8"]
    assert evaluations[-1]["1"] < evaluations[0]["1"]


def test_update_per_depth_confidence_per_sequence_and_span_change_the_run(checkpoint, tmp_path):
    """An update per depth takes K times as many of the optimizer's steps; each choice makes another model."""
    choices = dict(plain={}, depth=dict(update="depth"), sequence=dict(confidence="sequence"), two=dict(through=2))
    models = {}
    for name, more in choices.items():
        last = train.train(small_run(checkpoint, tmp_path / name, dtype="fp32", steps=3, supervised=2, **more))
        saved = torch.load(last / "optimizer.pt", weights_only=True)
        taken = max(int(of["step"]) for of in saved["optimizer"]["state"].values())
        assert taken == (3 * 2 * 2 if name == "depth" else 3)  # 2 micro-batches of 2 supervised steps
        models[name] = convert.load(last)[0].lm_head.weight
    for name in ("depth", "sequence", "two"):
        assert not torch.equal(models[name], models["plain"])


@pytest.mark.slow
def test_compiled_training_is_uncompiled_training(checkpoint, tmp_path):
    plain = train.train(small_run(checkpoint, tmp_path / "plain", dtype="fp32", steps=3))
    fast = train.train(small_run(checkpoint, tmp_path / "fast", dtype="fp32", steps=3, compile=True))
    a, b = (convert.load(d)[0].state_dict() for d in (plain, fast))
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-4, rtol=1e-3)
