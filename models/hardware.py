"""Accelerators: one table of what their makers publish and what their compilers must be told.

Peak FLOP/s are dense bfloat16 of one device as JAX counts devices. A device that is not here gets
no utilisation rather than an invented one.
"""

import os
import subprocess
import sys
from typing import NamedTuple

_GIB = 2**30


class TpuCompiler(NamedTuple):
    """How libtpu names a generation, and how a slice of it is counted and shaped."""

    name: str
    cores_per_chip: int  # the number in a slice's name counts cores: v5p-256 has 128 chips
    torus_dims: int
    most_chips: int
    flops_per_cycle: int  # bfloat16, of the matrix units of a chip; the clock is peak / this


class GpuCompiler(NamedTuple):
    """What XLA's GPU compiler must be told, from NVIDIA's data sheets."""

    compute_capability: int
    cores: int
    shared_memory_kib: int
    l2_cache_mib: int
    clock_ghz: float


class Chip(NamedTuple):
    """One kind of device.

    Attributes:
      device_kinds: the names that JAX has for it, as in `jax.Device.device_kind`.
      flops: peak dense bfloat16 FLOP/s.
      memory_bytes: of a TPU as its compiler counts it, of a GPU as its driver does.
      memory_bandwidth: bytes a second.
      link: bytes a second one way, over one link of a TPU's torus or a GPU's NVLink as a whole.
      network: bytes a second one way and a device, between slices or nodes.
      compiler: facts to compile for it where it is not present; None if that is not supported.
    """

    device_kinds: tuple[str, ...]
    flops: float
    memory_bytes: int
    memory_bandwidth: float
    link: float = 0
    network: float = 0
    compiler: TpuCompiler | GpuCompiler | None = None


CHIPS = {
    "v4": Chip(("TPU v4",), 275e12, 32 * _GIB, 1.228e12),
    "v5e": Chip(
        ("TPU v5 lite",), 197e12, int(15.75 * _GIB), 0.819e12, 50e9, 3.125e9,
        TpuCompiler("v5e", 1, 2, 256, 131_072),
    ),
    "v5p": Chip(
        ("TPU v5", "TPU v5p"), 459e12, int(95.74 * _GIB), 2.765e12, 100e9, 6.25e9,
        TpuCompiler("v5", 2, 3, 4096, 262_144),
    ),
    "v6e": Chip(
        ("TPU v6 lite",), 918e12, int(31.25 * _GIB), 1.64e12, 112e9, 12.5e9,
        TpuCompiler("v6e", 1, 2, 256, 524_288),
    ),
    "a100": Chip(
        ("NVIDIA A100-SXM4-80GB",), 312e12, 85_100_000_000, 2.04e12, 300e9, 25e9,
        GpuCompiler(8, 108, 164, 40, 1.41),
    ),
    "a100-40gb": Chip(("NVIDIA A100-SXM4-40GB",), 312e12, 42_400_000_000, 1.555e12),
    "h100": Chip(
        ("NVIDIA H100 80GB HBM3",), 989e12, 84_942_979_072, 3.35e12, 450e9, 50e9,
        GpuCompiler(9, 132, 228, 50, 1.98),
    ),
    "h100-pcie": Chip(("NVIDIA H100 PCIe",), 756e12, 84_900_000_000, 2.0e12),
    "h200": Chip(
        ("NVIDIA H200",), 989e12, 150_700_000_000, 4.8e12, 450e9, 50e9,
        GpuCompiler(9, 132, 228, 50, 1.98),
    ),
    "b200": Chip(("NVIDIA B200",), 2250e12, 191_500_000_000, 8.0e12),
}  # fmt: skip


def compilable() -> dict[str, Chip]:
    """The chips that can be compiled for where they are not present, by short name."""
    return {name: chip for name, chip in CHIPS.items() if chip.compiler}


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a device, None where it is not known."""
    return next((c.flops for c in CHIPS.values() if device_kind in c.device_kinds), None)


def known_xla_flags(*flags: str) -> list[str]:
    """Those of some XLA flags (`--name=value`) that the installed jaxlib knows.

    XLA ends a process whose XLA_FLAGS hold another, so a process of its own is asked; it imports
    jaxlib alone. For whoever sets the variable, before JAX is imported.
    """
    code = "from jaxlib import xla_client; xla_client.CompileOptions()"
    environment = {**os.environ, "XLA_FLAGS": " ".join(flags)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    _, _, unknown = done.stderr.partition("Unknown flag")
    return [flag for flag in flags if flag not in unknown.split()]
