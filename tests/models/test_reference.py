"""puna's numbers against two references: Hugging Face's models and plain NumPy in float64.

`tests/reference/` holds both; `make_fixtures.py` says how the stored numbers came to be. "Error"
here is the largest absolute error over the largest absolute value of the reference, per tensor.
"""

import dataclasses
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from puna.configs import schema
from puna.configs.errors import UserError
from puna.models.parallel import sharding
from puna.models.transformer import Transformer, abstract_params
from puna.models.weights import config as hf_config
from puna.models.weights import huggingface

REFERENCE = pathlib.Path(__file__).parent.parent / "reference"
NAMES = sorted(path.stem for path in (REFERENCE / "fixtures").glob("*.npz"))
LOGITS, GRADIENT = 1e-5, 1e-4  # float32 against float32 or float64


def _oracle():
    spec = importlib.util.spec_from_file_location("llama_numpy", REFERENCE / "llama_numpy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


oracle = _oracle()


class Fixture:
    """One stored model of Hugging Face and what it computed."""

    def __init__(self, name):
        with np.load(REFERENCE / "fixtures" / f"{name}.npz", allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in stored.files}
        self.json = json.loads(str(arrays["config"]))
        self.weights = {k[7:]: v for k, v in arrays.items() if k.startswith("weight/")}
        self.gradients = {k[9:]: v for k, v in arrays.items() if k.startswith("gradient/")}
        self.tokens, self.logits, self.loss = (arrays[k] for k in ("tokens", "logits", "loss"))
        self.prompt, self.continuation = arrays["prompt"], arrays["continuation"]
        self.config = model_config(hf_config.from_hf(self.json))


@pytest.fixture(scope="module", params=NAMES)
def stored(request):
    return Fixture(request.param)


def model_config(fields):
    return schema.from_dict(fields | {"compute_dtype": "float32"}, schema.ModelConfig)


def error(found, reference):
    reference = np.asarray(reference, np.float64)
    return np.max(np.abs(np.asarray(found, np.float64) - reference)) / np.max(np.abs(reference))


def assert_gradients(found, reference, tolerance=GRADIENT):
    assert found.keys() == reference.keys()
    errors = {name: error(found[name], reference[name]) for name in reference}
    worst = max(errors, key=errors.get)
    assert errors[worst] < tolerance, f"{worst}: {errors[worst]:.1e}"


def jit(function):
    # Each of these programs runs once, so time spent on making it fast is lost.
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def run(config, params, tokens, positions, segments, rows=None):
    """Logits of puna, mean cross-entropy of the next token in the first `rows`, its gradients."""
    mask = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
    mask[len(mask) if rows is None else rows :] = False

    def loss(params):
        out = Transformer(config).apply({"params": params}, tokens, positions, segments)
        logp = jax.nn.log_softmax(out.logits_BTV[:, :-1])
        picked = jnp.take_along_axis(logp, tokens[:, 1:, None], axis=2)[..., 0]
        # Not a product: logits of padding may be anything.
        return -jnp.sum(jnp.where(mask, picked, 0.0)) / mask.sum(), out.logits_BTV

    (value, logits), gradient = jit(jax.value_and_grad(loss, has_aux=True))(params)
    return logits, value, gradient


# --- the NumPy oracle ---------------------------------------------------------------------------


def test_numpy_equals_hugging_face(stored):
    weights = {name: w.astype(np.float64) for name, w in stored.weights.items()}
    logits = np.stack(oracle.forward(stored.json, weights, stored.tokens))
    assert error(logits, stored.logits) < LOGITS
    loss, gradients = oracle.gradients(stored.json, weights, stored.tokens)
    assert error(loss, stored.loss) < LOGITS
    assert_gradients(gradients, stored.gradients)


def test_numpy_packed_documents_are_alone():
    f = Fixture("scout")
    weights = {name: w.astype(np.float64) for name, w in f.weights.items()}
    first, second = f.tokens[:1, :9], f.tokens[1:, :11]
    tokens = np.concatenate([first, second, [[7, 7]]], axis=1)
    segments = np.repeat([[1, 2, 0]], [9, 11, 2], axis=1)
    positions = np.concatenate([np.arange(9), np.arange(11), [0, 1]])[None]
    packed = oracle.forward(f.json, weights, tokens, positions, segments)[0]
    assert error(packed[:9], oracle.forward(f.json, weights, first)[0]) < 1e-12
    assert error(packed[9:20], oracle.forward(f.json, weights, second)[0]) < 1e-12
    assert np.all(np.isfinite(packed))


# --- the weight table ---------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "language_model."])
def test_table_round_trip_is_exact(stored, prefix):
    weights = {prefix + name: w for name, w in stored.weights.items()}
    assert huggingface.hf_shapes(stored.config, prefix) == {n: w.shape for n, w in weights.items()}
    params = huggingface.to_puna(stored.config, weights, prefix)
    wanted = sharding.unbox(abstract_params(stored.config))
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, wanted)
    back = huggingface.from_puna(stored.config, params, prefix)
    assert back.keys() == weights.keys()
    for name, weight in weights.items():
        assert back[name].dtype == weight.dtype
        assert back[name].tobytes() == weight.tobytes(), name


def test_table_keeps_every_bit_of_bfloat16():
    f = Fixture("maverick")
    rng = np.random.default_rng(0)
    weights = {
        name: rng.integers(2**16, size=shape, dtype=np.uint16).view(ml_dtypes.bfloat16)
        for name, shape in huggingface.hf_shapes(f.config).items()
    }  # NaNs and denormals too
    back = huggingface.from_puna(f.config, huggingface.to_puna(f.config, weights.__getitem__))
    assert all(back[name].tobytes() == weights[name].tobytes() for name in weights)


class Recorder:
    """A tensor that counts the numbers read from it."""

    def __init__(self, array):
        self.array, self.read = array, 0

    def __getitem__(self, slices):
        found = self.array[slices]
        self.read += found.size
        return found


def test_table_reads_only_the_slice_it_needs(stored):
    rng = np.random.default_rng(0)
    for leaf in huggingface.leaves(stored.config).values():
        for source in leaf.sources:
            tensor = Recorder(stored.weights[source.name])
            whole = source.load(tensor)
            assert tensor.read == whole.size  # a fused tensor is read once over its two leaves
            for _ in range(3):
                index = []
                for size in source.shape:
                    start = int(rng.integers(size))
                    index.append(slice(start, int(rng.integers(start, size)) + 1))
                index = tuple(index)
                np.testing.assert_array_equal(source.load(tensor, index), whole[index])
            for axis, dim in enumerate(source.row.dims.split()):
                if dim in ("H", "RP"):  # never split between devices; read whole, then cut
                    continue
                index = [slice(None)] * whole.ndim
                index[axis] = slice(source.shape[axis] // 2, None)
                tensor.read = 0
                assert source.load(tensor, tuple(index)).size == tensor.read


def test_table_names_what_is_wrong():
    f = Fixture("scout")
    name = "model.layers.2.feed_forward.experts.gate_up_proj"
    without = {k: v for k, v in f.weights.items() if k != name}
    with pytest.raises(UserError, match=f"{name} is missing"):
        huggingface.to_puna(f.config, without)
    with pytest.raises(UserError, match=f"{name} has shape .*, the architecture says"):
        huggingface.to_puna(f.config, f.weights | {name: f.weights[name][:, :, 1:]})
    params = huggingface.to_puna(f.config, f.weights)
    with pytest.raises(UserError, match="parameter vision/x is not one of"):
        huggingface.from_puna(f.config, params | {"vision": {"x": np.zeros(2)}})
    with pytest.raises(UserError, match="parameter norm/scale_D is missing"):
        huggingface.from_puna(f.config, {k: v for k, v in params.items() if k != "norm"})


# --- puna's Transformer -------------------------------------------------------------------------


def test_puna_equals_hugging_face(stored):
    # One program for both: below the rows with gradients those that Hugging Face continued.
    continued = np.concatenate([stored.prompt, stored.continuation], axis=1)
    rows, length = stored.tokens.shape
    padding = ((0, 0), (0, length - continued.shape[1]))
    tokens = np.concatenate([stored.tokens, np.pad(continued, padding)])
    segments = np.concatenate(
        [np.ones_like(stored.tokens), np.pad(np.ones_like(continued), padding)]
    )
    params = huggingface.to_puna(stored.config, stored.weights)
    logits, loss, gradient = run(stored.config, params, tokens, None, segments, rows)
    assert error(logits[:rows], stored.logits) < LOGITS
    assert error(loss, stored.loss) < LOGITS
    assert_gradients(huggingface.from_puna(stored.config, gradient), stored.gradients)
    start, stop = stored.prompt.shape[1] - 1, continued.shape[1] - 1
    np.testing.assert_array_equal(logits[rows:, start:stop].argmax(-1), stored.continuation)


LLAMA3_ROPE = {"rope_scaling_factor": 4.0, "rope_original_positions": 16, "rope_theta": 50.0}
LLAMA4 = {
    "moe_interval": 1, "num_experts": 3, "expert_dim": 6, "nope_interval": 2, "chunk_size": 5,
    "temperature_scale": 0.3, "temperature_floor": 4,
}  # fmt: skip
TINY = {
    "vocab_size": 31, "embed_dim": 12, "num_layers": 2, "num_heads": 3, "num_kv_heads": 3,
    "head_dim": 4, "mlp_dim": 14, "max_positions": 512, "rope_theta": 100.0,
}  # fmt: skip

# What the architecture is, the lengths of the documents packed into each row, padding last.
SHAPES = {
    "one token": ({}, [[1]]),
    "odd heads, packed": ({"embed_dim": 15, "num_heads": 5, "num_kv_heads": 5}, [[7, 1, 4], [12]]),
    "groups of 2, scaled rope": (
        {"num_heads": 6, "head_dim": 6} | LLAMA3_ROPE,
        [[29], [11, 17]],
    ),
    "groups of 3, tied": (
        {"embed_dim": 9, "num_heads": 9, "tie_embeddings": True, "norm_eps": 1e-2},
        [[3, 9, 6]],
    ),
    "one kv head": ({"num_heads": 3, "num_kv_heads": 1, "embed_dim": 15}, [[8], [5, 2]]),
    "blocks of keys": ({"num_layers": 1, "num_kv_heads": 1}, [[170, 131, 20]]),
    "llama 4 without experts": (
        LLAMA4 | {"moe_interval": 0, "num_experts": 0, "num_layers": 3}, [[16], [3, 9]]
    ),
    "chunks only": ({"chunk_size": 4, "qk_norm": True, "norm_eps": 1e-2}, [[11], [5, 5]]),
    "chunk of 3, two periods": (
        LLAMA4 | {"chunk_size": 3, "num_heads": 6, "qk_norm": True, "moe_interval": 3,
                  "num_layers": 7},
        [[17], [4, 11]],
    ),
    "top 2": (
        LLAMA4 | {"experts_per_token": 2, "qk_norm": True, "nope_interval": 3, "num_layers": 4,
                  "norm_eps": 1e-2} | LLAMA3_ROPE,
        [[10], [3, 4]],
    ),
    "softmax": (LLAMA4 | {"router": "softmax", "experts_per_token": 2, "num_experts": 5}, [[14]]),
    "nope only, all experts, none shared": (
        LLAMA4 | {"chunk_size": 0, "nope_interval": 1, "experts_per_token": 3, "num_layers": 1,
                  "shared_expert": False},
        [[9, 9], [4]],
    ),
    "chunks over blocks": (
        LLAMA4 | {"chunk_size": 100, "temperature_floor": 50, "moe_interval": 2}, [[230, 60]]
    ),
}  # fmt: skip


def packed(rng, vocab_size, rows):
    """Tokens, positions and segments of documents of the given lengths, filled with padding."""
    length = max(map(sum, rows))
    shape = (len(rows), length)
    tokens = rng.integers(vocab_size, size=shape)
    positions, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for r, lengths in enumerate(rows):
        start = 0
        for document, n in enumerate(lengths, 1):
            positions[r, start : start + n] = np.arange(n)
            segments[r, start : start + n] = document
            start += n
    return tokens.astype(np.int32), positions, segments


def oracle_json(config):
    """The config.json that the oracle reads, of models that Hugging Face does not have too."""
    known = dataclasses.replace(config, router="sigmoid", shared_expert=True)
    return hf_config.to_hf(known) | {"router": config.router}


@pytest.mark.parametrize("case", SHAPES)
def test_puna_equals_numpy(case):
    fields, rows = SHAPES[case]
    config = model_config(TINY | fields)
    rng = np.random.default_rng(list(SHAPES).index(case))
    weights = {}
    for name, shape in huggingface.hf_shapes(config).items():
        draw = rng.standard_normal(shape)
        fan_in = shape[1] if len(shape) > 1 else 1
        scale = 1.0 + 0.2 * draw if "norm" in name else 1.5 * fan_in**-0.5 * draw
        weights[name] = scale.astype(np.float32)
    tokens, positions, segments = packed(rng, config.vocab_size, rows)
    exact = {name: w.astype(np.float64) for name, w in weights.items()}
    reference = oracle.forward(oracle_json(config), exact, tokens, positions, segments)

    params = huggingface.to_puna(config, weights)
    logits, loss, gradient = run(config, params, tokens, positions, segments)
    inside = segments != 0
    assert error(logits[inside], np.stack(reference)[inside]) < LOGITS
    if tokens.shape[1] > 1:
        loss_64, gradients = oracle.gradients(
            oracle_json(config), exact, tokens, positions, segments
        )
        assert error(loss, loss_64) < LOGITS
        assert_gradients(huggingface.from_puna(config, gradient), gradients)
