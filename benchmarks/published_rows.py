"""Published training speeds beside puna's bound for the same work, none left out; docs/plan.md.

    python benchmarks/published_rows.py [--compile=v6e-256] [--json=FILE]

The bound is arithmetic (`search.least_seconds`): matrix products at the device's peak with what the
row recomputes, or collectives over all links at once, what takes longer. A row holds if what was
published lies between half of the bound and the bound. With `--compile` the bound of those rows is
the compiled program's. Where puna has no such model, its share of
the peak stands alone.
"""

import argparse
import dataclasses
import json
import pathlib

import puna
from puna.configs import schema
from puna.models import hardware
from puna.train import ahead
from puna.train.plan import search

FP8 = 1979e12  # FLOP/s of an H100, dense: NVIDIA's data sheet
TIERS = "MaxText, docs/reference/models/tiering.md"
OLD = "MaxText, README before 2025: causal attention counted in full"
TITAN = "torchtitan, benchmarks/llama3_h100_202412_torchtitan.md"
ASYNC = "torchtitan, benchmarks/asyncTP_llama3_h100_2025-06"
BRIDGE = "Megatron Bridge 25.11, docs/performance-summary.md"
BRIDGE_2 = "Megatron Bridge 26.02, docs/performance-summary-archive.md"
MIXTRAL = [
    "model.embed_dim=4096", "model.num_layers=32", "model.num_heads=32", "model.num_kv_heads=8",
    "model.mlp_dim=14336", "model.moe_interval=1", "model.num_experts=8",
    "model.experts_per_token=2", "model.expert_dim=14336", "model.shared_expert=False",
    "model.router=softmax",
]  # fmt: skip
MIXTRAL_LARGE = [
    *MIXTRAL[4:], "model.embed_dim=6144", "model.num_layers=56", "model.num_heads=48",
    "model.num_kv_heads=8", "model.mlp_dim=16384", "model.expert_dim=16384",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Row:
    """What somebody published.

    Attributes:
      source: where.
      model: and precision, if not bfloat16.
      topology: as of `puna plan`.
      speed: tokens a second and device; at most 1 = share of the peak instead.
      config: of puna; empty = it has none of these shapes.
      remat: what is recomputed.
      rows: of the batch a device.
      tensor: devices along it, the others along fsdp.
      overrides: of the config.
      peak: FLOP/s of the precision; 0 = of bfloat16.
    """

    source: str
    model: str
    topology: str
    speed: float
    config: str = ""
    remat: str = "full"
    rows: float = 2
    tensor: int = 1
    overrides: tuple[str, ...] = ()
    peak: float = 0


L3 = "llama3:3.1-"
MIX, MIX_LARGE = tuple(MIXTRAL), tuple(MIXTRAL_LARGE)
# Rows a device: of MaxText's benchmarks/maxtext_trillium_model_configs.py where it has them (the
# 70B on v5p and Mixtral 8x22B are taken as 2 and 8), of torchtitan's page, 2 for Megatron Bridge.
# torchtitan's pipeline of 8 is "fsdp" here. Its GPUs were limited to 500 W and have 2.4 TB/s.
ROWS = [
    Row(TIERS, "Llama 2 70B", "v5p-1024", 692, "llama2:70b"),
    Row(TIERS, "Llama 3.1 8B", "v6e-256", 7207, L3 + "8b", rows=4),
    Row(TIERS, "Llama 3.1 70B", "v6e-256", 960, L3 + "70b", rows=4),
    Row(TIERS, "Llama 2 70B", "v6e-256", 900, "llama2:70b"),
    Row(TIERS, "Llama 3.1 405B", "v6e-256", 123, L3 + "405b", rows=1, tensor=4),
    Row(TIERS, "Mixtral 8x7B", "v5p-256", 2909, "llama2:7b", rows=12, overrides=MIX),
    Row(TIERS, "Mixtral 8x7B", "v6e-256", 3899, "llama2:7b", rows=12, overrides=MIX),
    Row(TIERS, "Mixtral 8x22B", "v6e-256", 1326, "llama2:7b", rows=8, overrides=MIX_LARGE),
    Row(OLD, "32B to 1160B, the least", "v5p-256", 0.64),
    Row(OLD, "32B to 1160B, the most", "v5p-256", 0.71),
    Row(TITAN, "Llama 3.1 8B", "h100-8", 5762, L3 + "8b", "dots"),
    Row(TITAN, "Llama 3.1 8B, compiled", "h100-8", 6667, L3 + "8b", "dots"),
    Row(TITAN, "Llama 3.1 8B, compiled, fp8", "h100-8", 8532, L3 + "8b", "dots", peak=FP8),
    Row(TITAN, "Llama 3.1 8B", "h100-128", 5605, L3 + "8b", "dots"),
    Row(TITAN, "Llama 3.1 8B, compiled", "h100-128", 6514, L3 + "8b", "dots"),
    Row(TITAN, "Llama 3.1 8B, compiled, fp8", "h100-128", 8380, L3 + "8b", "dots", peak=FP8),
    Row(TITAN, "Llama 3.1 70B, fp8", "h100-256", 829, L3 + "70b", tensor=8, peak=FP8),
    Row(TITAN, "the same, asynchronous tensor", "h100-256", 876, L3 + "70b", tensor=8, peak=FP8),
    Row(TITAN, "Llama 3.1 405B, fp8, 1F1B", "h100-512", 100, L3 + "405b", "full", 0.5, 8, (), FP8),
    Row(TITAN, "the same, interleaved", "h100-512", 128, L3 + "405b", "full", 0.5, 8, (), FP8),
    Row(ASYNC, "Llama 3.1 70B", "h100-256", 597, L3 + "70b", tensor=8),
    Row(ASYNC, "the same, asynchronous tensor", "h100-256", 652, L3 + "70b", tensor=8),
    Row(ASYNC, "Llama 3.1 70B, fp8", "h100-256", 810, L3 + "70b", tensor=8, peak=FP8),
    Row(ASYNC, "the same, asynchronous tensor", "h100-256", 942, L3 + "70b", tensor=8, peak=FP8),
    Row(BRIDGE, "Llama 3.1 8B, fp8", "h100-8", 14451, L3 + "8b", "none", peak=FP8),
    Row(BRIDGE, "Llama 3.1 70B, fp8", "h100-64", 1602, L3 + "70b", "none", tensor=4, peak=FP8),
    Row(BRIDGE, "Llama 3.1 405B, fp8", "h100-1024", 292, L3 + "405b", "none", 1, 8, (), FP8),
    Row(BRIDGE_2, "Llama 3.1 70B, fp8", "h100-64", 1621, L3 + "70b", "none", tensor=4, peak=FP8),
    Row(BRIDGE_2, "Llama 3.1 405B, fp8", "h100-1024", 311, L3 + "405b", "none", 1, 8, (), FP8),
    Row(BRIDGE, "DeepSeek-V3, fp8", "h100-1024", 338e12 / FP8),
    Row(BRIDGE, "Qwen3 30B-A3B, fp8, dropless", "h100-16", 121e12 / FP8),
    Row(BRIDGE, "Qwen3 30B-A3B, fp8, dropping", "h100-16", 241e12 / FP8),
    Row(BRIDGE, "GPT-OSS 120B", "h100-64", 153e12 / 989e12),
    Row("Megatron, README", "GPT of 2B to 462B, the least", "h100-1024", 0.41),
    Row("Megatron, README", "GPT of 2B to 462B, the most", "h100-1024", 0.48),
]


def bound(row: Row, compiled: bool) -> float:
    """Tokens a second and device at most; 1 = the peak, where puna has no such model."""
    if not row.config:
        return 1.0
    kind, count = row.topology.split("-")[0], ahead.count(row.topology)
    overrides = [
        "mesh.data=1", f"mesh.fsdp={count // row.tensor}", f"mesh.tensor={row.tensor}",
        f"train.batch_size={int(row.rows * count)}", f"model.remat={row.remat}",
    ]  # fmt: skip
    config = puna.get_config(row.config, [*overrides, *row.overrides])
    if compiled:
        told = puna.plan(config, row.topology, budget_s=7200).sections["time_of_a_step"]
        return told["tokens_per_second"].value / count
    c, chip = schema.from_dict(config), hardware.CHIPS[kind]
    seconds = search.least_seconds(c, row.topology, chip._replace(flops=row.peak or chip.flops))
    return row.rows * c.data.seq_len / seconds


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description="Published speeds beside a bound for each.")
    parser.add_argument("--compile", default="", help="compile for topologies of this name")
    parser.add_argument("--json", type=pathlib.Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    print("| source | model | topology | recomputed | published | bound of | | ratio | holds |")
    print("|---|---|---|---|---|---|---|---|---|")
    found = []
    for row in ROWS:
        compiled = bool(row.config) and row.topology == arguments.compile and not row.peak
        most = bound(row, compiled)
        ratio, holds = row.speed / most, 0.5 <= row.speed / most <= 1
        origin = "program" if compiled else "arithmetic" if row.config else "peak"
        words = (row.source, row.model, row.topology, row.remat if row.config else "-")
        cells = [*words, _shown(row.speed), origin, _shown(most), f"{ratio:.2f}"]
        print(f"| {' | '.join(cells)} | {'yes' if holds else 'no'} |", flush=True)
        found.append(dataclasses.asdict(row) | {"bound": most, "ratio": ratio, "holds": holds})
    print(f"\n{sum(row['holds'] for row in found)} of {len(found)} hold")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


def _shown(speed):
    return f"{speed:,.0f} tokens/s" if speed > 1 else f"{speed:.0%} of the peak"


if __name__ == "__main__":
    main()
