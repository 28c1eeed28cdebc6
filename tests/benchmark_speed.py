"""
How fast does a looped model write, and train? Everything on this machine, in this run.

    python eval.py --task=speed MODEL [--dtype=bf16] [--compile] [--batch=8] [--data=held_out.txt] [--profile]
    python eval.py --task=speed MODEL --shared --data=held_out.txt
    python eval.py --task=speed MODEL --train [--max_loops=4] [--supervised=1] [--batch=2] [--context=256]

Writing: prefill and decode at 1, 2, 4, 8 passes and with exit. A prompt of 64 random tokens, then tokens one by one:
the shortest of three prompts, and the time that a quarter of the tokens stay under; with exit the mean. The floor is
the time in which the machine reads the weights that a token needs, each pass anew.

Training: seconds of a step of §3.2, each way in a process of its own, over draws of every depth. "plain" is the method
written down plainly: float32, or autocast to bf16, logits kept whole, memory given back as the C library does.
"""

import random
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import convert  # noqa: E402
import train  # noqa: E402
from convert import flag  # noqa: E402
from eval import depth_losses, windows  # noqa: E402
from loopus import Halt, deep_supervision  # noqa: E402

PROMPT = 64
WAYS = ("plain", "plain-bf16", "fp32", "bf16", "bf16-checkpointing", "bf16-compiled")


@dataclass
class Settings:
    """Tokens per second of a looped model."""

    init: str = flag("", "model: directory or hub name")
    shared: bool = flag(False, "with --data: what a cache shared by all depths costs in loss")
    train: bool = flag(False, "measure training instead of writing")
    way: str = flag("", "of training, in this process: " + ", ".join(WAYS), None, WAYS)
    max_loops: int = flag(4, "B, with --train", 1)
    supervised: int = flag(1, "K, with --train", 1)
    context: int = flag(256, "tokens per sequence, with --train", 1)
    batch: int = flag(0, "texts at a time; 0: one to write, two to train", 0)
    tokens: int = flag(24, "tokens to write for each figure", 8)
    threshold: float = flag(0.6, "confidence at which a token stops in the row of exit")
    encoder_layers: int = flag(-1, "layers before the loop; -1: as the checkpoint says")
    decoder_layers: int = flag(-1, "layers after the loop; -1: as the checkpoint says")
    compile: bool = flag(False, "compile the step of a token")
    uncached: bool = flag(False, "also without a cache: the whole text for each token")
    data: str = flag("", "held-out text: also the losses of 4,096 tokens, against those of fp32")
    profile: bool = flag(False, "where the time of a token of 8 passes goes")
    device: str = flag("", "cpu, cuda or mps")
    dtype: str = flag("fp32", "of the weights", None, ("bf16", "fp32", "int8"))


def seconds(device, step, times):
    """The shortest of several calls."""
    best = float("inf")
    for _ in range(times):
        begun = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begun)
    return best


def size_of(modules):
    return sum(p.numel() * p.element_size() for m in modules for p in m.parameters())


def plainly(model, x, y, drawn):
    """A training step as one would first write it."""
    with torch.no_grad():
        h = model.encode(x)
    for b in range(max(drawn) + 1):
        if b not in drawn:
            with torch.no_grad():
                h = model.refine(h)
            continue
        with torch.no_grad():
            before = F.cross_entropy(model.decode(h).float().flatten(0, 1), y.flatten())
        torch.clear_autocast_cache()
        h = model.refine(h)
        logits = model.decode(h).float()
        lm = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        q = F.binary_cross_entropy_with_logits(model.confidence(h).float(), (logits.argmax(-1) == y).float())
        yield lm, F.silu(lm - before), q
        h = h.detach()


def measure_training(s):
    """One row: seconds and achieved fraction of the machine's best matrix product, for s.way."""
    device, dtype = convert.pick_device(s.device, "fp32" if s.way in ("plain", "fp32") else "bf16")
    model, _ = convert.load(s.init, device, encoder_layers=s.encoder_layers, decoder_layers=s.decoder_layers)
    settings = train.Settings(batch=s.batch, accumulate=1, context=s.context)
    optimizer = train.make_optimizer(model, settings)
    plain = s.way.startswith("plain")
    fast = model if plain or dtype == torch.float32 else train.computing_copy(model, dtype)
    fast.checkpointing = s.way.endswith("checkpointing")
    for block in fast.layers() if s.way.endswith("compiled") else ():
        block.compile()
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    peak = 2 * n**3 / seconds(device, lambda: a @ a, 10)
    spent, flops, tokens = 0.0, 0, s.batch * s.context
    torch.manual_seed(0)
    rounds = [random.Random(i).sample(range(s.max_loops), s.supervised) for i in range(9)]
    if s.supervised == 1:
        rounds = [[s.max_loops - 1], *([b] for b in [*range(s.max_loops)] * 2)]
    for i, drawn in enumerate(rounds):
        x, y = torch.randint(0, model.config.vocab_size, (2, s.batch, s.context), device=device)
        begun = time.perf_counter()
        with torch.autocast(device.type, dtype, enabled=s.way == "plain-bf16"):
            for terms in plainly(fast, x, y, drawn) if plain else deep_supervision(fast, x, y, drawn):
                (sum(terms) / s.supervised).backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for p, q in zip(model.parameters(), fast.parameters()):
                q.copy_(p)
        if device.type == "cuda":
            torch.cuda.synchronize()
        if i > 0:  # the first one compiles
            spent += time.perf_counter() - begun
            flops += train.step_flops(model, settings, drawn)
    steps, memory = len(rounds) - 1, convert.peak_memory(device)
    print(
        f"{s.way:20} {spent / steps:8.2f} {tokens * steps / spent:10.0f} {flops / steps / 1e12:8.3f}"
        f" {peak / 1e12:10.3f} {flops / spent / peak:6.1%} {memory:8.2f}",
        flush=True,
    )


def compare_training(s):
    print(f"{s.batch} x {s.context} tokens, B = {s.max_loops}, K = {s.supervised}")
    print(
        f"{'way':20} {'s / step':>8} {'tokens/s':>10} {'TFLOP':>8} {'peak TF/s':>10} {'MFU':>6} {'GB':>8}", flush=True
    )
    for way in WAYS:
        subprocess.run([sys.executable, __file__, *sys.argv[1:], f"--way={way}"], check=True)


def main():
    given = convert.parse(Settings, "init")
    s = Settings(**given)
    s.batch = s.batch or (2 if s.train else 1)
    if s.shared:
        compare_caches(s)
    elif not s.train:
        measure_writing(s)
    elif not s.way:
        compare_training(s)
    else:
        measure_training(s)


@torch.no_grad()
def compare_caches(s):
    """Loss of 8 x 32 held-out tokens, each run after those before, with a cache per depth and with a shared one."""
    model, tokenizer = convert.load(s.init, s.device or "cpu", torch.bfloat16)
    tokens = convert.load_tokens(convert.find_files(s.data), tokenizer)
    x, y = convert.rows(tokens, torch.linspace(0, len(tokens) - 34, 8).long().tolist(), 32)
    for loops in (2, 4, 8):
        losses, sizes = [], []
        for shared in (False, True):
            cache, loss = model.new_cache(8, 32, loops, shared), 0.0
            depths = {depth.data_ptr(): depth for depth in cache["reasoning"]}.values()
            sizes.append(sum(part.nbytes for part in (cache["encoder"], cache["decoder"], *depths)) / 1e6)
            for i in range(32):
                logits, _ = model.advance(x[:, i : i + 1], [i] * 8, cache, loops, Halt(threshold=2.0))
                loss += F.cross_entropy(logits[:, 0].float(), y[:, i]).item() / 32
            losses.append(loss)
        line = "{} passes: loss {:.4f} with a cache per depth ({:.1f} MB), {:.4f} with a shared one ({:.1f} MB)"
        print(line.format(loops, losses[0], sizes[0], losses[1], sizes[1]), flush=True)


@torch.no_grad()
def measure_writing(s):
    device, dtype = convert.pick_device(s.device, s.dtype)
    cuts = dict(encoder_layers=s.encoder_layers, decoder_layers=s.decoder_layers)
    exact, tokenizer = convert.load(s.init, device, **cuts)
    model, _ = convert.load(s.init, device, dtype, **cuts)
    if s.data:
        tokens = convert.load_tokens(convert.find_files(s.data), tokenizer)
        sequences = windows(tokens, min(256, model.config.block_size), 4096)
        before, after = (depth_losses(m, sequences, [0, 1, 2, 4, 8], 4) for m in (exact, model))
        for depth, loss in after.items():
            change = loss / before[depth] - 1
            print(f"{depth} passes: held-out loss {loss:.4f}, in fp32 {before[depth]:.4f} ({change:+.2%})", flush=True)
    del exact
    if s.compile:
        model.compile_step()
    c = model.config
    block = torch.randn(1 << 27 if device.type == "cuda" else 1 << 26, device=device)
    bandwidth = block.nbytes / seconds(device, block.sum, 10)
    name = f"cut {c.encoder_layers}, {c.reasoning_layers}, {c.decoder_layers}, {s.dtype}, batch {s.batch}, {device}"
    print(f"{name}{', compiled' if s.compile else ''}; memory read at {bandwidth / 1e9:.1f} GB/s")
    print(f"{'passes':>8} {'prefill/s':>10} {'token s':>9} {'tokens/s':>9} {'floor s':>8} {'of floor':>9}", end="")
    print(f" {'uncached s':>11}" if s.uncached else "")
    ends = size_of([*model.encoder, *model.decoder, model.lm_head])
    torch.manual_seed(0)
    length, size = min(PROMPT, c.block_size // 2), min(128, c.block_size)
    prompt = torch.randint(0, c.vocab_size, (s.batch, length), device=device)
    whole = {}  # mean seconds per token
    for loops in (1, 2, 4, 8, "exit"):
        most, halt = (8, Halt(threshold=s.threshold)) if loops == "exit" else (loops, Halt(threshold=2.0))
        fill = partial(model.advance, prompt, [0] * s.batch, model.new_cache(s.batch, size, most), most, halt)
        with torch.compiler.set_stance("force_eager"):
            prefill = seconds(device, fill, 3)
        cache, passes, spent = model.new_cache(s.batch, size, most), [], []
        with torch.compiler.set_stance("force_eager"):
            logits, _ = model.advance(prompt, [0] * s.batch, cache, most, halt)
        for i in range(s.tokens + 3):
            idx = logits.argmax(dim=-1)
            begun = time.perf_counter()
            logits, taken = model.advance(idx, [length + i] * s.batch, cache, most, halt)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i >= 3:  # the first ones compile
                spent.append(time.perf_counter() - begun)
                passes.append(taken.float().mean().item())
        mean = sum(passes) / len(passes)
        token = sorted(spent)[len(spent) // 4] if loops != "exit" else sum(spent) / len(spent)
        whole[loops] = sum(spent) / len(spent)
        floor = (ends + mean * size_of(model.reasoning)) / bandwidth
        label = f"{loops}" if loops != "exit" else f"{mean:.2f}"
        line = f"{label:>8} {s.batch * length / prefill:10.0f} {token:9.4f} {s.batch / token:9.1f}"
        line += f" {floor:8.4f} {token / floor:9.2f}"
        if s.uncached:
            line += f" {seconds(device, partial(model, prompt, most), 3):11.4f}"
        print(line, flush=True)
    saved, promised = whole[8] - whole["exit"], (8 - mean) * (whole[8] - whole[1]) / 7
    if mean < 7.9:
        line = "exit after {:.2f} passes saves {:.1%} of 8 passes' time, {:.0%} of what that many passes fewer take"
        print(line.format(mean, saved / whole[8], saved / promised))
    if s.profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            model.advance(idx, [length] * s.batch, model.new_cache(s.batch, size, 8), 8, Halt(threshold=2.0))
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=50))


if __name__ == "__main__":
    main() if any(argument.startswith("--way=plain") for argument in sys.argv) else convert.run(main)
