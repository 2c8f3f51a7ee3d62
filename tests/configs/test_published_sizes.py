"""Every published size has exactly the parameters that were published."""

import pytest

from puna.configs import get_config, schema
from puna.models.transformer import count_params

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
}


@pytest.mark.parametrize("name", SIZES)
def test_parameter_count(name):
    assert count_params(schema.from_dict(get_config(name)).model) == SIZES[name]
