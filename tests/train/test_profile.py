"""Traces of steps: what an operation is, where its time goes, and the files of a run."""

import gc
import gzip
import json

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

import puna
from puna.configs.errors import UserError
from puna.train import profile
from puna.train.plan.program import Program
from puna.train.resilience.mirror import Mirror


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """A program of a loop with products, and one of a sort; a trace of two calls of each."""
    # A trace holds every program of its process: after other tests, thousands.
    jax.clear_caches()
    gc.collect()

    def products(x):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ x), None), x, length=5)[0]

    x = jnp.ones((64, 64))
    programs = [jax.jit(f).lower(x).compile() for f in (products, jnp.sort)]
    folder = tmp_path_factory.mktemp("trace")
    with jax.profiler.trace(str(folder)):
        for compiled in programs * 2:
            compiled(x).block_until_ready()
    (file,) = folder.glob("plugins/profile/*/*.xplane.pb")
    return ProfileData.from_file(str(file)), [compiled.as_text() for compiled in programs]


def of(trace, text, steps=2):
    spent = profile.read(trace, text.split()[1].rstrip(","))
    return profile.summary(Program(text, 1), spent, steps, 1, seconds=1.0)


def test_each_program_has_its_own_operations_as_often_as_they_ran(traced):
    trace, (products, sort) = traced
    kinds = {row["kind"]: row for row in of(trace, products)["kinds"]}
    product = kinds["matrix product"]
    assert product["calls"] == 5 and "sort" not in kinds
    assert product["flops_per_second"] * product["seconds"] == pytest.approx(5 * 2 * 64**3)
    found = of(trace, sort)
    assert {row["kind"] for row in found["kinds"]} >= {"sort"}
    assert not any(row["kind"] == "matrix product" for row in found["kinds"])


def test_shares_add_up_and_no_loop_counts_beside_what_runs_in_it(traced):
    trace, (products, _) = traced
    found = of(trace, products)
    for rows in (found["kinds"], found["operations"]):
        assert sum(row["share"] for row in rows) == pytest.approx(1)
        assert sum(row["seconds"] for row in rows) == pytest.approx(found["operation_seconds"])
        assert rows == sorted(rows, key=lambda row: -row["share"])
    assert not any(row["name"].startswith(("while", "call")) for row in found["operations"])
    assert "unknown" not in {row["kind"] for row in found["kinds"]}
    assert found["step_seconds"] == 0.5
    shown = profile.table(found)
    assert "matrix product" in shown and "dot_general" in shown


HLO = """HloModule jit_step, is_scheduled=true

%inner (p: f32[8,8], q: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0} parameter(0)
  %q = f32[8,8]{1,0} parameter(1)
  ROOT %dot.1 = f32[8,8]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%outer (p.1: f32[8,8]) -> f32[8,8] {
  %p.1 = f32[8,8]{1,0} parameter(0)
  %nested = f32[8,8]{1,0} fusion(%p.1, %p.1), kind=kLoop, calls=%inner
  ROOT %tanh.1 = f32[8,8]{1,0} tanh(%nested)
}

%turn (p.2: f32[8,8]) -> f32[8,8] {
  %p.2 = f32[8,8]{1,0} parameter(0)
  ROOT %transpose.1 = f32[8,8]{1,0} transpose(%p.2), dimensions={1,0}
}

ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  %a = f32[8,8]{1,0} fusion(%x), kind=kOutput, calls=%outer, metadata={op_name="jit(step)/transpose(jvp(M))/while/body/layer_0/mlp/BF,FD->BD/dot_general"}
  %b = f32[8,8]{1,0} fusion(%a), kind=kLoop, calls=%turn
  %c = f32[8,8]{1,0} custom-call(%b, %b), custom_call_target="__cublas$gemm"
  %d = f32[8,8]{1,0} custom-call(%c), custom_call_target="tpu_custom_call"
  %e = f32[16,8]{1,0} all-gather(%d), replica_groups={{0,1}}, dimensions={0}
  %f = f32[8,8]{1,0} add(%d, %d)
  ROOT %g = f32[8,8]{1,0} copy(%f)
}
"""  # noqa: E501


def test_kinds_and_places():
    program = Program(HLO, 2)
    ops = {op.name: op for op in program.computations["main"]}
    kinds = {name: profile.kind(program, ops[name]) for name in "abcdefg"}
    assert kinds == {
        "a": "matrix product", "b": "copy", "c": "matrix product",
        "d": "kernel tpu_custom_call", "e": "all-gather", "f": "elementwise", "g": "copy",
    }  # fmt: skip
    assert profile.scope(ops["a"]) == "backward layer_0/mlp/BF,FD->BD/dot_general"
    assert profile.scope(ops["b"]) == ""


def config_of(folder, steps):
    text = folder / "data.txt"
    text.write_text("llamas walk over the puna. " * 300)
    config = puna.get_config("tiny")
    config.model.update(vocab_size=264, embed_dim=16, num_layers=2, num_heads=2, num_kv_heads=1,
                        head_dim=8, mlp_dim=24, compute_dtype="float32")  # fmt: skip
    config.data.update(train=str(text), validation="", seq_len=32, tokenizer="bytes")
    config.optimizer.update(warmup_steps=2)
    config.train.update(steps=steps, batch_size=8, save_every=3)
    return config


@pytest.mark.slow
def test_a_run_leaves_a_trace_and_learns_the_same(tmp_path, capsys):
    losses = []
    for name, steps in (("plain", 0), ("traced", 2)):
        puna.train(config_of(tmp_path, 6), tmp_path / name, profile=steps)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == losses[1]
    out = capsys.readouterr().out
    assert out.count("profile of 2 steps") == 1 and "matrix product" in out
    found = json.loads((tmp_path / "traced" / "profile.json").read_text())
    assert found["steps"] == 2 and found["devices"] == 8
    assert not (tmp_path / "plain" / "profile.json").exists()
    (folder,) = (tmp_path / "traced" / "profile").glob("plugins/profile/*")
    (perfetto,) = folder.glob("*.trace.json.gz")
    assert json.loads(gzip.decompress(perfetto.read_bytes()))["traceEvents"]
    (xprof,) = folder.glob("*.xplane.pb")
    planes = ProfileData.from_file(str(xprof)).planes
    events = [e.name for plane in planes for line in plane.lines for e in line.events]
    assert events.count("train") == 2
    with pytest.raises(UserError, match=r"^--profile=2 .* has 3 to go; raise train.steps"):
        puna.train(config_of(tmp_path, 9), tmp_path / "traced", profile=2)


def test_a_negative_number_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match="--profile=-1 must be"):
        profile.Profile(Mirror(tmp_path), -1)


def test_a_run_that_ends_while_it_is_traced_leaves_the_profiler_free(tmp_path):
    compiled = jax.jit(lambda state, batch: (state + batch, state)).lower(1.0, 2.0).compile()
    with pytest.raises(ZeroDivisionError), profile.Profile(Mirror(tmp_path), 9) as trace:
        step = trace.of(compiled)
        for _ in range(4):
            state, _ = step(1.0, 2.0)
        raise ZeroDivisionError
    assert float(state) == 3
    jax.profiler.start_trace(str(tmp_path / "other"))
    jax.profiler.stop_trace()
