"""`puna train --profile=STEPS`: a trace of some steps, and which operations their time goes to.

`profile/` in the run's folder is what xprof and TensorBoard read; Perfetto opens the
`*.trace.json.gz` in it. Durations are the trace's, what an operation is the compiled program says.
Left out on purpose: what a step would take without the trace, which `tokens_per_second` of other
steps has.
"""

import collections
import itertools
import re
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import jax
from jax.profiler import ProfileData

from ..configs.errors import UserError
from ..configs.files import write_json
from ..models.parallel import processes
from .resilience.mirror import Mirror

if TYPE_CHECKING:
    from .plan.program import Op, Program

FOLDER = "profile"
FILE = "profile.json"
# The first steps of a session still load pages and fill queues.
WARM_UP = 2
_SHOWN = 12  # operations on the terminal

# What only runs other operations, which the trace has by themselves.
_CONTAINERS = ("while", "conditional", "call", "async-start", "async-update", "async-done")
_PRODUCTS = re.compile(r"dot|convolution|matmul|gemm|cublas|cudnn\$conv")
_MOVES = frozenset(
    ("parameter", "constant", "bitcast", "copy", "copy-start", "copy-done", "transpose", "reshape",
     "broadcast", "concatenate", "slice", "dynamic-slice", "dynamic-update-slice", "pad", "iota",
     "reverse", "tuple", "get-tuple-element", "convert")
)  # fmt: skip
# Parts of a name that say how a program is made, not of what.
_SCAFFOLD = re.compile(
    r"jit\(|while$|body$|cond$|closed_call$|checkpoint$|rematted_computation$|shard_map$|branch_"
    r"|custom_vjp|custom_jvp|(transpose|jvp|vmap)\(\)?"
)


class Spent(NamedTuple):
    """What executions of an operation took: seconds, how many, and FLOPs of matrix products."""

    seconds: float = 0.0
    calls: int = 0
    flops: float = 0.0

    def __add__(self, other):
        return Spent(*(a + b for a, b in zip(self, other, strict=True)))


class Profile:
    """A trace of the steps behind the first few of a session, inside a `with` block.

    Of several processes the first one traces, its own devices.

    Args:
      mirror: of the run's folder, which gets `profile/` and `profile.json`.
      steps: how many are traced; 0 = none.

    Raises:
      UserError: it is a negative number.
    """

    def __init__(self, mirror: Mirror, steps: int):
        if steps < 0:
            raise UserError(f"--profile={steps} must be a number of steps, 0 for no trace")
        self._mirror, self._folder = mirror, mirror.folder
        self._steps, self._runs = steps, False

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        self._stop()

    def check(self, left: int) -> None:
        """Raise UserError where the steps until the end of the run, `left`, are too few."""
        if self._steps and left < WARM_UP + self._steps:
            raise UserError(
                f"--profile={self._steps} traces the steps behind the first {WARM_UP}, and this "
                f"run has {left} to go; raise train.steps or lower --profile"
            )

    def of(self, step_fn: jax.stages.Compiled) -> Callable:
        """The same step, traced when its turn comes; then a table is printed."""
        if not self._steps or not processes.is_first():
            return step_fn
        calls, began = itertools.count(1), 0.0

        def traced(state, batch):
            nonlocal began
            call = next(calls)
            if call == WARM_UP + 1:
                jax.block_until_ready(state)
                self._start()
                began = time.perf_counter()
            with jax.profiler.StepTraceAnnotation("train", step_num=call):
                found = step_fn(state, batch)
            if call == WARM_UP + self._steps:
                jax.block_until_ready(found)
                seconds = time.perf_counter() - began
                self._stop()
                self._tell(step_fn.as_text() or "", seconds)
            return found

        return traced

    def _start(self):
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # calls of Python would be most of the trace
        jax.profiler.start_trace(self._folder / FOLDER, profiler_options=options)
        self._runs = True

    def _stop(self):
        if self._runs:
            self._runs = False
            jax.profiler.stop_trace()

    def _tell(self, text: str, seconds: float):
        from .plan.program import Program  # brings all of planning

        traces = sorted((self._folder / FOLDER).glob("plugins/profile/*/*.xplane.pb"))
        program = Program(text, jax.device_count())
        name = re.match(r"HloModule ([^\s,]+)", text)
        spent = read(ProfileData.from_file(str(traces[-1])), name[1] if name else "")
        found = summary(program, spent, self._steps, jax.local_device_count(), seconds)
        write_json(self._folder / FILE, found)
        print(table(found), flush=True)
        place = self._mirror.home / traces[-1].parent.relative_to(self._folder)
        print(f"the trace is in {place}", flush=True)


def read(trace, module: str) -> dict[str, Spent]:
    """Time and number of executions of every operation of a program, on all devices together.

    Args:
      trace: a `ProfileData`.
      module: the program's name; the operations of others are left out where the trace says whose
        they are.
    """
    found: dict[str, Spent] = collections.defaultdict(Spent)
    for plane in trace.planes:
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                name = stats.get("hlo_op")
                if name is None and line.name == "XLA Ops":  # of a TPU
                    name = event.name
                # On a CPU a mark follows each, with the same stats or none.
                if name is None or event.name.startswith("end: "):
                    continue
                if stats.get("hlo_module", module) == module:
                    name = str(name).removeprefix("%").split(" ")[0]
                    found[name] += Spent(event.duration_ns / 1e9, 1)
    return found


def summary(
    program: "Program", spent: dict[str, Spent], steps: int, devices: int, seconds: float
) -> dict:
    """What `profile.json` holds: of a step and a device, by kinds and by operations.

    Args:
      spent: as `read` gives it, of all steps and devices.
      seconds: between the beginning of the first step and the end of the last.
    """
    ops = {op.name: op for body in program.computations.values() for op in body}
    kinds: dict[str, Spent] = collections.defaultdict(Spent)
    single = []
    for name, each in spent.items():
        op = ops.get(name)
        if (op.code if op else re.split(r"[.\d]", name)[0]) in _CONTAINERS:
            continue
        what = kind(program, op) if op else "unknown"
        each = each._replace(flops=program.cost(op).flops * each.calls if op else 0.0)
        kinds[what] += each
        single.append((each, name, what, scope(op) if op else ""))
    total = sum((each for each, *_ in single), Spent())

    def share(each: Spent) -> dict:
        return {
            "share": each.seconds / total.seconds if total.seconds else 0.0,
            "seconds": each.seconds / steps / devices,
            "calls": each.calls / steps / devices,
            "flops_per_second": each.flops / each.seconds if each.seconds else 0.0,
        }

    by_time = sorted(kinds.items(), key=lambda item: -item[1].seconds)
    single.sort(key=lambda item: -item[0].seconds)
    return {
        "steps": steps,
        "devices": devices,
        "step_seconds": seconds / steps,
        "operation_seconds": total.seconds / steps / devices,
        "kinds": [{"kind": what} | share(each) for what, each in by_time],
        "operations": [
            {"name": name, "kind": what, "where": where} | share(each)
            for each, name, what, where in single
        ],
    }


def kind(program: "Program", op: "Op") -> str:
    """What an operation does, fused ones by the most that is in them."""
    if found := program.collective(op):
        return found.kind
    if op.code == "custom-call":
        target = re.search(r'custom_call_target="([^"]*)"', op.rest)
        name = target[1] if target else op.name
        return "matrix product" if _PRODUCTS.search(name) else f"kernel {name}"
    codes = {inner.code for inner in _inside(program, op)}
    if codes & {"dot", "convolution"}:
        return "matrix product"
    for words, code in (("sort", "sort"), ("scatter", "scatter"), ("gather", "gather"),
                        ("reduction", "reduce"), ("reduction", "reduce-window")):  # fmt: skip
        if code in codes:
            return words
    if any(_PRODUCTS.search(inner.rest) for inner in _inside(program, op) if
           inner.code == "custom-call"):  # fmt: skip
        return "matrix product"
    return "copy" if codes <= _MOVES else "elementwise"


def _inside(program: "Program", op: "Op") -> "Iterable[Op]":
    if op.code != "fusion":
        return [op]
    return [x for inner in program.called(op) for x in _inside(program, inner)]


def scope(op: "Op") -> str:
    """Where in the model an operation comes from, as its metadata has it, and its primitive."""
    found = re.search(r'op_name="([^"]*)"', op.rest)
    if not found:
        return ""
    parts = [part for part in found[1].split("/") if not _SCAFFOLD.match(part)]
    backward = "backward " if "transpose(" in found[1] else ""
    return backward + "/".join(parts[-4:])


def table(found: dict) -> str:
    """A summary for the terminal."""
    step, busy = found["step_seconds"], found["operation_seconds"]
    lines = [
        f"profile of {found['steps']} steps: {step:.4g} s a step, operations {busy:.4g} s of a "
        "device's",
        f"  {_HEAD}  kind",
    ]
    lines += [f"  {_row(row)}  {row['kind']}" for row in found["kinds"]]
    lines += [f"  {_HEAD}  the costliest operations"]
    for row in found["operations"][:_SHOWN]:
        lines.append(f"  {_row(row)}  {row['name']} ({row['kind']}) {row['where']}".rstrip())
    return "\n".join(lines)


_HEAD = f"{'share':>6}  {'ms a step':>10}  {'calls':>7}  {'GFLOP/s':>8}"


def _row(row: dict) -> str:
    rate = f"{row['flops_per_second'] / 1e9:8.4g}" if row["flops_per_second"] else " " * 8
    return f"{row['share']:6.1%}  {1e3 * row['seconds']:10.3f}  {row['calls']:7.4g}  {rate}"
