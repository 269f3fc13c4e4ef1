"""Help, version, check: what the command line says before anything runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from shoal import __version__
from tests.node.small_runs import run_here, write_run

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize("command", ["", "check", "bootstrap", "join", "status", "export", "demo"])
def test_every_command_has_help(capfd: Capture, command: str) -> None:
    answer = run_here(capfd, *command.split(), "--help")
    assert answer.code == 0
    assert "Usage:" in answer.out and "--help" in answer.out
    assert answer.err == ""


def test_help_names_every_command(capfd: Capture) -> None:
    out = run_here(capfd, "--help").out
    assert all(command in out for command in ("check", "bootstrap", "join", "status", "export", "demo"))


def test_help_does_not_load_the_heavy_libraries() -> None:
    code = "import sys; import shoal.node.cli; print(sorted({'torch', 'hivemind', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.strip() == "[]"


def test_version(capfd: Capture) -> None:
    assert run_here(capfd, "--version").out.strip() == f"shoal {__version__}"


@pytest.mark.parametrize(
    "arguments",
    [("frob",), ("join",), ("check", "--frob"), ("demo", "--rounds", "1"), ("bootstrap", "--metrics-port", "99999")],
    ids=" ".join,
)
def test_a_command_line_that_makes_no_sense_is_code_2(capfd: Capture, arguments: tuple[str, ...]) -> None:
    answer = run_here(capfd, *arguments)
    assert answer.code == 2
    assert "Traceback" not in answer.err and answer.err


def test_there_is_only_the_pipeline_demo(capfd: Capture) -> None:
    answer = run_here(capfd, "demo", "experts")
    answer.is_error(2, "experts", "pipeline")  # type: ignore[arg-type]


def test_a_demo_does_not_mix_with_the_files_of_an_earlier_one(tmp_path: Path, capfd: Capture) -> None:
    (tmp_path / "nodes").mkdir()
    run_here(capfd, "demo", "--dir", tmp_path).is_error(2, "earlier demo", "--dir")  # type: ignore[arg-type]


def test_check_says_what_a_run_costs_and_what_comes_next(tmp_path: Path, capfd: Capture) -> None:
    manifest = write_run(tmp_path)
    answer = run_here(capfd, "check", manifest)
    assert answer.code == 0
    assert "tiny: good" in answer.out and "shoal bootstrap" in answer.out
    report = json.loads(run_here(capfd, "check", manifest, "--json").out)
    assert report["name"] == "tiny" and len(report["parameters_per_stage"]) == 2
    assert report["samples_in_data"] > 100 and 0 < report["unigram_entropy"] < 5.6
    assert set(tmp_path.iterdir()) == {manifest, tmp_path / "words.txt"}, "a check writes nothing"
