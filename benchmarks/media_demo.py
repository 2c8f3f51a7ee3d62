"""Train on made pictures, then on made sound: does the model look, and does it listen?

    python benchmarks/media_demo.py --workdir=runs/media [--kinds=vision,sound] [--steps=100]

For each kind it writes captioned pictures of squares or clips of tones, runs
`puna train --config=llama4:vision-demo` (or `sound-demo`) and two `puna eval`: held-out captions
with their own picture or clip, and with that of another caption. A caption tells what only the
picture shows or the clip plays, so a model that looks or listens has a lower loss with its own.
"""

import argparse
import itertools
import json
import os
import pathlib
import random
import subprocess
import sys
import time
import wave

import numpy as np

PAINTS = {"red": (200, 30, 30), "green": (30, 150, 50), "blue": (30, 60, 200), "black": (0, 0, 0)}
NUMBERS = ("one", "two", "three", "four")
PITCHES = {"low": 300.0, "middle": 700.0, "high": 1500.0}  # Hz
SIDE, RATE, NOTE = 28, 16000, 1600  # pixels; samples a second; samples of a note


def picture(rng, caption: str) -> bytes:
    """A PPM file of as many squares, one in each quarter at most, on white."""
    number, colour = caption.split()
    pixels_YXC = np.full((SIDE, SIDE, 3), 255, np.uint8)
    half = SIDE // 2
    for place in rng.sample(range(4), NUMBERS.index(number) + 1):
        size = rng.randrange(half // 2, half - 2)
        y, x = (half * n + rng.randrange(1, half - size) for n in divmod(place, 2))
        pixels_YXC[y : y + size, x : x + size] = PAINTS[colour]
    return b"P6 %d %d 255\n" % (SIDE, SIDE) + pixels_YXC.tobytes()


def clip(rng, caption: str, path: pathlib.Path) -> None:
    """A WAV file of one note after another, of some loudness and with some noise."""
    time_S = np.arange(NOTE) / RATE
    notes = [np.sin(2 * np.pi * PITCHES[name] * rng.uniform(0.95, 1.05) * time_S)
             for name in caption.split()]  # fmt: skip
    noise = np.random.default_rng(rng.randrange(2**32)).normal(size=NOTE * len(notes))
    samples = np.concatenate(notes) * rng.uniform(0.2, 0.8) + 0.02 * noise
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())


def write_sets(folder: pathlib.Path, kind: str, train: int, held_out: int) -> None:
    """train.jsonl, right.jsonl and shuffled.jsonl, the last with the media of other captions."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(kind)
    if kind == "vision":
        place, key, suffix = "<|image|>", "image", "ppm"
        captions = [f"{n} {c}" for n, c in itertools.product(NUMBERS, PAINTS)]
    else:
        place, key, suffix = "<|audio|>", "audio", "wav"
        captions = [" ".join(notes) for notes in itertools.product(PITCHES, repeat=3)]
    records = []
    for i in range(train + held_out):
        caption = captions[i % len(captions)]
        file = folder / f"{i}.{suffix}"
        if kind == "vision":
            file.write_bytes(picture(rng, caption))
        else:
            clip(rng, caption, file)
        records.append({"text": f"{place}{caption}", key: file.name})
    kept = records[train:]
    # The next one has another caption.
    others = [a | {key: b[key]} for a, b in zip(kept, [*kept[1:], kept[0]], strict=True)]
    for name, some in (("train", records[:train]), ("right", kept), ("shuffled", others)):
        lines = "".join(json.dumps(record) + "\n" for record in some)
        (folder / f"{name}.jsonl").write_text(lines)


def run(*words: str) -> None:
    """`puna ...`; what it prints is shown where it fails."""
    done = subprocess.run([sys.executable, "-m", "puna", *words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"puna {' '.join(words)}\n{done.stdout}{done.stderr}")


def measure(workdir: pathlib.Path, kind: str, steps: int) -> dict:
    """Train and evaluate one of them."""
    begin, cpu = time.monotonic(), os.times()
    data, out = workdir / f"{kind}-data", workdir / kind
    write_sets(data, kind, 1024, 256)
    config = f"--config=llama4:{kind}-demo"
    run("train", config, f"--config.data.train={data}/train.jsonl",
        f"--config.train.steps={steps}", f"--workdir={out}")  # fmt: skip
    found: dict = {"kind": kind, "steps": steps}
    for name in ("right", "shuffled"):
        run("eval", config, f"--config.data.validation={data}/{name}.jsonl",
            f"--checkpoint={out}", f"--workdir={out}/{name}")  # fmt: skip
        found[name] = json.loads((out / name / "results.json").read_text())["loss"]
    now = os.times()
    found["cpu_s"] = round(now.children_user + now.children_system
                           - cpu.children_user - cpu.children_system)  # fmt: skip
    found["seconds"] = round(time.monotonic() - begin)
    return found


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Train on made pictures and sound.")
    parser.add_argument("--workdir", required=True, type=pathlib.Path)
    parser.add_argument("--kinds", default="vision,sound")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    print("| | steps | loss with its own | with another's | time | CPU time |")
    print("|---|---|---|---|---|---|")
    for kind in args.kinds.split(","):
        f = measure(args.workdir, kind, args.steps)
        print(f"| `llama4:{kind}-demo` | {f['steps']} | {f['right']:.3f} | {f['shuffled']:.3f} | "
              f"{f['seconds']} s | {f['cpu_s']} s |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
