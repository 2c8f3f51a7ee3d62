"""Adapters of PEFT: both layouts, each field honoured or refused, and what is written read back."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import puna
from puna.configs.errors import UserError
from puna.models import leaf
from puna.models.adapters import detach, is_adapted
from puna.models.quantize import Int8
from puna.models.release.convert import convert
from puna.models.weights import huggingface, peft, torch_files

PREFIX = "base_model.model."
RANK, ALPHA = 3, 6.0


@pytest.fixture(scope="session")
def scout(files, tmp_path_factory):
    config = files.model_config(files.SCOUT)
    weights = files.random_tensors(files.hf_shapes(config))
    weights = {n: w * 0.2 for n, w in weights.items()}
    path = files.write_hf(tmp_path_factory.mktemp("scout"), files.hf_table(config)[1], weights)
    return config, path, weights


@pytest.fixture(scope="session")
def dense(files, tmp_path_factory):
    config = files.model_config(files.TINY)
    weights = files.random_tensors(files.hf_shapes(config))
    weights = {n: w * 0.2 for n, w in weights.items()}
    path = files.write_hf(tmp_path_factory.mktemp("dense"), files.hf_table(config)[1], weights)
    return config, path, weights


def draw(rng, *shape):
    return (0.3 * rng.normal(size=shape)).astype(np.float32)


def linear(tensors, weights, name, rng, rank=RANK, scale=ALPHA / RANK):
    """An adapter of a Linear; `weights` becomes the sum."""
    module = name.removesuffix(".weight")
    a, b = draw(rng, rank, weights[name].shape[1]), draw(rng, weights[name].shape[0], rank)
    tensors |= {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
    weights[name] = weights[name] + scale * b @ a


def experts(tensors, weights, name, rng, key, newer, rank=RANK):
    """An adapter of the experts of a layer, by the formula of either layout."""
    E, left, right = weights[name].shape
    sides = (right, left) if newer else (left, right)
    a, b = draw(rng, rank * E, sides[0]), draw(rng, sides[1], rank * E)
    tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    a, b = a.reshape(E, rank, sides[0]), b.reshape(sides[1], rank, E)
    made = np.stack([b[:, :, e] @ a[e] if newer else (b[:, :, e] @ a[e]).T for e in range(E)])
    weights[name] = weights[name] + ALPHA / rank * made


def write(folder, tensors, **values):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / peft.WEIGHTS)
    config = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj"],
        "lora_dropout": 0.1, "bias": "none", "task_type": "CAUSAL_LM", "use_rslora": False,
        "init_lora_weights": True, "peft_version": "0.21.2", "loftq_config": {}, "revision": None,
        "runtime_config": {"ephemeral_gpu_offload": False}, "megatron_core": "megatron.core",
    }  # fmt: skip
    (folder / peft.CONFIG).write_text(json.dumps(config | values))
    return folder


def assert_sums(config, params, weights, tolerance=2e-6):
    """The merged parameters are the sums that NumPy made."""
    found = huggingface.from_puna(config, jax.tree.map(np.asarray, leaf.merge(params)))
    for name, wanted in weights.items():
        np.testing.assert_allclose(
            found[name], wanted, atol=tolerance * np.abs(wanted).max(), err_msg=name
        )


@pytest.mark.parametrize("newer", [True, False])
def test_experts_in_either_layout(scout, tmp_path, newer):
    config, base, weights = scout
    weights, tensors, rng = dict(weights), {}, np.random.default_rng(0)
    linear(tensors, weights, "model.layers.0.feed_forward.down_proj.weight", rng)
    linear(tensors, weights, "model.layers.1.feed_forward.shared_expert.up_proj.weight", rng)
    linear(tensors, weights, "model.layers.2.self_attn.q_proj.weight", rng)
    for layer, names in ((1, ("gate_up_proj", "down_proj")), (3, ("down_proj",))):
        outer = f"model.layers.{layer}.feed_forward.experts"
        for name in names:
            key = f"{PREFIX}{outer}{'.base_layer' if name == 'gate_up_proj' else ''}"
            experts(tensors, weights, f"{outer}.{name}", rng, key, newer)
    targets = ["feed_forward.experts.down_proj"]
    # Here gate_up is square: what its tensors are, only the version says.
    version = "0.19.0" if newer else "0.18.1"
    folder = write(tmp_path / "a", tensors, target_parameters=targets, peft_version=version)
    model, params = puna.load(base, adapter=folder)
    assert_sums(config, params, weights)
    assert is_adapted(params["blocks"]["layer_1"]["moe"]["w_up_EDF"])
    # Over int8 the base is what int8 makes of it, and the adapter as it was.
    _, over = puna.load(base, adapter=folder, quantize="int8")
    gate = over["blocks"]["layer_1"]["moe"]["w_gate_EDF"]
    assert isinstance(gate.base, Int8)
    assert np.array_equal(gate.b, params["blocks"]["layer_1"]["moe"]["w_gate_EDF"].b)
    assert model.config.num_experts == 4


def test_several_adapters_are_their_weighted_sum(scout, tmp_path):
    config, base, weights = scout
    sums, rng = dict(weights), np.random.default_rng(0)
    for folder, weight, rank, names in (
        ("a", 0.7, 3, ("2.self_attn.q_proj", "0.feed_forward.down_proj", "1.self_attn.o_proj")),
        ("b", -1.5, 2, ("2.self_attn.q_proj", "3.self_attn.o_proj")),
        ("c", 1.0, 3, ("1.self_attn.o_proj",)),
    ):
        tensors, own = {}, dict(weights)
        for name in names:
            linear(tensors, own, f"model.layers.{name}.weight", rng, rank, ALPHA / rank)
        if folder != "c":
            outer = "model.layers.1.feed_forward.experts"
            experts(tensors, own, f"{outer}.down_proj", rng, PREFIX + outer, True, rank)
        write(tmp_path / folder, tensors, r=rank, target_parameters=["experts.down_proj"])
        sums = {n: x + weight * (own[n] - weights[n]) for n, x in sums.items()}
    text = f"0.7*{tmp_path}/a, -1.5*{tmp_path}/b,{tmp_path}/c"
    model, params = puna.load(base, adapter=text)
    assert_sums(config, params, sums)
    assert params["blocks"]["layer_1"]["moe"]["w_down_EFD"].a.shape[-1] == 5
    tokens_BT = np.arange(8)[None]
    on, merged = (
        np.asarray(jax.jit(model.apply)({"params": p}, tokens_BT).logits_BTV)
        for p in (params, leaf.merge(params))
    )
    np.testing.assert_allclose(on, merged, atol=1e-5 * np.abs(on).max())
    # A release has the same sums.
    convert(base, tmp_path / "release", adapter=text, tokenizer="none")
    found = load_file(tmp_path / "release" / "model.safetensors")
    assert found.keys() == sums.keys()
    for name, x in found.items():
        wanted = sums[name]
        np.testing.assert_allclose(x, wanted, atol=2e-6 * np.abs(wanted).max(), err_msg=name)


def test_what_cannot_be_added_is_refused(dense, tmp_path):
    _, base, weights = dense
    plain = write(tmp_path / "a", good(weights))
    whole = good(weights) | {f"{PREFIX}lm_head.weight": weights["lm_head.weight"]}
    write(tmp_path / "b", whole)
    lengths = good(weights)
    key = f"{PREFIX}model.layers.0.self_attn.k_proj.lora_magnitude_vector"
    lengths[key] = np.ones(len(weights["model.layers.0.self_attn.k_proj.weight"]), np.float32)
    write(tmp_path / "c", lengths, use_dora=True)
    for text, message in (
        (f"{plain},{tmp_path}/b", "b has modules_to_save on unembed/table_DV, which cannot be"),
        (f"0.5*{tmp_path}/c", "c has DoRA on .*wk_DKH, which cannot be weighed"),
        (f"0*{plain}", "each with a weight that is not 0"),
        (f"{plain},", "'' is neither"),
    ):
        with pytest.raises(UserError, match=message):
            puna.load(base, adapter=text)
    with pytest.raises(UserError, match="with --to=puna is not that"):
        convert(base, tmp_path / "run", to="puna", adapter=str(plain), tokenizer="none")
    # Alone and whole, both are.
    model, params = puna.load(base, adapter=tmp_path / "c")
    convert(base, tmp_path / "release", adapter=f"{tmp_path}/c", tokenizer="none")
    assert_sums(model.config, params, load_file(tmp_path / "release" / "model.safetensors"))


def test_square_experts_are_told_apart_by_the_version(files, tmp_path):
    config = files.model_config(files.SCOUT | {"expert_dim": 32})
    weights = {n: 0.2 * w for n, w in files.random_tensors(files.hf_shapes(config)).items()}
    base = files.write_hf(tmp_path / "base", files.hf_table(config)[1], weights)
    for version, newer in (("0.19.0", True), ("0.18.1", False), (None, False)):
        sums, tensors = dict(weights), {}
        outer = "model.layers.1.feed_forward.experts"
        experts(
            tensors, sums, f"{outer}.down_proj", np.random.default_rng(0), PREFIX + outer, newer
        )
        folder = write(tmp_path / "a", tensors, peft_version=version,
                       target_parameters=["experts.down_proj"])  # fmt: skip
        assert_sums(config, puna.load(base, adapter=folder)[1], sums)


def test_patterns_rslora_embedding_and_saved_modules(dense, tmp_path):
    config, base, weights = dense
    weights, tensors, rng = dict(weights), {}, np.random.default_rng(0)
    q, up = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"
    linear(tensors, weights, q, rng, scale=ALPHA / np.sqrt(RANK))
    linear(tensors, weights, up, rng, rank=2, scale=5.0 / np.sqrt(2))
    V, D = weights["model.embed_tokens.weight"].shape
    a, b = draw(rng, RANK, V), draw(rng, D, RANK)
    name = f"{PREFIX}model.embed_tokens"
    tensors |= {f"{name}.lora_embedding_A": a, f"{name}.lora_embedding_B": b,
                f"{name}.base_layer.weight": weights["model.embed_tokens.weight"]}  # fmt: skip
    weights["model.embed_tokens.weight"] = (
        weights["model.embed_tokens.weight"] + ALPHA / np.sqrt(RANK) * (b @ a).T
    )
    tensors[f"{PREFIX}lm_head.weight"] = weights["lm_head.weight"] = draw(rng, V, D)
    folder = write(
        tmp_path / "a", tensors, use_rslora=True, rank_pattern={"up_proj": 2},
        alpha_pattern={"mlp.up_proj": 5.0}, modules_to_save=["lm_head"],
    )  # fmt: skip
    model, params = puna.load(base, adapter=folder)
    assert_sums(config, params, weights)
    tokens_BT = np.arange(8)[None]
    logits = [
        np.asarray(jax.jit(model.apply)({"params": p}, tokens_BT).logits_BTV)
        for p in (params, leaf.merge(params))
    ]
    np.testing.assert_allclose(*logits, atol=1e-5 * np.abs(logits[0]).max())


def test_a_tied_embedding_is_untied_where_the_output_is_adapted(files, tmp_path):
    config = files.model_config(files.TINY | {"tie_embeddings": True})
    weights = files.random_tensors(files.hf_shapes(config))
    base = files.write_hf(tmp_path / "base", files.hf_table(config)[1], weights)
    tensors, rng = {}, np.random.default_rng(0)
    sums = weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}
    linear(tensors, sums, "lm_head.weight", rng)
    model, params = puna.load(base, adapter=write(tmp_path / "a", tensors))
    assert not model.config.tie_embeddings
    assert_sums(model.config, params, sums)  # the embedding as it was
    convert(base, tmp_path / "release", adapter=str(tmp_path / "a"), tokenizer="none")
    assert_sums(model.config, params, load_file(tmp_path / "release" / "model.safetensors"))
    assert not is_adapted(params["embed"]["table_VD"])


def zeros(*shape):
    return np.zeros(shape, np.float32)


def good(weights):
    tensors = {}
    linear(tensors, dict(weights), "model.layers.0.self_attn.k_proj.weight",
           np.random.default_rng(0))  # fmt: skip
    return tensors


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3' must be LORA"),
        ({"use_dora": True}, "use_dora=True in adapter_config.json, and .* has no lora_magnitude"),
        ({"bias": "all"}, "bias=all is not what"),
        ({"lora_bias": True}, "lora_bias=True is not what"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"a_key_of_tomorrow": 7}, "a_key_of_tomorrow=7 is not what"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa has changed the base"),
        ({"r": 0}, "r=0 must be a number above 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan must be a number above 0"),
        ({"alpha_pattern": {"k_proj": "8"}}, "alpha_pattern=.* must be an object of patterns and"),
        ({"rank_pattern": ["k_proj"]}, "rank_pattern=.* must be an object of patterns and numbers"),
        ({"rank_pattern": {"(": 3}}, r"rank_pattern: '\(' is no pattern \(missing \)"),
        ({"target_parameters": 5}, "target_parameters=5 must be a list of names"),
        ({"r": 4}, "has rank 3 and adapter_config.json says 4"),
    ],
)
def test_what_is_not_honoured_is_refused_in_one_line(dense, tmp_path, values, message):
    _, base, weights = dense
    with pytest.raises(UserError, match=message):
        puna.load(base, adapter=write(tmp_path / "a", good(weights), **values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, k: t | {k + "A.weight": t[k + "A.weight"][:, :5]}, "is of another base"),
        (lambda t, k: {k + "A.weight": t[k + "A.weight"]}, "has lora_A or lora_B alone"),
        (lambda t, k: {n.replace("layers.0", "layers.9"): x for n, x in t.items()},
         "model.layers.9.self_attn.k_proj is not a weight of the model"),
        (lambda t, k: {n.removeprefix(PREFIX): x for n, x in t.items()}, "must begin with base"),
        (lambda t, k: {}, "holds no tensor"),
        (lambda t, k: t | {PREFIX + "lm_head.weight": zeros(5, 32)}, "of another base"),
        (lambda t, k: t | {PREFIX + "model.rotary.weight": zeros(3)}, "is not a weight"),
    ],
)  # fmt: skip
def test_an_adapter_of_another_base_is_one_line(dense, tmp_path, change, message):
    _, base, weights = dense
    key = f"{PREFIX}model.layers.0.self_attn.k_proj.lora_"
    tensors = {n: np.ascontiguousarray(x) for n, x in change(good(weights), key).items()}
    with pytest.raises(UserError, match=re.escape(message)):
        puna.load(base, adapter=write(tmp_path / "a", tensors))


def test_an_adapter_of_torch_save_and_one_that_is_not_numbers(dense, tmp_path, capsys):
    config, base, weights = dense
    sums, tensors = dict(weights), {}
    linear(tensors, sums, "model.layers.0.self_attn.k_proj.weight", np.random.default_rng(0))
    folder = write(tmp_path / "a", tensors)
    (folder / peft.WEIGHTS).unlink()
    described = {name: (x.shape, x.dtype) for name, x in tensors.items()}
    torch_files.write_file(folder / "adapter_model.bin", described, tensors.values())
    _, params = puna.load(base, adapter=folder)
    assert_sums(config, params, sums)
    next(iter(tensors.values()))[0, 0] = np.nan
    puna.load(base, adapter=write(tmp_path / "a", tensors))
    assert "NaN or infinity in the adapter of blocks/layer_0/attention/wk_DKH" in (
        capsys.readouterr().err
    )


class Stored:
    """What `run.Parameters` gives of a run's adapters."""

    folder, scale = "runs/x", 2.0

    def __init__(self, found):
        self.adapter = found.get


@pytest.mark.parametrize("only", ["", "w_up_EDF", "w_down_EFD", "attention"])
def test_what_is_written_is_read_back(scout, tmp_path, only):
    config, base, weights = scout
    rng = np.random.default_rng(0)
    table, found, wanted = huggingface.leaves(config), {}, {}
    for path, leaf_ in table.items():
        if "/w" not in path or only not in path:
            continue
        source = leaf_.sources[0]
        a, b = (s.shape for s in peft._factors(source, RANK))
        stack = (len(leaf_.sources),) if leaf_.stacked else ()
        found[path] = (draw(rng, *stack, *a), draw(rng, *stack, *b), None)
    peft.write(tmp_path, table, Stored(found), "a/base")
    assert json.loads((tmp_path / peft.CONFIG).read_text())["base_model_name_or_path"] == "a/base"
    _, params = puna.load(base, adapter=tmp_path)
    _, plain = puna.load(base)
    for path in table:
        got, was = params, plain
        for name in path.split("/"):
            got, was = got[name], was[name]
        if path in found:
            a, b = (jnp.asarray(x) for x in found[path][:2])
            wanted = leaf.dense(got.replace(base=was, a=a, b=b, scale=2.0))
            np.testing.assert_allclose(leaf.dense(got), wanted, atol=1e-5, err_msg=path)
        else:
            assert not is_adapted(got) or not np.any(leaf.dense(got) - was), path
    names = list(load_file(tmp_path / peft.WEIGHTS))
    assert all(re.fullmatch(r"base_model\.model\..*\.lora_[AB]\.weight", n) for n in names)
    if not only:
        assert f"{PREFIX}model.layers.1.feed_forward.experts.base_layer.lora_A.weight" in names
    assert all(np.array_equal(x, y) for x, y in zip(
        jax.tree.leaves(detach(params)), jax.tree.leaves(plain), strict=True))  # fmt: skip


def test_a_run_without_adapters_has_none_to_write(tmp_path, scout):
    with pytest.raises(UserError, match="the run has no adapters; convert it with --to=hf"):
        peft.write(tmp_path, huggingface.leaves(scout[0]), Stored({}), None)
