"""The ledger: every second is somewhere, across restarts."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.train.resilience.goodput import FILE, KINDS, Ledger, process_start


class Clock:
    def __init__(self):
        self.time = 1000.0

    def __call__(self):
        return self.time


def test_a_failure_costs_what_is_done_again_and_the_time_until_the_restart(tmp_path):
    clock = Clock()
    ledger = Ledger(tmp_path, clock, started=998.0)
    with ledger.doing("compile"):
        clock.time += 5
    ledger.running()
    clock.time += 10
    with ledger.doing("save"):
        ledger.saving(4)
        clock.time += 1
    clock.time += 7
    with ledger.doing("evaluation"):
        clock.time += 2
    ledger.write()  # the last sign of life
    clock.time += 30
    again = Ledger(tmp_path, clock)
    again.going_on_from(4)
    clock.time += 1
    again.running()
    clock.time += 7
    again.saving(8)
    report = again.write(finished=True)
    assert report["seconds"] == {
        "start_up": 3.0, "compile": 5.0, "input_wait": 0.0, "step": 17.0,
        "replica_check": 0.0, "save": 1.0, "evaluation": 2.0, "lost_to_failure": 37.0,
    }  # fmt: skip
    assert report["sessions"] == 2
    assert report["wall_seconds"] == clock.time - 998
    assert report["goodput"] == pytest.approx(17 / 65)
    # Going on after a finished session: the time between is nobody's.
    clock.time += 1000
    third = Ledger(tmp_path, clock)
    third.going_on_from(8)
    clock.time += 1
    assert third.write()["wall_seconds"] == 66


def test_a_session_that_is_killed_before_its_first_step_counts(tmp_path):
    clock = Clock()
    Ledger(tmp_path, clock, started=990.0)
    clock.time += 100
    report = Ledger(tmp_path, clock).write()
    assert report["sessions"] == 2 and report["first_start"] == 990
    assert report["seconds"]["lost_to_failure"] == 100
    assert report["wall_seconds"] == 110


def test_a_file_of_an_older_version_is_read(tmp_path):
    seconds = {"start-up": 1.0, "compile": 2.0, "input wait": 3.0, "step": 4.0, "save": 5.0}
    seconds |= {"evaluation": 6.0, "lost to failure": 7.0}
    old = {"goodput": 0.1, "wall_seconds": 28.0, "seconds": seconds, "sessions": 2}
    old |= {"first_start": 10.0, "last_sign": 990.0, "marks": {"4": 3.5}, "finished": False}
    (tmp_path / FILE).write_text(json.dumps(old))
    ledger = Ledger(tmp_path, Clock())
    ledger.going_on_from(4)
    report = ledger.write()
    assert report["seconds"] == {
        "start_up": 1.0, "compile": 2.0, "input_wait": 3.0, "step": 3.5,
        "replica_check": 0.0, "save": 5.0, "evaluation": 6.0, "lost_to_failure": 17.5,
    }  # fmt: skip
    assert (report["sessions"], report["first_start"]) == (3, 10.0)
    assert all(kind.isidentifier() for kind in json.loads((tmp_path / FILE).read_text())["seconds"])


@given(
    st.lists(st.tuples(st.sampled_from((*KINDS, "saved", "crash")), st.floats(0, 99)), max_size=30)
)
def test_nothing_is_counted_twice_or_not_at_all(tmp_path_factory, events):
    folder, clock = tmp_path_factory.mktemp("run"), Clock()
    ledger = Ledger(folder, clock)
    ledger.running()
    for kind, seconds in events:
        if kind == "saved":
            ledger.saving(int(seconds))
        elif kind == "crash":
            ledger.write()
            clock.time += seconds
            ledger = Ledger(folder, clock)
            ledger.going_on_from(int(seconds))
            ledger.running()
        else:
            with ledger.doing(kind):
                clock.time += seconds
    report = ledger.write()
    assert report["wall_seconds"] == pytest.approx(clock.time - 1000, abs=1e-6)
    assert all(v >= -1e-6 for v in report["seconds"].values())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"last_sign": "x"}',
        '{"last_sign": 1, "marks": []}',
        "null",
        '{"last_sign": 1, "marks": {}, "seconds": [], "sessions": 1, "first_start": 1}',
    ],
)
def test_a_damaged_file_is_begun_anew(tmp_path, text):
    (tmp_path / FILE).write_text(text)
    assert Ledger(tmp_path, Clock()).write()["sessions"] == 1
    assert json.loads((tmp_path / FILE).read_text())["wall_seconds"] == 0


def test_the_start_of_this_process_is_in_the_past():
    import time

    start = process_start()
    assert start is None or 0 < time.time() - start < 24 * 3600
