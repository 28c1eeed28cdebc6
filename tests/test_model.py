"""The model: the pretrained layers, the gate, the loop, caches and early exit (SPEC of the paper: §3.1, App. E)."""

import copy
import math
import random

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, random_model, seeds
from safetensors.torch import load_file

import convert
import loopus
from loopus import Halt, InputError, early_exit


@pytest.mark.parametrize("family", ["gpt2", "llama", "llama_tied", "llama3_rope", "qwen3", "phi3"])
def test_zero_passes_give_the_golden_logits_of_transformers(family):
    expected = load_file(GOLDEN / family / "expected.safetensors")
    for encoder, decoder in ((1, 1), (0, 0), (2, 1)):
        model, tokenizer = convert.load(GOLDEN / family, encoder_layers=encoder, decoder_layers=decoder)
        assert tokenizer is None
        with torch.no_grad():
            logits = model(expected["input_ids"], loops=0)
        torch.testing.assert_close(logits, expected["logits"], atol=1e-4, rtol=0)
    greedy = expected["greedy"]
    tokens, passes = model.generate(greedy[:, :8], 16, max_loops=0, temperature=0)
    assert torch.equal(tokens, greedy) and not passes.any()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@torch.no_grad()
def test_states_alpha_confidence_and_halting_of_the_authors_code(family):
    directory = GOLDEN / f"loopus_reference_{family}"
    model, _ = convert.load(directory)
    expected = load_file(directory / "expected.safetensors")
    close = dict(atol=1e-4, rtol=1e-4)
    h = model.encode(expected["input_ids"])
    torch.testing.assert_close(h, expected["h0"], **close)
    torch.testing.assert_close(model.gate.alpha(model.propose(h) - h), expected["alpha0"], **close)
    for b in range(1, 9):
        h = model.refine(h)
        torch.testing.assert_close(h, expected[f"h{b}"], **close)
        torch.testing.assert_close(model.confidence(h), expected[f"q{b}"], **close)
    for loops in (1, 2, 4, 8):
        torch.testing.assert_close(model(expected["input_ids"], loops), expected[f"logits{loops}"], **close)
    for loops in (1, 4):
        greedy = expected[f"greedy{loops}"]
        tokens, passes = model.generate(greedy[:, :8], 16, max_loops=loops, threshold=2, temperature=0)
        assert torch.equal(tokens, greedy) and (passes == loops).all()
    h, passes = early_exit(model, expected["input_ids"], 8, Halt(threshold=expected["halt_threshold"]), together=True)
    assert (passes == expected["halt_loops"][:, None]).all() and len(set(expected["halt_loops"].tolist())) > 1
    torch.testing.assert_close(model.decode(h), expected["halt_logits"], **close)


def test_gate_is_equations_3_to_5(model):
    gate, C = model.gate, model.config.n_embd
    h, proposed = torch.randn(2, 2, 3, C).unbind(0)
    delta = proposed - h
    low = torch.einsum("rc,btc->btr", gate.down.weight, delta)  # W_down δ
    assert gate.down.weight.shape == (math.ceil(C / 16), C)
    step = torch.log1p(torch.exp(torch.einsum("cr,btr->btc", gate.up.weight, low) + gate.up.bias))  # Eq. 3
    alpha = torch.exp(step * -torch.exp(gate.A_log))  # Eq. 4
    torch.testing.assert_close(gate.alpha(delta), alpha)
    assert (alpha > 0).all() and (alpha < 1).all()
    torch.testing.assert_close(gate(proposed, h), alpha * proposed + (1 - alpha) * h)  # Eq. 5


def test_gate_gradients_agree_with_finite_differences():
    gate = random_model(n_embd=32).gate.double()
    inputs = [torch.randn(1, 2, 32, dtype=torch.double, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda proposed, h: gate(proposed, h), inputs)
    for p in gate.parameters():
        p.requires_grad_(True)
    proposed, h = (x.detach() for x in inputs)

    def of_parameters(*values):
        return torch.func.functional_call(gate, dict(zip(dict(gate.named_parameters()), values)), (proposed, h))

    assert torch.autograd.gradcheck(of_parameters, tuple(p.detach().requires_grad_() for p in gate.parameters()))


@pytest.mark.parametrize("start", ["0.5", "0.25", "0.97"])
def test_gate_starts_with_one_alpha_everywhere(start):
    model = random_model(gate_start=start)
    model.reset_new_parameters()
    delta = torch.randn(2, 3, 32) * 10
    torch.testing.assert_close(model.gate.alpha(delta), torch.full((2, 3, 32), float(start)))
    assert (model.confidence(torch.randn(1, 4, 32)) == 0).all()  # q = 0.5: an untrained head never stops at 0.6


def test_gate_start_s4d_is_that_of_the_authors():
    torch.manual_seed(0)
    model = random_model(gate_start="s4d", n_embd=512, n_head=16, head_dim=32)
    model.reset_new_parameters()
    gate = model.gate
    torch.testing.assert_close(gate.A_log.exp(), torch.arange(1, 513).float())
    step = F.softplus(gate.up.bias)
    assert step.min() >= 0.99e-3 and step.max() <= 0.101
    assert 0.4 < (step.log() < math.log(1e-2)).float().mean() < 0.6  # log-uniform: half below the middle
    assert gate.up.weight.abs().max() <= gate.up.in_features**-0.5
    alpha = gate.alpha(torch.zeros(1, 1, 512))
    assert 0.03 < (alpha < 1e-7).float().mean() < 0.2  # SPEC: a tenth of all channels never moves


@pytest.mark.parametrize("loops", [0, 1, 2, 4, 8])
def test_cached_decoding_gives_uncached_logits(model, loops):
    idx = torch.randint(0, 257, (2, 24))
    expected = model(idx, loops)
    cache, start = model.new_cache(2, 24, loops), 0
    with torch.no_grad():
        for T in (7, 1, 1, 5, 1, 9):  # a prompt, single tokens, and chunks
            logits, passes = model.advance(idx[:, start : start + T], [start] * 2, cache, loops, Halt(threshold=2))
            start += T
            torch.testing.assert_close(logits, expected[:, start - 1], atol=1e-4, rtol=1e-4)
            assert (passes == loops).all()


def some_halt(chance, model):
    """A stopping rule at random, with a setting at which the tokens of random models stop at different depths."""
    rule = chance.choice(["threshold", "convergence", "cdf"])
    h = model.encode(torch.arange(9)[None])
    length = (model.refine(h) - h).norm(dim=-1).median().item()
    return Halt(
        rule,
        threshold=chance.uniform(0.6, 0.95) if rule == "cdf" else chance.uniform(0.4, 0.65),
        epsilon=length * chance.uniform(0.3, 1.0),
        min_loops=chance.choice([1, 1, 2, 3]),
    )


def cached(model, idx, loops, halt, chance):
    """Logits and passes of every position by `advance`, in pieces of random length."""
    cache = model.new_cache(len(idx), idx.size(1) + chance.randrange(3), loops)
    start, logits, passes = 0, [], []
    while start < idx.size(1):
        T = chance.choice([1, 1, 1, 2, 5, 9])
        last, taken = model.advance(idx[:, start : start + T], [start] * len(idx), cache, loops, halt)
        start += T
        logits.append((min(start, idx.size(1)) - 1, last))
        passes.append(taken)
    return logits, torch.cat(passes, dim=1)


@pytest.mark.parametrize("seed", seeds(120))
@torch.no_grad()
def test_cached_early_exit_is_the_definition(seed):
    """Random models, texts, batches, pieces, rules and settings: the caches give what the definition gives."""
    chance = random.Random(seed)
    kinds = [
        ("gpt2", {}),
        ("llama", {}),
        ("llama", dict(qk_norm=True, qkv_bias=True)),
        ("llama", dict(partial_rotary=0.5)),
    ]
    shape, more = chance.choice(kinds)
    model = random_model(shape, seed, **more)
    idx = torch.randint(0, 257, (chance.choice([1, 2, 5]), chance.choice([8, 20])))
    halt, loops = some_halt(chance, model), chance.choice([0, 1, 4, 7])
    h, passes = early_exit(model, idx, loops, halt)
    expected = model.decode(h)
    logits, taken = cached(model, idx, loops, halt, chance)
    assert torch.equal(taken, passes)
    assert loops < 2 or (passes >= min(halt.min_loops, loops)).all()
    for t, last in logits:
        torch.testing.assert_close(last, expected[:, t], atol=1e-4, rtol=1e-4)
    for i, text in enumerate(idx):  # each text of the batch alone
        alone, depth = cached(model, text[None], loops, halt, chance)
        assert torch.equal(depth[0], passes[i])
        for t, last in alone:
            torch.testing.assert_close(last[0], expected[i, t], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_halting_rules_stop_tokens_at_different_depths():
    for rule in ("threshold", "convergence", "cdf"):
        found = set()
        for seed in range(12):
            chance, model = random.Random(seed), random_model("llama", seed)
            halt = some_halt(chance, model)._replace(rule=rule, min_loops=1)
            found |= set(early_exit(model, torch.randint(0, 257, (2, 20)), 7, halt)[1].flatten().tolist())
        assert len(found) >= 4, rule


@torch.no_grad()
def test_halting_rules_are_those_of_the_paper():
    model = random_model("llama", 3)
    idx, states, q = torch.randint(0, 257, (2, 9)), [], []
    h = model.encode(idx)
    for _ in range(6):
        states.append(h)
        h = model.refine(h)
        q.append(torch.sigmoid(model.confidence(h)))
    states.append(h)
    stop = {
        "threshold": [q_b >= 0.55 for q_b in q],
        "convergence": [(states[b + 1] - states[b]).norm(dim=-1) <= 3.0 for b in range(6)],
        "cdf": [1 - torch.stack([1 - q_j for q_j in q[: b + 1]]).prod(0) >= 0.9 for b in range(6)],
    }
    for rule, reached in stop.items():
        halt, log_doubt = Halt(rule, 0.9 if rule == "cdf" else 0.55, 3.0, 2), 0.0
        for b in range(6):
            found, log_doubt = halt.stops(model, b + 1, states[b], states[b + 1], log_doubt)
            assert torch.equal(found, reached[b] & torch.tensor(b + 1 >= 2)), (rule, b)


@pytest.mark.slow
@pytest.mark.parametrize("shape, more", [("gpt2", {}), ("llama", dict(qk_norm=True)), ("llama", dict(n_kv_head=4))])
@torch.no_grad()
def test_compiled_early_exit_is_the_definition_and_compiles_once(shape, more):
    model = random_model(shape, 5, **more)
    idx, halt = torch.randint(0, 257, (1, 40)), Halt(threshold=0.52)
    h, passes = early_exit(model, idx, 6, halt)
    expected, eager = model.decode(h), model.generate(idx[:, :9], 30, 6, 0.52, temperature=0)
    convert.compile_step(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    cache = model.new_cache(1, 64, 6)
    model.advance(idx[:, :9], [0], cache, 6, halt)
    for t in range(9, 40):
        logits, taken = model.advance(idx[:, t : t + 1], [t], cache, 6, halt)
        torch.testing.assert_close(logits, expected[:, t], atol=1e-4, rtol=1e-4)
        assert torch.equal(taken[:, 0], passes[:, t])
    frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 1 <= frames <= 2  # one step serves all layers, depths and positions
    compiled = model.generate(idx[:, :9], 30, 6, 0.52, temperature=0)
    assert torch.equal(compiled[0], eager[0]) and torch.equal(compiled[1], eager[1])
    for prompts in ([idx[0, :3]], [idx[0, :21], idx[0, :4], idx[0, 9:12]]):
        prompts = [prompt.tolist() for prompt in prompts]
        compiled = model.generate(prompts, 20, 6, 0.52, temperature=0)
        with torch.compiler.set_stance("force_eager"):
            eager = model.generate(prompts, 20, 6, 0.52, temperature=0)
        assert compiled[0] == eager[0] and torch.equal(compiled[1], eager[1])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6  # one text, some, some of those in the cache


class RunAgain:
    """Stands in for a CUDA graph where there is no GPU: replayed, it runs the same with what the places then hold."""

    def __init__(self, part, places, cache, output):
        self.arguments = part.plain, places, cache, output

    def replay(self):
        plain, (x, *at), cache, output = self.arguments
        assert not convert.Recorded.recording
        convert.Recorded.recording = True
        output.copy_(plain(x, loopus.Positions(*at), cache))
        convert.Recorded.recording = False


def record_on_a_cpu(part, x, at, cache):
    convert.Recorded.recording = True
    result = part.plain(x, at, cache)
    convert.Recorded.recording = False
    places = [value if value is None else value.clone() for value in (x, *at)]
    output = torch.full_like(result, torch.nan)
    return result, (RunAgain(part, places, cache, output), places, output)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("cut", [(1, 1), (0, 0)])
def test_recorded_text_is_the_same(model, cut, device, monkeypatch):
    record, recordings = convert.Recorded.record, []
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    if device == "cpu":
        record = record_on_a_cpu
        monkeypatch.setattr(convert, "record_step", lambda model: recorded_parts(model))
    monkeypatch.setattr(convert.Recorded, "record", lambda *given: recordings.append(given[1].shape) or record(*given))
    convert.cut(model.to(device), *cut)
    plain, recorded = model, copy.deepcopy(model)
    convert.record_step(recorded)
    idx = torch.randint(0, 257, (3, 21), device=device)
    prompts = [idx[0, :3].tolist(), idx[1].tolist(), idx[2, 9:12].tolist()]
    for passes, threshold in ((4, 2.0), (4, 0.52), (0, 2.0)):
        before = len(recordings)
        expected = plain.generate(prompts, 6, passes, threshold, temperature=0)
        found = recorded.generate(prompts, 6, passes, threshold, temperature=0)
        assert found[0] == expected[0] and torch.equal(found[1], expected[1]), (passes, threshold)
        new = len(recordings) - before
        if threshold == 2.0:  # E, each pass, D, by the texts that run together
            assert new % (2 + max(1, passes)) == 0 and new <= 3 * (2 + max(1, passes)), (passes, new)
    assert not convert.Recorded.recording
    cache = recorded.new_cache(3, 9, 2)
    steps = [recorded.advance(idx[:, i : i + 1], [i] * 3, cache, 2, Halt(threshold=2.0))[0] for i in range(9)]
    with torch.no_grad():
        torch.testing.assert_close(torch.stack(steps, dim=1), plain(idx[:, :9], 2), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(recorded(idx, 2), plain(idx, 2))  # without a cache: as ever


@torch.no_grad()
def test_attention_by_sums_is_attention():
    q, k, v = torch.randn(2, 1, 6, 8), torch.randn(2, 9, 3, 8), torch.randn(2, 9, 3, 8)
    mask = torch.rand(2, 1, 1, 9) < 0.7
    mask[..., 0] = True
    torch.testing.assert_close(convert.attend_with_sums(q, k, v, mask), loopus.attend(q, k, v, mask))
    alone = convert.attend_with_sums(q, k[:, :1], v[:, :1], None)  # a token without a cache
    torch.testing.assert_close(alone, v[:, :1].repeat_interleave(2, dim=2))


def recorded_parts(model):
    for name in ("encode", "propose", "refine", "decode"):
        setattr(model, name, convert.Recorded(getattr(model, name)))


@torch.no_grad()
def test_a_pass_runs_only_on_texts_that_still_loop(model):
    idx, rows = torch.randint(0, 257, (6, 12)), []
    halt = Halt(threshold=0.53)
    _, passes = early_exit(model, idx, 6, halt)
    model.reasoning[0].register_forward_hook(lambda block, inputs, output: rows.append(len(inputs[0])))
    cache = model.new_cache(6, 12, 6)
    taken = torch.cat([model.advance(idx[:, t : t + 1], [t] * 6, cache, 6, halt)[1] for t in range(12)], dim=1)
    assert torch.equal(taken, passes) and sum(rows) == passes.sum() < 6 * 12 * 6


@torch.no_grad()
def test_early_exit_freezes_keys_and_values_of_the_last_pass():
    """The definition itself, against attention written out token by token for a reasoning block of one layer."""
    model = random_model("gpt2", n_layer=3)
    block, c = model.reasoning[0], model.config
    idx = torch.randint(0, 257, (1, 10))
    h, passes = early_exit(model, idx, 5, Halt(threshold=0.55))
    assert len(passes.unique()) > 1
    state, stopped = model.encode(idx)[0], [0] * 10
    keys, values = [None] * 10, [None] * 10
    for b in range(1, 6):
        entering = state.clone()
        running = [t for t in range(10) if not stopped[t]]
        for t in running:
            q, k, v = block.qkv(block.ln_1(entering[t])).split(c.n_embd)
            keys[t], values[t] = k.view(4, 8), v.view(4, 8)
        for t in running:
            q = block.qkv(block.ln_1(entering[t])).split(c.n_embd)[0].view(4, 8)
            k, v = torch.stack(keys[: t + 1], 1), torch.stack(values[: t + 1], 1)  # (heads, t + 1, 8)
            weights = torch.softmax((k @ q[:, :, None])[..., 0] / 8**0.5, -1)
            x = entering[t] + block.out((weights[:, None] @ v).flatten())
            proposed = x + block.mlp(block.ln_2(x))
            state[t] = model.gate(proposed, entering[t])
            if torch.sigmoid(model.confidence(state[t][None]))[0] >= 0.55:
                stopped[t] = b
    assert [s or 5 for s in stopped] == passes[0].tolist()
    torch.testing.assert_close(h[0], state, atol=1e-5, rtol=1e-5)


def test_generation_beyond_the_context_goes_on_from_the_newest_half(model):
    idx = torch.randint(0, 257, (1, 60))
    tokens, _ = model.generate(idx, 40, max_loops=2, threshold=2, temperature=0)
    assert tokens.shape == (1, 100)
    begun = 0  # where the window that a token was made from begins
    for t in range(60, 100):
        if t - begun > 64:
            begun = t - 32
        expected = model(tokens[:, begun:t], 2)[:, -1].argmax(-1)
        assert tokens[0, t] == expected


def test_seeded_sampling_repeats_and_top_k_one_is_greedy(model):
    idx = torch.randint(0, 257, (2, 5))

    def text(seed, **more):
        generator = torch.Generator().manual_seed(seed)
        return model.generate(idx, 12, 2, 0.6, temperature=1.0, generator=generator, **more)[0]

    assert torch.equal(text(1), text(1)) and not torch.equal(text(1), text(2))
    for more in (dict(top_k=1), dict(top_p=1e-6), dict(top_p=0.0)):
        assert torch.equal(text(1, **more), model.generate(idx, 12, 2, 0.6, temperature=0)[0])


def test_top_k_and_top_p_draw_with_the_right_probabilities():
    logits = torch.tensor([[0.1, 0.4, 0.05, 0.3, 0.15]]).log().expand(20000, 5)
    generator = torch.Generator().manual_seed(0)

    def shares(**more):
        drawn = loopus.sample(logits, 1.0, more.get("top_k"), more.get("top_p"), generator)
        return torch.bincount(drawn.flatten(), minlength=5) / 20000

    for more, expected in (
        ({}, [0.1, 0.4, 0.05, 0.3, 0.15]),
        (dict(top_k=2), [0, 4 / 7, 0, 3 / 7, 0]),
        (dict(top_p=0.75), [0, 0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85]),  # 0.4 + 0.3 do not reach it yet
        (dict(top_k=3, top_p=0.3), [0, 1, 0, 0, 0]),
    ):
        torch.testing.assert_close(shares(**more), torch.tensor(expected, dtype=torch.float32), atol=0.015, rtol=0)


def test_attention_is_causal_at_every_depth(model):
    idx = torch.randint(0, 257, (1, 12))
    changed = idx.clone()
    changed[0, 8] = (changed[0, 8] + 1) % 257
    difference = (model(idx, 4) - model(changed, 4)).abs().amax(-1)[0]
    assert (difference[:8] == 0).all() and (difference[8:] > 0).all()


def test_prompts_cuts_and_gate_starts_that_do_not_fit_are_refused(model):
    with pytest.raises(InputError, match="65 tokens do not fit the model's context of 64"):
        model.generate(torch.zeros(1, 65, dtype=torch.long), 1)
    with pytest.raises(InputError, match="empty"):
        model.generate(torch.zeros(1, 0, dtype=torch.long), 1)
    with pytest.raises(InputError, match="leave no reasoning block in 5 layers"):
        random_model(encoder_layers=3, decoder_layers=2)
    for start in ("0", "1", "half", "nan"):
        with pytest.raises(InputError, match="gate_start"):
            convert.load(GOLDEN / "gpt2", gate_start=start)


def test_no_new_token_is_no_error(model):
    idx = torch.zeros(2, 5, dtype=torch.long)
    tokens, depths = model.generate(idx, 0)
    assert torch.equal(tokens, idx) and depths.shape == (2, 0)
    assert model.generate([[1], [2, 3]], 0)[0] == [[1], [2, 3]]


def test_rotary_table_turns_by_position():
    at = random_model().positions([3], 2)
    x = torch.randn(1, 2, 1, 8)
    turned = loopus.rotate(x, at.cos, at.sin)
    for t in range(2):
        for i in range(4):
            angle = (3 + t) * 10000 ** (-2 * i / 8)
            pair = complex(x[0, t, 0, i], x[0, t, 0, i + 4]) * complex(math.cos(angle), math.sin(angle))
            assert abs(complex(turned[0, t, 0, i], turned[0, t, 0, i + 4]) - pair) < 1e-5


@pytest.mark.parametrize("seed", seeds(40))
@torch.no_grad()
def test_ragged_batch_writes_what_each_text_writes_alone(seed):
    """Random models, prompts, rules, caches, ends and windows."""
    chance = random.Random(seed)
    model = random_model(chance.choice(["gpt2", "llama"]), seed, block_size=chance.choice([24, 64]))
    halt, loops, new = some_halt(chance, model), chance.choice([0, 1, 4, 6]), chance.choice([8, 30])
    prompts = [[chance.randrange(257) for _ in range(chance.choice([1, 3, 3, 17, 24]))] for _ in range(4)]
    more = dict(max_loops=loops, temperature=0, halt=halt)
    together, passes = model.generate(prompts, new, **more)
    end = together[chance.randrange(4)][-1 - chance.randrange(new)]
    ended, depths = model.generate(prompts, new, ends=[end], **more)
    for i, prompt in enumerate(prompts):
        alone, depth = model.generate(torch.tensor([prompt]), new, **more)
        assert alone[0].tolist() == together[i] and torch.equal(depth[0], passes[i])
        written = together[i][len(prompt) :]
        stop = written.index(end) + 1 if end in written else new
        assert ended[i][len(prompt) :][:stop] == written[:stop] and torch.equal(depths[i][:stop], passes[i][:stop])
        assert set(ended[i][len(prompt) + stop :]) <= {end} and (depths[i][stop:] == 0).all()
