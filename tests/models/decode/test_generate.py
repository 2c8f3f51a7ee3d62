"""Generation: one row or many, sampling as documented, ends of a text, mistakes."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, example, given
from hypothesis import strategies as st

from puna.configs.errors import UserError
from puna.configs.schema import MeshConfig, ModelConfig
from puna.models import transformer
from puna.models.decode import engine
from puna.models.decode import sampling as sampling_lib
from puna.models.decode.generate import generate, stream
from puna.models.decode.sampling import Sampling, sample
from puna.models.parallel import sharding
from puna.models.text.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
# Wider than the tokenizer; chunks shorter than the prompts; a tail after the scanned period.
CONFIG = ModelConfig(
    vocab_size=272, embed_dim=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8,
    mlp_dim=48, max_positions=128, rope_theta=100.0, nope_interval=2, chunk_size=6, qk_norm=True,
    compute_dtype="float32",
)  # fmt: skip
MODEL = transformer.Transformer(CONFIG)
PROMPTS = ["a", "the llama herd", "puna"]
# With any of the prompts below, this many make a cache of one size: less to compile.
NEW = 33


@functools.cache
def params():
    """Parameters that compile nothing, large enough for confident choices."""
    rng = np.random.default_rng(0)

    def draw(path, shape):
        x = rng.normal(size=shape.shape)
        x = 1 + 0.1 * x if "norm" in str(path[-2]) else 0.5 * x
        return jax.device_put(np.float32(x).astype(shape.dtype))

    shapes = sharding.unbox(transformer.abstract_params(CONFIG))
    return jax.tree.map_with_path(draw, shapes)


def ids_of(prompts, max_tokens=NEW, **options):
    """What `decode` makes, as one array [B, max_tokens]."""
    prompts = [TOKENIZER.encode(p, bos=True) for p in prompts]
    return made_of(prompts, max_tokens, **options).ids_BT


def made_of(prompts, max_tokens=NEW, *, sampling=None, seed=0, **options):
    """What `decode` makes of rows of ids, as one `Block`."""
    sampling = (sampling or Sampling())._replace(seed=seed)
    options = {"vocab_size": TOKENIZER.vocab_size, "sampling": sampling, **options}
    blocks = engine.decode(MODEL, params(), prompts, max_tokens, **options)
    return engine.Block(*(np.concatenate(x, 1) for x in zip(*blocks, strict=True)))


# Rows, alone and together


def test_greedy_is_the_largest_logit_of_the_full_forward():
    forward = jax.jit(lambda tokens: MODEL.apply({"params": params()}, tokens).logits_BTV)
    made = ids_of(PROMPTS)
    for prompt, new in zip(PROMPTS, made, strict=True):
        prompt = TOKENIZER.encode(prompt, bos=True)
        row = np.zeros((1, 48), np.int32)
        row[0, : len(prompt) + len(new)] = [*prompt, *new]
        logits = np.asarray(forward(row))[0, len(prompt) - 1 :][: len(new), : TOKENIZER.vocab_size]
        top = np.sort(logits, axis=-1)
        assert np.all(top[:, -1] - top[:, -2] > 1e-4), "a tie would make this test a coin toss"
        np.testing.assert_array_equal(new, logits.argmax(-1))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.5), Sampling(1.0, 40, 0.9, 0.01)])
def test_a_row_is_the_same_alone(sampling):
    together = ids_of(PROMPTS, sampling=sampling, seed=3)
    for r, prompt in enumerate(PROMPTS):
        alone = ids_of([prompt], sampling=sampling, seed=3, first_row=r)
        np.testing.assert_array_equal(alone[0], together[r])


def test_equal_prompts_draw_unequal_texts_and_a_seed_repeats_them():
    same = ["llama"] * 3
    first, again, other = (ids_of(same, sampling=Sampling(1.5), seed=s) for s in (0, 0, 1))
    assert len({tuple(row) for row in [*first, *other]}) == 6
    np.testing.assert_array_equal(first, again)


def test_a_long_prompt_goes_in_pieces(monkeypatch):
    whole = ids_of(PROMPTS)
    monkeypatch.setattr(engine, "_PIECE", 5)
    np.testing.assert_array_equal(ids_of(PROMPTS), whole)


def test_blocks_of_any_size_make_the_same_tokens():
    sampling = Sampling(1.5)
    want = ids_of(PROMPTS, sampling=sampling)
    for block in (1, 7, 99):
        np.testing.assert_array_equal(ids_of(PROMPTS, sampling=sampling, block=block), want)


def test_ended_rows_leave_the_others_alone():
    free = ids_of(PROMPTS)
    stop = int(free[1, 4])
    made = ids_of(PROMPTS, stop_ids=[stop])
    for row, want in zip(made, free, strict=True):
        end = [*want, stop].index(stop) + 1
        np.testing.assert_array_equal(row[:end], want[:end])
        assert np.all(row[end:] == -1)
    assert np.sum(made[1] >= 0) == 5


def test_on_a_mesh():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    specs = sharding.shardings(transformer.abstract_params(CONFIG), mesh)
    on_mesh = jax.device_put(params(), specs)
    want = generate(MODEL, params(), TOKENIZER, PROMPTS, max_tokens=NEW)
    with jax.set_mesh(mesh):
        # Three rows in four parts.
        assert generate(MODEL, on_mesh, TOKENIZER, PROMPTS, max_tokens=NEW) == want


def test_settings_and_lengths_compile_once():
    ids_of(PROMPTS)
    counts = engine._prefill._cache_size(), engine._decode._cache_size()
    for prompts in (["abcd", "efg", "h"], ["a", "b" * 15, "c"]):
        for sampling in (Sampling(0.7), Sampling(1, 5), Sampling(2.0, 0, 0.5, 0.1), None):
            ids_of(prompts, 31, sampling=sampling, seed=5, stop_ids=(257,))
    # Prompts up to 17 ids and 33 to 48 in all are one size, as are up to 7 stop ids.
    assert counts == (engine._prefill._cache_size(), engine._decode._cache_size())


@given(st.integers(1, 10**7))
def test_rounding_up_wastes_a_third_at_most(length):
    rounded = engine.round_up(length)
    assert length <= rounded <= max(16, 1.5 * length)
    assert engine.round_up(rounded) == rounded


# Sampling


@functools.cache
def sampler(narrow):
    """`sample`, compiled to rank this many ids at first."""
    jit = jax.jit(lambda *args: sample(*args)[0])

    def run(*args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampling_lib, "_NARROW", narrow)
            return np.asarray(jit(*args))

    return run


def typed(sampling):
    return [np.float32(x) if i != 1 else np.int32(x) for i, x in enumerate(sampling[:4])]


def draws(logits, sampling, narrow=1024, count=4096):
    """How often each id is drawn from one row of logits."""
    keys = jax.random.split(jax.random.key(0), count)
    rows = np.broadcast_to(np.asarray(logits, np.float32), (count, len(logits)))
    ids = sampler(narrow)(rows, keys, *typed(sampling))
    return np.bincount(ids, minlength=len(logits))


def kept(logits, temperature, top_k, top_p, min_p):
    """Probability of each id by the definition, in float64."""
    logits = np.asarray(logits, np.float64) / temperature
    p = np.exp(logits - logits.max())
    ranking = np.argsort(-p, kind="stable")
    if top_k:
        ranking = ranking[:top_k]
    ranked = p[ranking] / p[ranking].sum()
    if top_p < 1:
        ranking = ranking[: np.searchsorted(np.cumsum(ranked), top_p) + 1]
    ranking = [i for i in ranking if p[i] >= min_p * p.max()]
    keep = np.zeros(len(p))
    keep[ranking] = p[ranking] / p[ranking].sum()
    return keep


LOGITS = [0.5, -1.0, 1.5, 0.0, 0.5, -0.5, -1.5, 1.0]
SETTINGS = [
    Sampling(1.0), Sampling(0.5), Sampling(2.0, 5), Sampling(1.0, 0, 0.8),
    Sampling(0.8, 0, 1.0, 0.3), Sampling(1.3, 6, 0.9, 0.2),
]  # fmt: skip


@pytest.mark.parametrize("sampling", SETTINGS)
def test_frequencies_are_the_softmax(sampling):
    want = kept(LOGITS, *sampling[:4])
    got = draws(LOGITS, sampling)
    assert np.all(got[want == 0] == 0)
    at = want > 0
    assert scipy.stats.chisquare(got[at], want[at] * got.sum()).pvalue > 1e-3


@pytest.mark.parametrize("narrow", [1024, 3])
# More ids are kept than are ranked at first: by top-p, and by top-k with a top-p inside it.
@example(logits=[0.0] * 8, settings=(1.0, 0, 0.97, 0.0))
@example(logits=[0.0] * 8, settings=(1.0, 7, 0.5, 0.0))
@given(
    logits=st.lists(st.integers(-3, 3).map(lambda i: i / 2), min_size=8, max_size=8),
    settings=st.tuples(
        st.floats(0.8, 3.0),
        st.integers(0, 9),
        st.sampled_from([1.0, 0.97, 0.8, 0.5, 0.2, 0.01]),
        st.sampled_from([0.0, 0.05, 0.3, 0.7, 1.0]),
    ),
)
def test_the_filters_keep_what_they_say(narrow, logits, settings):
    # Each id that is kept has a probability of 0.3% at least: in 4096 draws it comes up.
    temperature, top_k, top_p, min_p = settings
    want = kept(logits, *settings) > 0
    # In float32 an id on the very edge may fall on either side.
    for d in (-1e-4, 1e-4):
        near = kept(logits, temperature, top_k, min(top_p + d, 1.0), min(max(min_p + d, 0.0), 1.0))
        assume(np.array_equal(near > 0, want))
    np.testing.assert_array_equal(draws(logits, settings, narrow) > 0, want)


def test_top_p_takes_the_smallest_set_and_at_least_one():
    quarters = [0.0] * 4 + [-np.inf] * 4
    # Half the mass is reached exactly by two of four; equal logits rank by id.
    assert np.flatnonzero(draws(quarters, (1.0, 0, 0.5, 0.0))).tolist() == [0, 1]
    assert np.flatnonzero(draws(quarters, (1.0, 0, 0.51, 0.0))).tolist() == [0, 1, 2]
    assert np.flatnonzero(draws(quarters, (1.0, 0, 1e-6, 0.0))).tolist() == [0]
    assert np.flatnonzero(draws(quarters, (1.0, 3, 0.5, 0.0))).tolist() == [0, 1]


def test_a_filter_changes_a_draw_only_if_it_forbids_it():
    logits = np.random.default_rng(0).normal(size=(4096, 8)).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 4096)
    free = sampler(1024)(logits, keys, *typed(Sampling(1.0)))
    cut = sampler(1024)(logits, keys, *typed(Sampling(1.0, 4)))
    in_top_4 = (logits > np.take_along_axis(logits, free[:, None], 1)).sum(1) < 4
    assert 0 < in_top_4.sum() < 4096
    np.testing.assert_array_equal(cut[in_top_4], free[in_top_4])
    assert np.all(cut[~in_top_4] != free[~in_top_4])


def test_extreme_settings_stay_finite():
    wild = [1e30, -1e30, 3e4, -np.inf, 0.0, 1.0, -1.0, 2.0]
    for sampling in (Sampling(1e-30), Sampling(1e-30, 3, 0.5, 0.5), Sampling(0.0)):
        assert np.flatnonzero(draws(wild, sampling)).tolist() == [0]
    hot = draws(LOGITS, Sampling(1e30))
    assert scipy.stats.chisquare(hot).pvalue > 1e-3
    assert np.all(draws([0.0, 1.0, -np.inf, -np.inf] * 2, Sampling(1e30))[[2, 3, 6, 7]] == 0)


# Text


@dataclasses.dataclass(frozen=True)
class Script:
    """A model that says what its parameters tell it to, whatever the tokens."""

    config: ModelConfig = CONFIG

    def apply(self, variables, x, segment_ids_BT=None, images=None, cache=None, method=None):
        assert not self.config.capacity_factor
        if method == "logits":
            return x
        said_BT, prompt_B = variables["params"]["script"]
        lengths_B = cache.lengths_B + jnp.sum(segment_ids_BT, axis=1)
        said_B = said_BT[jnp.arange(len(x)), lengths_B - prompt_B]
        logits_BTV = jax.nn.one_hot(said_B, self.config.vocab_size)[:, None]
        cache = cache.replace(lengths_B=lengths_B)
        return types.SimpleNamespace(hidden_BTD=logits_BTV, cache=cache)

    def clone(self, config):
        return Script(config)


def say(said, prompts=None, max_tokens=46, *, model=None, tokenizer=TOKENIZER, run=generate,
        **options):  # fmt: skip
    """Let the model say texts or ids and return what generation makes of them."""
    single = not isinstance(said, list)
    said = [said] if single else said
    prompts = ["?"] * len(said) if prompts is None else prompts
    said_BT = np.full((len(said), 48), ord("~"), np.int32)
    for row, x in zip(said_BT, said, strict=True):
        ids = list(x.encode() if isinstance(x, str) else x)
        row[: len(ids)] = ids
    lengths = [len(p.encode()) + 1 if isinstance(p, str) else len(p) for p in prompts]
    script = {"script": (said_BT, np.array(lengths, np.int32)), "unembed": np.zeros(())}
    prompts = prompts[0] if single else prompts
    return run(model or Script(), script, tokenizer, prompts, max_tokens, **options)


def streamed(*args, **options):
    return list(say(*args, run=stream, **options))


EOS = TOKENIZER.eos_id


def test_one_string_gives_a_string_and_a_list_gives_a_list():
    assert say("hello" + "~" * 40, max_tokens=5) == "hello"
    assert say(["ab", "cd", "ef"], max_tokens=2) == ["ab", "cd", "ef"]
    assert say(["ab", "cd", "ef"], [[256, 65], "longer", [66]], max_tokens=2) == ["ab", "cd", "ef"]


def test_the_end_token_ends_a_row_and_leaves_no_text():
    said = [[*b"one", EOS, *b"more"], [EOS], b"three"]
    assert say(said, max_tokens=5) == ["one", "", "three"]


@pytest.mark.parametrize(
    "stop, want",
    [
        ("llo", "he"),
        (("wor", "lo w"), "hel"),  # the one that is complete first
        (["world", "o"], "hell"),
        ("hello", ""),
        ("nowhere", "hello world" + "~" * 35),
        ("~" * 30, "hello world"),  # over a block's end
        ("<|end_of_text|>", "hello world" + "~" * 35),
    ],
)
def test_stop_strings_cut_the_text(stop, want):
    assert say("hello world", stop=stop) == want
    assert "".join(streamed("hello world", stop=stop)) == want


def test_a_stop_string_may_name_a_control_token():
    said = (*b"text", TOKENIZER.pad_id, *b"more")
    assert say(said, max_tokens=8) == "textmor"
    assert say(said, max_tokens=8, stop="<|pad|>") == "text"


def test_a_row_that_stops_leaves_the_others_alone():
    texts = ["a" * 46, "b" * 20 + "END" + "b" * 20, "cEND"]
    assert say(texts, stop="END") == ["a" * 46, "b" * 20, "c"]


def test_characters_stay_whole():
    text = "n\u00e9 \u20ac \U0001f999!"
    size = len(text.encode())
    pieces = streamed(text, max_tokens=size)
    assert "".join(pieces) == text and pieces == list(text)
    for n in range(1, size + 1):
        want = text.encode()[:n].decode(errors="ignore")
        assert say(text, max_tokens=n) == want == "".join(streamed(text, max_tokens=n))
    # Bytes that are no text are shown as such, once that is certain.
    assert say(b"a\xffb\xe2\x82c", max_tokens=6) == "a\ufffdb\ufffdc"
    assert say(text, stop="\u20ac", max_tokens=size) == "n\u00e9 "


def test_a_stream_holds_back_what_may_be_a_stop_string():
    pieces = streamed("a sto a stop b", stop=("stop", "op!"), max_tokens=14)
    assert "".join(pieces) == "a sto a "
    # "o" begins "op!", " " begins nothing.
    assert pieces == ["a", " ", "sto ", "a", " "]
    # The end sets free what was held back.
    assert streamed("a sto", stop="stop", max_tokens=5) == ["a", " ", "sto"]


class Words:
    """Tokens of several characters; a text's first loses its space, as in SentencePiece."""

    pieces = (b"", b" one", b" two", b"xabcy")
    vocab_size, bos_id, eos_id, stop_ids, special = 4, 0, None, (), {}
    token_bytes = np.array([0, 4, 4, 5], np.int32)
    generation = {}

    def decode_bytes(self, ids, continuation):
        data = b"".join(self.pieces[i] for i in ids)
        return data if continuation else data.removeprefix(b" ")


def test_tokens_of_several_characters():
    def words(said, prompt, **options):
        return say([said], [prompt], len(said), tokenizer=Words(), **options)[0]

    assert words((1, 2), [0]) == "one two"
    assert words((1, 2), [0, 2]) == " one two"
    # Both are in one token: the one that is complete first counts.
    assert words((1, 3, 2), [0], stop=("abcy", "bc")) == "onexa"


def test_a_stream_is_what_generate_gives():
    options = {"max_tokens": NEW, "temperature": 1.5, "seed": 4}
    text = generate(MODEL, params(), TOKENIZER, "the llama", **options)
    assert "".join(stream(MODEL, params(), TOKENIZER, "the llama", **options)) == text


def test_ids_outside_the_tokenizer_are_never_made():
    assert say((ord("a"), 270, ord("b")), max_tokens=3) == "a\x00b"
    made = ids_of(["a"] * 3, sampling=Sampling(50.0))
    assert made.max() < 259 and made.min() >= 0


def test_experts_have_room_for_every_token():
    tight = transformer.Transformer(dataclasses.replace(CONFIG, capacity_factor=1.0))
    made = [
        generate(model, params(), TOKENIZER, PROMPTS, max_tokens=NEW) for model in (MODEL, tight)
    ]
    assert made[0] == made[1]
    assert say("fine", max_tokens=4, model=Script(tight.config)) == "fine"


# Mistakes


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": ["a", []]}, "prompt 1 is empty"),
        ({"prompts": [["a"]]}, r"text or a list of ids, not \['a'\]"),
        ({"prompts": [3, 4]}, "text or a list of ids, not [34]"),
        ({"prompts": ["ok", [5, 259]]}, r"prompt 1 has id 259.* 0\.\.258"),
        ({"prompts": [[-1]]}, "prompt 0 has id -1"),
        ({"prompts": "a" * 100}, "101 tokens.*max_tokens=64.*max_positions=128"),
        ({"max_tokens": 127}, "max_tokens=127.*max_positions=128"),
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        ({"temperature": -0.1}, r"temperature=-0\.1 must"),
        ({"temperature": float("nan")}, "temperature=nan must"),
        ({"temperature": float("inf")}, "temperature=inf must"),
        ({"top_p": 0.0}, r"top_p=0\.0 must"),
        ({"top_p": 1.1}, r"top_p=1\.1 must"),
        ({"min_p": -0.1}, r"min_p=-0\.1 must"),
        ({"min_p": 1.5}, r"min_p=1\.5 must"),
        ({"top_k": -1}, "top_k=-1 must"),
        ({"stop": ("a", "")}, "stop has an empty string"),
    ],
)
@pytest.mark.parametrize("run", [generate, stream])
def test_mistakes_are_named_in_one_line(options, message, run):
    options = {"prompts": "a", **options}
    prompts = options.pop("prompts")
    if run is stream:
        prompts = prompts[-1] if isinstance(prompts, list) and prompts else prompts
        message = message.replace("prompt 1", "prompt 0")
    if run is stream and prompts == []:
        message = "prompt 0 is empty"
    with pytest.raises(UserError, match=message) as error:
        # A stream complains when it is asked for, before anything is shown.
        run(MODEL, None, TOKENIZER, prompts, **options)
    assert "\n" not in str(error.value)


def test_a_broken_model_is_not_taken_for_text():
    broken = jax.tree.map(lambda x: x * jnp.nan, params())
    with pytest.raises(UserError, match="the model gives NaN"):
        generate(MODEL, broken, TOKENIZER, PROMPTS, max_tokens=NEW)


def test_a_text_without_tokens_needs_a_bos():
    silent = byte_tokenizer().with_ends(False, None)
    with pytest.raises(UserError, match="prompt 0 is empty"):
        generate(MODEL, None, silent, "")
    assert say("fine", [""], max_tokens=4) == "fine"


def test_expert_choice_cannot_generate():
    config = dataclasses.replace(
        CONFIG, moe_interval=1, num_experts=2, expert_dim=8, router="expert_choice"
    )
    with pytest.raises(UserError, match="model.router=expert_choice"):
        generate(transformer.Transformer(config), None, TOKENIZER, "a")
