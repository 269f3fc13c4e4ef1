"""Options of the simulation tests."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--matrix",
        choices=("covering", "shapes", "full"),
        default="covering",
        help="tests/simulation: kill points with every size (covering), also feeders and optimizer (shapes), "
        "or with every victim and fate besides (full, over an hour)",
    )


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Toy stages are too small to share."""
    import torch

    torch.set_num_threads(1)
