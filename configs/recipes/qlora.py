"""Low-rank adapters over a quantised Llama that stays as it is (QLoRA, arXiv 2305.14314).

    puna train --config=qlora --init_from=path/to/Llama-3.1-8B \
      --config.data.train=train.jsonl --config.data.validation=held_out.jsonl --workdir=runs/qlora

As `--config=lora`, with the base in int4; `--config.adapter.quantize=int8` takes a byte a weight.
Weights are quantised one after another as they are read, so the base is never whole in 16 bits. The
paper's 4 bits are another code, `--config.adapter.quantize=nf4`, in 4.25 bits a number, scales
included; int4 has 5 and costs less perplexity (docs/figures.md). Rank 64 and alpha 16 on all linear
layers, a rate of 2e-4 that stays constant, and clipping at 0.3 are those of the paper's appendix
B.2 for 7B and 13B.
Converting merges the adapters into the numbers that the quantised weights stand for, in float32,
and rounds the sums once; `--to=peft` writes the adapters alone, for that base or the original.
"""

from puna.configs.recipes import lora


def get_config():
    config = lora.get_config()
    config.adapter.update(rank=64, alpha=16.0, quantize="int4")
    config.model.remat = "full"
    config.optimizer.update(schedule="constant", clip_norm=0.3)
    return config
