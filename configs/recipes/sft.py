"""Supervised fine-tuning of any Llama on conversations, or on prompt and completion.

    puna train --config=sft --init_from=path/to/Llama-3.2-1B \
      --config.data.train=train.jsonl --config.data.validation=held_out.jsonl --workdir=runs/sft

A line of the JSONL files is {"messages": [{"role": "user", "content": "..."}, {"role": "assistant",
"content": "..."}]}, {"prompt": "...", "completion": "..."}, or another of the formats in
`train/data/chats.py`. The architecture, tokenizer and chat template are those of the weights; the
loss is of what the assistant says. `puna data --config=sft ...` shows what the model will see.
"""

from puna.configs import base


def get_config():
    config = base.get_config()
    config.data.validation = ""
    config.data.seq_len = 1024
    config.train.update(
        objective="sft", steps=500, batch_size=8, log_every=1, save_every=100, eval_every=100
    )
    config.optimizer.update(learning_rate=2e-5, warmup_steps=10, weight_decay=0.0)
    return config
