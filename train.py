"""
Turn a pretrained model into a looped one by random deep supervision (paper §3.2), or train it unlooped, as the control.

    python train.py                                   the whole story in minutes, on any machine, without network
    python train.py --init=gpt2 --data=book.txt       a real model on real text
    torchrun --nproc_per_node=8 train.py --init=…     the same run, shared by 8 devices
"""

import copy
import json
import math
import os
import random
import shutil
import signal
import sys
import time
import warnings
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path

if "OMP_WAIT_POLICY" not in os.environ:
    # Waiting threads spin: beside another busy process a small model trains at a third of its speed. With this many
    # turns it keeps half of it, and nine tenths where it is alone. To be said before torch starts them.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import distribute_tensor
from torch.utils.checkpoint import checkpoint

import convert
from convert import flag, refuse
from eval import DEPTHS, accuracy_by_kind, held_out_losses, print_accuracy, read_answers, summary
from loopus import Config, Halt, LoopUS, deep_supervision, sequence_confidence_loss, token_confidence_loss

RECIPES = {
    "paper": {},
    "short": dict(steps=120, accumulate=1, context=256, max_loops=6, supervised=2, warmup=20, eval_tokens=2048),
}
CONFIDENCE_LOSSES = {"token": token_confidence_loss, "sequence": sequence_confidence_loss}


@dataclass
class Settings:
    """Train a looped model, or with --objective=lm the unlooped one. Defaults are the paper's constants (App. A)."""

    recipe: str = flag("", "paper: as below; short: minutes on a laptop; empty: short on a CPU", None, RECIPES)
    init: str = flag("", "model to start from: hub name or directory; empty: the whole story from nothing, see above")
    data: str = flag("python", "text, .jsonl, .bin, … , a directory, a glob; python: its standard library's source")
    val: str = flag("", "held-out text; empty: every 20th file of --data or, of fewer, the last 20th of the text")
    out: str = flag("out/loop", "directory of the run: checkpoints and log.jsonl")
    resume: bool = flag(False, "go on from the newest checkpoint in --out, with the settings it was started with")
    objective: str = flag("loop", "or lm: train the model unlooped, as the control", None, ("loop", "lm"))
    max_loops: int = flag(20, "B, passes unrolled per batch (paper: 20)", 1)
    supervised: int = flag(5, "K, passes supervised among them (paper: 5)", 1)
    span: int = flag(1, "passes that a gradient crosses (paper: 1; its authors' code: 2)", 1)
    confidence: str = flag("token", "q's target: per token, or sequence: Eq. 13", None, CONFIDENCE_LOSSES)
    trains: str = flag("middle", "all but embedding and encoder (paper), or all", None, ("middle", "all"))
    encoder_layers: int = flag(-1, "layers before the loop; -1: as it is cut, by the paper, or by its layer profile")
    decoder_layers: int = flag(-1, "layers after the loop; -1: likewise")
    gate_start: str = flag("", "start the gate anew: at α = 0.5, or s4d (the authors')", None, ("0.5", "s4d"))
    steps: int = flag(22888, "optimizer steps (paper: 3B tokens)", 1)
    batch: int = flag(2, "sequences per micro-batch (paper: 2)", 1)
    accumulate: int = flag(64, "micro-batches per optimizer step, over all processes (paper: 64)", 1)
    context: int = flag(1024, "tokens per sequence (paper: 1024)", 1)
    lr: float = flag(5e-5, "peak learning rate, cosine decay (paper: 5e-5)", 0)
    new_lr_factor: float = flag(10.0, "the gate and the confidence head learn at this many times --lr", 0)
    warmup: int = flag(300, "steps until the peak learning rate (paper: 300), at most a tenth of --steps", 0)
    seed: int = flag(2026, "of the data order and the passes drawn (paper: 2026)", 0)
    log_every: int = flag(10, "steps between log lines", 1)
    eval_every: int = flag(500, "steps between held-out losses and checkpoints", 1)
    eval_tokens: int = flag(16384, "held-out tokens per evaluation", 1)
    keep: int = flag(2, "checkpoints kept; older ones are deleted, with whatever else they hold", 1)
    device: str = flag("", "cpu, cuda or mps; empty: the best there is")
    dtype: str = flag("", "to compute in; empty: bf16 where the device is good at it", None, convert.DTYPES)
    compile: bool = flag(False, "compile the layers with torch.compile")
    checkpointing: bool = flag(False, "keep one state per layer, run the layer again in backward: less memory")
    shard: bool = flag(False, "with torchrun: each process holds a share of weights, gradients and moments (FSDP)")


FIXED = ("recipe", "init", "data", "objective", "trains", "encoder_layers", "decoder_layers", "gate_start")  # resuming
THRESHOLDS = (0.5, 0.6, 0.8, 0.9, 0.95, 0.99, 2.0)  # of confidence, tried at the end of training


# ---- What a step reads, and at what rate it learns
@lru_cache(maxsize=2)
def window_order(count, seed, epoch):
    """The order in which an epoch reads the `count` windows of the text."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def micro_batch(tokens, s, i):
    """Micro-batch number i of the run: inputs and next tokens, (batch, context) each. The text is cut into windows;
    each epoch reads every one once, in a new order, so that what is read depends on the seed and on i alone."""
    count = (len(tokens) - 1) // s.context
    starts = []
    for n in range(i * s.batch, (i + 1) * s.batch):
        epoch, place = divmod(n, count)
        starts.append(window_order(count, s.seed, epoch)[place] * s.context)
    return convert.rows(tokens, starts, s.context)


def learning_rate(s, step):
    """Linear warm-up to s.lr, then a cosine down to a tenth of it."""
    warmup = min(s.warmup, s.steps // 10)
    if step < warmup:
        return s.lr * (step + 1) / warmup
    progress = (step - warmup) / (s.steps - warmup)
    return s.lr * (0.55 + 0.45 * math.cos(math.pi * progress))


# ---- The model in training
def make_optimizer(model, s):
    """AdamW over what trains, with weight decay on matrices: for the loop, unless --trains=all, over what comes after
    h⁰; for lm over all but what is new, the gate and the confidence head."""
    groups = {}
    for name, p in model.named_parameters():
        new = name.startswith(("gate.", "q_head."))
        p.requires_grad_(s.trains == "all" or not name.startswith(("wte.", "wpe.", "encoder.")))
        if s.objective == "lm":
            p.requires_grad_(not new)
        if p.requires_grad:
            matrix = p.dim() > 1
            group = {"params": [], "weight_decay": 0.1 * matrix, "new": new}
            groups.setdefault((new, matrix), group)["params"].append(p)
    return torch.optim.AdamW(list(groups.values()), lr=s.lr, betas=(0.9, 0.95), fused=True)


def move_gradient(weight, copied):
    """Add the gradient of a parameter's copy to that of the float32 weight."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    weight.grad += copied.grad
    copied.grad = None


def computing_copy(model, dtype):
    """The model in `dtype`, to compute with: its gradients go to the float32 weights as soon as they are made."""
    fast = copy.deepcopy(model).to(dtype)
    for weight, copied in zip(model.parameters(), fast.parameters()):
        if copied.requires_grad:
            copied.register_post_accumulate_grad_hook(partial(move_gradient, weight))
    return fast


def shard(model, device, dtype):
    """Spread each part over the processes (FSDP2): it is put together, in `dtype`, while it runs; float32 gradients go
    to their shares with each backward, so that no process holds them all. Inputs, such as angles, stay as they are."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # of writing into the output of a part: nobody does
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = dist.init_device_mesh(device.type, (world_size(),))
    for part in [*model.children(), *model.layers(), model]:
        if not isinstance(part, torch.nn.ModuleList):
            fully_shard(part, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "encode")


def whole(tensors):
    """{name: tensor} put together from all processes, on the CPU of the first one; empty elsewhere."""
    kept = {}
    for name, x in tensors.items():
        if hasattr(x, "full_tensor"):
            x = x.full_tensor().cpu()
        if rank() == 0:
            kept[name] = x
    return kept


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def summed(x):
    """The sum of x, a number or a tensor, over all processes; of a tensor in place."""
    x = torch.as_tensor(x)
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


@contextmanager
def first_process_first():
    """The first process runs the block alone, the others after it: they find what it has downloaded or tokenised."""
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and world_size() > 1:
        dist.barrier()


# ---- A run: setting it up, saving it, going on with it
@dataclass
class Run:
    model: LoopUS  # float32 weights
    fast: LoopUS  # what computes: the model itself, or its copy in bf16
    optimizer: torch.optim.AdamW
    tokenizer: object
    device: torch.device
    dtype: torch.dtype  # of the passes
    sharded: bool
    files: list  # of --data, when the run was started
    step: int = 0  # steps that are done
    busy: bool = False  # with a step, or with saving: a signal must wait
    signals: int = 0  # that wait


def checkpoints(out):
    """The directories of a run's checkpoints, the newest last."""
    return sorted(Path(out).glob(convert.STEP))


def setup(s):
    """→ the Run, new or resumed."""
    device, dtype = convert.pick_device(s.device, s.dtype)
    torch.manual_seed(s.seed)
    sharded = s.shard and world_size() > 1
    src = checkpoints(s.out)[-1] if s.resume else s.init
    place = "cpu" if sharded else device
    with first_process_first():
        model, tokenizer = convert.load(src, place, torch.float32, s.encoder_layers, s.decoder_layers)
    if s.gate_start and not s.resume:  # also where the checkpoint has a gate, such as one that was trained unlooped
        model.gate.reset_parameters(s.gate_start)
    if sharded:
        shard(model, device, dtype)
    optimizer = make_optimizer(model, s)
    fast = model if sharded or dtype == torch.float32 else computing_copy(model, dtype)
    for block in fast.layers():
        if s.compile:
            block.forward = torch.compile(block.forward)
        if s.checkpointing:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    run = Run(model, fast, optimizer, tokenizer, device, dtype, sharded, [])
    if s.resume:
        restore(run, s, src)
    else:
        run.files = [str(file.resolve()) for file in convert.find_files(s.data)]
    return run


def restore(run, s, directory):
    """Put the optimizer, the number of steps and the files where a checkpoint left them. Rates are those of s."""
    with convert.reading(f"{directory / 'optimizer.pt'} (without {directory.name}, --resume takes the one before)"):
        saved = torch.load(directory / "optimizer.pt", map_location="cpu")
        state = saved["optimizer"]["state"]
        if run.sharded:
            params = [p for group in run.optimizer.param_groups for p in group["params"]]
            for i, moments in state.items():
                for name in ("exp_avg", "exp_avg_sq"):
                    moments[name] = distribute_tensor(moments[name], params[i].device_mesh, params[i].placements)
        run.optimizer.load_state_dict(run.optimizer.state_dict() | {"state": state})
        run.step = saved["step"]
        run.files = list(map(str, convert.read_json(directory / "settings.json")["files"]))
    refuse(run.step > s.steps, f"{s.out} is at step {run.step}, beyond --steps={s.steps}: nothing is left to resume")


def save_checkpoint(run, s):
    """Write the run as it stands to s.out/step-…, and remove the checkpoints before the newest s.keep."""
    weights = whole(run.model.state_dict())
    optimizer = run.optimizer.state_dict()
    optimizer["state"] = {i: whole(moments) for i, moments in optimizer["state"].items()}
    if rank() > 0:
        return
    with convert.all_or_nothing(Path(s.out, f"step-{run.step:07d}")) as unfinished:
        convert.write_checkpoint(run.model, run.tokenizer, unfinished, weights=weights)
        (unfinished / "settings.json").write_text(json.dumps(asdict(s) | {"files": run.files}, indent=2))
        torch.save({"step": run.step, "optimizer": optimizer}, unfinished / "optimizer.pt")
    crashed = Path(s.out).glob(f"{convert.STEP}.new-{'[0-9a-f]' * 8}")  # while saving
    for directory in [*checkpoints(s.out)[: -s.keep], *crashed]:
        shutil.rmtree(directory, ignore_errors=True)  # a link stays


# ---- One step
def supervised_losses(run, s, x, y, supervised):
    """The loss terms of a micro-batch: of each supervised pass in turn, or the one of the unlooped model."""
    model = run.fast
    if s.objective == "loop":
        yield from deep_supervision(model, x, y, supervised, s.span, CONFIDENCE_LOSSES[s.confidence])
    else:
        lm, _ = model.loss(model.propose(model.encode(x)), y)
        yield (lm,)


def train_step(run, s, tokens):
    """Step run.step: gradients of all its micro-batches, and the optimizer's step. Each micro-batch counts by its share
    of the step's learned tokens, so that L_LM is their mean, in whatever micro-batch or process they are. → the mean
    loss terms, and the norm of the gradient. KeyboardInterrupt: a signal came, and no weight has changed."""
    own = range(rank(), s.accumulate, world_size())
    batches = [micro_batch(tokens, s, run.step * s.accumulate + i) for i in own]
    learned = summed(sum((y >= 0).sum() for _, y in batches)).item()
    # K of the B passes, the same for all micro-batches, so that processes keep pace
    supervised = random.Random(f"depths {s.seed} {run.step}").sample(range(s.max_loops), s.supervised)
    count = s.supervised if s.objective == "loop" else 1
    scale = world_size() if run.sharded else 1  # FSDP takes the mean over the processes
    means = 0
    for x, y in convert.progress(batches, f"step {run.step + 1}", len(batches)):
        if summed(run.signals):
            raise KeyboardInterrupt
        weight = (y >= 0).sum().item() / max(1, learned) / count
        if weight == 0:
            y = y.clamp(min=0)  # the loss must only be finite
        for terms in supervised_losses(run, s, x.to(run.device), y.to(run.device), supervised):
            (sum(terms) * weight * scale).backward()
            means += torch.stack(terms).detach() * weight
    return summed(means).tolist(), optimizer_step(run, s)


def optimizer_step(run, s):
    """Take the optimizer's step; where the gradient is not finite, leave it out. → the gradient's norm."""
    if not run.sharded:
        for p in run.model.parameters():
            if p.grad is not None:
                summed(p.grad)
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    norm = (norm.full_tensor() if run.sharded else norm).item()
    if math.isfinite(norm):
        rate = learning_rate(s, run.step)
        for group in run.optimizer.param_groups:
            group["lr"] = rate * s.new_lr_factor if group["new"] else rate
        run.optimizer.step()
        if run.fast is not run.model:
            run.fast.load_state_dict(run.model.state_dict())
    run.optimizer.zero_grad()
    return norm


# ---- The log
def rounded(x):
    """x to seven digits; None where it is not finite: JSON has no word for that."""
    return float(f"{x:.7g}") if math.isfinite(x) else None


def write_log(run, s, **values):
    """A line on standard output, and the same in log.jsonl in s.out. Only the first process writes."""
    record = {"step": run.step, **values}
    print("  ".join(f"{name} {value}" for name, value in record.items()), flush=True)
    if rank() == 0:
        with open(Path(s.out, "log.jsonl"), "a") as file:
            file.write(json.dumps(record) + "\n")


def evaluate(run, s, held_out):
    """Write the held-out loss at each depth to the log, and → it."""
    depths = [0]
    if s.objective == "loop":
        depths += [b for b in DEPTHS if b < s.max_loops] + [s.max_loops]
    losses, _ = held_out_losses(run.fast, held_out, s.batch, depths)
    write_log(run, s, held_out={depth: rounded(loss) for depth, loss in losses.items()})
    return losses


def conclude(run, s, held_out):
    """After the last step: say what came of the loop, and write into its checkpoint the lowest of THRESHOLDS whose loss
    with exit is within 1 % of the best depth's: with the last one, no token stops."""
    losses = evaluate(run, s, held_out)
    if s.objective == "lm":
        return
    _, *looped = losses.values()
    for threshold in THRESHOLDS:
        exit, histogram = held_out_losses(run.fast, held_out, s.batch, [], Halt(threshold=threshold), s.max_loops)
        if summed(int(exit["exit"] <= 1.01 * min(looped))):  # all processes alike
            break
    run.model.config.q_threshold = threshold
    save_checkpoint(run, s)
    if rank() > 0:
        return
    path = Path(s.out, "log.jsonl")
    with convert.reading(path):
        logged = {record["step"]: record for record in convert.read_records(path) if "held_out" in record}
    print("\nheld-out loss at passes (0: unlooped)" + "".join(f"{depth:>11}" for depth in losses))
    for step in sorted({0, run.step} & logged.keys()):
        row = "".join(f"{logged[step]['held_out'].get(str(depth))!s:>11}" for depth in losses)
        print(f"nats per token after step {step:>11}{row}")
    print(f"{summary(losses | exit, histogram)}; exit is at a confidence of {threshold}\n")


# ---- The loop
def train(s):
    """One run of `s` from s.init to a checkpoint in s.out/step-…; → the directory of that checkpoint. Raises InputError
    where settings contradict each other or what is already in s.out."""
    refuse(s.supervised > s.max_loops, f"--supervised={s.supervised} of --max_loops={s.max_loops}: expected K, 1 to B")
    refuse(s.accumulate % world_size(), f"--accumulate={s.accumulate} cannot be shared by {world_size()} processes")
    refuse(Path(s.out, "config.json").exists(), f"--out={s.out} holds a model: name a directory for the run")
    for directory in checkpoints(s.out)[-1:]:
        refuse(not s.resume, f"{s.out} holds a run, at {directory.name}: --resume it, or name another --out")
    Path(s.out).mkdir(parents=True, exist_ok=True)
    run = setup(s)
    with first_process_first():
        tokens, held_out = convert.load_data(run.files, s.val, run.tokenizer)
    refuse(len(tokens) <= s.context, f"--data: {len(tokens)} tokens do not fill a context of {s.context}: give more")
    held_out = convert.windows(held_out, s.context, s.eval_tokens)
    c = run.model.config
    layers = f"{c.encoder_layers} + {c.reasoning_layers} + {c.decoder_layers} layers, {len(tokens):,} tokens"
    print(f"{s.objective}: {layers}, {world_size()} × {run.device}, {run.dtype}, to {s.out}", flush=True)
    take_all_steps(run, s, tokens, held_out)
    directory = checkpoints(s.out)[-1]
    print(f"written to {directory}", flush=True)
    return directory


def take_all_steps(run, s, tokens, held_out):
    """Take the steps that are left. A signal ends the program: what is done is saved, and a line says how to go on."""

    def note(*_):
        if not run.busy:
            raise KeyboardInterrupt
        run.signals += 1
        with suppress(OSError):  # where nobody reads it any more
            os.write(2, b"\nstopping after this micro-batch or step; what is done is saved\n")

    signal.signal(signal.SIGINT, note)
    signal.signal(signal.SIGTERM, note)
    try:
        while run.step < s.steps:
            if run.step % s.eval_every == 0:
                evaluate(run, s, held_out)
            run.busy = True
            begun = time.time()
            terms, norm = train_step(run, s, tokens)
            run.step += 1
            if run.step % s.log_every == 0 or run.step in (1, s.steps) or not math.isfinite(norm):
                seconds = time.time() - begun + 1e-9  # some clocks stand still for so long
                terms = dict(zip(("lm", "mono", "q"), map(rounded, terms)), grad_norm=rounded(norm))
                speed = round(s.accumulate * s.batch * s.context / seconds)
                write_log(run, s, **terms, tokens_per_second=speed, seconds_left=round(seconds * (s.steps - run.step)))
            if run.step % s.eval_every == 0 or run.step == s.steps:
                save_checkpoint(run, s)
            run.busy = False
            if summed(run.signals):
                raise KeyboardInterrupt
        conclude(run, s, held_out)
    except (KeyboardInterrupt, BrokenPipeError):
        run.busy = True
        going_on = "nothing is saved yet"
        if run.step > 0:
            save_checkpoint(run, s)
            going_on = f"--resume --out={s.out} goes on"
        print(f"stopped by a signal after step {run.step}; {going_on}", file=sys.stderr)
        os._exit(1)


# ---- The whole story, without --init: linked lists
SLOTS = list("abcdefghijklmnopqrstuvwx")
VALUES = list("0123456789ABCDEF")
QUESTIONS = 12  # per document
CONTEXT = len(SLOTS) + 2 * QUESTIONS + 1  # one document and its end


def list_document(chance, links):
    """A line of .jsonl. Its text says what each slot a, b, c … holds: the name of another slot or, where a chain ends,
    a value; then come questions: a slot, and the value at the end of its chain. All chains have `links` slots. A link
    is a step of attention that needs the one before: width buys no depth, and there is nothing to memorise."""
    chains = chance.permutation(SLOTS).reshape(-1, links)
    values = chance.choice(VALUES, len(chains), replace=len(chains) > len(VALUES))
    holds = {}
    answers = {}
    for chain, value in zip(chains, values):
        holds |= zip(chain, [value, *chain])  # the first slot the value, each other one the slot before it
        for distance, slot in enumerate(chain, start=1):
            answers[slot] = (f" {value}", f"{distance} links")
    asked = chance.permutation(SLOTS)[:QUESTIONS]
    prompts = [f" {slot}" for slot in asked]
    prompts[0] = "".join(f" {holds[slot]}" for slot in SLOTS) + prompts[0]
    completions, kinds = zip(*map(answers.get, asked))
    return {"prompt": prompts, "completion": completions, "kind": kinds}


def write_lists(path, count, lengths, seed):
    """Write `count` documents, of chains of each of these lengths in turn."""
    chance = np.random.default_rng(seed)
    lines = [json.dumps(list_document(chance, links)) + "\n" for links in np.resize(lengths, count)]
    path.write_text("".join(lines))


def list_tokenizer():
    """One token per byte, and one for each name of a slot and each value with the space before it."""
    spec = convert.byte_tokenizer().spec
    for i, character in enumerate(SLOTS + VALUES, start=257):
        spec["model"]["vocab"][f"Ġ{character}"] = i
        spec["model"]["merges"].append(["Ġ", character])
    return convert.Tokenizer(spec)


def write_untrained(directory, seed):
    """Write a model of GPT-2's shape, small, with random weights scaled by the width of what they read."""
    torch.manual_seed(seed)
    tokenizer = list_tokenizer()
    shape = dict(n_layer=4, n_embd=64, n_head=2, n_inner=128, layer_norm_epsilon=1e-5)
    shape |= dict(model_type="gpt2", vocab_size=tokenizer.n_vocab, n_positions=CONTEXT)
    _, values = convert.read_family(shape)
    model = LoopUS(Config(**values))
    for name, p in model.named_parameters():
        std = p.size(-1) ** -0.5
        if name in ("wte.weight", "wpe.weight"):
            std = 0.5
        elif name.endswith(("out.weight", "down.weight")):  # into the stream of states
            std *= 0.3
        if p.dim() > 1:
            p.data.normal_(std=std)
        elif name.endswith("bias"):
            p.data.zero_()
    convert.save(model, tokenizer, directory, "hf")


def list_trainings(out, given):
    """Write the documents and the untrained model to `out`, unless they are there. → the Settings of three trainings
    with the flags `given`: the base, on short chains; from it, on long ones, the unlooped control and the loop."""
    defaults = dict(
        data=f"{out}/long.jsonl", val=f"{out}/held_out.jsonl", batch=64, accumulate=1, context=CONTEXT, steps=600,
        lr=2e-3, new_lr_factor=1.0, warmup=50, max_loops=8, supervised=1, span=8, trains="all", encoder_layers=1,
        decoder_layers=1, log_every=50, eval_every=10**9, eval_tokens=4096, dtype="fp32",
    )  # fmt: skip
    s = Settings(**defaults | given)
    if not (out / "untrained").exists():
        with convert.all_or_nothing(out) as unfinished:
            write_lists(unfinished / "short.jsonl", 20_000, [1, 2], 1)
            write_lists(unfinished / "long.jsonl", 40_000, [3, 4, 8], 2)
            write_lists(unfinished / "held_out.jsonl", 300, [8], 3)
            write_untrained(unfinished / "untrained", s.seed)
    base = replace(s, init=f"{out}/untrained", out=f"{out}/base", data=f"{out}/short.jsonl", objective="lm")
    loop = replace(s, init=base.out, out=f"{out}/loop")
    control = replace(loop, out=f"{out}/control", objective="lm")
    return base, control, loop


def story(given):
    """Pretrain a small model on short chains, train it unlooped on long ones, recast it and train the loop on the same,
    and compare. `given` are the flags that were set. Raises InputError for what the story sets itself."""
    for name in ("data", "val", "objective", "context", "recipe"):
        refuse(name in given, f"--{name} without --init: name the model that is to be trained, such as --init=gpt2")
    base, control, loop = list_trainings(Path(given.pop("out", "out/story")), given)
    stage("1/3 pretrain a small model on chains of 1 and 2 links", base)
    stage("2/3 train it unlooped on chains of 3, 4 and 8 links: the control", control)
    stage("3/3 recast it and train the loop on the same chains, for as many steps", loop)
    model, tokenizer = convert.load(loop.out)
    documents = read_answers(Path(loop.val), tokenizer, CONTEXT)
    table = accuracy_by_kind(model, documents, DEPTHS, Halt(threshold=model.config.q_threshold))
    for s in (control, base):
        unlooped, _ = convert.load(s.out)
        for kind, columns in accuracy_by_kind(unlooped, documents, [0]).items():
            table[kind] = {Path(s.out).name: columns[0]} | table[kind]
    print_accuracy(table)
    tokens, answers = documents[0]
    question = tokenizer.decode(tokens[: answers[0].start])
    print(f'\nNow watch an answer form pass by pass:\npython sample.py --trace --prompt="{question}"')


def stage(title, s):
    """Run `s`, or go on with it where it was broken off; of what is done, only the losses are measured again."""
    print(f"== {title}")
    begun = checkpoints(s.out)
    for directory in begun[-1:]:
        before = convert.read_json(directory / "settings.json")
        changed = before != before | asdict(s) | {"resume": before.get("resume")}
        refuse(changed, f"{directory} was trained with other settings: name another --out")
    train(replace(s, resume=bool(begun)))


# ---- The command line
def resumed(given):
    """The flags of a run that goes on: those it was started with, then the given ones, which must be free to change."""
    out = given.get("out", Settings.out)
    refuse(not checkpoints(out), f"--resume: {out} holds no checkpoint; start without --resume, or name another --out")
    path = checkpoints(out)[-1] / "settings.json"
    saved = convert.read_json(path)
    with convert.reading(path):
        saved.pop("files")
        types = {name: type(x) for name, x in saved.items()}
        refuse(types != Settings.__annotations__, "another version has written it, or it is damaged: train anew")
    for name in FIXED:
        changed = given.get(name, saved[name]) != saved[name]
        refuse(changed, f"--{name} cannot change in a resumed run, which has {saved[name]!r}: leave it out")
    return saved | given | {"out": out}


def main():
    given = convert.parse(Settings)
    if "out" in given:
        given["out"] = str(convert.expand(given["out"]))
    if given.get("resume"):
        given = resumed(given)
    launched = dist.is_torchelastic_launched()
    if not given.get("init"):
        refuse(launched, "without --init train.py runs in one process: leave torchrun out")
        return story(given)
    if launched:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(timeout=timedelta(hours=1))  # in which the first one downloads and tokenises
        if rank() > 0:
            sys.stdout = open(os.devnull, "w")
    device, _ = convert.pick_device(given.get("device", ""), "fp32")
    if device.type == "cpu" and "recipe" not in given:
        given["recipe"] = "short"
        print(f"--recipe=short on a CPU (--recipe=paper for the paper's constants): {RECIPES['short']}")
    s = Settings(**RECIPES[given.get("recipe") or "paper"] | given)
    directory = train(s)
    if s.objective == "loop":
        print("Whether passes pay, a control tells: these flags with --objective=lm and another --out. Go on with:")
        print(f"python sample.py --init={directory}\npython eval.py --init={directory}", flush=True)
    if launched:
        os._exit(0)  # all is written; taking down the threads of torch.distributed sometimes ends in an abort


if __name__ == "__main__":
    convert.run(main)
