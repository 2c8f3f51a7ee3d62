"""Llama 3, 3.1, 3.2 and 3.3 (Dubey et al. 2024, arXiv 2407.21783).

    puna train --config=llama3:3.2-1b --config.data.train=... --workdir=DIR

Variants: 8b, 70b, 3.1-8b, 3.1-70b, 3.1-405b, 3.2-1b, 3.2-3b, 3.3-70b, and 3.2-11b-vision,
3.2-90b-vision and 3.2-vision-tiny, in which every fifth layer attends to images. The base model of
11B was published for tiles of 448 pixels: `--config.model.vision.image_size=448`.
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
    # Llama 3.1 with a layer more after every third, then every fourth.
    "3.2-11b-vision": (4096, 40, 32, 128, 14336, False, 131072, 8.0),
    "3.2-90b-vision": (8192, 100, 64, 128, 28672, False, 131072, 8.0),
    "3.2-vision-tiny": (64, 5, 4, 16, 128, False, 1024, 8.0),
}
VISION = {
    "num_layers": 32, "embed_dim": 1280, "num_heads": 16, "mlp_dim": 5120, "image_size": 560,
    "patch_size": 14, "max_tiles": 4, "global_layers": 8, "intermediate_layers": "3,7,15,23,30",
    "token_id": 128256, "extra_rows": 8,
}  # fmt: skip
TINY = {
    "vocab_size": 512, "num_kv_heads": 2, "rope_original_positions": 64, "compute_dtype": "float32",
    "remat": "none",
}  # fmt: skip
TINY_VISION = {
    "num_layers": 2, "embed_dim": 32, "num_heads": 2, "mlp_dim": 64, "image_size": 28,
    "patch_size": 7, "global_layers": 1, "intermediate_layers": "0", "token_id": 512,
}  # fmt: skip


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
    if "vision" in variant:
        config.model.cross.update(interval=5, first=3)
        config.model.vision.update(VISION)
    if variant.endswith("-tiny"):
        config.model.update(TINY)
        config.model.vision.update(TINY_VISION)
        config.data.seq_len = 64
    return config
