"""
Make a looped model of a pretrained one by random deep supervision (paper §3.2), or train it unlooped, as the control.

    python train.py                                   the whole story in minutes, on any machine, without network
    python train.py --init=gpt2 --data=book.txt       a real model on real text, with the paper's constants

Without --init it trains a small base model on the source of Python's standard library, read as bytes, recasts and
trains that as a looped model, spends the same tokens on the unlooped base, and compares the three on held-out files.
"""

import json
import math
import random
import shutil
import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

import convert
from convert import flag
from eval import depth_losses, exit_stats, windows
from loopus import Config, Halt, InputError, LoopUS, deep_supervision, lm_loss


@dataclass
class Settings:
    """Train a looped model, or with --objective=lm the unlooped one. Defaults are the paper's constants (App. A)."""

    init: str = flag("", "model to start from: hub name or directory; empty: the whole story from nothing, see above")
    data: str = flag("", 'text file, directory, glob or .bin tokens; "python": the source of its standard library')
    val: str = flag("", "held-out text; empty: every 20th file of --data, or the last 20th of a single one")
    out: str = flag("out/loop", "directory of the run: checkpoints and log.jsonl")
    resume: bool = flag(False, "go on from the newest checkpoint in --out, with the settings it was started with")
    objective: str = flag("loop", "or lm: train the model unlooped, as the control", None, ("loop", "lm"))
    max_loops: int = flag(20, "B, passes unrolled per batch (paper: 20)", 1)
    supervised: int = flag(5, "K, passes supervised among them (paper: 5)", 1)
    encoder_layers: int = flag(-1, "layers run once before the loop; -1: the paper's cut, or by the layer profile")
    decoder_layers: int = flag(-1, "layers run once after the loop; -1: likewise")
    gate_start: str = flag("", "first α of every channel, or s4d: the authors' start; empty: 0.5")
    steps: int = flag(22888, "optimizer steps (paper: 3B tokens)", 1)
    batch: int = flag(2, "sequences per micro-batch (paper: 2)", 1)
    accumulate: int = flag(64, "micro-batches per optimizer step (paper: 64)", 1)
    context: int = flag(1024, "tokens per sequence (paper: 1024)", 1)
    lr: float = flag(5e-5, "peak learning rate, cosine decay (paper: 5e-5)", 0)
    new_lr: float = flag(10.0, "how many times --lr the gate and the confidence head learn at", 0)
    warmup: int = flag(300, "steps until the peak learning rate (paper: 300), at most a tenth of --steps", 0)
    weight_decay: float = flag(0.1, "AdamW's, on matrices", 0)
    seed: int = flag(2026, "of the data order and the depths drawn (paper: 2026)")
    log_every: int = flag(10, "steps between log lines", 1)
    eval_every: int = flag(500, "steps between held-out losses and checkpoints", 1)
    eval_tokens: int = flag(16384, "held-out tokens per evaluation", 1)
    device: str = flag("", "cpu, cuda or mps; empty: the best there is")
    dtype: str = flag(
        "", "bf16 by autocast, or fp32; empty: bf16 where the device is good at it", None, ("bf16", "fp32")
    )
    compile: bool = flag(False, "compile the blocks with torch.compile")


@lru_cache(maxsize=2)
def shuffled(count, seed, epoch):
    return np.random.default_rng((seed, epoch)).permutation(count)


def micro_batch(tokens, s, i):
    """Micro-batch number i of the run: inputs and next tokens, (batch, context) each. The text is cut into windows,
    each read once per epoch in an order of its own, so that what is read depends on the seed and on i alone."""
    count = (len(tokens) - 1) // s.context
    if count < 1:
        raise InputError(f"{len(tokens)} training tokens do not fill one context of {s.context}: give more text")
    starts = [shuffled(count, s.seed, n // count)[n % count] * s.context for n in range(i * s.batch, (i + 1) * s.batch)]
    rows = torch.from_numpy(np.stack([tokens[a : a + s.context + 1] for a in starts]).astype(np.int64))
    return rows[:, :-1], rows[:, 1:]


def learning_rate(s, step):
    """Linear warm-up to s.lr, then a cosine down to a tenth of it."""
    warmup = min(s.warmup, s.steps // 10)
    if step < warmup:
        return s.lr * (step + 1) / warmup
    return s.lr * (0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, s.steps - warmup)))


def make_optimizer(model, s):
    """AdamW over what trains: for the loop all but the encoder, for lm all but the gate and the head."""
    groups = {}
    for name, p in model.named_parameters():
        new, kept = name.startswith(("gate.", "q_head.")), name.startswith(("wte.", "wpe.", "encoder."))
        p.requires_grad_(not kept if s.objective == "loop" else not new)
        if p.requires_grad:
            groups.setdefault((s.new_lr if new else 1.0, s.weight_decay if p.dim() > 1 else 0.0), []).append(p)
    groups = [dict(params=ps, weight_decay=decay, scale=scale) for (scale, decay), ps in groups.items()]
    return torch.optim.AdamW(groups, lr=s.lr, betas=(0.9, 0.95), fused=model.wte.weight.device.type != "mps")


def gradients(model, x, y, s, micro):
    """Add one micro-batch's gradients, each supervised step's at once → its L_LM, L_mono, L_Q, mean over steps."""
    terms, depths = torch.zeros(3, device=x.device), random.Random(f"depths {s.seed} {micro}")
    if s.objective == "lm":
        steps, count = [(lm_loss(model(x, loops=0), y), terms[1], terms[2])], 1
    else:
        steps, count = deep_supervision(model, x, y, s.max_loops, s.supervised, depths), s.supervised
    for step in steps:
        (sum(step) / (s.accumulate * count)).backward()
        terms = terms + torch.stack(tuple(step)).detach() / count
    return terms


def train(s):
    """One run of `s` from s.init to a checkpoint in s.out/step-…; → the directory of that checkpoint."""
    if s.supervised > s.max_loops:
        raise InputError(f"--supervised={s.supervised} cannot be drawn from --max_loops={s.max_loops}: K is 1 … B")
    if not s.data:
        raise InputError('no --data: give a text file, a directory, a glob, .bin tokens, or "python"')
    device, dtype, autocast = convert.pick_device(s.device, s.dtype)
    out = Path(s.out)
    found = sorted(out.glob(f"{convert.STEP}/optimizer.pt"))
    if s.resume and not found:
        raise InputError(f"--resume: {out} holds no checkpoint to go on from; start without --resume")
    if found and not s.resume:
        raise InputError(f"{out} already holds a run, at {found[-1].parent.name}: --resume it, or name another --out")
    torch.manual_seed(s.seed)
    cuts = dict(encoder_layers=s.encoder_layers, decoder_layers=s.decoder_layers)
    model, tokenizer = convert.load(found[-1].parent if found else s.init, device, **cuts, gate_start=s.gate_start)
    if s.context > model.config.block_size:
        raise InputError(f"--context={s.context} is more than the model's {model.config.block_size}: give at most that")
    tokens, held_out = convert.load_data(s.data, s.val, tokenizer)
    sequences = windows(held_out, s.context, s.eval_tokens)
    optimizer = make_optimizer(model, s)
    first = 0
    if found:
        saved = torch.load(found[-1], map_location=device, weights_only=True)
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    if first > s.steps:
        raise InputError(f"{out} is at step {first} already, beyond --steps={s.steps}: name another --out")
    out.mkdir(parents=True, exist_ok=True)
    log = open(out / "log.jsonl", "a", encoding="utf-8")
    for block in model.layers() if s.compile else ():
        block.compile()

    size = f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters in"
    size += f" {len(model.encoder)} + {len(model.reasoning)} + {len(model.decoder)} layers, {len(tokens):,} tokens"
    print(f"{s.objective}: {size}, {device}, {dtype}, to {out}", flush=True)

    def report(line, **values):
        print(line, flush=True)
        log.write(json.dumps(values) + "\n")
        log.flush()

    def evaluate(step):
        depths = [0] if s.objective == "lm" else [0, 1, 2, 4, 8]
        losses = depth_losses(model, sequences, depths, s.batch, autocast)
        line = ", ".join(f"{loss:.4f} at {depth}" for depth, loss in losses.items())
        report(f"step {step}: held-out loss {line} passes", step=step, held_out=losses)

    def checkpoint(step):
        directory = out / f"step-{step:07d}"
        with convert.replaced(directory) as new:
            convert.write(model, tokenizer, new)
            (new / "settings.json").write_text(json.dumps(asdict(s), indent=2) + "\n", encoding="utf-8")
            torch.save(dict(step=step, optimizer=optimizer.state_dict()), new / "optimizer.pt")
        if s.objective == "loop":
            (convert.cache_dir() / "last").write_text(str(directory.resolve()))
        for old in set(out.glob("step-*")) - {directory}:
            shutil.rmtree(old)
        return directory

    begun, last, logged = time.time(), time.time(), first
    for step in range(first, s.steps):
        if step % s.eval_every == 0:
            evaluate(step)
        rate = learning_rate(s, step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        terms = torch.zeros(3, device=device)
        for micro in range(step * s.accumulate, (step + 1) * s.accumulate):
            x, y = micro_batch(tokens, s, micro)
            with autocast():  # ends before the optimizer steps: its copies of the weights must not outlive them
                terms += gradients(model, x.to(device), y.to(device), s, micro)
            convert.progress(f"step {step + 1}", micro + 1 - step * s.accumulate, s.accumulate)
        norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % s.log_every == 0 or step in (first, s.steps - 1):
            (lm, mono, q), now = (terms / s.accumulate).tolist(), time.time()
            speed = (step + 1 - logged) * s.accumulate * s.batch * s.context / (now - last)
            left = (now - begun) / (step + 1 - first) * (s.steps - step - 1)
            parts = f"lm {lm:.4f}" + (f"  mono {mono:+.4f}  q {q:.4f}" if s.objective == "loop" else "")
            line = f"{step + 1:>6}/{s.steps}  {parts}  lr {rate:.1e}  norm {norm:.2f}"
            line += f"  {speed:,.0f} tokens/s  {timedelta(seconds=int(left))} left"
            values = dict(lm=lm, mono=mono, q=q, lr=rate, grad_norm=norm.item(), tokens_per_second=speed)
            report(line, step=step + 1, **values, seconds_left=left)
            last, logged = now, step + 1
        if (step + 1) % s.eval_every == 0 and step + 1 < s.steps:
            checkpoint(step + 1)
    directory = checkpoint(s.steps)
    evaluate(s.steps)
    spent = f"{timedelta(seconds=int(time.time() - begun))}, peak memory {peak_memory(device):.2f} GB"
    print(f"{s.objective}: {spent}, written to {directory}", flush=True)
    return directory


def peak_memory(device):
    """Most memory this process has held so far, in GB: the GPU's, or its resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


# ---- Without --init: the whole story


def story(given):
    """Pretrain a small base model, recast and train it as a looped one, spend the same tokens on the unlooped control,
    and compare. `given` are the flags that were set; the base is trained for three times the steps of the other two."""
    out, begun = Path(given.pop("out", "out/story")), time.time()
    device, dtype, autocast = convert.pick_device(given.get("device", ""), given.get("dtype", ""))
    width, batch = (512, 64) if device.type == "cuda" else (128, 4)  # minutes on a GPU, and on two CPU cores
    values = dict(data="python", batch=batch, accumulate=1, context=256, steps=400, lr=1.5e-3, warmup=50, log_every=100)
    values |= dict(max_loops=8, supervised=2, encoder_layers=2, decoder_layers=2, eval_every=10**9, eval_tokens=32768)
    looped = Settings(**values | given)
    unlooped = replace(looped, objective="lm")

    untrained, base = str(out / "untrained"), str(out / "base")
    if not Path(base, "config.json").exists():
        torch.manual_seed(looped.seed)
        gpt2 = dict(model_type="gpt2", architectures=["GPT2LMHeadModel"], layer_norm_epsilon=1e-5, vocab_size=257)
        gpt2 |= dict(n_positions=512, n_layer=6, n_embd=width, n_head=width // 64)
        model = LoopUS(Config(**convert.read_family(gpt2, untrained)[1]))
        model.reset_parameters()
        convert.save(model, convert.byte_tokenizer(), untrained, "hf")
        new = replace(unlooped, init=untrained, out=str(out / "pretraining"), steps=3 * looped.steps, lr=2e-3)
        convert.save(*convert.load(stage("1/3 pretrain a small base model", new)), base, "hf")
    loop = stage("2/3 recast it and train the loop", replace(looped, init=base, out=str(out / "loop")))
    control = stage("3/3 the same tokens without loop", replace(unlooped, init=base, out=str(out / "control")))
    (convert.cache_dir() / "last").write_text(str(loop.resolve()))  # also where the loop was done before
    print("\nheld-out loss, nats per byte")
    for name, directory, depths in (("base", base, [0]), ("control", control, [0]), ("looped", loop, [0, 1, 2, 4, 8])):
        model, tokenizer = convert.load(directory, device)
        sequences = windows(convert.load_data("python", "", tokenizer)[1], 256, looped.eval_tokens)
        for depth, loss in depth_losses(model, sequences, depths, 16, autocast).items():
            print(f"{name:8} {f'{depth} passes' if depth else 'unlooped':20} {loss:.4f}", flush=True)
    stats = exit_stats(model, sequences, 8, Halt(), 16, autocast)
    print(f"looped   {stats['mean_passes']:.2f} passes, by exit {stats['loss']:.4f}")
    print(f"\nThat took {timedelta(seconds=int(time.time() - begun))}. Now try: python sample.py --max_loops=8")


def stage(title, s):
    """Run `s`, or go on with it where it was broken off. → its last checkpoint, at once where that is there."""
    done = Path(s.out) / f"step-{s.steps:07d}"
    print(f"== {title}" + (f": done before, see {done}" if done.exists() else ""))
    return done if done.exists() else train(replace(s, resume=any(Path(s.out).glob(f"{convert.STEP}/optimizer.pt"))))


def main():
    given = convert.parse(Settings)
    if given.get("resume"):
        saved = sorted(Path(given.get("out", Settings.out)).glob(f"{convert.STEP}/settings.json"))
        given = (json.loads(saved[-1].read_text()) if saved else {}) | given
    if given.get("init") or given.get("resume"):
        train(Settings(**given))
    else:
        story(given)


if __name__ == "__main__":
    convert.run(main)
