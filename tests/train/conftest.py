"""A tiny experiment on text files, shared by the tests of training and evaluation."""

import importlib.util
import pathlib
import shutil

import pytest

from puna.configs import base

BENCHMARKS = pathlib.Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="session")
def matrix():
    """`benchmarks/mesh_matrix.py`, which compares a mesh with one device."""
    spec = importlib.util.spec_from_file_location("mesh_matrix", BENCHMARKS / "mesh_matrix.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Two folders of small text files that a model can learn something about."""
    folder = tmp_path_factory.mktemp("corpus")
    for split, count in (("train", 24), ("validation", 5)):
        (folder / split).mkdir()
        for i in range(count):
            line = f"{split[0]}{i}: the llama eats grass on the puna, {i * 7 % 11} times a day.\n"
            (folder / split / f"{i:02}.txt").write_text(line * (2 + i % 5))
    return folder


@pytest.fixture(scope="session")
def make_config(corpus):
    """A function that gives the configuration, anew each time.

    Tests that keep to its model, mesh and steps share what the compiler made of them.
    """
    return lambda: _config(corpus)


@pytest.fixture(scope="session")
def cut():
    """A function that copies a run without its last checkpoint, as a kill before it leaves it."""

    def copy(folder, to):
        shutil.copytree(folder, to)
        steps = [int(path.name) for path in (to / "checkpoints").iterdir()]
        assert len(steps) > 1
        shutil.rmtree(to / "checkpoints" / str(max(steps)))
        return to

    return copy


@pytest.fixture
def config(make_config):
    return make_config()


def _config(corpus):
    config = base.get_config()
    config.model.update(
        vocab_size=264, embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
        mlp_dim=24, compute_dtype="float32",
    )  # fmt: skip
    # Evaluation is one more program: tests of it say what on.
    config.data.update(train=f"{corpus}/train/*.txt", validation="", seq_len=32)
    config.optimizer.update(warmup_steps=2, learning_rate=3e-3)
    config.train.update(steps=6, batch_size=8, log_every=1, save_every=3, eval_every=3)
    config.eval.batch_size = 8
    return config
