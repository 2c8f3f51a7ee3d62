"""A small Llama learns from a large one (arXiv 1503.02531, GKD: arXiv 2306.13649).

    puna train --config=distill --init_from=path/to/Llama-3.2-1B \
      --config.distill.teacher=path/to/Llama-3.1-8B --config.data.train='texts/*.jsonl' \
      --workdir=runs/distill

Both have one vocabulary. A line of the JSONL files is {"text": "..."}, or a conversation with
--config.distill.records=conversations. Forward KL alone; learning rate and warm-up are those of
the other recipes of tuning, since the student starts from weights.
"""

from puna.configs import base


def get_config():
    config = base.get_config()
    config.data.validation = ""
    config.data.seq_len = 1024
    config.train.update(
        objective="distill", steps=1000, batch_size=16, log_every=1, save_every=200, eval_every=200
    )
    config.optimizer.update(learning_rate=2e-5, warmup_steps=20, weight_decay=0.0)
    return config
