"""The method: pretrained layers, the gate, when a token stops, the caches, writing, and what training learns from."""

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
import sample
from loopus import Halt, InputError, deep_supervision, early_exit, losses

CLOSE = dict(atol=1e-4, rtol=1e-4)
KINDS = [("gpt2", {}), ("llama", dict(qk_norm=True, qkv_bias=True))]


# ---- What other programs compute: see golden/README.md
@pytest.mark.parametrize("cut", [(1, 1), (0, 0), (2, 1)])
@pytest.mark.parametrize("family", ["gpt2", "llama", "llama_tied", "llama3_rope", "qwen3", "phi3"])
@torch.no_grad()
def test_zero_passes_give_the_golden_logits_of_transformers(family, cut):
    expected = load_file(GOLDEN / family / "expected.safetensors")
    model, _ = convert.load(GOLDEN / family, encoder_layers=cut[0], decoder_layers=cut[1])
    torch.testing.assert_close(model(expected["input_ids"], loops=0), expected["logits"], atol=1e-4, rtol=0)
    tokens, depths = model.generate(expected["greedy"][:, :8], 16, max_loops=0, temperature=0)
    assert torch.equal(tokens, expected["greedy"])
    assert (depths == 0).all()


class Together(Halt):
    """As the authors' code does it: a sequence stops with its last token."""

    def stops(self, *given):
        stop, log_doubt = super().stops(*given)
        return stop[:, -1:], log_doubt


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@torch.no_grad()
def test_states_alpha_confidence_and_halting_of_the_authors_code(family):
    directory = GOLDEN / f"loopus_reference_{family}"
    model, _ = convert.load(directory)
    expected = load_file(directory / "expected.safetensors")
    idx = expected["input_ids"]
    h = model.encode(idx)
    torch.testing.assert_close(h, expected["h0"], **CLOSE)
    torch.testing.assert_close(model.gate.alpha(model.propose(h) - h), expected["alpha0"], **CLOSE)
    for b in range(1, 9):
        h = model.refine(h)
        torch.testing.assert_close(h, expected[f"h{b}"], **CLOSE)
        torch.testing.assert_close(model.confidence(h), expected[f"q{b}"], **CLOSE)
    for loops in (1, 2, 4, 8):
        torch.testing.assert_close(model(idx, loops), expected[f"logits{loops}"], **CLOSE)
    for loops in (1, 4):
        greedy = expected[f"greedy{loops}"]
        tokens, depths = model.generate(greedy[:, :8], 16, max_loops=loops, threshold=2, temperature=0)
        assert torch.equal(tokens, greedy)
        assert (depths == loops).all()
    h, depths = early_exit(model, idx, 8, Together(threshold=expected["halt_threshold"]))
    assert torch.equal(depths, expected["halt_loops"][:, None].expand_as(depths))
    torch.testing.assert_close(model.decode(h), expected["halt_logits"], **CLOSE)


# ---- The gate
def test_the_gate_is_equations_3_to_5(model):
    gate, C = model.gate, model.config.n_embd
    h, proposed = torch.randn(2, 2, 3, C)
    delta = proposed - h
    assert gate.down.weight.shape == (math.ceil(C / 16), C)
    low = torch.einsum("rc,btc->btr", gate.down.weight, delta)  # W_down δ
    step_size = (torch.einsum("cr,btr->btc", gate.up.weight, low) + gate.up.bias).exp().log1p()  # Eq. 3
    alpha = torch.exp(step_size * -torch.exp(gate.A_log))  # Eq. 4
    torch.testing.assert_close(gate.alpha(delta), alpha)
    torch.testing.assert_close(gate(proposed, h), alpha * proposed + (1 - alpha) * h)  # Eq. 5


@pytest.mark.parametrize("start", ["0.5", "0.25", "0.97"])
def test_the_gate_starts_with_one_alpha_everywhere_and_the_confidence_at_a_half(start):
    model = random_model()
    model.reset_new_parameters()
    model.gate.reset_parameters(start)
    delta = 10 * torch.randn(2, 3, 32)
    torch.testing.assert_close(model.gate.alpha(delta), torch.full((2, 3, 32), float(start)))
    assert (torch.sigmoid(model.confidence(delta)) == 0.5).all()


def test_the_gate_start_s4d_is_that_of_the_authors():
    model = random_model(n_embd=512, n_head=16, head_dim=32)
    model.gate.reset_parameters("s4d")
    gate = model.gate
    torch.testing.assert_close(gate.A_log.exp(), torch.arange(1, 513).float())
    step_size = F.softplus(gate.up.bias)  # log-uniform from 0.001 to 0.1: half of them below the middle
    assert 0.99e-3 < step_size.min() and step_size.max() < 0.101
    assert 0.4 < (step_size < 0.01).float().mean() < 0.6
    assert 0 < gate.up.weight.abs().max() <= gate.up.in_features**-0.5


# ---- When a token stops
@torch.no_grad()
def test_the_rules_to_stop_are_those_of_the_paper(model):
    states = [model.encode(torch.randint(0, 257, (2, 9)))]
    q = []
    for _ in range(6):
        states.append(model.refine(states[-1]))
        q.append(torch.sigmoid(model.confidence(states[-1])))
    steps = [(states[b + 1] - states[b]).norm(dim=-1) for b in range(6)]
    middle = torch.stack(steps).median().item()
    cumulated = [1 - torch.stack([1 - q_j for q_j in q[: b + 1]]).prod(dim=0) for b in range(6)]
    for halt, holds in (
        (Halt("threshold", threshold=0.5, min_loops=2), [q_b >= 0.5 for q_b in q]),
        (Halt("convergence", epsilon=middle, min_loops=2), [step <= middle for step in steps]),
        (Halt("cdf", threshold=0.9, min_loops=2), [q_b >= 0.9 for q_b in cumulated]),
    ):
        log_doubt = 0.0
        for b in range(6):
            stops, log_doubt = halt.stops(model, b + 1, states[b], states[b + 1], log_doubt)
            assert torch.equal(stops, holds[b] & torch.tensor(b + 1 >= 2)), (halt, b)
        assert 0 < torch.stack(holds).float().mean() < 1


@torch.no_grad()
def test_a_stopped_token_keeps_its_state_and_the_others_see_its_last_keys_and_values():
    """The definition, `early_exit`, against attention written out token by token, for M of one layer."""
    model = random_model("gpt2", n_layer=3)
    block = model.reasoning[0]
    idx = torch.randint(0, 257, (1, 10))
    h, depths = early_exit(model, idx, 5, Halt(threshold=0.55))
    assert len(depths.unique()) > 1
    state = model.encode(idx)[0]
    stopped = [0] * 10
    keys = [None] * 10
    values = [None] * 10
    for b in range(1, 6):
        entering = state.clone()
        running = [t for t in range(10) if not stopped[t]]
        for t in running:
            _, k, v = block.qkv(block.ln_1(entering[t])).split(32)
            keys[t] = k.view(4, 8)
            values[t] = v.view(4, 8)
        for t in running:
            q, _, _ = block.qkv(block.ln_1(entering[t])).split(32)
            k = torch.stack(keys[: t + 1], dim=1)  # (heads, t + 1, 8)
            v = torch.stack(values[: t + 1], dim=1)
            weights = torch.softmax(k @ q.view(4, 8, 1) / 8**0.5, dim=1)
            x = entering[t] + block.out((weights * v).sum(dim=1).flatten())
            state[t] = model.gate(x + block.mlp(block.ln_2(x)), entering[t])
            if torch.sigmoid(model.confidence(state[t])) >= 0.55:
                stopped[t] = b
    assert [b or 5 for b in stopped] == depths[0].tolist()
    torch.testing.assert_close(h[0], state, atol=1e-5, rtol=1e-5)


# ---- The caches
@pytest.mark.parametrize("loops", [0, 1, 4])
@torch.no_grad()
def test_cached_decoding_gives_uncached_logits(model, loops):
    idx = torch.randint(0, 257, (2, 24))
    expected = model(idx, loops)
    cache = model.new_cache(2, 24, loops)
    end = 0
    for T in (7, 1, 1, 5, 1, 9):  # a prompt, single tokens, several at once
        logits, depths = model.advance(idx[:, end : end + T], [end] * 2, cache, loops, Halt(threshold=2))
        end += T
        torch.testing.assert_close(logits, expected[:, end - 1], **CLOSE)
        assert (depths == loops).all()


def some_halt(chance, model):
    """A rule at random, with settings at which the tokens of random models stop at different depths."""
    rule = chance.choice(loopus.RULES)
    h = model.encode(torch.arange(9)[None])
    length = (model.refine(h) - h).norm(dim=-1).median().item()
    threshold = chance.uniform(0.6, 0.95) if rule == "cdf" else chance.uniform(0.4, 0.65)
    return Halt(rule, threshold, epsilon=length * chance.uniform(0.3, 1.0), min_loops=chance.choice([1, 1, 2, 3]))


def decode_in_pieces(model, idx, loops, halt, chance):
    """Run idx by `advance`, in pieces of random length. → {last position of a piece: its logits}, all depths."""
    cache = model.new_cache(len(idx), idx.size(1) + chance.randrange(3), loops)
    end = 0
    logits = {}
    depths = []
    while end < idx.size(1):
        piece = idx[:, end : end + chance.choice([1, 1, 1, 2, 5, 9])]
        last, depth = model.advance(piece, [end] * len(idx), cache, loops, halt)
        end += piece.size(1)
        logits[end - 1] = last
        depths.append(depth)
    return logits, torch.cat(depths, dim=1)


@pytest.mark.parametrize("seed", seeds(120))
@torch.no_grad()
def test_cached_early_exit_is_its_definition_for_a_batch_and_for_each_text_alone(seed):
    chance = random.Random(seed)
    shape, more = chance.choice(KINDS)
    model = random_model(shape, seed, **more)
    idx = torch.randint(0, 257, (chance.choice([1, 2, 5]), chance.choice([8, 20])))
    halt = some_halt(chance, model)
    loops = chance.choice([0, 1, 4, 7])
    h, expected_depths = early_exit(model, idx, loops, halt)
    expected = model.decode(h)
    for rows in [range(len(idx)), *([i] for i in range(len(idx)))]:
        logits, depths = decode_in_pieces(model, idx[rows], loops, halt, chance)
        assert torch.equal(depths, expected_depths[rows])
        assert (depths >= min(halt.min_loops, loops)).all()
        for t, last in logits.items():
            torch.testing.assert_close(last, expected[rows, t], **CLOSE)


@torch.no_grad()
def test_the_random_settings_of_these_tests_stop_tokens_at_different_depths():
    for rule in loopus.RULES:
        reached = set()
        for seed in range(12):
            model = random_model("llama", seed)
            halt = some_halt(random.Random(seed), model)._replace(rule=rule, min_loops=1)
            _, depths = early_exit(model, torch.randint(0, 257, (2, 20)), 7, halt)
            reached |= set(depths.flatten().tolist())
        assert len(reached) >= 4, rule


@torch.no_grad()
def test_a_pass_runs_only_on_texts_that_still_loop(model):
    texts = []
    model.reasoning[0].register_forward_hook(lambda block, inputs, output: texts.append(len(output)))
    idx = torch.randint(0, 257, (6, 12))
    cache = model.new_cache(6, 12, 6)
    total = 0
    for t in range(12):
        total += model.advance(idx[:, t : t + 1], [t] * 6, cache, 6, Halt(threshold=0.53))[1].sum()
    assert sum(texts) == total < 6 * 6 * 12


# ---- Writing
def test_beyond_the_context_a_text_goes_on_from_its_newest_half(model):
    tokens, _ = model.generate(torch.randint(0, 257, (1, 60)), 40, max_loops=2, threshold=2, temperature=0)
    assert tokens.shape == (1, 100)
    begin = 0  # of the window that the next token is made from
    for t in range(60, 100):
        if t - begin > 64:
            begin = t - 32
        assert tokens[0, t] == model(tokens[:, begin:t], 2)[0, -1].argmax()


@pytest.mark.parametrize("seed", seeds(40))
@torch.no_grad()
def test_each_text_of_a_batch_is_what_it_is_alone_up_to_its_end(seed):
    chance = random.Random(seed)
    model = random_model(chance.choice(["gpt2", "llama"]), seed, block_size=chance.choice([24, 64]))
    new = chance.choice([8, 30])
    prompts = [[chance.randrange(257) for _ in range(chance.choice([1, 3, 3, 17, 24]))] for _ in range(4)]
    more = dict(max_loops=chance.choice([0, 1, 4, 6]), halt=some_halt(chance, model), temperature=0)
    together, depths = model.generate(prompts, new, **more)
    end = together[chance.randrange(4)][-1 - chance.randrange(new)]
    ended, ended_depths = model.generate(prompts, new, ends=[end], **more)
    for i, prompt in enumerate(prompts):
        alone, depths_alone = model.generate(torch.tensor([prompt]), new, **more)
        assert alone[0].tolist() == together[i]
        assert torch.equal(depths_alone[0], depths[i])
        written = together[i][len(prompt) :]
        count = written.index(end) + 1 if end in written else new
        assert ended[i] == prompt + written[:count] + [end] * (new - count)
        assert ended_depths[i].tolist() == depths[i, :count].tolist() + [0] * (new - count)


def test_no_new_token_is_no_error(model):
    idx = torch.zeros(2, 5, dtype=torch.long)
    tokens, depths = model.generate(idx, 0)
    assert torch.equal(tokens, idx)
    assert depths.shape == (2, 0)
    assert model.generate([[1], [2, 3]], 0)[0] == [[1], [2, 3]]


def test_a_seed_repeats_a_text_and_the_likeliest_token_alone_is_greedy_decoding(model):
    idx = torch.randint(0, 257, (2, 5))

    def text(seed, **more):
        return model.generate(idx, 12, 2, generator=torch.Generator().manual_seed(seed), **more)[0]

    assert torch.equal(text(1), text(1))
    assert not torch.equal(text(1), text(2))
    greedy = text(1, temperature=0)
    for more in (dict(top_k=1), dict(top_p=1e-6), dict(top_p=0.0), dict(temperature=1e-9)):
        assert torch.equal(text(1, **more), greedy), more


@pytest.mark.parametrize(
    "settings, expected",
    [
        (dict(), [0.1, 0.4, 0.05, 0.3, 0.15]),
        (dict(temperature=0.5), [0.01 / 0.285, 0.16 / 0.285, 0.0025 / 0.285, 0.09 / 0.285, 0.0225 / 0.285]),
        (dict(top_k=2), [0, 4 / 7, 0, 3 / 7, 0]),
        (dict(top_p=0.75), [0, 0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85]),  # 0.4 + 0.3 do not reach it yet
        (dict(top_k=3, top_p=0.3), [0, 1, 0, 0, 0]),
    ],
)
def test_tokens_are_drawn_with_the_right_probabilities(settings, expected):
    logits = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]).log().expand(20000, 5)
    drawn = loopus.sample(logits, generator=torch.Generator().manual_seed(0), **settings)
    shares = torch.bincount(drawn, minlength=5) / 20000
    torch.testing.assert_close(shares, torch.tensor(expected, dtype=torch.float32), atol=0.015, rtol=0)


@pytest.mark.parametrize(
    "named, use",
    [
        ("65 tokens do not fit the model's context of 64", lambda model: model.generate([[0] * 65], 1)),
        ("a prompt is empty", lambda model: model.generate([[1], []], 1)),
        ("a prompt is empty", lambda model: model.generate([], 1)),
        ("'never'", lambda model: model.generate([[1]], 1, halt=Halt("never"))),
        ("not finite", lambda model: loopus.sample(torch.tensor([[0.0, torch.nan]]))),
        ("encoder_layers=3 and decoder_layers=2", lambda model: random_model(encoder_layers=3, decoder_layers=2)),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line_that_names_it(named, use):
    with pytest.raises(InputError) as refused:
        use(random_model())
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)


# ---- Writing made fast, in sample.py: the text stays the same
def assert_writes_the_same(fast, model, prompts, loops, threshold):
    expected, expected_depths = model.generate(prompts, 12, loops, threshold, temperature=0)
    tokens, depths = fast.generate(prompts, 12, loops, threshold, temperature=0)
    assert tokens == expected
    assert torch.equal(depths, expected_depths)


def prompts_of(*lengths):
    return [torch.randint(0, 257, (length,)).tolist() for length in lengths]


@pytest.mark.slow
@pytest.mark.parametrize("shape, more", [("gpt2", {}), ("llama", dict(qk_norm=True)), ("llama", dict(n_kv_head=4))])
def test_compiled_text_is_the_same_and_one_step_serves_all_layers_passes_and_positions(shape, more):
    model = random_model(shape, 5, **more)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fast = sample.made_fast(model, sample.Settings(compile=True))
    assert fast is not model  # compiling did not fail
    for prompts in (prompts_of(9), prompts_of(3), prompts_of(3, 21, 4)):
        assert_writes_the_same(fast, model, prompts, 6, 0.52)
    # of the layer and of the output, each for one text, for some, and the layer for some of those in the cache
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("cut", [(1, 1), (0, 0)])
@torch.no_grad()
def test_recorded_text_is_the_same(model, cut):
    convert.cut(model.to("cuda"), *cut)
    fast = copy.deepcopy(model)
    sample.record_step(fast)
    for loops, threshold in ((4, 2.0), (4, 0.52), (0, 2.0)):
        assert_writes_the_same(fast, model, prompts_of(3, 21, 4), loops, threshold)


# ---- Training
@pytest.fixture
def batch():
    """Inputs and next tokens, (2, 12) each."""
    idx = torch.randint(0, 257, (2, 13), generator=torch.Generator().manual_seed(3))
    return idx[:, :-1], idx[:, 1:]


def one_pass(model, x):
    """A state without graph, and the one that a pass makes of it."""
    h_before = model.encode(x).detach()
    return h_before, model.refine(h_before)


def test_the_losses_are_those_of_section_3_2(model, batch):
    x, y = batch
    h_before, h = one_pass(model, x)
    lm, mono, q_loss = losses(model, h, h_before, y, y)

    def nll(h):  # the mean of −log p(next token)
        return -torch.log_softmax(model.decode(h), dim=-1).gather(-1, y[..., None]).mean()

    torch.testing.assert_close(lm, nll(h))
    difference = nll(h) - nll(h_before)
    torch.testing.assert_close(mono, difference * torch.sigmoid(difference))
    right = (model.decode(h).argmax(dim=-1) == y).float()
    q = torch.sigmoid(model.confidence(h))
    torch.testing.assert_close(q_loss, -(right * q.log() + (1 - right) * (1 - q).log()).mean())


def test_masked_targets_are_not_learned_but_the_confidence_is_where_the_next_token_is_known(model, batch):
    x, y = batch
    masked = y.clone()
    masked[:, :7] = -100
    masked[1, -1] = -100  # nobody knows what follows
    [(lm, _, q_loss)] = deep_supervision(model, x, masked, [0])
    h = model.refine(model.encode(x))
    logits = model.decode(h)
    torch.testing.assert_close(lm, F.cross_entropy(logits[masked >= 0], masked[masked >= 0]))
    right = (logits.argmax(dim=-1) == y).float()
    bce = F.binary_cross_entropy_with_logits(model.confidence(h), right, reduction="none")
    torch.testing.assert_close(q_loss, bce.flatten()[:-1].mean())


def test_the_confidence_per_sequence_is_equation_13(model, batch):
    x, y = batch
    targets = y.clone()
    targets[1, 3:] = -100
    h_before, h = one_pass(model, x)
    right = (model.decode(h).argmax(dim=-1) == y).float()
    share = torch.stack((right[0].mean(), right[1, :3].mean()))
    q = torch.sigmoid(model.confidence(h)[:, -1])  # of the last token
    bce = -(share * q.log() + (1 - share) * (1 - q).log())
    _, _, q_loss = losses(model, h, h_before, targets, targets, loopus.sequence_confidence_loss)
    torch.testing.assert_close(q_loss, bce.mean())
    targets[1] = -100  # a sequence of which nothing is known does not count
    _, _, q_loss = losses(model, h, h_before, targets, targets, loopus.sequence_confidence_loss)
    torch.testing.assert_close(q_loss, bce[0])


def train_once(model, x, y, supervised, span):
    for terms in deep_supervision(model, x, y, supervised, span):
        sum(terms).backward()


def train_pass_by_pass(model, x, y, supervised, span):
    """The same with one graph per supervised pass, from a state without graph: what came before runs anew for each."""
    last = -1
    for b in sorted(supervised):
        first = max(b - span + 1, last + 1, 0)  # of the passes with gradient
        with torch.set_grad_enabled(b < span and last < 0):
            h = model.encode(x)
        with torch.no_grad():
            for _ in range(first):
                h = model.refine(h)
        for _ in range(first, b + 1):
            h_before = h
            h = model.refine(h)
        logits = model.decode(h)
        lm = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        lm_before = F.cross_entropy(model.decode(h_before).flatten(0, 1), y.flatten()).item()  # no gradient
        right = (logits.argmax(dim=-1) == y).float()
        q = F.binary_cross_entropy_with_logits(model.confidence(h), right)
        (lm + F.silu(lm - lm_before) + q).backward()
        last = b


@pytest.mark.parametrize("encoder_trains", [False, True])
@pytest.mark.parametrize("supervised", [[0], [3], [4, 1], [1, 2], [0, 5, 3]])
@pytest.mark.parametrize("span", [1, 2, 3, 9])
def test_gradients_cross_the_span_and_no_more(model, batch, encoder_trains, supervised, span):
    """Never past the last supervised pass, nor past h⁰ unless the encoder trains; none through the loss before."""
    expecting = copy.deepcopy(model)
    for m in (model, expecting):
        for name, p in m.named_parameters():
            p.requires_grad_(encoder_trains or not name.startswith(("wte", "wpe", "encoder")))
    train_once(model, *batch, supervised, span)
    train_pass_by_pass(expecting, *batch, supervised, span)
    for (name, p), expected in zip(model.named_parameters(), expecting.parameters()):
        torch.testing.assert_close(p.grad, expected.grad, atol=1e-5, rtol=1e-3, msg=name)
        if name.startswith(("wte", "wpe", "encoder")):
            assert (p.grad is not None) == (encoder_trains and min(supervised) < span), name
    assert model.reasoning[0].qkv.weight.grad.any()


def test_passes_after_the_last_supervised_one_do_not_run(model, batch):
    passes = []
    model.gate.register_forward_hook(lambda *_: passes.append(1))
    for supervised in ([1, 3], [2, 1], [0]):
        passes.clear()
        assert len(list(deep_supervision(model, *batch, supervised))) == len(supervised)
        assert len(passes) == max(supervised) + 1


def saved_bytes(model, batch, passes, span=1):
    """The most bytes that graphs hold at once when the last two passes are supervised."""
    held = []
    most = 0

    class Kept:
        def __init__(self, x):
            nonlocal most
            self.x = x
            held.append(x.nbytes)
            most = max(most, sum(held))

        def __del__(self):
            held.remove(self.x.nbytes)

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.x):
        train_once(model, *batch, [passes - 2, passes - 1], span)
    return most


def test_memory_depends_on_the_span_and_not_on_the_passes(model, batch):
    one = saved_bytes(model, batch, 4)
    assert saved_bytes(model, batch, 20) == pytest.approx(one, rel=0.05)
    four = saved_bytes(model, batch, 20, span=4)
    assert four > 1.5 * one > 15000
    assert saved_bytes(model, batch, 8, span=4) == pytest.approx(four, rel=0.05)
