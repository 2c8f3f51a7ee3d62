"""Compile the real training step for hardware that is not here, and read off its memory.

    devices = ahead.devices("v5p-256")
    compiled = ahead.compile_step(config, devices)
    ahead.memory(compiled).peak

The TPU compiler comes with the `libtpu` wheel and the GPU compiler with JAX's CUDA plugin; both
work where there is neither. They give the program that the hardware would run; `train/plan` models
from it the time that a step takes.
"""

import contextlib
import dataclasses
import importlib.util
import os
import re

import jax
import numpy as np
from jax.experimental import topologies

from ..configs import schema
from ..configs.errors import UserError
from ..models import hardware
from ..models.hardware import Chip, TpuCompiler
from ..models.parallel import sharding
from ..models.transformer import Transformer, abstract_params
from . import objectives
from .optimizer import make_optimizer
from .state import TrainState, abstract_state
from .step import check_batch, make_train_step

# libtpu looks for a TPU machine around it, and for other processes that hold its chips, when it is
# loaded; a compiler needs neither.
_NO_TPU_MACHINE = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def devices(topology: str) -> list:
    """Devices that can be compiled for and not run on.

    Args:
      topology: a slice as Google names it ("v5p-256", "v6e-64"), several of them over the
        data-centre network ("2xv5p-256"), GPUs in nodes of eight ("h100-8"), or this machine's CPU
        as simulated devices ("cpu-8").

    Raises:
      UserError: no such topology, or its compiler is not installed.
    """
    slices, kind, _ = parse(topology)
    number = count(topology)
    if kind == "cpu":
        return _cpus(topology, number)
    chip = hardware.compilable()[kind]
    if isinstance(chip.compiler, TpuCompiler):
        return _tpus(topology, chip.compiler, slices, number // slices)
    return _gpus(topology, chip, number)


def count(topology: str) -> int:
    """How many devices a topology has; asks no compiler.

    Raises:
      UserError: there is none of that kind and size.
    """
    slices, kind, number = parse(topology)
    chip = hardware.compilable().get(kind)
    if chip is None:
        return number
    if not isinstance(tpu := chip.compiler, TpuCompiler):
        if number > 8 and number % 8:
            raise UserError(f"--topology={topology} must have at most 8 GPUs or a multiple of 8")
        return number
    chips, odd = divmod(number, tpu.cores_per_chip)
    if odd or chips.bit_count() != 1 or not 4 <= chips <= tpu.most_chips:
        most = tpu.most_chips * tpu.cores_per_chip
        raise UserError(
            f"--topology={topology} must count a power of two from {4 * tpu.cores_per_chip} "
            f"to {most}"
        )
    return slices * chips


def parse(topology: str) -> tuple[int, str, int]:
    """The slices, the kind of device and the number in the name of a topology.

    Raises:
      UserError: there is no such kind.
    """
    found = re.fullmatch(r"(?:([1-9]\d*)x)?([a-z]\w*)-([1-9]\d*)", topology)
    slices, kind, count = found.groups() if found else ("", "", "")
    slices, count = int(slices or 1), int(count or 0)
    chips = hardware.compilable()
    several = kind in chips and isinstance(chips[kind].compiler, TpuCompiler)
    if kind in (*chips, "cpu") and (slices == 1 or several):
        return slices, kind, count
    raise UserError(
        f"--topology={topology} must be one of {', '.join((*chips, 'cpu'))} with a number, "
        "such as v5p-256, 2xv5p-256, h100-8 or cpu-8"
    )


def require(topology: str) -> None:
    """Ask for the compiler of a topology without loading it.

    Raises:
      UserError: there is no such topology, or its compiler is not installed.
    """
    chip = hardware.compilable().get(parse(topology)[1])
    if chip and isinstance(chip.compiler, TpuCompiler):
        _require("libtpu", topology, "tpu")
    elif chip:
        _require("jax_cuda12_plugin", topology, "cuda")


def _cpus(topology, count):
    """Devices that run, too: as many as are asked for if JAX has not begun, else what is there."""
    with contextlib.suppress(RuntimeError):  # it has begun
        jax.config.update("jax_num_cpu_devices", count)
    found = jax.devices("cpu")
    if len(found) < count:
        raise UserError(
            f"--topology={topology} must not be more than the {len(found)} CPU devices of this "
            f"process; set XLA_FLAGS=--xla_force_host_platform_device_count={count} before it"
        )
    return found[:count]


def _tpus(topology, tpu: TpuCompiler, slices, chips):
    require(topology)
    dims, power = tpu.torus_dims, chips.bit_length() - 1
    sides = [2 ** ((power + i) // dims) for i in range(dims)]
    if chips == 4 and dims == 3:
        sides = [2, 2, 1]
    name = f"{tpu.name}:{'x'.join(map(str, sides))}"
    with _environment(**_NO_TPU_MACHINE):
        found = topologies.get_topology_desc(name, "tpu", num_slices=slices)
    return list(found.devices)


@contextlib.contextmanager
def _environment(**variables: str):
    """Variables of this process, set for a while."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _gpus(topology, chip: Chip, count):
    require(topology)
    nodes, each = (1, count) if count <= 8 else (count // 8, 8)
    found = topologies.get_topology_desc(
        "", "cuda", target_config=_target(chip), topology=f"1x{nodes}x{each}"
    )
    return list(found.devices)


def _target(chip: Chip) -> str:
    """XLA's description of a GPU, a text proto of `stream_executor.GpuTargetConfigProto`."""
    gpu, name = chip.compiler, chip.device_kinds[0]
    assert isinstance(gpu, hardware.GpuCompiler)
    shared = gpu.shared_memory_kib * 1024
    return f"""
        platform_name: "CUDA"
        device_description_str: "{name}"
        dnn_version_info {{ major: 9 minor: 10 patch: 2 }}
        gpu_device_info {{
          name: "{name}"
          device_vendor: "NVIDIA Corporation"
          cuda_compute_capability {{ major: {gpu.compute_capability} minor: 0 }}
          core_count: {gpu.cores}
          fpus_per_core: {128 if gpu.compute_capability >= 9 else 64}
          clock_rate_ghz: {gpu.clock_ghz}
          device_memory_size: {chip.memory_bytes}
          memory_bandwidth: {int(chip.memory_bandwidth)}
          l2_cache_size: {gpu.l2_cache_mib * 2**20}
          shared_memory_per_block: {48 * 1024}
          shared_memory_per_block_optin: {shared - 1024}
          shared_memory_per_core: {shared}
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
          threads_per_warp: 32
          threads_per_block_limit: 1024
          threads_per_core_limit: 2048
          thread_dim_limit_x: 1024
          thread_dim_limit_y: 1024
          thread_dim_limit_z: 64
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
          device_address_bits: 64
        }}"""


def _require(module, topology, extra):
    if importlib.util.find_spec(module) is None:
        raise UserError(
            f"--topology={topology} needs its compiler, {module}: pip install 'puna[{extra}]'"
        )


def memory_limit(topology: str) -> int:
    """Bytes that one device of a topology has; of simulated ones, their share of this machine's.

    JAX takes three quarters of a GPU's, unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
    """
    _, kind, count = parse(topology)
    if kind == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // count
    return hardware.CHIPS[kind].memory_bytes


def compile_step(config: schema.Config, devices: list) -> jax.stages.Compiled:
    """The training step of `loop.train`, compiled for `devices`, with text alone in its batch.

    Raises:
      ConfigError: the mesh of the configuration does not fit the devices.
      jax.errors.JaxRuntimeError: the compiler's own verdict, "RESOURCE_EXHAUSTED" if it does
        not fit a TPU's memory.
    """
    return lower_step(config, devices).compile()


def lower_step(config: schema.Config, devices: list) -> jax.stages.Lowered:
    """The first half of `compile_step`: traced and lowered, not yet compiled."""
    mesh = sharding.make_mesh(config.mesh, devices)
    tx, objective = _parts(config)
    state, batch = abstract_inputs(config, mesh)
    step = make_train_step(config, Transformer(config.model), tx, objective, state)
    # Not `jax.set_mesh`: every constant made while tracing would be put on devices that are not
    # there. The default device tells kernels which hardware they are for.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), jax.default_device(devices[0]):
        return step.lower(state, batch)


def abstract_inputs(config: schema.Config, mesh) -> tuple[TrainState, dict]:
    """The state and the batch of the step: shapes, dtypes and places, on any kind of mesh.

    Raises:
      ConfigError: the batch does not divide.
    """
    check_batch(config, mesh)
    tx, objective = _parts(config)
    return abstract_state(config, tx, mesh, objective), objective.abstract_batch(config, mesh)


def _parts(config):
    objective = objectives.make(config, np.ones(config.model.vocab_size, np.int32))
    tx = make_optimizer(config, abstract_params(config.model), objective.added(config))
    return tx, objective


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device: what a compiled step takes, gives, and needs in between.

    The state is an argument and an output in the same place, hence `aliased`. `peak` is the most
    at any one time, arguments included, where the compiler says; else the sum. (That of CPUs says
    it without the temporaries, which a CPU has all at once.)
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    peak: int


def memory(compiled: jax.stages.Compiled) -> Memory:
    """What one device needs for a compiled step."""
    m = compiled.memory_analysis()
    assert m is not None
    total = (
        m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
        + m.temp_size_in_bytes + m.generated_code_size_in_bytes
    )  # fmt: skip
    place = jax.tree.leaves(compiled.input_shardings)[0]
    told = 0 if next(iter(place.device_set)).platform == "cpu" else m.peak_memory_in_bytes
    return Memory(
        m.argument_size_in_bytes, m.output_size_in_bytes, m.alias_size_in_bytes,
        m.temp_size_in_bytes, m.generated_code_size_in_bytes, told or total,
    )  # fmt: skip
