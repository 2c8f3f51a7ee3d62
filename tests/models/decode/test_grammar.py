"""Structured output: every text matches, and the texts beside it do not change."""

import functools
import json
import re

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.configs.errors import UserError
from puna.configs.schema import ModelConfig
from puna.models import transformer
from puna.models.decode import grammar, slots
from puna.models.decode.sampling import Sampling
from puna.models.decode.slots import Engine
from puna.models.text.tokenizer import byte_tokenizer

pytest.importorskip("llguidance", reason="needs the extra grammar")

TOKENIZER = byte_tokenizer()
# Wider than the tokenizer, and no multiple of the 32 bits of a word.
CONFIG = ModelConfig(
    vocab_size=270, embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
    mlp_dim=24, max_positions=512, compute_dtype="float32",
)  # fmt: skip
MODEL = transformer.Transformer(CONFIG)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b\u00e9"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def params(drawn):
    return drawn(CONFIG, 0.4)


@pytest.fixture(scope="module")
def engine(params):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slots, "PIECES", (16,))
        yield Engine(MODEL, params, TOKENIZER, 4, max_length=200)


def finish(engine):
    made = {slot: [] for slot in engine.requests}
    while engine.requests:
        for slot, token in engine.step():
            made[slot].append(token)
    return made


def text(tokens):
    return "".join(token.text for token in tokens)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
def test_what_is_made_matches(engine, temperature):
    import jsonschema

    sources = [
        grammar.json_schema(SCHEMA), grammar.regex(r"[0-9]{3}-[a-f]{1,4}"),
        grammar.choices(["yes", "no", 'say "h\u00e9"\n\\']),
    ]  # fmt: skip
    held = [
        engine.insert([72, 105], Sampling(temperature, seed=3), 160,
                      constraint=engine.constraints.compile(source))
        for source in sources
    ]  # fmt: skip
    made = finish(engine)
    assert all(tokens[-1].finish_reason == "stop" for tokens in made.values())
    texts = [text(made[slot]) for slot in held]
    jsonschema.validate(json.loads(texts[0]), SCHEMA)
    assert re.fullmatch(r"[0-9]{3}-[a-f]{1,4}", texts[1])
    assert texts[2] in ("yes", "no", 'say "h\u00e9"\n\\')


def test_a_row_beside_a_constrained_one_is_as_it_is_alone(engine):
    def ask(constraint=None, number=0):
        return engine.insert(
            [72, 105], Sampling(1.5, 0, 0.9, seed=5), 12, number=number, constraint=constraint
        )

    first = ask()
    alone = [(token.id, token.logprob) for token in finish(engine)[first]]
    constraint = engine.constraints.compile(grammar.regex("x{12}"))
    one, free, two = ask(constraint), ask(), ask(constraint, 1)
    made = finish(engine)
    assert [token.id for token in made[free]] == [i for i, _ in alone]
    np.testing.assert_allclose([t.logprob for t in made[free]], [p for _, p in alone], atol=1e-5)
    assert text(made[one]) == text(made[two]) == "x" * 12
    # A slot forgets the constraint.
    for _ in range(4):
        ask()
    assert all([t.id for t in row] == [i for i, _ in alone] for row in finish(engine).values())


def test_the_best_allowed_id_is_taken_and_logprobs_are_of_the_model(engine, params):
    prompt = [72, 105]
    constraint = engine.constraints.compile(grammar.regex("[a-m]{6}"))
    slot = engine.insert(prompt, max_tokens=6, top=3, constraint=constraint)
    tokens = finish(engine)[slot]
    row = np.array([prompt + [token.id for token in tokens]])
    logits = jax.jit(MODEL.apply)({"params": params}, row).logits_BTV[0, 1:-1]
    allowed = np.arange(ord("a"), ord("m") + 1)
    for token, logprobs_V in zip(tokens, jax.nn.log_softmax(logits), strict=True):
        assert token.id == allowed[np.argmax(np.asarray(logprobs_V)[allowed])]
        assert token.logprob == pytest.approx(float(logprobs_V[token.id]), abs=1e-4)
        best = np.argsort(-np.asarray(logprobs_V)[: TOKENIZER.vocab_size])[:3]
        assert [i for i, _ in token.top] == best.tolist()


@functools.cache
def constraints():
    return grammar.Constraints(TOKENIZER)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)
SCHEMAS = st.recursive(
    st.builds(lambda t: {"type": t}, st.sampled_from(["string", "integer", "boolean", "null"]))
    | st.builds(lambda v: {"enum": v}, st.lists(VALUES, min_size=1, max_size=3)),
    lambda inner: st.builds(lambda i, n: {"type": "array", "items": i, "maxItems": n}, inner,
                            st.integers(0, 2))
    | st.builds(
        lambda p, extra: {"type": "object", "properties": p, "required": sorted(p)[::2],
                          "additionalProperties": extra},
        st.dictionaries(st.text(max_size=3), inner, max_size=3), st.just(False) | inner,
    )
    | st.builds(lambda a: {"anyOf": a}, st.lists(inner, min_size=1, max_size=2)),
    max_leaves=5,
)  # fmt: skip


@settings(max_examples=40)
@given(schema=SCHEMAS, seed=st.integers(0, 2**32))
def test_any_walk_through_the_masks_is_an_instance_of_the_schema(schema, seed):
    import jsonschema

    constraint, ids = constraints().compile(grammar.json_schema(schema)), []
    rng = np.random.default_rng(seed)
    while not constraint.done and len(ids) < 4000:
        words = constraint.allowed(CONFIG.vocab_size)
        assert not constraint.error and words.any()
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")
        found = np.flatnonzero(bits)
        assert found.max() < TOKENIZER.vocab_size
        ends = set(found) & set(TOKENIZER.stop_ids)
        # Quotes and brackets first, that it comes to an end.
        closing = [i for i in found if chr(i) in '"]}'] if rng.random() < 0.5 else []
        new = min(ends) if ends else rng.choice(closing or found)
        constraint.push(int(new))
        ids.append(int(new))
    jsonschema.validate(json.loads(TOKENIZER.decode(ids)), schema)


@pytest.mark.parametrize(
    "source, message",
    [
        (lambda: grammar.json_schema({"type": "nonsense"}), "Invalid type: nonsense"),
        (lambda: grammar.json_schema({"format": "regex"}), "nknown format: regex"),
        (lambda: grammar.json_schema({"$ref": "http://x/y"}), "not present in a registry"),
        (lambda: grammar.json_schema({"type": "object", "required": ["a"],
                                      "additionalProperties": False}), "Unsatisfiable"),
        (lambda: grammar.json_schema(False), "Unsatisfiable"),
        (lambda: grammar.json_schema({"enum": [{1}]}), "the schema is not JSON"),
        (lambda: grammar.regex("(a"), "unclosed group"),
        (lambda: grammar.regex("(?=a)"), "look-around"),
        (lambda: grammar.choices(["\ud800"]), "not JSON serializable"),
        (lambda: "start: nothing", "unknown name"),
        (lambda: "a" * 300_000, "300,000 characters: at most"),
    ],
)  # fmt: skip
def test_a_grammar_that_makes_no_sense_is_one_line(source, message):
    with pytest.raises(UserError, match=message) as error:
        constraints().compile(source())
    assert "\n" not in str(error.value) and "state>" not in str(error.value)


def test_definitions_that_refer_deep_down_do_not_end_the_process():
    definitions = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(4000)}
    schema = {"$defs": definitions | {"d4000": {"type": "null"}}, "$ref": "#/$defs/d0"}
    assert constraints().compile(grammar.json_schema(schema)).allowed(CONFIG.vocab_size).any()


def test_a_text_that_its_grammar_can_follow_no_longer_ends_as_an_error(engine, monkeypatch):
    constraint = engine.constraints.compile(grammar.regex("a+"))
    engine.insert([72], max_tokens=9, constraint=constraint)
    # What llguidance does when a mask would cost too much.
    monkeypatch.setattr(grammar.Constraint, "error", property(lambda self: "too complex"))
    [(_, token)] = engine.step()
    assert token.finish_reason == "error" and engine.free == 4


def test_what_asks_for_nothing_is_no_mistake():
    form = {"type": "string", "format": "path", "maxLength": 3}
    schema = {
        "type": "object",
        "properties": {"format": form, "tags": {"items": form, "uniqueItems": False}},
        "required": ["format"],
    }
    grammar.Constraints(TOKENIZER).compile(grammar.json_schema(schema))
    assert grammar.json_schema({"const": form}).count("path") == 1
