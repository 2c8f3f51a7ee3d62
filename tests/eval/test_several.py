"""Several checkpoints: which a pattern names, one table, and no program compiled twice."""

import json

import pytest

import puna
from puna import __main__ as cli
from puna.configs.errors import UserError
from puna.eval import scoring, several
from puna.train import validation

SETTINGS = (
    "model.vocab_size=264 model.embed_dim=16 model.num_layers=1 model.num_heads=2 "
    "model.num_kv_heads=2 model.head_dim=8 model.mlp_dim=16 data.tokenizer=bytes data.seq_len=32 "
    "train.steps=10 train.save_every=1 train.keep=3 train.keep_every=2 train.batch_size=8 "
    "optimizer.warmup_steps=1"
).split()  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with the checkpoints of steps 2, 4, 6, 8, 9 and 10."""
    path = tmp_path_factory.mktemp("several")
    (path / "a.txt").write_text("llama walks over the puna. " * 40)
    config = puna.get_config("tiny", [*SETTINGS, f"data.train={path}/a.txt", "data.validation="])
    puna.train(config, path / "run")
    (path / "run" / "checkpoints" / "12").mkdir()  # that was not finished
    return path


def test_a_table_over_checkpoints_and_one_file(trained, capsys):
    flags = ["--config=tiny", f"--config.data.validation={trained}/a.txt",
             "--config.data.seq_len=32"]  # fmt: skip
    capsys.readouterr()
    before = validation._row_sums._cache_size()
    pattern = f"{trained}/run/checkpoints/*"
    cli._run(["eval", *flags, f"--checkpoint={pattern}"])
    assert validation._row_sums._cache_size() == before + 1
    rows = json.loads((trained / "run/eval/results.json").read_text())["checkpoints"]
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 9, 10]
    assert len({row["loss"] for row in rows}) == 6 and rows[0]["loss"] > rows[-1]["loss"]
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["checkpoint", "step", "loss"]
    assert lines[0].split()[:2] == ["run-2", "2"] and len(lines) == 7
    # The numbers of one alone.
    cli._run(["eval", *flags, f"--checkpoint={trained}/run/checkpoints/4",
              f"--workdir={trained}/alone"])  # fmt: skip
    alone = json.loads((trained / "alone/results.json").read_text())
    assert alone == {k: v for k, v in rows[1].items() if k != "step"}


def test_tasks_of_several(trained, capsys):
    (trained / "t.toml").write_text(
        'kind = "choice"\ndata = "t.jsonl"\nprompt = "{{ q }}"\nchoices = ["x", "llama"]\n'
        'target = "1"\n'
    )
    (trained / "t.jsonl").write_text('{"q": "which"}\n{"q": "who"}\n')
    runs = [f"--checkpoint={trained}/run/checkpoints/[24]", f"--checkpoint={trained}/run"]
    before = scoring._predict._cache_size()
    cli._run(["eval", *runs, f"--tasks={trained}/t.toml", f"--workdir={trained}/out"])
    first = scoring._predict._cache_size() - before
    rows = json.loads((trained / "out/results.json").read_text())["checkpoints"]
    assert [row["step"] for row in rows] == [2, 4, 10]
    assert all(row["tasks"]["t"]["accuracy"]["documents"] == 2 for row in rows)
    assert {p.name for p in (trained / "out").iterdir() if p.is_dir()} == {"run-2", "run-4", "run"}
    assert (trained / "out/run-4/report.html").exists()
    assert capsys.readouterr().out.splitlines()[-5].split() == ["checkpoint", "step", "t"]
    cli._run(["eval", runs[1], f"--tasks={trained}/t.toml", f"--workdir={trained}/alone2"])
    assert scoring._predict._cache_size() - before == first
    alone = json.loads((trained / "alone2/results.json").read_text())
    assert alone["tasks"] == rows[2]["tasks"]


def test_what_a_pattern_names(trained, tmp_path):
    run = trained / "run"
    assert several.expand([f"{trained}/*"]) == [run]
    assert several.expand([str(run), f"{run}/checkpoints/10", str(run)]) == [
        run, run / "checkpoints/10",
    ]  # fmt: skip
    with pytest.raises(UserError, match="matches no finished checkpoint and no model"):
        several.expand([f"{tmp_path}/*"])
    odd = tmp_path / "a[1]"
    odd.mkdir()
    assert several.expand([str(odd)]) == [odd]
    assert several.labels([run, run / "checkpoints/10", tmp_path / "x/run"]) == [
        "run", "run-10", "run.2",
    ]  # fmt: skip
    with pytest.raises(UserError, match="--replay takes one --checkpoint, not 2"):
        cli._run(["eval", f"--checkpoint={run}/checkpoints/[24]", "--replay=x"])
    with pytest.raises(UserError, match="--checkpoint is needed"):
        cli._run(["eval", "--tasks=sums"])
