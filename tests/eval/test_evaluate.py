"""`puna eval`: numbers, or one line that says why there are none."""

import jax
import jax.numpy as jnp
import pytest

from puna import __main__ as cli
from puna.configs import get_config, schema
from puna.configs.errors import UserError
from puna.eval import evaluate
from puna.models.text.tokenizer import byte_tokenizer
from puna.models.transformer import Transformer, init_params


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Run the command on a model of 264 ids, or fewer, whose parameters were changed."""
    (tmp_path / "a.txt").write_text("llama walks over the puna. " * 9)
    (tmp_path / "x.py").write_text(
        "from puna.configs import base\n\n"
        "def get_config():\n"
        "    config = base.get_config()\n"
        f"    config.data.update(validation='{tmp_path}/a.txt', seq_len=16)\n"
        "    return config\n"
    )
    monkeypatch.setattr(evaluate, "load_tokenizer", lambda path: byte_tokenizer())

    def run(vocab_size, change):
        def load(path, mesh, quantize, adapter, rewards):
            c = schema.ModelConfig(
                vocab_size=vocab_size, embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=2,
                head_dim=8, mlp_dim=16,
            )  # fmt: skip
            params = init_params(c, jax.random.key(0), mesh)
            return Transformer(c), jax.tree.map(change, params)

        monkeypatch.setattr(evaluate, "load", load)
        cli._run(["eval", f"--config={tmp_path}/x.py", "--checkpoint=model",
                  f"--workdir={tmp_path}/out"])  # fmt: skip

    yield run
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_no_number(command):
    with pytest.raises(UserError, match="model: loss is nan on .*a.txt: the parameters are dam"):
        command(264, lambda x: x * jnp.nan)


def test_a_tokenizer_of_another_model(command):
    with pytest.raises(UserError, match="gives id 257 and the model has ids 0..199"):
        command(200, lambda x: x)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("none.txt", "no such file"), ("empty.txt", "holds no document"), ("a.zip", "a zip archive")],
)
def test_data_is_opened_before_weights_are_loaded(tmp_path, monkeypatch, name, reason):
    byte_tokenizer().save(tmp_path)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04")
    monkeypatch.setattr(evaluate, "load", None)
    config = get_config("tiny")
    config.data.validation = str(tmp_path / name)
    with pytest.raises(UserError, match=reason):
        evaluate.evaluate(config, tmp_path)
