"""A batch that makes the gradient useless: passed over, gone back from, or the end."""

import json
import shutil

import jax
import numpy as np
import pytest

from puna.configs import schema
from puna.configs.errors import UserError
from puna.train import loop, metrics
from puna.train.data import make_train_loader
from puna.train.optimizer import schedule
from puna.train.resilience.bad_steps import FILE

ROW = "3"


@pytest.fixture
def poisoned(monkeypatch):
    """One place in the data, not a number of batches read, gives weights that are not numbers."""

    class Loader:
        def __init__(self, *args):
            self.inner, scout = make_train_loader(*args), make_train_loader(*args)
            for _ in range(3):
                next(scout)
            self.place = scout.get_state()[ROW]  # where the fourth batch begins

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def __next__(self):
            here = self.inner.get_state()[ROW] == self.place
            batch = next(self.inner)
            if here:
                batch["weights_BT"] = np.full_like(batch["weights_BT"], np.nan)
            return batch

    monkeypatch.setattr(loop, "make_train_loader", Loader)


def finite(state):
    return all(np.all(np.isfinite(x)) for x in jax.tree.leaves(jax.tree.map(np.asarray, state)))


def records(workdir):
    return metrics.read(workdir / "metrics.jsonl")


def test_skipped(config, tmp_path, poisoned):
    state = loop.train(config, tmp_path)
    assert finite(state) and int(state.opt_state.bad) == 1
    found = records(tmp_path)
    bad = [m["step"] for m in found if m["loss"] is None]
    assert [m["step"] for m in found] == [1, 2, 3, 4, 5, 6] and bad == [4]
    # The rate that was applied, which is that of the step's number after a skipped step too.
    rates = [m["learning_rate"] for m in found]
    rate = schedule(schema.from_dict(config))
    assert rates == pytest.approx([float(rate(i)) for i in range(6)])
    (line,) = (tmp_path / FILE).read_text().splitlines()
    entry = json.loads(line)
    assert entry["step"] == 4 and entry["grad_norm"] == "nan"
    assert len(entry["rows"]) == 8 and entry["rows"][ROW].keys() >= {"document", "offset"}


def test_stopped(config, tmp_path, poisoned):
    config.train.bad_step = "stop"
    with pytest.raises(UserError, match="train.bad_step=stop: step . has a gradient norm of nan"):
        loop.train(config, tmp_path)
    # As the message says; what is saved is from before the bad step.
    config.train.bad_step = "skip"
    state = loop.train(config, tmp_path)
    assert finite(state) and int(state.step) == 6 and int(state.opt_state.bad) == 1


def test_gone_back_from(config, tmp_path, poisoned):
    """To the checkpoint, on with later data; and the same again after a crash."""
    config.train.update(bad_step="rewind", save_every=2)
    state = loop.train(config, tmp_path)
    assert finite(state) and int(state.step) == 6
    found = records(tmp_path)
    assert [m["step"] for m in found] == list(range(1, 7))
    assert all(np.isfinite(m["loss"]) for m in found)
    assert len((tmp_path / FILE).read_text().splitlines()) == 1
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    again = loop.train(config, tmp_path)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(x, y)


def test_no_end_of_going_back(config, tmp_path, monkeypatch):
    config.train.update(bad_step="rewind", save_every=2, spike_factor=1e-6, steps=40)
    with pytest.raises(UserError, match="rewinds to step 20 met a bad step each"):
        loop.train(config, tmp_path)
