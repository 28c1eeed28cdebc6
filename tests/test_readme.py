"""The README's map from the paper to the source is right, and the source keeps its promise to stay small."""

import re

from conftest import ROOT

FILES = ["loopus.py", "convert.py", "train.py", "sample.py", "eval.py"]


def test_the_map_points_at_the_lines():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"\| `([^`]+)` \| \[(\w+\.py):(\d+)\]\(\2#L\3\) \|", readme)
    assert len(rows) >= 15
    for words, file, number in rows:
        line = (ROOT / file).read_text(encoding="utf-8").splitlines()[int(number) - 1]
        assert words in line, f"{file}:{number} is {line.strip()!r}, the README says {words!r}"


def test_the_source_stays_small():
    lines = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in FILES}
    assert lines["loopus.py"] < 500 and sum(lines.values()) < 1800, lines
