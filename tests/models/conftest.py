"""What the tests of weight files share: writers of small checkpoints, and one small model."""

import importlib.util
import pathlib

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
def tiny(files):
    """A dense model: its config, its config.json, its tensors in Hugging Face's layout."""
    config = files.model_config(files.TINY)
    return config, source.hf_table(config)[1], files.random_tensors(files.hf_shapes(config))
