"""The engine's programs compile for devices that are not here, from shapes that are the engine's.

The slow tests need a compiler of an extra, never its hardware: see tests/train/test_ahead.py.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from puna.configs.schema import MeshConfig, ModelConfig
from puna.models import quantize, transformer
from puna.models.decode import ahead
from puna.models.decode.slots import Engine
from puna.models.parallel import sharding
from puna.models.text.tokenizer import byte_tokenizer

ROOT = Path(__file__).resolve().parents[3]
CUDA = ROOT / ".cache" / "cuda"
# A layer with experts, one without, one that attends to its chunk.
CONFIG = ModelConfig(
    vocab_size=272, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    mlp_dim=64, max_positions=128, nope_interval=2, chunk_size=16, num_experts=4, moe_interval=2,
    expert_dim=64, compute_dtype="bfloat16", param_dtype="bfloat16",
)  # fmt: skip


def described(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype.name, x.sharding.shard_shape(x.shape)), tree)


def test_shapes_and_places_are_those_of_an_engine():
    mesh = sharding.make_mesh(MeshConfig(data=2, expert=2, tensor=2))
    # Rows that the mesh splits, chunks shorter than the slots.
    params, cache = ahead.abstract_inputs(CONFIG, mesh, 6, 48, "int8", "int8")
    boxed = transformer.abstract_params(CONFIG)
    zeros = jax.tree.map(
        lambda x, place: jax.device_put(np.zeros(x.shape, x.dtype), place),
        sharding.unbox(boxed), sharding.shardings(boxed, mesh),
    )  # fmt: skip
    real = quantize.quantize_tree(zeros, boxed)
    assert described(params) == described(real)
    with jax.set_mesh(mesh):
        model = transformer.Transformer(CONFIG)
        engine = Engine(model, real, byte_tokenizer(), 6, 48, cache_dtype="int8")
    assert described(cache) == described(engine._model._cache)


def wheel(name, there, how):
    there = there or importlib.util.find_spec(name) is not None
    return pytest.mark.skipif(not there, reason=f"needs {name}: {how}")


def compiled(tmp_path, *arguments):
    figures = tmp_path / "figures.json"
    # The XLA flags of the tests would change what the GPU compiler does, too.
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (env.get("PYTHONPATH"), str(CUDA))))
    done = subprocess.run(
        [sys.executable, "benchmarks/decode_ahead.py", *arguments, f"--json={figures}"],
        capture_output=True, text=True, check=False, cwd=ROOT, env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(figures.read_text())


@wheel("libtpu", False, "pip install 'puna[tpu]'")
@pytest.mark.slow
def test_experts_over_a_tpu_slice_of_several_hosts(tmp_path):
    # Where v5e has no ragged exchange.
    figures = compiled(
        tmp_path, "--config=llama4:scout-tiny", "--topology=v5e-16", "--config.mesh.data=8",
        "--config.mesh.expert=2", "--max_length=128", "--quantize=int8", "--cache_dtype=int8",
        "--config.model.num_layers=1", "--config.model.nope_interval=0",
        "--config.model.temperature_scale=0",
    )  # fmt: skip
    assert figures["fits"] and figures["devices"] == 16


@wheel("jax_cuda12_plugin", CUDA.is_dir(), "make .cache/cuda, or pip install 'puna[cuda]'")
@pytest.mark.slow
def test_a_token_on_a_gpu_does_not_copy_the_cache(tmp_path):
    figures = compiled(
        tmp_path, "--config=tiny", "--topology=h100-1", "--slots=32", "--max_length=16384",
        "--config.model.max_positions=16384",
    )  # fmt: skip
    assert figures["decode_temporaries_bytes"] < figures["cache_bytes"] / 8
