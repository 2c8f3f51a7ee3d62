"""What tests of decoding share: parameters of models that are never trained."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puna.models import transformer
from puna.models.parallel import sharding


@pytest.fixture(scope="session")
def drawn():
    """A function of a config and a spread: parameters that compile nothing, the same each time."""

    @functools.cache
    def parameters(config, spread=0.5):
        rng = np.random.default_rng(0)

        def draw(path, shape):
            x = rng.normal(size=shape.shape)
            return jnp.array(1 + 0.1 * x if "norm" in str(path[-2]) else spread * x, shape.dtype)

        return jax.tree.map_with_path(draw, sharding.unbox(transformer.abstract_params(config)))

    return parameters
