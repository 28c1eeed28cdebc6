"""
Which choices make passes count? The linked lists of `python train.py`, once for each choice and seed.

    python tests/linked_lists.py --out=out/evidence --seeds=1,2,3    25 minutes of a core per seed; resumes

Shares of right answers: means over the links, ± standard deviation over the seeds; trained on up to 8 links and passes.
"""

import sys
from argparse import ArgumentParser
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).parent.parent))

from speed import step_flops  # noqa: E402

import convert  # noqa: E402
import train  # noqa: E402
from eval import accuracy_by_kind, read_answers  # noqa: E402
from loopus import Halt  # noqa: E402

DEPTHS = (1, 2, 4, 8, 12, 16)
HALTS = {f"confidence at least {share}": Halt("threshold", share) for share in (0.5, 0.6, 0.8, 0.9, 0.95, 0.98)}
HALTS |= {f"cdf at least {share}": Halt("cdf", share) for share in (0.6, 0.9, 0.95, 0.98)}
HALTS |= {f"a step of at most {length}": Halt("convergence", epsilon=length) for length in (3.0, 4.0, 5.0, 6.0)}
SHOWN = Halt(threshold=0.95)


def choices(out, seed):
    """{name: Settings} of all trainings of a seed, the base first."""
    base, control, loop = train.list_trainings(out, {"seed": seed})
    model, _ = convert.load(base.init, encoder_layers=1, decoder_layers=1)
    of_loop = mean(step_flops(model, loop, [b]) for b in range(loop.max_loops))
    same_operations = round(loop.steps * of_loop / step_flops(model, control, [0]))
    rows = {
        "control, as many steps": control,
        "control, as many operations": replace(control, steps=same_operations),
        "span 1 (the paper's)": replace(loop, span=1),
        "span 2 (its authors' code)": replace(loop, span=2),
        "span 4": replace(loop, span=4),
        "span 8: all passes": loop,
        "span 8, --gate_start=s4d": replace(loop, gate_start="s4d"),
        "span 8, --confidence=sequence": replace(loop, confidence="sequence"),
    }
    for i, (name, s) in enumerate(rows.items(), start=1):
        rows[name] = replace(s, out=str(out / f"choice-{i}"))
    return {"base": base, **rows}


def documents_of(out, links, tokenizer):
    """300 documents, all of whose chains have `links` links, as `read_answers` gives them."""
    path = out / f"links-{links}.jsonl"
    train.write_lists(path, 300, [links], 100 + links)
    return read_answers(path, tokenizer, 1000)


def share_right(model, documents, *arguments):
    """{column: mean over the links of `accuracy_by_kind` with these arguments}"""
    by_links = list(accuracy_by_kind(model, documents, *arguments).values())
    return {name: mean(row[name] for row in by_links) for name in by_links[0]}


def print_table(title, names, rows):
    """rows: {name: [{column: number} of each seed]}. Printed is the mean ± the standard deviation over the seeds."""
    print(f"\n{title}\n\n| {'':30} |" + "".join(f" {name:>13} |" for name in names))
    print("|---" * (1 + len(names)) + "|")
    for row, by_seed in rows.items():
        line = f"| {row:30} |"
        for name in names:
            values = [columns[name] for columns in by_seed if name in columns]
            cell = ""
            if values:
                spread = stdev(values) if len(values) > 1 else 0.0
                cell = f"{mean(values):.3f} ± {spread:.3f}"
            line += f" {cell:>13} |"
        print(line, flush=True)


def print_choices(runs, documents):
    rows = defaultdict(list)
    for run in runs:
        for name, s in run.items():
            model, _ = convert.load(s.out)
            columns = ([0],) if s.objective == "lm" else (DEPTHS, SHOWN)
            rows[name].append(share_right(model, documents, *columns))
    print_table("chains of 8 (a guess: 0.33); 0 passes: unlooped; exit at 0.95", [0, *DEPTHS, "exit", "passes"], rows)


def print_halts(models, documents):
    rows = {}
    for name, halt in HALTS.items():
        rows[name] = [share_right(model, documents, [], halt) for model in models]
    print_table("span 8, chains of 8: rules to stop after at most 8 passes", ["exit", "passes"], rows)


def print_longer(models, documents):
    rows = defaultdict(list)
    for model in models:
        by_links = accuracy_by_kind(model, documents, DEPTHS, SHOWN, 16)
        for kind in sorted(by_links, key=lambda kind: int(kind.split()[0])):
            rows[kind].append(by_links[kind])
    print_table("span 8, chains of 12 (a guess: 0.50): at most 16 passes with exit", [*DEPTHS, "exit", "passes"], rows)


def main():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default="out/evidence")
    parser.add_argument("--seeds", default="1,2,3")
    given = parser.parse_args()
    runs = []
    models = []  # of span 8
    for seed in given.seeds.split(","):
        run = choices(given.out / f"seed-{seed}", int(seed))
        for name, s in run.items():
            train.stage(f"seed {seed}, {name}", s)
        model, tokenizer = convert.load(run["span 8: all passes"].out)
        models.append(model)
        runs.append(run)
    documents = documents_of(given.out, 8, tokenizer)
    print_choices(runs, documents)
    print_halts(models, documents)
    print_longer(models, documents_of(given.out, 12, tokenizer))


if __name__ == "__main__":
    main()
