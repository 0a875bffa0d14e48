"""Collectives read from the text of programs: one compiled here, and the spellings that TPU programs use."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from mllm4d_jax.parallel import collectives as hlo

# As TPU programs are written: loop limits as constants, one gather in two pieces, groups as axes of a mesh, a kernel
# whose text breaks lines and has brackets at their beginning.
TPU = """HloModule step, is_scheduled=true

%fused_a (p: bf16[2,64]) -> bf16[8,64] {
  %p = bf16[2,64]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %ag.1 = bf16[8,64]{1,0:T(8,128)} all-gather(%p), channel_id=7, replica_groups=GROUPS, metadata={op_name="dot"}
}

%fused_b (p: bf16[2,64]) -> bf16[8,64] {
  %p.1 = bf16[2,64]{1,0} parameter(0)
  ROOT %ag.2 = bf16[8,64]{1,0} all-gather(%p.1), channel_id=7, replica_groups=GROUPS, dimensions={0}
}

%cond (c: (s32[], bf16[2,64])) -> pred[] {
  %limit = s32[]{:T(128)} constant(10)
  %c = (s32[]{:T(128)}, bf16[2,64]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body (b: (s32[], bf16[2,64])) -> (s32[], bf16[2,64]) {
  %b = (s32[]{:T(128)}, bf16[2,64]{1,0}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%b), index=0
  %x = bf16[2,64]{1,0} get-tuple-element(%b), index=1
  %kernel = bf16[2,64]{1,0} custom-call(%x), frontend_attributes={kernel_metadata={
"block": 256
}}, metadata={op_name="jit(f)/kernel"}
  %fusion.1 = bf16[8,64]{1,0} fusion(%kernel), kind=kCustom, calls=%fused_a
  %fusion.2 = bf16[8,64]{1,0} fusion(%kernel), kind=kCustom, calls=%fused_b
  %send = (bf16[2,64]{1,0}, bf16[2,64]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%kernel), channel_id=8
  %sent = bf16[2,64]{1,0} collective-permute-done(%send)
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%j, %two)
  ROOT %out = (s32[]{:T(128)}, /*index=1*/bf16[2,64]{1,0}) tuple(%next, %sent)
}

ENTRY %main (q: bf16[2,64]) -> bf16[2,64] {
  %q = bf16[2,64]{1,0} parameter(0)
  %begin = s32[]{:T(128)} constant(4)
  %start = (s32[]{:T(128)}, bf16[2,64]{1,0}) tuple(%begin, %q)
  %while.1 = (s32[]{:T(128)}, bf16[2,64]{1,0}) while(%start), condition=%cond, body=%body
  %y = bf16[2,64]{1,0} get-tuple-element(%while.1), index=1
  %sum = (f32[4]{0}, f32[2,2]{1,0}) all-reduce(%y, %y), channel_id=9, replica_groups={{0,1,2,3},{4,5,6,7}}
  ROOT %part = bf16[1,64]{1,0} reduce-scatter(%y), channel_id=10, replica_groups=[4,2]<=[8], dimensions={0}
}
""".replace("GROUPS", "mesh['axis_0'=2,'axis_1'=4] {'axis_1'}")


def test_tpu_spellings():
    found = {c.kind: c for c in hlo.collectives(TPU)}
    assert len(hlo.collectives(TPU)) == 4
    gather = found["all-gather"]
    assert (gather.group, gather.times, gather.received) == (4, 3, 8 * 64 * 2 * 3 // 4)  # counter 4, 6, 8
    assert gather.source == "dot"
    assert found["collective-permute"].total == 3 * 2 * 64 * 2
    assert (found["all-reduce"].group, found["all-reduce"].received) == (4, 2 * 8 * 4 * 3 // 4)
    assert (found["reduce-scatter"].group, found["reduce-scatter"].received) == (2, 64 * 2)
    assert hlo.received_bytes(hlo.collectives(TPU)) == {kind: c.total for kind, c in found.items()}


def test_arrays_are_what_a_program_makes():
    made = list(hlo.arrays(TPU))
    assert ("custom-call", "bf16", (2, 64), 256) in made
    assert sum(dims == (8, 64) for _, _, dims, _ in made) == 2  # the fusions, not what is inside them
    assert not any(opcode in ("parameter", "get-tuple-element", "tuple") for opcode, *_ in made)


@pytest.mark.parametrize("length", [1, 5])
def test_a_compiled_program(length):
    """A scan whose body sums over one axis, gathers over the other and passes on in a ring."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("a", "b"))
    spec = PartitionSpec(("a", "b"))

    def local(x):
        def body(x, _):
            x = jax.lax.psum(x, "a") * 0.5
            whole = jax.lax.all_gather(x, "b", tiled=True)
            x = jnp.sin(whole).reshape(4, *x.shape).mean(0)
            return jax.lax.ppermute(x, "b", [(i, (i + 1) % 4) for i in range(4)]), None

        return jax.lax.scan(body, x, None, length=length)[0]

    program = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    text = program.lower(jax.ShapeDtypeStruct((64, 16), jnp.float32)).compile().as_text()
    piece = 8 * 16 * 4
    by_kind = hlo.received_bytes(hlo.collectives(text))
    assert by_kind["all-reduce"] == length * piece  # 2 (g - 1) / g of it, g = 2
    assert by_kind["all-gather"] == length * 3 * piece
    assert by_kind["collective-permute"] == length * piece


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 4),
        ("mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_0'}", 2),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("{{0,1,2,3},{4,5,6,7}}", 4),
    ],
)
def test_every_spelling_of_a_group_is_read(groups, devices):
    text = TPU.replace("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", groups)
    gather = next(c for c in hlo.collectives(text) if c.kind == "all-gather")
    assert gather.group == devices and gather.received == 8 * 64 * 2 * (devices - 1) // devices


def test_a_spelling_that_is_not_known_is_no_group_of_one():
    with pytest.raises(ValueError, match="replica_groups=ring"):
        hlo.collectives(TPU.replace("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", "ring(8)"))
