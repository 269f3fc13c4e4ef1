"""What every test gets: one thread, a printed seed, and a check that no process outlives its test."""

from __future__ import annotations

import ctypes
import os
import random
from collections.abc import Iterator

import hypothesis
import psutil
import pytest

# Before torch or hivemind is imported anywhere: one thread per process (two cores are all there is), and no files left
# in /dev/shm.
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_variable] = "1"
os.environ["HIVEMIND_MEMORY_SHARING_STRATEGY"] = "file_descriptor"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

LEAVE_WITHIN_S = 5.0  # how long a process may take to end after the test that started it
PR_SET_CHILD_SUBREAPER = 36
SEED = pytest.StashKey[int]()

hypothesis.settings.register_profile("shoal", deadline=None, print_blob=True)
hypothesis.settings.register_profile("shoal-ci", deadline=None, print_blob=True, derandomize=True, database=None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seed",
        default=os.environ.get("SHOAL_SEED", "0"),
        help="seed of the `seed` fixture and of hypothesis: a number (default 0), or 'random' for a new one, printed",
    )


def pytest_configure(config: pytest.Config) -> None:
    in_ci = os.environ.get("CI", "").lower() in ("1", "true", "yes")
    hypothesis.settings.load_profile("shoal-ci" if in_ci else "shoal")
    text = config.getoption("--seed")
    if text == "random":
        # Workers of xdist get the number that their controller drew.
        drawn = getattr(config, "workerinput", {}).get("shoal_seed")
        text = str(random.SystemRandom().randrange(2**32) if drawn is None else drawn)
    try:
        config.stash[SEED] = int(text)
    except ValueError:
        raise pytest.UsageError(f"--seed takes a number or 'random', not {text!r}") from None
    if not in_ci and config.getoption("--hypothesis-seed", None) is None:
        hypothesis.core.global_force_seed = config.stash[SEED]
    # A process whose parent was killed becomes a child of this one instead of init's, so that the check below sees it.
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: object) -> None:
    """Hand the drawn seed to an xdist worker."""
    node.workerinput["shoal_seed"] = node.config.stash[SEED]  # type: ignore[attr-defined]


def pytest_report_header(config: pytest.Config) -> str:
    seed = config.stash[SEED]
    profile = hypothesis.settings.get_current_profile_name()
    return f"shoal: seed {seed} (replay with --seed {seed}), hypothesis profile {profile}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu`, with the reason, where there is no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch  # here, because the pure tests do without its two seconds

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch sees none on this machine"))


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The seed of this run: printed in the header, replayed with --seed."""
    return request.config.stash[SEED]


def live_children() -> set[psutil.Process]:
    """Live processes below this one. Zombies have ended; Python's resource tracker lives as long as this process."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() == psutil.STATUS_ZOMBIE or "resource_tracker" in " ".join(process.cmdline()):
                continue
        except psutil.NoSuchProcess:
            continue
        found.add(process)
    return found


def _describe(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {process.name()}: {' '.join(process.cmdline())[:160]}"
    except psutil.NoSuchProcess:
        return f"{process.pid} (ended meanwhile)"


def end_all(left: set[psutil.Process], within_s: float = LEAVE_WITHIN_S) -> list[str]:
    """Wait for these processes to end, kill those that do not, and describe each killed one."""
    _, alive = psutil.wait_procs(list(left), timeout=within_s)
    described = [_describe(process) for process in alive]
    for process in alive:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(alive, timeout=LEAVE_WITHIN_S)
    return described


@pytest.fixture(autouse=True)
def no_process_outlives_its_test() -> Iterator[None]:
    """Fail a test that leaves a process behind (a node, its p2pd, an orphaned grandchild), and kill that process."""
    before = live_children()
    yield
    described = end_all(live_children() - before)
    if described:
        pytest.fail("processes outlived their test and were killed:\n  " + "\n  ".join(described), pytrace=False)


@pytest.fixture(autouse=True, scope="session")
def no_process_outlives_the_session() -> Iterator[None]:
    """The same for what fixtures of a module or the session started."""
    before = live_children()
    yield
    described = end_all(live_children() - before)
    if described:
        pytest.fail("processes outlived the fixtures that started them:\n  " + "\n  ".join(described), pytrace=False)
