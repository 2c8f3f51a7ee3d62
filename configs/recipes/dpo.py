"""Direct preference optimisation of a tuned Llama (DPO, arXiv 2305.18290).

    puna train --config=dpo --init_from=path/to/Llama-3.2-1B-Instruct \
      --config.data.train=pairs.jsonl --config.data.validation=held_out.jsonl --workdir=runs/dpo

A line of the JSONL files is {"prompt": "...", "chosen": "...", "rejected": "..."}, texts or lists
of messages. `--config.preference.loss` names another loss: for SimPO (arXiv 2405.14734) also give
--config.preference.beta=2.0 --config.preference.margin=1.0. beta, the batch of 64 pairs, learning
rate and warm-up are about those of section 6 and appendix B of the DPO paper and of the Zephyr
recipe (arXiv 2310.16944, 5e-7); a row holds a pair or more.
"""

from puna.configs.recipes import sft


def get_config():
    config = sft.get_config()
    config.data.seq_len = 2048
    config.preference.beta = 0.1
    config.train.update(objective="preference", batch_size=64, microbatches=4)
    config.optimizer.update(
        learning_rate=5e-7, schedule="linear", final_fraction=0.0, warmup_steps=50
    )
    return config
