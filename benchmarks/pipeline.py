"""The pipeline against one machine: throughput with the same total threads and microbatch size, and idle memory.

Two volunteers with one thread each, one per stage, and a coordinator, all on this machine, beside the reference with
two threads: as it is, and recomputing forward in backward as SWARM does. Swarm and reference alternate over seeds.
Throughput counts committed rounds after a warm-up; memory is private memory (USS) of a volunteer that has joined and
waits (idle), and of one after its last round, model and sums still loaded; its libp2p daemon is included in both.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from shoal.node.demo import committed
from shoal.node.swarm_processes import SwarmProcesses
from shoal.protocol.manifest import load_manifest
from shoal.swarm.data import load_corpus
from shoal.swarm.reference import run_reference

MANIFEST = """\
name = "bench"
mode = "pipeline"
seed = {seed}
[model]
architecture = "llama"
stages = 2
[model.config]
hidden_size = {hidden}
intermediate_size = {ffn}
num_hidden_layers = {layers}
num_attention_heads = 8
num_key_value_heads = 8
vocab_size = 256
max_position_embeddings = 256
tie_word_embeddings = false
[data]
kind = "stdlib"
sequence_length = {length}
[batch]
samples = {samples}
microbatch = {microbatch}
[optimizer]
name = "adamw"
learning_rate = 1e-3
[schedule]
rounds = {rounds}
snapshot_every = 1000
[participation]
servers_per_stage = {servers}
feeders = 2
committee = 3
"""
FULL = {"hidden": 256, "ffn": 704, "layers": 6, "length": 128, "samples": 64, "microbatch": 8, "rounds": 8}
QUICK = {**FULL, "hidden": 128, "ffn": 352, "layers": 2, "samples": 16, "rounds": 4}
WARM_UP = 2


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks pipeline", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small model and one seed: does it run?")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    options = parser.parse_args(arguments)
    setting = QUICK if options.quick else FULL
    seeds = range(options.first_seed, options.first_seed + (1 if options.quick else options.seeds))
    rows = [measure(setting, seed) for seed in seeds]
    result = {"benchmark": "pipeline", **environment(), "setting": setting, "runs": rows, **summary(rows)}
    if options.json:
        print(json.dumps(result))
    else:
        show(result)
    return 0


def environment() -> dict[str, Any]:
    return {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": psutil.cpu_count(),
    }


def measure(setting: dict[str, int], seed: int) -> dict[str, float]:
    """One seed: the reference both ways, then the swarm. samples/s, MiB."""
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as name:
        folder = Path(name)
        manifest = folder / "run.toml"
        manifest.write_text(MANIFEST.format(seed=seed, servers=1, **setting))
        plain = reference_rate(manifest, setting, recompute=False)
        recomputing = reference_rate(manifest, setting, recompute=True)
        swarm, worked = swarm_rate(folder, manifest, setting)
        waiting = folder / "waiting.toml"
        waiting.write_text(MANIFEST.format(seed=seed, servers=2, **setting))
        idle = idle_memory_mib(folder, waiting)
    return {
        "swarm": swarm,
        "reference": plain,
        "reference_recompute": recomputing,
        "ratio": swarm / plain,
        "ratio_recompute": swarm / recomputing,
        "idle_private_mib": idle,
        "after_work_private_mib": worked,
    }


def reference_rate(path: Path, setting: dict[str, int], *, recompute: bool) -> float:
    """Samples/s of one machine with two threads."""
    manifest = load_manifest(path)
    corpus = load_corpus(manifest.data, path.parent)
    ends: list[float] = []
    torch.set_num_threads(2)
    rounds = max(WARM_UP + 1, setting["rounds"] // 2)
    run_reference(
        manifest, corpus, rounds, recompute=recompute, on_round=lambda step, loss: ends.append(time.monotonic())
    )
    return setting["samples"] * (len(ends) - WARM_UP) / (ends[-1] - ends[WARM_UP - 1])


def swarm_rate(folder: Path, manifest: Path, setting: dict[str, int]) -> tuple[float, float]:
    """Samples/s of the swarm over the committed rounds after the warm-up, and MiB of a volunteer after the last."""
    with SwarmProcesses(folder / "swarm", manifest) as swarm:
        invite = swarm.bootstrap()
        for stage in range(2):
            swarm.join(f"volunteer-{stage + 1}", invite)
        rounds = setting["rounds"]
        swarm.wait(lambda: len(committed(swarm)) >= rounds, 1200, "the swarm did not end")
        ends = [at for at, _ in committed(swarm)]
        memory = private_mib(swarm.nodes["volunteer-1"].process.pid)
    return setting["samples"] * (rounds - WARM_UP) / (ends[-1] - ends[WARM_UP - 1]), memory


def idle_memory_mib(folder: Path, manifest: Path) -> float:
    """Private memory of a volunteer that has joined and waits for others, p2pd included."""
    with SwarmProcesses(folder / "idle", manifest) as swarm:
        invite = swarm.bootstrap()
        swarm.join("volunteer-1", invite)
        node = swarm.nodes["volunteer-1"]
        running = node.directory / "node.json"
        swarm.wait(running.is_file, 120, "the volunteer did not join")
        return private_mib(node.process.pid)


def private_mib(pid: int) -> float:
    """Private memory (USS) of a process and its children."""
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return float(sum(p.memory_full_info().uss for p in family)) / 2**20


def summary(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Median and range of every figure over the seeds."""
    return {
        "median": {key: statistics.median(row[key] for row in rows) for key in rows[0]},
        "range": {key: [min(row[key] for row in rows), max(row[key] for row in rows)] for key in rows[0]},
    }


def show(result: dict[str, Any]) -> None:
    setting = ", ".join(f"{key} {value}" for key, value in result["setting"].items())
    print(f"pipeline, {result['date']}, {result['cores']} cores, torch {result['torch']}: {setting}")
    print(f"{'':>22} {'median':>9} {'range over seeds':>20}")
    for key, value in result["median"].items():
        low, high = result["range"][key]
        print(f"{key:>22} {value:9.3f} {low:9.3f} – {high:.3f}")
