"""Devices and number formats: which can be used, and which is fastest."""

from __future__ import annotations

import time

import torch

from emendo.errors import RequestError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""The number formats of a model, by name."""

_PATIENCE = 0.1  # seconds to spend on one measurement of speed


def usable_device(name: str | torch.device) -> torch.device:
    """The device of that name.

    Raises:
        RequestError: there is no such device, or it holds no values ("meta").
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # an unknown name; a build without that backend
        raise RequestError(
            f"The device {str(name)!r} cannot be used: {str(error).splitlines()[0]}"
        ) from error
    if device.type == "meta":
        raise RequestError("The device 'meta' cannot be used: it holds no values. Give cpu or cuda.")
    return device


def fastest_dtype(device: str | torch.device | None = None) -> str:
    """``"bfloat16"`` where the device multiplies it at least twice as fast as float32, else ``"float32"``.

    It is measured on products of growing size, the last as large as those of a training step, in some 20 ms. Graphics
    processors and processors with AMX are several times faster in bfloat16. Others emulate it, some a thousand times
    slower: then the small products decide, so that the measurement stays short.

    Args:
        device: by default the CPU.
    """

    def seconds(name: str, rows: int) -> float:
        a, b = (torch.ones(size, dtype=DTYPES[name], device=device) for size in ((rows, 576), (576, 1536)))
        best, began = float("inf"), time.perf_counter()
        for _ in range(6):
            start = time.perf_counter()
            (a @ b)[0, 0].item()
            now = time.perf_counter()
            best = min(best, now - start)
            if now - began > _PATIENCE:
                break
        return best

    try:
        for rows in (1, 8, 64):
            if seconds("bfloat16", rows) > 4 * seconds("float32", rows):
                return "float32"
        return "bfloat16" if 2 * seconds("bfloat16", 512) < seconds("float32", 512) else "float32"
    except (RuntimeError, TypeError):  # a device without bfloat16
        return "float32"
