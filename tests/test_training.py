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


def test_losses_of_one_step_are_those_of_a_plain_computation(model):
    x, y = batch()
    h = model.encode(x).detach()
    lm, mono, q_loss, next_h = losses(model, h, y)
    after = model.gate(model.propose(h), h)

    def nll(h):  # the mean over tokens of −log p(next token), written out
        return -torch.log_softmax(model.decode(h), -1).gather(-1, y[..., None]).mean()

    right = (model.decode(after).argmax(-1) == y).float()
    q = torch.sigmoid(model.confidence(after))
    bce = -(right * q.log() + (1 - right) * (1 - q).log()).mean()
    difference = nll(after) - nll(h)
    torch.testing.assert_close(lm, nll(after))
    torch.testing.assert_close(mono, difference * torch.sigmoid(difference))
    torch.testing.assert_close(q_loss, bce)
    torch.testing.assert_close(next_h, after)
    assert not next_h.requires_grad


def test_masked_targets_do_not_count(model):
    x, y = batch()
    h = model.encode(x)
    masked = y.clone()
    masked[:, :5] = -100
    lm, _, q_loss, _ = losses(model, h, masked)
    after = model.refine(h.detach())
    logits = model.decode(after)[:, 5:]
    torch.testing.assert_close(lm, F.cross_entropy(logits.flatten(0, 1), y[:, 5:].flatten()))
    right = (logits.argmax(-1) == y[:, 5:]).float()
    torch.testing.assert_close(q_loss, F.binary_cross_entropy_with_logits(model.confidence(after)[:, 5:], right))


def test_confidence_per_sequence_is_equation_13(model):
    x, y = (part.clone() for part in batch())
    y[1, 3:] = -100
    h = model.encode(x).detach()
    after = model.refine(h)
    right = (model.decode(after).argmax(-1) == y).float()
    q = torch.sigmoid(model.confidence(after)[:, -1])  # of the last token
    share = torch.stack((right[0].mean(), right[1, :3].mean()))
    bce = -(share * q.log() + (1 - share) * (1 - q).log())
    torch.testing.assert_close(losses(model, h, y, pooled=True)[2], bce.mean())
    y[1] = -100  # nothing to learn there
    torch.testing.assert_close(losses(model, h, y, pooled=True)[2], bce[0])


def test_an_update_per_supervised_step(model):
    """Fig. 4: the optimizer steps after each; the loss before the next one is then that of the new weights."""
    x, y = batch()
    by_hand = random_model("gpt2" if model.config.norm == "layer" else "llama")
    optimizers = [train.make_optimizer(m, Settings()) for m in (model, by_hand)]
    for step in deep_supervision(model, x, y, [1, 2], updated=True):
        sum(step).backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
    h = by_hand.refine(by_hand.encode(x))
    for _ in (1, 2):
        *terms, h = losses(by_hand, h, y)
        sum(terms).backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
    torch.testing.assert_close(torch.stack(step), torch.stack(terms))
    for p, q in zip(model.parameters(), by_hand.parameters()):
        torch.testing.assert_close(p, q)


def test_gradients_go_through_one_pass_and_not_through_the_loss_before(model):
    x, y = batch()
    mono = losses(model, model.encode(x), y)[1]  # a state that still has a graph: losses cut it off
    mono.backward()
    by_hand = random_model("gpt2" if model.config.norm == "layer" else "llama")
    h = by_hand.encode(x).detach()
    after = by_hand.refine(h)
    lm = F.cross_entropy(by_hand.decode(after).flatten(0, 1), y.flatten())
    before = F.cross_entropy(by_hand.decode(h).flatten(0, 1), y.flatten()).item()  # a number: no gradient through it
    F.silu(lm - before).backward()
    there = dict(by_hand.named_parameters())
    for name, p in model.named_parameters():
        if there[name].grad is None:
            assert p.grad is None, name
        else:
            torch.testing.assert_close(p.grad, there[name].grad, atol=1e-6, rtol=1e-4)
    assert all(p.grad is None for p in [*model.encoder.parameters(), model.wte.weight])
    assert model.gate.down.weight.grad.abs().max() > 0 and model.reasoning[0].qkv.weight.grad.abs().max() > 0


def test_deep_supervision_is_the_sum_of_its_steps_from_detached_states(model):
    x, y = batch()
    train.make_optimizer(model, Settings())
    for step in deep_supervision(model, x, y, [4, 1]):
        sum(step).backward()
    got = {name: p.grad for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = None
    h = model.encode(x).detach()
    for b in range(5):  # nothing is learned after pass 4, so nothing runs there
        if b in (1, 4):
            sum(losses(model, h, y)[:3]).backward()
        h = model.refine(h).detach()
    for name, p in model.named_parameters():
        assert (p.grad is None) == (got[name] is None), name
        if p.grad is not None:
            torch.testing.assert_close(got[name], p.grad)
    assert all(got[n] is None for n in got if n.startswith(("wte", "wpe", "encoder")))


def test_what_is_known_is_not_computed_again(model):
    """Passes end with the last drawn step; of adjacent steps, the loss before the second is not computed again."""
    x, y = batch(2)
    calls, expected = [], []
    for name in ("refine", "loss"):
        plain = getattr(model, name)
        setattr(model, name, lambda *a, name=name, plain=plain: calls.append(name) or plain(*a))
    for drawn, refined, decoded in (([1, 3], 4, 4), ([2, 1], 3, 3), ([0, 1, 2], 3, 4)):
        calls.clear()
        steps = [torch.stack(step) for step in deep_supervision(model, x, y, drawn)]
        assert (calls.count("refine"), calls.count("loss"), len(steps)) == (refined, decoded, len(drawn))
        h = model.encode(x)
        for b in range(max(drawn) + 1):
            *terms, h = losses(model, h, y)
            expected += [torch.stack(terms)] if b in drawn else []
        torch.testing.assert_close(torch.stack(steps), torch.stack(expected))
        expected.clear()


def test_gradient_through_several_passes_and_into_the_encoder(model):
    """Two steps of two passes, the first drawn: the same as plain back-propagation from the tokens on."""
    x, y = batch()
    train.make_optimizer(model, Settings(trains="all"))
    for step in deep_supervision(model, x, y, [0], through=2):
        sum(step).backward()
    got = {name: p.grad for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = None
    h = model.encode(x)
    after = model.refine(model.refine(h))
    lm, right = model.loss(after, y)
    q = F.binary_cross_entropy_with_logits(model.confidence(after), right.float())
    (lm + F.silu(lm - model.loss(h, y)[0].item()) + q).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, msg=name)
        assert p.grad.abs().max() > 0 or not name.startswith("encoder")


@pytest.mark.parametrize("vocabulary", [257, 1 << 20])  # all 24 tokens at once; 16 and 8
def test_loss_in_parts_is_the_loss(model, vocabulary):
    x, y = batch()
    y = y.masked_fill(torch.rand(y.shape) < 0.3, -100)
    h = model.encode(x).detach().requires_grad_()
    logits = model.decode(h)
    plain = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    expected = torch.autograd.grad(plain, [h, *model.lm_head.parameters(), *model.decoder.parameters()])
    model.config.vocab_size = vocabulary
    for model.checkpointing in (False, True):
        loss, right = model.loss(h, y)
        torch.testing.assert_close(loss, plain)
        assert torch.equal(right, logits.argmax(-1) == y)
        got = torch.autograd.grad(loss, [h, *model.lm_head.parameters(), *model.decoder.parameters()])
        for a, b in zip(got, expected):
            torch.testing.assert_close(a, b)


def saved_bytes(model, x, y, passes):
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
        for step in deep_supervision(model, x, y, [passes - 2, passes - 1]):
            sum(step).backward()
    return held["most"]


def test_memory_does_not_depend_on_the_passes(model):
    x, y = batch()
    few, many = saved_bytes(model, x, y, 4), saved_bytes(model, x, y, 20)
    assert few > 10000 and abs(many / few - 1) < 0.05
    model.checkpointing = True
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


def test_what_trains(model):
    train.make_optimizer(model, Settings(objective="loop"))
    still = {n.split(".")[0] for n, p in model.named_parameters() if not p.requires_grad}
    assert still == {"wte", "encoder"} | ({"wpe"} if model.config.norm == "layer" else set())
    train.make_optimizer(model, Settings(trains="all"))
    assert all(p.requires_grad for p in model.parameters())
    optimizer = train.make_optimizer(model, Settings(objective="lm"))
    assert {n.split(".")[0] for n, p in model.named_parameters() if not p.requires_grad} == {"gate", "q_head"}
    assert sum(len(g["params"]) for g in optimizer.param_groups) == sum(p.requires_grad for p in model.parameters())


def test_every_window_once_per_epoch_in_an_order_of_seed_and_number():
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
    "trains, through, drawn, update",
    [
        ("middle", 1, [1, 3], "batch"),
        ("middle", 2, [2, 1], "batch"),
        ("middle", 1, [2, 1], "depth"),
        ("all", 1, [0], "batch"),
    ],
)
def test_operations_on_paper_are_those_that_run(trains, through, drawn, update):
    """Against torch's count of matrix products, in which the logits are made again in backward."""
    model, (x, y) = random_model("llama"), batch()
    s = Settings(batch=2, accumulate=1, context=12, trains=trains, through=through, update=update)
    again = 24 * 2 * model.lm_head.weight.numel()
    train.make_optimizer(model, s)
    with FlopCounterMode(display=False) as counter:
        for step in deep_supervision(model, x, y, drawn, through, updated=update == "depth"):
            sum(step).backward()
    loop = counter.get_total_flops() - len(drawn) * again
    train.make_optimizer(model, replace(s, objective="lm"))
    with FlopCounterMode(display=False) as counter:
        model.loss(model.propose(model.encode(x)), y)[0].backward()
    lm = counter.get_total_flops() - again
    whole = [train.step_flops(model, settings, drawn) for settings in (s, replace(s, objective="lm"))]
    heads, model.config.n_head = model.config.n_head, 0  # torch does not count this attention
    matrices = [train.step_flops(model, settings, drawn) for settings in (s, replace(s, objective="lm"))]
    assert abs(loop / matrices[0] - 1) < 0.005 and abs(lm / matrices[1] - 1) < 0.005
    assert whole[1] - matrices[1] == 3 * 5 * 24 * 2 * 12 * heads * 8  # 2 T n hd per token and layer, thrice


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


def test_log_has_what_was_asked_for(checkpoint, tmp_path):
    s = small_run(checkpoint, tmp_path / "run")
    model, _ = convert.load(train.train(s))
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = [r for r in rows if "lm" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6]
    assert {"lm", "mono", "q", "lr", "grad_norm", "tokens_per_second", "mfu", "seconds_left"} <= steps[0].keys()
    drawn = [random.Random(f"depths {s.seed} {r['step'] - 1}").sample(range(4), 2) for r in steps]
    per_token = [train.step_flops(model, s, some) / (2 * 2 * 32) for some in drawn]
    peaks = [flops * r["tokens_per_second"] / r["mfu"] for flops, r in zip(per_token, steps)]
    assert all(0 < r["mfu"] < 1 for r in steps) and max(peaks) < 1.0001 * min(peaks)
    evaluations = [r["held_out"] for r in rows if "held_out" in r]
    assert len(evaluations) == 3 and list(evaluations[0]) == ["0", "1", "2", "4", "8"]
    assert evaluations[-1]["1"] < evaluations[0]["1"]


def test_choices_of_a_run(checkpoint, tmp_path):
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
def test_compiled_training_gives_the_same(checkpoint, tmp_path):
    plain = train.train(small_run(checkpoint, tmp_path / "plain", dtype="fp32", steps=3))
    fast = train.train(small_run(checkpoint, tmp_path / "fast", dtype="fp32", steps=3, compile=True))
    a, b = (convert.load(d)[0].state_dict() for d in (plain, fast))
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-4, rtol=1e-3)
