"""Memory, FLOPs and a bound on the time of one training step on devices that are not here."""

import math
import re

import jax
import jax.numpy as jnp

from ...configs.architecture import EIGHT_BITS
from ...configs.schema import Config
from ...models import hardware
from ...models.parallel import sharding
from ...models.transformer import abstract_params
from .. import ahead
from ..metrics import flops_per_token
from ..state import TrainState
from . import timing
from .figures import Figure, shown
from .program import Program


def counted(state: TrainState, batch) -> dict[str, Figure]:
    """What one device holds of a state and a batch, exactly, and of the gradient.

    Args:
      state: shapes with places, as `ahead.abstract_inputs` gives them.
    """
    of = sharding.bytes_per_device
    gradients = [
        jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding)
        for x in jax.tree.leaves(state.params)
    ]
    kinds = {
        "parameters": of(state.params),
        "frozen_parameters": of(state.frozen),
        "optimizer_state": of(state.opt_state) + of(state.step),
        "batch": of(batch),
        "gradients": of(gradients),
    }
    found = {name: Figure(n, "bytes", "counted") for name, n in kinds.items() if n}
    found["gradients"] = found["gradients"]._replace(note="float32; a part of the temporaries")
    return found


def compiled(config: Config, topology: str, state: int) -> dict[str, dict[str, Figure]]:
    """What the compiler says that one device needs, and how long its program takes.

    Args:
      state: bytes of a device's state and batch.

    Returns:
      Figures of "memory" and, unless the compiler refused the program, of "time".
    """
    devices = ahead.devices(topology)
    try:
        found = ahead.compile_step(config, devices)
    except jax.errors.JaxRuntimeError as e:
        if (needs := refused(str(e), state)) is None:
            raise
        return {"memory": {"peak": Figure(needs, "bytes", "compiled", "the compiler refused it")}}
    memory = ahead.memory(found)
    mesh = sharding.make_mesh(config.mesh, devices)
    return {
        "memory": {
            "arguments": Figure(memory.arguments, "bytes", "compiled", "state and batch"),
            "temporaries": Figure(memory.temporaries, "bytes", "compiled"),
            "program": Figure(memory.code, "bytes", "compiled"),
            "peak": Figure(memory.peak, "bytes", "compiled"),
        },
        "time": _times(config, topology, Program(found.as_text(), len(devices)), mesh),
    }


def _times(config, topology, program, mesh):
    """Figures of the time of one step, by what takes it."""
    kind = ahead.parse(topology)[1]
    chip = hardware.CHIPS.get(kind)
    rates = timing.published(chip) if chip else timing.Rates(math.inf, math.inf)
    times = timing.measure(program, timing.Links(mesh, chip), rates)
    found = {
        "matrix_flops": Figure(times.cost.flops, "FLOPs", "compiled", "loops as often as they run"),
        "memory_traffic": Figure(times.cost.bytes, "bytes", "compiled"),
        "collectives": Figure(times.collectives, "", "compiled"),
        "asynchronous": Figure(times.asynchronous, "", "compiled", "of them, beside computation"),
    }
    for axes, wire in sorted(times.wire.items()):
        found[f"received_{axes}"] = Figure(wire, "bytes", "compiled", "by a device")
    if chip is None:  # whose rates are not published
        return found
    found["product_rate"] = timing.product_rate(chip)
    found["products"] = Figure(
        times.products, "s", "modelled", "matrix products and kernels: cycles, FLOPs or traffic"
    )
    found["other"] = Figure(times.other, "s", "modelled", "what else is computed: traffic")
    for axes in sorted(times.wire):
        found[f"waiting_{axes}"] = Figure(
            times.exposed[axes], "s", "modelled",
            f"for links; {shown(times.hidden[axes], 's')} more beside computation",
        )  # fmt: skip
    tokens = config.train.batch_size * config.data.seq_len
    found["step_time"] = Figure(times.seconds, "s", "modelled", "the sum: at least this long")
    found["tokens_per_second"] = Figure(tokens / times.seconds, "", "modelled", "at most")
    if config.model.activation_dtype == "bfloat16":
        flops = flops_per_token(config.model, config.data.seq_len) * tokens / mesh.size
        share = flops / chip.flops / times.seconds
        found["mfu"] = Figure(share, "", "modelled", "model FLOPs / peak / time, at most")
    return found


def refused(message: str, state: int) -> int | None:
    """The bytes of a device that a program needs which the TPU compiler refused for its memory.

    Args:
      message: the compiler's; for any other reason than HBM the answer is None.
      state: bytes of a device's state and batch, which the compiler does not always count.
    """
    whole = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message)
    parts = re.search(r"HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds", message)
    if not (found := whole or parts):
        return None
    needs = float(found[1]) * 1024 ** " KMGT".index(found[2] or " ")
    return int(needs) if whole else int(needs + state)


def speed(config: Config, kind: str, mesh, held: int) -> dict[str, Figure]:
    """FLOPs of a step and the least time it can take.

    Args:
      kind: of device, as in `hardware.CHIPS`; another has no published peak, hence no time.
      mesh: of the devices.
      held: bytes of a device's state, which a step reads and writes.
    """
    tokens = config.train.batch_size * config.data.seq_len
    total = flops_per_token(config.model, config.data.seq_len) * tokens
    found = {
        "tokens": Figure(tokens, "", "counted"),
        "model_flops": Figure(total, "FLOPs", "modelled", "6 a parameter, causal attention halved"),
    }
    chip = hardware.CHIPS.get(kind)
    if chip is None:
        return found
    weights = _gathered_bytes(config, mesh)
    traffic = 2 * held + 2 * config.train.microbatches * weights
    found["traffic"] = Figure(
        traffic, "bytes", "modelled", "a device: state in and out, weights forward and backward"
    )
    found["time_of_traffic"] = Figure(traffic / chip.memory_bandwidth, "s", "modelled")
    least = traffic / chip.memory_bandwidth
    if config.model.activation_dtype == "bfloat16":
        flops, how = total / mesh.size / chip.products, "model FLOPs"
        if config.model.compute_dtype in EIGHT_BITS:
            # Two of three products, none of which any chip makes at more than twice its rate.
            flops, how = flops * 2 / 3, "2/3 of model FLOPs, since most are in 8 bits,"
        found["product_rate"] = timing.product_rate(chip)
        found["time_of_flops"] = Figure(flops, "s", "modelled", f"{how} / that rate")
        least = max(least, flops)
    found["least_time"] = Figure(least, "s", "modelled", "the larger of these; no step is as fast")
    return found


def _gathered_bytes(config: Config, mesh) -> int:
    """The weights that one device multiplies by, in `compute_dtype`; text alone."""
    size = jnp.dtype(config.model.activation_dtype).itemsize
    unused = ("vision", "audio") if config.model.tie_embeddings else ("vision", "audio", "embed")
    total = 0
    boxed = {k: v for k, v in abstract_params(config.model).items() if k not in unused}
    for p in jax.tree.leaves(boxed, is_leaf=lambda x: isinstance(x, sharding.Param)):
        kept = [name for name in p.names if name not in ("embed", "expert_embed")]
        parts = math.prod(sharding.parts(name, mesh) for name in kept if name is not None)
        total += math.prod(p.value.shape) * size // parts
    return total


def advice(config: Config, mesh, lacking: int, held: int, limit: int) -> str:
    """What to change so that a step that lacks so many bytes a device may fit.

    Args:
      held: bytes of a device's state and gradient.
    """
    found, replicas = [], mesh.shape["data"]
    least = held / replicas
    rest = max(0, limit + lacking - held)  # activations, the same for each row a device
    if held - least > lacking / 10:
        fsdp = mesh.shape["fsdp"] * replicas
        found.append(
            f"--config.mesh.data=1 --config.mesh.fsdp={fsdp} (state and gradient "
            f"{shown(held, 'bytes')} -> {shown(least, 'bytes')})"
        )
    if rest and config.model.remat != "full":
        found.append("--config.model.remat=full")
    parts = config.train.microbatches
    rows = config.train.batch_size // parts // sharding.parts("batch", mesh)
    if held < limit and rows > 1:
        times = 2
        while 2 * times <= rows and held + rest / times > limit:
            times *= 2
        found.append(f"--config.train.microbatches={parts * times}")
    if rest < limit < least + rest:
        times = 2
        while least / times + rest > limit:
            times *= 2
        found.append(f"{times * mesh.size} devices under fsdp, as many rows each")
    return ", or ".join(found) or "a smaller model or shorter rows"
