"""Memory of fine-tuning on hardware that is not here, compiled; prints docs/plan.md's table.

    pip install -e '.[tpu]' && make .cache/cuda
    PYTHONPATH=.cache/cuda python benchmarks/fine_tune_memory.py --workdir=runs/fine_tune_memory

Each row is one `puna plan` of the training step, with rows of 4,096 tokens, activations recomputed
(`remat=full`), one row a device; one that has a plan.json in the folder already is read. Where
state and gradient alone do not fit, they are what is printed. Weights under adapters are bfloat16,
int8 under QLoRA, or nf4 where the row says so; full fine-tuning has float32 parameters and moments.
"""

import argparse
import json
import pathlib
import subprocess
import sys

LORA = "--config.adapter.rank=16 --config.adapter.alpha=32 --config.model.param_dtype=bfloat16"
QLORA = f"{LORA} --config.adapter.quantize=int8"
NF4 = f"{LORA} --config.adapter.quantize=nf4"
ONE = "--config.train.batch_size=1"
FOUR = "--config.train.batch_size=4 --config.mesh.data=1 --config.mesh.fsdp=4"
LLAMA, SCOUT = "--config=llama3:3.1-8b", "--config=llama4:scout-text"
# What it is, and the flags of its command.
ROWS = {
    "8B, LoRA": f"{LLAMA} --topology=h100-1 {ONE} {LORA}",
    "8B, full": f"{LLAMA} --topology=h100-1 {ONE}",
    "8B, LoRA on four": f"{LLAMA} --topology=v5e-4 {FOUR} {LORA}",
    "8B, full on four": f"{LLAMA} --topology=v5e-4 {FOUR}",
    # No device of 24 GB is among those that can be compiled for; the peak is to be held against it.
    "8B, QLoRA": f"{LLAMA} --topology=a100-1 {ONE} {QLORA}",
    "8B, QLoRA in nf4": f"{LLAMA} --topology=a100-1 {ONE} {NF4}",
    "Scout, QLoRA": f"{SCOUT} --topology=h200-1 {ONE} {QLORA}",
    "Scout, full": f"{SCOUT} --topology=h200-1 {ONE}",
}
SAME = "--config.train.objective=sft --config.data.seq_len=4096 --config.model.remat=full"
KINDS = ("parameters", "frozen_parameters", "optimizer_state", "temporaries", "peak", "limit")


def main():
    """Compile what is not there yet, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="a folder a row")
    folder = parser.parse_args().workdir
    print("| | device | trained | frozen | optimizer | temporaries | peak | limit |")
    print("|---|---|---|---|---|---|---|---|")
    for name, flags in ROWS.items():
        file = folder / name.replace(", ", "-").replace(" ", "-") / "plan.json"
        if not file.exists():
            command = [sys.executable, "-m", "puna", "plan", *flags.split(), *SAME.split()]
            # Status 2 is of what does not fit.
            subprocess.run(
                [*command, f"--workdir={file.parent}"], check=False, stdout=subprocess.DEVNULL
            )
        plan = json.loads(file.read_text(encoding="utf-8"))
        memory = plan["memory_of_a_device"]
        cells = [_bytes(memory[kind]["value"]) if kind in memory else "-" for kind in KINDS]
        if "peak" not in memory:
            cells[-2] = f"over {_bytes(memory['limit']['value'] - memory['headroom']['value'])}"
        print(f"| {name} | {plan['topology']} | {' | '.join(cells)} |", flush=True)


def _bytes(count) -> str:
    return f"{count / 2**30:.2f} GiB"


if __name__ == "__main__":
    main()
