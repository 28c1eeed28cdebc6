"""
Tokens per second of a looped model. All is measured in one run on this machine, with random tokens.

    python tests/speed.py smollm2 --compile    writing: a row for 1, 2, 4 and 8 passes, and one with exit
    python tests/speed.py smollm2 --train      training: a row for each way, in a process of its own
"""

import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F

ENVIRONMENT = dict(os.environ)  # without what train.py, once imported, sets for threads that are yet to start
sys.path.insert(0, str(Path(__file__).parent.parent))

import convert  # noqa: E402
import train  # noqa: E402
from convert import flag  # noqa: E402
from loopus import Halt, deep_supervision  # noqa: E402
from sample import compile_step, record_step  # noqa: E402

WAYS = ("plain", "plain-bf16", "fp32", "bf16", "bf16-checkpointing", "bf16-compiled")


def step_flops(model, s, supervised):
    """Floating-point operations of a step, on paper (§3.2). A matrix costs 2 per weight and token forward, and 4 more
    backward; attention to T/2 tokens before, two products of 2 operations: 2 T n hd. The encoder and the passes up to
    the last supervised one run forward, and those with gradient also backward. Each supervised pass has a decoder
    forward and backward, and one forward for the loss before it. What is run again in backward does not count."""
    parts = (model.reasoning[0], model.gate, model.lm_head)
    block, gate, head = (2 * sum(p.numel() for p in part.parameters() if p.dim() > 1) for part in parts)
    block += 2 * s.context * model.config.n_head * model.config.head_dim
    tracked = {b - i for b in supervised for i in range(s.span)}
    if s.objective == "lm":
        encoders, passes, gates, decoders = 3, 3, 0, 3
    else:
        encoders = 3 if s.trains == "all" and 0 in tracked else 1
        gates = passes = max(supervised) + 1 + 2 * sum(b >= 0 for b in tracked)
        decoders = 4 * len(supervised)
    layers = encoders * model.config.encoder_layers + passes * model.config.reasoning_layers
    layers += decoders * model.config.decoder_layers
    return (layers * block + gates * gate + decoders * head) * s.accumulate * s.batch * s.context


@dataclass
class Writing:
    """Tokens per second of writing at 1, 2, 4, 8 passes and with exit. Of training: --train, and --train --help."""

    init: str = flag("", "model: directory or hub name")
    encoder_layers: int = flag(-1, "layers before the loop; -1: as the checkpoint says")
    decoder_layers: int = flag(-1, "layers after the loop; -1: as the checkpoint says")
    batch: int = flag(1, "texts at a time", 1)
    prompt: int = flag(0, "tokens of the prompt; 0: 64, or half the context", 0)
    tokens: int = flag(24, "tokens to write for each figure", 8)
    threshold: float = flag(0.6, "confidence at which a token stops in the row of exit")
    compile: bool = flag(None, "compile the step of a token; if not said: no, but a GPU records it")
    device: str = flag("", "cpu, cuda or mps")
    dtype: str = flag("fp32", "of the weights", None, ("bf16", "fp32"))


@dataclass
class Training:
    """Tokens per second of training with one supervised pass per step: mean over all depths."""

    init: str = flag("", "model: directory or hub name")
    encoder_layers: int = flag(-1, "layers before the loop; -1: as the checkpoint says")
    decoder_layers: int = flag(-1, "layers after the loop; -1: as the checkpoint says")
    train: bool = flag(True, "measure training instead of writing")
    way: str = flag("", "measure this way alone, in this process", None, WAYS)
    max_loops: int = flag(4, "B, passes unrolled per batch", 1)
    context: int = flag(256, "tokens per sequence", 1)
    batch: int = flag(2, "sequences at a time", 1)
    device: str = flag("", "cpu, cuda or mps")


def timed(device, work, *arguments):
    """→ the seconds that work(*arguments) takes, and its result."""
    begun = time.perf_counter()
    result = work(*arguments)
    getattr(torch, device.type).synchronize()  # torch.cuda's, torch.mps's, torch.cpu's
    return time.perf_counter() - begun, result


def bytes_of(layers):
    return sum(p.nbytes for p in layers.parameters())


def peak_memory(device):
    """The most memory that this process has held, in GB: of the GPU, or its resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # on a Mac bytes
    return kilobytes / (1e9 if sys.platform == "darwin" else 1e6)


def best_product(device, dtype):
    """The most floating-point operations per second that this device reaches in a product of two matrices."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(timed(device, torch.matmul, a, a)[0] for _ in range(10))


def measure_writing(s):
    """A row for each number of passes, and one with exit. floor: the time in which this machine reads the weights that
    a token needs, each pass anew; of floor: how many times as long the token takes."""
    device, dtype = convert.pick_device(s.device, s.dtype)
    model, _ = convert.load(s.init, device, dtype, s.encoder_layers, s.decoder_layers)
    if s.compile:
        compile_step(model)
    elif s.compile is None:
        record_step(model)  # on a GPU; nothing elsewhere
    block = torch.randn(2**27 if device.type == "cuda" else 2**26, device=device)
    bandwidth = block.nbytes / min(timed(device, block.sum)[0] for _ in range(10))
    product = best_product(device, dtype)
    print(f"{s}, cut {len(model.encoder)}, {len(model.reasoning)}, {len(model.decoder)}")
    print(f"{device}: memory read at {bandwidth / 1e9:.1f} GB/s, best product {product / 1e12:.3f} TFLOP/s")
    print("  passes  prefill/s  of best   token s  tokens/s  floor s  of floor")
    length = s.prompt or min(64, model.config.block_size // 2)
    prompt = torch.randint(0, model.config.vocab_size, (s.batch, length), device=device)
    for passes in (1, 2, 4, 8):
        print_writing(model, prompt, s.tokens, passes, Halt(threshold=2.0), bandwidth, product)
    print_writing(model, prompt, s.tokens, 8, Halt(threshold=s.threshold), bandwidth, product)


def print_writing(model, prompt, count, max_loops, halt, bandwidth, product):
    """A row: the shortest of three times for the prompt, for a token the lower quartile, with exit the mean."""
    batch, length = prompt.shape
    cache = model.new_cache(batch, length + count, max_loops)
    inputs = (prompt, [0] * batch, cache, max_loops, halt)
    prefill = min(timed(prompt.device, model.advance, *inputs)[0] for _ in range(3))
    write_tokens(model, prompt, cache, count, max_loops, halt)  # compiles or records all that comes up
    times, depths = zip(*write_tokens(model, prompt, cache, count, max_loops, halt))
    ends = bytes_of(model.encoder + model.decoder)
    loop = bytes_of(model.reasoning)
    weights = (ends + max_loops * loop) / model.wte.weight.element_size()
    share = f"{2 * weights * prompt.numel() / prefill / product:.1%}"
    token = sorted(times)[len(times) // 4]
    if halt.threshold <= 1:
        share = "-"  # nobody counts the passes of the prompt
        token = mean(times)
    floor = (ends + bytes_of(model.lm_head) + mean(depths) * loop) / bandwidth
    line = f"{mean(depths):8.3g} {prompt.numel() / prefill:10.0f} {share:>8} {token:9.4f}"
    print(f"{line} {batch / token:9.1f} {floor:8.4f} {token / floor:9.2f}", flush=True)


def write_tokens(model, prompt, cache, count, max_loops, halt):
    """Greedy decoding after the prompt (B, T). → (seconds, mean passes) of each token."""
    batch, length = prompt.shape
    logits, _ = model.advance(prompt, [0] * batch, cache, max_loops, halt)
    written = []
    for position in range(length, length + count):
        idx = logits.argmax(dim=-1, keepdim=True)
        seconds, (logits, depth) = timed(prompt.device, model.advance, idx, [position] * batch, cache, max_loops, halt)
        written.append((seconds, depth.float().mean().item()))
    return written


def measure_training(s):
    """A row for each way, in a process of its own: its memory is then its own, too. With s.way, its row alone."""
    if s.way:
        return print_training(s)
    print(f"{s}\nway                  s / step   tokens/s    TFLOP  peak TF/s    MFU       GB", flush=True)
    for way in WAYS:
        if subprocess.call([sys.executable, __file__, *sys.argv[1:], f"--way={way}"], env=ENVIRONMENT) != 0:
            sys.exit(1)  # it has said why


def print_training(s):
    """The row of s.way. The plain ways are `plain_backward`, in float32 or under autocast; the others train.py's."""
    dtype = "bf16" if "bf16" in s.way else "fp32"
    settings = train.Settings(
        init=s.init, data=__file__, encoder_layers=s.encoder_layers, decoder_layers=s.decoder_layers, batch=s.batch,
        accumulate=1, context=s.context, device=s.device, dtype="fp32" if s.way.startswith("plain") else dtype,
        compile=s.way == "bf16-compiled", checkpointing=s.way == "bf16-checkpointing",
    )  # fmt: skip
    run = train.setup(settings)
    peak = best_product(run.device, convert.DTYPES[dtype])
    times = []
    for supervised in [s.max_loops - 1, *range(s.max_loops), *range(s.max_loops)]:
        x, y = torch.randint(0, run.model.config.vocab_size, (2, s.batch, s.context), device=run.device)
        times.append(timed(run.device, train_step, run, settings, s.way, x, y, supervised)[0])
    step = mean(times[1:])  # the first one compiles
    flops = mean(step_flops(run.model, settings, [b]) for b in range(s.max_loops))
    line = f"{s.way:20} {step:8.2f} {s.batch * s.context / step:10.0f} {flops / 1e12:8.3f} {peak / 1e12:10.3f}"
    print(f"{line} {flops / step / peak:6.1%} {peak_memory(run.device):8.2f}", flush=True)


def train_step(run, settings, way, x, y, supervised):
    if way.startswith("plain"):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=way == "plain-bf16"):
            plain_backward(run.model, x, y, supervised)
    else:
        for terms in deep_supervision(run.fast, x, y, [supervised]):
            sum(terms).backward()
    train.optimizer_step(run, settings)


def plain_backward(model, x, y, supervised):
    """`deep_supervision` as one would first write it, without thought for speed or memory."""
    with torch.no_grad():
        h = model.encode(x)
        for _ in range(supervised):
            h = model.refine(h)
        lm_before = F.cross_entropy(model.decode(h).float().flatten(0, 1), y.flatten())
    torch.clear_autocast_cache()  # older torch reuses weights that were cast without gradient
    h = model.refine(h)
    logits = model.decode(h).float()
    lm = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    right = (logits.argmax(dim=-1) == y).float()
    q = F.binary_cross_entropy_with_logits(model.confidence(h).float(), right)
    (lm + F.silu(lm - lm_before) + q).backward()


def main():
    if "--train" not in sys.argv:
        return measure_writing(Writing(**convert.parse(Writing, "init")))
    measure_training(Training(**convert.parse(Training, "init")))


if __name__ == "__main__":
    convert.run(main)
