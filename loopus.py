"""
LoopUS (Looped Depth Up-Scaling, Park et al. 2026, arXiv 2605.11011) in one file: a pretrained model that thinks longer.

The layers of a pretrained transformer are cut, in order, into an encoder E, a reasoning block M and a decoder D. E runs
once, M runs up to max_loops (the paper's B) times through a selective gate, each time a pass, D runs once (§3.1):

    h⁰      = E(x)
    δ       = M(h) − h                                 the change that one pass of M proposes
    Δ       = softplus(W_up (W_down δ) + b)            Eq. 3: a step size per token and channel
    α       = exp(Δ ⊙ A),  A = −exp(A_log)             Eq. 4: how much of the proposal to take, in (0, 1)
    h^{b+1} = α ⊙ M(h^b) + (1 − α) ⊙ h^b               Eq. 5: a damped step towards the fixed point h* = M(h*)
    logits  = D(h^B)
    q(h)    = σ(Linear(LayerNorm(h)))                  the confidence that this state is good enough to stop
Shapes: B batch, T tokens, C width of the states (n_embd), V vocabulary, n heads, m key/value heads, hd width of a head.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

NORM = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}  # GPT-2's with bias, Llama's
RULES = ("threshold", "convergence", "cdf")  # by which a token stops: `Halt.stops`


class InputError(ValueError):
    """What the user gave cannot be used. One line: what was found, where, what was expected, what to do."""


def precise(x):
    """x in float32 if it is coarser. Decisions and sums need more than the 8 bits of bf16's mantissa."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass
class Config:
    """The pretrained transformer and where it is cut. Raises InputError if the numbers contradict each other."""

    vocab_size: int
    block_size: int  # longest context, in tokens
    n_layer: int  # layers of the pretrained model: encoder + reasoning block + decoder
    n_head: int
    n_kv_head: int  # fewer than n_head: grouped-query attention
    head_dim: int
    n_embd: int  # C
    n_inner: int  # width inside the MLP
    norm: str  # "layer": LayerNorm with bias (GPT-2); "rms": RMSNorm (Llama)
    norm_eps: float
    mlp: str  # "gelu": tanh-GELU (GPT-2); "swiglu" (Llama)
    rotary: list | None = None  # angles by which one position turns each pair of channels; None: learned positions
    qkv_bias: bool = False  # biases: GPT-2 has them all, Qwen2 the first, most others none
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm on each head's queries and keys (Qwen3)
    encoder_layers: int = 1  # the first layers, run once
    decoder_layers: int = 1  # the last layers, run once
    q_threshold: float = 0.6  # the confidence to stop at that suits this model
    base: dict | None = None  # the pretrained model's own config.json, for writing it back

    def __post_init__(self):
        self.reasoning_layers = self.n_layer - self.encoder_layers - self.decoder_layers
        if min(self.encoder_layers, self.decoder_layers, self.reasoning_layers - 1) < 0:
            cut = f"encoder_layers={self.encoder_layers} and decoder_layers={self.decoder_layers}"
            raise InputError(f"{cut} leave no reasoning block in {self.n_layer} layers: take fewer of them")


# ---- The pretrained transformer's own layers: GPT-2's or Llama's, by config
class Positions(NamedTuple):
    """Where the T tokens of a call stand. The last three are for calls with a cache."""

    position: Tensor  # (B or 1, T)
    cos: Tensor = None  # (B or 1, T, 1, hd/2); None: learned positions
    sin: Tensor = None
    mask: Tensor = None  # (B, 1, T, S): which of a cache's S positions each token sees; None: whole prompts
    rows: Tensor = None  # (B,): which texts of the cache these are, ascending
    running: Tensor = None  # (B, T) bool: which tokens still loop, and write their keys and values

    def in_cache(self, rows, S):
        """The same in a cache of S positions, as its texts `rows`. All tokens run."""
        cached = torch.arange(S, device=rows.device)
        mask = cached <= self.position[:, None, :, None]
        return self._replace(mask=mask, rows=rows, running=self.position >= 0)


def rotate(x, cos, sin):
    """Turn each pair of channels (i, i + hd/2) of x (B, T, n, hd) by its position's angle."""
    x1, x2 = x.chunk(2, dim=-1)
    y1 = x1 * cos - x2 * sin
    y2 = x2 * cos + x1 * sin
    return torch.cat((y1, y2), dim=-1).type_as(x)


def update_cache(kv, k, v, at):
    """Put k, v (B, T, m, hd) of running tokens in kv (2, texts, S, m, hd). → (2, B, S, m, hd); S = T without a mask."""
    place = (slice(None), at.rows[:, None], at.position)
    running = at.running[..., None, None]
    new = torch.stack((k, v))
    kv[place] = torch.where(running, new, kv[place])
    if len(at.rows) < kv.size(1):
        kv = kv[:, at.rows]
    if at.mask is None:  # whole prompts see only themselves
        kv = kv[:, :, : k.size(1)]
    return kv


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.ln_1 = NORM[c.norm](c.n_embd, eps=c.norm_eps)
        qkv_width = (c.n_head + 2 * c.n_kv_head) * c.head_dim
        self.qkv = nn.Linear(c.n_embd, qkv_width, bias=c.qkv_bias)
        if c.qk_norm:
            self.q_norm = nn.RMSNorm(c.head_dim, eps=c.norm_eps)
            self.k_norm = nn.RMSNorm(c.head_dim, eps=c.norm_eps)
        self.out = nn.Linear(c.n_head * c.head_dim, c.n_embd, bias=c.out_bias)
        self.ln_2 = NORM[c.norm](c.n_embd, eps=c.norm_eps)
        up_width = c.n_inner if c.mlp == "gelu" else 2 * c.n_inner
        self.up = nn.Linear(c.n_embd, up_width, bias=c.mlp_bias)
        self.down = nn.Linear(c.n_inner, c.n_embd, bias=c.mlp_bias)

    def attention(self, x, at, kv):
        """Causal self-attention of x (B, T, C), which stands at `at`; kv as in `update_cache`, or None."""
        B, T, _ = x.shape
        n, m, hd = self.c.n_head, self.c.n_kv_head, self.c.head_dim
        qkv = self.qkv(x).view(B, T, n + 2 * m, hd)
        q, k, v = qkv.split((n, m, m), dim=2)  # (B, T, n or m, hd)
        if self.c.qk_norm:
            q = self.q_norm(q)
            k = self.k_norm(k)
        if at.cos is not None:
            q = rotate(q, at.cos, at.sin)
            k = rotate(k, at.cos, at.sin)
        if kv is not None:
            k, v = update_cache(kv, k, v, at)
        q = q.transpose(1, 2)  # (B, n, T, hd)
        k = k.transpose(1, 2)  # (B, m, S, hd)
        v = v.transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, at.mask, is_causal=at.mask is None, enable_gqa=n != m)
        y = y.transpose(1, 2).reshape(B, T, n * hd)
        return self.out(y)

    def mlp(self, x):
        x = self.up(x)
        if self.c.mlp == "gelu":
            return self.down(F.gelu(x, approximate="tanh"))
        gate, x = x.chunk(2, dim=-1)
        return self.down(F.silu(gate) * x)

    def forward(self, x, at, kv=None):
        x = x + self.attention(self.ln_1(x), at, kv)
        return x + self.mlp(self.ln_2(x))


# ---- What LoopUS adds: the selective gate, the rules to stop, the loop
class SelectiveGate(nn.Module):
    """Eq. 3–5. With A_log = 0, as we start, α is σ(−(W_up W_down δ + b)), a plain sigmoid gate on the change."""

    def __init__(self, c):
        super().__init__()
        rank = -(-c.n_embd // 16)  # r = ceil(C / 16)
        self.down = nn.Linear(c.n_embd, rank, bias=False)  # W_down
        self.up = nn.Linear(rank, c.n_embd)  # W_up, b
        self.A_log = nn.Parameter(torch.zeros(c.n_embd))

    @torch.no_grad()
    def reset_parameters(self, start=0.5):
        """A number: α of every channel, an exact damped iteration of the pretrained block. "s4d": as the authors do."""
        if start == "s4d":
            self.up.reset_parameters()
            self.A_log.copy_(torch.arange(1, len(self.A_log) + 1).log())
            log_step = torch.empty_like(self.up.bias).uniform_(-6.9078, -2.3026)
            step_size = log_step.exp()  # log-uniform in [1e-3, 0.1]
        else:
            self.up.weight.zero_()
            self.A_log.zero_()
            alpha = torch.full_like(self.up.bias, float(start))
            step_size = -alpha.log()  # α = exp(−Δ)
        self.down.reset_parameters()
        self.up.bias.copy_(step_size.expm1().log())  # softplus(b) = Δ

    def alpha(self, delta):
        """α (B, T, C) in (0, 1) of the proposed change δ (B, T, C)."""
        step_size = F.softplus(precise(self.up(self.down(delta))))  # Δ, Eq. 3
        A = -precise(self.A_log).exp()
        return torch.exp(step_size * A).type_as(delta)  # Eq. 4

    def forward(self, proposed, h):
        """The next state (B, T, C) from M(h) and h, Eq. 5."""
        delta = proposed - h
        return h + self.alpha(delta) * delta


class Halt(NamedTuple):
    """When a token stops (§3.1): after the first pass b ≥ min_loops at which its rule holds."""

    rule: str = "threshold"
    threshold: float = 0.6
    epsilon: float = 1.0
    min_loops: int = 1

    def stops(self, model, b, h_before, h, log_doubt):
        """Pass b led from h_before to h (B, T, C). → which tokens stop (B, T), and log_doubt with its log(1 − q)."""
        confidence = precise(model.confidence(h))
        log_doubt = log_doubt + F.logsigmoid(-confidence)
        if self.rule == "threshold":  # q(h^b) ≥ threshold
            holds = torch.sigmoid(confidence) >= self.threshold
        elif self.rule == "convergence":  # ‖h^b − h^{b−1}‖₂ ≤ epsilon
            holds = precise(h - h_before).norm(dim=-1) <= self.epsilon
        elif self.rule == "cdf":  # 1 − Π_{j≤b} (1 − q(h^j)) ≥ threshold
            holds = -torch.expm1(log_doubt) >= self.threshold
        else:
            raise InputError(f"Halt has the rule {self.rule!r}: expected one of {', '.join(RULES)}")
        return holds & (b >= self.min_loops), log_doubt


class LoopUS(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.wte = nn.Embedding.from_pretrained(torch.empty(c.vocab_size, c.n_embd), freeze=False)  # not drawn
        if c.rotary is None:
            self.wpe = nn.Embedding.from_pretrained(torch.empty(c.block_size, c.n_embd), freeze=False)
        self.encoder = nn.ModuleList([Block(c) for _ in range(c.encoder_layers)])
        self.reasoning = nn.ModuleList([Block(c) for _ in range(c.reasoning_layers)])
        self.decoder = nn.ModuleList([Block(c) for _ in range(c.decoder_layers)])
        self.norm = NORM[c.norm](c.n_embd, eps=c.norm_eps)
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)  # never tied: by default it trains, wte does not
        self.gate = SelectiveGate(c)
        self.q_head = nn.Sequential(nn.LayerNorm(c.n_embd), nn.Linear(c.n_embd, 1))

    @torch.no_grad()
    def reset_new_parameters(self):
        """Start what no pretrained model has: the gate, and the confidence head at q = 0.5 everywhere."""
        self.gate.reset_parameters()
        self.q_head[0].reset_parameters()
        for p in self.q_head[1].parameters():
            p.zero_()

    @property
    def device(self):
        return self.wte.weight.device

    def layers(self):
        return self.encoder + self.reasoning + self.decoder

    def positions(self, starts, T):
        """The Positions of T tokens of each text, from `starts` (B ints) on. InputError: beyond the model's context."""
        c = self.config
        end = max(starts) + T
        if end > c.block_size:
            raise InputError(f"{end} tokens do not fit the model's context of {c.block_size}: give fewer")
        start = torch.tensor(starts, device=self.device)
        position = start[:, None] + torch.arange(T, device=self.device)
        if c.rotary is None:
            return Positions(position)
        turn = torch.tensor(c.rotary, device=self.device)
        angle = position[..., None, None] * turn  # (B, T, 1, hd/2)
        return Positions(position, angle.cos(), angle.sin())

    def run(self, stack, h, at=None, cache=None):
        """h (B, T, C) through the layers of a stack; at: 0 … T−1 unless given; cache: its part of `new_cache`."""
        at = at or self.positions([0], h.size(1))
        if cache is None:
            cache = [None] * len(stack)
        for block, kv in zip(stack, cache):
            h = block(h, at, kv)
        return h

    def encode(self, idx, at=None, cache=None):
        """E: tokens (B, T) → h⁰ (B, T, C)."""
        at = at or self.positions([0], idx.size(1))
        x = self.wte(idx)
        if self.config.rotary is None:
            x = x + self.wpe(at.position)
        return self.run(self.encoder, x, at, cache)

    def propose(self, h, at=None, cache=None):
        """M(h): one ungated pass of the reasoning block (B, T, C)."""
        return self.run(self.reasoning, h, at, cache)

    def refine(self, h, at=None, cache=None):
        """One gated pass: h^b → h^{b+1} (B, T, C), Eq. 5."""
        return self.gate(self.propose(h, at, cache), h)

    def confidence(self, h):
        """The logit of q(h), (B, T); q itself is its sigmoid."""
        return self.q_head(h).squeeze(-1)

    def decode(self, h, at=None, cache=None):
        """D: state (B, T, C) → logits (B, T, V); with a cache those of the last token alone, (B, 1, V)."""
        h = self.run(self.decoder, h, at, cache)
        if cache is not None:
            h = h[:, -1:]
        return self.lm_head(self.norm(h))

    def forward(self, idx, loops):
        """Logits (B, T, V) after `loops` gated passes, unstopped; loops=0: the pretrained model, one ungated pass."""
        h = self.encode(idx)
        if loops < 1:
            h = self.propose(h)
        for _ in range(loops):
            h = self.refine(h)
        return self.decode(h)

    def loss(self, h, targets):
        """Mean cross-entropy in nats of D(h) against targets (B, T), without −100; and the likeliest tokens (B, T)."""
        logits = precise(self.decode(h))
        lm = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return lm, logits.argmax(dim=-1)

    def new_cache(self, texts, size, max_loops):
        """Keys and values of `size` positions: (layers, 2, texts, size, m, hd) for E, for M at each pass, and for D."""
        shape = (2, texts, size, self.config.n_kv_head, self.config.head_dim)
        stacks = [self.encoder, *[self.reasoning] * max(1, max_loops), self.decoder]
        like = {"dtype": self.wte.weight.dtype, "device": self.device}
        return [torch.zeros(len(stack), *shape, **like) for stack in stacks]

    @torch.no_grad()
    def advance(self, idx, starts, cache, max_loops, halt, rows=None):
        """Run tokens idx (B, T) of the texts `rows` (ascending; None: all) of a cache that holds the `starts` (B ints)
        tokens before them, each until `halt` stops it. → logits of the last token (B, V), depth of each (B, T)."""
        rows = torch.tensor(rows or range(len(starts)), device=idx.device)
        at = self.positions(starts, idx.size(1))
        at = at.in_cache(rows, S=cache[0].size(3))
        if idx.size(1) > 1 and max(starts) == 0:  # whole prompts need no mask (single tokens keep theirs: one shape)
            at = at._replace(mask=None)
        place = (slice(None), slice(None), rows[:, None], at.position)
        h = self.encode(idx, at, cache[0])
        if max_loops < 1:
            h = self.propose(h, at, cache[1])
        depth = torch.zeros_like(idx)
        running = at.running
        log_doubt = 0.0
        for b in range(1, max_loops + 1):
            if b > 1:  # a token that has stopped keeps the keys and values of its last pass
                cache[b][place] = cache[b - 1][place]
            texts = running.any(1).nonzero().flatten()  # those in which a token still runs
            if len(texts) == 0:
                continue
            part = [field if field is None else field[texts] for field in at._replace(running=running)]
            refined = self.refine(h[texts], Positions(*part), cache[b])
            h_before = h
            refined = h.index_copy(0, texts, refined)
            h = torch.where(running[..., None], refined, h)
            depth += running
            stop, log_doubt = halt.stops(self, b, h_before, h, log_doubt)
            running = running & ~stop
        return self.decode(h, at, cache[-1]).squeeze(1), depth

    @torch.no_grad()
    def stream(self, prompts, max_new_tokens, max_loops, halt, draw, ends=()):
        """Continue prompts (lists of tokens) a token at a time: yields (token, depth) of each. draw: logits (B, V) →
        tokens (B,). A text ends with a token of `ends`, then yielded again with depth 0. In a full context the newest
        half of a text runs again from position 0. InputError: a prompt that is empty or too long."""
        texts = [list(prompt) for prompt in prompts]
        if not texts or [] in texts:
            raise InputError("a prompt is empty: give at least one token")
        size = min(self.config.block_size, max(map(len, texts)) + max_new_tokens)
        cache = self.new_cache(len(texts), size, max_loops)
        cached = [0] * len(texts)  # how many tokens of each text the cache holds
        writing = range(len(texts))
        for _ in range(max_new_tokens):
            alike = defaultdict(list)  # texts with equally many new tokens run together
            for i in writing:
                if len(texts[i]) > size and cached[i] > 0:
                    texts[i] = texts[i][-(size // 2) :]
                    cached[i] = 0
                alike[len(texts[i]) - cached[i]].append(i)
            written = [(text[-1], 0) for text in texts]
            for rows in alike.values():
                starts = [cached[i] for i in rows]
                unread = [texts[i][cached[i] :] for i in rows]
                idx = torch.tensor(unread, device=self.device)
                logits, depth = self.advance(idx, starts, cache, max_loops, halt, rows)
                drawn = draw(logits).tolist()
                for i, token, passes in zip(rows, drawn, depth[:, -1].tolist()):
                    cached[i] = len(texts[i])
                    texts[i].append(token)
                    written[i] = (token, passes)
            yield written
            writing = [i for i in writing if written[i][0] not in ends]

    def generate(self, idx, max_new_tokens, max_loops=8, threshold=0.6, *, halt=None, ends=(), **drawing):
        """Continue idx, (B, T) or B lists of tokens; drawing: arguments of `sample`. max_loops=0: the pretrained model,
        threshold above 1: no exit. → tokens (B, T + max_new_tokens) or B lists, passes taken (B, max_new_tokens)."""
        prompts = idx.tolist() if torch.is_tensor(idx) else idx
        halt = halt or Halt(threshold=threshold)
        draw = partial(sample, **drawing)
        steps = list(self.stream(prompts, max_new_tokens, max_loops, halt, draw, ends))
        steps = torch.tensor(steps, dtype=torch.long, device=self.device)
        steps = steps.view(-1, len(prompts), 2)
        tokens, depths = steps.permute(2, 1, 0)  # (B, max_new_tokens) each
        if torch.is_tensor(idx):
            return torch.cat((idx, tokens), dim=1), depths
        texts = [[*prompt, *more] for prompt, more in zip(prompts, tokens.tolist())]
        return texts, depths


def sample(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draw tokens (B,) from logits (B, V), among the fewest of the top_k likeliest that reach the probability top_p."""
    if not logits.isfinite().all():
        raise InputError("the model's logits are not finite: are its weights or its config.json damaged?")
    if temperature < 1e-6:  # float32 cannot divide by much less
        return logits.argmax(dim=-1)
    logits, order = logits.float().sort(descending=True)
    logits = (logits - logits[:, :1]) / temperature
    if top_k is not None:
        logits[:, top_k:] = -torch.inf
    probability = logits.softmax(-1)
    if top_p is not None:
        likelier = probability.cumsum(dim=-1) - probability  # of all that come before
        probability[likelier >= max(top_p, 1e-9)] = 0.0
    drawn = torch.multinomial(probability, 1, generator=generator)
    return order.gather(1, drawn).squeeze(1)


@torch.no_grad()
def early_exit(model, idx, max_loops, halt):
    """What early exit means for idx (B, T): a stopped token keeps its state, and all deeper passes see the keys and
    values of its last one. → states (B, T, C), depths (B, T)."""
    h = model.encode(idx)
    depth = torch.zeros_like(idx)
    if max_loops < 1:
        return model.propose(h), depth
    B, T = idx.shape
    last_kv = model.new_cache(B, T, 1)[1].to(h.dtype)  # keys and values of each token's last pass
    at = model.positions([0] * B, T)
    at = at.in_cache(torch.arange(B, device=idx.device), S=T)
    running = at.running
    log_doubt = 0.0
    for b in range(1, max_loops + 1):
        refined = model.refine(h, at._replace(running=running), last_kv)
        h_before = h
        h = torch.where(running[..., None], refined, h)
        depth += running
        stop, log_doubt = halt.stops(model, b, h_before, h, log_doubt)
        running = running & ~stop
    return h, depth


# ---- Training
def token_confidence_loss(confidence, right, known):
    """L_Q with one target per token, as in Fig. 4: was the likeliest token right? All arguments (B, T)."""
    return F.binary_cross_entropy_with_logits(confidence[known], right[known].float())


def sequence_confidence_loss(confidence, right, known):
    """L_Q with one target per sequence, Eq. 13: q of its last token against the share of its tokens that are right."""
    count = known.sum(dim=1)
    scored = count > 0
    share = (right & known).sum(dim=1)[scored] / count[scored]
    return F.binary_cross_entropy_with_logits(confidence[scored, -1], share)


def losses(model, h, h_before, targets, following, confidence_loss=token_confidence_loss):
    """The terms of L (§3.2) in nats, of the state h that one pass made from h_before (B, T, C):
    L_LM   = CE(D(h), targets): the next tokens (B, T) that are learned, −100 for the others
    L_mono = SiLU(L_LM − L_LM of h_before, without gradient): a pass should do no harm
    L_Q    = BCE(q(h), was the prediction right?) over all `following` tokens: a prompt's tokens can stop, too"""
    lm, likeliest = model.loss(h, targets)
    with torch.no_grad():
        lm_before, _ = model.loss(h_before, targets)
    mono = F.silu(lm - lm_before)
    confidence = precise(model.confidence(h))
    q = confidence_loss(confidence, likeliest == following, following != -100)
    return lm, mono, q


def deep_supervision(model, idx, targets, supervised, span=1, confidence_loss=token_confidence_loss):
    """Random deep supervision (§3.2, Fig. 4): loop over idx (B, T), and yield the `losses` after each supervised pass
    (from 0). Call backward before asking for the next: memory then holds one span. A gradient crosses `span` passes
    (the paper: 1), never past the last supervised one, nor past h⁰ unless the encoder trains."""
    following = torch.cat((idx[:, 1:], targets[:, -1:]), dim=1)
    tracked = {b - i for b in supervised for i in range(span)}  # passes with gradient
    with torch.set_grad_enabled(0 in tracked):
        h = model.encode(idx)
    for b in range(max(supervised) + 1):  # later passes would teach nothing
        h_before = h
        torch.clear_autocast_cache()  # under autocast, older torch reuses weights that were cast without gradient
        with torch.set_grad_enabled(b in tracked):
            h = model.refine(h)
        if b in supervised:
            yield losses(model, h, h_before, targets, following, confidence_loss)
            h = h.detach()
