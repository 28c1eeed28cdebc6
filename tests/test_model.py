"""The model: the pretrained layers, the gate, the loop, caches and early exit (SPEC of the paper: §3.1, App. E)."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, random_model
from safetensors.torch import load_file

import convert
import loopus
from loopus import Config, InputError, early_exit, span


@pytest.mark.parametrize("family", ["gpt2", "llama", "llama_tied", "llama3_rope", "qwen3", "phi3"])
def test_without_loops_it_is_the_pretrained_model(family):
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
def test_states_gate_and_confidence_of_the_authors_code(family):
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
    h, passes = early_exit(model, expected["input_ids"], 8, expected["halt_threshold"], together=True)
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
def test_even_start_has_one_alpha_everywhere(start):
    model = random_model(gate_start=start)
    model.reset_new_parameters()
    delta = torch.randn(2, 3, 32) * 10
    torch.testing.assert_close(model.gate.alpha(delta), torch.full((2, 3, 32), float(start)))
    assert (model.confidence(torch.randn(1, 4, 32)) == 0).all()  # q = 0.5: an untrained head never stops at 0.6


def test_s4d_start_is_the_authors():
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
def test_cached_steps_give_uncached_logits(model, loops):
    idx = torch.randint(0, 257, (2, 24))
    expected = model(idx, loops)
    cache, start = model.new_cache(2, 24, loops), 0
    with torch.no_grad():
        for T in (7, 1, 1, 5, 1, 9):  # a prompt, single tokens, and chunks
            logits, passes = model.advance(idx[:, start : start + T], start, cache, loops, threshold=2)
            start += T
            torch.testing.assert_close(logits, expected[:, start - 1], atol=1e-4, rtol=1e-4)
            assert (passes == loops).all()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_early_exit_cached_is_the_definition(shape, seed):
    model = random_model(shape, seed)
    torch.manual_seed(seed)
    idx = torch.randint(0, 257, (3, 20))
    threshold = 0.5 + 0.05 * (seed % 4)
    with torch.no_grad():
        h, passes = early_exit(model, idx, 6, threshold)
        logits = model.decode(h)
        assert len(passes.unique()) > 1  # tokens do stop at different depths
        cache, start = model.new_cache(3, 20, 6), 0
        for T in (6, 1, 3, 1, 1, 8):
            last, taken = model.advance(idx[:, start : start + T], start, cache, 6, threshold)
            start += T
            assert torch.equal(taken, passes[:, start - T : start])
            torch.testing.assert_close(last, logits[:, start - 1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_early_exit_freezes_keys_and_values_of_the_last_pass():
    """The definition itself, against attention written out token by token for a reasoning block of one layer."""
    model = random_model("gpt2", n_layer=3)
    block, c = model.reasoning[0], model.config
    idx = torch.randint(0, 257, (1, 10))
    h, passes = early_exit(model, idx, 5, 0.55)
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


def test_generation_beyond_the_context_is_that_of_the_newest_half(model):
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
    assert torch.equal(text(1, top_k=1), model.generate(idx, 12, 2, 0.6, temperature=0)[0])


def test_causal_at_every_depth(model):
    idx = torch.randint(0, 257, (1, 12))
    changed = idx.clone()
    changed[0, 8] = (changed[0, 8] + 1) % 257
    difference = (model(idx, 4) - model(changed, 4)).abs().amax(-1)[0]
    assert (difference[:8] == 0).all() and (difference[8:] > 0).all()


def test_what_does_not_fit_is_refused(model):
    with pytest.raises(InputError, match="65 tokens do not fit the model's context of 64"):
        model.generate(torch.zeros(1, 65, dtype=torch.long), 1)
    with pytest.raises(InputError, match="empty"):
        model.generate(torch.zeros(1, 0, dtype=torch.long), 1)
    with pytest.raises(InputError, match="leave no reasoning block in 5 layers"):
        random_model(encoder_layers=3, decoder_layers=2)
    for start in ("0", "1", "half"):
        with pytest.raises(InputError, match="gate_start"):
            random_model(gate_start=start)


def test_rotary_table_turns_by_position():
    c = Config(**vars(random_model().config))
    at = span(c, 3, 2, "cpu")
    x = torch.randn(1, 1, 2, 8)
    turned = loopus.rotate(x, at.cos, at.sin)
    for t in range(2):
        for i in range(4):
            angle = (3 + t) * 10000 ** (-2 * i / 8)
            pair = complex(x[0, 0, t, i], x[0, 0, t, i + 4]) * complex(math.cos(angle), math.sin(angle))
            assert abs(complex(turned[0, 0, t, i], turned[0, 0, t, i + 4]) - pair) < 1e-5
