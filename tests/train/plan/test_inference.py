"""Weights and cache of generation, by shapes alone."""

import jax
import pytest

import puna
from puna.configs import schema
from puna.models import quantize
from puna.models.parallel import sharding
from puna.models.transformer import abstract_params, init_params
from puna.train.plan import inference

SCOUT = schema.from_dict(puna.get_config("llama4:scout")).model


def test_the_cache_of_ten_million_tokens_of_scout():
    kept, positions = inference.cache_bytes(SCOUT, 1, 10 * 2**20)
    # 12 layers that see all, 36 that see their chunk; 2 * 8 heads * 128 * 2 bytes a token.
    assert kept == (12 * 10 * 2**20 + 36 * 8192) * 4096
    assert kept / 1e9 == pytest.approx(516, abs=1)
    assert positions == kept // 1024


def test_scout_in_int4_fits_one_h100():
    found = puna.plan(puna.get_config("llama4:scout"), "h100-1", context=8192, quantize="int4")
    assert found.fits and 50 < found.sections["generation"]["weights"].value / 1e9 < 60
    assert found.sections["generation"]["weights"].origin == "modelled"
    plain = puna.plan(puna.get_config("llama4:scout"), "h100-1", context=8192)
    assert plain.fits is False and "--quantize=int4" in plain.verdict


def test_int8_weights_are_those_of_quantised_ones():
    config = puna.get_config("llama4:maverick-tiny", ["model.param_dtype=bfloat16"])
    model = schema.from_dict(config).model
    mesh = sharding.make_mesh(schema.MeshConfig(), jax.devices()[:1])
    params = init_params(model, jax.random.key(0), mesh)
    real = quantize.quantize_tree(params, abstract_params(model))
    held = sum(x.nbytes for x in jax.tree.leaves(real))
    assert inference.weight_bytes(model, "int8")[0] == held
    assert inference.weight_bytes(model, "none")[0] == sum(
        x.nbytes for x in jax.tree.leaves(params)
    )
