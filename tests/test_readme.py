"""The README's map of the paper names what exists, and the source stays readable: short files and functions."""

import ast
import re

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
    rows = re.findall(r"\| `([\w.]+)` in `(\w+\.py)` \|", readme)
    assert len(rows) >= 15
    for name, file in rows:
        assert name in definitions(file), f"{file} has no {name}"


def test_tests_that_the_readme_names_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    names = re.findall(r"test_\w{6,}", readme)
    assert len(names) >= 4
    for name in names:
        assert f"def {name}(" in tests or (ROOT / "tests" / f"{name}.py").exists(), name


def test_no_function_is_longer_than_a_screen():
    assert len((ROOT / "loopus.py").read_text(encoding="utf-8").splitlines()) < 500
    for file in FILES:
        classes = {name for name in definitions(file) if name[0].isupper() and "." not in name}
        for name, lines in definitions(file).items():
            assert lines <= 60 or name in classes, (file, name, lines)
