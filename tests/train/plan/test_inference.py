"""Weights and cache of generation, by shapes alone."""

import jax
import numpy as np
import pytest

import puna
from puna.configs import schema
from puna.models import quantize
from puna.models.parallel import sharding
from puna.models.transformer import abstract_params
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
    assert found.fits and 60 < found.sections["generation"]["weights"].value / 1e9 < 72
    assert found.sections["generation"]["weights"].origin == "counted"
    plain = puna.plan(puna.get_config("llama4:scout"), "h100-1", context=8192)
    assert plain.fits is False and "--quantize=int4" in plain.verdict


def test_the_first_kind_of_weights_that_fits():
    scout, maverick = (puna.get_config(f"llama4:{name}") for name in ("scout", "maverick"))
    found = puna.plan(scout, "h100-1", context=8192, quantize="auto")
    assert found.fits and "int4" in found.verdict
    # 400e9 weights: in one byte each they fit into a host of 8 H100 with a short context.
    host = puna.plan(maverick, "h100-8", context=8192, quantize="auto")
    assert host.fits and "int8" in host.verdict
    # 516 GB of cache and 108 of weights in int8 go into 8 H100.
    long = puna.plan(scout, "h100-8", context=10 * 2**20, quantize="auto")
    assert long.fits and "int8" in long.verdict


def test_bounds_of_generation():
    config = puna.get_config("llama3:3.1-8b")
    one = puna.plan(config, "h100-1", context=8192).sections["generation"]
    # 8.03e9 parameters but the embedding's rows, 2 FLOPs each; scores and sums of 32 layers.
    flops = 8192 * (2 * 7.5e9 + 4 * 32 * 4096 * 4096)
    assert one["prefill_flops"].value == pytest.approx(flops, rel=0.01)
    assert one["prefill_time"].value == pytest.approx(flops / 794.5e12, rel=0.01)
    # A token reads 15 GB of weights and 8192 * 32 * 4096 bytes of cache.
    read = 2 * 7.5e9 + 8192 * 32 * 4096
    assert one["decode_traffic"].value == pytest.approx(read, rel=0.01)
    assert one["decode_tokens_per_second"].value == pytest.approx(3.35e12 / read, rel=0.01)
    many = puna.plan(config, "h100-1", context=8192, batch=16).sections["generation"]
    assert many["decode_tokens_per_second"].value > 6 * one["decode_tokens_per_second"].value
    eight = puna.plan(config, "h100-8", context=8192).sections["generation"]
    assert eight["decode_time"].value == pytest.approx(one["decode_time"].value / 8)


@pytest.mark.parametrize("kind", quantize.KINDS)
def test_weights_are_those_of_quantised_ones(kind):
    config = puna.get_config("llama4:maverick-tiny", ["model.param_dtype=bfloat16"])
    model = schema.from_dict(config).model
    boxed = abstract_params(model)
    params = jax.tree.map(
        lambda x: jax.device_put(np.ones(x.shape, x.dtype)), sharding.unbox(boxed)
    )
    real = quantize.quantize_tree(params, boxed, kind)
    held = sum(x.nbytes for x in jax.tree.leaves(real))
    assert inference.weight_bytes(model, kind)[0] == held
    assert inference.weight_bytes(model, "none")[0] == sum(
        x.nbytes for x in jax.tree.leaves(params)
    )
