"""Resolved configs and parameter tables, line by line.

Six bases are stored in full, every other config as its differences from one
of them. UPDATE_GOLDENS=1 rewrites the files; the diff then shows what a change
means.
"""

import difflib
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


BASES = [
    data + variant
    for data in ("digits", "cifar10", "imagenet64")
    for variant in (".py" if data == "digits" else ".py:bcm", "_dmd.py:dmd2")
]


@functools.cache
def experiment(name):
  with teachers.there(name):
    return build.build(resolve.resolve(resolve.read_file(name)))


def config_text(name):
  flat = resolve.flatten(experiment(name).config)
  return "".join(f"{k} = {v!r}\n" for k, v in sorted(flat.items()))


@functools.cache
def shapes(network, size):
  return transfer.shapes(network, size)


def shapes_of(name):
  e = experiment(name)
  return shapes(e.method.network, e.image_shape[0])


def parameters_text(name):
  rows = sorted(shapes_of(name).items())
  lines = [
      f"{'/'.join(path)}  {'x'.join(map(str, shape)) or 'scalar'}  "
      f"{math.prod(shape)}"
      for path, shape in rows
  ]
  total = sum(math.prod(shape) for _, shape in rows)
  return "\n".join([*lines, f"total  {len(rows)} tensors  {total}"]) + "\n"


def base_of(name):
  """Returns the base of a dataset: BCM's, or that of networks like EDM's."""
  data = name.partition(".")[0].partition("_")
  edm = data[2] in ("edm", "cd", "ctm", "dmd")
  return next(b for b in BASES[edm::2] if b.startswith(data[0]))


def differences(text):
  """Returns the lines in which every other config differs from its base."""
  found = {}
  for name in set(all_variants()) - {*BASES}:
    base = base_of(name)
    changes = difflib.ndiff(
        text(base).splitlines(), text(name).splitlines()
    )
    lines = [line for line in changes if line[0] in "+-"]
    found.setdefault("\n".join([f"from {base}", *lines]), []).append(name)
  blocks = sorted((sorted(names), changes) for changes, names in found.items())
  return "".join(f"{', '.join(n)}\n{changes}\n\n" for n, changes in blocks)


def file_of(name):
  return name.replace(".py", "").replace(":", "_") + ".txt"


def check(folder, text, names):
  for name in names:
    text_goldens.check(TEXTS / folder / file_of(name), text(name))


def marked(names):
  """Returns parameters for pytest; most large networks are slow."""
  fast = (*BASES[:2], "cifar10.py:bcm")
  return [
      name if name in fast else pytest.param(name, marks=pytest.mark.slow)
      for name in names
  ]


def test_resolved_configs():
  check("configs", config_text, BASES)
  variants = differences(config_text)
  text_goldens.check(TEXTS / "configs" / "variants.txt", variants)


@pytest.mark.parametrize("name", marked(BASES))
def test_parameters_of_a_base(name):
  check("parameters", parameters_text, [name])


@pytest.mark.slow
def test_parameters_of_variants():
  text_goldens.check(
      TEXTS / "parameters" / "variants.txt", differences(parameters_text)
  )


# Parameters and tensors, core_bcm.md 2 (constructors of the official code).
# One Fourier table serves both branches, 128 fewer than two would have.
PUBLISHED = {
    "imagenet64.py:finetune": (279_941_571, 504),
    "imagenet64.py:finetune_deep": (466_988_355, 840),
    "imagenet64.py:ict": (278_023_107, 499),
    "imagenet64.py:ict_deep": (465_069_891, 835),
    "imagenet64.py:ct": (295_899_267, 541),
    "cifar10.py:ict": (56_395_651, None),
    "cifar10.py:ict_deep": (97_610_627, None),
    "cifar10.py:bcm": (57_314_307 - 128, None),
    "cifar10.py:bcm_deep": (98_529_283 - 128, None),
    "cifar10_edm.py:cond": (55_735_299, 419),
    "cifar10_edm.py:uncond": (55_733_891, 417),
    "cifar10_edm.py:cond_ve": (56_400_643 + 128, None),
    "cifar10_ctm.py:dsm": (60_396_675, None),
    "imagenet64_edm.py": (295_899_267, 541),
    "imagenet64_ctm.py:dsm": (324_100_611, 617),
}


@pytest.mark.parametrize("name", marked(PUBLISHED))
def test_published_parameter_counts(name):
  count, tensors = PUBLISHED[name]
  found = shapes_of(name)
  assert sum(map(math.prod, found.values())) == count
  assert tensors in (None, len(found))
