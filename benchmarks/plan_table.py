"""Plan several configurations for hardware that is not here, and print docs/plan.md's table.

    python benchmarks/plan_table.py --workdir=runs/plans

Each row is one `puna plan`, compiled; one that has a plan.json in the folder already is read.
"""

import argparse
import json
import os
import pathlib
import shlex
import subprocess
import sys

# Folder of the row, and the flags of its command.
ROWS = {
    "8b-v5p": "--config=llama3:3.1-8b --topology=v5p-8 --config.mesh.data=1 --config.mesh.fsdp=4 "
    "--config.train.batch_size=4",
    "1b-v6e": "--config=llama3:3.2-1b --topology=v6e-4 --config.mesh.data=1 --config.mesh.fsdp=4 "
    "--config.train.batch_size=4",
    "tiny-cpu": "--config=tiny --topology=cpu-8",
    "scout-tiny-v5e": "--config=llama4:scout-tiny --topology=v5e-4 --config.train.batch_size=4",
}


def main():
    """Compile what is not there yet, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="a folder a row")
    folder = parser.parse_args().workdir
    print("| flags | parameters | optimizer | temporaries | peak | limit | least step |")
    print("|---|---|---|---|---|---|---|")
    for name, flags in ROWS.items():
        file = folder / name / "plan.json"
        if not file.exists():
            command = [sys.executable, "-m", "puna", "plan", *shlex.split(flags)]
            command.append(f"--workdir={file.parent}")
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ)
        plan = json.loads(file.read_text(encoding="utf-8"))
        memory = plan["memory_of_a_device"]
        cells = [
            _bytes(memory[kind]["value"])
            for kind in ("parameters", "optimizer_state", "temporaries", "peak", "limit")
        ]
        least = plan["step"].get("least_time")
        cells.append(f"{least['value'] * 1e3:.4g} ms" if least else "-")
        print(f"| `{flags}` | {' | '.join(cells)} |", flush=True)


def _bytes(count) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.2f} MiB"


if __name__ == "__main__":
    main()
