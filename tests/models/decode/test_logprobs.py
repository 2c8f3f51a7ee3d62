"""Log-probabilities of decoding are those of the forward pass; settings are each row's own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puna.configs.errors import UserError
from puna.configs.schema import ModelConfig
from puna.models import bits, transformer
from puna.models.cache import init_cache
from puna.models.decode import engine
from puna.models.decode.generate import complete, generate
from puna.models.decode.sampling import Sampling, per_row
from puna.models.parallel import sharding
from puna.models.text.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
DENSE = ModelConfig(
    vocab_size=272, embed_dim=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8,
    mlp_dim=48, max_positions=128, rope_theta=100.0, nope_interval=2, chunk_size=6, qk_norm=True,
    compute_dtype="float32",
)  # fmt: skip
CONFIGS = {
    "chunked": DENSE,
    "tied": dataclasses.replace(DENSE, tie_embeddings=True, nope_interval=0, chunk_size=0),
    "moe": dataclasses.replace(
        DENSE, moe_interval=2, num_experts=4, experts_per_token=1, expert_dim=24,
    ),
}  # fmt: skip
PROMPTS = [[256, 65], [256, *b"the llama herd"], [256, *b"puna"]]
NEW = 20


@functools.cache
def params(config):
    rng = np.random.default_rng(0)

    def draw(path, shape):
        x = rng.normal(size=shape.shape)
        x = 1 + 0.1 * x if "norm" in str(path[-2]) else 0.3 * x
        return jax.device_put(np.float32(x).astype(config.param_dtype))

    shapes = sharding.unbox(transformer.abstract_params(config))
    return jax.tree.map_with_path(draw, shapes)


@functools.cache
def forward(config):
    model = transformer.Transformer(config)

    @jax.jit
    def logprobs(params, tokens_BT):
        logits_BTV = model.apply({"params": params}, tokens_BT).logits_BTV
        logp_BTV = jax.nn.log_softmax(logits_BTV[:, :-1])
        return jnp.take_along_axis(logp_BTV, tokens_BT[:, 1:, None], -1)[..., 0]

    return logprobs


def make(config, prompts=PROMPTS, max_tokens=NEW, sampling=None, **options):
    model = transformer.Transformer(config)
    blocks = engine.decode(model, params(config), prompts, max_tokens, sampling, **options)
    return engine.Block(*(np.concatenate(x, 1) for x in zip(*blocks, strict=True)))


def check(config, made, atol):
    """Compare with one forward pass over each prompt and what was made of it."""
    for prompt, ids, found in zip(PROMPTS, made.ids_BT, made.logprobs_BT, strict=True):
        row = np.zeros((1, 40), np.int32)
        row[0, : len(prompt) + NEW] = [*prompt, *ids]
        want = np.asarray(forward(config)(params(config), row))[0, len(prompt) - 1 :][:NEW]
        np.testing.assert_allclose(found, want, atol=atol, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_they_are_those_of_the_forward_pass(name):
    mixed = Sampling(np.array([0.0, 0.8, 1.5]), np.array([0, 5, 0]), np.array([1.0, 1.0, 0.9]))
    check(CONFIGS[name], make(CONFIGS[name], sampling=mixed), 1e-5)


def test_bfloat16_within_its_rounding():
    config = dataclasses.replace(
        CONFIGS["moe"], compute_dtype="bfloat16", param_dtype="bfloat16", num_experts=1
    )
    check(config, make(config), 0.15)


# The mixture has chunks, too.
@pytest.mark.parametrize("name", [pytest.param("chunked", marks=pytest.mark.slow), "moe"])
def test_a_row_alone_and_among_rows_of_other_settings(name):
    config = CONFIGS[name]
    rows = [
        Sampling(0.0), Sampling(0.8, 5, 0.9, 0.01, seed=7), Sampling(1.3, seed=8),
    ]  # fmt: skip
    together = make(config, sampling=Sampling(*map(np.array, zip(*rows, strict=True))))
    assert len({tuple(ids) for ids in together.ids_BT}) == 3
    for r, sampling in enumerate(rows):
        alone = make(config, PROMPTS[r : r + 1], sampling=sampling)
        np.testing.assert_array_equal(alone.ids_BT[0], together.ids_BT[r])
        for a, b in zip(alone[1:], together[1:], strict=True):
            np.testing.assert_allclose(a[0], b[r], atol=1e-5, rtol=0)


def test_drawn_log_probabilities_are_of_the_distribution_that_was_drawn_from():
    greedy = make(DENSE)
    assert np.all(greedy.drawn_logprobs_BT == 0)
    plain = make(DENSE, sampling=Sampling(1.0))
    np.testing.assert_allclose(plain.drawn_logprobs_BT, plain.logprobs_BT, atol=1e-5)
    one = make(DENSE, sampling=Sampling(1.0, 1))
    np.testing.assert_array_equal(one.ids_BT, greedy.ids_BT)
    np.testing.assert_allclose(one.drawn_logprobs_BT, 0, atol=1e-6)


def test_each_row_has_a_length_of_its_own():
    whole, cut = make(DENSE), make(DENSE, max_tokens=[3, NEW, 17])
    for r, most in enumerate([3, NEW, 17]):
        np.testing.assert_array_equal(cut.ids_BT[r, :most], whole.ids_BT[r, :most])
        assert np.all(cut.ids_BT[r, most:] == -1)
        assert np.all(np.isnan(cut.logprobs_BT[r, most:]))


def test_settings_by_row_compile_nothing():
    make(DENSE, sampling=Sampling(0.7))
    count = engine._decode._cache_size()
    make(DENSE, sampling=Sampling(np.array([0.0, 1.0, 2.0]), 3, 0.5, seed=np.arange(3)))
    assert engine._decode._cache_size() == count


def test_completions():
    model = transformer.Transformer(DENSE)
    rows = {"temperature": [0.0, 1.0], "seed": [0, 5], "max_tokens": [4, NEW]}
    made = complete(model, params(DENSE), TOKENIZER, ["a", "puna"], **rows)
    assert generate(model, params(DENSE), TOKENIZER, ["a", "puna"], **rows) == [
        completion.text for completion in made
    ]
    assert [len(m.ids) for m in made if m.finish_reason == "length"][:1] == [4]
    for m in made:
        assert len(m.ids) == len(m.logprobs) and max(m.logprobs) <= 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sampling": Sampling(np.array([0.0, -1.0, 0.0]))}, r"temperature=-1\.0 of row 1 must"),
        ({"sampling": Sampling(np.zeros(2))}, r"temperature has shape \(2,\).*3 rows"),
        ({"sampling": Sampling(seed=0.5)}, "seed=0.5 must be an integer"),
        ({"max_tokens": [1, 0, 1]}, r"max_tokens=\[1, 0, 1\] must be at least 1"),
        ({"max_tokens": [1, 2]}, "one for each of 3 rows"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(UserError, match=message):
        make(DENSE, **options)


@pytest.mark.parametrize("rows", [1, 2])
def test_no_table_is_converted_to_float32_for_the_loop_over_tokens(rows):
    """What runs by itself in the compiled program, fusions as one, makes no such array."""
    config = ModelConfig(
        vocab_size=4096, embed_dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
        mlp_dim=96, max_positions=64, param_dtype="bfloat16", compute_dtype="bfloat16",
        tie_embeddings=True,
    )  # fmt: skip
    weights = params(config)
    args = (
        transformer.Transformer(config), weights, bits.view(weights), init_cache(config, rows, 32),
        np.zeros(rows, np.int32), np.zeros(rows, bool), 0, 16, np.arange(rows, dtype=np.int32),
        np.full(rows, 16, np.int32), per_row(Sampling(), rows, rows), np.full(8, -1, np.int32),
        4000,
    )  # fmt: skip
    text = engine._decode.lower(*args).compile().as_text()
    # Computations of fusions hold their arrays in registers, a number at a time.
    fused = ("%fused", "%wrapped")
    own = [part for part in text.split("\n\n") if not part.lstrip().startswith(fused)]
    assert len(own) > 1
    lines = [line for part in own for line in part.splitlines()]
    made = [line for line in lines if " fusion(" in line or " copy(" in line]
    assert not [line for line in made if "= f32[4096,64]" in line or "= f32[64,4096]" in line]
