"""How long an optimized program takes: its operations one after another, in the compiler's order.

An operation takes the longest of its FLOPs, its bytes, its transcendental elements (each at the
device's rate) and the cycles of the compiler's cost model. A collective takes its bytes over the
links that its group has; an asynchronous one runs beside what stands between its start and its
end, and of it only the rest counts. Left out on purpose: latency of links, contention between
collectives on different axes, input, and hosts. No published device reaches all of its rates at
once, so on accelerators the time is a bound from below.
"""

import collections
import dataclasses
import math

import numpy as np

from ...models import hardware
from .figures import Figure
from .program import Collective, Cost, Program


@dataclasses.dataclass(frozen=True)
class Rates:
    """What one device does in a second.

    Attributes:
      flops: matrix products, FLOP/s.
      bandwidth: bytes of main memory.
      transcendental: elements of exp, log and the like.
      strided: bytes read across rows.
      fresh: bytes of temporaries that the system hands over in pages.
      overlaps: whether these go on at one time, as on accelerators; else one after another.
      clock: cycles of the compiler's cost model; 0 = it has none.
      start: seconds that each operation costs by itself.
    """

    flops: float
    bandwidth: float
    transcendental: float = math.inf
    strided: float = math.inf
    fresh: float = math.inf
    overlaps: bool = True
    clock: float = 0
    start: float = 0


def published(chip: hardware.Chip) -> Rates:
    """What its maker says of a device, and others of how fast its products are."""
    clock = 0.0
    if isinstance(tpu := chip.compiler, hardware.TpuCompiler):
        clock = chip.flops / tpu.flops_per_cycle
    return Rates(chip.products, chip.memory_bandwidth, clock=clock)


def product_rate(chip: hardware.Chip) -> Figure:
    """FLOP/s that products of a plan go at, and whose figure that is."""
    if chip.attainable is None:
        note = "the maker's peak: no measured products were found"
    else:
        note = (
            f"measured, of a peak of {chip.flops / 1e12:g}: {chip.attainable.source}, "
            f"{chip.attainable.date}"
        )
    return Figure(chip.products, "FLOP/s", "published", note)


@dataclasses.dataclass
class Times:
    """Where the time of a step goes, on one device.

    Attributes:
      seconds: of all.
      products: seconds of matrix products and kernels.
      other: seconds of the rest that is computed.
      exposed: seconds in which nothing but communication happens, by mesh axes.
      hidden: seconds of communication beside computation, by mesh axes.
      wire: bytes that a device receives, by mesh axes.
      collectives: executions of asynchronous ones and of all.
      cost: sum of what is computed.
    """

    seconds: float = 0
    products: float = 0
    other: float = 0
    exposed: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    hidden: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    wire: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    asynchronous: int = 0
    collectives: int = 0
    cost: Cost = Cost()

    def add(self, other: "Times", times: int) -> None:
        """Another part of the program, run so many times."""
        self.seconds += times * other.seconds
        self.products += times * other.products
        self.other += times * other.other
        for mine, theirs in ((self.exposed, other.exposed), (self.hidden, other.hidden),
                             (self.wire, other.wire)):  # fmt: skip
            for axis, amount in theirs.items():
                mine[axis] += times * amount
        self.asynchronous += times * other.asynchronous
        self.collectives += times * other.collectives
        self.cost += Cost(*(times * x for x in other.cost))


class Links:
    """Seconds of collectives between the devices of a mesh.

    Args:
      mesh: whose devices, in order, the numbers of a program's groups are.
      chip: of the devices; None = communication costs nothing, as between simulated ones.
    """

    def __init__(self, mesh, chip: hardware.Chip | None):
        self.names, self.shape = mesh.axis_names, mesh.devices.shape
        self.devices, self.chip = list(mesh.devices.flat), chip
        self.coords, self.sides = None, None
        if chip and isinstance(
            chip.compiler, hardware.TpuCompiler
        ):  # GPUs have coords, of no torus
            self.coords = np.array([d.coords for d in self.devices])
            self.sides = np.ptp(self.coords, axis=0) + 1

    def axes(self, group) -> str:
        """The mesh axes along which a group lies: "fsdp", "fsdp+tensor"."""
        places = np.array(np.unravel_index(list(group), self.shape))
        far = np.ptp(places, axis=1) > 0
        return "+".join(name for name, along in zip(self.names, far, strict=True) if along)

    def seconds(self, op: Collective) -> tuple[float, float]:
        """Bytes that a device receives, and the seconds of it."""
        n = len(op.group)
        share = op.bytes * (n - 1) / n
        if op.kind == "all-reduce":
            share *= 2
        if op.kind == "collective-permute":
            share = op.bytes
        if self.chip is None or not self.chip.link:
            return share, 0.0
        return share, share / self._rate(op)

    def _rate(self, op):
        chip, group = self.chip, op.group
        assert chip is not None
        inside, islands = len(group), 1
        if isinstance(chip.compiler, hardware.TpuCompiler):
            slices = {getattr(self.devices[i], "slice_index", 0) for i in group}
            islands = len(slices)
        else:
            islands = len({i // 8 for i in group})
        inside = max(1, inside // islands)
        rate = self._torus(op) if self.coords is not None else chip.link
        if islands > 1:  # each device of an island carries its share over the network
            rate = min(rate, inside * chip.network) if inside > 1 else chip.network
        return rate

    def _torus(self, op):
        """Rings in each dimension of the torus in which the group lies, both ways around."""
        assert self.chip is not None and self.coords is not None and self.sides is not None
        assert isinstance(self.chip.compiler, hardware.TpuCompiler)
        extent = np.ptp(self.coords[list(op.group)], axis=0) + 1
        if op.kind == "collective-permute":
            return self.chip.link
        closes = 4 if self.chip.compiler.torus_dims == 3 else 16  # the shortest side with a ring
        ways = 0
        for length, side in zip(extent, self.sides, strict=True):
            if length > 1:
                ways += 2 if length == side and side % closes == 0 else 1
        rate = max(ways, 1) * self.chip.link
        if op.kind in ("all-to-all", "ragged-all-to-all"):
            # Each byte passes a quarter of a ring on its way, all links are in use.
            rate = rate * 4 / max(4, max(extent))
        return rate


def measure(program: Program, links: Links, rates: Rates, temporaries: int = 0) -> Times:
    """The time of one execution of a program.

    Args:
      temporaries: bytes of memory that it needs besides its arguments.
    """
    found = _walk(program, program.computations[program.entry], links, rates)
    found.seconds += temporaries / rates.fresh
    found.other += temporaries / rates.fresh
    return found


def _walk(program, operations, links, rates):
    found, busy, ends = Times(), 0.0, {}
    for op in operations:
        if op.code == "while":
            inner = _walk(program, program.called(op, "body"), links, rates)
            found.add(inner, program.trips(op))
        elif op.code in ("call", "conditional"):
            found.add(_branch(program, op, links, rates), 1)
        elif begun := _begun(program, ends, op):
            end, took, axes = ends.pop(begun)
            rest = min(took, max(0.0, end - found.seconds))
            found.seconds += rest
            found.exposed[axes] += rest
            found.hidden[axes] += took - rest
        elif (stage := program.stage(op))[0] == "beside":
            _compute(found, program, op, rates)
        elif collective := program.collective(op):
            axes = links.axes(collective.group)
            received, took = links.seconds(collective)
            found.wire[axes] += received
            found.collectives += 1
            starts = op.code.endswith("-start") and '"is_sync":true' not in op.rest
            if starts or stage[0] == "start":
                found.asynchronous += 1
                busy = max(busy, found.seconds) + took
                ends[stage if stage[0] else op.name] = busy, took, axes
            else:  # a fusion computes meanwhile
                computing = _compute(found, program, op, rates)
                rest = max(0.0, took - computing)
                found.seconds += rest
                found.exposed[axes] += rest
                found.hidden[axes] += took - rest
        else:
            _compute(found, program, op, rates)
    return found


def _begun(program, ends, op):
    """What stands in `ends` for the collective that an operation ends."""
    what, channel = program.stage(op)
    if what == "done":
        return ("start", channel) if ("start", channel) in ends else None
    operands = op.operands if op.code.endswith("-done") else ()
    return next((name for name in operands if name in ends), None)


def _branch(program, op, links, rates):
    """A call, or the branch that takes longest."""
    if op.code == "call":
        return _walk(program, program.called(op, "to_apply"), links, rates)
    _, _, listed = op.rest.partition("branch_computations={")
    names = listed.partition("}")[0].replace("%", "").replace(" ", "").split(",")
    names += [
        op.rest.partition(f"{key}=%")[2].partition(",")[0]
        for key in ("true_computation", "false_computation")
    ]
    branches = [program.computations[name] for name in names if name in program.computations]
    times = [_walk(program, branch, links, rates) for branch in branches]
    return max(times, key=lambda t: t.seconds, default=Times())


def _compute(found, program, op, rates):
    """Add what an operation computes; its seconds."""
    cost = program.cost(op)
    if not any(cost):
        return 0.0
    parts = (
        cost.flops / rates.flops,
        cost.bytes / rates.bandwidth,
        cost.transcendental / rates.transcendental,
        cost.strided / rates.strided,
        cost.cycles / rates.clock if rates.clock else 0.0,
    )
    seconds = rates.start + (max(parts) if rates.overlaps else sum(parts))
    found.seconds += seconds
    if cost.flops:
        found.products += seconds
    else:
        found.other += seconds
    found.cost += cost
    return seconds
