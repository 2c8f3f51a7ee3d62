"""Options reach the compiler of a training step; those that it does not know are left out."""

import types

import jax
import numpy as np
import pytest

import puna
from puna.configs import schema
from puna.configs.errors import ConfigError
from puna.models import hardware
from puna.train import ahead, compiler

CPU = types.SimpleNamespace(devices=np.array(jax.devices()[:1]))
KNOWN = "xla_backend_optimization_level"


def test_the_table_is_empty_on_cpus_and_holds_only_what_has_a_reason():
    assert compiler.options("auto", CPU) == compiler.options("", CPU) == {}
    for chip in hardware.CHIPS.values():
        assert all(option.name.startswith("xla_") and option.reason for option in chip.options)
        assert len({option.name for option in chip.options}) == len(chip.options)
        assert hardware.options(chip.device_kinds[0]) == chip.options


def test_an_option_that_the_compiler_does_not_know_is_left_out_with_one_note(monkeypatch, capsys):
    table = (hardware.Option(KNOWN, 1, "known"), hardware.Option("xla_no_such", True, "unknown"))
    monkeypatch.setattr(hardware, "options", lambda kind: table)
    compiler._of_table.cache_clear()
    for _ in range(2):
        assert compiler.options("auto", CPU) == {KNOWN: 1}
    lines = capsys.readouterr().err.splitlines()
    compiler._of_table.cache_clear()
    assert len(lines) == 1 and "xla_no_such" in lines[0]


def test_a_run_on_several_devices_asks_as_well():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    compiler._trouble.cache_clear()
    with jax.set_mesh(mesh):
        assert compiler.options(f"auto,{KNOWN}=1", mesh) == {KNOWN: 1}


def test_an_option_that_is_refused_beside_another_is_left_out(monkeypatch, capsys):
    """Newer TPU compilers refuse two of the table together, on some generations."""
    first, second, third = (hardware.Option(f"xla_{n}", True, "one") for n in "abc")
    monkeypatch.setattr(hardware, "options", lambda kind: (first, second, third))
    refused = {first.name, second.name}
    monkeypatch.setattr(
        compiler, "_trouble",
        lambda device, chosen: "Precondition" if refused <= dict(chosen).keys() else "",
    )  # fmt: skip
    compiler._of_table.cache_clear()
    assert compiler.options("auto", CPU) == {first.name: True, third.name: True}
    compiler._of_table.cache_clear()
    assert f"does not take {second.name}: Precondition" in capsys.readouterr().err


def test_what_a_user_names_stands_over_the_table(monkeypatch):
    monkeypatch.setattr(compiler, "_of_table", lambda device: {KNOWN: 1})
    assert compiler.options("auto", CPU) == {KNOWN: 1}
    assert compiler.options(f"auto, {KNOWN}=0", CPU) == {KNOWN: 0}
    assert compiler.options("xla_embed_ir_in_executable=true", CPU) == {
        "xla_embed_ir_in_executable": True
    }


@pytest.mark.parametrize("text", ["auto,xla_no_such=1", f"{KNOWN}=high"])
def test_what_the_compiler_does_not_take_is_one_line(text):
    with pytest.raises(ConfigError, match=f"train.compiler_options={text}: .*xla_") as e:
        compiler.options(text, CPU)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("text", ["xla_no_such", "auto;xla=1", "=1", "xla a=1"])
def test_a_list_that_is_none_is_one_line(text):
    config = puna.get_config("tiny")
    config.train.compiler_options = text
    with pytest.raises(ConfigError, match="train.compiler_options=.* must be auto, NAME=VALUE"):
        schema.from_dict(config)


def test_the_step_is_compiled_with_them(monkeypatch):
    c = schema.from_dict(puna.get_config("tiny"))
    monkeypatch.setattr(compiler, "options", lambda text, mesh: {"xla_no_such": text})
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option: 'xla_no_such'"):
        ahead.compile_step(c, jax.devices()[:1])
