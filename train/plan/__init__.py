"""Know before you rent: what a configuration needs on hardware that is not here.

    print(puna.plan(puna.get_config("llama4:scout"), "v5p-256"))

Every number is a `Figure` that says whether it was counted from shapes, given by the compiler,
modelled by a formula, or published by others. No time here was measured.
"""

import dataclasses
import pathlib
from collections.abc import Mapping

from ...configs import schema
from ...configs.errors import UserError
from ...models import hardware
from ...models.parallel import sharding
from .. import ahead
from ..metrics import flops_per_token
from . import budget, inference, step
from .figures import Figure, shown


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `plan` found; `str` is a summary.

    Attributes:
      config: what was planned.
      topology: as it was asked for.
      devices: how many it has.
      fits: whether it fits into a device's memory; None where only a compile could tell.
      verdict: the same in a line, with what to change.
      sections: figures by section and name.
    """

    config: schema.Config
    topology: str
    devices: int
    fits: bool | None
    verdict: str
    sections: dict[str, dict[str, Figure]]

    def to_dict(self) -> dict:
        """As `plan.json` holds it."""
        sections = {
            section: {name: figure._asdict() for name, figure in figures.items()}
            for section, figures in self.sections.items()
        }
        facts = {"topology": self.topology, "devices": self.devices, "fits": self.fits}
        facts |= {"verdict": self.verdict, **sections}
        return facts | {"config": schema.to_dict(self.config)}

    def __str__(self):
        lines = [f"{self.topology}: {self.devices} devices. {self.verdict}"]
        for section, figures in self.sections.items():
            lines.append(section.replace("_", " "))
            for name, figure in figures.items():
                note = f"  {figure.note}" if figure.note else ""
                lines.append(f"  {name.replace('_', ' '):<26}{str(figure):<30}{note}".rstrip())
        return "\n".join(lines)


def plan(
    config: Mapping, topology: str, *, compile: bool = True, tokens: float = 0, mfu: float = 0.4,
    country: str = "us", power_mw: float = 0, context: int = 0, batch: int = 1,
    quantize: str = "none", facts: str | pathlib.Path = budget.FACTS,
) -> Plan:  # fmt: skip
    """What a configuration needs on a topology.

    Args:
      config: a `ConfigDict`, as from `puna.get_config`.
      topology: such as "v5p-256", "2xv5p-256", "h100-8" or "cpu-8".
      compile: the training step, whose peak memory only a compiler knows; else shapes alone.
      tokens: budget of a run whose time, energy, carbon and cost are wanted; 0 = none.
      mfu: share of the peak that the run is taken to reach.
      country: whose grid feeds it.
      power_mw: power of a whole site, for how many devices that is; 0 = not wanted.
      context: tokens of a row: plans generation instead of training; 0 = training.
      batch: rows generated at one time.
      quantize: weights of generation: "none" (bfloat16), "int8" or "int4".
      facts: file of published numbers.

    Raises:
      UserError: the config, the topology or an argument will not do; one line says why.
      jax.errors.JaxRuntimeError: the compiler failed, for another reason than memory.
    """
    c = schema.from_dict(config)
    _, kind, _ = ahead.parse(topology)
    numbers = budget.read_facts(pathlib.Path(facts))
    count, limit = ahead.count(topology), ahead.memory_limit(topology)
    sections: dict[str, dict[str, Figure]] = {}
    if context and tokens:
        raise UserError("--context is of generation and --tokens of training: plan one at a time")
    if context:
        figures, lacking = inference.memory(c.model, batch, context, quantize, count, limit)
        sections["generation"] = figures
        fits, verdict = lacking <= 0, _verdict(figures["per_device"], limit, lacking)
        if not fits:
            more = -(-figures["per_device"].value * count // limit)
            smaller = "" if quantize == "int4" else ", --quantize=int4"
            verdict += f"; try {more:.0f} devices{smaller}, a shorter --context or --batch"
    else:
        devices = ahead.devices(topology) if compile else None
        mesh = sharding.abstract_mesh(c.mesh, count)
        memory, fits, verdict = _training(c, devices, mesh, limit)
        if kind == "cpu":
            memory["limit"] = memory["limit"]._replace(origin="given", note="this machine's share")
        elif isinstance(hardware.CHIPS[kind].compiler, hardware.GpuCompiler):
            note = "JAX takes 3/4 of it, or as XLA_PYTHON_CLIENT_MEM_FRACTION says"
            memory["limit"] = memory["limit"]._replace(note=note)
        sections["memory_of_a_device"] = memory
        held = sum(memory[k].value for k in ("parameters", "optimizer_state"))
        sections["step"] = step.speed(c, kind, mesh, int(held))
    if tokens:
        chip = hardware.CHIPS.get(kind)
        if chip is None:
            raise UserError(f"--tokens needs a device with a published peak, which {kind} is not")
        each = flops_per_token(c.model, c.data.seq_len)
        sections["run"] = budget.training(
            each, tokens, mfu, chip.flops, count, kind, country, numbers
        )
    if power_mw:
        sections["site"] = budget.site(power_mw, kind, numbers)
    return Plan(c, topology, count, fits, verdict, sections)


def _training(c, devices, mesh, limit):
    """Figures of a step's memory, whether it fits, and the same in a line."""
    memory = step.counted(*ahead.abstract_inputs(c, mesh))
    state = sum(figure.value for name, figure in memory.items() if name != "gradients")
    # The norm of the gradient decides about the update, so all of it is there beside the old state.
    least = state + memory["parameters"].value
    needs, fits = Figure(least, "bytes", "counted", "state, batch and gradient alone"), None
    if least > limit:  # no need to ask the compiler
        fits = False
    elif devices:
        memory |= step.compiled(c, devices, int(state))
        needs = memory["peak"]
        fits = needs.value <= limit
    memory["limit"] = Figure(limit, "bytes", "published")
    memory["headroom"] = Figure(limit - needs.value, "bytes", needs.origin, needs.note)
    lacking = int(needs.value - limit)
    verdict = _verdict(needs, limit, lacking)
    if fits is False:
        held = int(state + memory["gradients"].value)
        verdict += f"; try {step.advice(c, mesh, lacking, held, limit)}"
    elif fits is None:
        verdict = f"not compiled: {needs.note} take {_room(needs, limit)}"
    return memory, fits, verdict


def _verdict(needs: Figure, limit: int, lacking: float) -> str:
    if lacking > 0:
        return f"does not fit: {_room(needs, limit)}, {shown(lacking, 'bytes')} too much"
    return f"fits: {_room(needs, limit)}"


def _room(needs: Figure, limit: int) -> str:
    shares = f"{shown(needs.value, needs.unit)} of {shown(limit, needs.unit)}"
    return f"{shares} a device ({needs.origin})"
