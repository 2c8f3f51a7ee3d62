"""Memory and time of reading a long prompt, by a tiny Llama 4 with chunks, on CPU.

    python benchmarks/long_prompt.py [--length=131072 --needle=0.3]

A prompt of random ids with a needle in it, 1,024 times one id, read in pieces by the engine. The
model is not trained and finds nothing; what counts is that the same prompt with a needle of another
id, far before the chunk that it ends in, gives other log-probabilities: it has been seen through
the layer without chunks. Peak memory is the process's beyond what it had with everything compiled.
"""

import argparse
import resource
import time

import jax
import numpy as np

from puna.configs.schema import MeshConfig, ModelConfig
from puna.models import transformer
from puna.models.cache import init_cache
from puna.models.decode.slots import Engine
from puna.models.parallel import sharding
from puna.models.text.tokenizer import byte_tokenizer


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="see the top of the file")
    parser.add_argument("--length", type=int, default=131072)
    parser.add_argument("--needle", type=float, default=0.3, help="where, as a share of the length")
    args = parser.parse_args()
    config = ModelConfig(
        vocab_size=272, embed_dim=32, num_layers=4, num_heads=2, num_kv_heads=1, head_dim=16,
        mlp_dim=64, max_positions=args.length + 8, nope_interval=4, chunk_size=8192, qk_norm=True,
        compute_dtype="float32",
    )  # fmt: skip
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    model = transformer.Transformer(config)
    params = transformer.init_params(config, jax.random.key(0), mesh)
    # Attention of a model at its start is nearly even; so what one token changes can be seen.
    params = jax.tree.map(lambda x: x * 3, params)
    engine = Engine(model, params, byte_tokenizer(), 1, args.length + 8)
    engine.warm_up()
    prompt = np.random.default_rng(0).integers(0, 250, args.length)
    at, found = int(args.length * args.needle), []
    before = peak()
    for needle in (251, 252):
        prompt[at : at + 1024] = needle
        start = time.perf_counter()
        tokens = list(engine.stream(prompt.tolist(), max_tokens=4))
        found.append([token.logprob for token in tokens])
        print(
            f"needle {needle}: {time.perf_counter() - start:.1f} s, {engine.reused:,} tokens taken "
            f"from before, {peak() - before:.0f} MiB more than compiled"
        )
    layers = jax.eval_shape(lambda: init_cache(config, 1, args.length + 8)).layers
    cache = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(layers)) / 2**20
    scores = 4 * config.num_heads * args.length**2 / 2**20
    print(
        f"cache {cache:.0f} MiB, of layers without chunks in all four {full(config, args):.0f} MiB"
    )
    print(f"all scores of one layer would be {scores:,.0f} MiB")
    print(f"largest change of a log-probability: {np.abs(np.subtract(*found)).max():.2g}")


def full(config, args) -> float:
    """MiB of keys and values if every layer had all positions."""
    per_token = 4 * (2 * config.num_kv_heads * config.head_dim + 1)
    return config.num_layers * (args.length + 8) * per_token / 2**20


def peak() -> float:
    """The largest memory that the process has had, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
