"""Distillation against NumPy in float64, on a mesh, and in a run that is cut and resumed."""

import dataclasses
import functools
import json

import autograd
import autograd.numpy as anp
import jax
import numpy as np
import pytest

import puna
from puna.configs import schema
from puna.configs.errors import ConfigError, UserError
from puna.configs.schema import DistillConfig
from puna.models.parallel import sharding
from puna.models.text.tokenizer import byte_tokenizer, train_bpe
from puna.models.transformer import Transformer, abstract_params, init_params
from puna.train.data.examples import Example
from puna.train.data.packing import Cursor, Room, pack_row, to_batch
from puna.train.loop import train
from puna.train.objectives.distill import Distill

TOLERANCE = 1e-5
STEPS = 11  # of a run
# Of gradients of the three layers. One rounding of each weight to float32 moves the exact ones by
# 6e-6, and a computation in float32 rounds a dozen times a layer, each compiler in its own order.
GRADIENT = 4e-5
T = 12
VARIANTS = [
    {"beta": 0.0},
    {"beta": 1.0},
    {"beta": 0.3, "temperature": 2.0},
    {"beta": 0.0, "top_k": 5, "hard": 0.25},
    {"beta": 1.0, "top_k": 1},
    {"beta": 0.6, "top_k": 7, "hard": 0.5, "temperature": 0.7},
]
MESHES = [
    pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
    {"fsdp": 2, "context": 2, "tensor": 2},
]


def batch(rows, vocab_size):
    """Rows of two documents and padding, of which some targets weigh nothing."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, vocab_size, (rows, T + 1)).astype(np.int32)
    segments = np.repeat([[1, 2, 0]], [5, 5, 2], axis=1).repeat(rows, 0).astype(np.int32)
    positions = np.concatenate([np.arange(5), np.arange(5), [0, 0]])[None].repeat(rows, 0)
    weights = (segments > 0) & (np.roll(segments, -1, 1) == segments) & (positions > 0)
    return {
        "tokens_BT": tokens[:, :-1], "targets_BT": tokens[:, 1:], "segment_ids_BT": segments,
        "positions_BT": positions.astype(np.int32), "weights_BT": weights.astype(np.float32),
    }  # fmt: skip


def of_prompts(texts):
    """One row of prompts and completions, of which the completions weigh 1."""
    ids = [np.array([*prompt, *completion], np.int32) for prompt, completion in texts]
    examples = [
        Example(x, (np.arange(len(x)) >= len(prompt)).astype(np.float32))
        for x, (prompt, _) in zip(ids, texts, strict=True)
    ]
    row = pack_row(Cursor(examples.__getitem__, 0, stop=len(examples)), Room(2 * T))
    return to_batch({key: x[None] for key, x in row.items()})


def objective_of(teacher, /, **settings):
    bytes_V = np.ones(teacher.vocab_size, np.int32)
    return Distill(0.0, 8, bytes_V, DistillConfig(**settings), teacher, STEPS)


def log_softmax(x):
    top = anp.max(x)
    return x - top - anp.log(anp.sum(anp.exp(x - top)))


def divergence(p, q, beta):
    if beta == 0.0:
        return anp.sum(p * anp.log(p / q))
    if beta == 1.0:
        return anp.sum(q * anp.log(q / p))
    m = beta * p + (1 - beta) * q
    return beta * anp.sum(p * anp.log(p / m)) + (1 - beta) * anp.sum(q * anp.log(q / m))


def reference(rows, logits, teacher_logits, beta, temperature=1.0, top_k=0, hard=0.0):
    """Mean loss of the targets, of the divergence and of the cross-entropy."""
    sums, count = anp.zeros(2), 0
    for b, t in zip(*np.nonzero(rows["weights_BT"]), strict=True):
        p = anp.exp(log_softmax(teacher_logits[b][t] / temperature))
        q = anp.exp(log_softmax(logits[b][t] / temperature))
        if top_k:
            order = np.argsort(-p)
            best, rest = order[:top_k], order[top_k:]
            p, q = (anp.concatenate([x[best], anp.array([anp.sum(x[rest])])]) for x in (p, q))
        nll = -log_softmax(logits[b][t])[rows["targets_BT"][b, t]]
        sums = sums + anp.array([divergence(p, q, beta), nll])
        count += 1
    found = sums / count
    return (1 - hard) * found[0] + hard * found[1], found


def close(found, wanted, scale=None):
    """Within TOLERANCE of the largest value wanted, or of what it is a difference of."""
    scale = np.max(np.abs(wanted)) if scale is None else scale
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE * max(scale, 1e-3))


def errors(found, wanted):
    """The largest error of each tensor, by its largest value."""
    return {
        name: np.max(np.abs(found[name] - w)) / max(np.max(np.abs(w)), 1e-3)
        for name, w in wanted.items()
    }


def measured(objective, config, teacher, rows):
    def mean(params):
        found = objective.loss(Transformer(config), params, {"teacher": teacher}, rows)
        sums = {name: x.sum() for name, x in found.rows_B.items()}
        return found.total / objective.weight_B(rows).sum(), objective.summary(sums)

    return jax.jit(jax.value_and_grad(mean, has_aux=True))


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_losses_and_gradients_are_those_of_the_definition(tiny, oracle, settings):
    student, teacher = tiny("llama3_2"), tiny("llama1")
    rows = batch(2, student.config.vocab_size)
    places = rows["tokens_BT"], rows["positions_BT"], rows["segment_ids_BT"]
    theirs = oracle.forward(teacher.json, teacher.weights, *places)

    def mean(weights, **others):
        logits = oracle.forward(student.json, weights, *places)
        return reference(rows, logits, theirs, **settings | others)[0]

    wanted, wanted_gradient = autograd.value_and_grad(mean)(student.weights)
    objective = objective_of(teacher.config, **settings)
    run = measured(objective, student.config, teacher.params(teacher.weights), rows)
    (value, numbers), gradient = run(student.params(student.weights))
    close(value, wanted)
    gradient = student.by_name(jax.tree.map(np.asarray, gradient))
    apart = errors(gradient, wanted_gradient)
    assert max(apart.values()) < GRADIENT, apart
    # The bound is a few roundings of the weights, and a mistake of 1e-4 is far beyond it.
    rng = np.random.default_rng(0)
    rounded = {
        n: w + w * rng.choice([-1, 1], w.shape) * 2.0**-24 for n, w in student.weights.items()
    }
    apart = errors(autograd.grad(mean)(rounded), wanted_gradient)
    assert 1e-6 < max(apart.values()) < GRADIENT / 5, apart
    mistaken = functools.partial(mean, hard=settings.get("hard", 0.0) + 1e-4)
    apart = errors(autograd.grad(mistaken)(student.weights), wanted_gradient)
    assert min(apart.values()) > 2 * GRADIENT, apart
    logits = oracle.forward(student.json, student.weights, *places)
    apart = reference(rows, logits, theirs, **settings)[1]
    close(numbers["loss"], wanted)
    close(numbers["divergence"], apart[0])
    close(numbers["nll"], apart[1])


def test_weights_of_soft_and_hard_targets_change_over_the_steps(tiny, oracle):
    """Numbers and gradients at several steps, and without one those of the last step."""
    student, teacher = tiny("llama3_2"), tiny("llama1")
    rows = batch(2, student.config.vocab_size)
    places = rows["tokens_BT"], rows["positions_BT"], rows["segment_ids_BT"]
    theirs = oracle.forward(teacher.json, teacher.weights, *places)

    def mean(weights, hard):
        logits = oracle.forward(student.json, weights, *places)
        return reference(rows, logits, theirs, beta=0.0, hard=hard)[0]

    settings = {"hard": 0.1, "hard_end": 0.7, "hard_schedule": "cosine"}
    objective = objective_of(teacher.config, **settings)
    params, frozen = student.params(student.weights), teacher.params(teacher.weights)
    run = jax.jit(
        lambda rows: measured(objective, student.config, frozen, rows)(params)
    )  # the step is data: one program
    for step, hard in ((0, 0.1), (3, 0.1 + 0.3 * (1 - np.cos(0.3 * np.pi))), (10, 0.7)):
        (value, numbers), gradient = run(rows | {"step": np.int32(step)})
        wanted, wanted_gradient = autograd.value_and_grad(mean)(student.weights, hard)
        close(value, wanted)
        assert numbers["hard"] == pytest.approx(hard, rel=1e-6)
        apart = errors(student.by_name(jax.tree.map(np.asarray, gradient)), wanted_gradient)
        assert max(apart.values()) < GRADIENT, apart
    (value, _), _ = run(rows)
    close(value, wanted)
    linear = objective_of(teacher.config, **settings | {"hard_schedule": "linear"})
    found = [float(linear.hard_at(step)) for step in (0, 5, 10, 40)]
    np.testing.assert_allclose(found, [0.1, 0.4, 0.7, 0.7], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("forward", {"beta": 0.0}),
        ("reverse", {"beta": 1.0}),
        ("jensen-shannon", {"beta": 0.3, "temperature": 2.0}),
    ],
)
def test_divergences_and_gradients_are_those_of_trl(tiny, trl, name, settings):
    student, teacher = tiny("llama3_2"), tiny("llama1")
    rows = of_prompts([([5, 9], [7, 3, 2]), ([4], [6, 2]), ([3, 3, 8], [10, 2])])
    objective = objective_of(teacher.config, **settings)
    run = measured(objective, student.config, teacher.params(teacher.weights), rows)
    (value, _), gradient = run(student.params(student.moved(1)))
    trl(f"distill, {name}").check(value, student.by_name(jax.tree.map(np.asarray, gradient)))


def test_a_student_that_is_its_teacher_has_nothing_to_learn(tiny):
    model = tiny("llama3_2")
    params, rows = model.params(model.weights), batch(2, model.config.vocab_size)
    for settings in ({"beta": 0.0}, {"beta": 0.5, "top_k": 3}):
        run = measured(objective_of(model.config, **settings), model.config, params, rows)
        (value, _), gradient = run(params)
        assert abs(value) < 1e-6
        assert max(np.max(np.abs(g)) for g in jax.tree.leaves(gradient)) < 1e-6


STUDENT = schema.ModelConfig(
    vocab_size=64, embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=32,
    compute_dtype="float32",
)  # fmt: skip
TEACHER = dataclasses.replace(STUDENT, embed_dim=32, num_layers=1, tie_embeddings=True)


@pytest.mark.parametrize("axes", MESHES, ids=str)
@pytest.mark.slow
def test_eight_devices_give_the_numbers_of_one(axes):
    objective = objective_of(TEACHER, **VARIANTS[-1])
    one = sharding.make_mesh(schema.MeshConfig(data=1), jax.devices()[:1])
    configs, rows = (STUDENT, TEACHER), batch(8, 64)
    trees = [init_params(c, jax.random.key(i), one) for i, c in enumerate(configs)]
    (wanted, numbers), wanted_gradient = measured(objective, STUDENT, trees[1], rows)(trees[0])
    mesh = sharding.make_mesh(schema.MeshConfig(**({"data": 1} | axes)))
    params, teacher = (
        jax.device_put(tree, sharding.shardings(abstract_params(c), mesh))
        for tree, c in zip(trees, configs, strict=True)
    )
    with jax.set_mesh(mesh):
        rows = sharding.put_batch(mesh, rows, list(range(8)), 8)

        def mean(params, teacher, rows):
            found = objective.loss(Transformer(STUDENT), params, {"teacher": teacher}, rows)
            return found.total / objective.weight_B(rows).sum(), found.rows_B["divergence"].sum()

        run = jax.jit(jax.value_and_grad(mean, has_aux=True))
        (value, divergences), gradient = run(params, teacher, rows)
    close(value, wanted)
    # A sum of differences of log-probabilities.
    close(divergences / rows["weights_BT"].sum(), numbers["divergence"], np.log(64))
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted_gradient), strict=True):
        close(np.asarray(a), np.asarray(b))


@pytest.mark.slow
def test_a_recipe_learns_and_resumes_bit_for_bit(config, corpus, tmp_path, cut):
    """A student of another shape comes nearer to its teacher, which stays what it is."""
    config.train.update(steps=6, save_every=6, eval_every=0)
    train(config, tmp_path / "teacher")
    found = puna.get_config("distill")
    found.model.update(config.model)
    found.model.update(embed_dim=8, num_layers=1)
    found.data.update(train=config.data.train, validation=f"{corpus}/validation/*.txt", seq_len=32)
    found.optimizer.update(learning_rate=1e-2, warmup_steps=1)
    found.train.update(steps=12, batch_size=16, save_every=6, eval_every=6, microbatches=2)
    found.distill.update(
        teacher=str(tmp_path / "teacher"), beta=0.5, hard=0.3, hard_schedule="linear", hard_end=0.0
    )
    whole = train(found, tmp_path / "whole")
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    held_out = [m["validation_divergence"] for m in metrics if "validation_divergence" in m]
    assert len(held_out) == 2 and held_out[1] < held_out[0]
    weights = [m["hard"] for m in metrics if "hard" in m]
    np.testing.assert_allclose(weights, np.linspace(0.3, 0, 12), atol=1e-6)
    each = [m["divergence"] for m in metrics if "divergence" in m]
    assert each[-1] < 0.85 * each[0]
    _, teacher = puna.load(tmp_path / "teacher")
    for a, b in zip(jax.tree.leaves(teacher), jax.tree.leaves(whole.frozen), strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))
    resumed = train(found, cut(tmp_path / "whole", tmp_path / "cut"))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))
    model, _ = puna.load(tmp_path / "whole")
    assert model.config.embed_dim == 8
    numbers = puna.evaluate(found, tmp_path / "whole")
    assert numbers["divergence"] == pytest.approx(held_out[-1], rel=1e-5)
    with pytest.raises(UserError, match="evaluate with train.objective=next_token"):
        puna.evaluate(found, tmp_path / "teacher")
    found.model.vocab_size = 300
    with pytest.raises(ConfigError, match="has 264 ids and must have the model.vocab_size=300"):
        train(found, tmp_path / "other")
    found.distill.teacher = ""
    with pytest.raises(ConfigError, match="distill.teacher='' must name a model"):
        train(found, tmp_path / "other")


def test_a_teacher_of_another_tokenizer_is_refused(tmp_path):
    theirs, ours = (train_bpe([text] * 9, 270) for text in ("abab", "cdcd"))
    theirs.save(tmp_path)
    assert theirs.vocab_size == ours.vocab_size
    objective = objective_of(STUDENT, teacher=str(tmp_path))
    c = schema.Config()
    assert objective.transform(c, theirs).fields == ("text",)
    for other in (ours, byte_tokenizer()):
        with pytest.raises(ConfigError, match="must have the tokenizer of the student"):
            objective.transform(c, other)
    chats = objective_of(STUDENT, teacher=str(tmp_path), records="conversations")
    assert chats.transform(c, theirs).fields[0] == "messages"
