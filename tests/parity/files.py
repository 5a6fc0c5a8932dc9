"""Files of reference numbers: arrays, what they mean, how close to come."""

from collections.abc import Iterator
import dataclasses
import functools
import json
import pathlib
import re
import zlib

import numpy as np

from tests.parity import report

EXACT = 1e-9  # Of an output's scale, in float64.
ROUNDED = 1e-6  # The same, where the file holds roundings of its inputs.

_NUMBER = r"(-?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)"


def numbers(text: str) -> list[float]:
  """All numbers in a text, in their order."""
  return [float(n) for n in re.findall(_NUMBER, text)]


def jumps(text: str) -> list[tuple[float, float]]:
  """The levels of every 'G(80->1.0)' in a text."""
  found = re.findall(rf"G\({_NUMBER} ?-> ?{_NUMBER}\)", text)
  return [(float(a), float(b)) for a, b in found]


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
  """One file.

  Attributes:
    path: where it is; other files are looked for beside it.
    arrays: by key: 'in/<name>', 'out/<name>', 'out64/<name>', weights.
    meta: what produced them.
  """

  path: pathlib.Path
  arrays: dict[str, np.ndarray]
  meta: dict

  def __contains__(self, key: str) -> bool:
    return key in self.arrays

  def __getitem__(self, key: str) -> np.ndarray:
    return self.arrays[key]

  @property
  def source(self) -> str:
    """The repository whose code was run."""
    return self.meta["source_repo"]

  @property
  def constructor(self) -> dict:
    """Arguments of the network or object that was run."""
    return self.meta.get("constructor") or {}

  @property
  def notes(self) -> str:
    """How it was run, in words."""
    return self.meta.get("notes", "")

  @functools.cached_property
  def outputs(self) -> list[str]:
    """Names of all outputs, of either precision."""
    return list(self.group("out64/") | self.group("out/"))

  def group(self, prefix: str) -> dict[str, np.ndarray]:
    """Arrays whose keys start with a prefix, without it."""
    return {
        k.removeprefix(prefix): v
        for k, v in self.arrays.items() if k.startswith(prefix)
    }

  def has(self, *names: str) -> bool:
    """Whether the file holds any output of these names or beginnings."""
    return any(o.startswith(names) for o in self.outputs)

  def twin(self, name: str) -> bool:
    """Whether an output was recorded in float64 too."""
    return f"out64/{name}" in self.arrays

  def image(self, key: str) -> np.ndarray:
    """An image batch as float64 with channels last, as they are here."""
    value = np.asarray(self.arrays[key], np.float64)
    if self.source.endswith("consistency_models_cifar10"):
      return value
    return np.moveaxis(value, -3, -1)

  def setting(self, name: str, default: float) -> float:
    """A number by name: of the constructor, of meta or in the notes."""
    for place in (self.constructor, self.meta, self.meta.get("ctm_args", {})):
      if isinstance(place.get(name), int | float):
        return place[name]
    found = re.search(rf"\b{name} ?=? ?{_NUMBER}", self.notes)
    return float(found[1]) if found else default

  def settings(self, name: str) -> dict[str, float]:
    """What the notes give as 'name: a=1,b=2'."""
    found = re.search(rf"\b{name}: ((?:\w+ ?= ?{_NUMBER},? ?)+)", self.notes)
    pairs = re.findall(rf"(\w+) ?= ?{_NUMBER}", found[1]) if found else []
    return {key: float(value) for key, value in pairs}

  def beside(self, name: str) -> "Reference":
    """Another file of the same folder."""
    return load(self.path.with_name(name))

  def state_dict(self) -> dict[str, np.ndarray]:
    """Weights under their foreign names, here or in the file named."""
    if "state_dict_from" in self.meta:
      return self.beside(self.meta["state_dict_from"]).state_dict()
    return self.group("state_dict/")

  def moved(self, recipe: dict | None) -> dict[str, np.ndarray]:
    """The weights of a target or teacher network by its recipe."""
    online = self.state_dict()
    if recipe is None:
      return online

    def move(key, value):
      if key.endswith("resample_filter"):  # A buffer, no parameter.
        return value
      seed = zlib.crc32((recipe["prefix"] + key).encode())
      noise = np.random.default_rng(seed).standard_normal(value.shape)
      return (np.float64(value) + recipe["scale"] * noise).astype(np.float32)

    return {k: move(k, v) for k, v in online.items()}

  def expected(self, name: str, group: str) -> np.ndarray:
    """A recorded output in float64; images have their channels last."""
    key = f"{group}/{name}"
    if self[key].ndim == 4 and "/" not in name:
      return self.image(key)
    return self[key].astype(np.float64)

  def check(
      self, name: str, actual, precision: str, rel: float = EXACT
  ) -> report.Check:
    """Our value of an output against the recorded one.

    In float32 it has to come near both records, where there are two.

    Args:
      name: of the output; four axes are an image batch, unless it is a tensor
        of the network ('group/tensor').
      actual: ours, images with channels last.
      precision: 'float32' takes the file's own tolerance, all else `rel`. The
        file's own holds too for what was recorded in float32 alone: it is ten
        times the error of the record.
      rel: largest error in units of the output's largest absolute value.
    """
    expected = self.expected(name, "out64" if self.twin(name) else "out")
    scale = np.abs(expected).max(initial=0)
    entry = self.meta.get("f32_vs_f64", {}).get(name)
    if precision != "float32" and (self.twin(name) or entry is None):
      return report.Check(name, actual, expected, rel * scale)
    if entry is None:  # Left out by the file: its floor holds.
      floor = numbers(self.meta.get("tolerance_rule", "1e-05"))[-1]
      entry = {"suggested_rel_to_scale": floor, "scale": scale}
    if np.shape(actual) == expected.shape and f"out/{name}" in self:
      record = self.expected(name, "out")
      ours = np.asarray(actual, np.float64)
      further = np.abs(ours - record) > np.abs(ours - expected)
      expected = np.where(further, record, expected)
    return report.Check(
        name, actual, expected,
        entry["suggested_rel_to_scale"] * entry["scale"],
    )

  def tensors(
      self, group: str, ours: dict[str, np.ndarray], precision: str
  ) -> Iterator[report.Check]:
    """The recorded tensors 'group/<foreign name>', and only those."""
    for name in self.outputs:
      head, _, tensor = name.partition("/")
      if head == group:
        yield self.check(name, ours[tensor], precision)


def load(path: pathlib.Path) -> Reference:
  """Reads a file, once as long as it does not change.

  Raises:
    OSError, ValueError: where it cannot be read.
  """
  return _load(path, path.stat().st_mtime_ns)


@functools.cache
def _load(path: pathlib.Path, changed: int) -> Reference:
  del changed
  with np.load(path, allow_pickle=False) as file:
    arrays = {k: file[k] for k in file.files}
  if "meta" not in arrays:
    raise ValueError("has no meta, which says what produced it")
  meta = json.loads(str(arrays.pop("meta")))
  if not isinstance(meta, dict) or "source_repo" not in meta:
    raise ValueError("has a meta without source_repo")
  return Reference(path, arrays, meta)
