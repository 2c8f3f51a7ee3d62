"""Published training speeds beside puna's bound for the same work, none left out; docs/plan.md.

    python benchmarks/published_rows.py [--compile="8B on v6e-256"] [--json=FILE]

The bound is arithmetic (`plan.bound`): products at what has been measured of the device, kernels
beside them, collectives that nothing overlaps, a pipeline's idle time. A row holds if what
was published lies between half of the bound and the bound. With `--compile` the bound of those rows
is the compiled program's, which `--json` keeps: a file that is there is read first. Where puna has
no such model, its share of the peak stands beside that of products.
"""

import argparse
import dataclasses
import json
import pathlib

import puna
from puna.configs import schema
from puna.models import hardware
from puna.train import ahead
from puna.train.plan import bound

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
      manner: what else is known of the program.
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
    manner: bound.Manner = bound.Manner()


# torchtitan's GPUs, by its pages: limited to 500 W, memory of 2.4 TB/s. What those reach is what
# torchao said of them at the commits that the pages name: of the peak of products 0.6 in December
# 2024, 0.78 in June 2025 (better software), of memory 0.92.
def _metas(share, date):
    reached = hardware.Attainable(share * 989e12, share * FP8, "torchao, roofline_utils.py", date)
    chip = hardware.CHIPS["h100"]
    return chip._replace(memory_bandwidth=0.92 * 2.4e12, attainable=reached)


METAS = {TITAN: _metas(0.6, "2024-12-23"), ASYNC: _metas(0.78, "2025-06-13")}
F8 = bound.Manner(float8=True)
# PyTorch's kernels stand between products; compiled, those of one place are one. torchtitan's
# selective recomputation keeps every second product and attention; its vanilla tensor parallelism
# waits for collectives; a pipeline has as many microbatches as stages unless told otherwise (one
# for each of 8 stages here), and twice the stages when interleaved.
COMPILED = bound.Manner(passes=bound.FUSED, again=(0.5, 0.0))
EAGER = dataclasses.replace(COMPILED, passes=bound.EAGER)
COMPILED_F8 = dataclasses.replace(COMPILED, float8=True)
ASYNC_TP = bound.Manner(passes=bound.FUSED)
TP = dataclasses.replace(ASYNC_TP, waits=True)
ASYNC_TP_F8, TP_F8 = (dataclasses.replace(x, float8=True) for x in (ASYNC_TP, TP))
PP_F8 = dataclasses.replace(ASYNC_TP_F8, stages=8, microbatches=8)
CHUNKS_F8 = dataclasses.replace(PP_F8, chunks=2)
# Megatron's tensor parallelism overlaps products; stages, microbatches, chunks by its page.
MEGATRON = bound.Manner(float8=True, passes=bound.FUSED)
MEGATRON_70B = dataclasses.replace(MEGATRON, stages=8, microbatches=64, chunks=5)
MEGATRON_405B = dataclasses.replace(MEGATRON, stages=8, microbatches=64, chunks=8)


L3 = "llama3:3.1-"
MIX, MIX_LARGE = tuple(MIXTRAL), tuple(MIXTRAL_LARGE)
# Rows a device: of MaxText's benchmarks/maxtext_trillium_model_configs.py where it has them (the
# 70B on v5p and Mixtral 8x22B are taken as 2 and 8), of torchtitan's page, 2 for Megatron Bridge.
# Stages of a pipeline are "fsdp" here.
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
    Row(TITAN, "Llama 3.1 8B", "h100-8", 5762, L3 + "8b", "dots", manner=EAGER),
    Row(TITAN, "Llama 3.1 8B, compiled", "h100-8", 6667, L3 + "8b", "dots", manner=COMPILED),
    Row(
        TITAN, "Llama 3.1 8B, compiled, fp8", "h100-8", 8532, L3 + "8b", "dots", manner=COMPILED_F8
    ),
    Row(TITAN, "Llama 3.1 8B", "h100-128", 5605, L3 + "8b", "dots", manner=EAGER),
    Row(TITAN, "Llama 3.1 8B, compiled", "h100-128", 6514, L3 + "8b", "dots", manner=COMPILED),
    Row(
        TITAN,
        "Llama 3.1 8B, compiled, fp8",
        "h100-128",
        8380,
        L3 + "8b",
        "dots",
        manner=COMPILED_F8,
    ),
    Row(TITAN, "Llama 3.1 70B, fp8", "h100-256", 829, L3 + "70b", tensor=8, manner=TP_F8),
    Row(
        TITAN,
        "the same, asynchronous tensor",
        "h100-256",
        876,
        L3 + "70b",
        tensor=8,
        manner=ASYNC_TP_F8,
    ),
    Row(
        TITAN, "Llama 3.1 405B, fp8, 1F1B", "h100-512", 100, L3 + "405b", "full", 0.5, 8, (), PP_F8
    ),
    Row(
        TITAN, "the same, interleaved", "h100-512", 128, L3 + "405b", "full", 0.5, 8, (), CHUNKS_F8
    ),
    Row(ASYNC, "Llama 3.1 70B", "h100-256", 597, L3 + "70b", tensor=8, manner=TP),
    Row(
        ASYNC,
        "the same, asynchronous tensor",
        "h100-256",
        652,
        L3 + "70b",
        tensor=8,
        manner=ASYNC_TP,
    ),
    Row(ASYNC, "Llama 3.1 70B, fp8", "h100-256", 810, L3 + "70b", tensor=8, manner=TP_F8),
    Row(
        ASYNC,
        "the same, asynchronous tensor",
        "h100-256",
        942,
        L3 + "70b",
        tensor=8,
        manner=ASYNC_TP_F8,
    ),
    Row(BRIDGE, "Llama 3.1 8B, fp8", "h100-8", 14451, L3 + "8b", "none", manner=MEGATRON),
    Row(
        BRIDGE,
        "Llama 3.1 70B, fp8",
        "h100-64",
        1602,
        L3 + "70b",
        "none",
        tensor=4,
        manner=MEGATRON_70B,
    ),
    Row(
        BRIDGE,
        "Llama 3.1 405B, fp8",
        "h100-1024",
        292,
        L3 + "405b",
        "none",
        0.5,
        8,
        (),
        MEGATRON_405B,
    ),
    Row(
        BRIDGE_2,
        "Llama 3.1 70B, fp8",
        "h100-64",
        1621,
        L3 + "70b",
        "none",
        tensor=4,
        manner=MEGATRON_70B,
    ),
    Row(
        BRIDGE_2,
        "Llama 3.1 405B, fp8",
        "h100-1024",
        311,
        L3 + "405b",
        "none",
        0.5,
        8,
        (),
        MEGATRON_405B,
    ),
    Row(BRIDGE, "DeepSeek-V3, fp8", "h100-1024", 338e12 / FP8, manner=F8),
    Row(BRIDGE, "Qwen3 30B-A3B, fp8, dropless", "h100-16", 121e12 / FP8, manner=F8),
    Row(BRIDGE, "Qwen3 30B-A3B, fp8, dropping", "h100-16", 241e12 / FP8, manner=F8),
    Row(BRIDGE, "GPT-OSS 120B", "h100-64", 153e12 / 989e12),
    Row("Megatron, README", "GPT of 2B to 462B, the least", "h100-1024", 0.41),
    Row("Megatron, README", "GPT of 2B to 462B, the most", "h100-1024", 0.48),
]


def most(row: Row) -> float:
    """Tokens a second and device at most, or the share of the peak where puna has no such model."""
    chip = METAS.get(row.source) or hardware.CHIPS[kind(row)]
    if not row.config:
        return chip.float8_products / FP8 if row.manner.float8 else chip.products / chip.flops
    config = schema.from_dict(settings(row))
    return (
        row.rows * config.data.seq_len / bound.least(config, row.topology, chip, row.manner).seconds
    )


def kind(row: Row) -> str:
    """Of device."""
    return row.topology.split("-")[0]


def settings(row: Row):
    """The config of a row."""
    count = ahead.count(row.topology)
    overrides = [
        "mesh.data=1", f"mesh.fsdp={count // row.tensor}", f"mesh.tensor={row.tensor}",
        f"train.batch_size={int(row.rows * count)}", f"model.remat={row.remat}",
    ]  # fmt: skip
    return puna.get_config(row.config, [*overrides, *row.overrides])


def compiled(row: Row) -> float:
    """The same of the compiled program."""
    told = puna.plan(settings(row), row.topology, budget_s=7200).sections["time_of_a_step"]
    return told["tokens_per_second"].value / ahead.count(row.topology)


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description="Published speeds beside a bound for each.")
    parser.add_argument("--compile", default="", help="compile rows with this in MODEL on TOPOLOGY")
    parser.add_argument("--json", type=pathlib.Path, help="read and write what rows came to")
    arguments = parser.parse_args()
    kept = {}
    if arguments.json and arguments.json.exists():
        rows = json.loads(arguments.json.read_text(encoding="utf-8"))
        kept = {_name(row): row["bound"] for row in rows if row["of"] == "program"}
    print("| source | model | topology | recomputed | published | bound of | | ratio | holds |")
    print("|---|---|---|---|---|---|---|---|---|")
    found = []
    for row in ROWS:
        name = _name(dataclasses.asdict(row))
        wanted = arguments.compile and arguments.compile in f"{row.model} on {row.topology}"
        wanted = wanted and row.config and not row.manner.float8
        if wanted and name not in kept:
            kept[name] = compiled(row)
        limit = kept.get(name) or most(row)
        ratio, holds = row.speed / limit, 0.5 <= row.speed / limit <= 1
        origin = "program" if name in kept else "arithmetic" if row.config else "products"
        words = (row.source, row.model, row.topology, row.remat if row.config else "-")
        cells = [*words, _shown(row.speed), origin, _shown(limit), f"{ratio:.2f}"]
        print(f"| {' | '.join(cells)} | {'yes' if holds else 'no'} |", flush=True)
        answer = {"of": origin, "bound": limit, "ratio": ratio, "holds": holds}
        found.append(dataclasses.asdict(row) | answer)
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(f"\n{sum(row['holds'] for row in found)} of {len(found)} hold")


def _name(row):
    return " ".join([row["source"], row["model"], row["topology"], str(row["speed"])])


def _shown(speed):
    return f"{speed:,.0f} tokens/s" if speed > 1 else f"{speed:.0%} of the peak"


if __name__ == "__main__":
    main()
