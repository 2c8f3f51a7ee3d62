"""Multi-token prediction against NumPy in float64, in packed rows; a run of it, on meshes too."""

import json
import shutil

import autograd
import autograd.numpy as anp
import jax
import numpy as np
import pytest

import puna
from puna.configs import schema
from puna.models.transformer import Transformer
from puna.train.loop import train
from puna.train.objectives import multi_token

DOCUMENTS = [[5, 9, 7, 3, 2, 11], [4, 6], [8, 13, 9, 2, 1]]
WEIGHT = 0.3


def packed():
    """The documents in one row, whose last token has no target, and some padding."""
    tokens, targets, positions, segments, weights = [], [], [], [], []
    for i, ids in enumerate(DOCUMENTS):
        tokens += ids
        targets += [*ids[1:], 0]
        positions += range(len(ids))
        segments += [i + 1] * len(ids)
        weights += [1.0] * (len(ids) - 1) + [0.0]
    row = {"tokens_BT": tokens, "targets_BT": targets, "positions_BT": positions,
           "segment_ids_BT": segments, "weights_BT": weights}  # fmt: skip
    return {name: np.array([x + [0] * 3], np.array(x).dtype) for name, x in row.items()}


def hf_layer(w):
    """A layer of puna's as the NumPy model names and shapes it."""

    def out_in(x, rows=1):
        return anp.reshape(x, (int(np.prod(x.shape[:rows])), -1)).T

    a, m = w["attention"], w["mlp"]
    return {
        "self_attn.q_proj.weight": out_in(a["wq_DNH"]),
        "self_attn.k_proj.weight": out_in(a["wk_DKH"]),
        "self_attn.v_proj.weight": out_in(a["wv_DKH"]),
        "self_attn.o_proj.weight": out_in(a["wo_NHD"], 2),
        "mlp.gate_proj.weight": out_in(m["w_gate_DF"]),
        "mlp.up_proj.weight": out_in(m["w_up_DF"]),
        "mlp.down_proj.weight": out_in(m["w_down_FD"]),
    }


def test_loss_and_gradients_are_those_of_the_paper(tiny, oracle):
    model = tiny("llama3_2")
    D, eps = model.config.embed_dim, model.json["rms_norm_eps"]
    objective = multi_token.MultiToken(0.0, 8, np.ones(model.config.vocab_size, int), WEIGHT)
    config = schema.Config(model=model.config)
    shapes = jax.jit(lambda key: objective.init_added(config, key))(jax.random.key(0))["mtp"]
    rng = np.random.default_rng(0)
    own = jax.tree.map(lambda x: np.array(x) + 0.1 * rng.standard_normal(x.shape), shapes)

    def norm(x, w):
        return x / anp.sqrt(anp.mean(x**2, axis=-1, keepdims=True) + eps) * w["scale_D"]

    def mean(weights, own):
        table = weights["model.embed_tokens.weight"]
        total, count = 0.0, 0
        for ids in DOCUMENTS:
            ids, T = np.array(ids), len(ids)
            named = dict(weights) | {"lm_head.weight": np.eye(D)}
            # An output that changes nothing gives the states.
            plain = model.json | {"tie_word_embeddings": False}
            h = oracle.forward(plain, named, [ids])[0]
            for t in range(T - 1):
                total -= oracle._log_softmax(table @ h[t])[ids[t + 1]]
            count += T - 1
            h, e = norm(h[:-1], own["hidden_norm"]), norm(table[ids[1:]], own["next_norm"])
            x = h @ own["w_hidden_DE"] + e @ own["w_next_DE"]
            w, positions = hf_layer(own["layer"]), np.arange(T - 1)
            h = norm(x, own["layer"]["attention_norm"])
            x = x + oracle._attention(model.json, w, 0, h, positions, np.ones(T - 1))
            x = x + oracle._feed_forward(model.json, w, 0, norm(x, own["layer"]["mlp_norm"]))
            x = norm(x, own["norm"])
            for t in range(T - 2):
                total -= WEIGHT * oracle._log_softmax(table @ x[t])[ids[t + 2]]
        return total / count

    assert model.config.tie_embeddings
    wanted, (of_model, of_module) = autograd.value_and_grad(
        lambda both: mean(*both)
    )((model.weights, own))  # fmt: skip
    rows = packed()

    def ours(params):
        found = objective.loss(Transformer(model.config), params, {}, rows)
        return found.total / rows["weights_BT"].sum(), found.rows_B

    params = model.params(model.weights) | {"mtp": jax.tree.map(np.float32, own)}
    (loss, sums), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)

    def close(found, wanted):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.max(np.abs(wanted)))

    close(loss, wanted)
    jax.tree.map(close, gradient.pop("mtp"), of_module)
    gradient = model.by_name(jax.tree.map(np.asarray, gradient))
    for name, w in of_model.items():
        if name != "lm_head.weight":
            close(gradient[name], w)
    assert sums["second_tokens"].sum() == sum(max(0, len(ids) - 2) for ids in DOCUMENTS)


def numbers(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    names = ("loss", "second_loss", "grad_norm")
    return np.array([[json.loads(line)[name] for name in names] for line in lines])


@pytest.fixture
def experts(config):
    config.model.update(num_layers=2, moe_interval=1, num_experts=4, expert_dim=12)
    config.train.update(objective="multi_token", eval_every=0)
    return config


@pytest.mark.slow
def test_a_run_learns_and_resumes(experts, tmp_path):
    state = train(experts, tmp_path / "run")
    found = numbers(tmp_path / "run")
    assert found[-1, 1] < found[0, 1] and abs(found[0, 1] - np.log(264)) < 1
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    again = train(experts, tmp_path / "run")
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(again), strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))
    assert "mtp" not in puna.load(tmp_path / "run")[1]


@pytest.mark.slow
def test_a_mesh_gives_the_numbers_of_one_device(experts, tmp_path):
    # A tail after the block of two.
    experts.model.update(num_layers=3, moe_interval=2, nope_interval=2, chunk_size=8)
    experts.train.update(steps=3, save_every=3)
    for name, axes in (("one", {}), ("mesh", {"data": 1, "fsdp": 2, "context": 2, "tensor": 2})):
        experts.mesh.update(axes)
        train(experts, tmp_path / name)
    np.testing.assert_allclose(numbers(tmp_path / "mesh"), numbers(tmp_path / "one"), rtol=1e-4)
