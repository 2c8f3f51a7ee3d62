"""Every published size has exactly the parameters that were published."""

import pytest

from puna.configs import get_config, schema
from puna.models.transformer import count_params
from puna.train.metrics import active_params

SIZES = {
    "llama1:7b": 6_738_415_616,
    "llama1:13b": 13_015_864_320,
    "llama1:33b": 32_528_943_616,
    "llama1:65b": 65_285_660_672,
    "llama2:7b": 6_738_415_616,
    "llama2:13b": 13_015_864_320,
    "llama2:70b": 68_976_648_192,
    "llama3:8b": 8_030_261_248,
    "llama3:70b": 70_553_706_496,
    "llama3:3.1-8b": 8_030_261_248,
    "llama3:3.1-70b": 70_553_706_496,
    "llama3:3.1-405b": 405_853_388_800,
    "llama3:3.2-1b": 1_235_814_400,
    "llama3:3.2-3b": 3_212_749_824,
    "llama3:3.3-70b": 70_553_706_496,
    "llama3:3.2-11b-vision": 10_670_220_835,
    "llama3:3.2-90b-vision": 88_593_355_323,
    "llama4:scout-text": 107_769_861_120,
    "llama4:maverick-text": 400_711_848_960,
    "llama4:scout": 108_641_793_536,
    "llama4:maverick": 401_583_781_376,
    "llama4:behemoth": 1_991_729_233_920,
}


@pytest.mark.parametrize("name", SIZES)
def test_parameter_count(name):
    assert count_params(schema.from_dict(get_config(name)).model) == SIZES[name]


def test_parameter_count_of_11b_vision_of_448_pixels():
    config = get_config("llama3:3.2-11b-vision", ["model.vision.image_size=448"])
    assert count_params(schema.from_dict(config).model) == 10_642_941_475


# Parameters that a token passes through, both embeddings counted (Meta's "17B active").
ACTIVE = {
    "llama4:scout-text": 17_172_894_720,
    "llama4:maverick-text": 17_184_691_200,
    "llama4:behemoth": 288_506_265_600,
}


@pytest.mark.parametrize("name", ACTIVE)
def test_active_parameters(name):
    model = schema.from_dict(get_config(name)).model
    embedding = model.vocab_size * model.embed_dim
    assert active_params(model) + embedding == ACTIVE[name]


def test_behemoth_is_within_a_percent_of_what_was_announced():
    assert abs(SIZES["llama4:behemoth"] / 2e12 - 1) < 0.01
    assert abs(ACTIVE["llama4:behemoth"] / 288e9 - 1) < 0.01
