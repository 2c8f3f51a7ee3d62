"""A small Llama learns from a large one (arXiv 1503.02531, GKD: arXiv 2306.13649).

    puna train --config=distill --init_from=path/to/Llama-3.2-1B \
      --config.distill.teacher=path/to/Llama-3.1-8B --config.data.train='texts/*.jsonl' \
      --workdir=runs/distill

Both have one vocabulary. A line of the JSONL files is {"text": "..."}, or a conversation with
--config.distill.records=conversations. Forward KL alone; learning rate and warm-up are those of
the other recipes of tuning, since the student starts from weights. With
--config.distill.hard_schedule=linear the weight goes from the teacher to the text over the run.
"""

from puna.configs.recipes import sft


def get_config():
    config = sft.get_config()
    config.train.update(
        objective="distill", steps=1000, batch_size=16, save_every=200, eval_every=200
    )
    config.optimizer.warmup_steps = 20
    return config
