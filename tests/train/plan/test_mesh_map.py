"""The map of a mesh: every device once, where its indices say."""

import re
import xml.etree.ElementTree

import pytest

from puna.configs.schema import MeshConfig
from puna.train.plan import mesh_map
from puna.train.plan.figures import Figure


def squares(mesh, topology, times=None):
    drawing = xml.etree.ElementTree.fromstring(mesh_map.draw(mesh, topology, times or {}))
    places = {}
    for x in drawing.iter("rect"):
        place = float(x.get("x")), float(x.get("y"))
        assert place[0] + float(x.get("width")) <= 764
        assert place not in places.values()
        places[x.find("title").text] = place
    return places, [x.text for x in drawing.iter("text")]


def test_every_device_is_drawn_once_with_its_indices():
    places, texts = squares(MeshConfig(data=2, fsdp=4, tensor=2), "h100-16")
    number = [int(re.match(r"device (\d+)", title)[1]) for title in places]
    assert sorted(number) == list(range(16))
    # Row-major, as JAX numbers the devices of a mesh; 8 GPUs are a node.
    assert {"device 0, node 0, data 0, fsdp 0, tensor 0",
            "device 13, node 1, data 1, fsdp 2, tensor 1"} <= set(places)  # fmt: skip
    assert texts[0].startswith("The mesh: 16 devices in 2 nodes")
    assert [x.split(" ")[0] for x in texts[1:]] == ["data", "fsdp", "tensor"]


@pytest.mark.parametrize(
    ("mesh", "topology", "drawn"),
    [
        (MeshConfig(data=1, fsdp=128), "v5p-256", 16),
        (MeshConfig(data=1, fsdp=8, expert=16), "v5p-256", 128),
        (MeshConfig(slices=2, fsdp=32, tensor=4), "2xv5p-256", 2 * 16 * 4),
        (MeshConfig(data=-1), "cpu-1", 1),
    ],
)
def test_of_a_long_axis_the_first_are_drawn(mesh, topology, drawn):
    places, texts = squares(mesh, topology)
    assert len(places) == drawn
    assert any("16 drawn" in x for x in texts) == (max(mesh.fsdp, mesh.data) > 16)
    if topology.startswith("2x"):
        assert texts[0].startswith("The mesh: 256 devices in 2 slices")


def test_axes_say_what_a_step_receives_over_them():
    times = {"received_fsdp": Figure(2**30, "bytes", "compiled"),
             "waiting_fsdp": Figure(0.25, "s", "modelled")}  # fmt: skip
    _, texts = squares(MeshConfig(data=1, fsdp=4), "v5p-8", times)
    assert texts[1].endswith("; 1 GiB a step, 250 ms waiting")
