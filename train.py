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
import random
import signal
import sys
import time
import warnings
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path

if "OMP_WAIT_POLICY" not in os.environ:
    # Threads that wait for others spin: torch's by default so long that, beside another busy process, a small model
    # trains at a third of its speed. With this many turns it keeps half of it or more, and nine tenths where it is
    # alone. It must be set before torch starts them. (Compiled writing would lose an eighth: other programs leave it.)
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import convert
from convert import flag
from eval import accuracy_by_kind, best_product, count_windows, depth_losses, print_accuracy, read_answers, windows
from loopus import Config, Halt, InputError, LoopUS, deep_supervision, precise, token_confidence_loss


@dataclass
class Settings:
    """Train a looped model, or with --objective=lm the unlooped one. Defaults are the paper's constants (App. A)."""

    init: str = flag("", "model to start from: hub name or directory; empty: the whole story from nothing, see above")
    data: str = flag("", "text, .jsonl, .bin or .npy tokens, a directory, a glob; empty: Python's standard library")
    val: str = flag("", "held-out text; empty: every 20th file of --data, or the last 20th of a single one")
    out: str = flag("out/loop", "directory of the run: checkpoints and log.jsonl")
    resume: bool = flag(False, "go on from the newest checkpoint in --out, with the settings it was started with")
    objective: str = flag("loop", "or lm: train the model unlooped, as the control", None, ("loop", "lm"))
    max_loops: int = flag(20, "B, passes unrolled per batch (paper: 20)", 1)
    supervised: int = flag(5, "K, passes supervised among them (paper: 5)", 1)
    through: int = flag(1, "span: passes that a gradient crosses (paper: 1; its authors' code: 2)", 1)
    update: str = flag("batch", "an optimizer step per batch, or depth: per supervised pass", None, ("batch", "depth"))
    confidence: str = flag("token", "q's target: per token, or sequence: Eq. 13", None, ("token", "sequence"))
    trains: str = flag("middle", "all but embedding and encoder (paper), or all", None, ("middle", "all"))
    encoder_layers: int = flag(-1, "layers run once before the loop; -1: the paper's cut, or by the layer profile")
    decoder_layers: int = flag(-1, "layers run once after the loop; -1: likewise")
    gate_start: str = flag("", "start the gate anew: a first α of every channel, or s4d (the authors'); empty: 0.5")
    steps: int = flag(22888, "optimizer steps (paper: 3B tokens)", 1)
    batch: int = flag(2, "sequences per micro-batch (paper: 2)", 1)
    accumulate: int = flag(64, "micro-batches per optimizer step, over all processes (paper: 64)", 1)
    context: int = flag(1024, "tokens per sequence (paper: 1024)", 1)
    lr: float = flag(5e-5, "peak learning rate, cosine decay (paper: 5e-5)", 0)
    new_lr: float = flag(10.0, "how many times --lr the gate and the confidence head learn at", 0)
    warmup: int = flag(300, "steps until the peak learning rate (paper: 300), at most a tenth of --steps", 0)
    seed: int = flag(2026, "of the data order and the passes drawn (paper: 2026)")
    log_every: int = flag(10, "steps between log lines", 1)
    eval_every: int = flag(500, "steps between held-out losses and checkpoints", 1)
    eval_tokens: int = flag(16384, "held-out tokens per evaluation", 1)
    keep: int = flag(2, "checkpoints kept", 1)
    device: str = flag("", "cpu, cuda or mps; empty: the best there is")
    dtype: str = flag("", "to compute in; empty: bf16 where the device is good at it", None, ("bf16", "fp32"))
    compile: bool = flag(False, "compile the layers with torch.compile")
    checkpointing: bool = flag(False, "keep one state per layer, run the layer again in backward: less memory")
    shard: bool = flag(False, "with torchrun: each process holds a share of weights, gradients and moments (FSDP)")


FIXED = ("init", "objective", "trains", "encoder_layers", "decoder_layers", "gate_start")  # while a run is resumed


# ---- What a step reads, and at what rate it learns
@lru_cache(maxsize=2)
def window_order(count, seed, epoch):
    """The order in which an epoch reads the `count` windows of the text."""
    return np.random.default_rng((convert.valid_seed(seed), epoch)).permutation(count)


def micro_batch(tokens, s, i):
    """Micro-batch number i of the run: inputs and next tokens, (batch, context) each. The text is cut into windows;
    each epoch reads every one once, in a new order, so that what is read depends on the seed and on i alone."""
    count = (len(tokens) - 1) // s.context
    starts = []
    for n in range(i * s.batch, (i + 1) * s.batch):
        epoch, place = divmod(n, count)
        starts.append(window_order(count, s.seed, epoch)[place] * s.context)
    return convert.rows(tokens, starts, s.context)


def supervised_passes(s, step):
    """K of the B passes, without replacement; the same for all micro-batches of a step, so that processes keep pace."""
    return random.Random(f"depths {s.seed} {step}").sample(range(s.max_loops), s.supervised)


def learning_rate(s, step):
    """Linear warm-up to s.lr, then a cosine down to a tenth of it."""
    warmup = min(s.warmup, s.steps // 10)
    if step < warmup:
        return s.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, s.steps - warmup)
    return s.lr * (0.55 + 0.45 * math.cos(math.pi * progress))


# ---- The model in training
def is_trained(name, s):
    """Does the parameter of this name train? For the loop all but the encoder, for lm all but the gate and the head."""
    if s.objective == "lm":
        return not is_new(name)
    return s.trains == "all" or not name.startswith(("wte.", "wpe.", "encoder."))


def is_new(name):
    """Is this parameter one that no pretrained model has?"""
    return name.startswith(("gate.", "q_head."))


def make_optimizer(model, s):
    """AdamW over what trains, with weight decay on matrices."""
    groups = {}
    for name, p in model.named_parameters():
        p.requires_grad_(is_trained(name, s))
        if p.requires_grad:
            groups.setdefault((is_new(name), p.dim() > 1), []).append(p)
    params = []
    for (new, matrices), members in groups.items():
        params.append({"params": members, "weight_decay": 0.1 * matrices, "new": new})
    fused = model.wte.weight.device.type != "mps"
    return torch.optim.AdamW(params, lr=s.lr, betas=(0.9, 0.95), fused=fused)


def move_gradient(weight, copied):
    """Add the gradient of a parameter's copy to that of the float32 weight."""
    gradient = copied.grad.to(weight.dtype)
    copied.grad = None
    if weight.grad is None:
        weight.grad = gradient
    else:
        weight.grad.add_(gradient)


def computing_copy(model, dtype):
    """The model in `dtype`, to compute with: its gradients go to the float32 weights as soon as they are made."""
    fast = copy.deepcopy(model).to(dtype)
    for weight, copied in zip(model.parameters(), fast.parameters()):
        if copied.requires_grad:
            copied.register_post_accumulate_grad_hook(partial(move_gradient, weight))
    return fast


def checkpoint_layers(model):
    """Keep the input of each layer alone, and run the layer again in backward."""
    for block in model.layers():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def shard(model, device, dtype):
    """Spread each part over the processes (FSDP2): it is put together, in `dtype`, while it runs; float32 gradients go
    to their shares with each backward, so that no process holds them all."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # of writing into the output of a part: nobody does
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=dtype)
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    ends = [part for part in model.children() if not isinstance(part, torch.nn.ModuleList)]
    for part in [*ends, *model.layers(), model]:
        fully_shard(part, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "encode")


def share(x, parameter):
    """This process's share of x, which belongs to a parameter that `shard` has spread."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x, parameter.device_mesh, parameter.placements)


def whole(x):
    """x put together from all processes, on the CPU of the first one; None elsewhere."""
    if hasattr(x, "full_tensor"):
        x = x.full_tensor().cpu()
    return x if rank() == 0 else None


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def summed(x):
    """The sum of x over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


# ---- A run: setting it up, saving it, going on with it
@dataclass
class Run:
    """What a run works with, and where it stands."""

    model: LoopUS  # float32 weights
    fast: LoopUS  # what computes: the model itself, or its copy in bf16
    optimizer: torch.optim.AdamW
    tokenizer: object
    device: torch.device
    dtype: torch.dtype  # of the passes
    sharded: bool
    step: int = 0  # steps that are done
    skipped: int = 0  # updates in a row that were left out


def check(s):
    """Raises InputError where settings contradict each other. Names the text where none is given."""
    if s.supervised > s.max_loops:
        raise InputError(f"--supervised={s.supervised} of --max_loops={s.max_loops}: expected K, 1 to B")
    if s.batch * s.context > 1 << 28:
        raise InputError(f"--batch={s.batch} of --context={s.context} tokens fits no machine: take fewer")
    if not s.data:
        s.data = "python"
        print("no --data: training on the source of Python's standard library")
    if s.accumulate % world_size():
        raise InputError(f"--accumulate={s.accumulate} micro-batches cannot be shared by {world_size()} processes")


def step_directories(out):
    """The directories of the checkpoints of a run, the newest first."""
    return sorted((path.parent for path in Path(out).glob(f"{convert.STEP}/optimizer.pt")), reverse=True)


def refuse_to_overwrite(s):
    """Raise InputError where s.out holds a run already."""
    directories = step_directories(s.out)
    if directories:
        state = f"{s.out} already holds a run, at {directories[0].name}"
        raise InputError(f"{state}: --resume it, or name another --out")


def read_settings(directory):
    """The settings of a checkpoint, {name: value}. Raises InputError where settings.json is damaged."""
    path = directory / "settings.json"
    stored = convert.read_json(path)
    settings = {}
    for setting in fields(Settings):
        value = stored.get(setting.name, setting.default)
        problem = convert.problem_with(setting, value)
        if problem:
            raise InputError(f"{path} is damaged: {setting.name}={value!r:.40} {problem}")
        settings[setting.name] = value
    return settings


def read_optimizer(directory):
    """What `save_checkpoint` has written to optimizer.pt. Raises InputError where it is damaged."""
    path = directory / "optimizer.pt"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        name = f"step-{saved['step']:07d}"
        moments = saved["optimizer"]["state"]
    except Exception as e:  # of many types: unpickling follows what the file says
        if convert.is_out_of_memory(e):
            raise
        raise InputError(f"{path} is damaged ({e!r:.80})") from None
    if name != directory.name or not isinstance(moments, dict):
        raise InputError(f"{path} is damaged: it does not hold the optimizer of that step")
    return saved


def check_moments(state, model, s, directory):
    """Raise InputError unless AdamW's moments, {number of a parameter: {name: tensor}}, fit what trains."""
    params = [p for group in make_optimizer(model, s).param_groups for p in group["params"]]
    expected = {}
    for i, p in enumerate(params):
        expected[i] = {"step": (), "exp_avg": tuple(p.shape), "exp_avg_sq": tuple(p.shape)}
    for i, moments in state.items():
        shapes = moments
        if isinstance(moments, dict):
            shapes = {name: tuple(x.shape) if torch.is_tensor(x) else x for name, x in moments.items()}
        if shapes != expected.get(i):
            problem = f"the moments of parameter {i} have the shapes {shapes!s:.80}, expected {expected.get(i)}"
            raise InputError(f"{directory / 'optimizer.pt'} is damaged: {problem}")


def load_newest(s, device, cuts):
    """→ model, tokenizer and the content of optimizer.pt of the newest whole checkpoint in s.out. Raises InputError if
    there is none, or if it is beyond s.steps."""
    for directory in step_directories(s.out):
        try:
            read_settings(directory)
            saved = read_optimizer(directory)
            model, tokenizer = convert.load(directory, device, **cuts)
            check_moments(saved["optimizer"]["state"], model, s, directory)
        except (InputError, OSError) as e:
            print(f"leaving out {directory.name}, trying the one before: {e}", file=sys.stderr)
            continue
        if saved["step"] > s.steps:
            state = f"is at step {saved['step']} already, beyond --steps={s.steps}"
            raise InputError(f"--resume: {s.out} {state}; start without --resume, or name another --out")
        return model, tokenizer, saved
    raise InputError(f"--resume: {s.out} holds no checkpoint; start without --resume, or name another --out")


def load_first(s, device, cuts):
    """→ model and tokenizer that a new run starts from."""
    src = s.init
    if dist.is_initialized():  # the first process fetches the model, the others wait
        if rank() == 0:
            src = convert.resolve(src)
        dist.barrier()
    model, tokenizer = convert.load(src, device, **cuts)
    if s.gate_start:  # also where the checkpoint has a gate, such as one that was trained unlooped
        model.gate.reset_parameters()
    return model, tokenizer


def setup(s):
    """→ the Run, new or resumed."""
    device, dtype = convert.pick_device(s.device, s.dtype)
    torch.manual_seed(convert.valid_seed(s.seed))
    sharded = s.shard and world_size() > 1
    load_on = device
    if sharded:
        load_on = "cpu"
    cuts = {"encoder_layers": s.encoder_layers, "decoder_layers": s.decoder_layers, "gate_start": s.gate_start}
    saved = None
    if s.resume:
        model, tokenizer, saved = load_newest(s, load_on, cuts)
    else:
        refuse_to_overwrite(s)
        model, tokenizer = load_first(s, load_on, cuts)
    if s.context > model.config.block_size:
        raise InputError(f"--context={s.context} is more than the model's {model.config.block_size}: give at most that")
    if sharded:
        shard(model, device, dtype)
    optimizer = make_optimizer(model, s)
    fast = model
    if dtype != torch.float32 and not sharded:
        fast = computing_copy(model, dtype)
    if s.compile:
        for block in fast.layers():
            block.forward = torch.compile(block.forward)
    if s.checkpointing:
        checkpoint_layers(fast)
    run = Run(model, fast, optimizer, tokenizer, device, dtype, sharded)
    if saved:
        restore(run, saved)
    return run


def restore(run, saved):
    """Put the optimizer, and the number of steps, where a checkpoint left them. Rates are those of the settings."""
    state = saved["optimizer"]["state"]
    groups = run.optimizer.state_dict()["param_groups"]
    if run.sharded:
        params = [p for group in run.optimizer.param_groups for p in group["params"]]
        for i, moments in state.items():
            for name, x in moments.items():
                if x.dim() > 0:
                    moments[name] = share(x, params[i])
    run.optimizer.load_state_dict({"state": state, "param_groups": groups})
    run.step = saved["step"]
    run.skipped = saved.get("skipped", 0)


def save_checkpoint(run, s):
    """Write the run as it stands to s.out/step-…, and remove the checkpoints before the newest s.keep."""
    out = Path(s.out)
    directory = out / f"step-{run.step:07d}"
    weights = {name: whole(x) for name, x in run.model.state_dict().items()}
    optimizer = run.optimizer.state_dict()
    moments = {}  # a copy: the optimizer goes on with its own
    for i, of_parameter in optimizer["state"].items():
        moments[i] = {name: whole(x) for name, x in of_parameter.items()}
    optimizer["state"] = moments
    if rank() > 0:
        return
    state = {"step": run.step, "skipped": run.skipped, "optimizer": optimizer}
    with convert.all_or_nothing(directory) as unfinished:
        convert.write_checkpoint(run.model, run.tokenizer, unfinished, weights=weights)
        (unfinished / "settings.json").write_text(json.dumps(asdict(s), indent=2), encoding="utf-8")
        torch.save(state, unfinished / "optimizer.pt")
    if s.objective == "loop":
        convert.remember(directory)
    for old in sorted(out.glob(convert.STEP))[: -s.keep]:
        convert.remove_checkpoint(old)
    for unfinished in out.glob(f"{convert.STEP}.new-*"):  # what a crash in the middle of saving left
        convert.remove_checkpoint(unfinished)


# ---- One step
def sequence_confidence_loss(confidence, right, known):
    """L_Q with one target per sequence, Eq. 13: q of its last token against the share of its tokens that are right.
    All arguments (B, T)."""
    count = known.sum(dim=1)
    share_right = (right & known).sum(dim=1) / count.clamp(min=1)
    some = count > 0
    return F.binary_cross_entropy_with_logits(precise(confidence[:, -1])[some], share_right[some])


CONFIDENCE_LOSSES = {"token": token_confidence_loss, "sequence": sequence_confidence_loss}


def supervised_losses(run, s, x, y, supervised):
    """The loss terms of a micro-batch: of each supervised pass in turn, or the one of the unlooped model."""
    if s.objective == "lm":
        h = run.fast.propose(run.fast.encode(x))
        lm, _ = run.fast.loss(h, y)
        yield (lm,)
    else:
        confidence_loss = CONFIDENCE_LOSSES[s.confidence]
        yield from deep_supervision(run.fast, x, y, supervised, s.through, confidence_loss)


def train_step(run, s, tokens, signals):
    """Step run.step: gradients of all its micro-batches, and the optimizer's step. Each micro-batch counts by its share
    of the step's learned tokens, so that L_LM is their mean, in whatever micro-batch or process they are. → the mean
    loss terms and the norm of the gradient, or None if a signal came: the step is then left as if it had not begun."""
    first = run.step * s.accumulate
    batches = [micro_batch(tokens, s, first + i) for i in range(s.accumulate)]
    learned = [(y >= 0).sum().item() for _, y in batches]
    supervised = supervised_passes(s, run.step)
    count = s.supervised if s.objective == "loop" else 1
    means = torch.zeros(3, device=run.device)
    for i in range(rank(), s.accumulate, world_size()):
        untouched = i == rank() or s.update == "batch"  # no weight has changed in this step
        if untouched and summed(torch.tensor(len(signals))) > 0:
            run.optimizer.zero_grad()
            return None
        x, y = (part.to(run.device) for part in batches[i])
        if learned[i] == 0:
            y = y.clamp(min=0)  # its weight is 0: the loss must only be a number
        weight = learned[i] / max(1, sum(learned)) / count
        scale = weight
        if s.update == "depth":
            together = learned[i - rank() : i - rank() + world_size()]  # an update has one micro-batch per process
            scale = learned[i] / max(1, sum(together))
        if run.sharded:
            scale = scale * world_size()  # FSDP takes the mean over the processes
        for terms in supervised_losses(run, s, x, y, supervised):
            (sum(terms) * scale).backward()
            means[: len(terms)] += torch.stack(terms).detach() * weight
            if s.update == "depth":
                norm = optimizer_step(run, s)
        convert.progress(f"step {run.step + 1}", i + 1, s.accumulate)
    if s.update == "batch":
        norm = optimizer_step(run, s)
    return summed(means).tolist()[: len(terms)], norm


def optimizer_step(run, s):
    """Take the optimizer's step, unless the gradient is not finite. → its norm. Raises InputError after the fifth such
    gradient in a row."""
    if dist.is_initialized() and not run.sharded:
        for p in run.model.parameters():
            if p.grad is not None:
                summed(p.grad)
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    if run.sharded:
        norm = norm.full_tensor()
    norm = norm.item()
    if math.isfinite(norm):
        rate = learning_rate(s, run.step)
        for group in run.optimizer.param_groups:
            group["lr"] = rate * s.new_lr if group["new"] else rate
        run.optimizer.step()
        run.skipped = 0
        if run.fast is not run.model:
            run.fast.load_state_dict(run.model.state_dict())
    else:
        run.skipped += 1
    run.optimizer.zero_grad()
    if run.skipped == 5:
        state = f"no finite gradient in 5 steps to {run.step + 1}"
        raise InputError(f"{state}: lower --lr; {s.out} keeps its checkpoints")
    return norm


def step_flops(model, s, supervised):
    """Floating-point operations of a step, on paper (§3.2). A matrix costs 2 per weight and token forward, and 4 more
    backward; attention to T/2 tokens before, two products of 2 operations: 2 T n hd. The encoder and the passes up to
    the last supervised one run forward, and those with gradient also backward. Each supervised pass has a decoder
    forward and backward, and one forward for the loss before it. What is run again in backward does not count."""
    layer = 2 * matrix_weights(model.reasoning[0]) + 2 * s.context * model.config.n_head * model.config.head_dim
    tracked = {b - i for b in supervised for i in range(s.through)}
    if s.objective == "lm":
        encoders, passes, gates, decoders = 3, 3, 0, 3
    else:
        encoders = 3 if s.trains == "all" and 0 in tracked else 1
        passes = max(supervised) + 1 + 2 * sum(b >= 0 for b in tracked)
        gates = passes
        decoders = 4 * len(supervised)
    layers = encoders * model.config.encoder_layers + passes * model.config.reasoning_layers
    layers += decoders * model.config.decoder_layers
    per_token = layers * layer + gates * 2 * matrix_weights(model.gate) + decoders * 2 * matrix_weights(model.lm_head)
    return per_token * s.accumulate * s.batch * s.context


def matrix_weights(module):
    return sum(p.numel() for p in module.parameters() if p.dim() > 1)


# ---- The log
def finite(x):
    """x, or None where it is no number: JSON has no word for that."""
    return x if math.isfinite(x) else None


class Log:
    """Lines on standard output, and the same in log.jsonl in s.out. Only the first process writes."""

    def __init__(self, run, s):
        path = Path(s.out, "log.jsonl") if rank() == 0 else os.devnull
        Path(s.out).mkdir(parents=True, exist_ok=True)
        self.file = open(path, "a", buffering=1, encoding="utf-8")
        self.width = len(str(s.steps))
        self.peak = best_product(run.device, run.dtype) * world_size()
        self.first_step = self.last_step = run.step
        self.begun = time.time()
        self.flops = 0  # of the steps since the last line
        self.seconds = 0.0  # spent on them

    def write(self, step, values):
        words = []
        record = {"step": step}
        for name, value in values.items():
            record[name] = value
            if isinstance(value, float):
                record[name] = finite(value)
                value = f"{value:.5g}"
            words.append(f"{name} {value}")
        print(f"step {step:>{self.width}}  " + "  ".join(words), flush=True)
        self.file.write(json.dumps(record) + "\n")

    def training(self, run, s, terms, norm):
        """A line: the losses of the last step, and the speed of all steps since the last line. mfu: their operations,
        over their time, over the best product."""
        tokens = (run.step - self.last_step) * s.accumulate * s.batch * s.context
        pace = (time.time() - self.begun) / (run.step - self.first_step)
        values = dict(zip(("lm", "mono", "q"), terms))
        values["lr"] = learning_rate(s, run.step - 1)
        values["grad_norm"] = norm
        values["left_out"] = run.skipped
        values["tokens_per_second"] = tokens / self.seconds
        values["mfu"] = self.flops / self.seconds / self.peak
        values["seconds_left"] = int(pace * (s.steps - run.step))
        self.write(run.step, values)
        self.last_step = run.step
        self.flops = 0
        self.seconds = 0.0


def evaluate(run, s, held_out, log):
    """Write the held-out loss at each depth to the log."""
    depths = [0] if s.objective == "lm" else [0, 1, 2, 4, 8]
    losses = depth_losses(run.fast, held_out, depths, s.batch)
    log.write(run.step, {"held_out": {depth: finite(round(loss, 5)) for depth, loss in losses.items()}})


# ---- The loop
def train(s):
    """One run of `s` from s.init to a checkpoint in s.out/step-…; → the directory of that checkpoint."""
    check(s)
    run = setup(s)
    tokens, held_out = convert.load_data(s.data, s.val, run.tokenizer)
    count_windows(tokens, s.context, "training")  # raises InputError if there is nothing to learn in them
    held_out = windows(held_out, s.context, s.eval_tokens)
    log = Log(run, s)
    cuts = " + ".join(str(len(stack)) for stack in (run.model.encoder, run.model.reasoning, run.model.decoder))
    place = f"{world_size()} × {run.device}, {run.dtype}"
    print(f"{s.objective}: {cuts} layers, {len(tokens):,} tokens, {place}, to {s.out}", flush=True)
    warn_of_long_run(run, s, log)

    signals = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: signals.append(signal.Signals(number).name))
    while run.step < s.steps:
        if run.step % s.eval_every == 0:
            evaluate(run, s, held_out, log)
        begun = time.time()
        done = train_step(run, s, tokens, signals)
        if done is None:
            leave(run, s, log, signals)
        log.seconds += time.time() - begun
        log.flops += step_flops(run.model, s, supervised_passes(s, run.step))
        run.step += 1
        if run.step % s.log_every == 0 or run.step in (log.first_step + 1, s.steps) or run.skipped:
            log.training(run, s, *done)
        if run.step % s.eval_every == 0 or run.step == s.steps:
            save_checkpoint(run, s)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    evaluate(run, s, held_out, log)
    directory = last_checkpoint(s)
    spent = f"{(time.time() - log.begun) / 60:.1f} minutes, peak memory {convert.peak_memory(run.device):.2f} GB"
    print(f"{s.objective}: {spent}, written to {directory}", flush=True)
    return directory


def warn_of_long_run(run, s, log):
    """Say how long the run will take at half of the device's best product, if that is more than a day."""
    drawn = supervised_passes(s, run.step)
    days = step_flops(run.model, s, drawn) * (s.steps - run.step) / (0.5 * log.peak) / 86400
    if days > 1:
        shorter = "--steps=200 --accumulate=1 --context=256 --max_loops=6 --supervised=2 --warmup=20"
        print(f"This will take about {days:,.0f} days on this device. Short enough to try: {shorter}", flush=True)


def leave(run, s, log, signals):
    """Save what is done, and end the program with one line that says who stopped it."""
    if run.step > log.first_step:
        save_checkpoint(run, s)
    if rank() > 0:
        sys.exit(1)
    name = signals[0] if signals else "another process"
    sys.exit(f"stopped by {name} after step {run.step}; --resume --out={s.out} goes on")


# ---- The whole story, without --init: linked lists
SLOTS = "abcdefghijklmnopqrstuvwx"
VALUES = "0123456789ABCDEF"
QUESTIONS = 12  # per document


def list_document(chance, links):
    """A line of .jsonl. Its text says what each slot a, b, c … holds: the name of another slot or, where a chain ends,
    a value; then come questions: a slot, and the value at the end of its chain. All chains have `links` slots. A link
    is a step of attention that needs the one before: width buys no depth, and there is nothing to memorise."""
    chains = chance.permutation(list(SLOTS)).reshape(-1, links)
    values = chance.choice(list(VALUES), len(chains), replace=len(chains) > len(VALUES))
    holds = {}
    answers = {}
    for chain, value in zip(chains.tolist(), values.tolist()):
        content = value
        for distance, slot in enumerate(chain, start=1):
            holds[slot] = content
            answers[slot] = (value, f"{distance} links")
            content = slot
    asked = chance.permutation(list(SLOTS))[:QUESTIONS].tolist()
    prompts = [f" {slot}" for slot in asked]
    prompts[0] = "".join(f" {holds[slot]}" for slot in SLOTS) + prompts[0]
    completions = [f" {answers[slot][0]}" for slot in asked]
    return {"prompt": prompts, "completion": completions, "kind": [answers[slot][1] for slot in asked]}


def write_lists(path, count, lengths, seed):
    """Write `count` documents, of chains of each of these lengths in turn, unless they are there."""
    if path.exists():
        return
    chance = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    with open(unfinished, "w", encoding="utf-8") as file:
        for i in range(count):
            file.write(json.dumps(list_document(chance, lengths[i % len(lengths)])) + "\n")
    unfinished.replace(path)


def list_tokenizer():
    """One token per byte, and one for each name of a slot and each value with the space before it."""
    spec = convert.byte_tokenizer().spec
    for character in SLOTS + VALUES:
        spec["model"]["vocab"][f"Ġ{character}"] = 257 + len(spec["model"]["merges"])
        spec["model"]["merges"].append(["Ġ", character])
    return convert.Tokenizer(spec)


def write_untrained(directory, context, seed):
    """Write a model of GPT-2's shape, small, with random weights scaled by the width of what they read."""
    torch.manual_seed(convert.valid_seed(seed))
    tokenizer = list_tokenizer()
    gpt2 = dict(model_type="gpt2", architectures=["GPT2LMHeadModel"], layer_norm_epsilon=1e-5)
    gpt2.update(vocab_size=tokenizer.n_vocab, n_positions=context, n_layer=4, n_embd=64, n_head=2, n_inner=128)
    _, values = convert.read_family(gpt2, directory)
    model = LoopUS(Config(**values))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(p)
        elif name.startswith(("wte", "wpe")):
            torch.nn.init.normal_(p, std=0.5)
        elif p.dim() > 1:
            into_stream = name.endswith(("out.weight", "down.weight"))
            torch.nn.init.normal_(p, std=(0.3 if into_stream else 1.0) * p.size(1) ** -0.5)
    model.reset_new_parameters()
    convert.save(model, tokenizer, directory, "hf")


def list_trainings(out, given):
    """Write the documents and the untrained model to `out`, unless they are there. → the Settings of three trainings,
    with the flags that were `given`: the base on short chains; the loop, made of it, on long ones; and the unlooped
    control on the same ones, for as many steps."""
    context = len(SLOTS) + 2 * QUESTIONS + 1  # one document and its end
    short, long, held_out = (out / f"{name}.jsonl" for name in ("short", "long", "held_out"))
    write_lists(short, 20_000, [1, 2], 1)
    write_lists(long, 40_000, [3, 4, 8], 2)
    write_lists(held_out, 300, [8], 3)
    defaults = dict(
        data=str(long), val=str(held_out), batch=64, accumulate=1, context=context, steps=600, lr=2e-3, new_lr=1.0,
        warmup=50, max_loops=8, supervised=1, through=8, trains="all", encoder_layers=1, decoder_layers=1,
        log_every=50, eval_every=10**9, eval_tokens=4096, dtype="fp32",
    )  # fmt: skip
    s = Settings(**defaults | given)
    untrained = out / "untrained"
    if not (untrained / "config.json").exists():
        write_untrained(untrained, context, s.seed)
    base = replace(s, init=str(untrained), out=str(out / "base"), data=str(short), objective="lm")
    loop = replace(s, init=str(last_checkpoint(base)), out=str(out / "loop"))
    control = replace(loop, out=str(out / "control"), objective="lm")
    return base, loop, control


def last_checkpoint(s):
    """Where a run of `s` ends."""
    return Path(s.out) / f"step-{s.steps:07d}"


def story(given):
    """Pretrain a small model on short chains, recast it, train the loop on long ones and the unlooped control, and
    compare. `given` are the flags that were set. Raises InputError if they name another text."""
    for name in ("data", "val", "objective", "context"):
        if name in given:
            raise InputError(f"--{name} without --init: name the model that is to be trained, such as --init=gpt2")
    begun = time.time()
    out = Path(given.pop("out", "out/story"))
    device, _ = convert.pick_device(given.get("device", ""), given.get("dtype", ""))
    base, loop, control = list_trainings(out, given)
    stage("1/3 pretrain a small model on chains of 1 and 2 links", base)
    stage("2/3 recast it and train the loop on chains of 3, 4 and 8 links", loop)
    stage("3/3 train the unlooped model on the same chains, for as many steps", control)
    convert.remember(last_checkpoint(loop))  # also where the loop was done before
    show_story(last_checkpoint(base), last_checkpoint(control), last_checkpoint(loop), device, Path(loop.val))
    print(f"\nThat took {(time.time() - begun) / 60:.1f} minutes. Now ask it, or watch its answer form pass by pass:")
    question = f'--prompt="{question_of(Path(loop.val), "5 links")}" --threshold=0.95'
    print(f"python sample.py --max_new_tokens=1 {question}\npython sample.py --trace {question}")


def question_of(path, kind):
    """The first question of this kind in a file of lists, after what the slots hold."""
    for _, document in convert.read_records(path):
        if kind in document["kind"]:
            question = document["prompt"][document["kind"].index(kind)]
            held = document["prompt"][0].split()[: len(SLOTS)]
            return f" {' '.join(held)} {question.split()[-1]}"
    raise InputError(f"{path} has no question of {kind}: was it written by another version? Remove it")


def show_story(base, control, loop, device, path):
    """Print the share of right answers by links: of the base, the control, and the looped model at each depth."""
    model, tokenizer = convert.load(loop, device)
    documents = read_answers(path, tokenizer, model.config.block_size)
    rows = {kind: {} for kind in sorted({answer.kind for _, answers in documents for answer in answers})}
    for name, directory in (("base", base), ("control", control)):
        unlooped, _ = convert.load(directory, device)
        for kind, columns in accuracy_by_kind(unlooped, documents, [0]).items():
            rows[kind][name] = columns[0]
    for kind, columns in accuracy_by_kind(model, documents, [1, 2, 4, 8], Halt(threshold=0.95)).items():
        rows[kind] |= columns
    print_accuracy(rows)


def stage(title, s):
    """Run `s`, or go on with it where it was broken off. Nothing is to be done where its last checkpoint is there."""
    done = last_checkpoint(s)
    if done.exists():
        before = convert.read_json(done / "settings.json") | {"resume": s.resume}
        if before != asdict(s):
            raise InputError(f"{done} was trained with other settings: name another --out")
        print(f"== {title}: done before, see {done}")
        return
    print(f"== {title}")
    train(replace(s, resume=bool(step_directories(s.out))))


# ---- The command line
def resumed(given):
    """The flags of a run that goes on: those it was started with, then the given ones. Raises InputError if a given one
    cannot change in the middle of a run."""
    for directory in step_directories(convert.expand(given.get("out", Settings.out))):
        try:
            settings = read_settings(directory)
        except (InputError, OSError):
            continue  # `load_newest` says so
        for name in FIXED:
            if name in given and given[name] != settings[name]:
                state = f"--{name}={given[name]} cannot change in a resumed run, which has {settings[name]!r}"
                raise InputError(f"{state}: leave it out, or start a new run with another --out")
        return settings | given
    return given


def join_processes():
    """Join the processes that torchrun has started. Raises InputError where its environment variables are no such, or
    where the others do not come within JOIN."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # perhaps the variables are left over, and nobody else will come
        print(f"{', '.join(LAUNCH)} are set: waiting for the other processes, {JOIN} at most", flush=True)
    place = {name: os.environ.get(name) for name in (*LAUNCH, "LOCAL_RANK")}
    try:
        if torch.cuda.is_available():
            local_rank = place["LOCAL_RANK"] or int(place["RANK"]) % torch.cuda.device_count()
            torch.cuda.set_device(int(local_rank))
        store, number, count = next(dist.rendezvous("env://", timeout=JOIN))
        store.set_timeout(FETCH)
        dist.init_process_group(store=store, rank=number, world_size=count)
    except (ValueError, RuntimeError) as e:
        stated = ", ".join(f"{name}={value}" for name, value in place.items())
        raise InputError(f"{stated} do not start processes ({e!s:.120}): use torchrun, or unset them") from None
    if rank() > 0:  # the first process speaks for all
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


LAUNCH = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torchrun sets, and leftovers of clusters seldom do
JOIN = timedelta(minutes=5)  # in which all processes must have started
FETCH = timedelta(minutes=30)  # for which they wait while the first one fetches the model; torch's default


def main():
    given = convert.parse(Settings)
    if "out" in given:
        given["out"] = str(convert.expand(given["out"]))
    if given.get("resume"):
        given = resumed(given)
    launched = set(LAUNCH) <= os.environ.keys()
    if launched and not given.get("init") and not given.get("resume"):
        problem = f"{', '.join(LAUNCH)} are set, but without --init train.py runs in one process"
        raise InputError(f"{problem}: unset them, or give --init to torchrun")
    if not given.get("init") and not given.get("resume"):
        return story(given)
    if not launched:
        return train(Settings(**given))
    join_processes()
    train(Settings(**given))
    os._exit(0)  # all is written; taking down the threads of torch.distributed sometimes ends in an abort


if __name__ == "__main__":
    convert.run(main)
