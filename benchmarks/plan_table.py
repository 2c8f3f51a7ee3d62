"""Plan several configurations for hardware that is not here, and print docs/plan.md's table.

    PYTHONPATH=.cache/cuda python benchmarks/plan_table.py --workdir=runs/plans [--rows=8b-v5p,...]

Each row is one `puna plan`, compiled; one that has a plan.json in the folder already is read.
`--rows` are those to make now; a row that is neither there nor asked for says so.
"""

import argparse
import json
import os
import pathlib
import shlex
import subprocess
import sys
import time

# Folder of the row, and the flags of its command: one row of tokens a device. Large models without
# compiler options, which take several times as long to compile and change little in memory.
ROWS = {
    "tiny-cpu": "--config=tiny --topology=cpu-8",
    "scout-tiny-v5e": "--config=llama4:scout-tiny --topology=v5e-4 --config.train.batch_size=4",
    "1b-v6e": "--config=llama3:3.2-1b --topology=v6e-4 --config.mesh.data=1 --config.mesh.fsdp=4 "
    "--config.train.batch_size=4 "
    "--config.train.compiler_options=",
    "8b-v5p": "--config=llama3:3.1-8b --topology=v5p-8 --config.mesh.data=1 --config.mesh.fsdp=4 "
    "--config.train.batch_size=4",
    "scout-v5p": "--config=llama4:scout --topology=v5p-256 --config.mesh.data=1 "
    "--config.mesh.fsdp=128 --config.train.batch_size=128 "
    "--config.train.compiler_options=",
    "maverick-v5p": "--config=llama4:maverick --topology=v5p-256 --config.mesh.data=1 "
    "--config.mesh.fsdp=8 --config.mesh.expert=16 --config.train.batch_size=128 "
    "--config.train.compiler_options=",
    "405b-v5p": "--config=llama3:3.1-405b --topology=v5p-1024 --config.mesh.data=1 "
    "--config.mesh.fsdp=512 --config.train.batch_size=512 "
    "--config.train.compiler_options=",
    "405b-h100": "--config=llama3:3.1-405b --topology=h100-512 --config.mesh.data=1 "
    "--config.mesh.fsdp=512 --config.train.batch_size=512 "
    "--config.train.compiler_options=",
    # A picture of four tiles a row; on eight H100 the text model is frozen, or all but adapters.
    "90b-vision-v5p": "--config=llama3:3.2-90b-vision --topology=v5p-64 --config.mesh.data=1 "
    "--config.mesh.fsdp=32 --config.train.batch_size=32 --config.data.images=4 "
    "--config.train.compiler_options=",
    "90b-vision-h100": "--config=llama3:3.2-90b-vision --topology=h100-8 --config.mesh.data=1 "
    "--config.mesh.fsdp=8 --config.train.batch_size=8 --config.data.images=4 "
    "--config.adapter.rank=16 --config.model.param_dtype=bfloat16 "
    "--config.train.compiler_options=",
    "behemoth-v5p": "--config=llama4:behemoth --topology=2xv5p-4096 --config.mesh.slices=2 "
    "--config.mesh.data=1 --config.mesh.fsdp=64 --config.mesh.expert=16 "
    "--config.mesh.context=2 --config.train.batch_size=2048 "
    "--config.train.compiler_options=",
}
COLUMNS = (
    "flags", "parameters", "optimizer", "temporaries", "peak", "limit", "collectives beside work",
    "waiting", "step, at least", "planned in",
)  # fmt: skip


def main():
    """Compile what is not there yet, and print."""
    parser = argparse.ArgumentParser(description="Plan several configurations.")
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="a folder a row")
    parser.add_argument("--rows", default=",".join(ROWS), help="comma separated; all by default")
    arguments = parser.parse_args()
    wanted = arguments.rows.split(",")
    if unknown := sorted(set(wanted) - ROWS.keys()):
        parser.error(f"--rows={arguments.rows}: {unknown[0]} is none of {', '.join(ROWS)}")
    print(f"| {' | '.join(COLUMNS)} |")
    print("|---" * len(COLUMNS) + "|")
    for name, flags in ROWS.items():
        folder = arguments.workdir / name
        if name in wanted and not (folder / "plan.json").exists():
            _plan(folder, flags)
        print(f"| `{flags}` | {' | '.join(_cells(folder))} |", flush=True)


def _plan(folder, flags):
    """Run the command, and keep what it took; a plan that does not fit is a row, too."""
    begin = time.monotonic()
    command = [sys.executable, "-m", "puna", "plan", *shlex.split(flags)]
    command += ["--budget_s=7200", f"--workdir={folder}"]  # the machine may have other work, too
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, _, usage = os.wait4(child.pid, 0)
    took = {
        "seconds": time.monotonic() - begin,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "took.json").write_text(json.dumps(took), encoding="utf-8")


def _cells(folder):
    try:
        plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        took = json.loads((folder / "took.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ["not planned", *[""] * (len(COLUMNS) - 2)]
    memory, spent = plan["memory_of_a_device"], plan.get("time_of_a_step", {})
    found = [
        _bytes(memory[kind]["value"]) if kind in memory else "-"
        for kind in ("parameters", "optimizer_state", "temporaries", "peak", "limit")
    ]
    found.append(
        f"{spent['asynchronous']['value']:.0f} of {spent['collectives']['value']:.0f}"
        if "collectives" in spent else "-"
    )  # fmt: skip
    waiting = [x["value"] for name, x in spent.items() if name.startswith("waiting_")]
    found.append(_seconds(sum(waiting)) if "step_time" in spent else "-")
    found.append(_seconds(spent["step_time"]["value"]) if "step_time" in spent else "-")
    cpu, peak = took["cpu_seconds"], took["peak_bytes"]
    return [*found, f"{cpu:.0f} CPU s, {peak / 2**30:.1f} GiB"]


def _bytes(count) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.2f} MiB"


def _seconds(value) -> str:
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


if __name__ == "__main__":
    main()
