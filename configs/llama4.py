"""Llama 4 (Meta 2025): scout, maverick, behemoth, and tiny shapes of the first two.

    puna train --config=llama4:scout --config.data.train=... --workdir=DIR

`scout` and `maverick` are the released multimodal models with the context of the base models;
`scout-text` and `maverick-text` leave the image encoder out. `behemoth` was announced but never
released: 288B active of nearly 2T parameters and 16 experts are Meta's figures, its shape here is
ASSUMED, one of few in Llama 4's structure that gives both. `scout-tiny` and `maverick-tiny` have
every feature, scaled down so that chunks, temperature and NoPE layers matter within 100 tokens.

    python benchmarks/media_demo.py --workdir=runs/media

trains `vision-demo` on made pictures and `sound-demo` on made sound, scout-tiny both, and compares
what is held out with its own picture or clip and with another's.
"""

from puna.configs import base
from puna.configs.errors import ConfigError

# Scout and Maverick: the published config.json files.
SCOUT = {
    "moe_interval": 1, "num_experts": 16, "qk_norm": True,
    "rope_scaling_factor": 16.0, "rope_low_freq_factor": 1.0, "rope_high_freq_factor": 1.0,
}  # fmt: skip
MAVERICK = {"moe_interval": 2, "num_experts": 128}
VARIANTS = {
    "scout": SCOUT,
    "scout-text": SCOUT,
    "maverick": MAVERICK,
    "maverick-text": MAVERICK,
    "behemoth": {
        "embed_dim": 16384, "num_layers": 96, "num_heads": 128, "expert_dim": 24064,
        "moe_interval": 1, "num_experts": 16,
    },
    "scout-tiny": SCOUT,
    "maverick-tiny": MAVERICK,
    "vision-demo": SCOUT,
    "sound-demo": SCOUT,
}  # fmt: skip
TINY = {
    "vocab_size": 512, "embed_dim": 64, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2,
    "head_dim": 16, "mlp_dim": 128, "expert_dim": 64, "num_experts": 4, "chunk_size": 16,
    "temperature_floor": 8, "rope_original_positions": 16, "max_positions": 1024,
    "compute_dtype": "float32", "remat": "none",
}  # fmt: skip
TINY_VISION = {
    "num_layers": 2, "embed_dim": 32, "num_heads": 2, "mlp_dim": 64, "image_size": 28,
    "patch_size": 7, "adapter_dim": 32, "max_tiles": 4, "token_id": 510,
}  # fmt: skip
TINY_AUDIO = {
    "num_layers": 2, "embed_dim": 32, "num_heads": 2, "mlp_dim": 64, "num_mels": 16,
    "frames_per_token": 4, "max_tokens": 16, "token_id": 509,
}  # fmt: skip


def get_config(variant: str = "scout"):
    if variant not in VARIANTS:
        raise ConfigError(f"llama4:{variant} must be one of {', '.join(VARIANTS)}")
    config = base.get_config()
    config.model.update(
        vocab_size=202048,
        embed_dim=5120,
        num_layers=48,
        num_heads=40,
        num_kv_heads=8,
        head_dim=128,
        mlp_dim=16384,
        expert_dim=8192,
        norm_eps=1e-5,
        max_positions=262144,
        rope_theta=5e5,
        nope_interval=4,
        chunk_size=8192,
        temperature_scale=0.1,
        temperature_floor=8192,
        remat="full",
    )
    config.model.update(VARIANTS[variant])
    config.data.seq_len = 8192
    if variant in ("scout", "maverick"):
        config.model.vision.num_layers = 34
    if variant.endswith(("-tiny", "-demo")):
        config.model.update(TINY)
        config.model.vision.update(TINY_VISION)
        config.data.seq_len = 64
    if variant.endswith("-demo"):
        config.data.update(tokenizer="train", tokenizer_vocab=512, validation="")
        config.optimizer.update(learning_rate=3e-3, warmup_steps=20)
        config.train.update(steps=100, batch_size=16, log_every=10, save_every=100, eval_every=0)
    if variant == "vision-demo":
        config.data.images = 4
        config.model.vision.max_tiles = 1
    if variant == "sound-demo":
        config.data.clips = 4
        config.model.vision.num_layers = 0
        config.model.audio.update(TINY_AUDIO)
    return config
