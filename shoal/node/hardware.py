"""What this machine has to offer: the device to compute on, and its memory."""

from __future__ import annotations

from dataclasses import dataclass

import psutil

from shoal.node.exit_codes import ExitCode, ShoalError


@dataclass(frozen=True, slots=True)
class Hardware:
    device: str  # a torch device: "cpu", "cuda:0"
    name: str
    memory_bytes: int


def choose(device: str) -> Hardware:
    """`auto` takes the first CUDA device, else the processor. Raises ShoalError(DEVICE_UNAVAILABLE)."""
    import torch

    if device == "auto":
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ShoalError(ExitCode.DEVICE_UNAVAILABLE, f"--device {device}: {str(error).splitlines()[0]}") from None
    if chosen.type == "cpu":
        return Hardware("cpu", "processor", psutil.virtual_memory().total)
    if chosen.type != "cuda" or not torch.cuda.is_available() or (chosen.index or 0) >= torch.cuda.device_count():
        raise ShoalError(ExitCode.DEVICE_UNAVAILABLE, f"--device {device}: no such device on this machine")
    properties = torch.cuda.get_device_properties(chosen)
    return Hardware(f"cuda:{chosen.index or 0}", properties.name, properties.total_memory)
