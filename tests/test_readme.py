"""The README's map of the paper names what exists, and the source stays readable: short files and functions."""

import ast
import re

import torch
from conftest import ROOT

FILES = ["loopus.py", "convert.py", "train.py", "sample.py", "eval.py"]


def definitions(file):
    """{name: lines} of the functions, methods ("Class.method") and classes of a file."""
    found = {}
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node.end_lineno - node.lineno + 1
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    found[f"{node.name}.{method.name}"] = method.end_lineno - method.lineno + 1
    return found


def test_the_map_of_the_paper_names_what_exists():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    text = readme.split("## The paper in the code")[1].split("## ")[0]
    parts = re.split(r"In\s+`(\w+\.py)`:", text)[1:]
    named = [(file, name) for file, names in zip(parts[::2], parts[1::2]) for name in re.findall(r"`([\w.]+)`", names)]
    assert len(named) >= 15
    for file, name in named:
        assert name in definitions(file), f"{file} has no {name}"


def test_the_ten_lines_of_the_method_are_what_the_library_does(checkpoint):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = readme.split("```python\n")[1].split("```")[0].replace('"gpt2"', repr(str(checkpoint[0])))
    names = {}
    exec(code.replace(">= 0.6", ">= 2"), names)  # untrained, it would stop after the first pass
    assert torch.allclose(names["logits"], names["model"](names["idx"], loops=8), atol=1e-5)


def test_no_function_is_longer_than_a_screen():
    assert len((ROOT / "loopus.py").read_text(encoding="utf-8").splitlines()) <= 500
    for file in FILES:
        classes = {name for name in definitions(file) if name[0].isupper() and "." not in name}
        for name, lines in definitions(file).items():
            assert lines <= 50 or name in classes, (file, name, lines)
