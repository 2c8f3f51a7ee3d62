"""Llama 3, 3.1, 3.2 (text) and 3.3 (Dubey et al. 2024, arXiv 2407.21783).

    puna train --config=llama3:3.2-1b --config.data.train=... --workdir=DIR

Variants: 8b, 70b, 3.1-8b, 3.1-70b, 3.1-405b, 3.2-1b, 3.2-3b, 3.3-70b.
"""

from puna.configs import base
from puna.configs.errors import ConfigError

# embed_dim, layers, heads, head_dim, mlp_dim, tied, context, RoPE scaling factor. The factors are
# those of the published Hugging Face configs: Meta's own code has 8 for the 3.2 models as well.
SIZES = {
    "8b": (4096, 32, 32, 128, 14336, False, 8192, 1.0),
    "70b": (8192, 80, 64, 128, 28672, False, 8192, 1.0),
    "3.1-8b": (4096, 32, 32, 128, 14336, False, 131072, 8.0),
    "3.1-70b": (8192, 80, 64, 128, 28672, False, 131072, 8.0),
    "3.1-405b": (16384, 126, 128, 128, 53248, False, 131072, 8.0),
    "3.2-1b": (2048, 16, 32, 64, 8192, True, 131072, 32.0),
    "3.2-3b": (3072, 28, 24, 128, 8192, True, 131072, 32.0),
    "3.3-70b": (8192, 80, 64, 128, 28672, False, 131072, 8.0),
}


def get_config(variant: str = "8b"):
    if variant not in SIZES:
        raise ConfigError(f"llama3:{variant} must be one of {', '.join(SIZES)}")
    embed_dim, layers, heads, head_dim, mlp_dim, tied, context, factor = SIZES[variant]
    config = base.get_config()
    config.model.update(
        vocab_size=128256,
        embed_dim=embed_dim,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=head_dim,
        mlp_dim=mlp_dim,
        norm_eps=1e-5,
        tie_embeddings=tied,
        max_positions=context,
        rope_theta=5e5,
        rope_scaling_factor=factor,
        remat="full",
    )
    config.data.seq_len = 8192
    return config
