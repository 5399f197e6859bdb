"""What a GPU has: memory, bandwidth and arithmetic, and how much of each a good kernel gets.

Nominal figures are NVIDIA's datasheets, per GPU, without sparsity. Memory is what the driver reports as total,
which is what a pool is cut from; the marketed size is smaller or larger by a few percent.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv4.errors import ConfigError
from dsv4.spelling import nearest

_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. Bytes are bytes, rates are per second, flops count a multiply-add as two."""

    name: str
    memory_bytes: int
    """Total memory that the driver reports."""
    hbm_bytes_per_s: float
    bf16_flops: float
    fp8_flops: float
    copy_share: float
    """Share of `hbm_bytes_per_s` that a large copy reaches."""
    source: str

    @property
    def copy_bytes_per_s(self) -> float:
        """Bandwidth that can be had."""
        return self.hbm_bytes_per_s * self.copy_share

    @property
    def weight_flops(self) -> float:
        """The fastest rate for FP4 experts and FP8 dense layers together: FP8's, which both have."""
        return self.fp8_flops


def _hopper(name: str, mib: int, tb_per_s: float, bf16: float, copy: float, source: str) -> Gpu:
    return Gpu(name, mib * _MIB, tb_per_s * 1e12, bf16 * 1e12, 2 * bf16 * 1e12, copy, source)


def _blackwell(name: str, mib: int, bf16: float, memory: str) -> Gpu:
    source = f"datasheet; {memory}; the share is assumed from Hopper's, not measured"
    return Gpu(name, mib * _MIB, 8e12, bf16 * 1e12, 2 * bf16 * 1e12, 0.90, source)


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        _hopper(
            "h100",
            81_559,
            3.35,
            989.5,
            0.90,
            "datasheet (SXM, 80 GB); copy 3.00 TB/s measured",
        ),
        _hopper(
            "h200",
            143_771,
            4.8,
            989.5,
            0.89,
            "datasheet (SXM, 141 GB); copy 4.27 TB/s measured",
        ),
        _hopper("h20", 97_871, 4.0, 148.0, 0.90, "datasheet (96 GB); the share is assumed, not measured"),
        _blackwell("b200", 183_359, 2250, "HGX, 180 GB, driver total 183,359 MiB"),
        _blackwell("b300", 275_040, 2250, "HGX, 288 GB, driver total 275,040 MiB"),
        _blackwell("gb200", 189_471, 2500, "NVL72, 186 GB, driver total 189,471 MiB"),
        _blackwell("gb300", 284_208, 2500, "NVL72, 288 GB, driver total 284,208 MiB"),
    )
}
"""By name, in the order in which tables show them."""


_OTHERS = frozenset(("p100", "v100", "a100", "a800", "h800"))
"""Not slips of the pen, though nearly so."""


def gpu(name: str) -> Gpu:
    """The GPU called `name`, upper or lower case, with or without maker and form factor ("NVIDIA H100 80GB HBM3" is h100).

    Raises ConfigError, which names the nearest known one; none for what is the name of another GPU, such as a100.
    """
    words = name.lower().replace("-", " ").replace("_", " ").split()
    found = next((GPUS[word] for word in words if word in GPUS), None)
    if found is None:
        meant = "" if _OTHERS & set(words) else nearest(name, GPUS)
        raise ConfigError(f"gpu is {name!r}; known are {', '.join(GPUS)}{meant}")
    return found
