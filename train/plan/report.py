"""A plan as text, as JSON, and as a page with pictures."""

import dataclasses
import html
import pathlib
import shlex
from collections.abc import Sequence

from ...configs import schema
from ...configs.files import write_json, write_text
from ...models.parallel import sharding
from . import mesh_map
from .figures import Figure, plain, shown
from .search import Candidate

# Keys that the flags of a candidate set.
SEARCHED = (*(f"mesh.{axis}" for axis in sharding.AXES), "model.remat", "train.microbatches")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `plan` found; `str` is a summary, and a notebook shows `html()`.

    Attributes:
      config: what was planned.
      topology: what it was planned for.
      devices: how many it has.
      fits: whether it fits into a device's memory; None where only a compile could tell.
      verdict: the same in a line, with what to change.
      sections: figures by section and name.
      candidates: of a search, the best first.
    """

    config: schema.Config
    topology: str
    devices: int
    fits: bool | None
    verdict: str
    sections: dict[str, dict[str, Figure]]
    candidates: Sequence[Candidate] = ()

    def to_dict(self) -> dict:
        """As `plan.json` holds it."""
        facts = {"topology": self.topology, "devices": self.devices, "fits": self.fits}
        facts |= {"verdict": self.verdict, **plain(self.sections)}
        if self.candidates:
            facts["candidates"] = [
                {"flags": c.flags} | dataclasses.asdict(c) for c in self.candidates
            ]
        return facts | {"config": schema.to_dict(self.config)}

    def write(self, folder: pathlib.Path) -> None:
        """`plan.json` and `plan.html` in a folder, which is made."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "plan.json", self.to_dict())
        write_text(folder / "plan.html", self.html())

    def __str__(self):
        lines = [f"{self.topology}: {self.devices} devices. {self.verdict}"]
        lines.append(text(self.sections))
        if self.candidates:
            limit = self.sections["memory_of_a_device"]["limit"].value
            lines += ["candidates", *("  " + line for line in table(self.candidates, limit))]
        return "\n".join(lines)

    def html(self) -> str:
        """A page in one file: memory against the limit, where the time goes, candidates."""
        title = html.escape(f"{self.config.model.num_layers} layers on {self.topology}")
        return f"<!doctype html><meta charset=utf-8><title>{title}</title>{self._repr_html_()}"

    def _repr_html_(self):
        parts = [f"<h2>{html.escape(self.topology)}: {self.devices} devices</h2>"]
        parts.append(f"<p>{html.escape(self.verdict)}</p>")
        parts.append(_memory_bar(self.sections))
        if "memory_of_a_device" in self.sections:  # of training
            times = self.sections.get("time_of_a_step", {})
            parts.append(mesh_map.draw(self.config.mesh, self.topology, times))
        parts.append(_time_bar(self.sections))
        if self.candidates:
            parts.append(_candidates(self.candidates, self.sections))
        for section, figures in self.sections.items():
            rows = "".join(
                f"<tr><td>{html.escape(name.replace('_', ' '))}<td>"
                f"{html.escape(shown(f.value, f.unit))}<td>{f.origin}<td>{html.escape(f.note)}"
                for name, f in figures.items()
            )
            parts.append(
                f"<details><summary>{section.replace('_', ' ')}</summary>"
                f"<table>{rows}</table></details>"
            )
        body = "".join(parts)
        return f"<div class=puna-plan><style>{_STYLE}</style>{body}</div>"


def train_command(flag, found: Plan) -> str:
    """How to train with the first candidate.

    Args:
      flag: `--config` with what else of it was given, as ml_collections has it. Of a packaged
        config the name is enough.
    """
    path, overrides = flag.config_filename, flag.override_values
    stem, colon, variant = pathlib.Path(path).name.partition(":")
    if pathlib.Path(schema.__file__).parent in pathlib.Path(path).parents:
        path = stem.removesuffix(".py") + colon + variant
    kept = {key: value for key, value in overrides.items() if key not in SEARCHED}
    words = [f"--config={path}", *(f"--config.{k}={v}" for k, v in sorted(kept.items()))]
    return f"puna train {shlex.join(words)} {found.candidates[0].flags} --workdir=RUN"


def text(sections: dict[str, dict[str, Figure]]) -> str:
    """Figures a line each, for a terminal."""
    lines = []
    for section, figures in sections.items():
        lines.append(section.replace("_", " "))
        for name, figure in figures.items():
            note = f"  {figure.note}" if figure.note else ""
            lines.append(f"  {name.replace('_', ' '):<26}{str(figure):<30}{note}".rstrip())
    return "\n".join(lines)


def table(candidates: Sequence[Candidate], limit: float, most: int = 8) -> list[str]:
    """The first candidates, a line each: memory, time, flags."""
    lines = []
    for c in candidates[:most]:
        needs, seconds = c.needs, c.step or c.seconds
        word = "compiled" if c.peak else "estimate"
        fits = "fits" if needs <= limit and not c.refused else "does not fit"
        time = shown(seconds, "s") if seconds and (c.step or not c.peak) else "-"
        lines.append(f"{shown(needs, 'bytes'):>10} {word}, {fits:<12} {time:>9}  {c.flags}")
    return lines


_STYLE = """
.puna-plan{font:14px system-ui,sans-serif;max-width:60em}.puna-plan td{padding:.1em .8em .1em 0}
.puna-plan svg{width:100%;height:auto}.puna-plan text{font:12px system-ui,sans-serif}
"""
# Of Okabe and Ito, which can be told apart without red and green.
_COLOURS = ("#0072b2", "#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#f0e442", "#999999")


def _bar(title, pieces, whole, unit, mark=None):
    """A stacked bar with a legend as SVG; `mark` is a line with a name at `whole`'s scale."""
    pieces = [(name, value) for name, value in pieces if value > 0]
    width, at, drawn, legend = 760, 0.0, [], []
    for i, (name, value) in enumerate(pieces):
        colour, long = _COLOURS[i % len(_COLOURS)], value / whole * width
        label = html.escape(f"{name.replace('_', ' ')} {shown(value, unit)}")
        drawn.append(f'<rect x="{at:.1f}" y="24" width="{long:.1f}" height="26" fill="{colour}">'
                     f"<title>{label}</title></rect>")  # fmt: skip
        x, y = 380 * (i % 2), 74 + 18 * (i // 2)
        legend.append(f'<rect x="{x}" y="{y - 10}" width="10" height="10" fill="{colour}"/>'
                      f'<text x="{x + 16}" y="{y}">{label}</text>')  # fmt: skip
        at += long
    if mark:
        name, value = mark
        x = value / whole * width
        drawn.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="18" y2="56" stroke="black" '
                     f'stroke-width="2"/><text x="{x - 4:.1f}" y="14" text-anchor="end">'
                     f"{html.escape(name)} {shown(value, unit)}</text>")  # fmt: skip
    height = 74 + 18 * ((len(pieces) + 1) // 2)
    return (
        f'<svg viewBox="0 0 764 {height}" role="img"><text x="0" y="14" font-weight="bold">'
        f"{html.escape(title)}</text>{''.join(drawn)}{''.join(legend)}</svg>"
    )


def _memory_bar(sections):
    figures = sections.get("memory_of_a_device") or sections.get("generation")
    if not figures:
        return ""
    limit = figures["limit"].value
    if "per_device" in figures:
        share = figures["per_device"].value / max(
            1, sum(figures[name].value for name in ("weights", "cache", "cache_positions"))
        )
        pieces = [(name, figures[name].value * share)
                  for name in ("weights", "cache", "cache_positions")]  # fmt: skip
    else:
        names = ("parameters", "frozen_parameters", "optimizer_state", "batch")
        pieces = [(name, figures[name].value) for name in names if name in figures]
        held = sum(value for _, value in pieces)
        if "peak" in figures:
            pieces.append(("all_else_at_the_peak", figures["peak"].value - held))
        else:
            pieces.append(("gradients", figures["gradients"].value))
    needs = sum(value for _, value in pieces)
    return _bar("Memory of a device", pieces, max(limit, needs), "bytes", ("limit", limit))


def _time_bar(sections):
    figures = sections.get("time_of_a_step", {})
    if "step_time" not in figures:
        return ""
    pieces = [
        (name, figure.value)
        for name, figure in figures.items()
        if name in ("products", "other") or name.startswith("waiting_")
    ]
    whole = figures["step_time"].value
    return _bar("Time of a step, at least", pieces, whole, "s")


def _candidates(candidates, sections):
    limit = sections["memory_of_a_device"]["limit"].value
    rows = "".join(f"<li><code>{html.escape(line)}</code>" for line in table(candidates, limit))
    return f"<h3>Candidates</h3><ol>{rows}</ol>"
