"""The command line: what a user types, and what he reads when it is wrong."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from puna import __main__ as cli
from puna.configs.errors import UserError

CONFIG = """
from puna.configs import base

def get_config():
    config = base.get_config()
    config.model.update(vocab_size=264, embed_dim=16, num_layers=2, num_heads=2, num_kv_heads=1,
                        head_dim=8, mlp_dim=24, compute_dtype="float32")
    config.data.update(train="{folder}/*.txt", validation="{folder}/0.txt", seq_len=32)
    config.optimizer.update(warmup_steps=2)
    config.train.update(steps=8, batch_size=8, log_every=1, save_every=2, eval_every=4)
    return config
"""


@pytest.fixture
def experiment(tmp_path):
    """A config file, and the texts it reads."""
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text(f"llama {i} walks over the puna. " * 9)
    file = tmp_path / "experiment.py"
    file.write_text(CONFIG.format(folder=tmp_path))
    return file


def start(*arguments, preexec_fn=None, **environment):
    command = [sys.executable, "-m", "puna", *map(str, arguments)]
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, preexec_fn=preexec_fn, **pipes)


def run(*arguments, **options):
    process = start(*arguments, **options)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["trian"], "trian is not a command; one of train, eval, "),
        (["train"], "--config is needed"),
        (["train", "--config=tiny"], "--workdir is needed"),
        (["train", "--config=tinny", "--workdir=x"], "--config=tinny must be one of"),
        (["train", "--config=tiny", "--config.train.stepz=3"], "did you mean train.steps?"),
        (["train", "--config=tiny", "--config.train.steps=many"], "train.steps='many' must be of"),
        (["train", "--config=tiny", "--config.train.steps=1.5"], "must be of type int"),
        (["train", "--config=tiny", "--config.train.steps"], "train.steps='' must be of type int"),
        (["train", "--config=tiny", "--config.data.shuffle=maybe"], "must be of type bool"),
        (["train", "--config=tiny", "--config.train.steps=0"], "train.steps=0 must be at least 1"),
        (["train", "--config=tiny", "--nonsense=1"], "nonsense"),
        (["train", "--config=tiny", "extra"], "extra is not a flag"),
        (["eval", "--config=tiny"], "--checkpoint is needed"),
        (["eval", "--config=tiny", "--checkpoint=nowhere"], "nowhere"),
        (["generate", "--checkpoint=nowhere", "--prompt=a"], "nowhere"),
        (["generate", "--checkpoint=nowhere"], "--prompt is needed"),
        (["generate", "--max_tokens=many"], "max_tokens"),
        (["chat"], "--checkpoint is needed"),
        (["chat", "--checkpoint=nowhere"], "nowhere"),
        (["serve", "--checkpoint=nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        cli._run(arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [[], ["--help"], *([c, "--help"] for c in cli.COMMANDS)])
def test_help(arguments, capsys):
    cli._run(arguments)
    out = capsys.readouterr().out
    assert "puna" in out
    if arguments == ["train", "--help"]:
        assert "--workdir" in out and "train.steps" in out


def test_train_eval_generate(experiment, tmp_path, capsys):
    """The three commands, one after another, as a user runs them."""
    workdir = tmp_path / "run"
    cli._run(["train", f"--config={experiment}", f"--workdir={workdir}",
              "--config.train.steps=4"])  # fmt: skip
    assert json.loads((workdir / "results.json").read_text())["step"] == 4
    cli._run(["eval", f"--config={experiment}", f"--checkpoint={workdir}"])
    trained = json.loads((workdir / "results.json").read_text())
    evaluated = json.loads((workdir / "eval" / "results.json").read_text())
    assert evaluated["loss"] == pytest.approx(trained["validation_loss"], rel=1e-6)
    capsys.readouterr()
    cli._run(["generate", f"--checkpoint={workdir}", "--prompt=llama", "--max_tokens=5",
              f"--workdir={tmp_path}/said"])  # fmt: skip
    assert capsys.readouterr().out.startswith("llama")
    said = json.loads((tmp_path / "said" / "results.json").read_text())
    assert said["prompt"] == "llama" and said["max_tokens"] == 5 and said["seed"] == 0
    cli._run(["generate", f"--checkpoint={workdir}", "--prompt=", "--max_tokens=5",
              f"--workdir={tmp_path}/free"])  # fmt: skip
    assert json.loads((tmp_path / "free" / "results.json").read_text())["text"]


def test_exit_status_and_one_line():
    status, _, err = run("train", "--config=tiny", "--config.train.stepz=3")
    assert status == 2
    assert err == "puna: train.stepz is not a key; did you mean train.steps?\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name,content,message",
    [
        ("empty.txt", b"", "empty.txt"),
        ("binary.txt", b"\x7fELF\x00\x01\x02\xff" * 99, "binary.txt"),
        ("latin.txt", b"\xe9t\xe9" * 99, "latin.txt"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "broken.jsonl"),
        ("broken.txt.gz", b"\x1f\x8b\x08\x00garbage", "broken.txt.gz"),
    ],
)
def test_data_that_will_not_do(experiment, tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content)
    status, _, err = run("train", f"--config={experiment}", f"--workdir={tmp_path}/run",
                         f"--config.data.train={file}",
                         "--config.data.bad_records=refuse")  # fmt: skip
    assert status == 2 and message in err and err.count("\n") == 1
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a file system closed to all")
def test_a_workdir_without_permission(experiment):
    status, _, err = run("train", f"--config={experiment}", "--workdir=/proc/run")
    assert status == 2 and "--workdir=/proc/run" in err and err.count("\n") == 1


@pytest.mark.slow
def test_a_workdir_that_is_a_file(experiment, tmp_path):
    status, _, err = run("train", f"--config={experiment}", f"--workdir={experiment}")
    assert status == 2 and "experiment.py" in err and err.count("\n") == 1


@pytest.mark.slow
def test_a_full_disk(experiment, tmp_path):
    """A save that cannot be written stops the run; the checkpoint before it still restores."""
    import resource

    workdir = tmp_path / "run"
    flags = ("train", f"--config={experiment}", f"--workdir={workdir}")
    assert run(*flags, "--config.train.steps=2")[0] == 0
    saved = {p: p.read_bytes() for p in (workdir / "checkpoints").rglob("*") if p.is_file()}

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    # Without JAX's compile cache, which would warn of the disk as well.
    status, _, err = run(*flags, preexec_fn=limit, JAX_COMPILATION_CACHE_DIR="")
    assert status == 2 and "cannot save a checkpoint" in err and err.count("\n") == 1, err
    assert {p: p.read_bytes() for p in saved} == saved
    status, out, _ = run(*flags)
    assert status == 0 and "step 2 of 8" in out


@pytest.mark.slow
def test_killed_and_started_again(experiment, tmp_path):
    """SIGKILL in the middle; the same command resumes and every loss is bit-identical."""
    arguments = ("train", f"--config={experiment}", "--config.train.steps=40")
    assert run(*arguments, f"--workdir={tmp_path}/whole")[0] == 0

    cut = tmp_path / "cut"
    process = start(*arguments, f"--workdir={cut}")
    file = cut / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not (file.exists() and file.read_text().count("\n") > 9):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (cut / "results.json").exists()

    status, out, _ = run(*arguments, f"--workdir={cut}")
    assert status == 0 and "step 0 of 40" not in out
    assert _losses(cut) == _losses(tmp_path / "whole")


def _losses(workdir: pathlib.Path):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [(m["step"], m["loss"]) for m in map(json.loads, lines)]


@pytest.mark.slow
def test_the_quickstart_on_one_device_and_on_eight(tmp_path):
    """The first 20 losses of the demo agree; the same command, another mesh."""
    losses = {}
    for devices, mesh in ((1, ()), (8, ("--config.mesh.fsdp=4", "--config.mesh.tensor=2"))):
        workdir = tmp_path / str(devices)
        flags = f"--xla_force_host_platform_device_count={devices}"
        process = start(
            *("train", "--config=tiny", f"--workdir={workdir}", "--config.train.steps=20"),
            *("--config.data.validation=", "--config.model.compute_dtype=float32", *mesh),
            XLA_FLAGS=flags,
        )
        _, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        losses[devices] = _losses(workdir)
    for (step, one), (_, eight) in zip(losses[1], losses[8], strict=True):
        assert abs(one - eight) < 1e-4, step
