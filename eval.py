"""
Measure a model on held-out text: the loss in nats per token at every depth and with exit, and its confidence.

    python eval.py                                the model train.py wrote last, on the text its training held out
    python eval.py --init=gpt2 --data=book.txt    any model, any text
    python eval.py --task=speed gpt2              tokens per second; with --train, of training
"""

import json
import math
import runpy
import sys
from dataclasses import dataclass

import numpy as np
import torch

import convert
from convert import flag
from loopus import Halt, InputError, early_exit


@dataclass
class Settings(convert.Inference):
    """Held-out loss of a looped model at each depth up to max_loops, and with exit."""

    data: str = flag("", "held-out text: file, directory, glob or .bin; empty: what the model's training held out")
    context: int = flag(256, "tokens per sequence", 1)
    batch: int = flag(8, "sequences at a time", 1)
    tokens: int = flag(32768, "held-out tokens to read, spread evenly over the text", 1)
    json: bool = flag(False, "print one JSON object instead of the tables")


def windows(tokens, context, limit):
    """At most `limit` tokens as evenly spread, non-overlapping sequences: inputs and next tokens, (n, context) each."""
    count = (len(tokens) - 1) // context
    if count < 1:
        raise InputError(f"{len(tokens)} tokens of text do not fill one context of {context}: give more text")
    starts = np.linspace(0, count - 1, max(1, min(count, limit // context))).astype(int) * context
    return convert.rows(tokens, starts, context)


@torch.no_grad()
def depth_losses(model, sequences, depths, batch):
    """{passes: mean loss in nats} over sequences of `windows`, for each of `depths`; 0 is the ungated pass."""
    sums, count = dict.fromkeys(depths, 0.0), (sequences[1] >= 0).sum().item()
    for x, y in zip(*(part.to(model.wte.weight.device).split(batch) for part in sequences)):
        h = model.encode(x)
        for b in range(max(depths) + 1):
            h = model.refine(h) if b > 0 else h
            if b in sums:
                sums[b] += model.loss(h if b > 0 else model.propose(h), y)[0].item() * (y >= 0).sum().item()
    return {depth: total / count for depth, total in sums.items()}


@torch.no_grad()
def exit_stats(model, sequences, max_loops, halt, batch):
    """With confidence exit: mean loss, mean passes, histogram of tokens by their passes 1 … max_loops, and the ECE: how
    far, in ten bins, confidence and the share of tokens whose likeliest next one was right are apart on average."""
    loss, passes, gaps, count = 0.0, [], torch.zeros(10), (sequences[1] >= 0).sum().item()
    for x, y in zip(*(part.to(model.wte.weight.device).split(batch) for part in sequences)):
        h, taken = early_exit(model, x, max_loops, halt)
        (mean, right), counts = model.loss(h, y), y >= 0
        loss += mean.item() * counts.sum().item() / count
        passes.append(taken[counts].cpu())
        confidence = torch.sigmoid(model.confidence(h).float())[counts]
        gaps.index_add_(0, (confidence * 10).long().clamp(max=9).cpu(), (confidence - right[counts].float()).cpu())
    histogram = torch.bincount(torch.cat(passes), minlength=max_loops + 1)[1:].tolist()
    mean_passes, ece = torch.cat(passes).float().mean().item(), gaps.abs().sum().item() / count
    return dict(loss=loss, mean_passes=mean_passes, histogram=histogram, ece=ece)


def main():
    if "--task=speed" in sys.argv:  # the benchmark lies beside the tests, and has flags of its own: --task=speed --help
        sys.argv.remove("--task=speed")
        return runpy.run_path(__file__.replace("eval.py", "tests/benchmark_speed.py"))["main"]()
    s = Settings(**convert.parse(Settings))
    device, dtype = convert.pick_device(s.device, s.dtype)
    directory = convert.resolve(s.init)
    model, tokenizer = convert.load(directory, device, dtype)
    if s.data:
        tokens = convert.load_tokens(convert.find_files(s.data), tokenizer)
    elif not (directory / "settings.json").exists():
        raise InputError(f"{directory} does not say what text it was trained on: give --data")
    else:
        trained = json.loads((directory / "settings.json").read_text())
        tokens = convert.load_data(trained["data"], trained["val"], tokenizer)[1]
    context = min(s.context, model.config.block_size)
    sequences = windows(tokens, context, s.tokens)
    lengths = [len(tokenizer.bytes_of[i]) for i in sequences[1].flatten().tolist() if i >= 0]
    count, bits_per_byte = len(lengths), len(lengths) / sum(lengths) / math.log(2)
    losses = depth_losses(model, sequences, range(s.max_loops + 1), s.batch)
    halt = Halt(s.halt, s.threshold, s.epsilon, s.min_loops)
    exit = exit_stats(model, sequences, s.max_loops, halt, s.batch)
    rows = *((depth, depth, loss) for depth, loss in losses.items()), ("exit", exit["mean_passes"], exit["loss"])
    names = "passes", "mean_passes", "loss", "perplexity", "bits_per_byte"
    rows = [dict(zip(names, (*row, math.exp(row[-1]), row[-1] * bits_per_byte))) for row in rows]
    if s.json:
        print(json.dumps(dict(init=str(directory), tokens=count, depths=rows, **halt._asdict(), exit=exit)))
        return
    print(f"{directory}: {count:,} held-out tokens in sequences of {context}; 0 passes: one ungated, as the base runs")
    print(f"{'passes':>8} {'mean':>6} {'loss':>8} {'perplexity':>11} {'bits/byte':>10}")
    for r in rows:
        print("{passes:>8} {mean_passes:6.2f} {loss:8.4f} {perplexity:11.3f} {bits_per_byte:10.4f}".format(**r))
    print("\npasses taken with exit, " + ", ".join(f"{k} {v}" for k, v in halt._asdict().items()))
    for b, n in enumerate(exit["histogram"], start=1):
        print(f"{b:>8} {'█' * round(40 * n / count):40} {n / count:6.1%}")
    print(f"\nconfidence is {exit['ece']:.3f} from how often the likeliest token was right, on average (the ECE)")


if __name__ == "__main__":
    convert.run(main)
