"""The house rules that a linter does not hold: size of files, what may not be called, what may not be written down."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_LINES = 600
EVERYWHERE = ("shoal", "tests", "benchmarks", "scripts")

# Nothing from the network is executed; one process, no forks (docs/design.md, rules 3 and 4).
FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "multiprocessing", "torch.multiprocessing"}
FORBIDDEN_CALLS = {"os.fork", "os.forkpty", "eval", "exec"}

# Spelled in pieces, so that this file does not find itself.
REGISTRIES = re.compile(
    r"\b(?:"
    + "|".join(
        re.escape(".".join(parts))
        for parts in (
            ("pypi", "org"),
            ("pythonhosted", "org"),
            ("download", "pytorch", "org"),
            ("registry", "npmjs", "org"),
            ("registry", "yarnpkg", "com"),
            ("deb", "debian", "org"),
            ("archive", "ubuntu", "com"),
            ("anaconda", "org"),
            ("docker", "io"),
            ("ghcr", "io"),
            ("quay", "io"),
        )
    )
    + r")\b"
)
HOME_PATHS = re.compile(r"(?<![\w.~])(?:/root/|/home/(?!shoal\b)\w|/Users/\w|/work/(?:main|shared)\b|/tmp/" + r"w/)")


def tracked_files() -> list[Path]:
    """What git tracks or would add; every file outside hidden folders where there is no git or no repository."""
    git = shutil.which("git")
    if git and (ROOT / ".git").exists():
        command = [git, "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, capture_output=True, check=False, timeout=30)
        if listed.returncode == 0:
            return sorted(p for name in listed.stdout.decode().split("\0") if name and (p := ROOT / name).is_file())
    hidden = (path for path in ROOT.rglob("*") if path.is_file())
    return sorted(p for p in hidden if not any(part.startswith(".") for part in p.relative_to(ROOT).parts))


def python_files(*folders: str) -> list[Path]:
    inside = [ROOT / folder for folder in folders]
    return [p for p in tracked_files() if p.suffix == ".py" and any(p.is_relative_to(folder) for folder in inside)]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def dotted(node: ast.expr) -> str:
    """`a.b.c` of a name or attribute chain, "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return ""


def violations(source: str) -> Iterator[str]:
    """What a module does that shoal must not do, as `line: what`. Follows `import x as y` and `from x import y`."""
    tree = ast.parse(source)
    alias: dict[str, str] = {}
    for node in ast.walk(tree):
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [item.name for item in node.names]
            alias |= {item.asname: item.name for item in node.names if item.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found = [node.module] + [f"{node.module}.{item.name}" for item in node.names]
            alias |= {item.asname or item.name: f"{node.module}.{item.name}" for item in node.names}
        for module in found:
            if any(module == bad or module.startswith(bad + ".") for bad in FORBIDDEN_MODULES):
                yield f"{node.lineno}: imports {module}"
                break
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Load):
            head, _, rest = dotted(node).partition(".")
            full = alias.get(head, head) + (f".{rest}" if rest else "")
            if full in FORBIDDEN_CALLS or full in FORBIDDEN_MODULES:
                yield f"{node.lineno}: uses {full}"
        if isinstance(node, ast.Call):
            head, _, rest = dotted(node.func).partition(".")
            if alias.get(head, head) + (f".{rest}" if rest else "") == "torch.load":
                safe = [k for k in node.keywords if k.arg == "weights_only"]
                if not (safe and isinstance(safe[0].value, ast.Constant) and safe[0].value.value is True):
                    yield f"{node.lineno}: torch.load without weights_only=True"


def test_no_file_is_longer_than_600_lines() -> None:
    counted = {name(p): len(p.read_text().splitlines()) for p in python_files(*EVERYWHERE)}
    assert {file: lines for file, lines in counted.items() if lines > MAX_LINES} == {}


def test_every_module_says_what_it_is_about() -> None:
    """A module with any code has a docstring; an empty `__init__.py` is a folder, not a module."""
    silent = []
    for path in python_files(*EVERYWHERE):
        tree = ast.parse(path.read_text())
        if tree.body and not ast.get_docstring(tree):
            silent.append(name(path))
    assert silent == []


def test_nothing_unpickles_forks_or_evaluates() -> None:
    found = [f"{name(path)}:{what}" for path in python_files("shoal") for what in violations(path.read_text())]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import pickle as p",
        "import multiprocessing.shared_memory",
        "from multiprocessing import Process",
        "import torch.multiprocessing as mp",
        "from torch import multiprocessing",
        "import torch\nq = torch.multiprocessing.Queue()",
        "import os\nos.fork()",
        "import os as o\nf = o.fork",
        "from os import fork\nfork()",
        "eval('1')",
        "import torch\ntorch.load(p)",
        "import torch\ntorch.load(p, weights_only=False)",
        "import torch\ntorch.load(p, weights_only=flag)",
        "from torch import load\nload(p)",
        "import torch as t\nt.load(p)",
        "def f():\n    import pickle",
    ],
)
def test_the_check_sees(source: str) -> None:
    assert list(violations(source))


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(p, weights_only=True)",
        "model.eval()",
        "import json\njson.load(f)",
        "import os\nos.forks = 1",
        "from shoal.protocol import pickles",
    ],
)
def test_the_check_lets_pass(source: str) -> None:
    assert list(violations(source)) == []


def test_no_file_names_a_package_registry_or_a_home_folder() -> None:
    found = []
    for path in tracked_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            hit = REGISTRIES.search(line) or HOME_PATHS.search(line)
            if hit and path != Path(__file__):
                found.append(f"{name(path)}:{number}: {hit.group()}")
    assert found == []


def test_the_registry_and_path_patterns_can_match() -> None:
    assert REGISTRIES.search("see https://" + "pypi" + ".org/simple")
    assert HOME_PATHS.search("open('/home/" + "ada/x')")
    assert not HOME_PATHS.search("~/root/x and /home/shoal/data and ./home/x")
