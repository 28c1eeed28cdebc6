"""
The paper's figures of a trained model, each as a picture and with its numbers as JSON.

    python tests/figures.py --init=out/loop,out/control --out=figures    a model and, if named, its unlooped control

Drawing needs matplotlib: pip install ".[plots]".
"""

import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import convert  # noqa: E402
import eval as evaluation  # noqa: E402
from convert import flag  # noqa: E402
from loopus import RULES, Halt  # noqa: E402


@dataclass
class Settings(evaluation.Settings):
    """Draw the paper's figures of a model."""

    out: str = flag("figures", "directory to write")


def layers(s, model, tokenizer, *_):
    """Fig. 1a: how much each layer changes the state, and the cuts."""
    distances = convert.layer_distances(model, convert.sample_text(model, tokenizer)).tolist()
    lines = {}
    first = 0
    for name in ("encoder", "reasoning", "decoder"):
        stack = range(first, first + len(getattr(model, name)))
        lines[name] = (list(stack), distances[stack.start : stack.stop])
        first = stack.stop
    return lines, "layer", "1 − cos(state before, state after)"


def losses(s, model, tokenizer, sequences, documents, controls):
    """Fig. 5: the loss at each depth, with exit, and of the control."""
    by_depth = evaluation.depth_losses(model, sequences, range(s.max_loops + 1), s.batch)
    exit = evaluation.exit_stats(model, sequences, s.max_loops, s.rule(), s.batch)
    lines = {"looped": (list(by_depth), list(by_depth.values())), "exit": ([exit["mean_passes"]], [exit["loss"]])}
    for control in controls:
        loss = evaluation.depth_losses(s.load(control)[0], sequences, [0], s.batch)[0]
        lines["control, unlooped"] = ([0, s.max_loops], [loss] * 2)
    return lines, "passes (0: one ungated)", "held-out loss, nats per token"


def accuracy(s, model, tokenizer, sequences, documents, controls):
    """Fig. 5 for questions: the share of right answers at each depth, by kind."""
    depths = list(range(s.max_loops + 1))
    by_kind = evaluation.accuracy_by_kind(model, documents, depths, batch=s.batch)
    lines = {kind: (depths, list(columns.values())) for kind, columns in by_kind.items()}
    return lines, "passes (0: one ungated)", "share of right answers"


def training(s, *_):
    """Fig. 6: the held-out loss at each depth while the model was trained, from its log."""
    path = convert.resolve(s.init).parent / "log.jsonl"
    lines = defaultdict(lambda: ([], []))
    for record in convert.read_records(path) if path.exists() else []:
        for depth, loss in record.get("held_out", {}).items():
            lines[f"{depth} passes"][0].append(record["step"])
            lines[f"{depth} passes"][1].append(loss)
    return lines, "optimizer steps", "held-out loss, nats per token"


@torch.no_grad()
def states(s, model, tokenizer, sequences, *_):
    """Fig. 7: the states of a text's first 32 tokens in their first two principal components, after each pass. The very
    first token is left out: many pretrained models give it a state so long that it would be all one sees."""
    h = [model.encode(sequences[0][:1, :32].to(model.wte.weight.device))]
    for _ in range(s.max_loops):
        h.append(model.refine(h[-1]))
    h = torch.cat(h)[:, 1:].float().cpu()
    centred = h - h.mean(dim=(0, 1))
    _, _, components = torch.linalg.svd(centred.flatten(0, 1), full_matrices=False)
    points = centred @ components[:2].T  # (passes + 1, T − 1, 2)
    return {f"{b} passes": xy.T.tolist() for b, xy in enumerate(points)}, "first principal component", "second"


def passes(s, model, tokenizer, sequences, *_):
    """Fig. 18: how many tokens take how many passes, by each rule to stop."""
    lines = {}
    for rule in RULES:
        halt = Halt(rule, s.threshold, s.epsilon, s.min_loops)
        exit = evaluation.exit_stats(model, sequences, s.max_loops, halt, s.batch)
        lines[f"{rule}: loss {exit['loss']:.3f}"] = (list(range(1, s.max_loops + 1)), exit["histogram"])
    return lines, "passes taken", "tokens"


def main():
    s = Settings(**convert.parse(Settings))
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise convert.InputError('drawing needs matplotlib, which is missing: pip install ".[plots]"') from None
    s.init, *controls = s.init.split(",")
    directory = convert.resolve(s.init)
    model, tokenizer = s.load(directory)
    tokens, documents = evaluation.held_out(directory, tokenizer, model.config.block_size, s.data)
    sequences = convert.windows(tokens, min(s.context, model.config.block_size), s.tokens)
    Path(s.out).mkdir(parents=True, exist_ok=True)
    for work in (layers, losses, accuracy, training, states, passes):
        lines, xlabel, ylabel = work(s, model, tokenizer, sequences, documents, controls)
        if lines:  # without questions no accuracy, without a log no training
            figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
            axes = figure.subplots()
            for label, (x, y) in lines.items():
                axes.plot(x, y, "o" if work is states else "o-", markersize=4, label=label)
            axes.set(xlabel=xlabel, ylabel=ylabel, title=s.init)
            axes.legend(fontsize=7)
            figure.savefig(Path(s.out, f"{work.__name__}.png"))
            Path(s.out, f"{work.__name__}.json").write_text(json.dumps(lines, indent=1), encoding="utf-8")
            print(Path(s.out, f"{work.__name__}.png"))


if __name__ == "__main__":
    convert.run(main)
