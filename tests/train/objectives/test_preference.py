"""Losses of pairs against NumPy in float64, on a mesh, and in a run that is cut and resumed."""

import dataclasses
import json

import autograd
import autograd.numpy as anp
import jax
import numpy as np
import pytest

import puna
from puna.configs import schema
from puna.configs.errors import ConfigError, UserError
from puna.models.parallel import sharding
from puna.models.transformer import Transformer, abstract_params, init_params
from puna.train import objectives
from puna.train.data.examples import Example
from puna.train.data.packing import Cursor, Room, pack_row, to_batch
from puna.train.loop import train

TOLERANCE = 1e-5
# Ids of the prompt, the chosen and the rejected answer.
PAIRS = [([5, 9], [7, 3, 2], [11, 2]), ([4], [6, 2], [8, 13, 9, 2]), ([3, 3, 8], [10, 2], [12, 2])]
T = 24
VARIANTS = [
    {"loss": "sigmoid", "beta": 0.7},
    {"loss": "sigmoid", "beta": 0.7, "label_smoothing": 0.2},
    {"loss": "sigmoid_norm", "beta": 2.0},
    {"loss": "robust", "beta": 0.7, "label_smoothing": 0.1},
    {"loss": "ipo", "beta": 0.4},
    {"loss": "ipo_norm", "beta": 0.4},
    {"loss": "hinge", "beta": 0.7},
    {"loss": "simpo", "beta": 2.5, "margin": 0.8},
    {"loss": "orpo", "beta": 0.3},
]


def batch_of(pairs, rows=2):
    """Packed rows of pairs; more than hold them are padding."""
    examples = [
        Example(
            np.array([*p, *c, *p, *r], np.int32),
            np.array([0] * len(p) + [1] * len(c) + [0] * len(p) + [1] * len(r), np.float32),
            whole=True,
            borders=(len(p) + len(c),),
        )
        for p, c, r in pairs
    ]
    cursor = Cursor(examples.__getitem__, 0, stop=len(examples))
    packed = [pack_row(cursor, Room(T + 1)) for _ in range(rows)]
    return to_batch({key: np.stack([row[key] for row in packed]) for key in packed[0]})


def objective_of(model, **settings):
    values = schema.to_dict(schema.Config(model=model))
    values["train"].update(objective="preference", loss_chunk=8)
    values["data"]["seq_len"] = T
    values["preference"].update(settings)
    return objectives.make(schema.from_dict(values), np.ones(model.vocab_size))


def log_sigmoid(x):
    return -anp.log(1 + anp.exp(-x))


def reference(oracle, tiny, weights, before, loss, beta, label_smoothing=0.0, margin=0.5):
    """Mean loss of PAIRS and its numbers, each text alone, by the formulas of the papers."""

    def log_probs(weights, prompt, answer):
        """Of the answer's ids, and of all but the first of the text."""
        ids = [*prompt, *answer]
        logits = oracle.forward(tiny.json, weights, [ids])[0]
        each = [
            logits[t][ids[t + 1]] - anp.max(logits[t])
            - anp.log(anp.sum(anp.exp(logits[t] - anp.max(logits[t]))))
            for t in range(len(ids) - 1)
        ]  # fmt: skip
        return anp.array(each[len(prompt) - 1 :]), anp.array(each)

    total, found = 0.0, {"chosen": 0.0, "rejected": 0.0}
    for prompt, *answers in PAIRS:
        (c, whole), (r, _) = (log_probs(weights, prompt, a) for a in answers)
        c0, r0 = (log_probs(before, prompt, a)[0] for a in answers)
        found["chosen"] += anp.sum(c)
        found["rejected"] += anp.sum(r)
        h = anp.sum(c - c0) - anp.sum(r - r0)
        per_token = anp.mean(c - c0) - anp.mean(r - r0)
        e = label_smoothing
        if loss == "sigmoid":
            total += -(1 - e) * log_sigmoid(beta * h) - e * log_sigmoid(-beta * h)
        elif loss == "sigmoid_norm":
            total += -log_sigmoid(beta * per_token)
        elif loss == "robust":
            good, bad = -log_sigmoid(beta * h), -log_sigmoid(-beta * h)
            total += ((1 - e) * good - e * bad) / (1 - 2 * e)
        elif loss == "ipo":
            total += (h - 0.5 / beta) ** 2
        elif loss == "ipo_norm":
            total += (per_token - 0.5 / beta) ** 2
        elif loss == "hinge":
            total += anp.maximum(0.0, 1 - beta * h)
        elif loss == "simpo":
            total += -log_sigmoid(beta * (anp.mean(c) - anp.mean(r)) - margin)
        elif loss == "orpo":
            pc, pr = anp.exp(anp.mean(c)), anp.exp(anp.mean(r))
            ratio = anp.log((pc / (1 - pc)) / (pr / (1 - pr)))
            total += -anp.mean(whole) - beta * log_sigmoid(ratio)
    return total / len(PAIRS), {k: v / len(PAIRS) for k, v in found.items()}


def close(found, wanted, scale=None):
    """Within TOLERANCE of the largest value wanted, or of what it is a difference of."""
    scale = np.max(np.abs(wanted)) if scale is None else scale
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE * max(scale, 1e-3))


def measure(objective, config, params, frozen, batch):
    """Mean loss, its gradient, the numbers of `summary`."""

    def mean(params):
        found = objective.loss(Transformer(config), params, frozen, batch)
        pairs = objective.weight_B(batch).sum()
        sums = {name: x.sum() for name, x in found.rows_B.items()}
        return found.total / pairs, objective.summary(sums)

    with jax.set_mesh(sharding.make_mesh(schema.MeshConfig(data=1), jax.devices()[:1])):
        (value, numbers), gradient = jax.jit(jax.value_and_grad(mean, has_aux=True))(params)
    return value, gradient, numbers


@pytest.fixture(scope="module")
def of_pairs(tiny):
    """Settings -> what `measure` finds of PAIRS, compiled once for both references."""
    model, known = tiny("llama3_2"), {}

    def find(settings):
        if (key := tuple(settings.items())) not in known:
            objective = objective_of(model.config, **settings)
            frozen = {"reference": model.params(model.weights)}
            if settings["loss"] in ("simpo", "orpo"):
                assert not objective.initial_frozen(None, None, frozen)
                frozen = {}
            params = model.params(model.moved(1))
            known[key] = measure(objective, model.config, params, frozen, batch_of(PAIRS))
        return known[key]

    return find


@pytest.mark.parametrize("settings", VARIANTS, ids=lambda s: "-".join(map(str, s.values())))
def test_losses_and_gradients_are_those_of_the_papers(tiny, oracle, of_pairs, settings):
    model = tiny("llama3_2")
    weights, before = model.moved(1), model.weights

    def mean(weights):
        return reference(oracle, model, weights, before, **settings)[0]

    wanted, wanted_gradient = autograd.value_and_grad(mean)(weights)
    value, gradient, numbers = of_pairs(settings)
    close(value, wanted)
    gradient = model.by_name(jax.tree.map(np.asarray, gradient))
    for name, w in wanted_gradient.items():
        close(gradient[name], w)
    sums = reference(oracle, model, weights, before, **settings)[1]
    for name, w in sums.items():
        close(numbers[f"log_prob_{name}"], w)
    close(numbers["loss"], wanted)


# TRL's `ipo` divides by the lengths of the answers, where arXiv 2310.12036 sums: it is `ipo_norm`
# here. TRL 1.16 has no conservative DPO: its `sigmoid` takes label_smoothing and ignores it. The
# cross-entropy of its ORPO is a mean over the tokens of whoever shares a batch, not over pairs, so
# each pair was alone in its batch there.
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sigmoid", {"loss": "sigmoid", "beta": 0.7}),
        ("label_smoothing", {"loss": "sigmoid", "beta": 0.7}),
        ("sigmoid_norm", {"loss": "sigmoid_norm", "beta": 2.0}),
        ("robust", {"loss": "robust", "beta": 0.7, "label_smoothing": 0.1}),
        ("ipo", {"loss": "ipo_norm", "beta": 0.4}),
        ("hinge", {"loss": "hinge", "beta": 0.7}),
        ("simpo", {"loss": "simpo", "beta": 2.5, "margin": 0.8}),
        ("orpo", {"loss": "orpo", "beta": 0.3}),
    ],
)
def test_numbers_and_gradients_are_those_of_trl(tiny, trl, of_pairs, name, settings):
    model, recorded = tiny("llama3_2"), trl(name)
    objective = objective_of(model.config, **settings)
    params, frozen = model.params(model.moved(1)), {"reference": model.params(model.weights)}
    value, gradient, _ = of_pairs(settings)
    recorded.check(value, model.by_name(jax.tree.map(np.asarray, gradient)))

    @jax.jit
    def numbers(batch):
        return objective.loss(Transformer(model.config), params, frozen, batch).rows_B

    for pair, each in zip(PAIRS, recorded.each, strict=True):
        sums = numbers(batch_of([pair], 1))
        for side, answer in zip(("chosen", "rejected"), pair[1:], strict=True):
            # TRL has means a token in some losses where puna has sums, and the other way round.
            of_sums, per_token = settings["loss"] in ("simpo", "orpo"), "norm" in settings["loss"]
            log_prob = each[f"logps/{side}"] * (len(answer) if of_sums else 1)
            close(sums[f"log_prob_{side}"][0], log_prob)
            reward = each[f"rewards/{side}"] / (len(answer) if per_token else 1)
            close(sums[f"reward_{side}"][0], reward, settings["beta"] * abs(log_prob))


def test_rewards_are_beta_times_the_log_ratios(tiny, oracle):
    model = tiny("llama3_2")
    weights, before = model.moved(1), model.weights
    objective = objective_of(model.config, beta=0.7)
    frozen = {"reference": model.params(before)}
    _, _, numbers = measure(objective, model.config, model.params(weights), frozen, batch_of(PAIRS))
    after, start = (reference(oracle, model, w, w, "sigmoid", 0.7)[1] for w in (weights, before))
    rewards = {name: 0.7 * (after[name] - start[name]) for name in after}
    size = 0.7 * max(map(abs, after.values()))
    close(numbers["reward_chosen"], rewards["chosen"], size)
    close(numbers["reward_rejected"], rewards["rejected"], size)
    close(numbers["reward_margin"], rewards["chosen"] - rewards["rejected"], size)


def test_at_the_start_no_answer_is_ahead(tiny):
    """Not to a rounding: policy and reference are the same numbers then."""
    model = tiny("llama3_2")
    params = model.params(model.weights)
    objective = objective_of(model.config)
    frozen = objective.initial_frozen(None, None, params)
    _, _, numbers = measure(objective, model.config, params, frozen, batch_of(PAIRS))
    assert numbers["reward_margin"] == numbers["reward_accuracy"] == 0.0
    assert numbers["loss"] == np.float32(np.log(2))


def test_padding_and_other_pairs_of_a_row_change_nothing(tiny):
    model = tiny("llama3_2")
    objective = objective_of(model.config)
    params = model.params(model.moved(1))
    frozen = {"reference": model.params(model.weights)}

    @jax.jit
    def rows(batch):
        return objective.loss(Transformer(model.config), params, frozen, batch).rows_B

    packed, alone = (jax.tree.map(np.asarray, rows(batch_of(p, 3))) for p in (PAIRS, PAIRS[:1]))
    assert packed["pairs"].tolist() == [2, 1, 0] and alone["pairs"].tolist() == [1, 0, 0]
    assert objective.weight_B(batch_of(PAIRS, 3)).tolist() == [2, 1, 0]
    rest = jax.tree.map(np.asarray, rows(batch_of(PAIRS[1:], 3)))
    for name, x in packed.items():
        np.testing.assert_allclose(x.sum(), alone[name].sum() + rest[name].sum(), rtol=1e-6)


DIVISIBLE = schema.ModelConfig(
    vocab_size=64, embed_dim=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_dim=32,
    compute_dtype="float32",
)  # fmt: skip
MESHES = [
    pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
    {"fsdp": 2, "context": 2, "tensor": 2},
]


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_eight_devices_give_the_numbers_of_one(axes):
    objective = objective_of(DIVISIBLE, beta=0.7)
    one = sharding.make_mesh(schema.MeshConfig(data=1), jax.devices()[:1])
    params, before = (init_params(DIVISIBLE, jax.random.key(seed), one) for seed in (1, 2))
    batch = batch_of(PAIRS * 4, 8)
    wanted, wanted_gradient, numbers = measure(
        objective, DIVISIBLE, params, {"reference": before}, batch
    )
    mesh = sharding.make_mesh(schema.MeshConfig(**({"data": 1} | axes)))
    places = sharding.shardings(abstract_params(DIVISIBLE), mesh)
    params, before = (jax.device_put(x, places) for x in (params, before))

    def mean(params, batch):
        found = objective.loss(Transformer(DIVISIBLE), params, {"reference": before}, batch)
        return found.total / objective.weight_B(batch).sum(), found.rows_B

    with jax.set_mesh(mesh):
        batch = sharding.put_batch(mesh, batch, list(range(8)), 8)
        (value, rows_B), gradient = jax.jit(jax.value_and_grad(mean, has_aux=True))(params, batch)
    close(value, wanted)
    assert np.sum(rows_B["pairs"]) == 12
    close(np.sum(rows_B["reward_chosen"]) / 12, numbers["reward_chosen"])
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted_gradient), strict=True):
        close(np.asarray(a), np.asarray(b))


def write(path, count, first=0):
    records = []
    for i in range(first, first + count):
        good, bad = ("grass", "stones") if i % 2 else ("leaves", "nails")
        records.append({"prompt": f"{i % 5} llamas eat ", "chosen": good, "rejected": bad})
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def recipe(config, tmp_path):
    dpo = puna.get_config("dpo")
    dpo.model.compute_dtype = "float32"
    dpo.data.update(train=write(tmp_path / "a.jsonl", 40),
                    validation=write(tmp_path / "b.jsonl", 10, 40), seq_len=64)  # fmt: skip
    dpo.optimizer.update(learning_rate=1e-3, warmup_steps=1)
    dpo.train.update(steps=12, batch_size=16, microbatches=2, save_every=6, eval_every=6)
    return dpo


def test_a_recipe_learns_and_resumes_bit_for_bit(config, tmp_path, cut):
    """From weights of others; the reference stays what they were, and is there again."""
    train(config, tmp_path / "base")
    dpo = recipe(config, tmp_path)
    dpo.train.init_from = str(tmp_path / "base")
    whole = train(dpo, tmp_path / "whole")
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    assert metrics[0]["loss"] == pytest.approx(np.log(2)) and metrics[0]["reward_margin"] == 0
    assert metrics[-1]["loss"] < 0.5 and metrics[-1]["validation_reward_accuracy"] > 0.8
    assert metrics[-1]["validation_pairs"] == 10
    _, start = puna.load(tmp_path / "base")
    for a, b in zip(
        jax.tree.leaves(start), jax.tree.leaves(whole.frozen["reference"]), strict=True
    ):
        assert np.array_equal(np.asarray(a), np.asarray(b))
    assert (tmp_path / "whole" / "loss.png").exists()
    resumed = train(dpo, cut(tmp_path / "whole", tmp_path / "cut"))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))
    # What was tuned is a model like any other.
    _, tuned = puna.load(tmp_path / "whole")
    for a, b in zip(jax.tree.leaves(tuned), jax.tree.leaves(whole.params), strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))
    numbers = puna.evaluate(dpo, tmp_path / "whole")
    for name in ("loss", "reward_accuracy", "reward_margin", "pairs"):
        wanted = metrics[-1][f"validation_{name}"]
        assert numbers[name] == pytest.approx(wanted, rel=1e-5), name
    with pytest.raises(UserError, match="which is only there in that run"):
        puna.evaluate(dpo, tmp_path / "base")
    (tmp_path / "c.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "b"}\n')
    dpo.data.train = str(tmp_path / "c.jsonl")
    with pytest.raises(UserError, match="c.jsonl line 1 has the same answer under 'chosen' and"):
        train(dpo, tmp_path / "other")


@pytest.mark.parametrize(
    "part",
    [{"train.trainable": "mlp"}, pytest.param({"adapter.rank": 2}, marks=pytest.mark.slow)],
    ids=str,
)
def test_the_reference_of_a_part_that_trains_is_that_part(config, tmp_path, part):
    dpo = recipe(config, tmp_path)
    dpo.model.update(config.model)
    dpo.train.update(steps=2, microbatches=1, eval_every=0)
    dpo.update_from_flattened_dict(part)
    state = train(dpo, tmp_path / "run")
    assert set(state.frozen) == {"base", "reference"}
    assert jax.tree.structure(state.frozen["reference"]) == jax.tree.structure(state.params)
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["reward_margin"] == 0.0 and first["loss"] == pytest.approx(np.log(2))
    _, params = puna.load(tmp_path / "run")
    whole = jax.tree.leaves((state.params, state.frozen["base"]))
    assert len(jax.tree.leaves(params)) == len(whole)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    wanted = json.loads(lines[-1])["validation_loss"]
    assert puna.evaluate(dpo, tmp_path / "run")["loss"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"beta": 0.2},
            "preference.beta=0.2 must be left at 0.1 where train.objective=next_token",
        ),
        ({"margin": 0.2}, "preference.margin=0.2 must be left at 0.5 where train.objective=next"),
        ({"loss": "dpo"}, "preference.loss='dpo' must be one of sigmoid"),
        ({"label_smoothing": 0.5}, "preference.label_smoothing=0.5 must be at least 0 and below"),
    ],
)
def test_settings_that_say_nothing_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        schema.from_dict({"preference": values})


def test_a_margin_is_of_simpo_alone():
    values = {"train": {"objective": "preference"}, "preference": {"margin": 0.2}}
    with pytest.raises(ConfigError, match="preference.margin=0.2 must be left at 0.5 where prefer"):
        schema.from_dict(values)
    values["preference"]["loss"] = "simpo"
    assert dataclasses.asdict(schema.from_dict(values).preference)["margin"] == 0.2
