"""Tasks while a run trains: their numbers are those of `puna eval`, and training's are the same."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import puna
from puna import __main__ as cli
from puna.configs.errors import UserError
from puna.models.weights import run as weights_run
from puna.train import metrics

SETTINGS = (
    "model.vocab_size=264 model.embed_dim=16 model.num_layers=1 model.num_heads=2 "
    "model.num_kv_heads=2 model.head_dim=8 model.mlp_dim=16 model.compute_dtype=float32 "
    "data.tokenizer=bytes data.seq_len=32 data.validation= train.steps=5 train.save_every=2 "
    "train.keep=3 train.batch_size=8 train.log_every=1 optimizer.warmup_steps=1 "
    "optimizer.learning_rate=0.02"
).split()  # fmt: skip
# Compiled in half the time, as in this process.
QUICK = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
TASKS = {
    "t": 'kind = "choice"\ndata = "t.jsonl"\nprompt = "{{ q }}"\nchoices = ["x", "llama"]\n'
         'target = "{{ t }}"\n',
    "w": 'kind = "text"\ndata = "t.jsonl"\nprompt = "{{ q }} walks"\n',
    "g": 'kind = "generate"\nmetric = "contains"\ndata = "t.jsonl"\nprompt = "{{ q }}"\n'
         'target = "a"\nmax_tokens = 4\n',
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("during")
    (path / "a.txt").write_text("llama walks over the puna. " * 40)
    lines = [{"q": f"{'which one ' * i}the", "t": i % 2} for i in range(5)]
    (path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, text in TASKS.items():
        (path / f"{name}.toml").write_text(text)
    return path


def flags(folder, *more):
    asked = ",".join(str(folder / f"{name}.toml") for name in TASKS)
    keys = [*SETTINGS, f"data.train={folder}/a.txt", f"eval.tasks={asked}", "eval.tasks_every=2",
            *more]  # fmt: skip
    return ["train", "--config=tiny", *(f"--config.{key}" for key in keys)]


@pytest.fixture(scope="module")
def run(folder):
    cli._run([*flags(folder), f"--workdir={folder}/run"])
    return folder / "run"


def test_their_numbers_are_those_of_an_evaluation_and_training_is_the_same(folder, run):
    records = {r["step"]: r for r in metrics.read(run / "metrics.jsonl")}
    names = ["tasks_t_accuracy", "tasks_w_bits_per_byte", "tasks_g_contains"]
    assert [step for step, r in records.items() if names[0] in r] == [2, 4, 5]
    assert all(set(names) <= records[step].keys() for step in (2, 4, 5))
    assert json.loads((run / "results.json").read_text())[names[1]] == records[5][names[1]]
    tasks = ",".join(str(folder / f"{name}.toml") for name in TASKS)
    cli._run(["eval", f"--checkpoint={run}/checkpoints/4", f"--tasks={tasks}",
              f"--workdir={folder}/e", "--batch_size=16"])  # fmt: skip
    found = json.loads((folder / "e/results.json").read_text())["tasks"]
    for name in names:
        _, task, metric = name.split("_", 2)
        assert records[4][name] == pytest.approx(found[task][metric]["value"], rel=1e-5)
    [read] = weights_run.read_meta(run / "checkpoints/4")["provenance"]
    assert read == {"source": f"{folder}/a.txt", "licence": "unknown", "tokens": 4 * 8 * 33}
    # Without tasks: the same losses to the bit.
    config = puna.get_config("tiny", [*SETTINGS, f"data.train={folder}/a.txt"])
    puna.train(config, folder / "plain")
    plain = {r["step"]: r["loss"] for r in metrics.read(folder / "plain/metrics.jsonl")}
    assert plain == {step: r["loss"] for step, r in records.items()}


def test_what_was_saved_and_not_asked_is_asked_when_the_run_resumes(folder, run, monkeypatch):
    from puna.eval.tasks import during

    ask, calls = during.During.__call__, []

    def killed(self, model, params):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return ask(self, model, params)

    monkeypatch.setattr(during.During, "__call__", killed)
    with pytest.raises(KeyboardInterrupt):
        cli._run([*flags(folder), f"--workdir={folder}/parts"])
    cli._run([*flags(folder), f"--workdir={folder}/parts"])
    assert len(calls) == 4  # steps 2, 4, 4 again, 5
    whole, parts = (
        {r["step"]: {k: v for k, v in r.items() if k == "loss" or k.startswith("tasks_")}
         for r in metrics.read(path / "metrics.jsonl")}
        for path in (run, folder / "parts")
    )  # fmt: skip
    assert parts == whole


def test_mistakes_stop_a_run_before_its_first_step(folder):
    for key, reason in [
        ("eval.tasks=nothing", "eval.tasks=nothing is neither a packaged task"),
        (f"eval.tasks={folder}/no.toml", "no.toml: no such file"),
        ("eval.tasks=mmlu", "eval.tasks_dir of a run, says where data lie"),
    ]:
        with pytest.raises(UserError, match=reason):
            cli._run([*flags(folder, key), f"--workdir={folder}/none"])
    config = puna.get_config("tiny", [*SETTINGS, "eval.tasks=sums"])
    with pytest.raises(UserError, match="eval.tasks=sums needs tasks="):
        puna.train(config, folder / "none")
    assert not (folder / "none" / "checkpoints").exists()


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(folder, run):
    command = [sys.executable, "-m", "puna", "launch", "-n", "2", "--devices=2", "--"]
    done = subprocess.run(
        [*command, *flags(folder), f"--workdir={folder}/two"],
        env=os.environ | QUICK, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = (metrics.read(path / "metrics.jsonl")[-1] for path in (run, folder / "two"))
    names = [name for name in one if name.startswith("tasks_")]
    assert len(names) == 5
    np.testing.assert_allclose([two[n] for n in names], [one[n] for n in names], rtol=1e-4)


@pytest.mark.slow
def test_two_processes_evaluate_as_one(folder, run):
    tasks = ",".join(str(folder / f"{name}.toml") for name in TASKS)
    flags = ["eval", f"--checkpoint={run}", f"--tasks={tasks}", "--batch_size=4"]
    cli._run([*flags, f"--workdir={folder}/by_one"])
    command = [sys.executable, "-m", "puna", "launch", "-n", "2", "--devices=2", "--", *flags]
    done = subprocess.run(
        [*command, f"--workdir={folder}/by_two"],
        env=os.environ | QUICK, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = (
        [json.loads(line) for line in (folder / name / "samples.jsonl").read_text().splitlines()]
        for name in ("by_one", "by_two")
    )
    assert len(one) == len(two) == 15
    for a, b in zip(one, two, strict=True):
        assert (a["task"], a["document"], a["prompt"]) == (b["task"], b["document"], b["prompt"])
        np.testing.assert_allclose(
            list(a["scores"].values()), list(b["scores"].values()), rtol=1e-5
        )
        if a["task"] == "g":
            assert a["answer"] == b["answer"]
