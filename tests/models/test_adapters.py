"""Adapters: W + scale * A B wherever a weight is used, against the sum written out in NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puna.configs.errors import ConfigError
from puna.configs.schema import AdapterConfig, MeshConfig, ModelConfig
from puna.models import adapters, leaf
from puna.models.decode import engine
from puna.models.parallel import sharding
from puna.models.quantize import is_quantized, quantize_tree
from puna.models.transformer import Transformer, abstract_params, unembed_table
from puna.train.objectives.next_token import cross_entropy, log_probs

DENSE = ModelConfig(
    vocab_size=96, embed_dim=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8,
    mlp_dim=48, max_positions=128, rope_theta=100.0, compute_dtype="float32",
)  # fmt: skip
MODELS = {
    "dense": DENSE,
    "tied": dataclasses.replace(DENSE, tie_embeddings=True),
    "scout": dataclasses.replace(
        DENSE, num_layers=5, nope_interval=2, chunk_size=6, qk_norm=True, moe_interval=2,
        num_experts=4, expert_dim=24,
    ),
}  # fmt: skip
MODELS |= {f"{name} dora": MODELS[name] for name in ("dense", "scout")}
EVERY = dict.fromkeys(MODELS, "^(blocks|tail)/.*/w,embed,unembed")
EVERY["tied"] = "^blocks/.*/w,embed"
TOKENS_BT = np.random.default_rng(1).integers(0, 96, (8, 8))


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def lora(name):
    return AdapterConfig(rank=4, alpha=6.0, targets=EVERY[name], dora="dora" in name)


def numpy_sum(path, base, adapter):
    """The formula of each kind of weight, by its name."""
    spec = {
        "wq_DNH": "Dr,rNH->DNH", "wk_DKH": "Dr,rKH->DKH", "wv_DKH": "Dr,rKH->DKH",
        "wo_NHD": "NHr,rD->NHD", "w_gate_DF": "Dr,rF->DF", "w_up_DF": "Dr,rF->DF",
        "w_down_FD": "Fr,rD->FD", "w_gate_EDF": "EDr,ErF->EDF", "w_up_EDF": "EDr,ErF->EDF",
        "w_down_EFD": "EFr,ErD->EFD", "table_VD": "Vr,rD->VD", "table_DV": "Dr,rV->DV",
    }[path.split("/")[-1]]  # fmt: skip
    if path.startswith("blocks"):
        a, rest = spec.split(",")
        b, w = rest.split("->")
        spec = f"L{a},L{b}->L{w}"
    a, b = (np.asarray(x, np.float64) for x in (adapter.a, adapter.b))
    made = np.asarray(base, np.float64) + adapter.scale * np.einsum(spec, a, b)
    if adapter.m is not None:
        summed = tuple(spec.split("->")[1].index(letter) for letter in spec.split(",")[0]
                       if letter not in "LEr")  # fmt: skip
        m = np.asarray(adapter.m, np.float64)
        made *= m / np.sqrt(np.sum(made**2, axis=summed, keepdims=True))
    return np.float32(made)


@functools.cache
def made(name):
    """A base, the model with adapters, and the one whose weights are the sums."""
    config, rng = MODELS[name], np.random.default_rng(0)
    boxed = abstract_params(config)

    def draw(path, x):
        value = rng.normal(size=x.shape)
        if "norm" in str(path[-2]):
            return jax.device_put(np.float32(1 + 0.1 * value))
        return jax.device_put(np.float32(config.embed_dim**-0.5 * value))

    base = jax.tree.map_with_path(draw, sharding.unbox(boxed))
    box = adapters.box(boxed, lora(name))
    trains = jax.tree.map(
        lambda p: jax.device_put(np.float32(0.2 * rng.normal(size=p.value.shape))),
        box, is_leaf=lambda x: isinstance(x, sharding.Param),
    )  # fmt: skip
    params = adapters.attach(trains, base)
    plain = jax.tree.map_with_path(
        lambda path, x: numpy_sum(sharding.path_name(path), x.base, x)
        if adapters.is_adapted(x) else x,
        params, is_leaf=adapters.is_adapted,
    )  # fmt: skip
    return base, params, plain


@functools.cache
def forward(name):
    model = Transformer(MODELS[name])
    return jax.jit(lambda params, tokens_BT: model.apply({"params": params}, tokens_BT).logits_BTV)


@functools.cache
def of_targets(name):
    """Log-probabilities of ids that follow TOKENS_BT, as training computes them."""
    model = Transformer(MODELS[name])

    @jax.jit
    def found(params, targets_BT):
        hidden_BTD = model.apply({"params": params}, TOKENS_BT, method="states").hidden_BTD
        table = unembed_table(model.config, params)
        return log_probs(hidden_BTD, table, targets_BT, "float32", 16)

    return found


def close(found, wanted, tolerance=1e-5):
    wanted = np.asarray(wanted)
    np.testing.assert_allclose(found, wanted, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_sums(name):
    base, params, plain = made(name)
    count = sum(
        adapters.is_adapted(x) for x in jax.tree.leaves(params, is_leaf=adapters.is_adapted)
    )
    assert count == {"dense": 7 + 2, "tied": 7 + 1, "scout": 7 + 10 + 7 + 2}[name.split()[0]]
    wanted = forward(name)(plain, TOKENS_BT)
    close(forward(name)(params, TOKENS_BT), wanted)
    off = forward(name)(adapters.detach(params), TOKENS_BT)
    assert np.array_equal(off, forward(name)(base, TOKENS_BT))
    assert np.abs(off - wanted).max() > 0.1 * np.abs(wanted).max()


@pytest.mark.parametrize("name", MODELS)
def test_merged_is_the_sum_and_computes_the_same(name):
    _, params, plain = made(name)
    merged = leaf.merge(params)
    for (path, x), y in zip(jax.tree.leaves_with_path(merged), jax.tree.leaves(plain), strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, y, atol=2e-6, err_msg=sharding.path_name(path))
    close(forward(name)(merged, TOKENS_BT), forward(name)(params, TOKENS_BT))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("dense", "int8"), slow("scout", "int8"), slow("scout", "int4"), ("dense dora", "int4")],
)
def test_over_a_quantised_base_it_is_the_numbers_it_stands_for(name, kind):
    base, params, _ = made(name)
    held = quantize_tree(base, abstract_params(MODELS[name]), kind)
    over = jax.tree.map(
        lambda x, y: x.replace(base=y) if adapters.is_adapted(x) else y,
        params, held, is_leaf=adapters.is_adapted,
    )  # fmt: skip
    same = jax.jit(lambda held: jax.tree.map(leaf.dense, held, is_leaf=is_quantized))(held)
    wanted = jax.tree.map_with_path(
        lambda path, x, y: numpy_sum(sharding.path_name(path), y, x)
        if adapters.is_adapted(x) else y,
        params, same, is_leaf=adapters.is_adapted,
    )  # fmt: skip
    close(forward(name)(over, TOKENS_BT), forward(name)(wanted, TOKENS_BT))
    close(forward(name)(leaf.merge(over), TOKENS_BT), forward(name)(wanted, TOKENS_BT))


# The dense layers of scout have plain adapters, too.
@pytest.mark.parametrize(
    "name", ["tied", slow("scout"), "dense dora", slow("dense"), slow("scout dora")]
)
def test_gradients_of_the_loss_are_the_chain_rule_of_the_sums(name):
    base, params, plain = made(name)
    config = MODELS[name]
    model = Transformer(config)
    targets_BT = np.roll(TOKENS_BT, -1, 1)
    ones_BT = np.ones(targets_BT.shape, np.float32)

    def loss(params):
        states = model.apply({"params": params}, TOKENS_BT, method="states")
        table = unembed_table(config, params)
        return cross_entropy(states.hidden_BTD, table, targets_BT, ones_BT, "float32", 1e-3, 16)[0]

    def of_adapters(trains):
        return loss(adapters.attach(trains, base))

    trains = jax.tree.map(
        lambda x: x.replace(base=None) if adapters.is_adapted(x) else None,
        params, is_leaf=adapters.is_adapted,
    )  # fmt: skip
    trains = prune(trains)
    value, found = jax.jit(jax.value_and_grad(of_adapters))(trains)
    wanted_value, whole = jax.jit(jax.value_and_grad(loss))(plain)
    np.testing.assert_allclose(value, wanted_value, rtol=1e-5)

    def chain(leaf_, d):
        """The gradient of an adapter from that of the sum."""
        return jax.vjp(
            lambda own: leaf.dense(own.replace(base=leaf_.base)), leaf_.replace(base=None)
        )[1](d)[0]

    def by_path(tree):
        leaves = jax.tree.leaves_with_path(tree, is_leaf=adapters.is_adapted)
        return {sharding.path_name(path): x for path, x in leaves}

    @jax.jit
    def chains(of, rest):
        return {path: chain(x, rest[path]) for path, x in of.items() if adapters.is_adapted(x)}

    wanted = chains(by_path(params), by_path(whole))
    for path, d in by_path(found).items():
        for got, want in zip(jax.tree.leaves(d), jax.tree.leaves(wanted[path]), strict=True):
            np.testing.assert_allclose(got, want, atol=1e-4 * max(1e-3, np.abs(want).max()),
                                       err_msg=path)  # fmt: skip


def test_dora_s_gradient_takes_the_length_for_a_constant():
    """Section 4.3 of the paper, by hand: V has no gradient through its norm."""
    rng = np.random.default_rng(0)
    w, a, b, m, g = (rng.normal(size=n) for n in ((5, 3), (5, 2), (2, 3), (1, 3), (5, 3)))
    new = adapters.Adapted(w, a, b, 0.5, m)
    found = jax.grad(lambda new: jnp.sum(leaf.dense(new) * g))(new)
    v = w + 0.5 * a @ b
    norm = np.linalg.norm(v, axis=0, keepdims=True)
    dv = g * m / norm
    np.testing.assert_allclose(found.m, np.sum(g * v / norm, 0, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(found.a, 0.5 * dv @ b.T, rtol=1e-5)
    np.testing.assert_allclose(found.b, 0.5 * a.T @ dv, rtol=1e-5)


def prune(tree):
    """A nested dict without its Nones."""
    if not isinstance(tree, dict):
        return tree
    found = {name: prune(x) for name, x in tree.items()}
    return {name: x for name, x in found.items() if x is not None and x != {}}


@pytest.mark.parametrize("name", [slow("scout"), "dense dora"])
def test_decoding_gives_the_forward_pass_s_log_probabilities(name):
    _, params, _ = made(name)
    prompts = [[5, 65], [7, *range(30, 43)]]
    made_ = next(engine.decode(Transformer(MODELS[name]), params, prompts, 8, block=8))
    for r, prompt in enumerate(prompts):
        row = np.array([[*prompt, *made_.ids_BT[r]]])
        logp_TV = np.asarray(jax.nn.log_softmax(forward(name)(params, row)))[0]
        at = len(prompt) - 1 + np.arange(8)
        wanted = logp_TV[at, made_.ids_BT[r]]
        np.testing.assert_allclose(made_.logprobs_BT[r], wanted, atol=2e-5)

    targets_BT = np.roll(TOKENS_BT, -1, 1)
    logp_BTV = np.asarray(jax.nn.log_softmax(forward(name)(params, TOKENS_BT)))
    wanted = np.take_along_axis(logp_BTV, targets_BT[..., None], -1)[..., 0]
    np.testing.assert_allclose(of_targets(name)(params, targets_BT), wanted, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        slow("scout", {"data": 2, "fsdp": 2, "tensor": 2}),
        ("scout dora", {"expert": 2, "fsdp": 2, "tensor": 2}),
    ],
)
def test_a_mesh_gives_the_numbers_of_one_device(name, axes):
    """Logits, and adapters that lie as what they adapt does."""
    config = MODELS[name]
    _, params, plain = made(name)
    mesh = sharding.make_mesh(MeshConfig(**{"data": 1} | axes))
    boxed = abstract_params(config)
    trains = adapters.box(boxed, lora(name))
    places = adapters.attach(sharding.shardings(trains, mesh), sharding.shardings(boxed, mesh))
    spread = jax.device_put(jax.tree.map(np.asarray, params), places)
    gate = spread["blocks"]["layer_1"]["moe"]["w_gate_EDF"]
    if "expert" in axes:
        assert gate.a.sharding.shard_shape(gate.a.shape)[1] == config.num_experts // 2
        assert gate.b.sharding.shard_shape(gate.b.shape)[1] == config.num_experts // 2
    assert gate.b.sharding.shard_shape(gate.b.shape)[-1] == config.expert_dim // 2
    with jax.set_mesh(mesh):
        found = np.asarray(forward(name)(spread, TOKENS_BT))
    close(found, forward(name)(plain, TOKENS_BT))


@functools.cache
def beside(name):
    """Two adapters side by side, of other ranks, the second on every other weight; what is alone.

    Returns:
      parameters, and those of the base, of the first and of the second alone.
    """
    base, first, _ = made(name)
    rng, number = np.random.default_rng(3), 0

    def second(leaf_):
        nonlocal number
        number += 1
        if not adapters.is_adapted(leaf_) or number % 2:
            return None
        a, b = (np.float32(0.3 * rng.normal(size=x.shape)) for x in (leaf_.a, leaf_.b))
        stacked = a.ndim + b.ndim - 2 - leaf_.base.ndim
        return a[..., :2], np.take(b, np.arange(2), stacked), stacked

    leaves, tree = jax.tree.flatten(first, is_leaf=adapters.is_adapted)
    seconds = [second(x) for x in leaves]

    def both(path, x, new):
        if not adapters.is_adapted(x):
            return x
        a, b, owner = np.asarray(x.a), np.asarray(x.b) * np.float32(x.scale), [0] * x.a.shape[-1]
        if new:
            a, b = np.concatenate([a, new[0]], -1), np.concatenate([b, new[1]], new[2])
            owner += [1] * 2
        if sharding.path_name(path).startswith("blocks"):
            owner = np.tile(owner, (len(a), 1))
        a, b, owner_r = jax.device_put((a, b, np.int32(owner)))
        return adapters.Adapted(x.base, a, b, 1.0, owner_r=owner_r)

    def alone(x, new):
        if not adapters.is_adapted(x):
            return x
        return adapters.Adapted(x.base, *jax.device_put(new[:2]), 1.0) if new else x.base

    paths = [path for path, _ in jax.tree.leaves_with_path(first, is_leaf=adapters.is_adapted)]
    together = [both(*three) for three in zip(paths, leaves, seconds, strict=True)]
    only = [alone(*two) for two in zip(leaves, seconds, strict=True)]
    return jax.tree.unflatten(tree, together), (base, first, jax.tree.unflatten(tree, only))


CHOSEN_B = np.array([0, -1, 1, 1, 0, -1, 0, 1])


def of_each(name):
    """Logits of each row of TOKENS_BT as what it has chosen alone gives them."""
    base, first, second = (forward(name)(params, TOKENS_BT) for params in beside(name)[1])
    return np.choose(CHOSEN_B[:, None, None] + 1, (base, first, second))


@pytest.mark.parametrize("name", ["dense", "tied", "scout"])
def test_each_row_gives_what_its_adapter_alone_gives(name):
    params, _ = beside(name)
    close(forward(name)(adapters.choose(params, CHOSEN_B), TOKENS_BT), of_each(name), 3e-6)
    # Without a choice, and for whoever has chosen none, it is the base to the last bit.
    base = np.asarray(forward(name)(beside(name)[1][0], TOKENS_BT))
    assert np.array_equal(forward(name)(params, TOKENS_BT), base)


def test_the_loss_of_rows_is_that_of_their_adapters():
    params, _ = beside("scout")
    chosen = adapters.choose(params, CHOSEN_B)
    found = of_targets("scout")(chosen, TOKENS_BT)
    logp_BTV = np.asarray(jax.nn.log_softmax(of_each("scout")))
    wanted = np.take_along_axis(logp_BTV, TOKENS_BT[..., None], -1)[..., 0]
    np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_a_neighbour_s_adapter_that_has_failed_changes_no_other_row():
    params, _ = beside("scout")
    broken = jax.tree.map(
        lambda x: x.replace(a=jnp.where(x.owner_r[..., None, :] == 1, jnp.nan, x.a))
        if adapters.is_adapted(x) and x.a.ndim == x.owner_r.ndim + 1 else x,
        params, is_leaf=adapters.is_adapted,
    )  # fmt: skip
    found = np.asarray(forward("scout")(adapters.choose(broken, CHOSEN_B), TOKENS_BT))
    assert np.isnan(found[CHOSEN_B == 1]).all()
    close(found[CHOSEN_B != 1], of_each("scout")[CHOSEN_B != 1], 3e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"expert": 4, "fsdp": 2}, {"expert": 2}]
)
def test_rows_on_a_mesh_have_their_adapters(axes):
    name, params = "scout", beside("scout")[0]
    mesh = sharding.make_mesh(
        MeshConfig(**{"data": 1} | axes), jax.devices()[: np.prod([*axes.values()])]
    )
    names = sharding.names(abstract_params(MODELS[name]))
    spread = jax.tree.map_with_path(
        lambda path, leaf_: jax.tree.map(
            lambda x, n: jax.device_put(
                x, jax.NamedSharding(mesh, sharding.resolve("", x.shape, n, mesh))
            ),
            leaf_, leaf.split_names(leaf_, names[sharding.path_name(path)]),
        ),
        params, is_leaf=adapters.is_adapted,
    )  # fmt: skip
    with jax.set_mesh(mesh):
        run = jax.jit(
            lambda params, chosen_B: forward(name)(adapters.choose(params, chosen_B), TOKENS_BT)
        )
        found = np.asarray(run(spread, CHOSEN_B))
    close(found, of_each(name))


def test_new_adapters_change_nothing_on_any_mesh():
    boxed = abstract_params(DENSE)
    box = adapters.box(boxed, lora("dense"))
    alone = adapters.init(
        box, jax.random.key(3), sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    )
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    spread = adapters.init(box, jax.random.key(3), mesh)
    for x, y in zip(jax.tree.leaves(alone), jax.tree.leaves(spread), strict=True):
        assert np.array_equal(x, y)
    base = made("dense")[0]
    params = adapters.attach(alone, base)
    close(forward("dense")(params, TOKENS_BT), forward("dense")(base, TOKENS_BT), 1e-6)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    long = adapters.init(adapters.box(boxed, lora("dense dora")), jax.random.key(3), mesh)
    params = adapters.attach(leaf.with_magnitudes(long, base), base)
    # Divided by a length and multiplied by it again: each layer rounds.
    close(forward("dense")(params, TOKENS_BT), forward("dense")(base, TOKENS_BT), 1e-5)
    wo = alone["blocks"]["layer_0"]["attention"]["wo_NHD"]
    bound = (4 * 8) ** -0.5
    assert 0.9 * bound < np.abs(wo.a).max() <= bound and not np.any(wo.b)
    assert not np.any(alone["embed"]["table_VD"].a) and np.std(alone["embed"]["table_VD"].b) > 0.5


@pytest.mark.parametrize(
    ("name", "targets", "count", "experts"),
    [
        ("dense", AdapterConfig.targets, 7, False),
        ("scout", AdapterConfig.targets, 7 + 10 + 7, False),
        ("scout", "attention/w,shared", 3 * 4 + 3, True),
        ("scout", "w_down_EFD", 1, False),
        ("scout", "moe/router", 1, True),
    ],
)
def test_patterns_pick_the_weights(name, targets, count, experts):
    made_ = adapters.box(abstract_params(MODELS[name]), AdapterConfig(rank=2, targets=targets))
    assert len(adapters.targeted(made_)) == count
    assert adapters.misses_experts(MODELS[name], made_) == experts


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": "attention,q_proj"}, "adapter.targets=.*no parameter's path has q_proj"),
        ({"targets": "norm"}, "no parameter's path has norm"),
        ({"targets": "("}, r"\( is no regular expression"),
        ({"rank": 33}, "adapter.rank=33 must be at most 16"),
    ],
)
def test_what_cannot_be_adapted_is_one_line(fields, message):
    with pytest.raises(ConfigError, match=message):
        adapters.box(abstract_params(DENSE), AdapterConfig(**{"rank": 2} | fields))


def test_rslora_divides_by_the_root_of_the_rank():
    assert adapters.strength(AdapterConfig(rank=16, alpha=8.0)) == 0.5
    assert adapters.strength(AdapterConfig(rank=16, alpha=8.0, rslora=True)) == 2.0
