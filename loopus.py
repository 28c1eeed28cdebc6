"""
LoopUS (Looped Depth Up-Scaling, Park et al. 2026, arXiv 2605.11011) in one file: a pretrained model that thinks longer.

The L layers of a pretrained transformer are cut, in order, into an encoder E, a reasoning block M and a decoder D. E
runs once, M runs up to B times through a selective gate, D runs once (§3.1):

    h⁰      = E(x)
    δ       = M(h) − h                                 what one pass of M proposes to change
    Δ       = softplus(W_up (W_down δ) + b)            Eq. 3: a step size per token and channel
    α       = exp(Δ ⊙ A),  A = −exp(A_log)             Eq. 4: how much of the proposal to take, in (0, 1)
    h^{b+1} = α ⊙ M(h^b) + (1 − α) ⊙ h^b               Eq. 5: a damped step towards the fixed point h* = M(h*)
    logits  = D(h^B)
    q(h)    = σ(Linear(LayerNorm(h)))                  the confidence that this state is good enough to stop

Training (§3.2) is `deep_supervision`, inference `LoopUS.generate`. `early_exit` defines what stopping early means.

Shapes: B batch, T tokens, C width of the states (n_embd), V vocabulary, n heads, m key/value heads, hd width of a head.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

NORM = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}  # GPT-2's with bias, Llama's


class InputError(ValueError):
    """What the user gave cannot be used. One line: what was found, where, what was expected, what to do."""


def precise(x):
    """x in float32 where it is coarser: what decides or accumulates is not left to 8 bits of mantissa."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass
class Config:
    """The pretrained transformer and where it is cut. Raises InputError where the numbers contradict each other."""

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
    rope_theta: float  # base of the rotary frequencies; 0: learned positions (GPT-2)
    rope_scaling: dict | None = None  # Llama 3's stretching of the slow frequencies: see `span`
    partial_rotary: float = 1.0  # the share of a head's channels that is rotated
    qkv_bias: bool = False  # which linear layers have a bias: GPT-2 all, Qwen2 the first, most others none
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm on each head's queries and keys (Qwen3)
    encoder_layers: int = 1  # the first layers, run once
    decoder_layers: int = 1  # the last layers, run once
    gate_start: str = "0.5"  # α of every channel before training, or "s4d": the authors' start
    base: dict | None = None  # the pretrained model's own config.json, for writing it back

    def __post_init__(self):
        self.reasoning_layers = self.n_layer - self.encoder_layers - self.decoder_layers
        cut = f"encoder_layers={self.encoder_layers} and decoder_layers={self.decoder_layers}"
        if min(self.encoder_layers, self.decoder_layers) < 0 or self.reasoning_layers < 1:
            raise InputError(f"{cut} leave no reasoning block in {self.n_layer} layers: take fewer of them")
        if self.gate_start != "s4d" and not re.fullmatch(r"0?\.0*[1-9]\d*", self.gate_start):
            raise InputError(f"gate_start is {self.gate_start}: give a number between 0 and 1 (the first α), or s4d")


# ---- The pretrained transformer's own layer: GPT-2's or Llama's, by config
class Span(NamedTuple):
    """Where the T tokens of one call stand, what they see in a cache, and which of them still loop."""

    position: torch.Tensor  # (B or 1, T)
    cos: torch.Tensor | None  # rotary table (B or 1, T, 1, d/2) of the d rotated channels; None: learned positions
    sin: torch.Tensor | None
    mask: torch.Tensor | None = None  # (B, 1, T, S): which positions of a cache each token sees
    rows: torch.Tensor | None = None  # (B,): which texts of that cache these are
    running: torch.Tensor | None = None  # (B, T) bool: who writes keys and values there in this pass


def span(config, start, T, device, size=None, rows=None):
    """The Span of T tokens from position `start` on (a list, of all texts), without a cache, or with one of `size`
    positions in which these are the texts `rows` (a list; None: all). Llama 3's rope_scaling stretches wavelengths over
    original / low_freq_factor by `factor`, those under original / high_freq_factor not, and those between smoothly.
    Raises InputError past the context."""
    if (end := max(start) + T) > config.block_size:
        raise InputError(f"{end} tokens do not fit the model's context of {config.block_size}: shorten the text")
    position, cached = torch.tensor(start, device=device)[:, None] + torch.arange(T, device=device), ()
    if size is not None:
        mask = torch.arange(size, device=device) <= position[:, None, :, None]
        cached = mask, torch.tensor(rows or range(len(start)), device=device), position >= 0  # all run
    if not config.rope_theta:
        return Span(position, None, None, *cached)
    width = int(config.head_dim * config.partial_rotary)
    frequency = config.rope_theta ** -(torch.arange(0, width, 2, device=device).float() / width)
    if scaling := config.rope_scaling:
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * torch.pi)  # within the original context
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / scaling["factor"])
    angle = (position.float()[..., None] * frequency)[:, :, None]
    return Span(position, angle.cos(), angle.sin(), *cached)


def rotate(x, cos, sin):
    """Turn each pair of channels (i, i + d/2) of the first d of x (B, T, n, hd) by its position's angle."""
    half = cos.size(-1)
    x1, x2, rest = x.split((half, half, x.size(-1) - 2 * half), dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest), dim=-1).type_as(x)


class Linear(nn.Linear):
    """nn.Linear that for one token, compiled for a CPU, is a sum: this reads the matrix at the memory's speed, twice as
    fast as torch's own product. For int8 matrices there is a scale per row."""

    scale = None

    def forward(self, x):
        if x.numel() > self.in_features or not torch.compiler.is_compiling() or x.is_cuda or x.requires_grad:
            weight = self.weight if self.scale is None else (self.weight * self.scale[:, None]).type_as(x)
            return F.linear(x, weight, self.bias)
        y = (self.weight.float() * x.float()[..., None, :]).sum(dim=-1) * (1.0 if self.scale is None else self.scale)
        return (y if self.bias is None else y + self.bias).type_as(x)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.ln_1 = NORM[c.norm](c.n_embd, eps=c.norm_eps)
        self.qkv = Linear(c.n_embd, (c.n_head + 2 * c.n_kv_head) * c.head_dim, bias=c.qkv_bias)
        if c.qk_norm:
            self.q_norm, self.k_norm = (nn.RMSNorm(c.head_dim, eps=c.norm_eps) for _ in range(2))
        self.out = Linear(c.n_head * c.head_dim, c.n_embd, bias=c.out_bias)
        self.ln_2 = NORM[c.norm](c.n_embd, eps=c.norm_eps)
        self.up = Linear(c.n_embd, c.n_inner * (2 if c.mlp == "swiglu" else 1), bias=c.mlp_bias)
        self.down = Linear(c.n_inner, c.n_embd, bias=c.mlp_bias)

    def attention(self, x, at, kv):
        """Causal attention of x (B, T, C) at Span `at`. kv (2, texts, S, m, hd), if given, holds the keys and values of
        the positions before, and takes those of the tokens that still run; the others show what they left there."""
        B, T, _ = x.shape
        n, m, hd = self.c.n_head, self.c.n_kv_head, self.c.head_dim
        q, k, v = self.qkv(x).view(B, T, n + 2 * m, hd).split((n, m, m), dim=2)  # (B, T, n or m, hd)
        if self.c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if at.cos is not None:
            q, k = rotate(q, at.cos, at.sin), rotate(k, at.cos, at.sin)
        if kv is not None:
            here, new = (slice(None), at.rows[:, None], at.position), torch.stack((k, v))  # (2, B, T, m, hd)
            kv[here] = torch.where(at.running[..., None, None], new, kv[here])
            k, v = kv if B == kv.size(1) else kv[:, at.rows]
            if T == 1 and torch.compiler.is_compiling() and not x.is_cuda:  # as sums, like those of Linear
                scores = (q.view(B, 1, m, n // m, hd) * k[:, :, :, None]).sum(dim=-1) * hd**-0.5  # (B, S, m, n/m)
                weights = scores.masked_fill(~at.mask[:, 0, 0, :, None, None], -torch.inf).softmax(dim=1)
                return self.out((weights[..., None] * v[:, :, :, None]).sum(dim=1).reshape(B, 1, n * hd))
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, at.mask, is_causal=kv is None and T > 1, enable_gqa=n != m)
        return self.out(y.transpose(1, 2).reshape(B, T, n * hd))

    def mlp(self, x):
        if self.c.mlp == "gelu":
            return self.down(F.gelu(self.up(x), approximate="tanh"))
        gate, up = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)

    def forward(self, x, at, kv=None):
        x = x + self.attention(self.ln_1(x), at, kv)
        return x + self.mlp(self.ln_2(x))


# ---- What LoopUS adds: the selective gate, the confidence head, the loop
class SelectiveGate(nn.Module):
    """Eq. 3–5. With A_log = 0, as we start, α is σ(−(W_up W_down δ + b)), a plain sigmoid gate on the change."""

    def __init__(self, c):
        super().__init__()
        rank = -(-c.n_embd // 16)  # r = ceil(C / 16)
        self.down = nn.Linear(c.n_embd, rank, bias=False)  # W_down
        self.up = nn.Linear(rank, c.n_embd)  # W_up, b
        self.A_log = nn.Parameter(torch.zeros(c.n_embd))
        self.start = c.gate_start

    @torch.no_grad()
    def reset_parameters(self):
        """A number a: α = a in every channel, so that the untrained model is an exact damped iteration of the
        pretrained block. "s4d": the authors' start, as in Mamba; a tenth of its channels have α < 1e-7 for good."""
        if self.start == "s4d":
            step = torch.empty_like(self.up.bias).uniform_(-6.9078, -2.3026).exp()  # log-uniform in [1e-3, 0.1]
            self.up.weight.uniform_(-(self.up.in_features**-0.5), self.up.in_features**-0.5)
            self.A_log.copy_(torch.arange(1, len(self.A_log) + 1).log())
        else:
            step = -torch.full_like(self.up.bias, float(self.start)).log()  # α = exp(−step)
            self.up.weight.zero_()
            self.A_log.zero_()
        self.down.reset_parameters()
        self.up.bias.copy_(step.expm1().log())  # softplus(b) = step

    def alpha(self, delta):
        """α (B, T, C) in (0, 1) of the proposed change δ (B, T, C)."""
        step = F.softplus(precise(self.up(self.down(delta))))  # Δ, Eq. 3
        return torch.exp(-torch.exp(precise(self.A_log)) * step).type_as(delta)  # Eq. 4

    def forward(self, proposed, h):
        """The next state (B, T, C) from M(h) and h, Eq. 5."""
        delta = proposed - h
        return h + self.alpha(delta) * delta


class Halt(NamedTuple):
    """When a token stops (§3.1): after the first pass b ≥ min_loops for which, by the rule
    threshold: q(h^b) ≥ threshold; convergence: ‖h^b − h^{b−1}‖₂ ≤ epsilon; cdf: 1 − Π_{j≤b} (1−q(h^j)) ≥ threshold."""

    rule: str = "threshold"
    threshold: float = 0.6
    epsilon: float = 1.0
    min_loops: int = 1

    def stops(self, model, b, before, h, doubt):
        """Who stops after pass b, from `before` to h (B, T, C)? → (B, T) bool. Adds log(1 − q) to doubt (B, T)."""
        confidence = precise(model.confidence(h))
        doubt += F.logsigmoid(-confidence)
        if self.rule == "convergence":
            stop = precise(h - before).norm(dim=-1) <= self.epsilon
        else:
            stop = (-torch.expm1(doubt) if self.rule == "cdf" else torch.sigmoid(confidence)) >= self.threshold
        return stop & (b >= self.min_loops)


class LoopUS(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.checkpointing = False  # in training, keep each block's input alone and run it again in backward
        self.config = c = config
        self.wte = nn.Embedding.from_pretrained(torch.empty(c.vocab_size, c.n_embd), freeze=False)  # not drawn yet
        if not c.rope_theta:
            self.wpe = nn.Embedding.from_pretrained(torch.empty(c.block_size, c.n_embd), freeze=False)
        self.encoder = nn.ModuleList(Block(c) for _ in range(c.encoder_layers))
        self.reasoning = nn.ModuleList(Block(c) for _ in range(c.reasoning_layers))
        self.decoder = nn.ModuleList(Block(c) for _ in range(c.decoder_layers))
        self.norm = NORM[c.norm](c.n_embd, eps=c.norm_eps)
        self.lm_head = Linear(c.n_embd, c.vocab_size, bias=False)  # never tied: it trains, wte does not
        self.gate = SelectiveGate(c)
        self.q_head = nn.Sequential(nn.LayerNorm(c.n_embd), nn.Linear(c.n_embd, 1))

    @torch.no_grad()
    def reset_new_parameters(self):
        """Start what no pretrained model has: the gate, and the confidence head at q = 0.5 everywhere."""
        self.gate.reset_parameters()
        self.q_head[0].reset_parameters()
        nn.init.zeros_(self.q_head[1].weight)
        nn.init.zeros_(self.q_head[1].bias)

    def layers(self):
        """All blocks in the pretrained model's order."""
        return [*self.encoder, *self.reasoning, *self.decoder]

    def run(self, blocks, h, at=None, cache=None):
        at = at or span(self.config, [0], h.size(1), h.device)
        for i, block in enumerate(blocks):
            if self.checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, at, use_reentrant=False, preserve_rng_state=False)
            else:
                h = block(h, at, None if cache is None else cache[i])
        return h

    def embed(self, idx, at):
        """Tokens (B, T) at Span `at` → what the first layer reads (B, T, C)."""
        return self.wte(idx) if self.config.rope_theta else self.wte(idx) + self.wpe(at.position)

    def encode(self, idx, at=None, cache=None):
        """E: tokens (B, T) → h⁰ (B, T, C). Without a Span, the tokens stand at 0 … T−1; `cache` as in `new_cache`."""
        at = at or span(self.config, [0], idx.size(1), idx.device)
        return self.run(self.encoder, self.embed(idx, at), at, cache)

    def propose(self, h, at=None, cache=None):
        """M(h): one ungated pass of the reasoning block (B, T, C)."""
        return self.run(self.reasoning, h, at, cache)

    def refine(self, h, at=None, cache=None):
        """One gated pass: h^b → h^{b+1} (B, T, C), Eq. 5."""
        return self.gate(self.propose(h, at, cache), h)

    def confidence(self, h):
        """The logit of q(h), (B, T); q itself is its sigmoid."""
        return self.q_head(h.flatten(0, -2)).view(h.shape[:-1])

    def decode(self, h, at=None, cache=None):
        """D: state (B, T, C) → logits (B, T, V)."""
        return self.lm_head(self.norm(self.run(self.decoder, h, at, cache)))

    def loss(self, h, targets):
        """Mean cross-entropy in nats of D(h) against targets (B, T), of which −100 does not count, and where the
        likeliest token was right (B, T). Logits are made for some tokens at a time, and again in backward."""

        def of(x, target):
            logits = precise(self.lm_head(x))
            return F.cross_entropy(logits, target, reduction="sum"), logits.argmax(dim=-1) == target

        x, target = self.norm(self.run(self.decoder, h)).flatten(0, 1), targets.flatten()
        size = max(1, (1 << 24) // self.config.vocab_size)  # 64 MiB of logits in float32
        parts = [checkpoint(of, *part, use_reentrant=False) for part in zip(x.split(size), target.split(size))]
        right = torch.cat([right for _, right in parts]).view_as(targets)
        return sum(loss for loss, _ in parts) / (target != -100).sum().clamp(min=1), right

    def forward(self, idx, loops):
        """Logits (B, T, V) after `loops` gated passes, unstopped; loops=0: the pretrained model, one ungated pass."""
        h = self.encode(idx)
        for _ in range(loops):
            h = self.refine(h)
        return self.decode(h if loops else self.propose(h))

    def compile_step(self):
        """Compile what a token runs through, once for all layers, depths, lengths and numbers of texts. A norm is to be
        written down before a matrix reads it, not computed anew for each row of the matrix."""
        for part in [*self.layers(), self.lm_head]:
            part.compile(dynamic=True, options={"realize_acc_reads_threshold": 2, "size_asserts": False})

    def new_cache(self, batch, size, loops, shared=False):
        """Room for `size` keys and values: a tensor (layers, 2, B, size, m, hd) each for "encoder" and "decoder", and a
        list of them, one per loop depth, for "reasoning"; shared: one for all, where tokens show their newest pass."""
        c, new, loops = self.config, self.wte.weight.new_zeros, max(1, loops)
        shape = 2, batch, size, c.n_kv_head, c.head_dim
        depths = [new(c.reasoning_layers, *shape) for _ in range(1 if shared else loops)] * (loops if shared else 1)
        return {"encoder": new(c.encoder_layers, *shape), "reasoning": depths, "decoder": new(c.decoder_layers, *shape)}

    @torch.no_grad()
    def advance(self, idx, start, cache, max_loops, halt, rows=None):
        """Run tokens idx (B, T) of the texts `rows` (ascending; None: all), which follow the `start` (B ints) ones in
        the cache, until `halt` stops each or max_loops; a pass runs on the texts that still loop.
        → logits of the last token (B, 1, V), passes taken by each token (B, T)."""
        depths, passes = cache["reasoning"], torch.zeros_like(idx)
        at = span(self.config, start, idx.size(1), idx.device, depths[0].size(3), rows)
        here = slice(None), slice(None), at.rows[:, None], at.position
        running, doubt = at.running, torch.zeros(idx.shape, device=idx.device)
        h = self.encode(idx, at, cache["encoder"])
        h = h if max_loops else self.propose(h, at, depths[0])
        for b in range(max_loops):
            if b > 0:  # who has stopped shows at this depth what it showed at the last
                depths[b][here] = depths[b - 1][here]
            some = running.any(dim=1).nonzero().flatten()  # texts
            if len(some) > 0:
                part = Span(*(x if x is None else x[some] for x in at._replace(running=running)))
                new = h.index_copy(0, some, self.refine(h[some], part, depths[b]))
                before, h = h, torch.where(running[..., None], new, h)
                passes += running
                running = running & ~halt.stops(self, b + 1, before, h, doubt)
        return self.lm_head(self.norm(self.run(self.decoder, h, at, cache["decoder"])[:, -1:])), passes

    @torch.no_grad()
    def stream(
        self, idx, max_new_tokens, max_loops=8, threshold=0.6, temperature=1.0, top_k=None, generator=None, top_p=None,
        halt="threshold", epsilon=1.0, min_loops=1, shared=False, end=None,
    ):  # fmt: skip
        """`generate`, a token at a time: yields for each text (token, passes it took). When the context is full, the
        newest half of a text is run again at positions 0 …, and it goes on from there."""
        texts = idx.tolist() if torch.is_tensor(idx) else [*map(list, idx)]
        if not texts or not all(texts):
            raise InputError("a prompt is empty: give at least one token")
        halt, device = Halt(halt, threshold, epsilon, min_loops), self.wte.weight.device
        size = max(map(len, texts)) + max_new_tokens
        size = min(self.config.block_size, -(-size // 128) * 128)  # few sizes to compile for
        cache = self.new_cache(len(texts), size, max_loops, shared)
        start, going = [0] * len(texts), [*range(len(texts))]  # tokens of each in the cache; texts not at their end
        for _ in range(max_new_tokens):
            alike, step = {}, [(end, 0)] * len(texts)
            for i in going:  # together run those that have as many new tokens
                if len(texts[i]) > size and start[i] > 0:
                    texts[i], start[i] = texts[i][-max(1, size // 2) :], 0
                alike.setdefault(len(texts[i]) - start[i], []).append(i)
            for length, rows in alike.items():
                new = torch.tensor([texts[i][start[i] :] for i in rows], device=device)
                with torch.compiler.set_stance("default" if length == 1 else "force_eager"):  # prompts: not compiled
                    logits, passes = self.advance(new, [start[i] for i in rows], cache, max_loops, halt, rows)
                drawn = sample(logits[:, -1], temperature, top_k, generator, top_p)
                for i, token, taken in zip(rows, drawn[:, 0].tolist(), passes[:, -1].tolist()):
                    start[i], step[i] = len(texts[i]), (token, taken)
                    texts[i].append(token)
            yield step
            going = [i for i in going if step[i][0] != end]

    def generate(self, idx, max_new_tokens, *args, **kwargs):
        """Continue idx (B, T), or B lists of tokens, by max_new_tokens tokens of at most max_loops=8 passes each. A
        token stops at the first pass with q ≥ threshold=0.6 (above 1: never), or by the rule halt= of `Halt`, with
        epsilon= and min_loops=. temperature=1 (0: greedy), top_k=, generator=, top_p= as in `sample`; max_loops=0: the
        pretrained model; shared= as in `new_cache`; end= ends a text, and fills it from there.
        → tokens (B, T + max_new_tokens) or B lists, passes (B, max_new_tokens). InputError: idx is unfit."""
        steps = torch.tensor([*self.stream(idx, max_new_tokens, *args, **kwargs)]).long().view(-1, len(idx), 2)
        new, passes = steps.permute(2, 1, 0).to(self.wte.weight.device)
        if torch.is_tensor(idx):
            return torch.cat((idx, new), dim=1), passes
        return [[*text, *more] for text, more in zip(idx, new.tolist())], passes


def sample(logits, temperature, top_k, generator, top_p=None):
    """Draw a token (B, 1) from logits (B, V): the likeliest at temperature 0, else among the top_k likeliest, and of
    these among the fewest likeliest that reach the probability top_p."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits, order = (logits.float() / temperature).sort(dim=-1, descending=True)
    logits[:, top_k or logits.size(1) :] = -torch.inf
    chance = logits.softmax(dim=-1)
    chance = chance.masked_fill(chance.cumsum(dim=-1) - chance >= (2.0 if top_p is None else max(top_p, 1e-9)), 0.0)
    return order.gather(1, torch.multinomial(chance, 1, generator=generator))


@torch.no_grad()
def early_exit(model, idx, max_loops, halt, together=False):
    """What early exit means, for whole sequences idx (B, T) at once: a token that has stopped keeps its state, and in
    every deeper pass the others see the keys and values of its last executed pass. together: all tokens of a sequence
    stop when the last one does, as in the authors' evaluation. → states to decode (B, T, C), passes (B, T)."""
    h = model.encode(idx)
    if max_loops == 0:
        return model.propose(h), torch.zeros_like(idx)
    at = span(model.config, [0] * len(idx), idx.size(1), idx.device, idx.size(1))
    shown = model.new_cache(*idx.shape, 1)["reasoning"][0]  # keys and values of each token's newest pass
    running, passes, doubt = torch.ones_like(idx).bool(), torch.zeros_like(idx), torch.zeros_like(idx).float()
    for b in range(1, max_loops + 1):
        before, h = h, torch.where(running[..., None], model.refine(h, at._replace(running=running), shown), h)
        passes += running
        stop = halt.stops(model, b, before, h, doubt)
        running = running & ~(stop[:, -1:] if together else stop)
    return h, passes


# ---- Training
def losses(model, h, targets, before=None, through=1, onward=False, pooled=False):
    """One supervised step (§3.2, Fig. 4) from the state h (B, T, C) against the next tokens `targets` (B, T; −100 does
    not count) → the three terms of L = L_LM + L_mono + L_Q (scalars, nats), and the next state h' (B, T, C), detached:

    L_LM   = CE(D(h'), next token),  h' = one gated pass from h, the only pass that gradients go through
    L_mono = SiLU(L_LM − L_LM of h, the latter without gradient): a pass should do no harm
    L_Q    = BCE(q(h'), was the likeliest token right?), per token as in Fig. 4; pooled: per sequence, as in Eq. 13,
             q of the last token against the share of tokens that were right
    before: L_LM of h, if known. through: passes in this step. onward: gradients go on into what made h."""
    h = h if onward else h.detach()
    if before is None:
        with torch.no_grad():
            before, _ = model.loss(h, targets)
    torch.clear_autocast_cache()  # older torch keeps copies of weights that were made without gradient
    for _ in range(through):
        h = model.refine(h)
    lm, right = model.loss(h, targets)
    confidence, right, counts = precise(model.confidence(h)), right.float(), (targets != -100).float()
    if pooled:
        each = counts.sum(dim=1, keepdim=True)
        confidence, right, counts = confidence[:, -1:], (right * counts).sum(1, True) / each.clamp(min=1), each.sign()
    q = F.binary_cross_entropy_with_logits(confidence, right, counts, reduction="sum") / counts.sum().clamp(min=1)
    return lm, F.silu(lm - before), q, h.detach()


def deep_supervision(model, idx, targets, drawn, through=1, pooled=False, updated=False):
    """Random deep supervision (§3.2): loop over idx (B, T) in steps of `through` passes (paper: one) and supervise the
    `drawn` (K numbers below B). Yields the three terms of each: back-propagate them at once, and memory holds the
    graph of one step however large B is. The others run without gradient, and so does the encoder, unless its
    parameters require one: from the first step. The loss before a step is known where the step before was drawn,
    unless the weights are `updated` between the two. pooled: as in `losses`."""
    with torch.set_grad_enabled(0 in drawn):
        h, known = model.encode(idx), None
    for b in range(max(drawn) + 1):  # passes after the last drawn one would teach nothing
        if b in drawn:
            *terms, h = losses(model, h, targets, known, through, b == 0, pooled)
            known = None if updated else terms[0].detach()
            yield terms
        else:
            with torch.no_grad():
                for _ in range(through):
                    h = model.refine(h)
            known = None
