"""Llama 1 (Touvron et al. 2023, arXiv 2302.13971): 7b, 13b, 33b, 65b.

puna train --config=llama1:7b --config.data.train=... --workdir=DIR
"""

from puna.configs import base
from puna.configs.errors import ConfigError

# embed_dim, layers, heads, mlp_dim, norm_eps: the released params.json files.
SIZES = {
    "7b": (4096, 32, 32, 11008, 1e-6),
    "13b": (5120, 40, 40, 13824, 1e-6),
    "33b": (6656, 60, 52, 17920, 1e-6),
    "65b": (8192, 80, 64, 22016, 1e-5),
}


def get_config(variant: str = "7b"):
    if variant not in SIZES:
        raise ConfigError(f"llama1:{variant} must be one of {', '.join(SIZES)}")
    embed_dim, layers, heads, mlp_dim, eps = SIZES[variant]
    config = base.get_config()
    config.model.update(
        vocab_size=32000,
        embed_dim=embed_dim,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=128,
        mlp_dim=mlp_dim,
        norm_eps=eps,
        max_positions=2048,
        rope_theta=1e4,
        remat="full",
    )
    config.data.seq_len = 2048
    return config
