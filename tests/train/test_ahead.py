"""The whole training step compiles for TPUs and GPUs that are not here, and fits their memory.

The slow tests run the README's commands. They need a compiler of an extra, never its hardware:
`libtpu` is in [tpu], which `make slow` installs; `make .cache/cuda` brings that of [cuda] alone.
"""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from puna.configs.errors import UserError
from puna.train import ahead

ROOT = Path(__file__).resolve().parent.parent.parent
CUDA = ROOT / ".cache" / "cuda"


def wheel(name, there, how):
    there = there or importlib.util.find_spec(name) is not None
    return pytest.mark.skipif(not there, reason=f"needs {name}: {how}")


for_tpu = wheel("libtpu", False, "pip install 'puna[tpu]'")
for_gpu = wheel("jax_cuda12_plugin", CUDA.is_dir(), "make .cache/cuda, or pip install 'puna[cuda]'")


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v9-8", "one of v5e, v5p, v6e, a100, h100, h200, cpu with a number"),
        ("v5p", "such as v5p-256, 2xv5p-256, h100-8 or cpu-8"),
        ("2xh100-8", "must be one of"),
        ("v5p-24", "must count a power of two from 8 to 8192"),
        ("v5e-512", "must count a power of two from 4 to 256"),
        ("h100-12", "at most 8 GPUs or a multiple of 8"),
    ],
)
def test_a_topology_that_is_none_is_one_line(topology, message):
    with pytest.raises(UserError, match=message) as e:
        ahead.devices(topology)
    assert topology in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("topology", "extra"), [("v5p-256", r"puna\[tpu\]"), ("h100-8", r"puna\[cuda\]")]
)
def test_a_missing_compiler_says_what_to_install(monkeypatch, topology, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"{topology} needs its compiler.*{extra}"):
        ahead.devices(topology)


@pytest.mark.parametrize("fails", [False, True])
def test_variables_of_the_tpu_compiler_are_set_while_it_is_loaded_only(monkeypatch, fails):
    monkeypatch.setattr(ahead, "_require", lambda *_: None)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "mine")
    monkeypatch.delenv("TPU_WORKER_HOSTNAMES", raising=False)
    before, seen = dict(os.environ), []

    def describe(*_, **__):
        seen.append((os.environ["TPU_SKIP_MDS_QUERY"], os.environ["TPU_WORKER_HOSTNAMES"]))
        if fails:
            raise RuntimeError("the compiler is broken")
        return types.SimpleNamespace(devices=[])

    monkeypatch.setattr(ahead.topologies, "get_topology_desc", describe)
    with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
        ahead.devices("v5p-8")
    assert seen == [("1", "localhost")] and dict(os.environ) == before


@pytest.mark.parametrize(
    ("topology", "gib"), [("v5p-256", 95.74), ("2xv6e-64", 31.25), ("h100-8", 79.11)]
)
def test_memory_of_one_device(topology, gib):
    assert ahead.memory_limit(topology) / 2**30 == pytest.approx(gib, abs=0.01)


# With its own options the TPU compiler takes four times as long; memory changes little.
QUICKLY = ["--config.train.compiler_options="]


def python(*arguments, **variables):
    command = [sys.executable, *map(str, arguments)]
    # The XLA flags of the tests would change what the GPU compiler does, too.
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | variables
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def compiled(tmp_path, *arguments, **variables):
    figures = tmp_path / "figures.json"
    python("benchmarks/compile_ahead.py", *arguments, f"--json={figures}", **variables)
    return json.loads(figures.read_text())


@for_tpu
@pytest.mark.slow
def test_topologies_have_as_many_devices_as_their_names_say():
    names = ["v5p-8", "v5p-32", "v5p-256", "v5p-8192", "v5e-4", "v6e-256", "2xv5p-16"]
    code = f"from puna.train import ahead; print([len(ahead.devices(n)) for n in {names}])"
    assert json.loads(python("-c", code).splitlines()[-1]) == [4, 16, 128, 4096, 4, 256, 16]


@for_tpu
@pytest.mark.slow
def test_llama_8b_fits_a_small_tpu_slice(tmp_path):
    figures = compiled(
        tmp_path, "--config=llama3:3.1-8b", "--topology=v5p-8", "--config.mesh.data=1",
        "--config.mesh.fsdp=4", "--config.train.batch_size=4", *QUICKLY,
    )  # fmt: skip
    assert figures["fits"] and figures["peak"] > figures["arguments"]
    # The state is updated in place; the batch, which is the rest, is not.
    assert 0.999 * figures["arguments"] < figures["aliased"] <= figures["arguments"]
    # The gradient of the output table, 2 GiB before it is added up over devices, is not there any
    # more when the layers' gradients are: 1.5 GiB more.
    assert figures["peak"] < 37 * 2**30


@for_tpu
@pytest.mark.slow
def test_scout_fits_a_tpu_slice(tmp_path):
    figures = compiled(
        tmp_path, "--config=llama4:scout", "--topology=v5p-64", "--config.mesh.data=1",
        "--config.mesh.fsdp=32", "--config.train.batch_size=32", *QUICKLY,
    )  # fmt: skip
    assert figures["fits"] and figures["devices"] == 32


@for_tpu
@pytest.mark.slow
def test_memory_of_a_device_stays_flat_as_devices_and_batch_grow():
    table = python("benchmarks/weak_scaling.py", "--devices=8,512", "--grow=data")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    _, (devices, grows, *_, ratio) = rows[2:]
    assert (devices, grows) == ("512", "data") and 0.9 <= float(ratio) <= 1.1


@for_gpu
@pytest.mark.slow
def test_llama_8b_fits_a_node_of_h100(tmp_path):
    figures = compiled(
        tmp_path, "--config=llama3:3.1-8b", "--topology=h100-8", "--config.mesh.data=1",
        "--config.mesh.fsdp=8", "--config.train.batch_size=8", PYTHONPATH=str(CUDA),
    )  # fmt: skip
    assert figures["fits"] and figures["devices"] == 8


@for_gpu
@pytest.mark.slow
def test_experts_on_h100_are_kernels_and_8_bits_are_multiplied_as_such():
    code = """
import jax
from puna.configs import get_config, schema
from puna.train import ahead
from puna.train.plan.program import Program
jax.config.update("jax_enable_compilation_cache", False)
c = get_config("tiny")
c.model.update(num_layers=1, embed_dim=128, num_heads=2, num_kv_heads=1, head_dim=64, mlp_dim=128,
               moe_interval=1, num_experts=4, expert_dim=128, compute_dtype="float8")
c.optimizer.update(name="adamw", learning_rate=1e-3)
c.data.update(tokenizer="bytes", validation="")
program = Program(ahead.compile_step(schema.from_dict(c), ahead.devices("h100-1")).as_text(), 1)
for ops in program.computations.values():
    for op in ops:
        kinds = [program.types.get(x, "").partition("[")[0] for x in op.operands[-2:]]
        name = op.rest.partition('op_name="')[2].partition('"')[0]
        if op.code in ("dot", "while") or "/grouped_" in name:
            print("op", op.code, ",".join(kinds), name)
"""
    lines = python("-c", code, PYTHONPATH=str(CUDA)).splitlines()
    found = [line.split(maxsplit=3)[1:] for line in lines if line.startswith("op ")]
    forward, backward, wide = "f8e4m3fn,f8e4m3fn", "f8e5m2,f8e4m3fn", "bf16,bf16"
    kernels = [kinds for code, kinds, _ in found if code == "custom-call"]
    assert sorted(kernels) == [wide] * 3 + [forward] * 3 + [backward] * 3
    assert {forward, backward, wide} <= {kinds for code, kinds, _ in found if code == "dot"}
    # One layer needs no loop over layers; that of the loss, over its parts, is left.
    loops = [rest for code, *rest in found if code == "while"]
    assert len(loops) <= 1 and "moe" not in str(loops)
