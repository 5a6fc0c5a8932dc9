"""What figures show: numbers and images out of what runs wrote.

Nothing is drawn here. Each reader takes a Run and raises UserError where the
run holds nothing of the kind, saying what would write it.
"""

from collections.abc import Iterator, Sequence
import json
import os
import pathlib
import re
from typing import Any, NamedTuple
import zipfile

import numpy as np

from bcm_jax import errors
from bcm_jax.data import image_source

# Bare metrics are of the sampled network, whose name is this in every method.
_SAMPLED = "student"
_NOT_SHOWN = ("uptime", "skipped_in_row")
_QUALITY = ("precision", "recall")
# Samplers that are 'onestep' where they take one evaluation.
_FROM_ONE_STEP = ("ancestral", "zigzag", "mixture", "cm_multistep", "gamma")
_SHOWN_INVERSIONS, _SHOWN_PAIRS = 16, 8

Series = dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]
Inversions = dict[str, dict[str, list[tuple[float, float]]]]


class Run(NamedTuple):
  """A run to draw.

  Attributes:
    label: its name in figures.
    path: work directory, or a result file of mode eval.
  """

  label: str
  path: str


class Rows(NamedTuple):
  """Rows of images over an axis.

  Attributes:
    title: what is seen.
    axis: what the columns mean.
    columns: K values on that axis, as text.
    rows: R names.
    images: uint8 [R, K, H, W, C].
  """

  title: str
  axis: str
  columns: Sequence[str]
  rows: Sequence[str]
  images: np.ndarray


class Protocol(NamedTuple):
  """What must be equal for numbers of quality to stand in one panel."""

  data: str
  distance: str
  features_digest: str
  reference_digest: str
  samples: int
  compared: int
  neighbours: int

  def __str__(self):
    return (
        f"{self.data}: {self.distance}, features {self.features_digest}, "
        f"reference {self.reference_digest}, {self.samples:,} samples a seed"
    )


class Point(NamedTuple):
  """A number at an NFE: mean over seeds, and their spread if there are any."""

  nfe: int
  mean: float
  std: float | None


class Curve(NamedTuple):
  """One number of one family of samplers, over NFE."""

  protocol: Protocol
  metric: str
  label: str
  family: str
  points: list[Point]


def open_runs(paths: Sequence[str]) -> list[Run]:
  """The runs at some places; each once, with names that tell them apart.

  Raises:
    UserError: a place that is no directory and no result file.
  """
  places = list({os.path.abspath(p): p for p in paths}.values())
  for place in places:
    file = place.endswith(".json") and os.path.isfile(place)
    if not (file or os.path.isdir(place)):
      raise errors.UserError(
          f"{place} is no directory and no .json file; give the work directory "
          "of a run, or a result file of mode eval"
      )
  return [Run(*pair) for pair in zip(_labels(places), places, strict=True)]


def _labels(places: Sequence[str]) -> list[str]:
  """The last parts of paths, as many as it takes to tell all apart."""
  split = [
      pathlib.Path(os.path.abspath(p).removesuffix(".json")).parts[1:]
      for p in places
  ]
  deepest = max(map(len, split), default=0)
  for count in range(1, deepest + 1):
    labels = ["/".join(parts[-count:]) for parts in split]
    if len(set(labels)) == len(labels):
      return labels
  return list(places)


def _directory(run: Run) -> str:
  if os.path.isdir(run.path):
    return run.path
  raise errors.UserError(f"{run.path} is a result file, which holds numbers")


# Training curves --------------------------------------------------------------


def scalars(run: Run) -> Series:
  """(network, metric) -> (steps [n], values [n]) of metrics.jsonl.

  Where a line's step is not greater than the one before it, steps were done
  again, after a roll-back: what they replace is left out. So are metrics that
  are zero throughout.
  """
  path = os.path.join(_directory(run), "metrics.jsonl")
  lines: dict[str, list[tuple[int, float]]] = {}
  for record in _records(path):
    for name, value in record["scalars"].items():
      line = lines.setdefault(name, [])
      while line and line[-1][0] >= record["step"]:
        line.pop()
      line.append((record["step"], value))
  found = {}
  for name, line in lines.items():
    network, _, metric = name.rpartition("/")
    steps, values = (np.array(column) for column in zip(*line, strict=True))
    if metric not in _NOT_SHOWN and np.any(values):
      found[network or _SAMPLED, metric] = steps, values
  if not found:
    raise errors.UserError(
        f"{path} holds no metrics; mode train writes them"
    )
  return found


def _records(path: str) -> Iterator[dict[str, Any]]:
  """Step and scalars of a file's lines; half a line of a crash is left out."""
  if not os.path.isfile(path):
    return
  with open(path, encoding="utf-8", errors="replace") as file:
    for text in file:
      try:
        record = json.loads(text)
        step = record.pop("step")
        if "kind" not in record:
          # Words stand for numbers that are not finite.
          values = {k: float(v) for k, v in record.items()}
          yield {"step": int(step), "scalars": values}
      except (ValueError, TypeError, KeyError, AttributeError):
        continue


def smooth(values: np.ndarray, reach: int) -> np.ndarray:
  """Mean of the finite values at most `reach` places away, [n] -> [n].

  NaN where there are none.
  """
  finite = np.isfinite(values)
  at = np.arange(len(values))
  first = np.maximum(at - reach, 0)
  last = np.minimum(at + reach, len(values) - 1)

  def sums(x):
    total = np.concatenate([[0.0], np.cumsum(x)])
    return total[last + 1] - total[first]

  count = sums(finite)
  mean = np.full(len(values), np.nan)
  return np.divide(
      sums(np.where(finite, values, 0.0)), count, out=mean, where=count > 0
  )


# Results of mode eval ---------------------------------------------------------


def results(run: Run) -> list[dict[str, Any]]:
  """Results of the newest step that was evaluated, one an average."""
  if os.path.isfile(run.path):
    paths = [pathlib.Path(run.path)]
  else:
    paths = pathlib.Path(run.path, "eval").glob("*.json")
  # What was written last about an average counts.
  paths = sorted(paths, key=lambda p: (p.stat().st_mtime_ns, p))
  keys = {"samplers", "step", "average", "protocol"}
  found = [r for r in map(_read_json, paths) if keys <= r.keys()]
  if not found:
    raise errors.UserError(
        f"{run.path} holds no results; --mode=eval writes them"
    )
  newest = max(r["step"] for r in found)
  return list({r["average"]: r for r in found if r["step"] == newest}.values())


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    content = json.loads(path.read_text())
  except ValueError as e:
    raise errors.UserError(
        f"{path} is damaged ({e}); write it again with --mode=eval"
    ) from e
  return content if isinstance(content, dict) else {}


def _names(run: Run) -> Iterator[tuple[str, dict[str, Any]]]:
  """(name in a legend, result) of a run's results."""
  found = results(run)
  for result in found:
    protocol, name = result["protocol"], run.label
    if protocol["method"] not in name:
      name += f" ({protocol['method']})"
    if len(found) > 1:
      name += f", {result['average']}"
    if "guidance" in protocol:
      name += f", guidance {protocol['guidance']:g}"
    if "rejection" in protocol:
      name += ", rejection"
    yield name, result


def quality(run: Run) -> list[Curve]:
  """The Frechet distance, precision and recall over NFE.

  Families that are 'onestep' at one evaluation start with its point.
  """
  curves = []
  for name, result in _names(run):
    families = _families(result["samplers"])
    numbers = next(iter(result["samplers"].values()), {})
    distance = next(
        (m for m in numbers if m == "FID" or m.startswith("FD (")), ""
    )
    protocol = _protocol(result["protocol"], distance)
    for metric in (distance, *_QUALITY):
      for family, samplers in families.items():
        points = [
            Point(r["nfe"], r[metric], r["std"].get(metric))
            for r in samplers if r.get(metric) is not None
        ]
        if points:
          curves.append(Curve(protocol, metric, name, family, sorted(points)))
  if not curves:
    raise errors.UserError(
        f"results of {run.path} tell of no sampler; set eval.samplers"
    )
  return curves


def _families(samplers: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
  """'ancestral_nfe2@0.7' and its like by what stands before their NFE."""
  families: dict[str, list[dict[str, Any]]] = {}
  for key, numbers in samplers.items():
    family = key.partition("@")[0].rpartition("_nfe")[0]
    families.setdefault(family, []).append(numbers)
  longer = [f for f in families if f in _FROM_ONE_STEP]
  if longer:
    for family in longer:
      families[family] = families.get("onestep", []) + families[family]
    families.pop("onestep", None)
  return families


def _protocol(facts: dict[str, Any], distance: str) -> Protocol:
  return Protocol(
      facts["data"], distance, facts["features_digest"],
      facts["reference_digest"], facts["samples"],
      facts["compared_one_by_one"], facts["neighbours_k"],
  )


def inversion_curves(
    numbers: dict[str, dict[str, Any]],
) -> dict[str, list[tuple[float, float]]]:
  """A way and its NFE -> [(initial noise, mean squared error)], ascending.

  Args:
    numbers: 'inversion' of a result.
  """
  curves: dict[str, list[tuple[float, float]]] = {}
  for r in numbers.values():
    way = f"{r.get('solver', 'one network')}, NFE {r['nfe']}"
    curves.setdefault(way, []).append((r["noise"], r["mse"]))
  return {way: sorted(points) for way, points in sorted(curves.items())}


def inversions(run: Run) -> Inversions:
  """Data set -> run and way -> [(initial noise, mean squared error)]."""
  panels: Inversions = {}
  noises = set()
  for name, result in _names(run):
    noises |= {r["noise"] for r in result["inversion"].values()}
    for way, points in inversion_curves(result["inversion"]).items():
      panel = panels.setdefault(result["protocol"]["data"], {})
      panel[f"{name}: {way}"] = points
  if not noises:
    raise errors.UserError(
        f"results of {run.path} hold no inversion errors; --mode=eval measures "
        "them of networks that invert"
    )
  if len(noises) < 2:
    raise errors.UserError(
        f"results of {run.path} are of one initial noise, {noises.pop():g}; "
        "--config.eval.inversion_noise=0.03,0.07,0.15,0.3 measures more"
    )
  return panels


# Images -----------------------------------------------------------------------


def interpolation(run: Run) -> list[Rows]:
  """Rows between pairs of real images, which stand at both ends."""
  folder = os.path.join(_directory(run), "edits", "interpolate")
  arrays = _arrays(os.path.join(folder, "interpolation.npz"), "edit", "images")
  images = arrays["images"][:_SHOWN_PAIRS]
  names = [f"pair {i + 1}" for i in range(len(images))]
  labels = arrays.get("labels", np.zeros(1))[:_SHOWN_PAIRS]
  if np.any(labels):  # Images without classes are all of class 0.
    names = [f"{a} to {b}" for a, b in labels]
  weights = np.linspace(0, 1, images.shape[1] - 2)
  return [Rows(
      "between real images, through their latents",
      "weight of the right image's latent",
      ["real", *(f"{w:.3g}" for w in weights), "real"], names, images,
  )]


def reconstruction(run: Run) -> list[Rows]:
  """Real images, their latents and reconstructions, of every inversion."""
  folder = pathlib.Path(_directory(run), "inversions")
  blocks = []
  for path in sorted(folder.glob("*/inversion.npz"), key=_by_number):
    arrays = _arrays(str(path), "invert", "originals", "latents", "mse")
    shown = slice(0, _SHOWN_INVERSIONS)
    latents = arrays["latents"][shown]
    # Two standard deviations fill the range.
    visible = image_source.to_uint8(latents / (2 * np.std(latents)))
    mse = arrays["mse"]
    blocks.append(Rows(
        f"inverted in {path.parent.name.removeprefix('nfe')} NFE and back in "
        f"one: MSE {np.mean(mse):.4f} over {len(mse)} test images",
        "MSE of the image, on the [0, 1] scale",
        [f"{v:.4f}".removeprefix("0") for v in mse[shown]],
        ["real", "latent", "back"],
        np.stack([
            arrays["originals"][shown], visible,
            arrays["reconstructions"][shown],
        ]),
    ))
  if not blocks:
    raise errors.UserError(f"{folder} holds no inversions; --mode=invert "
                           "writes them")
  return blocks


def _by_number(path: pathlib.Path) -> tuple[int, str]:
  digits = re.findall(r"\d+", path.parent.name)
  return int(digits[0]) if digits else 0, path.parent.name


def _arrays(path: str, mode: str, *needed: str) -> dict[str, np.ndarray]:
  if not os.path.isfile(path):
    raise errors.UserError(f"there is no {path}; --mode={mode} writes it")
  try:
    with np.load(path) as f:
      return {k: f[k] for k in (*needed, *f.files)}
  except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as e:
    raise errors.UserError(
        f"{path} is damaged ({e}); write it again with --mode={mode}"
    ) from e
