"""FLOPs, bytes and trip counts read from HLO text, against arithmetic and real programs."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from puna.train.plan import timing
from puna.train.plan.program import Program, size

TEXT = """HloModule step, is_scheduled=true

%fused (p0: f32[8,4,16], p1: s32[]) -> f32[4,16] {
  %p0 = f32[8,4,16]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,4,16]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,4,16}
  ROOT %b = f32[4,16]{1,0} bitcast(%slice)
}

%scatter (x: f32[64]) -> f32[16] {
  %x = f32[64]{0} parameter(0)
  %all-reduce.1 = f32[64]{0} all-reduce(%x), replica_groups={{0,1,2,3}}, to_apply=%add
  %id = u32[] partition-id()
  ROOT %part = f32[16]{0} dynamic-slice(%all-reduce.1, %id), dynamic_slice_sizes={16}
}

%condition (c: (s32[], f32[8])) -> pred[] {
  %end = s32[]{:T(128)} constant(7)
  %c = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%i, %end), direction=LT
}

ENTRY %main (a: f32[8,4,16], n: s32[], w: f32[64]) -> f32[4,16] {
  %a = f32[8,4,16]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  %w = f32[64]{0} parameter(2)
  %loop = (s32[], f32[8]) while(%n), condition=%condition, body=%fused
  %kernel = f32[4,16]{1,0:T(8,128)S(1)} custom-call(%a), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"blocks":"{\\"q\\": 8}"
}}, backend_config={"x":1}
  %own = f32[16]{0} fusion(%w), kind=kCustom, calls=%scatter
  %told = f32[4,16]{1,0} fusion(%a, %n), kind=kLoop, calls=%fused, backend_config={"window_config":{"estimated_cycles":"500","cost_model_type":"COST_MODEL_TYPE_CLASSIC"}}
  ROOT %out = f32[4,16]{1,0} fusion(%a, %n), kind=kLoop, calls=%fused, backend_config={"window_config":{"estimated_cycles":"900","cost_model_type":"COST_MODEL_TYPE_INVALID"}}
}
"""  # noqa: E501


def ops(program):
    return {op.name: op for op in program.computations[program.entry]}


def test_a_slice_counts_as_what_it_takes_and_cycles_only_from_a_cost_model():
    program = Program(TEXT, 4)
    found = ops(program)
    # A slice of [4, 16] is read, the index, and the same written.
    assert program.cost(found["out"]).bytes == 4 * 16 * 4 * 2 + 4
    assert program.cost(found["out"]).cycles == 0
    assert program.cost(found["told"]).cycles == 500
    # What lies in a TPU's fast memory is no traffic.
    assert program.cost(found["kernel"]).bytes == 8 * 4 * 16 * 4
    assert program.trips(found["loop"]) == 7


def test_a_fused_reduce_scatter_is_one():
    program = Program(TEXT, 4)
    found = program.collective(ops(program)["own"])
    assert (found.kind, found.bytes, found.group) == ("reduce-scatter", 256, (0, 1, 2, 3))


@pytest.mark.parametrize(
    ("groups", "first"),
    [
        ("{{0,2},{1,3}}", (0, 2)),
        ("[2,4]<=[8]", (0, 1, 2, 3)),
        ("[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
        ("mesh['a'=4,'b'=2] {'a'}", (0, 2, 4, 6)),
        ("mesh['a'=4,'b'=2] {'a','b'}", tuple(range(8))),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", (0, 2, 4, 6)),
        ("mesh['a'=8] {'a':(2)2}", (0, 2)),
        ("{}", tuple(range(8))),
    ],
)
def test_the_devices_of_a_group(groups, first):
    text = f"ENTRY %m (x: f32[4]) -> f32[4] {{\n  %x = f32[4]{{0}} parameter(0)\n  ROOT %r = f32[4]{{0}} all-reduce(%x), replica_groups={groups}, to_apply=%add\n}}\n"  # noqa: E501
    program = Program(text, 8)
    assert program.collective(ops(program)["r"]).group == first


def test_sizes_of_types():
    assert size("(f32[2,3]{1,0}, bf16[4]{0}, pred[8]{0}, s4[3]{0}, token[])") == 24 + 8 + 8 + 1.5
    assert size("f32[4]{0:T(128)S(1)}") == 0


def flops(program, operations=None):
    total = 0.0
    for op in operations or program.computations[program.entry]:
        total += program.cost(op).flops
        if op.code == "while":
            total += program.trips(op) * flops(program, program.called(op, "body"))
        elif op.code == "call":
            total += flops(program, program.called(op, "to_apply"))
    return total


@pytest.mark.parametrize("layers", [3, 5])
def test_a_loop_counts_as_often_as_it_runs(layers):
    def f(x_BD, w_LDD):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x_BD, w_LDD)[0]

    shapes = (
        jax.ShapeDtypeStruct((32, 64), "float32"),
        jax.ShapeDtypeStruct((layers, 64, 64), "float32"),
    )
    compiled = jax.jit(f).lower(*shapes).compile()
    assert flops(Program(compiled.as_text(), 1)) == layers * 2 * 32 * 64 * 64


def test_flops_of_a_batched_product_and_of_a_padded_convolution():
    def product(a, b):
        return jnp.einsum("bij,bjk->bik", a, b)

    shapes = [jax.ShapeDtypeStruct(s, "float32") for s in ((3, 8, 16), (3, 16, 24))]
    compiled = jax.jit(product).lower(*shapes).compile()
    assert flops(Program(compiled.as_text(), 1)) == 2 * 3 * 8 * 16 * 24
    # A window of 3 on 8 positions with a border of 1: 3 * 8 - 2 pairs lie inside.
    text = """ENTRY %m (x: f32[2,8,5], k: f32[3,5,7]) -> f32[2,8,7] {
  %x = f32[2,8,5]{2,1,0} parameter(0)
  %k = f32[3,5,7]{2,1,0} parameter(1)
  ROOT %c = f32[2,8,7]{2,1,0} convolution(%x, %k), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f
}
"""
    assert flops(Program(text, 1)) == 2 * 2 * 5 * 7 * 22


def test_a_product_of_8_bits_counts_half():
    text = """ENTRY %m (a: KIND[4,8], b: OTHER[8,16]) -> f32[4,16] {
  %a = KIND[4,8]{1,0} parameter(0)
  %b = OTHER[8,16]{1,0} parameter(1)
  ROOT %y = f32[4,16]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
    whole = 2 * 4 * 8 * 16
    for kinds, wanted in (
        (("f8e5m2", "f8e4m3fn"), whole / 2),
        (("s8", "s8"), whole / 2),
        (("bf16", "s8"), whole),
    ):
        program = Program(text.replace("KIND", kinds[0]).replace("OTHER", kinds[1]), 1)
        assert flops(program) == wanted


def test_flops_of_attention_kernels():
    text = """ENTRY %m (x: f32[2]) -> f32[2] {
  %t = s8[1,8,8]{2,1,0} parameter(0)
  %q = bf16[32,8192,128]{2,1,0} parameter(1)
  %k = bf16[8,8192,128]{2,1,0} parameter(2)
  %splash_fwd.1 = bf16[32,8192,128]{2,1,0} custom-call(%t, %t, %q, %k, %k), custom_call_target="tpu_custom_call"
  %splash_mha_dkv.1 = bf16[32,8192,128]{2,1,0} custom-call(%t, %t, %q, %k, %k), custom_call_target="tpu_custom_call"
  ROOT %gmm.1 = bf16[8192,128]{1,0} custom-call(%q2, %w), custom_call_target="tpu_custom_call"
}
"""  # noqa: E501
    program = Program(text, 1)
    forward = 4 * 32 * 8192 * 8192 * 128 / 2
    found = ops(program)
    assert program.cost(found["splash_fwd.1"]).flops == forward
    assert program.cost(found["splash_mha_dkv.1"]).flops == 2.5 * forward


def test_flops_of_grouped_products_on_gpus():
    call = (
        'custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(step)/NAME/pallas_call"}'
    )
    text = """ENTRY %m (x: f32[2]) -> f32[2] {
  %n = s32[9]{0} parameter(0)
  %x = KIND[1024,128]{1,0} parameter(1)
  %w = KIND[4,128,256]{2,1,0} parameter(2)
  %g = bf16[1024,256]{1,0} parameter(3)
  %y = bf16[1024,256]{1,0} custom-call(%n, %n, %n, %x, %w), CALL_matmul
  ROOT %dw = f32[4,128,256]{2,1,0} custom-call(%n, %n, %x, %g), CALL_gradient
}
"""
    for name in ("matmul", "gradient"):
        text = text.replace(f"CALL_{name}", call.replace("NAME", f"grouped_{name}"))
    for kind, times in (("bf16", 1), ("f8e4m3fn", 0.5)):
        program = Program(text.replace("KIND", kind), 1)
        found = ops(program)
        assert program.cost(found["y"]).flops == times * 2 * 1024 * 128 * 256
        assert program.cost(found["dw"]).flops == 2 * 1024 * 128 * 256


FUSED = """HloModule step, is_scheduled=true

%begin (x: f32[64]) -> (f32[64], f32[256], u32[]) {
  %x = f32[64]{0} parameter(0)
  %g0 = f32[256]{0} all-gather(%x), channel_id=7, replica_groups=[1,4]<=[4], backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}
  ROOT %s = (f32[64]{0}, f32[256]{0}, u32[]{:S(2)}) custom-call(%g0), custom_call_target="AsyncCollectiveStart"
}

%slices (p: f32[32,8,8], i: s32[]) -> f32[8,8] {
  %p = f32[32,8,8]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %cut = f32[1,8,8]{2,1,0} dynamic-slice(%p, %i, %i, %i), dynamic_slice_sizes={1,8,8}
  ROOT %flat = f32[8,8]{1,0} bitcast(%cut)
}

%along (x1: f32[64], y1: f32[256], u1: u32[], p1: f32[32,8,8], i1: s32[]) -> (f32[8,8], f32[64], f32[256], u32[]) {
  %x1 = f32[64]{0} parameter(0)
  %y1 = f32[256]{0} parameter(1)
  %u1 = u32[]{:S(2)} parameter(2)
  %p1 = f32[32,8,8]{2,1,0} parameter(3)
  %i1 = s32[] parameter(4)
  %g1 = f32[256]{0} all-gather(%x1), channel_id=7, replica_groups=[1,4]<=[4], backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
  %one = f32[8,8]{1,0} fusion(%p1, %i1), kind=kLoop, calls=%slices
  %c = f32[8,8]{1,0} dot(%one, %one), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (f32[8,8]{1,0}, f32[64]{0}, f32[256]{0}, u32[]) tuple(%c, %x1, %g1, %u1)
}

%end (x2: f32[64], y2: f32[256], u2: u32[]) -> f32[256] {
  %x2 = f32[64]{0} parameter(0)
  %y2 = f32[256]{0} parameter(1)
  %u2 = u32[]{:S(2)} parameter(2)
  %g2 = f32[256]{0} all-gather(%x2), channel_id=7, replica_groups=[1,4]<=[4], backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
  ROOT %d = f32[256]{0} custom-call(%g2, %y2, %u2), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: f32[64], w: f32[32,8,8], n: s32[]) -> f32[256] {
  %a = f32[64]{0} parameter(0)
  %w = f32[32,8,8]{2,1,0} parameter(1)
  %n = s32[] parameter(2)
  %start = (f32[64]{0}, f32[256]{0}, u32[]{:S(2)}) fusion(%a), kind=kCustom, calls=%begin
  %x = f32[64]{0} get-tuple-element(%start), index=0
  %y = f32[256]{0} get-tuple-element(%start), index=1
  %u = u32[]{:S(2)} get-tuple-element(%start), index=2
  %work = (f32[8,8]{1,0}, f32[64]{0}, f32[256]{0}, u32[]{:S(2)}) fusion(%x, %y, %u, %w, %n), kind=kOutput, calls=%along
  %x3 = f32[64]{0} get-tuple-element(%work), index=1
  %y3 = f32[256]{0} get-tuple-element(%work), index=2
  %u3 = u32[]{:S(2)} get-tuple-element(%work), index=3
  ROOT %out = f32[256]{0} fusion(%x3, %y3, %u3), kind=kCustom, calls=%end
}
"""  # noqa: E501


def test_a_collective_that_goes_on_inside_fusions_is_one_and_asynchronous():
    program = Program(FUSED, 4)
    found = ops(program)
    assert [program.stage(found[name]) for name in ("start", "work", "out", "x")] == [
        ("start", "7"), ("beside", "7"), ("done", "7"), ("", "")
    ]  # fmt: skip
    # One slice of w is read, below a fusion in the fusion, the index, and the product written:
    # what is gathered meanwhile is no traffic of the product.
    assert program.cost(found["work"]).bytes == 8 * 8 * 4 * 2 + 4
    assert program.cost(found["work"]).flops == 2 * 8 * 8 * 8
    links = timing.Links(types.SimpleNamespace(axis_names=("fsdp",), devices=np.empty(4)), None)
    work = (8 * 8 * 4 * 2 + 4) / 1e9
    for seconds in (work / 2, 3 * work):
        links.seconds = lambda op, seconds=seconds: (op.bytes, seconds)
        times = timing.measure(program, links, timing.Rates(1e15, 1e9))
        assert (times.asynchronous, times.collectives, times.wire["fsdp"]) == (1, 1, 1024)
        assert times.seconds == pytest.approx(max(work, seconds))
        assert times.hidden["fsdp"] == pytest.approx(min(work, seconds))
