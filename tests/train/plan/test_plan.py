"""`puna plan`: what is counted is exact, what is compiled is what a CPU really takes."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import puna
from puna import __main__ as cli
from puna.configs import schema
from puna.configs.errors import UserError
from puna.models.parallel import sharding
from puna.models.transformer import abstract_params
from puna.train import objectives
from puna.train.optimizer import make_optimizer
from puna.train.plan import step
from puna.train.state import init_state

SMALL = [
    *("model.num_layers=1", "model.vocab_size=512", "model.embed_dim=64", "model.num_heads=4"),
    *("data.tokenizer=bytes", "model.num_kv_heads=2", "model.head_dim=16", "model.mlp_dim=128"),
]


def tiny(*overrides):
    return puna.get_config("tiny", [*SMALL, *overrides])


def test_parameters_and_optimizer_are_counted_exactly():
    config = tiny("mesh.data=1", "mesh.fsdp=4", "mesh.tensor=2", "optimizer.name=adamw")
    found = puna.plan(config, "cpu-8", compile=False)
    memory = found.sections["memory_of_a_device"]
    assert found.fits is None and "state, batch and gradient alone" in found.verdict
    assert {f.origin for n, f in memory.items() if n != "limit"} == {"counted"}

    c = schema.from_dict(config)
    mesh = sharding.make_mesh(c.mesh, jax.devices("cpu")[:8])
    tx = make_optimizer(c, abstract_params(c.model))
    objective = objectives.make(c, np.ones(c.model.vocab_size, np.int32))
    state = init_state(c, tx, mesh, objective)
    for name, tree in (
        ("parameters", state.params),
        ("optimizer_state", (state.opt_state, state.step)),
    ):
        shards = [s for x in jax.tree.leaves(tree) for s in x.addressable_shards]
        held = sum(s.data.nbytes for s in shards if s.device == jax.devices()[0])
        assert memory[name].value == held


REAL = """
import ctypes, gc, json, os, sys
import jax, numpy as np
import puna
from puna.train import ahead
from puna.configs import schema
from puna.models.parallel import sharding

def status(name):
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return int(lines[name].split()[0]) * 1024

config = puna.get_config("tiny", json.loads(sys.argv[1]))
plan = puna.plan(config, "cpu-1", compile=False).sections["memory_of_a_device"]
c = schema.from_dict(config)
devices = ahead.devices("cpu-1")
step = ahead.compile_step(c, devices)
memory = ahead.memory(step)
inputs = ahead.abstract_inputs(c, sharding.make_mesh(c.mesh, devices))
state, batch = jax.tree.map(lambda x: jax.device_put(np.ones(x.shape, x.dtype), x.sharding), inputs)
for _ in range(2):  # the first also starts threads
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forgets the peak
    before = status("VmRSS")
    state, _ = jax.block_until_ready(step(state, batch))
    temporaries = status("VmHWM") - before
held = sum(x.nbytes for x in jax.tree.leaves((state, batch)))
counted = plan["parameters"].value + plan["optimizer_state"].value + plan["batch"].value
print(json.dumps([held, counted, temporaries, memory.arguments, memory.peak]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc")
def test_the_compiled_peak_is_what_a_cpu_really_takes():
    overrides = json.dumps(
        [*SMALL, "optimizer.name=adamw", "train.batch_size=64", "data.seq_len=512"]
    )
    flags = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
    environment = os.environ | {"XLA_FLAGS": " ".join(flags)}
    command = [sys.executable, "-c", REAL, overrides]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    held, counted, temporaries, arguments, peak = json.loads(done.stdout.splitlines()[-1])
    assert held == counted == arguments
    assert temporaries > 100e6  # much more than a process moves by itself
    assert peak == pytest.approx(held + temporaries, rel=0.1)


def test_what_does_not_fit_says_what_would(tmp_path):
    config = puna.get_config("llama4:scout", ["train.batch_size=128"])
    found = puna.plan(config, "v5p-256", compile=False)
    assert found.fits is False
    assert "does not fit: 1.581 TiB of 95.74 GiB a device (counted)" in found.verdict
    assert "--config.mesh.fsdp=128" in found.verdict
    advised = puna.get_config("llama4:scout", ["train.batch_size=128", "mesh.data=1",
                                               "mesh.fsdp=128"])  # fmt: skip
    assert puna.plan(advised, "v5p-256", compile=False).fits is None
    # Of which the state alone would fit.
    replicas = puna.get_config("llama3:3.1-8b")
    assert puna.plan(replicas, "v5p-8", compile=False).fits is False


def test_advice_names_remat_microbatches_and_more_devices():
    c = schema.from_dict(tiny("train.batch_size=32", "mesh.data=1", "mesh.fsdp=8"))
    mesh = sharding.abstract_mesh(c.mesh, 8)
    advice = step.advice(c, mesh, lacking=350, held=1000, limit=1050)
    assert "--config.model.remat=full" in advice and "--config.train.microbatches=4" in advice
    assert "16 devices under fsdp" in advice and "mesh.data=1" not in advice
    # What is not state stays where it is, however many devices there are.
    assert "devices" not in step.advice(c, mesh, lacking=300, held=100, limit=800)
    # And what is state is there for any number of rows.
    assert step.advice(c, mesh, lacking=300, held=1100, limit=800) == (
        "16 devices under fsdp, as many rows each"
    )


@pytest.mark.parametrize(
    ("message", "needs"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 23.50G of 15.75G hbm.",
         23.5 * 2**30),
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
         "temporaries (88.36G) exceeds available HBM (15.75G).", 88.36 * 2**30 + 1000),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 17M of 16M vmem", None),
        ("INTERNAL: something else", None),
    ],
)  # fmt: skip
def test_the_word_of_a_compiler_that_refuses(message, needs):
    assert step.refused(message, state=1000) == (needs and int(needs))


def test_the_command_writes_where_each_figure_comes_from(tmp_path, capsys):
    cli._run(["plan", "--config=llama3:3.1-8b", "--topology=h100-8", "--no_compile",
              "--config.mesh.fsdp=8", "--config.mesh.data=1", "--tokens=1e12", "--power_mw=150",
              f"--workdir={tmp_path}"])  # fmt: skip
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["config"]["mesh"]["fsdp"] == 8 and written["devices"] == 8
    figures = [f for s in written.values() if isinstance(s, dict) for f in s.values()]
    origins = {f["origin"] for f in figures if isinstance(f, dict) and "origin" in f}
    assert origins == {"counted", "modelled", "published", "assumed", "given"}
    out = capsys.readouterr().out
    assert "least time" in out and "(modelled)" in out and "plan.json and plan.html are in" in out
    # 8.03B parameters * 6 and attention, at what 8 have been measured to reach, which it says.
    rate = written["step"]["product_rate"]
    assert rate["value"] == 794.5e12 and rate["origin"] == "published"
    assert "measured, of a peak of 989" in rate["note"] and "product rate" in out
    seconds = written["step"]["time_of_flops"]["value"]
    tokens = written["step"]["tokens"]["value"]
    assert seconds == pytest.approx(
        tokens * (6 * 7.5e9 + 6 * 32 * 4096 * 8192) / 8 / 794.5e12, 0.01
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v9-8"], "one of v5e, v5p, v6e, a100, h100, h200, cpu with a number"),
        ([], "--topology is needed"),
        (["--topology=h100-8", "--no_compile", "--tokens=-1"], "--tokens=-1 must be more than 0"),
        (["--topology=h100-8", "--no_compile", "--tokens=1e9", "--mfu=2"], "--mfu=2 must be more"),
        (["--topology=h100-8", "--no_compile", "--tokens=9", "--country=mars"], "--country=mars"),
        (["--topology=cpu-8", "--no_compile", "--tokens=9"], "a published peak"),
        (["--topology=h100-8", "--context=8", "--batch=0"], "--batch=0 must be at least 1"),
        (["--topology=h100-8", "--no_compile", "--facts=nowhere"], "nowhere"),
        (["--topology=h100-8", "--no_compile", "--config.mesh.fsdp=3"], "does not divide the 8"),
        (["--topology=h100-8", "--no_compile", "--power_mw=1", "--days=0"], "--days=0 must be"),
        (["--topology=h100-8", "--search", "--budget_s=0"], "--budget_s=0 must be more than 0"),
        (["--topology=auto", "--context=8"], "--context needs a topology"),
        (["--topology=h100-8", "--quantize=int4"], "--quantize=int4 is of generation"),
        (["--topology=h100-8", "--batch=4"], "--batch=4 is of generation: it needs --context"),
        (["--topology=v9-auto"], "must name one of v5e, v5p"),
    ],
)
def test_a_mistake_is_one_line(arguments, message):
    with pytest.raises(UserError) as caught:
        cli._run(["plan", "--config=tiny", *arguments])
    assert message in str(caught.value) and "\n" not in str(caught.value)
