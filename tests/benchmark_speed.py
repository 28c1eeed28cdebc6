"""
How fast does a looped model write? Prefill and decode at 1, 2, 4, 8 passes and with exit, and what reading takes.

    python tests/benchmark_speed.py MODEL [--dtype=int8] [--compile] [--batch=8] [--data=held_out.txt] [--profile]

A prompt of 64 random tokens, then tokens one by one: the shortest of three prompts, and the time that a quarter of the
tokens stay under; with exit the mean. Everything on this machine, in this run. The floor is the time in which the
machine reads the weights that a token needs, each pass anew.
"""

import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import convert  # noqa: E402
import loopus  # noqa: E402
from convert import flag  # noqa: E402
from eval import depth_losses, windows  # noqa: E402
from loopus import Halt  # noqa: E402

PROMPT = 64


@dataclass
class Settings:
    """Tokens per second of a looped model."""

    init: str = flag("", "model: directory or hub name")
    batch: int = flag(1, "texts at a time", 1)
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


@torch.no_grad()
def main():
    given = convert.parse(Settings, "init")
    s = Settings(**given)
    device, dtype, _ = convert.pick_device(s.device, s.dtype)
    cuts = dict(encoder_layers=s.encoder_layers, decoder_layers=s.decoder_layers)
    exact, tokenizer = convert.load(s.init, device, **cuts)
    model, _ = convert.load(s.init, device, dtype, **cuts)
    if s.dtype == "int8":
        loopus.quantize(model)
    if s.data:
        sequences = windows(convert.load_tokens(convert.find_files(s.data), tokenizer), 256, 4096)
        before, after = (depth_losses(m, sequences, [0, 1, 2, 4, 8], 4, nullcontext) for m in (exact, model))
        for depth, loss in after.items():
            change = loss / before[depth] - 1
            print(f"{depth} passes: held-out loss {loss:.4f}, in fp32 {before[depth]:.4f} ({change:+.2%})", flush=True)
    del exact
    for part in [*model.layers(), model.lm_head] if s.compile else ():
        part.compile()
    c = model.config
    block = torch.randn(1 << 27 if device.type == "cuda" else 1 << 26, device=device)
    bandwidth = block.nbytes / seconds(device, block.sum, 10)
    name = f"cut {c.encoder_layers}, {c.reasoning_layers}, {c.decoder_layers}, {s.dtype}, batch {s.batch}, {device}"
    print(f"{name}{', compiled' if s.compile else ''}; memory read at {bandwidth / 1e9:.1f} GB/s")
    print(f"{'passes':>8} {'prefill/s':>10} {'token s':>9} {'tokens/s':>9} {'floor s':>8} {'of floor':>9}", end="")
    print(f" {'uncached s':>11}" if s.uncached else "")
    ends = size_of([*model.encoder, *model.decoder, model.lm_head])
    torch.manual_seed(0)
    prompt = torch.randint(0, c.vocab_size, (s.batch, PROMPT), device=device)
    whole = {}  # mean seconds per token
    for loops in (1, 2, 4, 8, "exit"):
        most, halt = (8, Halt(threshold=s.threshold)) if loops == "exit" else (loops, Halt(threshold=2.0))
        fill = partial(model.advance, prompt, 0, model.new_cache(s.batch, 128, most), most, halt)
        with torch.compiler.set_stance("force_eager"):
            prefill = seconds(device, fill, 3)
        cache, passes, spent = model.new_cache(s.batch, 128, most), [], []
        with torch.compiler.set_stance("force_eager"):
            logits, _ = model.advance(prompt, 0, cache, most, halt)
        for i in range(s.tokens + 3):
            idx = logits.argmax(dim=-1, keepdim=True)
            begun = time.perf_counter()
            logits, taken = model.advance(idx, PROMPT + i, cache, most, halt)
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
        line = f"{label:>8} {s.batch * PROMPT / prefill:10.0f} {token:9.4f} {s.batch / token:9.1f}"
        line += f" {floor:8.4f} {token / floor:9.2f}"
        if s.uncached:
            line += f" {seconds(device, partial(model, prompt, most), 3):11.4f}"
        print(line, flush=True)
    saved, promised = 1 - whole["exit"] / whole[8], 1 - mean / 8
    if promised > 0.01:
        print(f"exit saves {saved:.1%} of 8 passes' time: {saved / promised:.0%} of what {mean:.2f} of 8 promise")
    if s.profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            model.advance(idx, PROMPT, model.new_cache(s.batch, 128, 8), 8, Halt(threshold=2.0))
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=50))


if __name__ == "__main__":
    convert.run(main)
