"""The loss of a split does not depend on the batch size or the mesh."""

import math

import jax
import numpy as np
import pytest

from puna.configs import schema
from puna.models.parallel import sharding
from puna.models.text.tokenizer import byte_tokenizer
from puna.models.transformer import Transformer, init_params
from puna.train.validation import evaluate_loss

MODEL = {
    "vocab_size": 264, "embed_dim": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
    "head_dim": 8, "mlp_dim": 24, "compute_dtype": "float32",
}  # fmt: skip


@pytest.fixture
def text(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text(f"{i} llamas, " * (4 + 9 * i) + "été\n")
    return tmp_path


def measure(text, mesh, **evaluation):
    values = {"model": MODEL, "data": {"validation": f"{text}/*.txt", "seq_len": 16},
              "mesh": mesh, "eval": evaluation}  # fmt: skip
    c = schema.from_dict(values)
    mesh = sharding.make_mesh(c.mesh)
    params = init_params(c.model, jax.random.key(0), mesh)
    return evaluate_loss(c, Transformer(c.model), params, byte_tokenizer(), mesh)


def test_the_same_for_any_batch_size_and_mesh(text):
    first = measure(text, {"data": 8}, batch_size=8)
    for mesh, size in (({"data": 8}, 40), ({"data": 2, "fsdp": 2, "tensor": 2}, 4)):
        other = measure(text, mesh, batch_size=size)
        assert other["tokens"] == first["tokens"]
        assert other["loss"] == pytest.approx(first["loss"], rel=2e-6)


def test_the_numbers_are_of_the_text(text):
    result = measure(text, {"data": 8}, batch_size=8)
    files = sorted(text.glob("*.txt"))
    assert result["bytes"] == sum(len(f.read_bytes()) for f in files)
    assert result["tokens"] == result["bytes"] + len(files)  # an end mark each
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    bits = result["loss"] * result["tokens"] / math.log(2) / result["bytes"]
    assert result["bits_per_byte"] == pytest.approx(bits)


def test_max_rows_takes_the_first(text):
    result = measure(text, {"data": 8}, batch_size=8, max_rows=3)
    assert 0 < result["tokens"] <= 3 * 16
    assert np.isfinite(result["loss"])
