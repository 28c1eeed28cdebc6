"""
Make a looped model of a pretrained one by random deep supervision (paper §3.2), or train it unlooped, as the control.

    python train.py                                   the whole story in minutes, on any machine, without network
    python train.py --init=gpt2 --data=book.txt       a real model on real text, with the paper's constants
    torchrun --nproc_per_node=8 train.py --init=…     the same run, shared by 8 devices
"""

import copy
import json
import math
import os
import pickle
import random
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map
from torch.utils.benchmark import Timer

import convert
from convert import flag
from eval import depth_losses, exit_stats, windows
from loopus import Config, Halt, InputError, LoopUS, deep_supervision


@dataclass
class Settings:
    """Train a looped model, or with --objective=lm the unlooped one. Defaults are the paper's constants (App. A)."""

    init: str = flag("", "model to start from: hub name or directory; empty: the whole story from nothing, see above")
    data: str = flag("", 'text, .jsonl, .bin tokens, a directory, a glob; "python": the source of its standard library')
    val: str = flag("", "held-out text; empty: every 20th file of --data, or the last 20th of a single one")
    out: str = flag("out/loop", "directory of the run: checkpoints and log.jsonl")
    resume: bool = flag(False, "go on from the newest checkpoint in --out, with the settings it was started with")
    objective: str = flag("loop", "or lm: train the model unlooped, as the control", None, ("loop", "lm"))
    max_loops: int = flag(20, "B, passes unrolled per batch (paper: 20)", 1)
    supervised: int = flag(5, "K, steps supervised among them (paper: 5)", 1)
    through: int = flag(1, "passes per supervised step, all with gradient (paper: 1; its authors' code: 2)", 1)
    update: str = flag("batch", "an optimizer step per batch, or depth: per supervised step", None, ("batch", "depth"))
    confidence: str = flag("token", "q's target: per token, or sequence: Eq. 13", None, ("token", "sequence"))
    trains: str = flag("middle", "all but embedding and encoder (paper), or all", None, ("middle", "all"))
    encoder_layers: int = flag(-1, "layers run once before the loop; -1: the paper's cut, or by the layer profile")
    decoder_layers: int = flag(-1, "layers run once after the loop; -1: likewise")
    gate_start: str = flag("", "first α of every channel, or s4d: the authors' start; empty: 0.5")
    steps: int = flag(22888, "optimizer steps (paper: 3B tokens)", 1)
    batch: int = flag(2, "sequences per micro-batch (paper: 2)", 1)
    accumulate: int = flag(64, "micro-batches per optimizer step, over all processes (paper: 64)", 1)
    context: int = flag(1024, "tokens per sequence (paper: 1024)", 1)
    lr: float = flag(5e-5, "peak learning rate, cosine decay (paper: 5e-5)", 0)
    new_lr: float = flag(10.0, "how many times --lr the gate and the confidence head learn at", 0)
    warmup: int = flag(300, "steps until the peak learning rate (paper: 300), at most a tenth of --steps", 0)
    seed: int = flag(2026, "of the data order and the depths drawn (paper: 2026)")
    log_every: int = flag(10, "steps between log lines", 1)
    eval_every: int = flag(500, "steps between held-out losses and checkpoints", 1)
    eval_tokens: int = flag(16384, "held-out tokens per evaluation", 1)
    keep: int = flag(2, "checkpoints kept", 1)
    device: str = flag("", "cpu, cuda or mps; empty: the best there is")
    dtype: str = flag("", "to compute in; empty: bf16 where the device is good at it", None, ("bf16", "fp32"))
    compile: bool = flag(False, "compile the blocks with torch.compile")
    checkpointing: bool = flag(False, "keep one state per layer, run the layer again in backward: less memory")
    shard: bool = flag(False, "with torchrun: each process holds a share of weights, gradients and moments (FSDP)")


shuffled = lru_cache(maxsize=2)(lambda count, seed, epoch: np.random.default_rng((seed, epoch)).permutation(count))


def micro_batch(tokens, s, i):
    """Micro-batch number i of the run: inputs and next tokens, (batch, context) each. The text is cut into windows,
    each read once per epoch in an order of its own, so that what is read depends on the seed and on i alone."""
    count = (len(tokens) - 1) // s.context
    starts = [shuffled(count, s.seed, n // count)[n % count] * s.context for n in range(i * s.batch, (i + 1) * s.batch)]
    return convert.rows(tokens, starts, s.context)


def learning_rate(s, step):
    """Linear warm-up to s.lr, then a cosine down to a tenth of it."""
    warmup = min(s.warmup, s.steps // 10)
    decay = 0.55 + 0.45 * math.cos(math.pi * max(0, step - warmup) / max(1, s.steps - warmup))
    return s.lr * min(decay, (step + 1) / max(1, warmup))


def make_optimizer(model, s):
    """AdamW over what trains: for the loop all but the encoder, for lm all but the gate and the head."""
    groups = {}
    for name, p in model.named_parameters():
        new, ends = name.startswith(("gate.", "q_head.")), name.startswith(("wte.", "wpe.", "encoder."))
        p.requires_grad_(not new if s.objective == "lm" else s.trains == "all" or not ends)
        if p.requires_grad:
            groups.setdefault((s.new_lr if new else 1.0, 0.1 if p.dim() > 1 else 0.0), []).append(p)
    groups = [dict(params=ps, weight_decay=decay, scale=scale) for (scale, decay), ps in groups.items()]
    return torch.optim.AdamW(groups, lr=s.lr, betas=(0.9, 0.95), fused=model.wte.weight.device.type != "mps")


def computing_copy(model, dtype):
    """The model in `dtype`, to compute with: its gradients go to the float32 weights as soon as they are made."""
    fast = copy.deepcopy(model).to(dtype)
    for p, q in zip(model.parameters(), fast.parameters()):

        def collect(q, p=p):
            p.grad = q.grad.to(p.dtype) if p.grad is None else p.grad.add_(q.grad)
            q.grad = None

        if q.requires_grad:
            q.register_post_accumulate_grad_hook(collect)
    return fast


def shard(model, device, dtype):
    """Spread each part over the processes (FSDP2): it is put together, in `dtype`, while it runs; float32 gradients go
    to their shares with each backward, so that none holds them all. → share(x, p), of x that belongs to parameter p."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    from torch.distributed.tensor import distribute_tensor

    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=dtype)
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    ends = (part for part in model.children() if not isinstance(part, torch.nn.ModuleList))
    for part in (*ends, *model.layers(), model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "encode")
    return lambda x, p: distribute_tensor(x, p.device_mesh, p.placements)


def step_flops(model, s, drawn):
    """Floating-point operations of a step, on paper (§3.2). A matrix costs 2 per weight and token forward, and 4 more
    backward; attention to T/2 tokens before, two products of 2 operations: 2 T n hd. The encoder and the passes up to
    the last drawn one run forward, the drawn ones and their decoders also backward, and a decoder for each loss before,
    unless the step before has it. What is computed again in backward does not count."""
    c, parts = model.config, (model.reasoning[0], model.lm_head, model.gate)
    layer, head, gate = (2 * sum(p.numel() for p in part.parameters() if p.dim() > 1) for part in parts)
    layer += 2 * s.context * c.n_head * c.head_dim
    encoders, passes = (3 if s.trains == "all" and 0 in drawn else 1), s.through * (max(drawn) + 1 + 2 * len(drawn))
    decoders = 4 * len(drawn) - (s.update == "batch") * sum(b - 1 in drawn for b in drawn)
    if s.objective == "lm":
        encoders, passes, decoders, gate = 3, 3, 3, 0
    layers = encoders * c.encoder_layers + passes * c.reasoning_layers + decoders * c.decoder_layers
    return (layers * layer + passes * gate + decoders * head) * s.accumulate * s.batch * s.context


def train(s):
    """One run of `s` from s.init to a checkpoint in s.out/step-…; → the directory of that checkpoint."""
    if s.supervised > s.max_loops // s.through:
        raise InputError(f"--supervised={s.supervised} of --max_loops={s.max_loops}: expected K, 1 to B / --through")
    if not s.data:
        raise InputError('no --data: give a text file, a directory, a glob, .bin tokens, or "python"')
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun
    if s.accumulate % world:
        raise InputError(f"--accumulate={s.accumulate} micro-batches cannot be shared by {world} processes evenly")
    (device, dtype), out = convert.pick_device(s.device, s.dtype), Path(s.out)
    found, saved = sorted(out.glob(f"{convert.STEP}/optimizer.pt")), None
    if found and not s.resume:
        raise InputError(f"{out} already holds a run, at {found[-1].parent.name}: --resume it, or name another --out")
    while found and not saved:
        try:
            convert.tensor_files(found[-1].parent)
            saved = torch.load(found[-1], map_location="cpu", weights_only=True)
        except (InputError, RuntimeError, EOFError, LookupError, pickle.UnpicklingError) as e:
            print(f"{found.pop().parent} is damaged ({type(e).__name__}): trying the one before", file=sys.stderr)
    if s.resume and not (saved and saved["step"] <= s.steps):
        state = f"is at step {saved['step']} already, beyond --steps={s.steps}" if saved else "holds no checkpoint"
        raise InputError(f"--resume: {out} {state}; start without --resume, or name another --out")
    torch.manual_seed(s.seed)
    src, sharded = found[-1].parent if saved else s.init, s.shard and world > 1
    if world > 1:  # the first process fetches it, the others wait
        src = src if rank > 0 else convert.resolve(src)
        dist.barrier()
    cuts = dict(encoder_layers=s.encoder_layers, decoder_layers=s.decoder_layers, gate_start=s.gate_start)
    model, tokenizer = convert.load(src, "cpu" if sharded else device, **cuts)
    if s.context > model.config.block_size:
        raise InputError(f"--context={s.context} is more than the model's {model.config.block_size}: give at most that")
    tokens, held_out = convert.load_data(s.data, s.val, tokenizer)
    windows(tokens, s.context, 1)  # raises where there is too little to train on
    sequences, first, skipped = windows(held_out, s.context, s.eval_tokens), 0, 0
    share = shard(model, device, dtype) if sharded else None
    optimizer = make_optimizer(model, s)
    if saved:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        for i, of in saved["optimizer"]["state"].items() if sharded else ():
            of.update({key: share(x, params[i]) for key, x in of.items() if x.dim() > 0})
        optimizer.load_state_dict(saved["optimizer"])
        first, skipped = saved["step"], saved.get("skipped", 0)
    fast = model if dtype == torch.float32 or sharded else computing_copy(model, dtype)
    fast.checkpointing = s.checkpointing
    for block in fast.layers() if s.compile else ():
        block.compile()
    n = 8192 if device.type == "cuda" else 1024
    setup = "a = torch.randn(n, n, device=device, dtype=dtype)"
    product = Timer("a @ a", setup, globals=dict(n=n, device=device, dtype=dtype), num_threads=torch.get_num_threads())
    peak, flops = 2 * n**3 / min(product.timeit(1).mean for _ in range(5)), 0
    out.mkdir(parents=True, exist_ok=True)
    log = open(out / "log.jsonl" if rank == 0 else os.devnull, "a", 1, encoding="utf-8")

    def summed(x):
        """The sum over all processes, in place."""
        if world > 1:
            dist.all_reduce(x)
        return x

    def whole(x):  # all processes put together what they share, the first one keeps it
        x = x.full_tensor().cpu() if hasattr(x, "full_tensor") else x
        return x if rank == 0 else None

    def report(step, **values):
        parts = (f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        print(f"step {step:>{len(str(s.steps))}}  " + "  ".join(parts), flush=True)
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        log.write(json.dumps(dict(step=step) | finite) + "\n")

    def evaluate(step):
        losses = depth_losses(fast, sequences, [0] if s.objective == "lm" else [0, 1, 2, 4, 8], s.batch)
        report(step, held_out={b: round(loss, 5) if math.isfinite(loss) else None for b, loss in losses.items()})

    def checkpoint(step):
        directory, state = out / f"step-{step:07d}", dict(step=step, skipped=skipped, optimizer=optimizer.state_dict())
        weights, state = tree_map(whole, (dict(model.state_dict()), state))
        if rank == 0:
            settings = json.dumps(asdict(s), indent=2)
            more = {"settings.json": lambda path: path.write_text(settings), "optimizer.pt": partial(torch.save, state)}
            convert.save(model, tokenizer, directory, weights=weights, **more)
            if s.objective == "loop":
                (convert.cache_dir() / "last").write_text(str(directory.resolve()))
            for old in set(out.glob("step-*")) - set(sorted(out.glob(convert.STEP))[-s.keep :]):
                shutil.rmtree(old)

    def update():
        """Take the optimizer's step, unless the gradient is not finite. → how many were left out in a row, its norm"""
        for p in (p for p in model.parameters() if world > 1 and not sharded and p.grad is not None):
            p.grad = summed(p.grad) / world
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        norm = (norm.full_tensor() if sharded else norm).item()
        if math.isfinite(norm):
            optimizer.step()
            if fast is not model:
                fast.load_state_dict(model.state_dict())
        elif skipped == 4:
            raise InputError(f"no finite gradient in 5 steps to {step + 1}: lower --lr; {out} keeps its checkpoints")
        optimizer.zero_grad()
        return 0 if math.isfinite(norm) else skipped + 1, norm

    cuts = " + ".join(str(len(stack)) for stack in (model.encoder, model.reasoning, model.decoder))
    print(f"{s.objective}: {cuts} layers, {len(tokens):,} tokens, {world} × {device}, {dtype}, to {out}", flush=True)
    begun, last, logged, asked = time.time(), time.time(), first, []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: asked.append(signal.Signals(number).name))
    count = s.accumulate // world * (s.supervised if s.objective == "loop" else 1)  # backward calls of a step
    each = 1 if s.update == "depth" else count  # of an update
    for step in range(first, s.steps):
        if step % s.eval_every == 0:
            evaluate(step)
        rate = learning_rate(s, step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        # K of B; the same for all micro-batches of a step, so that processes keep pace
        drawn = random.Random(f"depths {s.seed} {step}").sample(range(s.max_loops // s.through), s.supervised)
        terms, done, flops = torch.zeros(3, device=device), 0, flops + step_flops(model, s, drawn) / world
        for micro in range(step * s.accumulate + rank, (step + 1) * s.accumulate, world):
            stop = summed(torch.tensor(len(asked)))  # on the CPU: the device need not come to a halt for it
            if stop > 0 and (done == 0 or s.update == "batch"):  # not where part of a step has changed the weights
                if step > first:
                    checkpoint(step)
                stopped = f"stopped by {' '.join(asked[:1])} after step {step}; --resume --out={out} goes on"
                sys.exit(stopped if rank == 0 else 1)
            x, y = (part.to(device) for part in micro_batch(tokens, s, micro))
            if s.objective == "loop":
                steps = deep_supervision(fast, x, y, drawn, s.through, s.confidence == "sequence", s.update == "depth")
            else:
                steps = [[fast.loss(fast.propose(fast.encode(x)), y)[0]]]
            for step_terms in steps:
                done += 1
                (sum(step_terms) / each).backward()
                terms[: len(step_terms)] += torch.stack(step_terms).detach() / count
                if done % each == 0:
                    skipped, norm = update()
            convert.progress(f"step {step + 1}", done, count)
        if (step + 1) % s.log_every == 0 or step in (first, s.steps - 1) or skipped:
            (lm, mono, q), now = (summed(terms) / world).tolist(), time.time()
            speed = (step + 1 - logged) * s.accumulate * s.batch * s.context / (now - last)
            values = dict(lm=lm, mono=mono, q=q, lr=rate, grad_norm=norm, left_out=skipped, tokens_per_second=speed)
            values |= dict(mfu=flops / (now - last) / peak)
            report(step + 1, **values, seconds_left=int((now - begun) / (step + 1 - first) * (s.steps - step - 1)))
            last, logged, flops = now, step + 1, 0
        if (step + 1) % s.eval_every == 0 or step + 1 == s.steps:
            checkpoint(step + 1)
    directory = out / f"step-{s.steps:07d}"
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    evaluate(s.steps)
    spent = f"{(time.time() - begun) / 60:.1f} minutes, peak memory {convert.peak_memory(device):.2f} GB"
    print(f"{s.objective}: {spent}, written to {directory}", flush=True)
    return directory


def story(given):
    """Without --init: pretrain a small base model, recast and train it as a looped one, spend the same tokens on the
    unlooped control, and compare. `given` are the flags that were set; the base gets three times the steps of each."""
    out, begun = Path(given.pop("out", "out/story")), time.time()
    device, _ = convert.pick_device(given.get("device", ""), given.get("dtype", ""))
    width, batch = (512, 64) if device.type == "cuda" else (128, 4)  # minutes on a GPU, and on two CPU cores
    values = dict(data="python", batch=batch, accumulate=1, context=256, steps=400, lr=1.5e-3, warmup=50, log_every=100)
    values |= dict(max_loops=8, supervised=2, encoder_layers=2, decoder_layers=2, eval_every=10**9, eval_tokens=32768)
    looped = Settings(**values | given)
    unlooped = replace(looped, objective="lm")
    untrained = str(out / "untrained")
    if not Path(untrained, "config.json").exists():
        torch.manual_seed(looped.seed)
        gpt2 = dict(model_type="gpt2", architectures=["GPT2LMHeadModel"], layer_norm_epsilon=1e-5, vocab_size=257)
        gpt2 |= dict(n_positions=512, n_layer=6, n_embd=width, n_head=width // 64)
        model = LoopUS(Config(**convert.read_family(gpt2, untrained)[1]))
        for name, p in model.named_parameters():  # as GPT-2: zero biases, small weights into the residual stream
            std = 0.0 if p.dim() == 1 else 0.006 if name.endswith(("out.weight", "down.weight")) else 0.02
            if p.dim() > 1 or name.endswith("bias"):
                torch.nn.init.normal_(p, std=std)
        model.reset_new_parameters()
        convert.save(model, convert.byte_tokenizer(), untrained, "hf")
    new = replace(unlooped, init=untrained, out=str(out / "base"), steps=3 * looped.steps, lr=2e-3)
    base = str(stage("1/3 pretrain a small base model", new))
    loop = stage("2/3 recast it and train the loop", replace(looped, init=base, out=str(out / "loop")))
    control = stage("3/3 the same tokens without loop", replace(unlooped, init=base, out=str(out / "control")))
    (convert.cache_dir() / "last").write_text(str(loop.resolve()))  # also where the loop was done before
    print("\nheld-out loss, nats per byte")
    for name, directory, depths in (("base", base, [0]), ("control", control, [0]), ("looped", loop, [0, 1, 2, 4, 8])):
        model, tokenizer = convert.load(directory, device)
        sequences = windows(convert.load_data("python", "", tokenizer)[1], 256, looped.eval_tokens)
        for depth, loss in depth_losses(model, sequences, depths, 16).items():
            print(f"{name:8} {f'{depth} passes' if depth else 'unlooped':20} {loss:.4f}", flush=True)
    stats = exit_stats(model, sequences, 8, Halt(), 16)
    print(f"looped   {stats['mean_passes']:.2f} passes, by exit {stats['loss']:.4f}")
    print(f"\nThat took {(time.time() - begun) / 60:.1f} minutes. Now try: python sample.py --max_loops=8")


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
    if not (given.get("init") or given.get("resume")):
        return story(given)
    if "RANK" not in os.environ:
        return train(Settings(**given))
    if torch.cuda.is_available():  # started by torchrun; the first process speaks for all
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    sys.stdout = sys.stdout if dist.get_rank() == 0 else open(os.devnull, "w")
    train(Settings(**given))
    os._exit(0)  # all is written; taking down the threads of torch.distributed sometimes ends in an abort


if __name__ == "__main__":
    convert.run(main)
