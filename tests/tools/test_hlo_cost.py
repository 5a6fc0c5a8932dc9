"""Costs read off executables: against closed forms and texts of HLO."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bcm_jax.tools import hlo_cost

F32 = 4


def shapes(*dims):
  return [jax.ShapeDtypeStruct(d, jnp.float32) for d in dims]


def test_a_dense_layer_and_its_gradients_are_six_times_weights_and_examples():
  def loss(w, x):
    return jnp.sum(jnp.tanh(x @ w[0]) @ w[1])

  w, x = shapes((8, 16), (16, 4)), shapes((32, 8))[0]
  forward = 2 * 32 * (8 * 16 + 16 * 4)
  assert hlo_cost.count_flops(loss, w, x) == forward
  # Gradients by weights of both layers, by inputs of the second alone.
  gradients = forward + 2 * 32 * 16 * 4
  assert hlo_cost.count_flops(jax.grad(loss), w, x) == forward + gradients


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_and_its_gradients_count_alike(stride):
  def conv(k, x):
    return jax.lax.conv_general_dilated(
        x, k, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO",
                                                           "NHWC"))

  k, x = shapes((3, 3, 4, 6), (2, 8, 8, 4))
  out = 2 * (8 // stride) ** 2 * 6
  forward = 2 * out * 9 * 4
  assert hlo_cost.count_flops(conv, k, x) == forward
  both = jax.grad(lambda k, x: jnp.sum(conv(k, x) ** 2), (0, 1))
  assert hlo_cost.count_flops(both, k, x) == pytest.approx(
      3 * forward, rel=0.35 if stride > 1 else 1e-12
  )


def test_loops_count_as_often_as_they_run():
  def scanned(x):
    return jax.lax.scan(lambda y, _: (y @ y, None), x, length=5)[0]

  (x,) = shapes((4, 4))
  assert hlo_cost.count_flops(scanned, x) == 5 * 2 * 4**3
  assert hlo_cost.count_flops(jax.jit(scanned), x) == 5 * 2 * 4**3


def test_flops_agree_with_xla_where_there_is_no_padding():
  def f(a, b):
    return jnp.sum(jnp.einsum("bij,bjk->bik", a, b))

  a, b = shapes((3, 32, 16), (3, 16, 64))
  compiled = jax.jit(f).lower(a, b).compile()
  ours = hlo_cost.count_flops(f, a, b)
  assert ours == 2 * 3 * 32 * 16 * 64
  assert hlo_cost.cost(compiled).flops == pytest.approx(ours, rel=0.05)


def test_memory_of_an_executable_and_donation():
  x = shapes((256, 256))[0]
  plain = hlo_cost.cost(jax.jit(lambda x: x + 1).lower(x).compile())
  given = hlo_cost.cost(
      jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile()
  )
  assert plain.arguments == plain.outputs == 256 * 256 * F32
  assert given.aliased == 256 * 256 * F32
  assert plain.peak - given.peak == 256 * 256 * F32
  assert plain.bytes_moved == 2 * 256 * 256 * F32


def test_collectives_of_a_sharded_sum():
  mesh = jax.make_mesh((4,), ("d",), devices=jax.devices()[:4])
  cut = jax.NamedSharding(mesh, jax.P("d"))
  x = jax.ShapeDtypeStruct((8, 100), jnp.float32, sharding=cut)
  compiled = jax.jit(lambda x: jnp.sum(x, axis=0)).lower(x).compile()
  assert hlo_cost.cost(compiled).collectives == {"all-reduce": (1, 400)}


HLO = """HloModule jit_step

%fused_computation (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %big = f32[1000]{0} broadcast(%p), dimensions={}
}

%yes (q: f32[100]) -> f32[100] {
  %q = f32[100]{0} parameter(0)
  ROOT %double = f32[100]{0} add(%q, %q)
}

%no (r: f32[100]) -> f32[100] {
  ROOT %r = f32[100]{0} parameter(0)
}

ENTRY %main (a: f32[100], b: bf16[4,8]) -> f32[100] {
  %a = f32[100]{0:T(128)} parameter(0)
  %b = bf16[4,8]{1,0} parameter(1)
  %pred = pred[] constant(true)
  %near = f32[100]{0:T(128)S(1)} fusion(%a), kind=kLoop, calls=%x
  %far = f32[100]{0:T(128)} fusion(%near, %a), kind=kLoop, calls=%x
  %ahead = (f32[100]{0:T(128)S(1)}, f32[100]{0:T(128)}, u32[]{:S(2)}) \
copy-start(%far), metadata={}
  %there = f32[100]{0:T(128)S(1)} copy-done(%ahead)
  %part = ((f32[100]{0:T(128)}), f32[10]{0:T(128)S(1)}, s32[]{:S(2)}) \
slice-start(%far), slice={[0:10]}
  %sum = (f32[100]{0}, bf16[4,8]{1,0}) all-reduce(%a, %b), to_apply=%add
  %gather = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%b), dim=0
  %end = bf16[16,8]{1,0} all-gather-done(%gather)
  ROOT %c = f32[100]{0} conditional(%pred, %a, %a), \
true_computation=%yes, false_computation=%no
}
"""


def test_bytes_moved_leave_out_fast_memory_and_fused_parts():
  by_line = {
      "near": 400,  # Reads a; its result stays in fast memory.
      "far": 400 + 400,
      "ahead": 400,  # Reads far; nothing is counted when it is done.
      "part": 40,
      "sum": 400 + 64 + 400 + 64,
      "gather": 64 + 64 + 256,
      "branch": 400 + 400 + 400,
  }
  assert hlo_cost.bytes_moved(HLO) == sum(by_line.values())


def test_collectives_are_counted_by_the_size_of_their_results():
  assert hlo_cost.collectives(HLO) == {
      "all-reduce": (1, 400 + 64), "all-gather": (1, 256),
  }


def test_sizes_of_small_types():
  text = "  %x = (pred[8]{0}, s8[3]{0}, f8e4m3fn[5]{0}) all-reduce(%y)"
  assert hlo_cost.collectives(text) == {"all-reduce": (1, 8 + 3 + 5)}
  assert np.dtype(np.float32).itemsize == F32
