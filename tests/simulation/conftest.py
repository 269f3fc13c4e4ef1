"""Options of the simulation tests."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full-matrix",
        action="store_true",
        help="tests/simulation: the full product of kill points, victims, fates and shapes instead of a covering part",
    )


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Toy stages are too small to share."""
    import torch

    torch.set_num_threads(1)
