"""A reward model from pairs of a better and a worse answer (Bradley-Terry, arXiv 2203.02155).

    puna train --config=reward --init_from=path/to/Llama-3.2-1B-Instruct \
      --config.data.train=pairs.jsonl --config.data.validation=held_out.jsonl --workdir=runs/reward

A line of the JSONL files is {"prompt": "...", "chosen": "...", "rejected": "..."}, texts or lists
of messages. One epoch, a batch of 64 pairs and 9e-6 are those of InstructGPT's appendix C; more
epochs overfit. `puna eval --config=reward --config.data.validation=held_out.jsonl
--checkpoint=runs/reward` gives loss and accuracy; `puna.train.objectives.reward.load` reads the run
with its vector, and a release by `puna convert` gives the same scores in `transformers`.
"""

from puna.configs.recipes import sft


def get_config():
    config = sft.get_config()
    config.data.seq_len = 2048
    config.train.update(objective="reward", batch_size=64, microbatches=4)
    config.optimizer.update(learning_rate=9e-6, warmup_steps=15)
    return config
