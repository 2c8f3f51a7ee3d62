"""Runs of adapters: what trains, what is stored, and what such a run loads and converts as."""

import json
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import puna
from puna.configs import schema
from puna.configs.errors import ConfigError, UserError
from puna.models import leaf
from puna.models.adapters import attach, detach, is_adapted
from puna.models.parallel import sharding
from puna.models.quantize import is_quantized, kind_of
from puna.models.release.convert import convert
from puna.models.release.source import hf_table
from puna.models.transformer import abstract_params
from puna.models.weights import huggingface, run
from puna.train import init_from, loop
from puna.train.loop import train
from puna.train.optimizer import make_optimizer
from puna.train.state import join


def leaves(tree):
    return {sharding.path_name(p): np.asarray(x) for p, x in jax.tree.leaves_with_path(tree)}


def same(a, b):
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert np.array_equal(x, b[name]), name


@pytest.fixture
def lora(config):
    """Four experts, adapters on every weight, over a base of any kind."""
    config.model.update(EXPERTS)
    config.adapter.update(rank=2, alpha=8.0, targets="/w,embed/,unembed/")
    config.optimizer.update(learning_rate=3e-2, weight_decay=0.0)
    config.train.update(eval_every=0)
    return config


# One kind of layer, which has every kind of weight.
EXPERTS = {"num_layers": 2, "moe_interval": 1, "num_experts": 4, "expert_dim": 12}
# What is 0 in a model without experts.
DENSE = ("moe_interval", "num_experts", "expert_dim")
# Blocks of two kinds of layers, and a layer more, which is a tail after them.
TAIL = {"num_layers": 3, "moe_interval": 2, "nope_interval": 2, "chunk_size": 8}


def set_in(config, **keys):
    config.update_from_flattened_dict(keys)
    return config


@pytest.mark.parametrize(
    ("quantize", "dora", "optimizer", "model", "axes"),
    [
        pytest.param("int4", False, "adamw", {}, {"data": 8}, marks=pytest.mark.slow),
        # That every number is the same on a mesh, tests/models/test_adapters.py shows.
        pytest.param(
            "int8",
            True,
            "adamw",
            {},
            {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2},
            marks=pytest.mark.slow,
        ),
        pytest.param("none", False, "muon", TAIL, {"data": 8}, marks=pytest.mark.slow),
    ],
)
def test_only_adapters_train_and_are_stored(lora, tmp_path, quantize, dora, optimizer, model, axes):
    set_in(
        lora, **{"adapter.quantize": quantize, "adapter.dora": dora, "optimizer.name": optimizer}
    )
    lora.model.update(model)
    lora.mesh.update(axes)
    state = train(lora, tmp_path / "run")
    trained = leaves(state.params)
    assert {name.rpartition("/")[2] for name in trained} == set("abm" if dora else "ab")
    last = lora.model.moe_interval - 1
    assert f"blocks/layer_{last}/moe/w_gate_EDF/a" in trained and "embed/table_VD/b" in trained
    # Moments are of the adapters alone.
    moments = {x.shape for x in jax.tree.leaves(state.opt_state) if x.ndim > 1}
    assert moments == {x.shape for x in trained.values()}
    # The base is what the run began with.
    c = schema.from_dict(lora)
    mesh = sharding.make_mesh(c.mesh)
    with jax.set_mesh(mesh):
        tx = make_optimizer(c, abstract_params(c.model))
        start = init_from.initial_state(c, tx, mesh)
    same(start.frozen, state.frozen)
    kinds = {kind_of(x) for x in jax.tree.leaves(state.frozen, is_leaf=is_quantized)} - {""}
    assert quantize in (kinds or {"none"})
    moved = [
        name for name, x in trained.items() if not np.array_equal(x, leaves(start.params)[name])
    ]
    assert len(moved) > 0.9 * len(trained)
    # A checkpoint holds adapters; the base lies beside the checkpoints, once.
    sums = run.read_meta(run.find(tmp_path / "run"))["checksums"]
    assert set(sums["params"]) == set(trained)
    assert len(list((tmp_path / "run" / run.FROZEN).iterdir())) == 1
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert losses[-1] < losses[0]

    # It loads as it trained, in any process and on any mesh, and converts as the sum.
    model, params = puna.load(tmp_path / "run")
    same(params, join(state.params, state.frozen))
    assert all(is_adapted(x) for x in (params["embed"]["table_VD"], params["unembed"]["table_DV"]))
    convert(tmp_path / "run", tmp_path / "release")
    _, merged = puna.load(tmp_path / "release")
    wanted = leaves(leaf.merge(params))
    for name, x in leaves(merged).items():
        np.testing.assert_allclose(x, wanted[name], atol=1e-6, err_msg=name)
    tokens_BT = np.arange(16)[None] % 264
    apply = jax.jit(lambda params: model.apply({"params": params}, tokens_BT).logits_BTV)
    on, off = np.asarray(apply(params)), np.asarray(apply(detach(params)))
    np.testing.assert_allclose(apply(merged), on, atol=1e-5 * np.abs(on).max())
    assert np.abs(on - off).max() > 1e-2 * np.abs(on).max()


def hf(lora, folder):
    """A Hugging Face directory of the base's architecture."""
    shapes = abstract_params(schema.from_dict(lora).model)
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), sharding.unbox(shapes))
    c = schema.from_dict(lora).model
    tensors = huggingface.from_puna(c, params)
    (folder / "hf").mkdir()
    save_file(tensors, folder / "hf" / "model.safetensors")
    (folder / "hf" / "config.json").write_text(json.dumps(hf_table(c)[1]))
    return folder / "hf"


@pytest.mark.slow
def test_a_run_of_adapters_resumes_bit_for_bit(lora, tmp_path, cut):
    set_in(lora, **{"adapter.quantize": "int8", "adapter.dora": True})
    lora.model.update(dict.fromkeys(DENSE, 0))
    whole = train(lora, tmp_path / "whole")
    same(whole, train(lora, cut(tmp_path / "whole", tmp_path / "cut")))
    # Its adapters alone, in PEFT's format, on the same base.
    convert(tmp_path / "cut", tmp_path / "peft", to="peft")
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["r"] == 2
    with pytest.raises(UserError, match="is not a run of puna, so it has no adapters"):
        convert(first := hf(lora, tmp_path), tmp_path / "none", to="peft")
    _, found = puna.load(first, adapter=tmp_path / "peft")
    for name in ("wq_DNH", "wo_NHD"):
        made, trained = (
            tree["blocks"]["layer_0"]["attention"][name] for tree in (found, whole.params)
        )
        a, b = np.asarray(trained.a), np.asarray(trained.b) * trained.scale
        np.testing.assert_allclose(made.a, a, atol=1e-7)
        np.testing.assert_allclose(made.b, b, atol=1e-7)
        assert np.array_equal(made.m, trained.m)
    # A run that starts from it has the sum for its base.
    set_in(lora, **{"train.init_from": str(tmp_path / "cut"), "train.steps": 1,
                    "optimizer.warmup_steps": 0})  # fmt: skip
    c = init_from.resolve(schema.build(lora), tmp_path / "next")
    mesh = sharding.make_mesh(c.mesh)
    with jax.set_mesh(mesh):
        state = init_from.initial_state(c, make_optimizer(c, abstract_params(c.model)), mesh)
    merged = leaf.merge(attach(whole.params, whole.frozen["base"]))
    base = state.frozen["base"]["blocks"]["layer_0"]["attention"]["wq_DNH"]
    step = np.asarray(base.scale)
    error = np.abs(leaf.dense(base) - merged["blocks"]["layer_0"]["attention"]["wq_DNH"])
    assert np.all(error <= 0.51 * step)
    with pytest.raises(ConfigError, match="has the moments of adapters"):
        set_in(lora, **{"adapter": schema.to_dict(schema.AdapterConfig()),
                        "train.with_optimizer": True})  # fmt: skip
        init_from.resolve(schema.build(lora), tmp_path / "next")


def test_a_base_in_bfloat16_has_adapters_in_float32(lora, tmp_path):
    set_in(lora, **{"model.param_dtype": "bfloat16", "model.compute_dtype": "bfloat16"})
    lora.model.update(dict.fromkeys(DENSE, 0))
    lora.train.update(steps=2, save_every=2)
    state = train(lora, tmp_path)
    assert {x.dtype.name for x in jax.tree.leaves(state.params)} == {"float32"}
    assert {x.dtype.name for x in jax.tree.leaves(state.frozen)} == {"bfloat16"}
    _, params = puna.load(tmp_path, "bfloat16")
    same(params, join(state.params, state.frozen))


def test_a_mixture_without_adapters_on_its_experts_says_so(lora, tmp_path, monkeypatch, capsys):
    """Before anything is compiled."""
    lora.adapter.targets = "attention"
    monkeypatch.setattr(loop, "Checkpoints", Mock(side_effect=UserError("here it would start")))
    with pytest.raises(UserError, match="here it would start"):
        train(lora, tmp_path / "a")
    out, err = capsys.readouterr()
    assert "adapter.targets=attention reaches no routed expert" in err
    assert "parameters of adapters on" in out


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"train.trainable": "norm"}, "train.trainable=norm must be left out where adapter.rank=2"),
        ({"adapter.targets": "q_proj"}, "no parameter's path has q_proj; a path is like"),
        ({"adapter.rank": 0}, "adapter.alpha=8.0 must be left at 16.0 where adapter.rank=0"),
        ({"adapter.rank": 99}, "adapter.rank=99 must be at most"),
    ],
)
def test_what_contradicts_adapters_is_one_line(lora, tmp_path, keys, message):
    with pytest.raises(ConfigError, match=message):
        train(set_in(lora, **keys), tmp_path)
