"""Know before you rent: what a configuration needs on hardware that is not here.

    print(puna.plan(puna.get_config("llama4:scout"), "v5p-256"))

Every number is a `Figure` that says whether it was counted from shapes, given by the compiler,
modelled by a formula, or published by others. No time here was measured.
"""

import math
import pathlib
from collections.abc import Callable, Mapping

from ...configs import schema
from ...configs.errors import UserError
from ...models import hardware
from ...models.parallel import sharding
from .. import ahead
from ..metrics import flops_per_token
from . import budget, confirm, inference, search, step
from .figures import Figure, shown
from .report import Plan as Plan


def plan(
    config: Mapping, topology: str, *, compile: bool = True, search: bool = False,
    budget_s: float = 900, tokens: float = 0, mfu: float = 0.4, country: str = "us",
    power_mw: float = 0, days: float = 60, context: int = 0, batch: int = 1,
    quantize: str = "none", facts: str | pathlib.Path = budget.FACTS,
    tell: Callable[[str], None] = lambda line: None,
) -> Plan:  # fmt: skip
    """What a configuration needs on a topology.

    Args:
      config: a `ConfigDict`, as from `puna.get_config`.
      topology: such as "v5p-256", "2xv5p-256", "h100-8" or "cpu-8"; "auto" or "v5p-auto" for the
        cheapest an hour that fits, by list prices.
      compile: the training step, whose peak memory only a compiler knows; else shapes alone.
      search: over meshes, recomputation and microbatches, instead of those of the config.
      budget_s: seconds that all compiles together may take.
      tokens: budget of a run whose time, energy, carbon and cost are wanted; 0 = none.
      mfu: share of the peak that the run is taken to reach.
      country: whose grid feeds it.
      power_mw: power of a whole site, for how many devices that is; 0 = not wanted.
      days: for what could be trained with that power.
      context: tokens of a row: plans generation instead of training; 0 = training.
      batch: rows generated at one time.
      quantize: weights of generation: "none" (bfloat16), "int8", "int4", "nf4", or "auto", the
        first of them that fits.
      facts: file of published numbers.
      tell: gets lines about the progress of a search.

    Raises:
      UserError: the config, the topology or an argument will not do; one line says why.
    """
    c = schema.from_dict(config)
    numbers = budget.read_facts(pathlib.Path(facts))
    if context and tokens:
        raise UserError("--context is of generation and --tokens of training: plan one at a time")
    for name, value, default in (("batch", batch, 1), ("quantize", quantize, "none")):
        if not context and value != default:
            raise UserError(f"--{name}={value} is of generation: it needs --context")
    if not 0 < budget_s < 1e9:
        raise UserError(f"--budget_s={budget_s:g} must be more than 0")
    found: list = []
    if topology == "auto" or topology.endswith("-auto"):
        if context:
            raise UserError(f"--topology={topology} is of training; --context needs a topology")
        topology, c, found = _smallest(c, topology, compile, budget_s, numbers, tell)
    elif search and not context:
        c, found = _best(c, topology, compile, budget_s, tell)
    _, kind, _ = ahead.parse(topology)
    count, limit = ahead.count(topology), ahead.memory_limit(topology)
    sections: dict[str, dict[str, Figure]] = {}
    if context:
        chip = hardware.CHIPS.get(kind)
        sections["generation"], fits, verdict = inference.plan(
            c.model, batch, context, quantize, count, limit, chip
        )
    else:
        mesh = sharding.abstract_mesh(c.mesh, count)
        told, fits, verdict = _training(c, topology, compile, budget_s, mesh, limit)
        memory = told["memory_of_a_device"]
        if kind == "cpu":
            memory["limit"] = memory["limit"]._replace(origin="given", note="this machine's share")
        elif isinstance(hardware.CHIPS[kind].compiler, hardware.GpuCompiler):
            note = "JAX takes 3/4 of it, or as XLA_PYTHON_CLIENT_MEM_FRACTION says"
            memory["limit"] = memory["limit"]._replace(note=note)
        held = sum(memory[k].value for k in ("parameters", "optimizer_state"))
        sections |= told | {"step": step.speed(c, kind, mesh, int(held))}
    chip = hardware.CHIPS.get(kind)
    if tokens:
        if chip is None:
            raise UserError(f"--tokens needs a device with a published peak, which {kind} is not")
        each = flops_per_token(c.model, c.data.seq_len)
        sections["run"] = budget.training(
            each, tokens, mfu, chip.flops, count, kind, country, numbers
        )
    if power_mw:
        sections["site"] = budget.site(power_mw, kind, numbers)
        known = kind if kind in numbers["power"] else "h100"
        sections[f"{days:g}_days_of_{known}"] = budget.trained(
            power_mw, days, mfu, known, hardware.CHIPS[known].flops, numbers
        )
    return Plan(c, topology, count, fits, verdict, sections, found)


def _training(c, topology, compile, seconds, mesh, limit):
    """Figures of a step's memory and time, whether it fits, and the same in a line."""
    memory = step.counted(*ahead.abstract_inputs(c, mesh))
    sections = {"memory_of_a_device": memory}
    state = sum(figure.value for name, figure in memory.items() if name != "gradients")
    # The norm of the gradient decides about the update, so all of it is there beside the old state.
    least = state + memory["parameters"].value
    needs, fits = Figure(least, "bytes", "counted", "state, batch and gradient alone"), None
    if least > limit:  # no need to ask the compiler
        fits = False
    elif compile:
        told = confirm.confirm(c, topology, seconds)
        if told is None:
            raise UserError(f"--budget_s={seconds:g} must be more: the compiler was not ready")
        memory |= told["memory"]
        if "time" in told:
            sections["time_of_a_step"] = told["time"]
        needs = memory["peak"]
        fits = needs.value <= limit and "time" in told
    memory["limit"] = Figure(limit, "bytes", "published")
    memory["headroom"] = Figure(limit - needs.value, "bytes", needs.origin, needs.note)
    lacking = int(needs.value - limit)
    verdict = inference.verdict(needs, limit, lacking)
    if fits is False:
        held = int(state + memory["gradients"].value)
        verdict += f"; try {step.advice(c, mesh, lacking, held, limit)}, or --search"
    elif fits is None:
        verdict = f"not compiled: {needs.note} take {inference.room(needs, limit)}"
    return sections, fits, verdict


def _best(c, topology, compile, seconds, tell, wanted=3):
    """The config with the best candidate that fits, and all candidates.

    Raises:
      UserError: none fits; the line has the nearest, and what to change.
    """
    limit = ahead.memory_limit(topology)
    found = search.search(
        c, topology, limit, budget=seconds, wanted=wanted,
        compiler=confirm.confirm if compile else None, tell=tell, workers=confirm.at_a_time(),
    )  # fmt: skip
    if not found:
        raise UserError(
            f"--topology={topology}: train.batch_size={c.train.batch_size} must be a multiple of "
            f"some mesh of the {ahead.count(topology)} devices; take more rows or fewer devices"
        )
    best = found[0]
    if compile and not best.peak:
        raise UserError(
            f"--budget_s={seconds:g} must be more: no candidate was compiled in it; the first is "
            f"{best.flags}"
        )
    if best.needs > limit or best.refused:
        # Those not compiled do not fit by arithmetic that the compiled ones corrected.
        near = min((x for x in found if x.peak or not compile), key=lambda x: x.needs)
        times = 2
        while near.state / times + (near.needs - near.state) > limit and times < 1024:
            times *= 2
        more = f"{times * ahead.count(topology)} devices" if times < 1024 else "a smaller model"
        if times < 1024 and times * ahead.count(topology) > _most(topology):
            more = "devices with more memory"
        raise UserError(
            f"--topology={topology}: nothing fits; the nearest, {near.flags}, takes "
            f"{shown(near.needs, 'bytes')} of {shown(limit, 'bytes')} a device "
            f"({'compiled' if near.peak else 'modelled'}); try {more} or shorter rows"
        )
    return best.apply(c), found


def _most(topology):
    """Devices that can hold one state: all chips of a slice, as many GPUs as there are."""
    slices, kind, _ = ahead.parse(topology)
    chip = hardware.CHIPS.get(kind)
    tpu = chip and isinstance(chip.compiler, hardware.TpuCompiler) and chip.compiler
    return slices * tpu.most_chips if tpu else math.inf


def _smallest(c, wanted, compile, seconds, facts, tell):
    """The cheapest topology an hour that fits, the config for it, and the candidates there."""
    kind = wanted.removesuffix("auto").removesuffix("-")
    options = []
    for name, chip in hardware.compilable().items():
        price = facts["price"].get(name, {}).get("dollars_per_hour")
        if price is None or kind not in ("", name):
            continue
        cores, least, most = 1, 1, 4096
        if isinstance(tpu := chip.compiler, hardware.TpuCompiler):
            cores, least, most = tpu.cores_per_chip, 4, tpu.most_chips
        if compile and not _installed(f"{name}-{8 * cores}"):
            continue
        sizes = [2**i for i in range(most.bit_length()) if 2**i >= least]
        options += [(price * size, f"{name}-{size * cores}") for size in sizes]
    if not options:
        kinds = ", ".join(hardware.compilable())
        raise UserError(f"--topology={wanted} must name one of {kinds} whose compiler is installed")
    last = ""
    for dollars, topology in sorted(options):
        limit = ahead.memory_limit(topology)
        if search.least_state(c) / ahead.count(topology) > limit:
            continue
        tell(f"{topology}, {dollars:.2f} dollars an hour")
        try:
            best, found = _best(c, topology, compile, seconds, tell, wanted=1)
        except UserError as e:
            last = str(e)
            if "--budget_s" in last:
                raise
            continue
        return topology, best, found
    raise UserError(last or f"--topology={wanted}: the state alone fits on none of them")


def _installed(topology):
    try:
        ahead.require(topology)
    except UserError:
        return False
    return True
