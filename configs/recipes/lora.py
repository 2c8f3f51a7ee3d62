"""Low-rank adapters (LoRA) on prompt and completion, over any Llama that stays as it is.

    puna train --config=lora --init_from=path/to/Llama-3.2-1B \
      --config.data.train=train.jsonl --config.data.validation=held_out.jsonl --workdir=runs/lora

Adapters lie on attention, MLPs and experts, routed ones too; `--config.adapter.quantize=int8` keeps
the base in half the bytes. `puna convert runs/lora DIR` writes the merged model as a Hugging Face
release, `--to=peft` the adapters alone.
"""

from puna.configs.recipes import sft


def get_config():
    config = sft.get_config()
    config.adapter.update(rank=16, alpha=32.0)
    config.model.param_dtype = "bfloat16"
    config.optimizer.learning_rate = 2e-4
    return config
