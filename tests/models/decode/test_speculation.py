"""Speculation changes how fast a text comes, never the text."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.configs.errors import UserError
from puna.configs.schema import ModelConfig
from puna.models import transformer
from puna.models.decode import cached_model, slots
from puna.models.decode.sampling import Sampling, sample
from puna.models.decode.slots import Engine
from puna.models.decode.speculation import check_draft, look_up
from puna.models.text.tokenizer import byte_tokenizer, train_bpe

TOKENIZER = byte_tokenizer()
CONFIG = ModelConfig(
    vocab_size=272, embed_dim=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8,
    mlp_dim=48, max_positions=128, rope_theta=100.0, nope_interval=2, chunk_size=6, qk_norm=True,
    compute_dtype="float32",
)  # fmt: skip
MODEL = transformer.Transformer(CONFIG)


@pytest.fixture(autouse=True)
def few_sizes(monkeypatch):
    monkeypatch.setattr(slots, "PIECES", (16,))


def looked_up(ids, count):
    """The definition, spelt out."""
    for n in (3, 2, 1):
        for start in range(len(ids) - 1, n - 1, -1):
            if len(ids) > n and ids[start - n : start] == ids[-n:]:
                text = list(ids)
                for i in range(count):
                    text.append(text[start + i])
                return text[len(ids) :]
    return []


@given(st.lists(st.integers(0, 2), min_size=1, max_size=25), st.integers(0, 6))
def test_looking_up(ids, count):
    assert look_up(np.array(ids, np.int32), count) == looked_up(ids, count)


def test_what_is_drawn_and_how_often_a_proposal_is_accepted():
    """One place, many keys: the target's share is exact, drafts agree as often as papers say."""
    rng, rows = np.random.default_rng(0), 40_000
    keys = jax.random.split(jax.random.key(1), rows)
    p, q = (np.log(rng.dirichlet(np.ones(6))).astype(np.float32) for _ in range(2))
    settings = (0.8, 5, 0.95)

    def drawn(logits):
        return np.asarray(sample(np.broadcast_to(logits, (rows, 6)), keys, *settings)[0])

    def exact(logits):
        order = np.argsort(-logits)[:5]
        mass = np.exp(logits[order] / 0.8)
        mass /= mass.sum()
        kept = np.cumsum(mass) - mass < 0.95
        full = np.zeros(6)
        full[order[kept]] = mass[kept] / mass[kept].sum()
        return full

    target, draft = drawn(p), drawn(q)
    for found, want in ((target, exact(p)), (draft, exact(q))):
        counts, want = np.bincount(found, minlength=6), rows * want
        assert not counts[want == 0].any()
        live = want > 0
        # 15.1 is passed once in 100 at 5 degrees of freedom; the keys are fixed.
        assert (((counts - want) ** 2)[live] / want[live]).sum() < 15.1
    apart = np.abs(exact(p) - exact(q)).sum() / 2
    error = 4 / rows**0.5
    assert (1 - apart) / (1 + apart) - error < np.mean(target == draft) < 1 - apart + error
    # A proposal that is one id: as often as the model draws it.
    assert np.mean(target == 2) == pytest.approx(exact(p)[2], abs=error)


def finish(running):
    made, steps = {slot: [] for slot in running.requests}, 0
    while running.requests:
        steps += 1
        for slot, token in running.step():
            made[slot].append(token)
    return made, steps


def test_a_draft_that_is_the_model_is_always_right(drawn):
    params = drawn(CONFIG)
    settings = (Sampling(), Sampling(1.2, seed=3), Sampling(0.9, 20, 0.9, seed=4))
    found = []
    for speculate, draft in ((0, None), (3, (MODEL, params))):
        running = Engine(MODEL, params, TOKENIZER, 3, 64, (), speculate, draft)
        running.warm_up()
        compiled = [f._cache_size() for f in (cached_model.write_tokens, cached_model._propose)]
        for number, sampling in enumerate(settings):
            running.insert([65, 66, 67], sampling, 30, number=number, top=2)
        found.append((*finish(running), running))
        assert compiled == [
            f._cache_size() for f in (cached_model.write_tokens, cached_model._propose)
        ]
    (plain, slow, _), (drafted, fast, running) = found
    assert running.accepted == running.proposed > 0
    # A step makes four tokens, or what is left of a chunk of six.
    assert fast < 0.5 * slow
    for slot, tokens in plain.items():
        got = drafted[slot]
        assert [t.id for t in got] == [t.id for t in tokens]
        assert [t.text for t in got] == [t.text for t in tokens]
        np.testing.assert_allclose([t.logprob for t in got], [t.logprob for t in tokens], atol=1e-4)
        assert [[i for i, _ in t.top] for t in got] == [[i for i, _ in t.top] for t in tokens]


def test_stop_strings_and_formats_with_a_draft(drawn):
    """Both may end a text, or forbid a proposal, in the middle of what is accepted.

    With keys and values in int8: what the model sees is the same however it came there.
    """
    pytest.importorskip("llguidance")
    from puna.models.decode import grammar

    params = drawn(CONFIG, 0.4)
    rng = np.random.default_rng(3)
    near = jax.tree.map(lambda x: x + np.float32(0.02) * rng.normal(size=x.shape), params)

    def texts(speculate, stop=()):
        draft = (MODEL, near) if speculate else None
        running = Engine(MODEL, params, TOKENIZER, 4, 100, (), speculate, draft, "int8")
        sources = [grammar.regex("(ab?){3,30}"), grammar.choices(["llama llama", "puna"])]
        for seed, constraint in enumerate([*map(running.constraints.compile, sources), None, None]):
            stops = () if constraint else stop
            running.insert([65], Sampling(1.0, seed=seed), 40, stops, constraint=constraint)
        made, _ = finish(running)
        assert not speculate or 10 < running.accepted < running.proposed
        return [("".join(t.text for t in made[s]), made[s][-1].finish_reason) for s in range(4)]

    whole = texts(0)
    stop = whole[3][0][4:6]
    assert texts(5, stop) == texts(0, stop) != whole


def test_drafts_that_do_not_fit():
    def refused(match, tokenizer=TOKENIZER, **changes):
        draft = dataclasses.replace(CONFIG, **changes)
        with pytest.raises(UserError, match=match):
            check_draft(TOKENIZER, tokenizer, CONFIG, draft, 100)

    other = train_bpe(["the llama herd"], 270)
    refused(r"--draft has another tokenizer \(\d+ ids, the model 259\)", other)
    refused(r"max_positions=64, which must be at least max_length=100", max_positions=64)
    refused(r"chunk_size=8, which must be 0 or the model's 6", chunk_size=8)
    check_draft(TOKENIZER, byte_tokenizer(), CONFIG, CONFIG, 100)
    with pytest.raises(UserError, match="speculate=-1 must be at least 0"):
        Engine(MODEL, {}, TOKENIZER, speculate=-1)
