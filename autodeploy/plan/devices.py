"""What GPUs can do at most, by their makers' own sheets. Rates are dense: those that a sheet states with sparsity are halved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autodeploy.errors import ConfigError, did_you_mean

GIGA, TERA = 10**9, 10**12
COLLECTIVE_SECONDS = 3.6e-6
"""What every collective takes, however little it sends. This and the seconds of a step are those that NCCL reckons with for its
ring in the low-latency protocol (its src/graph/tuning.cc at commit 01afd20)."""


@dataclass(frozen=True)
class Link:
    """How GPUs of one machine reach each other."""

    name: str
    bytes_per_second: float
    """Out of one GPU; as much comes in at the same time."""
    step_seconds: float
    """Until a neighbour has something, however little it is."""


@dataclass(frozen=True)
class Device:
    """One GPU."""

    name: str
    memory: int
    """Bytes; a sheet's GB are 10^9. What the driver takes of it is not known here."""
    read_rate: float
    """Bytes per second from its memory."""
    flop_rates: Mapping[str, float]
    """Element type that is multiplied -> FLOP per second, sums in 32 bits. What is not there is widened to bfloat16."""
    link: Link
    source: str

    def flop_rate(self, dtype: str) -> float:
        known = "bfloat16" if dtype == "float16" or dtype not in self.flop_rates else dtype
        return self.flop_rates[known]


def _rates(float32: float, bfloat16: float, int8: float, fp8: float | None = None) -> dict[str, float]:
    """All in TFLOP per second."""
    found = {"float32": float32, "bfloat16": bfloat16, "int8": int8, "float8_e4m3fn": fp8}
    return {dtype: rate * TERA for dtype, rate in found.items() if rate is not None}


def _nvlink(generation: int, gigabytes: float) -> Link:
    return Link(f"NVLink {generation}", gigabytes * GIGA, 0.47e-6)


PCIE_4 = Link("PCIe 4.0 x16", 32 * GIGA, 1.0e-6)
HOPPER = _rates(67, 989.5, 1979, 1979)
DEVICES = {
    "h100": Device(
        "H100 SXM", 80 * GIGA, 3.35 * TERA, HOPPER, _nvlink(4, 450), "NVIDIA H100 Tensor Core GPU data sheet, column H100 SXM"
    ),
    "h200": Device(
        "H200 SXM", 141 * GIGA, 4.8 * TERA, HOPPER, _nvlink(4, 450), "NVIDIA H200 Tensor Core GPU data sheet, column H200 SXM"
    ),
    "a100-80gb": Device(
        "A100 80GB SXM",
        80 * GIGA,
        2.039 * TERA,
        _rates(19.5, 312, 624),
        _nvlink(3, 300),
        "NVIDIA A100 Tensor Core GPU data sheet, column A100 80GB SXM",
    ),
    "b200": Device(
        "B200 SXM",
        180 * GIGA,
        8 * TERA,
        _rates(80, 2250, 4500, 4500),
        _nvlink(5, 900),
        "NVIDIA Blackwell architecture technical brief, HGX B200; memory: NVIDIA DGX B200 data sheet, an eighth of it",
    ),
    "l40s": Device(
        "L40S", 48 * GIGA, 0.864 * TERA, _rates(91.6, 362.05, 733, 733), PCIE_4, "NVIDIA L40S GPU data sheet, the smaller rates"
    ),
    "l4": Device("L4", 24 * GIGA, 0.3 * TERA, _rates(30.3, 121, 242.5, 242.5), PCIE_4, "NVIDIA L4 Tensor Core GPU data sheet"),
    "rtx4090": Device(
        "GeForce RTX 4090",
        24 * GIGA,
        1.008 * TERA,
        _rates(82.6, 165.2, 660.6, 330.3),
        PCIE_4,
        "NVIDIA Ada GPU architecture white paper, appendix A",
    ),
}
"""By the name that is given to --gpu."""


def device_named(name: str) -> Device:
    """Raises ConfigError for one that is not known."""
    key = name.lower().replace(" ", "").replace("_", "-")
    if key not in DEVICES:
        raise ConfigError(f"--gpu {name}: no such GPU in the table.{did_you_mean(key, DEVICES)} Known: {', '.join(DEVICES)}.")
    return DEVICES[key]
