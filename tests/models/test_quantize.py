"""int8, int4, NF4: the numbers they stand for wherever a weight is used, and their bytes."""

import dataclasses
import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import puna
from puna import __main__ as cli
from puna.configs.errors import UserError
from puna.configs.schema import MeshConfig, ModelConfig
from puna.models import leaf
from puna.models import quantize as quantization
from puna.models.decode import engine
from puna.models.kernels.experts import grouped_matmul
from puna.models.layers import contract, look_up
from puna.models.parallel import sharding
from puna.models.quantize import (
    NF4,
    Grouped,
    Int4,
    Int8,
    Nf4,
    box,
    is_quantized,
    quantize,
    quantize_tree,
)
from puna.models.release.convert import convert
from puna.models.text.tokenizer import byte_tokenizer
from puna.models.transformer import Transformer, abstract_params, unembed_table
from puna.train.objectives.next_token import cross_entropy

DENSE = ModelConfig(
    vocab_size=272, embed_dim=64, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16,
    mlp_dim=96, max_positions=128, rope_theta=100.0, nope_interval=2, chunk_size=6, qk_norm=True,
    compute_dtype="float32",
)  # fmt: skip
CONFIGS = {
    "dense": DENSE,
    "tied": dataclasses.replace(DENSE, tie_embeddings=True, nope_interval=0, chunk_size=0),
    "scout": dataclasses.replace(
        DENSE, num_layers=4, moe_interval=1, num_experts=4, experts_per_token=1, expert_dim=48,
    ),
}  # fmt: skip
# Error of a token's logits over their size (both Euclidean), of the median token: one that another
# expert gets is far off. A step of int8 is 2.5 deviations / 127 for 64 Gaussian weights, so each
# product is off by 0.6 percent, and the products of a few layers by 2 to 3. A step of int4 is 4
# deviations / 15 for groups of 32, 14 times that; int3 would be twice as far off.
BOUND = {"int8": 0.04, "int4": 0.5, "nf4": 0.5}
# Bytes over those of bfloat16. int8 has 4 more for each column of 64 or more numbers, int4 for each
# group of 32 or fewer.
BYTES = {"int8": 0.55, "int4": 0.4, "nf4": 0.38}
KINDS = pytest.mark.parametrize("kind", BOUND)
# nf4 differs from int4 in its numbers alone.
CASES = [*((n, k) for n in CONFIGS for k in ("int8", "int4")), ("scout", "nf4")]


def cases(*fast):
    """All CASES, of which those that are not named are slow; each model and kind is among them."""
    assert {n for n, _ in fast} == set(CONFIGS) and {k for _, k in fast} == set(BOUND)
    slow = pytest.mark.slow
    return pytest.mark.parametrize(
        ("name", "kind"), [pytest.param(*c, marks=[] if c in fast else slow) for c in CASES]
    )


@functools.cache
def plain_params(name):
    config, rng = CONFIGS[name], np.random.default_rng(0)

    def draw(path, x):
        value = rng.normal(size=x.shape)
        fan_in = x.shape[-1] if "table_VD" in str(path[-1]) else config.embed_dim
        value = 1 + 0.1 * value if "norm" in str(path[-2]) else fan_in**-0.5 * value
        # On a device by name, as what is made of them: the same program takes both.
        return jax.device_put(np.float32(value), jax.devices()[0])

    return jax.tree.map_with_path(draw, sharding.unbox(abstract_params(config)))


@functools.cache
def params(name, kind):
    """Parameters of a model, and its quantised ones."""
    plain = plain_params(name)
    return plain, quantize_tree(plain, abstract_params(CONFIGS[name]), kind)


numbers = jax.jit(lambda made: jax.tree.map(leaf.dense, made, is_leaf=is_quantized))


@functools.cache
def forward(name):
    model = Transformer(CONFIGS[name])
    return jax.jit(lambda params, tokens_BT: model.apply({"params": params}, tokens_BT).logits_BTV)


TOKENS_BT = np.random.default_rng(1).integers(0, 272, (2, 24))


@cases(("dense", "int4"), ("tied", "int8"), ("scout", "nf4"))
def test_logits_are_those_of_the_rounded_weights_and_near_those_of_the_weights(name, kind):
    plain, made = params(name, kind)
    found, wanted = forward(name)(made, TOKENS_BT), forward(name)(numbers(made), TOKENS_BT)
    np.testing.assert_allclose(found, wanted, atol=1e-5 * float(jnp.abs(wanted).max()))
    exact = forward(name)(plain, TOKENS_BT)
    error_BT = np.linalg.norm(found - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
    assert 1e-3 < np.median(error_BT) < BOUND[kind]


@cases(*CASES)
def test_weights_take_a_half_or_a_third_of_the_bytes_of_bfloat16(name, kind):
    plain, made = params(name, kind)
    half = sum(2 * x.size for x in jax.tree.leaves(plain))
    assert sum(x.nbytes for x in jax.tree.leaves(made)) < BYTES[kind] * half
    leaves = jax.tree.leaves_with_path(made, is_leaf=is_quantized)
    others = [sharding.path_name(p) for p, x in leaves if not is_quantized(x)]
    assert {path.split("/")[-1] for path in others} <= {"scale_D", "router_DE"}
    tables = [sharding.path_name(p) for p, x in leaves if isinstance(x, Int8)]
    assert kind == "int8" or all("/table_" in path for path in tables)
    # What will be is known before it is made.
    boxed = sharding.unbox(box(abstract_params(CONFIGS[name]), kind))
    assert jax.tree.structure(boxed) == jax.tree.structure(made)
    for x, y in zip(jax.tree.leaves(boxed), jax.tree.leaves(made), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)


def test_a_weight_is_off_by_at_most_half_a_step():
    rng = np.random.default_rng(0)
    w_LDF = jnp.array(rng.normal(size=(2, 8, 6)) * np.exp(rng.normal(size=(2, 1, 6))), jnp.float32)
    w_LDF = w_LDF.at[0, :, 3].set(0.0)
    made = quantize(w_LDF, ("layers", "embed", "mlp"))
    assert made.values.dtype == jnp.int8 and made.scale.shape == (2, 1, 6)
    error = np.abs(leaf.dense(made) - w_LDF)
    assert np.all(error <= np.abs(w_LDF).max(1, keepdims=True) / 254 * (1 + 1e-5))
    assert np.all(error[0, :, 3] == 0)
    # Rows of an embedding, whose product with a state sums over D, too.
    assert quantize(w_LDF[0], ("vocab", "embed")).scale.shape == (8, 1)
    assert quantize(w_LDF[0], ("embed", "vocab")).scale.shape == (1, 6)
    damaged = quantize(w_LDF.at[0, 0, 0].set(jnp.nan), ("layers", "embed", "mlp"))
    assert np.isnan(leaf.dense(damaged)[0, :, 0]).all()


@pytest.mark.parametrize(
    ("spec", "names", "shape"),
    [
        ("BTD,DNH->BTNH", ("embed", "heads", "head_dim"), (64, 3, 8)),
        ("BTNH,NHD->BTD", ("heads", "head_dim", "embed"), (3, 64, 8)),
    ],
)
def test_a_row_times_int4_is_the_product_with_its_numbers(spec, names, shape):
    rng = np.random.default_rng(0)
    made = quantize(jnp.array(rng.normal(size=shape), jnp.float32), names, "int4")
    rows = shape[: 2 if names[0] == "heads" else 1]
    x = np.float32(rng.normal(size=(1, 1, *rows)))
    want = np.einsum(spec, x, numbers(made), dtype=np.float64)
    found = jax.jit(lambda x, made: contract(spec, x, made, "float32"))(x, made)
    assert found.shape == want.shape
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


def test_int4_holds_sixteen_numbers_of_each_group():
    """An oracle in NumPy reads the bytes; what lies on the grid of its group comes back exactly."""
    rng = np.random.default_rng(0)
    steps = rng.integers(0, 16, (2, 6, 3, 8))  # layers, outputs, groups, numbers of a group
    steps[..., 2:4] = 0, 15
    scale = 2.0 ** rng.integers(-3, 3, (2, 6, 3, 1))
    exact = (steps * scale - 4 * scale).reshape(2, 6, 24).swapaxes(1, 2)
    names = ("layers", "embed", "mlp")
    made = quantize(jnp.array(exact, jnp.float32), names, "int4", group=8)
    assert isinstance(made, Int4) and made.shape == exact.shape and made.group == 8
    assert made.values.dtype == jnp.uint8 and made.values.shape == (2, 12, 6)
    assert made.scale.shape == made.least.shape == (2, 3, 6)
    np.testing.assert_array_equal(leaf.dense(made), exact)

    w_LDF = rng.normal(size=(2, 24, 6)) * np.exp(rng.normal(size=(2, 1, 6)))
    w_LDF[0, :, 3], w_LDF[1, :8, 2] = 0.0, 0.7
    made = quantize(jnp.array(w_LDF, jnp.float32), names, "int4", group=8)
    found = np.zeros_like(w_LDF)
    values, scale, least = (
        np.asarray(x, np.float32) for x in (made.values, made.scale, made.least)
    )
    for d in range(24):
        group, i = divmod(d, 8)
        byte = values[:, 4 * group + i % 4].astype(int)
        found[:, d] = (byte >> 4 if i >= 4 else byte & 15) * scale[:, group] + least[:, group]
    np.testing.assert_allclose(leaf.dense(made), found, atol=1e-6)
    groups = w_LDF.reshape(2, 3, 8, 6)
    step = np.ptp(groups, axis=2) / 15
    error = np.square(found.reshape(groups.shape) - groups).sum(2) ** 0.5
    # Nearest numbers of a grid over the whole range, rounded to bfloat16, are at least as far off.
    assert np.all(error <= 8**0.5 * (step / 2 + np.abs(groups).max(2) / 200))
    assert np.all(found[0, :, 3] == 0)
    damaged = quantize(jnp.array(w_LDF, jnp.float32).at[0, 0, 0].set(jnp.nan), names, "int4", 8)
    assert np.isnan(leaf.dense(damaged)[0, :8, 0]).all()
    # A dim that no group divides evenly, and tables of ids, are int8.
    assert isinstance(quantize(jnp.ones((7, 6)), ("embed", "mlp"), "int4"), Int8)
    assert quantize(jnp.ones((48, 6)), ("embed", "mlp"), "int4", 64).group == 48
    assert isinstance(quantize(jnp.ones((8, 64)), ("vocab", "embed"), "int4"), Int8)


def test_nf4_holds_the_nearest_quantiles_of_each_group():
    """An oracle in NumPy; the levels are quantiles of the normal distribution."""
    # As published with it: 8 and 7 even steps of probability up to 0.9677083, and zero.
    quantile = statistics.NormalDist().inv_cdf
    above, below = (
        [quantile(0.5 + (0.9677083 - 0.5) * i / n) for i in range(1, n + 1)] for n in (8, 7)
    )
    wanted = np.array([*(-x for x in reversed(below)), 0.0, *above]) / above[-1]
    np.testing.assert_allclose(NF4, wanted, atol=2e-7)

    rng = np.random.default_rng(0)
    w_LDF = np.float32(rng.normal(size=(2, 24, 6)) * np.exp(rng.normal(size=(2, 1, 6))))
    w_LDF[0, :, 3], w_LDF[1, :8, 2] = 0.0, 0.7
    names = ("layers", "embed", "mlp")
    made = quantize(jnp.array(w_LDF), names, "nf4", group=8)
    assert isinstance(made, Nf4) and made.shape == w_LDF.shape and made.group == 8
    assert made.values.dtype == jnp.uint8 and made.values.shape == (2, 12, 6)
    groups = w_LDF.reshape(2, 3, 8, 6)
    largest = np.abs(groups).max(2, keepdims=True).astype(jnp.bfloat16).astype(np.float32)
    levels = np.float32(NF4).reshape(16, 1, 1, 1, 1)
    nearest = np.abs(groups - levels * largest).argmin(0)
    found = np.asarray(leaf.dense(made)).reshape(groups.shape)
    np.testing.assert_allclose(found, np.float32(NF4)[nearest] * largest, rtol=1e-6)
    # Byte i of a group has its numbers i and i + 4.
    bytes_ = np.asarray(made.values).reshape(2, 3, 4, 6)
    held = np.concatenate([bytes_ & 15, bytes_ >> 4], 2)
    some = np.broadcast_to(largest > 0, held.shape)
    assert np.array_equal(held[some], nearest[some])
    assert np.all(found[0, ..., 3] == 0)
    damaged = quantize(jnp.array(w_LDF).at[0, 0, 0].set(jnp.nan), names, "nf4", 8)
    assert np.isnan(leaf.dense(damaged)[0, :8, 0]).all()
    # Of weights that are normal, it is nearer than even steps up to the same largest number.
    w_DF = rng.normal(size=(512, 64)).astype(np.float32)
    groups = w_DF.reshape(8, 64, 64)
    step = np.abs(groups).max(1, keepdims=True) / 7
    made = quantize(jnp.array(w_DF), names[1:], "nf4")
    error = np.asarray(leaf.dense(made)) - w_DF
    assert np.std(error) < 0.95 * np.std(np.round(groups / step) * step - groups)


@KINDS
def test_each_product_is_that_of_the_rounded_weight(kind):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return np.float32(rng.normal(size=shape))

    def close(found, wanted):
        np.testing.assert_allclose(found, wanted, atol=2e-5)

    def held(names, *shape):
        return quantize(jax.device_put(draw(*shape)), names, kind)

    def value_and_slopes(product, x):
        """A product, and the gradient of its sum: it reaches what a weight is multiplied with."""
        value, pull = jax.vjp(product, x)
        return value, pull(jnp.ones_like(value))[0]

    x_BTNH, w_NHD = draw(2, 3, 4, 6), held(("heads", "head_dim", "embed"), 4, 6, 6)
    dense_NHD = np.asarray(numbers(w_NHD))
    found, slopes = jax.jit(
        lambda x, w: value_and_slopes(lambda x: contract("BTNH,NHD->BTD", x, w, "float32"), x)
    )(x_BTNH, w_NHD)
    close(found, np.einsum("BTNH,NHD->BTD", x_BTNH, dense_NHD))
    close(slopes, np.broadcast_to(dense_NHD.sum(-1), x_BTNH.shape))

    names = ("experts", "expert_embed", "mlp")
    x_MD, w_EDF, sizes_E = draw(7, 6), held(names, 3, 6, 5), np.array([2, 0, 4], np.int32)
    w = np.asarray(numbers(w_EDF))
    wanted = np.concatenate([x_MD[:2] @ w[0], x_MD[2:6] @ w[2], np.zeros((1, 5))])

    found, slopes = jax.jit(
        lambda x, w: value_and_slopes(lambda x: grouped_matmul(x, w, sizes_E, dtype="float32"), x)
    )(x_MD, w_EDF)
    close(found, wanted)
    close(slopes, np.concatenate([np.tile(w[0].sum(-1), (2, 1)), np.tile(w[2].sum(-1), (4, 1)),
                                  np.zeros((1, 6))]))  # fmt: skip

    assert isinstance(w_EDF, Grouped) == isinstance(w_NHD, Grouped) == (kind != "int8")
    table_VD, ids = held(("vocab", "embed"), 9, 6), np.array([[8, 0, 9]], np.int32)
    rows = np.asarray(jax.jit(lambda table, ids: look_up(table, ids, "float32"))(table_VD, ids))
    close(rows[0, :2], np.asarray(numbers(table_VD))[[8, 0]])
    assert np.isnan(rows[0, 2]).all()


@cases(("dense", "int4"), ("tied", "int8"), ("scout", "nf4"))
def test_decoding_and_the_loss_give_the_forward_pass_s_log_probabilities(name, kind):
    _, held = params(name, kind)
    config = CONFIGS[name]
    model = Transformer(config)
    prompts = [[5, 65], [7, *range(30, 43)]]
    made = next(engine.decode(model, held, prompts, 8, block=8))
    tokens_BT = np.zeros(TOKENS_BT.shape, int)
    for r, prompt in enumerate(prompts):
        row = [*prompt, *made.ids_BT[r]]
        tokens_BT[r, : len(row)] = row
    logits_BTV = forward(name)(held, tokens_BT)
    logp_BTV = np.asarray(jax.nn.log_softmax(logits_BTV))
    for r, prompt in enumerate(prompts):
        at = len(prompt) - 1 + np.arange(8)
        wanted = logp_BTV[r, at, made.ids_BT[r]]
        np.testing.assert_allclose(made.logprobs_BT[r], wanted, atol=2e-5)

    targets_BT = np.roll(tokens_BT, -1, 1)

    @jax.jit
    def nll(held):
        states = model.apply({"params": held}, tokens_BT, method="states")
        ones_BT = np.ones(targets_BT.shape, np.float32)
        table = unembed_table(config, held)
        return cross_entropy(states.hidden_BTD, table, targets_BT, ones_BT, "float32")[1]

    wanted = -np.take_along_axis(logp_BTV, targets_BT[..., None], -1)[..., 0]
    np.testing.assert_allclose(nll(held), wanted, atol=2e-5)


@pytest.mark.parametrize(("kind", "axes"), [
    ("int8", {"fsdp": 2, "tensor": 2, "data": 2}),
    pytest.param("int8", {"expert": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
    pytest.param("int4", {"expert": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_mesh_gives_the_numbers_of_one_device(files, tmp_path, monkeypatch, kind, axes):
    """Loaded onto eight devices or one, from files or from a run."""
    monkeypatch.setattr(quantization, "GROUPS", {"int4": 4})
    config = files.model_config(files.SCOUT)
    weights = files.random_tensors(files.hf_shapes(config))
    path = files.write_hf(tmp_path / "hf", files.hf_table(config)[1], weights)
    one = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    mesh = sharding.make_mesh(MeshConfig(**{"data": 1} | axes))
    model, alone = puna.load(path, mesh=one, quantize=kind)
    _, spread = puna.load(path, mesh=mesh, quantize=kind)
    for (path, x), y in zip(jax.tree.leaves_with_path(alone), jax.tree.leaves(spread), strict=True):
        assert x.dtype == y.dtype and np.array_equal(x, y), sharding.path_name(path)
    experts = spread["blocks"]["layer_1"]["moe"]["w_gate_EDF"]
    assert quantization.kind_of(experts) == kind
    values = experts.values
    assert values.sharding.shard_shape(values.shape) != values.shape
    tokens_BT = np.random.default_rng(1).integers(0, config.vocab_size, (8, 8))
    apply = jax.jit(lambda params: model.apply({"params": params}, tokens_BT).logits_BTV)
    wanted = np.asarray(apply(alone))
    with jax.set_mesh(mesh):
        found = np.asarray(apply(spread))
    np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


@KINDS
def test_a_run_holds_the_model_it_came_from(files, tiny, tmp_path, kind):
    """Quantised when loaded, when converted, or when a run is converted: the same bytes."""
    path = files.write_hf(tmp_path / "hf", *tiny[1:])
    convert(path, tmp_path / "run", to="puna")
    convert(path, tmp_path / "small", to="puna", quantize=kind)
    convert(tmp_path / "run", tmp_path / "again", to="puna", quantize=kind)
    model, wanted = puna.load(path, None, quantize=kind)
    assert isinstance(wanted["embed"]["table_VD"], Int8)
    for folder, told in (("run", kind), ("small", kind), ("small", ""), ("again", "")):
        _, found = puna.load(tmp_path / folder, None, quantize=told)
        assert jax.tree.structure(found) == jax.tree.structure(wanted)
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            assert x.dtype == y.dtype and np.array_equal(x, y)
    # A release of it has the numbers that its weights stand for.
    convert(tmp_path / "small", tmp_path / "release")
    _, found = puna.load(tmp_path / "release")
    whole = leaf.plain(wanted, "float32")
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(x, y, rtol=2**-7)
    other = next(k for k in BOUND if k != kind)
    with pytest.raises(UserError, match=f"holds {kind} weights: leave quantize='{other}' out"):
        puna.load(tmp_path / "small", quantize=other)
    with pytest.raises(UserError, match="quantize='int3' must be int8, int4 or nf4, or empty"):
        puna.load(path, quantize="int3")
    with pytest.raises(
        UserError, match="quantize='int4' must be int8, int4 or nf4 with to=puna, else"
    ):
        convert(path, tmp_path / "x", to="hf", quantize="int4")


def test_a_mesh_must_not_split_a_group():
    mesh = sharding.make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    place = jax.NamedSharding(mesh, jax.P("fsdp"))
    with pytest.raises(UserError, match="int4 groups of 24: .* embed=24 into parts of 12"):
        quantize(jax.device_put(jnp.ones((24, 4)), place), ("embed", "mlp"), "int4")


@pytest.mark.parametrize("command", [["generate", "--prompt=x"], ["eval", "--config=tiny"]])
def test_the_commands_ask_for_it(monkeypatch, tmp_path, command):
    class Loaded(Exception):
        pass

    def load(path, dtype="float32", mesh=None, quantize="", adapter="", rewards=False):
        raise Loaded(f"{quantize} {adapter}")

    monkeypatch.setattr("puna.models.decode.load_engine.load", load)
    monkeypatch.setattr("puna.eval.evaluate.load", load)
    monkeypatch.setattr("puna.models.text.tokenizer.load_tokenizer", lambda path: byte_tokenizer())
    monkeypatch.setattr("puna.eval.evaluate.load_tokenizer", lambda path: byte_tokenizer())
    monkeypatch.setattr("puna.eval.evaluate.HeldOut", lambda *args: None)
    with pytest.raises(Loaded, match="int8 an/adapter"):
        cli._run([*command, f"--checkpoint={tmp_path}", "--quantize=int8", "--adapter=an/adapter"])
