"""A picture of a mesh: which devices lie along which axis, and which of them share a host or slice.

Axes are drawn in turn across and down, the last one innermost; of a long axis the first few only.
"""

import dataclasses
import html
import math
from collections.abc import Mapping

from ...configs.schema import MeshConfig
from ...models import hardware
from ...models.parallel import sharding
from .. import ahead
from .figures import Figure, shown

MOST = 16  # devices drawn along one axis
# Neighbouring islands of fast links in turn; of Okabe and Ito.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7")
_MEANING = {f.name: f.metadata["doc"] for f in dataclasses.fields(MeshConfig)}


def draw(mesh: MeshConfig, topology: str, times: Mapping[str, Figure]) -> str:
    """The map as SVG.

    Args:
      mesh: the axes, of which one may stand for all devices that are left.
      times: figures of a compiled step, for what each axis receives; may be empty.
    """
    count = ahead.count(topology)
    sizes = sharding.abstract_mesh(mesh, count).shape
    axes = [(name, n) for name, n in sizes.items() if n > 1]
    slices, kind, _ = ahead.parse(topology)
    chip = hardware.CHIPS.get(kind)
    gpus = chip is not None and isinstance(chip.compiler, hardware.GpuCompiler)
    island, word = (8, "node") if gpus else (count // slices, "slice")
    places, width, height = _places(axes)
    scale = min(28.0, 760 / width)
    squares = []
    for x, y, device, name in places:
        label = f"device {device}, {word} {device // island}{name}"
        colour = _COLOURS[device // island % len(_COLOURS)]
        left, top, side = x * scale, 24 + y * scale, 0.86 * scale
        squares.append(
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{side:.1f}" height="{side:.1f}" '
            f'fill="{colour}"><title>{html.escape(label)}</title></rect>'
        )
    lines, y = [], 24 + height * scale + 18
    for name, n in axes:
        cut = f", {MOST} drawn" if n > MOST else ""
        received, waiting = times.get(f"received_{name}"), times.get(f"waiting_{name}")
        told = f"; {shown(received.value, 'bytes')} a step" if received else ""
        told += f", {shown(waiting.value, 's')} waiting" if waiting else ""
        text = html.escape(f"{name} = {n}{cut}: {_MEANING[name]}{told}")
        lines.append(f'<text x="0" y="{y:.1f}">{text}</text>')
        y += 18
    islands = math.ceil(count / island)
    title = f"The mesh: {count} devices in {islands} {word}{'s' if islands > 1 else ''}"
    return (
        f'<svg viewBox="0 0 764 {y:.0f}" role="img"><text x="0" y="14" font-weight="bold">'
        f"{title}, a colour each in turn</text>{''.join(squares)}{''.join(lines)}</svg>"
    )


def _places(axes):
    """(x, y, number, indices in words) of the devices that are drawn, and the size of the whole."""
    places, width, height, stride = [(0.0, 0.0, 0, "")], 1.0, 1.0, 1
    for level, (name, n) in enumerate(reversed(axes)):
        drawn, across, gap = min(n, MOST), level % 2 == 0, 0.4 * level
        dx, dy = (width + gap, 0.0) if across else (0.0, height + gap)
        places = [
            (x + i * dx, y + i * dy, device + i * stride, f", {name} {i}{rest}")
            for i in range(drawn)
            for x, y, device, rest in places
        ]
        width, height = width + (drawn - 1) * dx, height + (drawn - 1) * dy
        stride *= n
    return places, width, height
