"""Continuous batching: requests that come and go, each as if it were alone."""

import functools
import random

import jax
import numpy as np
import pytest

from puna.configs.errors import UserError
from puna.configs.schema import MeshConfig, ModelConfig
from puna.models import transformer
from puna.models.decode import cached_model, pages, slots
from puna.models.decode.generate import complete
from puna.models.decode.sampling import Sampling
from puna.models.decode.slots import Engine, Full
from puna.models.parallel import sharding
from puna.models.text.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
# As in test_generate.py: wider than the tokenizer, chunks shorter than the prompts, a tail.
CONFIG = ModelConfig(
    vocab_size=272, embed_dim=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8,
    mlp_dim=48, max_positions=128, rope_theta=100.0, nope_interval=2, chunk_size=6, qk_norm=True,
    compute_dtype="float32",
)  # fmt: skip
MODEL = transformer.Transformer(CONFIG)
LENGTH = 80


@functools.cache
def params():
    rng = np.random.default_rng(0)

    def draw(path, shape):
        x = rng.normal(size=shape.shape)
        x = 1 + 0.1 * x if "norm" in str(path[-2]) else 0.5 * x
        return jax.device_put(np.float32(x).astype(shape.dtype))

    shapes = sharding.unbox(transformer.abstract_params(CONFIG))
    return jax.tree.map_with_path(draw, shapes)


@pytest.fixture(autouse=True)
def few_sizes(monkeypatch):
    """Pieces that cross borders of chunks and pages, of two sizes only."""
    monkeypatch.setattr(slots, "PIECES", (4, 16))
    monkeypatch.setattr(pages, "PAGE", 4)


def engine(num_slots=4, **options):
    return Engine(MODEL, params(), TOKENIZER, num_slots, max_length=LENGTH, **options)


def finish(running):
    """Step until all is done: the tokens by slot."""
    made = {slot: [] for slot in running.requests}
    while running.requests:
        for slot, token in running.step():
            made[slot].append(token)
    return made


def some_requests(count):
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 256, rng.integers(1, 40)).tolist() for _ in range(count)]
    return prompts, rng.integers(1, 34, count)


def come_and_go(running, count, cancel):
    """Random arrivals and cancellations, each request as if it were alone."""
    prompts, most = some_requests(count)
    # Many begin as others do, up to any token.
    begin = [prompts[r] * 40 for r in range(3)]
    for r in range(0, count, 2):
        prompts[r] = [*begin[r % 3][: r % 37], *prompts[r]][:40]
    heats = np.where(np.arange(count) % 2, 1.3, 0.0)
    # Row r of one call is request number r, whenever it comes and whatever is beside it.
    want = complete(MODEL, params(), TOKENIZER, prompts, most, temperature=heats, seed=7)
    dice = random.Random(0)
    waiting, held, made, cancelled = list(range(count)), {}, {}, set()
    dice.shuffle(waiting)
    while waiting or held:
        while waiting and running.free and dice.random() < 0.5:
            r = waiting.pop()
            sampling = Sampling(float(heats[r]), seed=7)
            try:
                slot = running.insert(prompts[r], sampling, int(most[r]), number=r)
            except Full:  # of tokens
                assert held
                waiting.append(r)
                break
            held[slot], made[r] = r, []
        for slot, token in running.step():
            made[held[slot]].append(token)
            if token.finish_reason:
                del held[slot]
        if held and dice.random() < cancel:
            slot = dice.choice(list(held))
            running.evict(slot)
            cancelled.add(held.pop(slot))
    assert 0.08 * count < len(cancelled) < 0.7 * count
    assert running.reused > count
    for r, tokens in made.items():
        ids = [token.id for token in tokens]
        assert ids == want[r].ids[: len(ids)]
        np.testing.assert_allclose(
            [t.logprob for t in tokens], want[r].logprobs[: len(ids)], atol=1e-4
        )
        if r not in cancelled:
            assert len(ids) == len(want[r].ids)
            assert "".join(token.text for token in tokens) == want[r].text
            assert tokens[-1].finish_reason == want[r].finish_reason


def test_requests_that_come_and_go_get_what_generate_gives():
    # Room for some two of four.
    come_and_go(engine(cache_tokens=168), 60, cancel=0.05)


def a_draft():
    """Parameters near those of the model, so that about half of what they propose is right."""
    rng = np.random.default_rng(3)
    return jax.tree.map(
        lambda x: jax.device_put(np.asarray(x) + np.float32(0.02 * rng.normal(size=x.shape))),
        params(),
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "looked up", "drafted"])
def test_five_hundred_requests_come_and_go(kind):
    options = {
        "plain": {},
        "looked up": {"speculate": 3},
        "drafted": {"speculate": 3, "draft": (MODEL, a_draft())},
    }[kind]
    running = engine(**options)
    come_and_go(running, 500, cancel=0.05)
    assert options == {} or 0 < running.accepted < running.proposed


@pytest.mark.slow
@pytest.mark.parametrize("speculate", [0, 3])
def test_five_hundred_requests_come_and_go_on_eight_devices(speculate):
    mesh = sharding.make_mesh(MeshConfig(fsdp=4, tensor=2), jax.devices()[:8])
    specs = sharding.shardings(transformer.abstract_params(CONFIG), mesh)
    with jax.set_mesh(mesh):
        draft = (MODEL, jax.device_put(a_draft(), specs)) if speculate else None
        placed = jax.device_put(params(), specs)
        split = Engine(MODEL, placed, TOKENIZER, 4, LENGTH, (), speculate, draft)
        come_and_go(split, 500, cancel=0.05)
    assert split.accepted < split.proposed or not speculate


def test_each_row_has_its_own_settings_and_none_compiles():
    running = engine()
    settings = [Sampling(), Sampling(1.5, seed=3), Sampling(1.0, 5, 0.9, 0.01, seed=4), Sampling()]
    finish_alone = []
    for sampling in settings:
        running.insert(TOKENIZER.encode("the llama"), sampling, 9, number=2)
        finish_alone.append(finish(running)[0])
    running.insert(list(range(20)), max_tokens=1)
    finish(running)
    counts = cached_model.read_piece._cache_size(), cached_model.write_tokens._cache_size()
    held = [
        running.insert(TOKENIZER.encode("the llama"), sampling, 9, number=2, top=3)
        for sampling in settings
    ]
    together = finish(running)
    for slot, alone in zip(held, finish_alone, strict=True):
        assert [t.id for t in together[slot]] == [t.id for t in alone]
    assert counts == (
        cached_model.read_piece._cache_size(),
        cached_model.write_tokens._cache_size(),
    )
    assert len({tuple(t.id for t in row) for row in finish_alone}) == 3


def test_the_likeliest_ids_come_with_their_logprobs():
    running = engine()
    running.insert(TOKENIZER.encode("puna"), max_tokens=3, top=4)
    running.insert(TOKENIZER.encode("puna"), max_tokens=3)
    made = finish(running)
    assert [token.top for token in made[1]] == [[]] * 3
    for token in made[0]:
        assert token.top[0] == (token.id, pytest.approx(token.logprob, abs=1e-5))
        values = [logprob for _, logprob in token.top]
        assert values == sorted(values, reverse=True) and len(values) == 4


def test_a_long_prompt_does_not_stop_the_others():
    running = engine(2)
    first = running.insert([65], max_tokens=6)
    assert [slot for slot, _ in running.step()] == [first]
    second = running.insert([66] * 40, max_tokens=2)  # three pieces
    found = [sorted(slot for slot, _ in running.step()) for _ in range(3)]
    assert found == [[first], [first], [first, second]]


def test_stop_strings_and_slots():
    want = complete(MODEL, params(), TOKENIZER, ["the llama"], 20)[0]
    stop = want.text[5:7]
    running = engine()
    ids = TOKENIZER.encode("the llama", bos=True)
    running.insert(ids, max_tokens=20, stop=stop)
    tokens = finish(running)[0]
    assert "".join(token.text for token in tokens) == want.text[: want.text.index(stop)]
    assert tokens[-1].finish_reason == "stop"
    assert running.free == 4


def test_a_full_engine_says_so_and_an_evicted_slot_is_clean():
    running = engine(2)
    prompt = TOKENIZER.encode("the llama herd")
    running.insert(prompt, max_tokens=5)
    want = [token.id for token in finish(running)[0]]
    for _ in range(2):
        running.insert([70] * 50, max_tokens=20)
    with pytest.raises(Full, match="all 2 slots are taken"):
        running.insert(prompt)
    for _ in range(9):
        running.step()
    running.evict(1)
    running.evict(1)
    slot = running.insert(prompt, max_tokens=5)
    assert slot == 1
    assert [token.id for token in finish(running)[1]] == want


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prompt_ids": []}, "prompt 0 is empty"),
        ({"prompt_ids": [259]}, "prompt 0 has id 259"),
        ({"prompt_ids": [1] * 79, "max_tokens": 2}, "79 tokens.*more than max_length=80"),
        ({"max_tokens": 0}, "max_tokens=0 must"),
        ({"sampling": Sampling(-1.0)}, r"temperature=-1\.0 must"),
        ({"stop": ""}, "stop has an empty string"),
        ({"top": 21}, r"top=21 must lie in 0\.\.20"),
    ],
)
def test_mistakes_take_no_slot(options, message):
    running = engine()
    with pytest.raises(UserError, match=message):
        running.insert(**{"prompt_ids": [65], **options})
    assert running.free == 4


def test_impossible_engines():
    with pytest.raises(UserError, match="num_slots=0 must be at least 1"):
        engine(0)
    with pytest.raises(UserError, match="cache_tokens=80 must be at least 84: for one request of"):
        engine(cache_tokens=80)
    assert Engine(MODEL, params(), TOKENIZER, 1, max_length=10**9).max_length == 128


def test_on_a_mesh():
    ids = TOKENIZER.encode("the llama herd", bos=True)
    prompts = [ids, ids[::-1], [*ids[:9], *ids[:4]]]
    alone = engine(1, cache_dtype="int8")
    want = []
    for prompt in prompts:
        alone.insert(prompt, max_tokens=8)
        want.append([token.id for token in finish(alone)[0]])
    # Four rows for three slots: the mesh splits rows, and with them pages, and heads.
    mesh = sharding.make_mesh(MeshConfig(fsdp=2, tensor=2), jax.devices()[:4])
    specs = sharding.shardings(transformer.abstract_params(CONFIG), mesh)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params(), specs)
        split = Engine(MODEL, placed, TOKENIZER, 3, LENGTH, cache_dtype="int8")
        split.warm_up()
        counts = cached_model.read_piece._cache_size(), cached_model.write_tokens._cache_size()
        slots = [split.insert(prompt, max_tokens=8) for prompt in prompts]
        assert split.free == 0
        made = finish(split)
        assert [[token.id for token in made[slot]] for slot in slots] == want
        got, reused = want[0], split.reused
        again = split.insert([*ids, *got[:3]], max_tokens=5)
        after = [token.id for token in finish(split)[again]]
    # The slot has left the chunk that 17 ids end in: it gives the chunks of 6 before.
    assert after == got[3:] and split.reused - reused == 12
    assert counts == (
        cached_model.read_piece._cache_size(),
        cached_model.write_tokens._cache_size(),
    )
