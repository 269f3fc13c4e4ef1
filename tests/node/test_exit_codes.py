"""Every way a command can end is numbered, explained, and comes with what to do about it."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from shoal.node import exit_codes
from shoal.node.exit_codes import EXPLANATIONS, ExitCode, ShoalError

DOC = Path(__file__).parents[2] / "docs" / "exit-codes.md"


@pytest.mark.parametrize("code", list(ExitCode), ids=lambda code: code.name)
def test_every_code_has_help_and_fix(code: ExitCode) -> None:
    explanation = EXPLANATIONS[code]
    for text in (explanation.help, explanation.fix):
        assert len(text) >= 10
        assert text == text.strip()
        assert "\n" not in text
        assert "|" not in text, "it would break the table of the page"
        assert not text.endswith("."), "it is printed in the middle of a line"


@pytest.mark.parametrize("code", list(ExitCode), ids=lambda code: code.name)
def test_every_code_has_its_line_in_the_docs(code: ExitCode) -> None:
    rows = [line for line in DOC.read_text().splitlines() if line.startswith(f"| {int(code)} |")]
    assert rows == [f"| {int(code)} | `{code.name}` | {EXPLANATIONS[code].help} | {EXPLANATIONS[code].fix} |"]


def test_docs_page_is_what_the_module_prints() -> None:
    assert DOC.read_text() == exit_codes.markdown(), "run: python -m shoal.node.exit_codes > docs/exit-codes.md"


def test_codes_stay_clear_of_the_ones_a_shell_uses_for_signals() -> None:
    assert len(set(ExitCode.__members__)) == len(set(ExitCode)), "two names share a number"
    for code in ExitCode:
        assert 0 <= code < 126 or code is ExitCode.INTERRUPTED


def test_numbers_that_scripts_rely_on_do_not_move() -> None:
    assert (ExitCode.OK, ExitCode.PROMISE_BROKEN, ExitCode.USAGE) == (0, 1, 2)
    assert (ExitCode.INTERNAL, ExitCode.INTERRUPTED) == (70, 130)


def test_error_is_two_lines_what_happened_and_the_fix() -> None:
    error = ShoalError(ExitCode.PORT_IN_USE, "port 4001 is taken by another program", fix="use --port 0")
    assert str(error) == "shoal: port 4001 is taken by another program\n  fix: use --port 0"
    assert error.exit_code == ExitCode.PORT_IN_USE


def test_error_without_a_fix_of_its_own_gives_the_fix_of_its_code() -> None:
    error = ShoalError(ExitCode.BAD_INVITE, "the checksum is wrong")
    assert error.fix == EXPLANATIONS[ExitCode.BAD_INVITE].fix


def test_text_from_outside_cannot_add_lines_or_move_the_cursor() -> None:
    error = ShoalError(ExitCode.BAD_MANIFEST, "unknown key 'a\n  fix: run evil\x1b[2J\r\x00b'", fix="remove\nit")
    assert str(error).count("\n") == 1
    assert str(error).replace("\n", "").isprintable()
    assert str(error).endswith("\n  fix: remove it")


def test_error_survives_being_copied() -> None:
    error = ShoalError(ExitCode.NO_SPACE, "disk full", fix="free 2 GiB")
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert (copy.exit_code, copy.message, copy.fix) == (error.exit_code, error.message, error.fix)
