"""Times of hand-written programs, whose answers are known."""

import types

import numpy as np
import pytest

from puna.models import hardware
from puna.train.plan import timing
from puna.train.plan.program import Collective, Program

RATES = timing.Rates(flops=1e12, bandwidth=1e9)
V5P, H100 = hardware.CHIPS["v5p"], hardware.CHIPS["h100"]


def mesh(shape, names, coords=None, nodes=1):
    count = int(np.prod(shape))
    devices = [
        types.SimpleNamespace(
            slice_index=i * nodes // count, **({"coords": coords[i]} if coords else {})
        )
        for i in range(count)
    ]
    return types.SimpleNamespace(
        axis_names=names, shape=dict(zip(names, shape, strict=True)),
        devices=np.array(devices, object).reshape(shape),
    )  # fmt: skip


def text(order):
    lines = {
        "start": "%s = (f32[250], f32[1000]) all-gather-start(%x), replica_groups=[1,4]<=[4]",
        "work": "%y = f32[1000]{0} add(%w, %w)",
        "done": "%g = f32[1000]{0} all-gather-done(%s)",
        "sync": "%h = f32[1000]{0} all-gather(%x), replica_groups=[1,4]<=[4], dimensions={0}",
    }
    body = "".join(f"  {lines[name]}\n" for name in order)
    return (
        "ENTRY %m (x: f32[250], w: f32[1000]) -> f32[1000] {\n"
        "  %x = f32[250]{0} parameter(0)\n  %w = f32[1000]{0} parameter(1)\n" + body + "}\n"
    )


LINE = mesh((4,), ("fsdp",))


def links(seconds):
    """All collectives take so long."""
    found = timing.Links(LINE, None)
    found.seconds = lambda op: (op.bytes, seconds)
    return found


WORK = 3 * 4000 / 1e9  # two operands, which are one array, and the result


def test_what_stands_between_start_and_done_hides_communication():
    found = timing.measure(Program(text(["start", "work", "done"]), 4), links(WORK / 4), RATES)
    assert found.seconds == pytest.approx(WORK)
    assert found.exposed["fsdp"] == 0 and found.hidden["fsdp"] == pytest.approx(WORK / 4)
    assert (found.asynchronous, found.collectives) == (1, 1)
    found = timing.measure(Program(text(["start", "work", "done"]), 4), links(3 * WORK), RATES)
    assert found.seconds == pytest.approx(3 * WORK)
    assert found.exposed["fsdp"] == pytest.approx(2 * WORK)


def test_without_asynchrony_nothing_is_hidden():
    found = timing.measure(Program(text(["sync", "work"]), 4), links(WORK), RATES)
    assert found.seconds == pytest.approx(2 * WORK) and found.asynchronous == 0
    assert found.wire["fsdp"] == 4000


def test_parts_follow_one_another_where_nothing_overlaps():
    program = Program(text(["work"]), 4)
    slow = timing.Rates(1e12, 1e9, start=1e-3, fresh=1e6, overlaps=False)
    found = timing.measure(program, links(0), slow, temporaries=500)
    assert found.seconds == pytest.approx(WORK + 1e-3 + 5e-4)


def test_bytes_and_seconds_of_collectives():
    # 16 chips as 4x4x1: rows are rings of the torus, both ways around.
    grid = mesh((4, 4), ("fsdp", "tensor"), [(i // 4, i % 4, 0) for i in range(16)])
    found = timing.Links(grid, V5P)
    row, everything = (0, 1, 2, 3), tuple(range(16))
    assert found.axes(row) == "tensor" and found.axes(everything) == "fsdp+tensor"
    wire, seconds = found.seconds(Collective("all-gather", 4e9, row))
    assert wire == 3e9 and seconds == pytest.approx(3e9 / (2 * V5P.link))
    wire, seconds = found.seconds(Collective("all-reduce", 16e9, everything))
    assert wire == 30e9 and seconds == pytest.approx(30e9 / (4 * V5P.link))


def test_several_slices_and_nodes_are_as_fast_as_their_network():
    two = mesh((2, 4), ("slices", "fsdp"), [(i % 4, 0, 0) for i in range(8)], nodes=2)
    _, seconds = timing.Links(two, V5P).seconds(Collective("all-reduce", 1e9, (0, 4)))
    assert seconds == pytest.approx(1e9 / V5P.network)
    # GPUs that are not there have coordinates too, which are no torus.
    gpus = timing.Links(mesh((16,), ("fsdp",), [(0, i, 0) for i in range(16)]), H100)
    _, near = gpus.seconds(Collective("all-gather", 8e9, tuple(range(8))))
    assert near == pytest.approx(7e9 / H100.link)
    _, far = gpus.seconds(Collective("all-gather", 16e9, tuple(range(16))))
    assert far == pytest.approx(15e9 / min(H100.link, 8 * H100.network))


def test_the_clock_of_a_tpu():
    assert timing.published(V5P).clock == pytest.approx(1.75e9, rel=0.01)
    assert timing.published(H100).clock == 0
