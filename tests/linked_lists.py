"""
Which choices make passes count? The linked lists of `python train.py`, once for each choice and seed.

    python tests/linked_lists.py --out=out/evidence --seeds=1,2,3    25 minutes of a core per seed; resumes

Printed are tables of the share of right answers, mean ± standard deviation over the seeds, each a mean over the links
of the chains asked for. Training sees chains of up to 8 links and up to 8 passes.
"""

import sys
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).parent.parent))

import convert  # noqa: E402
import train  # noqa: E402
from eval import accuracy_by_kind, read_answers  # noqa: E402
from loopus import Halt  # noqa: E402

DEPTHS = (1, 2, 4, 8, 12, 16)
HALTS = [Halt(threshold=threshold) for threshold in (0.5, 0.6, 0.8, 0.9, 0.95, 0.98)]
HALTS += [Halt("cdf", threshold) for threshold in (0.6, 0.9, 0.95, 0.98)]
HALTS += [Halt("convergence", epsilon=epsilon) for epsilon in (3.0, 4.0, 5.0, 6.0)]
SHOWN = Halt(threshold=0.95)


def choices(out, seed):
    """{name: Settings} of all trainings of a seed, the base first."""
    base, loop, _ = train.list_trainings(out, {"seed": seed})
    control = replace(loop, objective="lm")
    same_operations = loop.steps * operations(loop) / operations(control)
    rows = {
        "base": base,
        "control, as many steps": control,
        "control, as many operations": replace(control, steps=round(same_operations)),
        "span 1 (the paper's)": replace(loop, through=1),
        "span 2 (its authors' code)": replace(loop, through=2),
        "span 4": replace(loop, through=4),
        "span 8: all passes": loop,
        "span 8, --gate_start=s4d": replace(loop, gate_start="s4d"),
        "span 8, --confidence=sequence": replace(loop, confidence="sequence"),
    }
    for i, name in enumerate(rows):
        if name != "base":
            rows[name] = replace(rows[name], out=str(out / f"choice-{i}"))
    return rows


def operations(s):
    """Floating-point operations of a step, the mean over the depths that can be drawn."""
    model, _ = convert.load(Path(s.out).parent / "untrained", encoder_layers=1, decoder_layers=1)
    return mean(train.step_flops(model, s, [b]) for b in range(s.max_loops))


def documents_of(out, links, tokenizer):
    """300 documents, all of whose chains have `links` links, as `read_answers` gives them."""
    path = out / f"links-{links}.jsonl"
    train.write_lists(path, 300, [links], 100 + links)
    return read_answers(path, tokenizer, 1000)


def share_right(model, documents, depths, halt=None, max_loops=8):
    """{column: mean over the links of `accuracy_by_kind`}"""
    by_links = accuracy_by_kind(model, documents, depths, halt, max_loops).values()
    columns = {}
    for name in next(iter(by_links)):
        columns[name] = mean(row[name] for row in by_links)
    return columns


def print_row(name, by_seed, names):
    """One line: mean ± standard deviation over the seeds of each column."""
    cells = []
    for column in names:
        values = [columns[column] for columns in by_seed if column in columns]
        cell = ""
        if values:
            spread = stdev(values) if len(values) > 1 else 0.0
            cell = f"{mean(values):.3f} ± {spread:.3f}"
        cells.append(f" {cell:>13} |")
    print(f"| {name:30} |" + "".join(cells), flush=True)


def print_head(title, names):
    print(f"\n{title}\n\n| {'':30} |" + "".join(f" {name:>13} |" for name in names))
    print("|---" * (1 + len(names)) + "|")


def print_choices(runs, documents):
    names = [0, *DEPTHS, "exit", "passes"]
    print_head("chains of 8 (a guess: 0.33), after each number of passes (0: unlooped), with exit at 0.95", names)
    for name in runs[0]:
        by_seed = []
        for run in runs:
            model, _ = convert.load(train.last_checkpoint(run[name]))
            if run[name].objective == "lm":
                by_seed.append(share_right(model, documents, [0]))
            else:
                by_seed.append(share_right(model, documents, DEPTHS, SHOWN))
        print_row(name, by_seed, names)


def print_halts(models, documents):
    print_head("span 8, chains of 8: rules to stop, 8 passes at most", ["exit", "passes"])
    for halt in HALTS:
        setting = f"epsilon={halt.epsilon}" if halt.rule == "convergence" else f"threshold={halt.threshold}"
        by_seed = [share_right(model, documents, [], halt) for model in models]
        print_row(f"{halt.rule}, {setting}", by_seed, ["exit", "passes"])


def print_longer(models, out, tokenizer):
    names = [*DEPTHS, "exit", "passes"]
    print_head("span 8, chains of 12 (a guess among their ends: 0.50), 16 passes at most with exit", names)
    documents = documents_of(out, 12, tokenizer)
    by_seed = [accuracy_by_kind(model, documents, DEPTHS, SHOWN, 16) for model in models]
    for kind in sorted(by_seed[0], key=lambda kind: int(kind.split()[0])):
        print_row(kind, [by_links[kind] for by_links in by_seed], names)


def main():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="out/evidence")
    parser.add_argument("--seeds", default="1,2,3")
    given = parser.parse_args()
    out = Path(given.out)
    runs = []
    for seed in given.seeds.split(","):
        runs.append(choices(out / f"seed-{seed}", int(seed)))
        for name, s in runs[-1].items():
            train.stage(f"seed {seed}, {name}", s)
    models = [convert.load(train.last_checkpoint(run["span 8: all passes"])) for run in runs]
    tokenizer = models[0][1]
    models = [model for model, _ in models]
    documents = documents_of(out, 8, tokenizer)
    print_choices(runs, documents)
    print_halts(models, documents)
    print_longer(models, out, tokenizer)


if __name__ == "__main__":
    main()
