"""
Pictures of what eval.py measures, as in the paper's Fig. 5 and 18: losses and right answers by passes, passes by exit.

    python eval.py --init=out/loop,out/control --json > measured.json
    python tests/figures.py measured.json figures

Drawing needs matplotlib: pip install ".[plots]".
"""

import json
import sys
from pathlib import Path


def lines_of(measured):
    """{name of a figure: ({label: (x, y)}, what its axes are)}"""
    rows = {row["passes"]: row for row in measured["depths"]}
    depths = [depth for depth in rows if isinstance(depth, int)]
    losses = {"looped": (depths, [rows[depth]["loss"] for depth in depths])}
    losses["exit"] = ([rows["exit"]["mean_passes"]], [rows["exit"]["loss"]])
    if "control" in rows:
        losses["control, unlooped"] = ([0, depths[-1]], [rows["control"]["loss"]] * 2)
    right = {}
    for kind, columns in measured["accuracy"].items():
        passes = [int(name) for name in columns if name.isdigit()]
        right[kind] = (passes, [columns[str(depth)] for depth in passes])
    histogram = measured["exit"]["histogram"]
    return {
        "losses": (losses, "passes (0: one ungated)", "held-out loss, nats per token"),
        "accuracy": (right, "passes", "share of right answers"),
        "passes": ({"exit": (list(range(1, len(histogram) + 1)), histogram)}, "passes taken", "tokens"),
    }


def main(source, out):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        sys.exit('error: drawing needs matplotlib, which is missing: pip install ".[plots]"')
    Path(out).mkdir(parents=True, exist_ok=True)
    for name, (lines, xlabel, ylabel) in lines_of(json.loads(Path(source).read_text())).items():
        figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
        axes = figure.subplots()
        for label, (x, y) in lines.items():
            axes.plot(x, y, "o-", markersize=4, label=label)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        if lines:  # without questions no right answers
            axes.legend(fontsize=7)
            figure.savefig(Path(out, f"{name}.png"))


if __name__ == "__main__":
    main(*sys.argv[1:])
