"""What an optimized program does: operations, FLOPs, bytes and collectives, read from its HLO text.

XLA's own cost analysis counts the body of a loop once and says nothing of Pallas kernels; here a
loop counts as often as it runs. Of the TPU compiler's `estimated_cycles` only those are read that
come from its cost model: those of elementwise fusions carry no model's name and are about three
times what their traffic needs. Left out on purpose: caches, and operations that only move pointers.
"""

import dataclasses
import math
import re
from typing import NamedTuple

import numpy as np

_BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "c64": 64, "c128": 128, "bf16": 16}
# Nothing is computed or moved.
_FREE = frozenset(
    ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id",
     "replica-id", "iota", "optimization-barrier", "add-dependency", "reshape", "domain")
)  # fmt: skip
_COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip
_TRANSCENDENTAL = frozenset(
    ("exponential", "exponential-minus-one", "log", "log-plus-one", "tanh", "logistic", "power",
     "cosine", "sine", "erf", "rsqrt", "sqrt")
)  # fmt: skip


class Op(NamedTuple):
    """One instruction as the text has it."""

    name: str
    type: str
    code: str
    operands: tuple[str, ...]
    rest: str  # what follows the operands: attributes


class Cost(NamedTuple):
    """What one execution of an operation takes.

    Attributes:
      flops: of matrix products, 2 a multiply-add; 1 of two operands of 8 bits, which no published
        device multiplies at more than twice its rate.
      bytes: read from and written to the device's main memory.
      transcendental: elements of exp, log, sqrt and the like.
      strided: bytes read across the rows of what they lie in, to transpose it.
      cycles: of the compiler's cost model; 0 where it has none.
    """

    flops: float = 0
    bytes: float = 0
    transcendental: float = 0
    strided: float = 0
    cycles: float = 0

    def __add__(self, other):
        return Cost(*(a + b for a, b in zip(self, other, strict=True)))


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective.

    Attributes:
      kind: "all-gather", ...; "reduce-scatter" also where the compiler has fused one.
      bytes: of the larger of what one device gives and gets.
      group: numbers of the devices of the first group, in the order of the mesh.
    """

    kind: str
    bytes: float
    group: tuple[int, ...]


class Program:
    """Computations by name, each a list of operations in the order in which they run.

    Args:
      text: `compiled.as_text()`.
      devices: how many run it.
    """

    def __init__(self, text: str, devices: int):
        self.devices = devices
        self.computations: dict[str, list[Op]] = {}
        self.entry = ""
        self._costs: dict[str, Cost] = {}
        body: list[Op] = []
        for line in _lines(text):
            if line.startswith(("%", "ENTRY")):
                name = line.removeprefix("ENTRY ").removeprefix("%").split(" ")[0]
                body = self.computations[name] = []
                if line.startswith("ENTRY"):
                    self.entry = name
            elif op := _parse(line):
                body.append(op)
        self.types = {op.name: op.type for ops in self.computations.values() for op in ops}

    def called(self, op: Op, attribute="calls") -> list[Op]:
        """The computation that an operation names."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", op.rest)
        return self.computations.get(found[1], []) if found else []

    def trips(self, loop: Op) -> int:
        """How often a `while` runs; 1 where nothing says."""
        if found := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(found[1])
        # `i < n` with i from 0, as `lax.scan` makes it.
        ends = [
            int(found[1])
            for op in self.called(loop, "condition")
            if op.code == "constant" and (found := re.match(r"(\d+)\)", op.rest))
        ]
        return max(ends, default=1)

    def collective(self, op: Op) -> Collective | None:
        """The collective that an operation is, begins, or has inside."""
        kind = op.code.removesuffix("-start")
        if kind in _COLLECTIVES:
            given = sum(size(self.types.get(name, "")) for name in op.operands)
            # A start has its operands and its results in one tuple.
            got = size(op.type, every=True)
            if op.code != kind and kind in ("all-gather", "collective-permute"):
                got -= given
            group = _group(op.rest, self.devices)
            return Collective(kind, max(given, got), group) if len(group) > 1 else None
        if op.code in ("fusion", "async-start"):
            inside = self.called(op)
            for inner in inside:
                if found := self.collective(inner):
                    cut = inner.code == "all-reduce" and any(
                        x.code == "dynamic-slice" and inner.name in x.operands for x in inside
                    )
                    return dataclasses.replace(found, kind="reduce-scatter") if cut else found
        return None

    def stage(self, op: Op) -> tuple[str, str]:
        """What a fusion does to a TPU's collective that goes on inside of fusions.

        Returns:
          "start", "done", or "beside" for products while it goes on, and its channel; else "", "".
        """
        inside = self.called(op) if op.code == "fusion" else []
        for inner in inside:
            if inner.code in _COLLECTIVES and '"async_collective_fusion_config"' in inner.rest:
                targets = "".join(x.rest for x in inside if x.code == "custom-call")
                found = re.search(r'="AsyncCollective(Start|Done)"', targets)
                channel = re.search(r"\bchannel_id=(\d+)", inner.rest)
                return found[1].lower() if found else "beside", channel[1] if channel else ""
        return "", ""

    def cost(self, op: Op) -> Cost:
        """Of one execution, without the computations of loops, calls and branches."""
        if op.code in _FREE or op.code.endswith(("-start", "-done")):
            return Cost()
        if op.name not in self._costs:
            self._costs[op.name] = self._cost(op)
        return self._costs[op.name]

    def _cost(self, op):
        moved = self._bytes(op)
        if op.code == "custom-call":
            return Cost(_kernel_flops(self, op) / (2 if self._is_narrow(op) else 1), moved)
        if op.code != "fusion":
            return self._inner(op)._replace(bytes=moved)
        inside = Cost()
        for inner in self.called(op):
            inside += self._inner(inner)
        model = re.search(r'"cost_model_type":"COST_MODEL_TYPE_(\w+)"', op.rest)
        cycles = re.search(r'"estimated_cycles":"(\d+)"', op.rest)
        if cycles and model and model[1] != "INVALID":
            inside = inside._replace(cycles=int(cycles[1]))
        return inside._replace(bytes=moved)

    def _inner(self, op):
        """FLOPs and transcendental elements of an operation, inside a fusion or not."""
        if op.code in ("dot", "convolution"):
            flops = (_dot_flops if op.code == "dot" else _convolution_flops)(self, op)
            return Cost(flops / 2 if self._is_narrow(op) else flops)
        if op.code in _TRANSCENDENTAL:
            return Cost(transcendental=_elements(op.type))
        if op.code in ("copy", "transpose") and _turns(self, op):
            return Cost(strided=size(op.type, every=True))
        if op.code == "fusion":
            return sum((self._inner(inner) for inner in self.called(op)), Cost())
        return Cost()

    def _is_narrow(self, op):
        """Whether the last two operands, those that are multiplied, are of 8 bits."""
        kinds = [self.types.get(x, "") for x in op.operands[-2:]]
        return len(kinds) == 2 and all(re.match("f8|s8|u8", kind) for kind in kinds)

    def _bytes(self, op):
        """Main memory that an operation reads and writes; slices count as what they take."""
        inside = {x.name: x for x in self.called(op)} if op.code == "fusion" else {}
        if not inside:
            if op.code == "dynamic-update-slice":
                return 2 * size(self.types.get(op.operands[1], ""))
            if op.code in ("dynamic-slice", "slice", "gather"):
                return 2 * size(op.type)
            return size(op.type) + sum(size(self.types.get(x, "")) for x in op.operands)
        numbered = _numbered(inside)
        total = 0.0
        for i, name in enumerate(op.operands):
            whole = size(self.types.get(name, ""))
            total += min(whole, self._read(numbered[i], inside)) if i in numbered else whole
        return total + self._written(op, inside)

    def _read(self, parameter, inside):
        """Bytes of a fusion's parameter that are read; none of what is only handed on."""
        users = [x for x in inside.values() if parameter.name in x.operands]
        while len(users) == 1 and users[0].code in ("bitcast", "reshape"):
            parameter = users[0]
            users = [x for x in inside.values() if parameter.name in x.operands]
        read = 0.0
        for x in users:
            if x.code in ("dynamic-slice", "slice", "gather"):
                read += size(x.type, every=True)
            elif x.code == "fusion":
                nested = {y.name: y for y in self.called(x)}
                numbered = _numbered(nested)
                read += sum(
                    self._read(numbered[i], nested) if i in numbered else math.inf
                    for i, name in enumerate(x.operands)
                    if name == parameter.name
                )
            elif x.code == "dynamic-update-slice" and x.operands[0] == parameter.name:
                continue
            elif x.code != "tuple" and x.code not in _COLLECTIVES:
                return math.inf
        return read

    def _written(self, op, inside):
        """Bytes that a fusion writes: of an update in place the update alone."""
        root = list(inside.values())[-1]
        if root.code != "tuple":
            return self._result(root, op.type, inside)
        parts = re.findall(r"\w+\[[^\]]*\](?:\{[^}]*\})?", op.type)
        return sum(
            self._result(inside[name], part, inside)
            for name, part in zip(root.operands, parts, strict=False)
            if name in inside
        )

    def _result(self, root, kind, inside):
        while root.code in ("bitcast", "reshape") and root.operands[0] in inside:
            root = inside[root.operands[0]]
        if root.code == "parameter" or root.code in _COLLECTIVES:
            return 0.0  # handed on; a collective has bytes of its own
        if root.code == "dynamic-update-slice" and root.operands[1] in inside:
            return size(inside[root.operands[1]].type, every=True)
        return size(kind)


def _numbered(inside):
    """A computation's parameters by their number."""
    return {
        int(found[1]): x
        for x in inside.values()
        if x.code == "parameter" and (found := re.match(r"(\d+)\)", x.rest))
    }


def _lines(text):
    """Lines of instructions; those that a quoted attribute breaks are joined."""
    begun = ""
    for line in text.splitlines():
        starts = line.startswith(("%", "ENTRY", "}")) or re.match(r"  (ROOT )?%?[\w.\-]+ = ", line)
        if starts:
            if begun:
                yield re.sub(r"/\*.*?\*/", "", begun)
            begun = "" if line.startswith("}") else line
        elif begun:
            begun += line
    if begun:
        yield re.sub(r"/\*.*?\*/", "", begun)


def _parse(line):
    found = re.match(r"  (?:ROOT )?%?([\w.\-]+) = ", line)
    if not found:
        return None
    name, line = found[1], line[found.end() :]
    end = _close(line, 0) + 1 if line.startswith("(") else line.index(" ")
    kind, line = line[:end], line[end:].lstrip()
    code, _, line = line.partition("(")
    if code in ("parameter", "constant"):
        return Op(name, kind, code, (), line)
    end = _close("(" + line, 0) - 1
    return Op(name, kind, code, tuple(re.findall(r"%([\w.\-]+)", line[:end])), line[end + 1 :])


def _close(text, start):
    """Where the bracket at `start` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    raise ValueError(f"no end of the bracket in {text[:80]}")


def _arrays(kind, every=False):
    """Dtypes and dims of a type; without those that do not lie in main memory."""
    for dtype, dims, layout in re.findall(r"(\w+)\[([\d,<=]*)\](\{[^}]*\})?", kind):
        if every or "S(" not in layout:
            yield dtype, [int(x.strip("<=")) for x in dims.split(",") if x]


def size(kind: str, every: bool = False) -> float:
    """Bytes of a type; `every` counts also what lies in a TPU's fast memory."""
    total = 0.0
    for dtype, dims in _arrays(kind, every):
        if bits := _BITS.get(dtype) or (found := re.search(r"(\d+)", dtype)) and int(found[1]):
            total += math.prod(dims) * bits / 8
    return total


def _elements(kind):
    return sum(math.prod(dims) for _, dims in _arrays(kind, every=True))


def _dims(program, name):
    return next((dims for _, dims in _arrays(program.types.get(name, ""), every=True)), [])


def _turns(program, op):
    """Whether neighbours in the result of a copy or transpose are none in the operand."""
    orders = []
    for kind in (program.types.get(op.operands[0], ""), op.type):
        dims = next((d for _, d in _arrays(kind, every=True)), [])
        found = re.search(r"\]\{([\d,]+)", kind)
        order = [int(i) for i in found[1].split(",")] if found else []
        orders.append([i for i in order if dims[i] > 1])
    if not all(orders):
        return False
    taken, given = orders[0][0], orders[1][0]
    if op.code == "transpose":
        turned = re.findall(r"dimensions=\{([\d,]+)\}", op.rest)[0]
        given = int(turned.split(",")[given])
    return taken != given


def _dot_flops(program, op):
    lhs = _dims(program, op.operands[0])
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.rest)
    kept = [int(i) for i in found[1].split(",") if i] if found else []
    return 2 * _elements(op.type) * math.prod(lhs[i] for i in kept)


def _convolution_flops(program, op):
    """The pairs of a window and a position that lie inside the input, times the features."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.rest)
    lhs, rhs = (_dims(program, name) for name in op.operands[:2])
    out = next(dims for _, dims in _arrays(op.type, every=True))
    if not labels:
        return 0
    told = re.search(r"window=\{([^}]*)\}", op.rest)
    pairs = re.findall(r"(\w+)=([\d_x\-]+)", told[1] if told else "")
    window = {name: value.split("x") for name, value in pairs}
    features, inputs = labels[3].index("f"), labels[2].index("i")
    flops = 2 * out[features] * out[labels[3].index("b")] * rhs[inputs]
    for i, label in enumerate(sorted(x for x in labels[3] if x.isdigit())):
        length, kernel = lhs[labels[1].index(label)], rhs[labels[2].index(label)]
        low = int(window["pad"][i].split("_")[0]) if "pad" in window else 0
        stride, dilated, apart = (
            int(window[name][i]) if name in window else 1
            for name in ("stride", "lhs_dilate", "rhs_dilate")
        )
        k, o = np.meshgrid(np.arange(kernel), np.arange(out[labels[3].index(label)]))
        inner, gap = np.divmod(o * stride + k * apart - low, dilated)
        flops *= int(np.sum((gap == 0) & (inner >= 0) & (inner < length)))
    return flops


def _kernel_flops(program, op):
    """FLOPs of a kernel that the compiler does not look into, from the shapes it is called with.

    Splash attention has the table of its blocks [heads, query blocks, most key blocks] as the
    first operands; of those about half are masked where attention is causal. 2 products forward,
    5 in the fused backward pass (3 of dQ and 4 of dK and dV apart). megablox multiplies every row
    once, as do our kernels for GPUs. cuBLAS says what it contracts.
    """
    shapes = [_dims(program, name) for name in op.operands]
    if "__cublas" in op.rest:
        found = re.search(r'"lhs_contracting_dimensions":\["(\d+)"', op.rest)
        out = max((math.prod(d) for _, d in _arrays(op.type, every=True)), default=0)
        return 2 * out * shapes[0][int(found[1])] if found else 0
    is_ours = "/grouped_" in op.rest and "triton" in op.rest
    if "tpu_custom_call" not in op.rest and not is_ours:
        return 0
    if "splash" in op.name:
        table = next((x for x in shapes if len(x) == 3), [1, 1, 1])
        q = next(x for x in shapes[2:] if len(x) == 3)
        k = next(x for x in shapes[3:] if len(x) == 3)
        seen = min(1, table[2] / max(table[1], 1)) * k[1] / 2
        products = 5 if "dkv" in op.name else 3 if "dq" in op.name else 2
        return 2 * products * q[0] * q[1] * q[2] * seen
    matrices = [x for x in shapes if len(x) >= 2]
    out = next((d for _, d in _arrays(op.type, every=True)), [])
    if ("gmm" in op.name or is_ours) and len(matrices) >= 2:
        rows, other = matrices[0], matrices[1]
        return 2 * rows[0] * rows[1] * (other[-1] if len(out) == 3 else out[-1])
    return 0


def _group(rest, devices):
    """Devices of the first group of a collective."""
    if pairs := re.search(r"source_target_pairs=\{(\{[\d,{} ]*\})\}", rest):
        far = [p for p in re.findall(r"\{(\d+),(\d+)\}", pairs[1]) if p[0] != p[1]]
        return (int(far[0][0]), int(far[0][1])) if far else ()
    if grid := re.search(r"mesh\[([^\]]*)\](?:, ?device_ids=\((\S*)\))? *\{([^}]*)\}", rest):
        return _mesh_group(*grid.groups(), devices)
    if listed := re.search(r"replica_groups=\{\{([\d, ]+)\}", rest):
        return tuple(int(x) for x in listed[1].split(","))
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", rest):
        return tuple(_iota(iota[2])[: int(iota[1].split(",")[-1])])
    return tuple(range(devices))


def _mesh_group(axes, order, taken, devices):
    """`mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}`: devices in a grid, some axes taken.

    Of an axis a part may be taken: `'b':(2)2` is the part of size 2 behind one of size 2.
    """
    numbers = list(range(devices))
    if order and order.startswith("["):
        numbers = _iota(order)
    elif order:
        numbers = [int(x) for x in re.findall(r"\d+", order)]
    parts = {name: (before, n) for name, before, n in
             re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", taken)}  # fmt: skip
    sizes = [(name, int(n)) for name, n in re.findall(r"'(\w+)'=(\d+)", axes)]
    stride, places = math.prod(n for _, n in sizes), [0]
    for name, n in sizes:
        stride //= n
        if name in parts:
            before, some = parts[name]
            count = int(some or n)
            step = stride * (n // (int(before or 1) * count))
            places = [p + i * step for p in places for i in range(count)]
    return tuple(numbers[p] for p in places)


def _iota(text):
    """`[2,4]T(1,0)`: the numbers from 0 in a shape, transposed."""
    shape, turn = re.findall(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text)[0]
    sides = [int(x) for x in shape.split(",")]
    numbers = np.arange(math.prod(sides)).reshape(sides)
    return numbers.transpose([int(x) for x in turn.split(",")] if turn else None).ravel().tolist()
