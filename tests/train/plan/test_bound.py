"""Bounds of small programs, counted by hand."""

import dataclasses
import pathlib
import runpy

import pytest

import puna
from puna.configs import schema
from puna.models import hardware
from puna.train.metrics import flops_per_token
from puna.train.plan import bound

ROOT = pathlib.Path(__file__).parents[3]
V5P, H100 = hardware.CHIPS["v5p"], hardware.CHIPS["h100"]
WANTED = ["mesh.data=1", "train.batch_size=64", "model.tie_embeddings=False"]


def config(*overrides, remat="none"):
    keys = [*WANTED, f"model.remat={remat}", *overrides]
    return schema.from_dict(puna.get_config("tiny", keys))


ONE = config("mesh.fsdp=4")
TOKENS = 64 * ONE.data.seq_len / 4  # of a device
HEAD = 6 * ONE.model.vocab_size * ONE.model.embed_dim


def test_products_take_their_flops_and_what_is_computed_again():
    slow = V5P._replace(flops=1e9)
    all_of_it = flops_per_token(ONE.model, ONE.data.seq_len) * TOKENS
    assert bound.least(ONE, "v5p-8", slow).seconds == pytest.approx(all_of_it / 1e9)
    # The logits are not part of a layer, hence not computed again with it.
    full = bound.least(config("mesh.fsdp=4", remat="full"), "v5p-8", slow).seconds
    assert full == pytest.approx((all_of_it + (all_of_it - HEAD * TOKENS) / 3) / 1e9)
    dots = bound.least(config("mesh.fsdp=4", remat="dots"), "v5p-8", slow).seconds
    assert all_of_it / 1e9 < dots < full
    half = bound.Manner(again=(0.5, 0.0))
    some = bound.least(config("mesh.fsdp=4", remat="full"), "v5p-8", slow, half).seconds
    assert all_of_it / 1e9 < some < full


def test_what_was_measured_counts_before_the_peak():
    assert H100.products == 794.5e12 < H100.flops and H100.float8_products == 1550e12
    assert V5P.products == V5P.float8_products == V5P.flops
    assert hardware.CHIPS["v6e"].float8_products == hardware.CHIPS["v6e"].products
    for chip in hardware.CHIPS.values():
        if found := chip.attainable:
            assert 0 < found.bfloat16 <= chip.flops and found.float8 <= 2 * chip.flops
            assert found.source and len(found.date.split("-")) == 3


def test_float8_is_for_linear_layers_alone():
    reached = hardware.Attainable(1e9, 2e9, "test", "2025-01-01")
    slow = H100._replace(attainable=reached)
    plain = bound.least(ONE, "h100-4", slow).products
    eight = bound.least(ONE, "h100-4", slow, bound.Manner(float8=True)).products
    rest = flops_per_token(ONE.model, 0) - HEAD  # without attention, which grows with length
    assert plain - eight == pytest.approx(rest * TOKENS / 2e9)


def test_kernels_beside_products_take_their_traffic():
    chip = H100._replace(memory_bandwidth=1e9)
    m = ONE.model
    found = bound.least(ONE, "h100-4", chip, bound.Manner(passes=bound.FUSED)).passes
    width = 32 * m.embed_dim + 8 * (m.num_heads + m.num_kv_heads) * m.head_dim + 16 * m.mlp_dim
    moved = (m.num_layers * width + 6 * m.vocab_size) * TOKENS
    update = 28 * sum(leaf.value.size for leaf in bound.parameters(m)) / 4
    assert found == pytest.approx((moved + update) / 1e9)
    assert bound.least(ONE, "h100-4", chip, bound.Manner(passes=bound.EAGER)).passes > 1.5 * found
    cast = bound.Manner(passes=bound.FUSED, float8=True)
    assert bound.least(ONE, "h100-4", chip, cast).passes > found
    assert bound.least(ONE, "h100-4", chip).passes == 0


def test_collectives_go_on_beside_products_unless_they_are_waited_for():
    near, far = (
        bound.least(ONE, "v5p-8", V5P._replace(flops=1e30, link=link)) for link in (2e9, 1e9)
    )
    assert far.seconds == pytest.approx(2 * near.seconds) and near.seconds == near.beside > 0
    two = config("mesh.fsdp=2", "mesh.tensor=2")
    chip = H100._replace(link=1e9)
    beside = bound.least(two, "h100-4", chip)
    waits = bound.least(two, "h100-4", chip, bound.Manner(waits=True))
    # 8 passes over a device's tokens of the residual, half of which it has.
    sent = 8 * two.model.num_layers * 2 * TOKENS * two.model.embed_dim * 2 / 2
    assert waits.waiting == pytest.approx(sent / 1e9)
    assert beside.beside == pytest.approx(waits.beside + waits.waiting) and not beside.waiting


def test_a_pipeline_is_idle_while_it_fills_and_empties():
    plain = bound.least(ONE, "h100-4", H100)
    slow = bound.Manner(stages=4, microbatches=4)
    assert bound.least(ONE, "h100-4", H100, slow).idle == 3 / 4 and plain.idle == 0
    assert bound.least(ONE, "h100-4", H100, dataclasses.replace(slow, chunks=3)).idle == 1 / 4


@pytest.mark.slow  # 25 bounds
def test_no_published_speed_is_above_its_bound_and_most_are_above_half():
    rows = runpy.run_path(str(ROOT / "benchmarks" / "published_rows.py"))
    shares = {
        (row.source, row.model, row.topology, row.speed): row.speed / rows["most"](row)
        for row in rows["ROWS"]
    }
    assert len(shares) == len(rows["ROWS"]) == 35 and max(shares.values()) <= 1
    below = sorted(key[1] for key, share in shares.items() if share < 0.5)
    assert below == [
        "DeepSeek-V3, fp8", "GPT-OSS 120B", "Qwen3 30B-A3B, fp8, dropless",
        "Qwen3 30B-A3B, fp8, dropping", "the same, asynchronous tensor",
    ]  # fmt: skip
