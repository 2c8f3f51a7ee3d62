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
    sends_ragged: bool = True  # whether `lax.ragged_all_to_all` compiles for more than one host


class GpuCompiler(NamedTuple):
    """What XLA's GPU compiler must be told, from NVIDIA's data sheets."""

    compute_capability: int
    cores: int
    shared_memory_kib: int
    l2_cache_mib: int
    clock_ghz: float


class Option(NamedTuple):
    """One option of a compiler, and why it is given."""

    name: str
    value: bool | int
    reason: str


_FUSION = "xla_tpu_enable_async_collective_fusion"
# Schedules and tiles alone: none changes what is computed, but for the order of sums. Sources:
# MaxText's benchmarks/xla_flags_library.py for TPUs, JAX-Toolbox's docs/GPU_performance.md for
# GPUs; docs/plan.md has what they bring in compiled programs.
_ASYNCHRONOUS = (
    Option(_FUSION, True, "collectives go on inside the fusions of matrix products"),
    Option(f"{_FUSION}_fuse_all_gather", True, "FSDP's weights are gathered beside products"),
    Option(f"{_FUSION}_multiple_steps", True, "one collective may go along several fusions"),
    Option("xla_tpu_overlap_compute_collective_tc", True, "the tensor core does both at a time"),
    Option("xla_enable_async_all_gather", True, "all-gathers begin before they are waited for"),
)
_TPU = (
    *_ASYNCHRONOUS,
    Option("xla_tpu_scoped_vmem_limit_kib", 98304, "larger tiles of products: less HBM traffic"),
)
_PIPELINED = "of the next layer beside this one, across iterations of the loop over layers"
_NVIDIA = (
    Option("xla_gpu_enable_pipelined_all_gather", True, f"weights {_PIPELINED}"),
    Option("xla_gpu_enable_pipelined_reduce_scatter", True, "gradients likewise"),
    Option("xla_gpu_enable_pipelined_all_reduce", True, "gradients likewise, without FSDP"),
)


class Attainable(NamedTuple):
    """The most that products of large matrices have been measured to reach, by others.

    Chips slow down where such products would take more power than they may.

    Attributes:
      bfloat16: FLOP/s.
      float8: FLOP/s; 0 = the chip has none, or nobody has published any.
      source: who measured.
      date: of the page, as year-month-day.
    """

    bfloat16: float
    float8: float
    source: str
    date: str


_MAMF = "Bekman, ml-engineering, compute/accelerator: Maximum Achievable Matmul FLOPS"
# float8: DeepGEMM's README, of an H800, which has the same tensor cores as H100 and H200; the first
# source has 1403 and 1453 TFLOP/s for those.
_HOPPER = Attainable(794.5e12, 1550e12, f"{_MAMF}; float8: DeepGEMM's README, H800", "2026-08-22")


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
      options: what the compiler of a training step is told.
      attainable: what products have been measured to reach; None = nothing was found published.
    """

    device_kinds: tuple[str, ...]
    flops: float
    memory_bytes: int
    memory_bandwidth: float
    link: float = 0
    network: float = 0
    compiler: TpuCompiler | GpuCompiler | None = None
    options: tuple[Option, ...] = ()
    attainable: Attainable | None = None

    @property
    def products(self) -> float:
        """FLOP/s of large bfloat16 products: as others have measured, else the peak."""
        return self.attainable.bfloat16 if self.attainable else self.flops

    @property
    def float8_products(self) -> float:
        """FLOP/s of large float8 products; those of bfloat16 where nothing is known of them."""
        return (
            self.attainable.float8 if self.attainable and self.attainable.float8 else self.products
        )


CHIPS = {
    "v4": Chip(("TPU v4",), 275e12, 32 * _GIB, 1.228e12),
    "v5e": Chip(
        ("TPU v5 lite",), 197e12, int(15.75 * _GIB), 0.819e12, 50e9, 3.125e9,
        TpuCompiler("v5e", 1, 2, 256, 131_072, sends_ragged=False), _TPU,
    ),
    "v5p": Chip(
        ("TPU v5", "TPU v5p"), 459e12, int(95.74 * _GIB), 2.765e12, 100e9, 6.25e9,
        TpuCompiler("v5", 2, 3, 4096, 262_144), _TPU,
    ),
    "v6e": Chip(
        ("TPU v6 lite",), 918e12, int(31.25 * _GIB), 1.64e12, 112e9, 12.5e9,
        TpuCompiler("v6e", 1, 2, 256, 524_288), _TPU,
        Attainable(728e12, 0, "yangwhale/gpu-tpu-pedia, tpu/v7_perf: device traces", "2026-02-11"),
    ),
    "a100": Chip(
        ("NVIDIA A100-SXM4-80GB",), 312e12, 85_100_000_000, 2.04e12, 300e9, 25e9,
        GpuCompiler(8, 108, 164, 40, 1.41), _NVIDIA,
        Attainable(271.2e12, 0, _MAMF, "2026-08-22"),
    ),
    "a100-40gb": Chip(("NVIDIA A100-SXM4-40GB",), 312e12, 42_400_000_000, 1.555e12),
    "h100": Chip(
        ("NVIDIA H100 80GB HBM3",), 989e12, 84_942_979_072, 3.35e12, 450e9, 50e9,
        GpuCompiler(9, 132, 228, 50, 1.98), _NVIDIA, _HOPPER,
    ),
    "h100-pcie": Chip(("NVIDIA H100 PCIe",), 756e12, 84_900_000_000, 2.0e12),
    "h200": Chip(
        ("NVIDIA H200",), 989e12, 150_700_000_000, 4.8e12, 450e9, 50e9,
        GpuCompiler(9, 132, 228, 50, 1.98), _NVIDIA, _HOPPER,
    ),
    "b200": Chip(("NVIDIA B200",), 2250e12, 191_500_000_000, 8.0e12),
}  # fmt: skip


def compilable() -> dict[str, Chip]:
    """The chips that can be compiled for where they are not present, by short name."""
    return {name: chip for name, chip in CHIPS.items() if chip.compiler}


def options(device_kind: str) -> tuple[Option, ...]:
    """What the compiler of a device is told; nothing where the device is not known."""
    return next((c.options for c in CHIPS.values() if device_kind in c.device_kinds), ())


def sends_ragged(device_kind: str) -> bool:
    """Whether `lax.ragged_all_to_all` can be compiled for slices of a kind of TPU."""
    chip = next((c for c in CHIPS.values() if device_kind in c.device_kinds), None)
    return not (chip and isinstance(chip.compiler, TpuCompiler)) or chip.compiler.sends_ragged


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
