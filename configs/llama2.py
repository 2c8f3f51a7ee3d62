"""Llama 2 (Touvron et al. 2023, arXiv 2307.09288): 7b, 13b, 70b.

puna train --config=llama2:7b --config.data.train=... --workdir=DIR
"""

from puna.configs import base
from puna.configs.errors import ConfigError

# embed_dim, layers, heads, key/value heads, mlp_dim: the released params.json files. (The table
# in Meta's later sku_list.py gives the 7B and 13B grouped queries that they do not have.)
SIZES = {
    "7b": (4096, 32, 32, 32, 11008),
    "13b": (5120, 40, 40, 40, 13824),
    "70b": (8192, 80, 64, 8, 28672),
}


def get_config(variant: str = "7b"):
    if variant not in SIZES:
        raise ConfigError(f"llama2:{variant} must be one of {', '.join(SIZES)}")
    embed_dim, layers, heads, kv_heads, mlp_dim = SIZES[variant]
    config = base.get_config()
    config.model.update(
        vocab_size=32000,
        embed_dim=embed_dim,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        mlp_dim=mlp_dim,
        norm_eps=1e-5,
        max_positions=4096,
        rope_theta=1e4,
        remat="full",
    )
    config.data.seq_len = 4096
    return config
