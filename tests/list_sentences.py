"""
The linked lists as sentences, for a model that has learned to read: does looping pay where its layers end?

    python tests/list_sentences.py --init=smollm2 --out=out/sentences --seeds=1,2,3    resumes

A document says whom each of 24 people asks or which colour they hold, then to which colours eight of them lead. A base
learns chains of 1 and 2 people; of it come the control, unlooped, and loops, trained on chains of 2, 4 and 8 with as
many operations. Each word is to be one token, and the model to have 30 layers: SmolLM2-135M.
"""

import json
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from linked_lists import print_table  # noqa: E402
from speed import step_flops  # noqa: E402

import convert  # noqa: E402
import train  # noqa: E402
from convert import flag  # noqa: E402
from eval import accuracy_by_kind, read_answers  # noqa: E402
from loopus import Halt  # noqa: E402

PEOPLE = "Ann Bob Carl Dan Emma Frank Kate Lucy Mary Paul Sam Tom".split()
PEOPLE += "John Jack Peter Alice James David Mark Luke Jane Rose Grace Ben".split()
COLOURS = "red blue green black white brown gold silver pink gray purple yellow".split()
QUESTIONS = 8  # per document
CONTEXT = 4 * len(PEOPLE) + 4 * QUESTIONS  # tokens of a document and its end
LOOPS = {  # one change each; the first one's numbers hold for the others
    "loop": dict(encoder_layers=12, decoder_layers=11, max_loops=4, span=4),
    "few": dict(encoder_layers=10, decoder_layers=16, max_loops=8, span=8),  # 4 layers, many passes
    "most": dict(encoder_layers=4, decoder_layers=4),  # 22 layers in the loop
    "deep": dict(max_loops=8, span=8),
    "span1": dict(span=1),  # the paper's
}
DEPTHS = (1, 2, 4, 8, 16)


@dataclass
class Experiment:
    """Lists as sentences: a control, and loops of as many operations."""

    init: str = flag("", "the pretrained model")
    out: str = flag("out/sentences", "directory of all runs")
    seeds: str = flag("1,2,3", "a table is of these")
    loops: str = flag("loop", f"of {', '.join(LOOPS)}")
    lrs: str = flag("3e-4", "learning rates; of several each training takes the one that is best with seed 0")
    base_steps: int = flag(200, "steps of the base", 1)
    steps: int = flag(2000, "steps of the control after that", 1)
    batch: int = flag(64, "documents per step", 1)
    dtype: str = flag("", "as for train.py")


def document(chance, links):
    """A line of .jsonl, as `list_document` in train.py writes them: chains have `links` people, or what is left."""
    order = chance.permutation(PEOPLE).tolist()
    chains = [order[i : i + links] for i in range(0, len(order), links)]
    colours = chance.choice(COLOURS, len(chains), replace=len(chains) > len(COLOURS)).tolist()
    sentences = []
    answers = {}
    for chain, colour in zip(chains, colours):
        does = f"holds {colour}"
        for distance, person in enumerate(chain, start=1):
            sentences.append(f" {person} {does}.")
            answers[person] = (colour, f"{distance} links")
            does = f"asks {person}"
    asked = chance.permutation(PEOPLE)[:QUESTIONS].tolist()
    prompts = [f". {person}:" for person in asked]
    prompts[0] = "".join(chance.permutation(sentences)) + prompts[0].removeprefix(".")
    completions = [f" {answers[person][0]}" for person in asked]
    return {"prompt": prompts, "completion": completions, "kind": [answers[person][1] for person in asked]}


def write(path, count, lengths, seed):
    """Write `count` documents, of chains of each of these lengths in turn, and → the path."""
    chance = np.random.default_rng(seed)
    lines = [json.dumps(document(chance, lengths[i % len(lengths)])) + "\n" for i in range(count)]
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def trainings(e, seed, rates):
    """{name: Settings} of a seed, the base first; rates: {name: learning rate}"""
    out = Path(e.out)
    held_out = write(out / "links-8.jsonl", 100, [8], 2)
    common = dict(val=held_out, seed=seed, batch=e.batch, accumulate=1, context=CONTEXT, warmup=20, new_lr_factor=1.0)
    common |= dict(dtype=e.dtype, supervised=1, trains="all", eval_every=500, eval_tokens=3200, keep=1)
    first = LOOPS["loop"]
    base = train.Settings(init=e.init, data=write(out / "short.jsonl", 12_000, [1, 2], 3), objective="lm", lr=3e-4,
                          steps=e.base_steps, out=str(out / f"base-{seed}"), **common, **first)  # fmt: skip
    long = write(out / "long.jsonl", 60_000, [2, 4, 8], 1)
    control = replace(base, init=base.out, data=long, steps=e.steps)
    model, _ = convert.load(e.init, encoder_layers=12, decoder_layers=11)
    runs = {"base": base}
    for name in ["control", *e.loops.split(",")]:
        s = replace(control, lr=rates[name], out=str(out / f"{name}-{seed}-{rates[name]}"))
        if name != "control":
            s = replace(s, objective="loop", **LOOPS[name])
            convert.cut(model, s.encoder_layers, s.decoder_layers)
            of_loop = mean(step_flops(model, s, [b]) for b in range(s.max_loops))
            s = replace(s, steps=round(e.steps * step_flops(model, control, [0]) / of_loop))
        runs[name] = s
    return runs


def measure(s, path):
    """→ {kind: {column: number}} of a finished training, on the documents of a file."""
    model, tokenizer = convert.load(s.out, *convert.pick_device("", s.dtype))
    documents = read_answers(Path(path), tokenizer, 1000)
    depths, halt = ([0], None) if s.objective == "lm" else (DEPTHS, Halt(threshold=model.config.q_threshold))
    by_kind = accuracy_by_kind(model, documents, depths, halt, s.max_loops, 16)
    means = {column: mean(row[column] for row in by_kind.values()) for column in next(iter(by_kind.values()))}
    return dict(sorted(by_kind.items(), key=lambda item: int(item[0].split()[0]))) | {"mean": means}


def best_rates(e):
    """{name: learning rate}; of several the best with seed 0, by the mean over the links of its best depth."""
    rates = [float(lr) for lr in e.lrs.split(",")]
    names = ["base", "control", *e.loops.split(",")]
    if len(rates) == 1:
        return dict.fromkeys(names, rates[0])
    best = dict.fromkeys(names, (-1.0, 0.0))
    for rate in rates:
        for name, s in trainings(e, 0, dict.fromkeys(names, rate)).items():
            train.stage(f"seed 0, {name}, {rate}", s)
            means = measure(s, s.val)["mean"]
            best[name] = max(best[name], (max(means.get(depth, 0.0) for depth in (0, *DEPTHS)), rate))
    return {name: rate for name, (_, rate) in best.items()}


def main():
    e = Experiment(**convert.parse(Experiment))
    rates = best_rates(e)
    by_seed = [trainings(e, int(seed), rates) for seed in e.seeds.split(",")]
    for runs in by_seed:
        for name, s in runs.items():
            train.stage(f"seed {s.seed}, {name}: {s.steps} steps, learning rate {s.lr}", s)
    for links, count in ((8, 100), (12, 50), (16, 50)):
        path = write(Path(e.out, f"asked-{links}.jsonl"), count, [links], links)
        for name, s in by_seed[0].items():
            rows = defaultdict(list)
            for runs in by_seed:
                for kind, row in measure(runs[name], path).items():
                    rows[kind].append(row)
            title = f"{name}, {s.steps} steps, learning rate {s.lr}: chains of {links}"
            print_table(title, [0, *DEPTHS, "exit", "passes"], rows)


if __name__ == "__main__":
    convert.run(main)
