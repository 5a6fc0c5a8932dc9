"""Resolved configs and parameter tables, line by line.

UPDATE_GOLDENS=1 rewrites the files; the diff then shows what a change means.
"""

import functools
import math
import pathlib

import pytest

from bcm_jax.config import build
from bcm_jax.config import resolve
from bcm_jax.interop import transfer
from tests import teachers
from tests import text_goldens

TEXTS = pathlib.Path(__file__).parent / "goldens" / "texts"


def all_variants():
  """Returns all shipped values of --config: 'digits.py', 'cifar10.py:ict'."""
  names = []
  for file in resolve.shipped_configs():
    variants = getattr(resolve.run_file(file), "VARIANTS", None)
    names += [f"{file.name}:{v}" for v in variants] if variants else [file.name]
  return names


NAMES = all_variants()


@functools.cache
def experiment(name):
  with teachers.there(name):
    return build.build(resolve.resolve(resolve.read_file(name)))


@functools.cache
def table(network, size):
  rows = sorted(transfer.shapes(network, size).items())
  lines = [
      f"{'/'.join(path)}  {'x'.join(map(str, shape)) or 'scalar'}  "
      f"{math.prod(shape)}"
      for path, shape in rows
  ]
  total = sum(math.prod(shape) for _, shape in rows)
  return "\n".join([*lines, f"total  {len(rows)} tensors  {total}"]) + "\n"


def check(file, text):
  text_goldens.check(TEXTS / file, text)


def file_of(name):
  return name.replace(".py", "").replace(":", "_") + ".txt"


@pytest.mark.parametrize("name", NAMES)
def test_resolved_config(name):
  flat = resolve.flatten(experiment(name).config)
  lines = [f"{k} = {v!r}" for k, v in sorted(flat.items())]
  check(f"configs/{file_of(name)}", "\n".join(lines) + "\n")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_parameter_table(name):
  e = experiment(name)
  text = table(e.method.network, e.image_shape[0])
  check(f"parameters/{file_of(name)}", text)


def test_no_text_without_its_config():
  known = {file_of(name) for name in NAMES}
  for folder in ("configs", "parameters"):
    assert {p.name for p in (TEXTS / folder).iterdir()} == known


# Parameters and tensors, core_bcm.md 2 (constructors of the official code).
# One Fourier table serves both branches, 128 fewer than two would have.
@pytest.mark.parametrize("name, count, tensors", [
    ("imagenet64.py:finetune", 279_941_571, 504),
    ("imagenet64.py:finetune_deep", 466_988_355, 840),
    ("imagenet64.py:ict", 278_023_107, 499),
    ("imagenet64.py:ict_deep", 465_069_891, 835),
    ("imagenet64.py:ct", 295_899_267, 541),
    ("cifar10.py:ict", 56_395_651, None),
    ("cifar10.py:ict_deep", 97_610_627, None),
    ("cifar10.py:bcm", 57_314_307 - 128, None),
    ("cifar10.py:bcm_deep", 98_529_283 - 128, None),
    ("cifar10_edm.py:cond", 55_735_299, 419),
    ("cifar10_edm.py:uncond", 55_733_891, 417),
    ("cifar10_edm.py:cond_ve", 56_400_643 + 128, None),
    ("cifar10_ctm.py:dsm", 60_396_675, None),
    ("imagenet64_edm.py", 295_899_267, 541),
    ("imagenet64_ctm.py:dsm", 324_100_611, 617),
])
def test_published_parameter_counts(name, count, tensors):
  e = experiment(name)
  shapes = transfer.shapes(e.method.network, e.image_shape[0])
  assert sum(map(math.prod, shapes.values())) == count
  assert tensors in (None, len(shapes))
