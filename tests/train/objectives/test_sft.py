"""Supervised fine-tuning: what is learnt of a record, and a run from weights to a release."""

import json

import autograd
import autograd.numpy as anp
import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import puna
from puna.configs import schema
from puna.configs.errors import UserError
from puna.models.text.tokenizer import byte_tokenizer, train_bpe
from puna.models.transformer import Transformer
from puna.train.data.examples import Example, RecordError
from puna.train.data.packing import Cursor, Room, pack_row, to_batch
from puna.train.loop import train
from puna.train.objectives import sft

BYTES = byte_tokenizer()
BPE = train_bpe(["Question: what is 3 + 4? Answer: 7. été 3 3 3 the the"] * 3, 300)


def transform_of(tokenizer, longest=100, **keys):
    config = puna.get_config("sft", [f"{key}={value}" for key, value in keys.items()])
    config.data.seq_len = longest
    built = schema.build(config)
    return sft.make(built, tokenizer.token_bytes).transform(built, tokenizer)


# Ids of prompts and completions, as in tests/reference/make_trl_fixture.py.
TEXTS = [([5, 9], [7, 3, 2]), ([4], [6, 2]), ([3, 3, 8], [10, 2])]


def test_loss_and_gradients_are_those_of_trl_and_of_numpy(tiny, trl, oracle):
    """The mean over the tokens of all completions, though the texts share a row."""
    model = tiny("llama3_2")
    weights = model.moved(1)
    examples = [
        Example(np.array(p + c, np.int32), np.array([0] * len(p) + [1] * len(c), np.float32))
        for p, c in TEXTS
    ]
    row = pack_row(Cursor(examples.__getitem__, 0, stop=len(examples)), Room(20))
    batch = to_batch({key: x[None] for key, x in row.items()})
    objective = sft.make(schema.Config(model=model.config), np.ones(model.config.vocab_size))

    @jax.jit
    @jax.value_and_grad
    def run(params):
        found = objective.loss(Transformer(model.config), params, {}, batch)
        return found.total / objective.weight_B(batch).sum()

    def mean(weights):
        total = 0.0
        for prompt, completion in TEXTS:
            ids = prompt + completion
            logits = oracle.forward(model.json, weights, [ids])[0]
            for t in range(len(prompt) - 1, len(ids) - 1):
                total += anp.log(anp.sum(anp.exp(logits[t]))) - logits[t][ids[t + 1]]
        return total / sum(len(completion) for _, completion in TEXTS)

    value, gradient = run(model.params(weights))
    gradient = model.by_name(jax.tree.map(np.asarray, gradient))
    trl("sft").check(value, gradient)
    wanted, wanted_gradient = autograd.value_and_grad(mean)(weights)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    for name, w in wanted_gradient.items():
        np.testing.assert_allclose(gradient[name], w, rtol=0, atol=1e-5 * np.max(np.abs(w)))


TEXT = st.text("ab é3?\n", max_size=12)


@given(TEXT, TEXT.filter(bool), st.sampled_from([BYTES, BPE]))
def test_the_completion_and_the_end_are_learnt(prompt, completion, tokenizer):
    transform = transform_of(tokenizer)
    example = transform.encode(transform.parse({"prompt": prompt, "completion": completion}, ""))
    whole = tokenizer.encode(prompt + completion, bos=True, eos=True)
    assert example.ids.tolist() == whole and example.whole
    learnt = example.weights > 0
    assert learnt[-1] and (np.diff(learnt.astype(int)) >= 0).all()
    text = tokenizer.decode(example.ids[learnt])
    # An id that spans the border belongs to the completion, whose every character is learnt.
    assert text.endswith(completion)
    shorter = tokenizer.decode_bytes(example.ids[learnt][1:])
    assert len(shorter) < len(completion.encode()) or not prompt or text == completion


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("plain", "is plain text"),
        ({"prompt": "a"}, "has none of messages, conversations, prompt and completion"),
        ({"prompt": "a", "completion": ""}, "empty completion"),
        ({"prompt": 3, "completion": "a"}, "a list of messages under 'prompt', not a number"),
        ({"prompt": "a" * 90, "completion": "b" * 10}, "has 102 tokens, more than data.seq_len"),
    ],
)
def test_what_cannot_be_learnt_says_why(record, reason):
    transform = transform_of(BYTES)
    with pytest.raises(RecordError, match=reason):
        transform.encode(transform.parse(record, ""))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.booleans())
def test_an_example_is_never_cut(lengths, evaluation):
    transform = transform_of(BYTES, 12)
    examples = [transform.encode(("", "x" * n)) for n in lengths]
    cursor, found = Cursor(examples.__getitem__, 0, stop=len(examples)), []
    while (row := pack_row(cursor, Room(13)))["segment_ids"].any():
        if evaluation:
            cursor.step_back()
        for segment in range(1, row["segment_ids"].max() + 1):
            found.append(int((row["segment_ids"] == segment).sum()))
    assert found == [n + 2 for n in lengths]


def write(path, count, first=0):
    records = [
        {"prompt": f"llama {i % 7} of {i}? ", "completion": "spits" if i % 7 < 3 else "eats"}
        for i in range(first, first + count)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def test_a_recipe_tunes_resumes_and_is_refused_other_data(config, tmp_path, cut):
    """From weights of others: the loss of held-out completions falls, and a cut changes nothing."""
    train(config, tmp_path / "base")
    tuning = puna.get_config("sft")
    tuning.model.compute_dtype = "float32"
    tuning.data.update(train=write(tmp_path / "a.jsonl", 40),
                    validation=write(tmp_path / "b.jsonl", 14, 40), seq_len=64)  # fmt: skip
    tuning.optimizer.learning_rate = 3e-3
    tuning.train.update(init_from=str(tmp_path / "base"), steps=20, save_every=10, eval_every=10)
    whole = train(tuning, tmp_path / "whole")
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    found = [m["validation_loss"] for m in map(json.loads, lines) if "validation_loss" in m]
    assert len(found) == 2 and found[1] < found[0]
    resumed = train(tuning, cut(tmp_path / "whole", tmp_path / "cut"))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))
    (tmp_path / "c.jsonl").write_text('{"text": "no pair"}\n')
    tuning.data.train = str(tmp_path / "c.jsonl")
    with pytest.raises(UserError, match="c.jsonl line 1 has none of messages"):
        train(tuning, tmp_path / "other")
