"""Log-probabilities of continuations: those of the whole forward pass, for any batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puna.configs import schema
from puna.configs.errors import UserError
from puna.eval import scoring
from puna.models.parallel import sharding
from puna.models.transformer import Transformer, init_params

CONFIG = schema.ModelConfig(
    vocab_size=64, embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=16
)
LLAMA4 = dataclasses.replace(
    CONFIG, compute_dtype="float32", num_layers=4, nope_interval=2, chunk_size=24, qk_norm=True,
    temperature_scale=0.1, moe_interval=2, num_experts=4, expert_dim=16, temperature_floor=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def texts():
    """Of several lengths; twelve differ in their last token only, one pair in its border only; five
    are after one context, and six after contexts that begin alike."""
    rng = np.random.default_rng(0)
    made = [
        (rng.integers(0, 64, m).tolist(), rng.integers(0, 64, n).tolist())
        for m, n in [(1, 1), (3, 4), (20, 2), (12, 3), (1, 9)]
    ]
    made += [(made[1][0], made[1][1][:-1] + [last]) for last in range(12)]
    made.append((made[3][0] + made[3][1][:1], made[3][1][1:]))

    def some(count):
        return rng.integers(0, 64, count).tolist()

    context, stem = some(40), some(70)
    made += [(context, some(n)) for n in (1, 2, 2, 5, 30)]
    ends = [some(n) for n in (0, 1, 9, 20, 30)]
    made += [(stem + end, some(3)) for end in ends] + [(stem + ends[-1], some(4))]
    return made


def drawn(config):
    params = init_params(config, jax.random.key(0), sharding.make_mesh(schema.MeshConfig()))
    # Far from even; through four such layers a rounding would grow to 1e-4.
    times = 3 if config.num_layers == 1 else 1
    return jax.tree.map(lambda x: times * x, params)


@pytest.fixture(scope="module")
def params():
    return drawn(CONFIG)


def scores(mesh_config, devices, params, texts, batch_size, config=CONFIG):
    mesh = sharding.make_mesh(mesh_config, devices)
    params = jax.device_put(params, sharding.replicated(mesh))
    with jax.set_mesh(mesh):
        return dict(scoring.score(Transformer(config), params, texts, batch_size))


@pytest.mark.parametrize("config", [CONFIG, LLAMA4], ids=["dense", "llama4"])
@pytest.mark.slow
def test_they_are_those_of_the_whole_pass_on_one_device_and_on_eight(config, texts):
    params, one = drawn(config), schema.MeshConfig(fsdp=1)
    alone = scores(one, jax.devices()[:1], params, texts, 1, config)
    assert sorted(alone) == list(range(len(texts)))
    mesh = sharding.make_mesh(one, jax.devices()[:1])
    params = jax.device_put(params, sharding.replicated(mesh))
    apply = jax.jit(Transformer(config).apply)
    greedy = 0
    for number, (context, continuation) in enumerate(texts):
        ids = [*context, *continuation]
        row = np.zeros((1, 112), np.int32)
        row[0, : len(ids)] = ids
        logits = np.asarray(apply({"params": params}, row).logits_BTV, np.float64)[0]
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        places = range(len(context) - 1, len(ids) - 1)
        wanted = sum(logprobs[t, ids[t + 1]] for t in places)
        assert abs(alone[number].logprob - wanted) < 1e-4
        wanted = all(logprobs[t].argmax() == ids[t + 1] for t in places)
        assert alone[number].greedy == wanted
        greedy += wanted
    # The likeliest of all ids comes after one of the contexts: a flag that is always off is found.
    best = [(texts[0][0], [i]) for i in range(64)]
    assert (
        sum(s.greedy for s in scores(one, jax.devices()[:1], params, best, 1, config).values()) == 1
    )
    eight = scores(schema.MeshConfig(fsdp=4, tensor=2), None, params, texts, 8, config)
    for number, found in alone.items():
        assert abs(eight[number].logprob - found.logprob) < 1e-4
        assert eight[number].greedy == found.greedy


def test_batches_that_are_known_are_passed_over_and_the_others_are_the_same(params, texts):
    mesh = sharding.make_mesh(schema.MeshConfig(fsdp=1), jax.devices()[:1])
    placed = jax.device_put(params, sharding.replicated(mesh))
    with jax.set_mesh(mesh):
        whole = list(scoring.score(Transformer(CONFIG), placed, texts, 3))
        first = {number for number, _ in whole[:4]}
        rest = list(scoring.score(Transformer(CONFIG), placed, texts, 3, first))
        assert not list(scoring.score(Transformer(CONFIG), placed, texts, 3, range(len(texts))))
    # Equal to the bit; a text that is known is asked again only with others of its batch.
    assert set(rest) < set(whole) and {n for n, _ in rest} >= set(range(len(texts))) - first


def test_what_cannot_be_scored(params):
    one = schema.MeshConfig(fsdp=1)
    with pytest.raises(UserError, match=r"gives id 64 and the model has ids 0\.\.63"):
        scores(one, jax.devices()[:1], params, [([1], [64])], 1)
    damaged = jax.tree.map(lambda x: x * jnp.nan, params)
    with pytest.raises(UserError, match="log-probability of nan"):
        scores(one, jax.devices()[:1], damaged, [([1], [2])], 1)


def test_few_lengths():
    lengths = [scoring.padded(n) for n in range(1, 4097)]
    assert all(0 < p - n <= max(16, p // 3) or p == n for n, p in enumerate(lengths, 1))
    assert len(set(lengths)) == 17


def test_what_several_texts_begin_with_is_computed_once(texts):
    groups = scoring._groups(texts, 64)
    numbers = sorted(n for group in groups for n in group.numbers)
    assert numbers == list(range(len(texts)))
    assert sorted(len(g.rows) for g in groups if g.shares) == [2, 5]
    assert sorted(g.stem for g in groups)[-5:] == [69] * 5  # the last id of a context is read later
    read = {
        tuple(group.prefix) + row.tail: group.prefix[: group.stem] + group.rest + row.tail
        for group in groups for row in group.rows
    }  # fmt: skip
    assert all(ids == again for ids, again in read.items())
    # Too few that share, or too little of what is shared.
    few = [([1] * 80 + [n, n], [2]) for n in range(3)]
    little = [([1] * 70 + [n] * 400, [2]) for n in range(8)]
    for other in (few, little):
        assert not any(group.stem for group in scoring._groups(other, 64))
