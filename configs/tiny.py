"""The quickstart: a small Llama on the Python standard library's own source, on a laptop CPU.

puna train --config=tiny --workdir=runs/demo
"""

from puna.configs import base


def get_config():
    config = base.get_config()
    config.model.update(
        vocab_size=4096,
        embed_dim=256,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        mlp_dim=704,
        tie_embeddings=True,
        max_positions=2048,
        rope_theta=1e4,
        compute_dtype="float32",
    )
    config.data.update(tokenizer="train", tokenizer_vocab=4096, seq_len=256)
    config.optimizer.update(learning_rate=3e-3, warmup_steps=40)
    config.train.update(steps=600, batch_size=16, log_every=1, save_every=200, eval_every=200)
    return config
