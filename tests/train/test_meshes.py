"""Every mesh gives the numbers of one device; the whole matrix is slow, a sample of it is not."""

import dataclasses

import pytest

from puna.models.kernels import blockwise

SAMPLE = ("dense", "fsdp2.context2.tensor2")
MORE = [
    # All that the dense model has too, and pieces of a context.
    ("scout, capacity", "pipeline2.expert2.context2"),
    # Where the compiler once lost partial sums between a matmul and the GELU after it.
    ("vision without experts", "data2.fsdp2.tensor2"),
]
MODELS = ("dense", "scout", "scout, capacity", "maverick", "vision")
KINDS = ("loss", "gradient norm", "router", "gradient", "params")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks of attention in a row, some of them passed over, as in a long one."""
    monkeypatch.setattr(blockwise, "_ONE_BLOCK", 0)
    monkeypatch.setattr(blockwise, "_BLOCK", 8)


def check(matrix, name, mesh):
    found = matrix.case(name, mesh)
    worst = {kind: found[kind] for kind in KINDS}
    assert max(worst.values()) <= matrix.TOLERANCE, found


def test_a_sample_of_the_matrix(matrix):
    check(matrix, *SAMPLE)


@pytest.mark.slow
@pytest.mark.parametrize("name,mesh", MORE)
def test_what_once_failed(matrix, monkeypatch, name, mesh):
    sees = dataclasses.replace(matrix.DENSE, vision=matrix.MODELS["vision"].vision)
    monkeypatch.setitem(matrix.MODELS, "vision without experts", sees)
    check(matrix, name, mesh)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_matrix(matrix, name):
    """The dense model on all meshes, each of the others on every sixth, no two on the same.

    `benchmarks/mesh_matrix.py` runs all of all, which takes half an hour.
    """
    assert len(matrix.MESHES) >= 24 and MODELS == tuple(matrix.MODELS)
    first, step = (0, 1) if name == "dense" else (MODELS.index(name) - 1, 6)
    meshes = {*matrix.MESHES[first::step], *(["data2.fsdp2.tensor2"] if name == "vision" else [])}
    for mesh in sorted(meshes):
        if (name, mesh) not in (SAMPLE, *MORE):
            check(matrix, name, mesh)
