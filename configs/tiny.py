"""The quickstart: a small Llama on the Python standard library's own source, on a laptop CPU.

puna train --config=tiny --workdir=runs/demo
"""

from puna.configs import base


def get_config():
    config = base.get_config()
    config.model.update(
        vocab_size=4096,
        embed_dim=192,
        num_layers=4,
        num_heads=6,
        num_kv_heads=2,
        head_dim=32,
        mlp_dim=512,
        tie_embeddings=True,
        max_positions=2048,
        rope_theta=1e4,
        # CPUs without bfloat16 units are slower with it than without.
        compute_dtype="float32",
    )
    config.data.update(tokenizer="train", tokenizer_vocab=4096, seq_len=256)
    # Per step Muon learns here what AdamW needs half as many steps again for.
    config.optimizer.update(name="muon", learning_rate=8e-3, b1=0.95, warmup_steps=20)
    config.train.update(steps=300, batch_size=8, log_every=1, save_every=100, eval_every=150)
    config.eval.batch_size = 8
    return config
