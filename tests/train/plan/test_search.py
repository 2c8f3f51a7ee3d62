"""The search's logic, with a compiler that is none."""

import dataclasses
import functools
import threading

import pytest

import puna
from puna.configs import schema
from puna.configs.errors import UserError
from puna.models.parallel import sharding
from puna.train import ahead, plan
from puna.train.plan import search
from puna.train.plan.figures import Figure

TINY = ["train.batch_size=32", "optimizer.name=adamw"]
CONFIG = schema.from_dict(puna.get_config("llama4:scout-tiny", TINY))
TOPOLOGY = "v5e-8"


def compiler(needs, asked=None, seconds=lambda config: 1.0):
    def compile(config, topology, left):
        if asked is not None:
            asked.append(config)
        found = {"memory": {"peak": Figure(needs(config), "bytes", "compiled")}}
        return found | {"time": {"step_time": Figure(seconds(config), "s", "modelled")}}

    return compile


def test_candidates_are_possible_and_count_their_state_exactly():
    found = search.candidates(CONFIG, TOPOLOGY)
    assert len(found) == len(set(found)) > 20
    assert found == search.candidates(CONFIG, TOPOLOGY)
    assert {c.remat for c in found} == {"none", "dots", "full"}
    assert any(dict(c.mesh).get("expert", 1) > 1 for c in found)
    for c in found[::7]:
        config = c.apply(CONFIG)
        mesh = sharding.abstract_mesh(config.mesh, 8)
        state, _ = ahead.abstract_inputs(config, mesh)  # raises where the batch does not divide
        held = sharding.bytes_per_device((state.params, state.opt_state))
        gradient = sharding.bytes_per_device(state.params) * (2 if c.microbatches > 1 else 1)
        assert c.state == pytest.approx(held + gradient, rel=0.01)


def test_flags_are_the_candidate():
    c = search.candidates(CONFIG, TOPOLOGY)[5]
    overrides = [flag.removeprefix("--config.") for flag in c.flags.split()]
    asked = schema.from_dict(puna.get_config("llama4:scout-tiny", [*TINY, *overrides]))
    assert asked == c.apply(CONFIG)


def test_stops_after_enough_that_fit_and_puts_the_fastest_first():
    asked = []
    order = iter([3.0, 1.0, 2.0])
    found = search.search(
        CONFIG, TOPOLOGY, 2**40, budget=60,
        compiler=compiler(lambda c: 2**30, asked, lambda c: next(order)),
    )  # fmt: skip
    assert len(asked) == 3 and [c.step for c in found[:3]] == [1, 2, 3]
    assert all(not c.peak for c in found[3:])
    assert len(found) == len(search.candidates(CONFIG, TOPOLOGY))


def test_what_the_compiler_says_corrects_the_arithmetic():
    """Activations are ten times what the formula has: candidates that then cannot fit are left."""
    known = {c.flags: c for c in search.candidates(CONFIG, TOPOLOGY)}
    by_config = {c.apply(CONFIG): c for c in known.values()}
    limit = sorted(c.state + 10 * c.activations for c in known.values())[len(known) // 4]
    asked = []
    found = search.search(
        CONFIG, TOPOLOGY, limit, budget=60,
        compiler=compiler(
            lambda config: by_config[config].state + 10 * by_config[config].activations, asked
        ),
    )  # fmt: skip
    assert found[0].peak and found[0].peak <= limit
    assert len(asked) < 10


def test_compiles_run_at_one_time_and_find_the_same():
    both = threading.Barrier(2, timeout=60)
    plain = compiler(lambda config: 5)

    def together(config, topology, left):
        both.wait()  # fails unless another compiles meanwhile
        return plain(config, topology, left)

    search_of = functools.partial(search.search, CONFIG, TOPOLOGY, 10**12, budget=100, wanted=2)
    found = search_of(compiler=together, workers=4)  # no more than are wanted
    assert found == search_of(compiler=plain)
    assert sum(c.peak > 0 for c in found) == 2


def test_a_compile_that_takes_too_long_ends_the_search():
    lines = []
    found = search.search(
        CONFIG, TOPOLOGY, 2**40, budget=60, compiler=lambda *a: None, tell=lines.append
    )
    assert not any(c.peak for c in found) and lines[-1] == "no time left"
    assert "compiling --config.mesh" in lines[0]


def test_nothing_fits_is_one_line_with_the_nearest(monkeypatch):
    monkeypatch.setattr(plan.confirm, "confirm", compiler(lambda c: 10**14))
    with pytest.raises(UserError, match=r"nothing fits; the nearest, --config.mesh.* takes") as e:
        plan.plan(puna.get_config("llama4:scout-tiny", TINY), TOPOLOGY, search=True)
    assert "\n" not in str(e.value) and "takes 90.95 TiB of 15.75 GiB" in str(e.value)
    assert "(compiled); try a smaller model" in str(e.value)
    # Twice as many chips would do, of which a slice of v5e has 256.
    big = search.candidates(CONFIG, TOPOLOGY)[0]
    big = dataclasses.replace(big, state=2**35, activations=0, peak=2**35)
    for topology, more in ((TOPOLOGY, "try 32 devices"), ("v5e-256", "try devices with more")):
        monkeypatch.setattr(search, "search", lambda *a, **k: [big])
        with pytest.raises(UserError, match=more):
            plan.plan(puna.get_config("llama4:scout-tiny", TINY), topology, search=True)
    monkeypatch.undo()
    with pytest.raises(UserError, match="must be a multiple of some mesh of the 8 devices"):
        odd = puna.get_config("llama4:scout-tiny", ["train.batch_size=7"])
        plan.plan(odd, TOPOLOGY, search=True, compile=False)


def test_auto_is_the_cheapest_that_fits(monkeypatch):
    monkeypatch.setattr(plan, "_installed", lambda topology: topology.startswith("v"))
    monkeypatch.setattr(plan.confirm, "confirm", compiler(lambda c: 2**30))
    config = puna.get_config("llama4:scout-tiny", TINY)
    found = plan.plan(config, "auto")
    assert found.topology == "v5e-4" and found.fits and found.candidates  # 4.80 dollars an hour
    assert plan.plan(config, "v5p-auto").topology == "v5p-8"
    big = puna.get_config("llama3:3.1-8b", ["train.batch_size=8"])
    found = plan.plan(big, "auto", compile=False)
    # 128 GB of state and gradient do not go into 4 chips of 16 GB; by shapes the whole is a guess.
    assert found.fits is None
    assert ahead.count(found.topology) * ahead.memory_limit(found.topology) > 128e9
    with pytest.raises(UserError, match="must name one of"):
        plan.plan(config, "v9-auto")


def test_a_search_by_arithmetic_alone_puts_what_fits_first():
    limit = sorted(c.needs for c in search.candidates(CONFIG, TOPOLOGY))[10]
    found = search.search(CONFIG, TOPOLOGY, limit, budget=1)
    fits = [c.needs <= limit for c in found]
    assert fits[:10] == [True] * 10 and fits == sorted(fits, reverse=True)
    assert dataclasses.replace(found[0], refused=True) != found[0]
