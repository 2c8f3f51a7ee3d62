"""The commands of the README run as they stand, one after the other, in a folder with such files.

What would need a released model or a day is made short: `SHORTER` says how.
"""

import gzip
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
STEPS = (
    "--config.train.steps=2 --config.train.batch_size=8 --config.data.seq_len=64 "
    "--config.optimizer.warmup_steps=1 --config.train.loss_chunk=64"
)
SHAPE = (
    "--config.model.num_layers=2 --config.model.embed_dim=32 --config.model.num_heads=4 "
    "--config.model.num_kv_heads=2 --config.model.head_dim=8 --config.model.mlp_dim=48 "
    "--config.model.vocab_size=264 --config.data.tokenizer=bytes"
)
# The first words of a command and what is added to it.
SHORTER = {
    "train --config=llama3:3.2-1b": f"{SHAPE} {STEPS}",
    "train": STEPS,
    "eval --config=tiny": "--config.data.validation=held_out.txt",
    "eval --checkpoint=runs/mine --tasks": "--limit=1",
}
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def commands():
    """The lines of the README's blocks that begin with puna, environment before them included."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    blocks = "\n".join(text for language, text in found if not language)
    lines = blocks.replace("\\\n", " ").splitlines()
    return [line for line in lines if re.match(r"([A-Z_]+=\S+ +)*puna ", line)]


def start(line, folder):
    words = shlex.split(line, comments=True)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    arguments = words[1:]
    said = " ".join(arguments)
    more = next((SHORTER[key] for key in SHORTER if said.startswith(key)), "")
    return subprocess.Popen(
        [sys.executable, "-m", "puna", *arguments, *more.split()], cwd=folder, env=environment,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def run(line, folder):
    process = start(line, folder)
    out, _ = process.communicate("Who walks over the puna?\n", timeout=600)
    assert process.returncode == 0, f"{line}\n{out}"
    return out


@pytest.fixture
def folder(tmp_path):
    """What the commands find: texts, conversations, and a model where one was downloaded."""
    texts = [f"llama {i} walks over the puna and looks at the grass. " * 8 for i in range(40)]
    (tmp_path / "books").mkdir()
    with gzip.open(tmp_path / "books" / "a.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "held_out.txt").write_text("a llama looks at the grass of the puna. " * 40)
    said = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A llama."}]
    for name in ("train.jsonl", "held_out.jsonl"):
        (tmp_path / name).write_text((json.dumps({"messages": said}) + "\n") * 40)
    run("puna train --config=llama3:3.2-1b --config.data.train=books/a.jsonl.gz --workdir=base",
        tmp_path)  # fmt: skip
    for name in ("Llama-3.2-1B", "Llama-3.2-1B-Instruct"):
        model = tmp_path / "path" / "to" / name
        run(f"puna convert base {model} --to=hf", tmp_path)
        tokenizer = model / "tokenizer_config.json"
        known = json.loads(tokenizer.read_text())
        tokenizer.write_text(json.dumps(known | {"chat_template": TEMPLATE}))
    return tmp_path


@pytest.mark.slow
def test_its_commands_run(folder):
    kinds = set()
    for line in commands():
        kinds.add(kind := re.search(r"puna (\w+)", line)[1])
        if kind == "serve":
            serve(line, folder)
        else:
            run(line, folder)
    assert kinds == {"train", "eval", "generate", "convert", "plan", "chat", "serve", "data"}
    results = json.loads((folder / "runs" / "mine" / "results.json").read_text())
    assert results["step"] == 2
    assert (folder / "release" / "model.safetensors").exists()
    assert json.loads((folder / "runs" / "mine" / "eval" / "results.json").read_text())


def serve(line, folder):
    """Start it, wait until it is ready, and end it as the system does."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    process = start(re.sub("--port=[0-9]+", f"--port={port}", line), folder)
    try:
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
                    assert answer.status == 200
                break
            except OSError:
                time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, f"{line}\n{out}"
