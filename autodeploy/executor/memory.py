"""How much memory there is."""

from __future__ import annotations

import psutil
import torch


def free_memory(device: str) -> int:
    """Bytes that can still be allocated on a device."""
    return torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else psutil.virtual_memory().available
