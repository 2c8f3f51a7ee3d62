"""A compile in another process: the same as here, once, and not longer than it may take."""

import pytest

import puna
from puna.configs import schema
from puna.configs.errors import UserError
from puna.train import ahead
from puna.train.metrics import active_params
from puna.train.plan import confirm as module
from puna.train.plan.confirm import confirm

SMALL = ("model.num_layers=1", "model.vocab_size=256", "data.tokenizer=bytes",
         "model.embed_dim=32", "model.mlp_dim=64", "train.batch_size=2",
         "optimizer.name=adamw", "data.seq_len=32")  # fmt: skip


def test_a_compile_is_done_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = schema.from_dict(puna.get_config("tiny", [*SMALL]))
    assert confirm(config, "cpu-1", 0.01) is None and not list(tmp_path.rglob("*.json"))
    told = confirm(config, "cpu-1", 500)
    assert len(list(tmp_path.rglob("*.json"))) == 1
    monkeypatch.setattr(module.subprocess, "run", lambda *a, **k: pytest.fail("compiled again"))
    assert confirm(config, "cpu-1") == told
    assert told["memory"]["peak"].origin == "compiled"
    # 6 a parameter that multiplies, and 12 N H for each of the 32 keys, none of which is left out.
    model = 6 * active_params(config.model) + 12 * 6 * 32 * 32
    assert told["time"]["matrix_flops"].value == pytest.approx(2 * 32 * model, rel=0.15)
    assert "step_time" not in told["time"]  # the rates of this CPU are not published


def test_another_config_or_source_is_another_compile(monkeypatch):
    order = {"config": {"a": 1}, "topology": "v5p-8"}
    key = module._key(order)
    assert key == module._key(dict(order)) != module._key(order | {"topology": "v5p-16"})
    monkeypatch.setattr(module, "_source", lambda: "another")
    assert key != module._key(order)


def test_no_compiler_installed_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(ahead.importlib.util, "find_spec", lambda name: None)
    config = schema.from_dict(puna.get_config("tiny", [*SMALL]))
    with pytest.raises(UserError, match=r"needs its compiler, libtpu: pip install 'puna\[tpu\]'"):
        confirm(config, "v5p-8")
    with pytest.raises(UserError, match=r"pip install 'puna\[cuda\]'"):
        confirm(config, "h100-8")


@pytest.mark.parametrize(("gigabytes", "processors", "most"), [(5, 64, 1), (40, 64, 6), (40, 4, 2)])
def test_compiles_at_a_time_fit_the_memory_and_the_processors(
    monkeypatch, gigabytes, processors, most
):
    text = f"MemTotal: 99999999 kB\nMemAvailable:    {gigabytes * 10**9 // 1024} kB\n"
    monkeypatch.setattr(module.pathlib.Path, "read_text", lambda *_, **__: text)
    monkeypatch.setattr(module.os, "cpu_count", lambda: processors)
    assert module.at_a_time() == most
