"""Meshes, rules, microbatches and calls: units of training/parallel.py."""

import itertools
import math
import random

import jax
from jax.sharding import PartitionSpec as P
import pytest

from bcm_jax import errors
from bcm_jax.training import sharding


@pytest.mark.parametrize("devices, fsdp, shape", [
    (1, 1, (1, 1)), (4, 1, (4, 1)), (4, 2, (2, 2)), (4, 4, (1, 4)),
    (4, 0, (1, 4)), (4, 3, (2, 2)), (4, 64, (1, 4)), (3, 2, (3, 1)),
    (2, 4, (1, 2)),
])
def test_the_mesh_takes_the_next_smaller_divisor(devices, fsdp, shape):
  mesh = sharding.make_mesh(jax.devices()[:devices], fsdp)
  assert dict(mesh.shape) == dict(zip(("data", "fsdp"), shape, strict=True))
  assert set(mesh.devices.flat) == set(jax.devices()[:devices])


def test_the_mesh_takes_all_devices():
  assert sharding.make_mesh().devices.size == jax.device_count()


@pytest.mark.parametrize("batch, devices", itertools.product(
    (8, 24, 96, 256), (1, 2, 8)
))
def test_microbatches_are_as_few_as_fit(batch, devices):
  assert sharding.microbatches(batch, devices, 0) == 1
  each = batch // devices
  for limit in (1, 2, 3, 5, 7, 16, 1000):
    found = sharding.microbatches(batch, devices, limit)
    assert each % found == 0 and each // found <= limit
    assert not any(
        each % m == 0 and each // m <= limit for m in range(1, found)
    )


def test_a_batch_that_cannot_be_cut_is_an_error():
  with pytest.raises(errors.UserError, match="expected a multiple of 3"):
    sharding.microbatches(16, 3, 0)


@pytest.mark.parametrize("text, pattern, spec", [
    ("replicate", "", "replicate"), ("fsdp", "", "fsdp"),
    ("label_emb=replicate", "label_emb", "replicate"),
    ("kernel$=fsdp", "kernel$", "fsdp"),
    ("kernel$=- - - fsdp", "kernel$", (None, None, None, "fsdp")),
    ("a=b=- data", "a=b", (None, "data")),
    ("bias=-", "bias", (None,)),
])
def test_rules_are_read(text, pattern, spec):
  assert sharding.parse_rules([text]) == (sharding.Rule(pattern, spec),)


@pytest.mark.parametrize("text", [
    "", "fsdb", "kernel", "kernel=", "kernel=x y", "=- fsdp", "- fsdp",
    "kernel=fsdp replicate", "kernel=- model",
])
def test_a_rule_that_means_nothing_is_an_error(text):
  with pytest.raises(errors.UserError, match="parallel.sharding: got"):
    sharding.parse_rules([text])


def test_a_pattern_that_is_none_is_an_error():
  with pytest.raises(errors.UserError, match="expected a regular"):
    sharding.parse_rules(["kernel(=fsdp"])


@pytest.fixture
def mesh():
  return sharding.make_mesh(jax.devices()[:4], 2)


def spec(mesh, rules, path="networks/student/params/a/kernel", shape=(3, 512)):
  return sharding.spec_of(sharding.parse_rules(rules), path, shape, mesh)


@pytest.mark.parametrize("shape, expected", [
    ((3, 3, 256, 512), P(None, None, None, "fsdp")),
    ((3, 3, 512, 256), P(None, None, "fsdp")),
    ((256, 256), P(None, "fsdp")),  # Of equal ones the last.
    ((257, 300), P(None, "fsdp")),  # The longest that divides evenly.
    ((257, 301), P()),
    ((2**14,), P("fsdp")),
    ((2**14 - 2,), P()),  # Too small to be worth it.
    ((), P()),
])
def test_fsdp_cuts_the_longest_axis(mesh, shape, expected):
  assert spec(mesh, ["fsdp"], shape=shape) == expected


def test_on_one_device_of_fsdp_nothing_is_cut():
  mesh = sharding.make_mesh(jax.devices()[:4], 1)
  assert spec(mesh, ["fsdp"], shape=(512, 512)) == P()


def test_the_first_rule_that_fits_counts(mesh):
  big = (512, 512)
  assert spec(mesh, [], shape=big) == P()
  assert spec(mesh, ["bias=fsdp"], shape=big) == P()
  assert spec(mesh, ["a/kernel=replicate", "fsdp"], shape=big) == P()
  assert spec(mesh, ["b/kernel=replicate", "fsdp"], shape=big) == P(
      None, "fsdp"
  )
  # A rule of other dimensions does not fit, and the next may.
  rules = ["kernel=- - fsdp", "kernel=fsdp -"]
  assert spec(mesh, rules, shape=(2, 4)) == P("fsdp")
  assert spec(mesh, rules, shape=(4, 2, 6)) == P(None, None, "fsdp")
  assert spec(mesh, rules, shape=(4,)) == P()


def test_an_uneven_cut_is_an_error(mesh):
  with pytest.raises(errors.UserError) as error:
    spec(mesh, ["kernel=fsdp -"], shape=(3, 4))
  for said in ("a/kernel", "[3, 4] by 2", "a divisor of 3"):
    assert said in str(error.value)


class Phases:
  """A method whose phases are letters of a text, over and over."""

  def __init__(self, letters):
    self.letters = letters

  def phase(self, step):
    return self.letters[step % len(self.letters)]


@pytest.mark.parametrize("seed", range(30))
def test_calls_cross_nothing_and_do_not_depend_on_where_they_begin(seed):
  draw = random.Random(seed)
  method = Phases("".join(draw.choices("AB", k=draw.randint(1, 6))))
  total, most = draw.randint(1, 60), draw.randint(1, 9)
  stops = tuple(draw.randint(1, 20) for _ in range(draw.randint(0, 2)))
  calls = sharding.calls(method, 0, total, most, stops)
  assert [s for first, n in calls for s in range(first, first + n)] == list(
      range(total)
  )
  for first, count in calls:
    assert count <= most
    inside = range(first + 1, first + count)
    assert not any(step % s == 0 for step in inside for s in (most, *stops))
    assert len({method.phase(s) for s in range(first, first + count)}) == 1
  for i, (first, _) in enumerate(calls):
    assert sharding.calls(method, first, total, most, stops) == calls[i:]


def test_calls_are_as_long_as_they_may_be():
  calls = sharding.calls(Phases("A"), 0, 10, 4, (6,))
  assert calls == [(0, 4), (4, 2), (6, 2), (8, 2)]
  assert sharding.calls(Phases("A"), 0, 4, 1, ()) == [(i, 1) for i in range(4)]
  assert sharding.calls(Phases("AAB"), 0, 6, 6, ()) == [
      (0, 2), (2, 1), (3, 2), (5, 1)
  ]
  assert sharding.calls(Phases("A"), 7, 7, 4, ()) == []


def test_curricula_are_stacked():
  class Ramp:
    def curriculum(self, step):
      return {"n": step, "table": [step, step + 1.0]}

  one = sharding.curricula(Ramp(), 3, 1)
  assert one["n"].shape == () and one["n"] == 3
  three = sharding.curricula(Ramp(), 3, 3)
  assert list(three["n"]) == [3, 4, 5]
  assert math.prod(jax.tree.leaves(three)[1].shape) == 3
