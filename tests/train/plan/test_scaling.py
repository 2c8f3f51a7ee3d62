"""Scaling laws: published optima, and laws recovered from runs that follow them."""

import json

import numpy as np
import pytest

from puna import __main__ as cli
from puna.configs.errors import UserError
from puna.train.plan import budget, scaling

FACTS = budget.read_facts()
LAW = scaling.Law(1.7, 400, 0.34, 410, 0.28)


def runs(noise=0.0, law=LAW):
    rng = np.random.default_rng(0)
    return [
        scaling.Run(n, d, law.loss(n, d) * np.exp(noise * rng.normal()))
        for n in (1e6, 1e7, 1e8)
        for d in (2e7, 2e8, 2e9)
    ]


@pytest.mark.parametrize("experts", [0, 16, 128])
def test_no_other_size_is_better_at_the_same_flops(experts):
    for law in scaling.published(FACTS, experts).values():
        n, d = law.optimum(1e22)
        assert 6 * n * d == pytest.approx(1e22)
        for factor in (0.8, 1.25):
            assert law.loss(n * factor, d / factor) > law.loss(n, d)


def test_published_optima():
    laws = scaling.published(FACTS)
    # Chinchilla's budget: by the replication 20 tokens a parameter, as Chinchilla was trained.
    n, d = laws["besiroglu"].optimum(5.76e23)
    assert n == pytest.approx(70e9, rel=0.05) and d / n == pytest.approx(20, rel=0.1)
    assert {"hoffmann", "besiroglu"} == laws.keys()


def test_more_experts_are_better_at_the_same_active_size():
    losses = [scaling.published(FACTS, e)["experts"].loss(1e9, 1e11) for e in (1, 4, 16, 64)]
    assert losses == sorted(losses, reverse=True)


def test_a_law_is_recovered_exactly_and_with_noise_within_its_interval():
    law, _ = scaling.fit(runs(), resamples=1)
    assert law.floor == pytest.approx(LAW.floor, rel=0.01)
    assert law.alpha == pytest.approx(LAW.alpha, rel=0.02)
    assert law.optimum(1e20)[0] == pytest.approx(LAW.optimum(1e20)[0], rel=0.05)
    noisy, others = scaling.fit(runs(noise=3e-3), resamples=12)
    assert (noisy, others[:2]) == scaling.fit(runs(noise=3e-3), resamples=2)
    sizes = [other.optimum(1e20)[0] for other in others]
    assert min(sizes) < LAW.optimum(1e20)[0] < max(sizes)


def folders(path, found):
    for i, run in enumerate(found):
        folder = path / f"run{i}"
        folder.mkdir()
        results = {"parameters": run.parameters, "tokens": run.tokens}
        if i % 2:
            results["validation_loss"] = run.loss
        else:
            lines = [{"step": k, "loss": run.loss + (k < 18)} for k in range(20)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        (folder / "results.json").write_text(json.dumps(results))


def test_the_command_fits_runs(tmp_path, capsys, monkeypatch):
    full = scaling.fit
    monkeypatch.setattr(scaling, "fit", lambda runs: full(runs, resamples=5))
    folders(tmp_path, runs())
    cli._run(["plan", f"--fit={tmp_path}/run*", "--flops=1e20", f"--workdir={tmp_path}/out"])
    out = capsys.readouterr().out
    assert "90% from" in out and "alpha" in out
    written = json.loads((tmp_path / "out" / "results.json").read_text())["fit"]
    assert written["runs"]["value"] == 9
    assert written["parameters"]["value"] == pytest.approx(LAW.optimum(1e20)[0], rel=0.05)
    cli._run(["plan", "--flops=1e25", "--config=llama4:scout"])
    assert "Joint MoE" in capsys.readouterr().out


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match="nothing. names no folder"):
        cli._run(["plan", f"--fit={tmp_path}/nothing*"])
    with pytest.raises(UserError, match="3 different numbers of tokens"):
        scaling.fit([scaling.Run(n, 1e9, 3.0) for n in range(1, 8)])
    with pytest.raises(UserError, match="no finished run"):
        scaling.read_runs([tmp_path])
    folders(tmp_path, [scaling.Run(1e6, 0, 3.0)])
    with pytest.raises(UserError, match="more than 0"):
        scaling.read_runs([tmp_path / "run0"])
    with pytest.raises(UserError, match="--flops=-1"):
        cli._run(["plan", "--flops=-1"])
