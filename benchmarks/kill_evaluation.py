"""Kill `puna eval --tasks` with SIGKILL at random moments, and compare with one left alone.

    python benchmarks/kill_evaluation.py --kills=10

A tiny run is made first. An evaluation is killed when some more of its requests are answered, again
and again; then it may finish. Its files must be those of the one left alone, byte for byte.
"""

import argparse
import pathlib
import random
import subprocess
import sys
import tempfile
import time

import puna

_FILES = ("results.json", "requests.jsonl", "samples.jsonl")
_SETTINGS = {
    "model.vocab_size": 264, "model.embed_dim": 64, "model.num_layers": 2, "model.num_heads": 4,
    "model.num_kv_heads": 2, "model.head_dim": 16, "model.mlp_dim": 128, "data.tokenizer": "bytes",
    "data.seq_len": 64, "train.steps": 2, "train.batch_size": 2, "optimizer.warmup_steps": 1,
}  # fmt: skip


def main():
    """Make a run, evaluate it once whole and once in parts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        (work / "text.txt").write_text("llama walks over the puna. " * 200)
        settings = {**_SETTINGS, "data.train": work / "text.txt", "data.validation": ""}
        config = puna.get_config("tiny", [f"{key}={value}" for key, value in settings.items()])
        puna.train(config, work / "run")
        start(work, "whole").wait()
        for kill in range(args.kills):
            before = count(work / "parts" / "requests.jsonl")
            more = rng.randrange(1, 40)
            process = start(work, "parts")
            while (
                process.poll() is None and count(work / "parts" / "requests.jsonl") < before + more
            ):
                time.sleep(rng.random() / 20)
            if process.poll() is not None:
                raise SystemExit(f"it ended by itself after {kill} kills")
            process.kill()
            process.wait()
            after = count(work / "parts" / "requests.jsonl")
            print(f"kill {kill + 1}: {before} -> {after} answers", flush=True)
        start(work, "parts").wait()
        for name in _FILES:
            same = (work / "whole" / name).read_bytes() == (work / "parts" / name).read_bytes()
            print(f"{name}: {'identical' if same else 'DIFFERENT'}")


def start(work: pathlib.Path, name: str) -> subprocess.Popen:
    """An evaluation in a process of its own."""
    command = [sys.executable, "-m", "puna", "eval", f"--checkpoint={work}/run", "--limit=150",
               "--tasks=lookup,sums", f"--workdir={work}/{name}"]  # fmt: skip
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def count(path: pathlib.Path) -> int:
    """Whole lines of a file."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


if __name__ == "__main__":
    main()
