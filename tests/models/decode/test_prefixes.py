"""Rows that begin alike: what may be taken is in the cache, and greedy ids are as without."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.configs.schema import ModelConfig
from puna.models import transformer
from puna.models.decode import slots
from puna.models.decode.generate import complete
from puna.models.decode.prefixes import Prefixes
from puna.models.decode.sampling import Sampling
from puna.models.decode.slots import Engine
from puna.models.text.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
CHUNK, LENGTH = 6, 64
CONFIG = ModelConfig(
    vocab_size=272, embed_dim=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8,
    mlp_dim=48, max_positions=64, rope_theta=100.0, nope_interval=2, chunk_size=CHUNK,
    compute_dtype="float32",
)  # fmt: skip
MODEL = transformer.Transformer(CONFIG)


@pytest.fixture(scope="module")
def params(drawn):
    return drawn(CONFIG)


class Cache:
    """An oracle: what `LayerCache` writes where, for layers without and with chunks."""

    def __init__(self, rows):
        self.full = [{} for _ in range(rows)]
        self.ring = [{} for _ in range(rows)]  # by slot, (position, id)

    def add(self, row, start, ids):
        for position, i in enumerate(ids, start):
            self.full[row][position] = i
            self.ring[row][position % CHUNK] = position, i

    def copy(self, source, row, count):
        self.full[row] = {p: i for p, i in self.full[source].items() if p < count}
        self.ring[row] = {s: x for s, x in self.ring[source].items() if x[0] < count}

    def can_give(self, row, ids):
        """Whether all that the token after `ids` may attend to is there."""
        count = len(ids)
        full = all(self.full[row].get(p) == i for p, i in enumerate(ids))
        own = range(count // CHUNK * CHUNK, count)
        return full and all(self.ring[row].get(p % CHUNK) == (p, ids[p]) for p in own)


@settings(max_examples=150)
@given(data=st.data())
def test_what_is_given_is_in_the_cache_and_nothing_more_would_be(data):
    cache, held = Cache(3), Prefixes(3, LENGTH, CHUNK)
    for _ in range(data.draw(st.integers(1, 12))):
        row = data.draw(st.integers(0, 2))
        # Few ids, so that texts begin alike; what an adapter makes of an id is its own.
        wanted = np.array(data.draw(st.lists(st.sampled_from([5, 5, 5, 7]), max_size=30)), np.int32)
        adapter = data.draw(st.sampled_from([-1, -1, 0]))
        shared = [held.shared(r, wanted, adapter) for r in range(3)]
        for r, count in enumerate(shared):
            assert cache.can_give(r, [(i, adapter) for i in wanted[:count]])
            common = [held.shared(r, wanted[:n], adapter) for n in range(count + 1)]
            assert max(common, default=0) <= count
        source = int(np.argmax(shared))
        count = shared[source]
        cache.copy(source, row, count), held.copy(source, row, wanted[:count], adapter)
        # A request may be cancelled while its prompt is read, or after.
        rest = wanted[count : data.draw(st.integers(count, len(wanted)))]
        cache.add(row, count, [(i, adapter) for i in rest]), held.add(row, rest)
        # Within its last chunk a row that was computed from the first on can give all.
        if not count:
            assert held.shared(row, wanted[: len(rest)], adapter) == len(rest)


def finish(running):
    made = {slot: [] for slot in running.requests}
    while running.requests:
        for slot, token in running.step():
            made[slot].append(token)
    return made


def some_prompts(rng, count):
    """Prompts that begin as others do, up to any token."""
    prompts = []
    for _ in range(count):
        # Of those that may be there still.
        old = prompts[-rng.integers(1, 4)] if len(prompts) > 3 and rng.random() < 0.9 else []
        more = rng.integers(0, 256, rng.integers(1, 18)).tolist()
        prompts.append([*old[: rng.integers(len(old) + 1)], *more][:40])
    return prompts


@pytest.mark.slow  # test_slots.py has fewer of them
def test_requests_that_begin_alike_get_what_they_get_alone(params, monkeypatch):
    count = 200
    monkeypatch.setattr(slots, "PIECES", (4, 16))
    rng = np.random.default_rng(2)
    prompts = some_prompts(rng, count)
    want = complete(MODEL, params, TOKENIZER, prompts, 9)
    running, held, made, waiting = Engine(MODEL, params, TOKENIZER, 3, LENGTH), {}, {}, []
    waiting = list(range(count))
    while waiting or held:
        while waiting and running.free and rng.random() < 0.6:
            r = waiting.pop(0)
            slot = running.insert(prompts[r], max_tokens=9)
            assert slot not in held
            held[slot], made[r] = r, []
        for slot, token in running.step():
            made[held[slot]].append(token)
            if token.finish_reason:
                del held[slot]
        if held and rng.random() < 0.05:
            slot = list(held)[0]
            running.evict(slot)
            del held[slot]
    for r, tokens in made.items():
        assert [token.id for token in tokens] == want[r].ids[: len(tokens)]
        np.testing.assert_allclose(
            [t.logprob for t in tokens], want[r].logprobs[: len(tokens)], atol=1e-4
        )
    read = sum(len(prompt) - 1 for prompt in prompts)
    assert 0.1 * read < running.reused < read


def test_a_conversation_is_read_from_where_it_went_on(params, monkeypatch):
    monkeypatch.setattr(slots, "PIECES", (16,))
    running = Engine(MODEL, params, TOKENIZER, 2, LENGTH)
    first = list(range(20, 39))
    slot = running.insert(first, max_tokens=5)
    answer = [token.id for token in finish(running)[slot]]
    # The last id made has not been an input yet.
    again = running.insert([*first, *answer[:4], 1, 2], max_tokens=2)
    finish(running)
    assert again == slot and running.reused == len(first) + 4
    # Equal prompts that come together: the first is read, the others take it.
    before = running.reused
    for number in range(2):
        running.insert(list(range(100, 118)), Sampling(1.0, seed=1), 2, number=number)
    finish(running)
    assert running.reused == before + 17
