"""What a plan consists of: numbers that say where they come from."""

from collections.abc import Mapping
from typing import NamedTuple

# counted: exact, from shapes and their places. compiled: the compiler's word for this program.
# modelled: arithmetic on the others, as true as its formula. published: by a maker or a paper.
# assumed: without a source. given: by the user.
ORIGINS = ("counted", "compiled", "modelled", "published", "assumed", "given")


class Figure(NamedTuple):
    """One number of a plan.

    Attributes:
      value: in `unit`.
      unit: "bytes", "FLOPs", "FLOP/s", "s", "h", "days", "kWh", "kg", "dollars", "devices" or ""
        for a ratio.
      origin: one of ORIGINS.
      note: the formula or the source, in a few words.
    """

    value: float
    unit: str
    origin: str
    note: str = ""

    def __str__(self):
        return f"{shown(self.value, self.unit)} ({self.origin})"


_SCALES = {
    "bytes": ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")),
    "FLOPs": (
        (1e24, "YFLOP"),
        (1e21, "ZFLOP"),
        (1e18, "EFLOP"),
        (1e15, "PFLOP"),
        (1e12, "TFLOP"),
        (1e9, "GFLOP"),
        (1e6, "MFLOP"),
    ),
    "FLOP/s": ((1e12, "TFLOP/s"),),
    "s": ((3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"), (1e-6, "us")),
    "kWh": ((1e6, "GWh"), (1e3, "MWh")),
    "kg": ((1e3, "t"),),
}


def shown(value: float, unit: str) -> str:
    """A number for people: `12.3 GiB`."""
    for scale, name in _SCALES.get(unit, ()):
        if abs(value) >= scale:
            return f"{value / scale:,.4g} {name}"
    number = f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"
    return f"{number} {unit}".rstrip()


def plain(sections: Mapping[str, Mapping[str, Figure]]) -> dict:
    """Figures as JSON holds them."""
    return {
        section: {name: figure._asdict() for name, figure in figures.items()}
        for section, figures in sections.items()
    }
