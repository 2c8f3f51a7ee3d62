"""Stored tiny Llamas, and the NumPy model that says what each of them computes."""

import importlib.util
import json
import pathlib
from typing import NamedTuple

import numpy as np
import pytest

from puna.configs import schema
from puna.models.weights import config as hf_config
from puna.models.weights import huggingface

REFERENCE = pathlib.Path(__file__).parents[2] / "reference"


class Tiny(NamedTuple):
    """A model: its config.json, weights in float64 by Hugging Face's names, and puna's config."""

    json: dict
    weights: dict
    config: schema.ModelConfig

    def params(self, weights):
        """puna's tree of weights."""
        stored = {name: np.asarray(w, np.float32) for name, w in weights.items()}
        return huggingface.to_puna(self.config, stored)

    def by_name(self, params):
        """The tree of `params`, by Hugging Face's names."""
        return huggingface.from_puna(self.config, params)

    def moved(self, seed):
        """Other weights, near its own."""
        rng = np.random.default_rng(seed)
        return {n: w + 0.05 * rng.standard_normal(w.shape) for n, w in self.weights.items()}


@pytest.fixture(scope="session")
def tiny():
    """name -> `Tiny`."""

    def read(name):
        with np.load(REFERENCE / "fixtures" / f"{name}.npz", allow_pickle=False) as stored:
            found = json.loads(str(stored["config"]))
            weights = {
                k[7:]: stored[k].astype(np.float64) for k in stored.files if k[:6] == "weight"
            }
        fields = hf_config.from_hf(found) | {"compute_dtype": "float32"}
        return Tiny(found, weights, schema.from_dict(fields, schema.ModelConfig))

    return read


class Recorded(NamedTuple):
    """What TRL made of the pairs of the tests with weights `moved(1)` of llama3_2.

    loss: the mean over the pairs, each alone in its batch.
    each: TRL's own metrics of each pair.
    gradient: norm and two projections of every gradient tensor, in the order of their names.
    """

    loss: float
    each: list[dict]
    gradient: list[list[float]]

    def check(self, loss, gradient):
        """Compare a loss, and gradients by Hugging Face's names.

        A tensor each of whose n elements is off by 1e-5 of its largest has a norm and projections
        that are off by sqrt(n) times as much.
        """
        np.testing.assert_allclose(loss, self.loss, rtol=1e-5)
        assert len(gradient) == len(self.gradient)
        for (name, found), (norm, *wanted) in zip(
            sorted(gradient.items()), self.gradient, strict=True
        ):
            found = np.asarray(found, np.float64)
            directions = np.random.default_rng(7).standard_normal((2, *found.shape))
            projections = (directions * found).reshape(2, -1).sum(axis=1)
            got = [np.linalg.norm(found), *projections]
            tolerance = 1e-5 * np.max(np.abs(found)) * np.sqrt(found.size)
            np.testing.assert_allclose(got, [norm, *wanted], rtol=0, atol=tolerance, err_msg=name)


@pytest.fixture(scope="session")
def trl():
    """Name of a loss -> `Recorded`; tests/reference/make_trl_fixture.py says how it came to be."""
    stored = json.loads((REFERENCE / "trl.json").read_text())

    def read(name):
        found = stored[name]
        return Recorded(found["loss"], found.get("each", []), found["gradient"])

    return read


@pytest.fixture(scope="session")
def oracle():
    """`tests/reference/llama_numpy.py`, which HIPS autograd can differentiate."""
    spec = importlib.util.spec_from_file_location("llama_numpy", REFERENCE / "llama_numpy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
