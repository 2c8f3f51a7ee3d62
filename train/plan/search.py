"""Meshes, recomputation and microbatches that fit: arithmetic ranks them, the compiler decides.

The arithmetic takes milliseconds a candidate and is rough: what it says of activations is
corrected by what the compiler has said of the candidates before. Left out on purpose: pipelines,
whose stages have to be written into the model's config, other optimizers, and offloading.
"""

import concurrent.futures
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator

from ...configs.errors import ConfigError
from ...configs.schema import Config, MeshConfig
from ...models import hardware
from ...models.parallel import sharding
from .. import ahead
from ..metrics import flops_per_token
from . import bound
from .confirm import Compiled

# What recomputation costs beside forward and backward, as a share of both; scores of attention are
# computed again even under "dots".
_RECOMPUTED = {"none": 0.0, "dots": 0.1, "full": 1 / 3}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way to run a step.

    Attributes:
      mesh: devices along each axis that splits anything.
      remat: as `model.remat`.
      microbatches: as `train.microbatches`.
      state: bytes of parameters, optimizer, gradient: counted from shapes.
      activations: bytes of the rest, by a formula.
      seconds: of a step, by a formula; 0 = of a device whose rates are not published.
      peak: bytes that the compiler says, 0 = not asked.
      step: seconds of the compiled program.
      refused: whether the compiler refused it.
    """

    mesh: tuple[tuple[str, int], ...]
    remat: str
    microbatches: int
    state: int
    activations: int
    seconds: float
    peak: int = 0
    step: float = 0.0
    refused: bool = False

    @property
    def needs(self) -> int:
        """Bytes of a device: what the compiler says, else the formula."""
        return self.peak or self.state + self.activations

    @property
    def flags(self) -> str:
        """What to put on the command line."""
        keys = [f"--config.mesh.{axis}={size}" for axis, size in self.mesh]
        keys += [f"--config.model.remat={self.remat}"]
        return " ".join([*keys, f"--config.train.microbatches={self.microbatches}"])

    def apply(self, config: Config) -> Config:
        """The configuration with this mesh, remat and microbatches."""
        mesh = MeshConfig(**dict.fromkeys(sharding.AXES, 1) | dict(self.mesh))
        return dataclasses.replace(
            config, mesh=mesh, model=dataclasses.replace(config.model, remat=self.remat),
            train=dataclasses.replace(config.train, microbatches=self.microbatches),
        )  # fmt: skip


def least_state(config: Config) -> int:
    """Bytes of parameters, optimizer and gradient of all devices together."""
    leaves, share = _state(config)
    return int(sum(p.value.size * (p.value.dtype.itemsize * share + 4) for p in leaves))


def _state(config):
    """The parameters, and bytes of parameters and optimizer for each byte of parameters."""
    leaves = bound.parameters(config.model)
    alone = dataclasses.replace(
        config, mesh=MeshConfig(data=1),
        train=dataclasses.replace(config.train, microbatches=1),
    )  # fmt: skip
    state, _ = ahead.abstract_inputs(alone, sharding.abstract_mesh(alone.mesh, 1))
    held = sharding.bytes_per_device
    parameters = held((state.params, state.frozen))
    return leaves, held((state.params, state.frozen, state.opt_state)) / parameters


def candidates(config: Config, topology: str) -> list[Candidate]:
    """All that the batch and the shapes allow, the fastest by arithmetic first."""
    count, slices = ahead.count(topology), ahead.parse(topology)[0]
    chip = hardware.CHIPS.get(ahead.parse(topology)[1])
    leaves, share = _state(config)
    found = []
    for sizes in _meshes(config, count // slices):
        sizes |= {"slices": slices}
        mesh = sharding.abstract_mesh(MeshConfig(**sizes), count)
        try:
            for leaf in leaves:
                sharding.resolve("parameter", leaf.value.shape, leaf.names, mesh)
        except ConfigError:
            continue
        split = {axis: n for axis, n in sizes.items() if n > 1 or axis == "data"}
        rows = config.train.batch_size // sharding.parts("batch", mesh)
        if rows * sharding.parts("batch", mesh) != config.train.batch_size:
            continue
        length = config.data.seq_len
        if sizes["context"] > 1 and length % (2 * sizes["context"]):
            continue
        held = sum(bound.part(leaf, mesh) * leaf.value.dtype.itemsize for leaf in leaves)
        gradients = sum(bound.part(leaf, mesh) * 4 for leaf in leaves)
        for remat, power in itertools.product(_RECOMPUTED, range(rows.bit_length())):
            parts = 2**power
            if rows % parts:
                continue
            saved = _activations(config, mesh, remat, rows // parts)
            seconds = _seconds(config, mesh, remat, parts, leaves, chip)
            found.append(
                Candidate(
                    tuple(split.items()),
                    remat,
                    parts,
                    int(held * share + gradients * (2 if parts > 1 else 1)),
                    int(saved),
                    seconds,
                )  # fmt: skip
            )
    return sorted(
        found, key=lambda c: (c.seconds, c.microbatches, _RECOMPUTED[c.remat], c.state, c.mesh)
    )


def search(
    config: Config, topology: str, limit: int, *, budget: float, wanted: int = 3,
    compiler: Callable[[Config, str, float], Compiled | None] | None = None,
    tell: Callable[[str], None] = lambda line: None, workers: int = 1,
) -> list[Candidate]:  # fmt: skip
    """Ask the compiler about the best few candidates, within a time.

    Args:
      limit: bytes of a device.
      budget: seconds for all compiles.
      wanted: candidates that fit, after which to stop.
      compiler: as `confirm.confirm`; None = arithmetic alone.
      tell: gets a line before each compile.
      workers: compiles at a time; what one says corrects the arithmetic for those after them.

    Returns:
      Candidates: those that the compiler has seen, the fastest that fit first, then the others by
      arithmetic. Empty if the batch does not divide over the devices in any way.
    """
    waiting, seen = candidates(config, topology), []
    if compiler is None:
        return sorted(waiting, key=lambda c: (c.state + c.activations > limit, c.seconds))
    corrected: dict[str, float] = {}
    end = time.monotonic() + budget
    while waiting and sum(_fits(c, limit) for c in seen) < wanted:
        left, chosen = end - time.monotonic(), []
        scale = max(corrected.values(), default=1.0)
        more = wanted - sum(_fits(c, limit) for c in seen)
        while left > 0 and len(chosen) < min(workers, more):
            one = _next(waiting, limit, corrected, scale, seen + chosen)
            if one is None:
                break
            tell(f"compiling {one.flags} ({len(seen + chosen) + 1}, {left:.0f} s left)")
            waiting.remove(one)
            chosen.append(one)
        if not chosen:
            break
        with concurrent.futures.ThreadPoolExecutor(len(chosen)) as pool:  # each has a process
            tasks = [pool.submit(compiler, c.apply(config), topology, left) for c in chosen]
        late = False
        for one, task in zip(chosen, tasks, strict=True):
            if (told := task.result()) is None:
                waiting.append(one)
                late = True
                continue
            peak = int(told["memory"]["peak"].value)
            step = told.get("time", {}).get("step_time")
            seen.append(dataclasses.replace(
                one, peak=peak, step=step.value if step else 0.0, refused="time" not in told
            ))  # fmt: skip
            rest = max(peak - one.state, 1) / max(one.activations, 1)
            corrected[one.remat] = max(corrected.get(one.remat, 0), rest)
        if late:
            tell("no time left")
            break
    seen.sort(key=lambda c: (not _fits(c, limit), c.step or c.seconds, c.peak))
    scale = min(1.0, max(corrected.values(), default=1.0))

    def too_large(c):
        return c.state + c.activations * corrected.get(c.remat, scale) > limit

    return seen + sorted(waiting, key=lambda c: (too_large(c), c.seconds))


def _fits(c: Candidate, limit):
    return c.peak <= limit and not c.refused


def _next(waiting, limit, corrected, scale, seen):
    """The fastest that should fit; once nothing should and nothing did, the smallest."""

    def needs(c):
        return c.state + c.activations * corrected.get(c.remat, min(scale, 1.0))

    for c in waiting:
        if needs(c) <= limit:
            return c
    if seen:  # the nearest has been asked about
        return None
    return min(waiting, key=needs, default=None)


def _meshes(config, devices) -> Iterator[dict[str, int]]:
    """Sizes of all axes of a slice, powers of two, one of them for what is left."""
    experts = config.model.num_experts or 1
    for fsdp, expert, tensor, context in itertools.product(
        _powers(devices), _powers(min(devices, experts)), _powers(min(devices, 16)),
        _powers(min(devices, max(1, config.data.seq_len // 8192))),
    ):  # fmt: skip
        rest, odd = divmod(devices, fsdp * expert * tensor * context)
        if not odd:
            sizes = {"pipeline": 1, "data": rest, "fsdp": fsdp}
            yield sizes | {"expert": expert, "context": context, "tensor": tensor}


def _powers(most):
    return [2**i for i in range(most.bit_length())]


def _activations(config, mesh, remat, rows):
    """Bytes of one device: what layers save, one layer's own, its weights, and the logits.

    Widths of one token in one layer: the residual; results of products under "dots"; norms,
    rotations and activation functions besides under "none".
    """
    m = config.model
    tokens = rows * config.data.seq_len // mesh.shape["context"]
    heads = (m.num_heads + 2 * m.num_kv_heads) * m.head_dim
    hidden = 3 * m.mlp_dim * max(1, m.experts_per_token if m.num_experts else 1)
    products = heads + m.num_heads * m.head_dim + hidden + m.embed_dim
    widths = {"full": m.embed_dim, "dots": 2 * m.embed_dim + products,
              "none": 6 * m.embed_dim + 2 * products}  # fmt: skip
    size = 2 if m.activation_dtype == "bfloat16" else 4
    tensor = mesh.shape["tensor"]
    layers = m.num_layers // mesh.shape["pipeline"]
    saved = (layers * widths[remat] + 2 * widths["none"]) * tokens * size // tensor
    logits = 3 * 4 * min(config.train.loss_chunk, tokens) * m.vocab_size // tensor
    table = 6 * m.vocab_size * m.embed_dim // tensor  # gathered, and its gradient
    return saved + logits + table


def _seconds(config, mesh, remat, parts, leaves, chip):
    """Of one step: matrix products, then collectives one after another."""
    if chip is None:
        return 0.0
    c = dataclasses.replace(config, train=dataclasses.replace(config.train, microbatches=parts))
    tokens = config.train.batch_size * config.data.seq_len
    flops = flops_per_token(config.model, config.data.seq_len) * tokens / mesh.size
    sent = bound.collectives(c, mesh, leaves, chip, bound.AGAIN[remat][0])
    return flops * (1 + _RECOMPUTED[remat]) / chip.products + sum(sent.values())
