"""What the tests of weight files share: writers of small checkpoints, and one small model."""

import importlib.util
import pathlib
import sys

import pytest

from puna.models.release import source

REFERENCE = pathlib.Path(__file__).parents[1] / "reference"


@pytest.fixture(scope="session")
def files():
    """The module `tests/reference/weight_files.py`."""
    spec = importlib.util.spec_from_file_location("weight_files", REFERENCE / "weight_files.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def table():
    """The module `benchmarks/tokenizer_table.py`, which writes tokenizers of every kind."""
    path = REFERENCE.parents[1] / "benchmarks" / "tokenizer_table.py"
    spec = importlib.util.spec_from_file_location("tokenizer_table", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules["tokenizer_table"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny(files):
    """A dense model: its config, its config.json, its tensors in Hugging Face's layout."""
    config = files.model_config(files.TINY)
    return config, source.hf_table(config)[1], files.random_tensors(files.hf_shapes(config))
