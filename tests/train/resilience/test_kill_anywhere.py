"""SIGKILL at random moments changes nothing; `benchmarks/kill_anywhere.py` does more of it."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

BENCHMARK = pathlib.Path(__file__).resolve().parents[3] / "benchmarks" / "kill_anywhere.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [["--kills=5", "--steps=24"], ["--kills=2", "--steps=24", "--processes=2", "--experts=4"]],
)
def test_a_run_that_is_killed_again_and_again(arguments):
    done = subprocess.run(
        [sys.executable, BENCHMARK, *arguments], env={**os.environ, "XLA_FLAGS": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["bit_identical"] and found["same"] == found["kills"] > 0 and not found["set_aside"]
