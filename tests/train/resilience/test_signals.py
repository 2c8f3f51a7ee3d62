"""A run that is told to end saves first, and resumes as if it had not been interrupted."""

import json
import os
import signal

import numpy as np
import pytest

from puna.train import metrics
from puna.train.loop import train
from puna.train.resilience.signals import Interrupted


def untold(*_):
    return {"seen": 1.0}


@pytest.fixture(scope="module")
def whole(make_config, tmp_path_factory):
    """The records of a run that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    train(make_config(), folder, {"v": untold})
    return metrics.read(folder / "metrics.jsonl")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends(config, whole, tmp_path, number):
    config.train.update(save_every=100)
    before = signal.getsignal(number)

    def told(*_):
        os.kill(os.getpid(), number)
        return {"seen": 1.0}

    with pytest.raises(Interrupted, match="ended after step 4; the same command resumes"):
        train(config, tmp_path / "cut", {"v": told})
    assert signal.getsignal(number) is before
    assert [p.name for p in (tmp_path / "cut" / "checkpoints").iterdir()] == ["4"]
    results = json.loads((tmp_path / "cut" / "results.json").read_text())
    assert results["tokens"] == 4 * config.train.batch_size * config.data.seq_len
    train(config, tmp_path / "cut", {"v": untold})
    cut = metrics.read(tmp_path / "cut" / "metrics.jsonl")
    assert [m["step"] for m in cut] == [1, 2, 3, 4, 5, 6]
    np.testing.assert_array_equal([m["loss"] for m in cut], [m["loss"] for m in whole])
