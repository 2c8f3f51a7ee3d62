"""puna's and MaxText's training step, compiled by one compiler for TPUs that are not here.

    python benchmarks/maxtext_ahead.py [--row=8b --row=scout ...] [--json=FILE]

Both are installed together in .cache/maxtext (Python 3.12 or newer; gigabytes, the first time).
Each program is then read by `train/plan`: what it holds at its peak, the cycles that the compiler
estimates with loops counted as often as they run, what of its collectives is beside computation,
and the least time that the plan would give it. One row of 8,192 tokens a chip for both, float32
parameters and moments, activations in bfloat16. MaxText has what its own recipes have (its
benchmarks/maxtext_v5p_model_configs.py and maxtext_trillium_model_configs.py): splash attention in
blocks of 2,048 and their compiler options, but nothing on the host; puna its defaults.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import types
from typing import NamedTuple

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
PEER = ROOT / ".cache" / "maxtext"
PACKAGE = "maxtext[tpu]==0.2.5"

# Options of MaxText's recipes. Those that gather within products are left out: the compiler that
# comes with JAX 0.12 refuses them on v5p.
_SHARED = (
    "--xla_tpu_enable_data_parallel_all_reduce_opt=true",
    "--xla_tpu_data_parallel_opt_different_sized_ops=true",
    "--xla_tpu_use_minor_sharding_for_major_trivial_input=true",
    "--xla_tpu_relayout_group_size_threshold_for_reduce_scatter=1",
    "--xla_tpu_assign_all_reduce_scatter_layout=true",
)
_DENSE = ("--xla_tpu_scoped_vmem_limit_kib=98304", *_SHARED)
_EXPERTS = ("--xla_tpu_scoped_vmem_limit_kib=81920", *_SHARED)
_BLOCKS = tuple(
    f"sa_block_{name}=2048"
    for name in ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
)


class Row(NamedTuple):
    """The same work for both: flags of `puna plan`, and keys of MaxText."""

    topology: str
    puna: tuple[str, ...]
    maxtext: tuple[str, ...]


def _rows(name, topology, chips, ours, theirs, options, *more):
    """Of a model over fsdp alone: with the options of each, and "-plain", without any."""
    flags = (
        f"--config={ours}", "--config.mesh.data=1", f"--config.mesh.fsdp={chips}",
        f"--config.train.batch_size={chips}",
    )  # fmt: skip
    keys = (f"model_name={theirs}", "ici_fsdp_parallelism=-1", "remat_policy=full", *more)
    # Without the options the blocks of the recipes do not fit the memory that a kernel may use.
    best = (*keys, *_BLOCKS, f"compile_xla_flags={' '.join(options)}")
    plain = (*flags, "--config.train.compiler_options=")
    return {name: Row(topology, flags, best), f"{name}-plain": Row(topology, plain, keys)}


_MEGABLOX = ("megablox=true", "sparse_matmul=true")
ROWS = _rows("8b", "v5p-8", 4, "llama3:3.1-8b", "llama3.1-8b", _DENSE)
ROWS |= _rows("scout", "v5p-256", 128, "llama4:scout", "llama4-17b-16e", _EXPERTS, *_MEGABLOX)
COLUMNS = (
    "", "program", "peak", "cycles", "products", "collectives beside work", "waiting",
    "step, at least", "compiled in",
)  # fmt: skip


def main():
    """Compile the rows that are asked for, in processes of their own, and print."""
    parser = argparse.ArgumentParser(description="Compile the steps of puna and MaxText.")
    parser.add_argument("--row", action="append", choices=ROWS, help="all by default")
    parser.add_argument("--workdir", type=pathlib.Path, default=ROOT / "runs" / "maxtext")
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures here")
    args = parser.parse_args()
    _install()
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    found = {}
    for name in args.row or ROWS:
        for program in ("puna", "maxtext"):
            facts = _compile(args.workdir / name / program, program, name)
            found[f"{name}, {program}"] = facts
            print(f"| {name} | {program} | {' | '.join(_cells(facts))} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _install():
    """An environment of both, with one JAX and one compiler."""
    if (PEER / "done").exists():
        return
    python = sys.executable
    if sys.version_info < (3, 12):
        python = next(filter(None, map(shutil.which, ("python3.13", "python3.12"))), None)
    if python is None:
        sys.exit("maxtext_ahead: MaxText needs Python 3.12 or newer, and none is on the path")
    print(f"installing {PACKAGE} and puna into {PEER} (minutes)", file=sys.stderr)
    subprocess.run([python, "-m", "venv", "--clear", PEER], check=True)
    subprocess.run([PEER / "bin" / "pip", "install", "-q", "uv"], check=True)
    # pip itself had not found versions for its 260 requirements after five minutes.
    uv = [PEER / "bin" / "uv", "pip", "install", "-q", "--python", PEER / "bin" / "python"]
    subprocess.run([*uv, PACKAGE, "-e", f"{ROOT}[tpu]"], check=True)
    (PEER / "done").touch()


def _compile(folder, program, name):
    """What `_facts` wrote, or says the process that was to write it."""
    file = folder / "facts.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [PEER / "bin" / "python", __file__, f"--{program}", name, file]
        with (folder / "log.txt").open("wb") as log:
            child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            _, _, usage = os.wait4(child.pid, 0)
        if not file.exists():
            return {"failed": f"see {folder / 'log.txt'}"}
        facts = json.loads(file.read_text(encoding="utf-8"))
        facts["cpu_seconds"] = round(usage.ru_utime + usage.ru_stime)
        facts["host_bytes"] = usage.ru_maxrss * 1024
        file.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))


def _cells(facts):
    if "refused" in facts or "failed" in facts:
        return [str(facts.get("refused") or facts["failed"]), *[""] * (len(COLUMNS) - 3)]
    return (
        f"{facts['peak'] / 2**30:.1f} GiB",
        f"{facts['cycles']:.3g}",
        f"{facts['products']:.3f} s",
        f"{facts['asynchronous']} of {facts['collectives']}",
        f"{facts['waiting'] * 1e3:.0f} ms",
        f"{facts['seconds']:.3f} s",
        f"{facts['cpu_seconds']} CPU s, {facts['host_bytes'] / 2**30:.1f} GiB",
    )


# --- in the environment of both -------------------------------------------------------------------


def _ours(row):
    from puna.configs import get_config, schema
    from puna.models.parallel import sharding
    from puna.train import ahead

    name, *overrides = [flag.partition("--config")[2] for flag in row.puna]
    config = get_config(name.lstrip("="), [text.lstrip(".") for text in overrides])
    config, devices = schema.from_dict(config), ahead.devices(row.topology)
    return ahead.compile_step(config, devices), sharding.make_mesh(config.mesh, devices)


def _theirs(row):
    """As MaxText's own train_compile.py does it, which keeps the compiled step to itself."""
    from flax.core.spmd import logical_axis_rules
    from maxtext.configs import pyconfig
    from maxtext.trainers.pre_train import train, train_compile
    from maxtext.utils import maxtext_utils, sharding

    base = pathlib.Path(pyconfig.__file__).parent / "base.yml"
    config = pyconfig.initialize(
        ["", str(base), f"compile_topology={row.topology}", "compile_topology_num_slices=1",
         "per_device_batch_size=1", "max_target_length=8192", "attention=flash",
         "dataset_type=synthetic", "enable_checkpointing=false", "opt_type=adamw",
         *row.maxtext]
    )  # fmt: skip
    mesh = train_compile.get_topology_mesh(config)
    args, kwargs, state, _, model = train_compile.get_shaped_inputs(mesh, config)
    params, state = sharding.maybe_update_params_sharding_with_opt(config, state)
    inputs = sharding.build_zero1_input_state_mesh_shardings(config, state, params)
    batch = sharding.get_input_data_sharding(config, mesh)
    parts = maxtext_utils.get_functional_train_with_signature(
        train.train_step, batch, inputs, model, config, params
    )
    rules = logical_axis_rules(config.logical_axis_rules)
    step, ins, outs, static, donated = parts
    compiled = train_compile.jit_and_compile(
        step, args, kwargs, mesh, ins, outs, static, donated, config, rules
    )
    return compiled, mesh


def _facts(program, row):
    """Compile one program and read it."""
    import jax

    from puna.models import hardware
    from puna.train import ahead
    from puna.train.plan import timing
    from puna.train.plan.program import Program

    jax.config.update("jax_enable_compilation_cache", False)
    with contextlib.redirect_stdout(sys.stderr):
        try:
            compiled, mesh = (_ours if program == "puna" else _theirs)(row)
        except jax.errors.JaxRuntimeError as error:
            return {"refused": str(error).splitlines()[0][:200]}
    chip = hardware.CHIPS[ahead.parse(row.topology)[1]]
    # Numbers in the program count devices in the order of this mesh.
    mesh = types.SimpleNamespace(axis_names=mesh.axis_names, devices=np.asarray(mesh.devices))
    program = Program(compiled.as_text(), mesh.devices.size)
    times = timing.measure(program, timing.Links(mesh, chip), timing.published(chip))
    return dataclasses.asdict(ahead.memory(compiled)) | {
        "jax": jax.__version__,
        "cycles": times.cost.cycles,
        "flops": times.cost.flops,
        "traffic": times.cost.bytes,
        "products": times.products,
        "other": times.other,
        "waiting": sum(times.exposed.values()),
        "asynchronous": times.asynchronous,
        "collectives": times.collectives,
        "seconds": times.seconds,
    }


if __name__ == "__main__":
    if sys.argv[1:2] in (["--puna"], ["--maxtext"]):
        # The compiler alone, also while another process has it.
        os.environ |= {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
        facts = _facts(sys.argv[1][2:], ROWS[sys.argv[2]])
        pathlib.Path(sys.argv[3]).write_text(json.dumps(facts), encoding="utf-8")
    else:
        main()
