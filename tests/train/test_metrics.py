"""Speed is that of steps alone, by a clock that only what is under test moves."""

import json
from itertools import count

import numpy as np
import pytest

from puna.configs import schema
from puna.train import loop, metrics
from puna.train.checkpoint import Checkpoints
from puna.train.data import make_train_loader
from puna.train.resilience.goodput import FILE, Ledger
from puna.train.resilience.replicas import check_replicas
from puna.train.step import make_train_step


class Clock:
    def __init__(self):
        self.time = 1000.0

    def __call__(self):
        return self.time


class Loss:
    """What a step gives: the first who asks waits for the device, which takes them in turn."""

    def __init__(self, clock, before):
        self.clock, self.before, self.seconds = clock, before, 1.5

    def block_until_ready(self):
        if self.before is not None:
            self.before.block_until_ready()
        self.clock.time += self.seconds
        self.seconds = 0.0

    def __array__(self, *_, **__):
        self.block_until_ready()
        return np.array(1.0)


def test_compiling_evaluating_and_saving_are_no_steps(config, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "peak_flops", lambda config: 1e6)
    config.train.log_every = 2
    c, clock = schema.from_dict(config), Clock()
    ledger = Ledger(tmp_path, clock)
    log = metrics.RunLog(c, tmp_path, 0, ledger)

    def batches():
        for i in count():
            clock.time += 0.5
            yield i

    with ledger.doing("compile"):
        clock.time += 100
    ledger.running()
    loader, loss = batches(), None
    for step in range(1, 7):
        log.fetch(loader)
        loss = Loss(clock, loss)
        log.dispatched(step, {"loss": loss})
        if step in (3, 6):
            log.wait()
            with ledger.doing("evaluation"):
                clock.time += 50
            log.add(step, {"validation_loss": 1.0})
        if step in (4, 6):
            log.flush(wanted=True)
            with ledger.doing("save"):
                clock.time += 30
    log.finish(6)
    records = metrics.read(tmp_path / "metrics.jsonl")
    assert [m["step"] for m in records] == [2, 3, 4, 6]
    # The next batch is read before a step's numbers are fetched, so a read falls to either record.
    seconds = [2.25, 2.0, 1.5, 2.0]
    for record, expected in zip(records, seconds, strict=True):
        assert record["step_seconds"] == pytest.approx(expected)
        assert record["tokens_per_second"] == pytest.approx(8 * 32 / expected)
        flops = metrics.flops_per_token(c.model, 32) * 8 * 32
        assert record["model_flops_utilisation"] == pytest.approx(flops / expected / 1e6)
    total = sum(s * n for s, n in zip(seconds, (2, 1, 1, 2), strict=True))
    assert total == 6 * (0.5 + 1.5)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["wall_seconds"] == clock.time - 1000 == 100 + 12 + 2 * 50 + 2 * 30
    assert results["step_seconds"] == pytest.approx(2.0)
    assert results["tokens_per_second"] == pytest.approx(128)


def test_the_loop_charges_each_time_to_what_it_is(config, tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(loop, "Ledger", lambda workdir, started: Ledger(workdir, clock))

    def slow(seconds, function):
        def call(*args, **kwargs):
            clock.time += seconds
            return function(*args, **kwargs)

        return call

    class Loader:
        def __init__(self, *args):
            self.inner = make_train_loader(*args)

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def __next__(self):
            clock.time += 1
            return next(self.inner)

    monkeypatch.setattr(loop, "make_train_loader", Loader)
    monkeypatch.setattr(loop, "make_train_step", slow(1e3, make_train_step))
    monkeypatch.setattr(loop, "check_replicas", slow(1e4, check_replicas))
    monkeypatch.setattr(Checkpoints, "save", slow(1e5, Checkpoints.save))
    config.train.check_replicas_every = 2
    loop.train(config, tmp_path, {"slow": slow(1e6, lambda *_: {"x": 1.0})})
    records = metrics.read(tmp_path / "metrics.jsonl")
    assert sum(m["step_seconds"] for m in records) == pytest.approx(6)
    assert max(m["step_seconds"] for m in records) == pytest.approx(2)
    seconds = json.loads((tmp_path / FILE).read_text())["seconds"]
    assert seconds == {
        "start_up": 1e3, "compile": 0.0, "input_wait": 6.0, "step": 0.0, "replica_check": 3e4,
        "save": 2e5, "evaluation": 2e6, "lost_to_failure": 0.0,
    }  # fmt: skip
