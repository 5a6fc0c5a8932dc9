"""Readers of the files of a run: data for figures.

Each reader takes a Run and raises UserError if the run has no such data, naming
the command that writes it.
"""

from collections.abc import Iterator, Sequence
import os
import pathlib
import re
from typing import Any, NamedTuple
import zipfile

import numpy as np

from bcm_jax import errors
from bcm_jax.config import resolve
from bcm_jax.data import image_source
from bcm_jax.utils import files

# Metrics without a prefix belong to the sampled network, named so in all
# methods.
_SAMPLED = "student"
_NOT_SHOWN = ("uptime", "skipped_in_row")
_QUALITY = ("precision", "recall")
# Samplers that equal 'onestep' at one evaluation.
_FROM_ONE_STEP = ("ancestral", "zigzag", "mixture", "cm_multistep", "gamma")
_SHOWN_INVERSIONS, _SHOWN_PAIRS = 16, 8

Series = dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]
Inversions = dict[str, dict[str, list[tuple[float, float]]]]


class Run(NamedTuple):
  """A run to draw.

  Attributes:
    label: name in figures.
    path: work directory, or a result file of mode eval.
  """

  label: str
  path: str


class Rows(NamedTuple):
  """Rows of images over an axis.

  Attributes:
    title: title of the block.
    axis: label of the horizontal axis.
    columns: K tick labels of that axis.
    rows: R names.
    images: uint8 [R, K, H, W, C].
  """

  title: str
  axis: str
  columns: Sequence[str]
  rows: Sequence[str]
  images: np.ndarray


class Protocol(NamedTuple):
  """Evaluation settings that must be equal for curves to share a panel."""

  data: str
  distance: str
  features_digest: str
  reference_digest: str
  samples: int
  num_real: int
  neighbors: int

  def __str__(self):
    return (
        f"{self.data}: {self.distance}, features {self.features_digest}, "
        f"reference {self.reference_digest}, {self.samples:,} samples per seed"
    )


class Point(NamedTuple):
  """Metric at an NFE: mean and standard deviation over seeds."""

  nfe: int
  mean: float
  std: float | None


class Curve(NamedTuple):
  """One metric of one family of samplers over NFE."""

  protocol: Protocol
  metric: str
  label: str
  family: str
  points: list[Point]


def open_runs(paths: Sequence[str]) -> list[Run]:
  """Returns the runs at some paths, without duplicates, with unique labels.

  Raises:
    UserError: a path that is neither a directory nor a JSON file.
  """
  unique = list({os.path.abspath(p): p for p in paths}.values())
  for path in unique:
    is_result = path.endswith(".json") and os.path.isfile(path)
    if not (is_result or os.path.isdir(path)):
      raise errors.UserError(
          f"{path}: neither a directory nor a .json file; give the work "
          "directory of a run, or a result file of mode eval"
      )
    # Raises UserError for a run or a result of the first version.
    _read_json(pathlib.Path(path)) if is_result else resolve.read_run(path)
  return [Run(*pair) for pair in zip(_labels(unique), unique, strict=True)]


def _labels(paths: Sequence[str]) -> list[str]:
  """Shortest suffixes of the paths that are unique."""
  split = [
      pathlib.Path(os.path.abspath(p).removesuffix(".json")).parts[1:]
      for p in paths
  ]
  deepest = max(map(len, split), default=0)
  for count in range(1, deepest + 1):
    labels = ["/".join(parts[-count:]) for parts in split]
    if len(set(labels)) == len(labels):
      return labels
  return list(paths)
def _directory(run: Run) -> str:
  if os.path.isdir(run.path):
    return run.path
  raise errors.UserError(
      f"{run.path}: is a result file, which has metrics only; give the work "
      "directory"
  )


# Training curves --------------------------------------------------------------


def scalars(run: Run) -> Series:
  """Reads metrics.jsonl: (network, metric) -> (steps [n], values [n]).

  Steps repeated after a rollback replace the earlier lines of the same steps.
  Metrics that are zero throughout are omitted.
  """
  path = os.path.join(_directory(run), "metrics.jsonl")
  lines: dict[str, list[tuple[int, float]]] = {}
  for record in _records(path):
    for name, value in record["scalars"].items():
      line = lines.setdefault(name, [])
      while line and line[-1][0] >= record["step"]:
        line.pop()
      line.append((record["step"], value))
  series = {}
  for name, line in lines.items():
    network, _, metric = name.rpartition("/")
    steps, values = (np.array(column) for column in zip(*line, strict=True))
    if metric not in _NOT_SHOWN and np.any(values):
      series[network or _SAMPLED, metric] = steps, values
  if not series:
    raise errors.UserError(f"{path}: has no metrics; --mode=train writes them")
  return series


def _records(path: str) -> Iterator[dict[str, Any]]:
  """Yields step and scalars per line; skips lines truncated by a crash."""
  if not os.path.isfile(path):
    return
  with open(path, encoding="utf-8", errors="replace") as file:
    for text in file:
      try:
        record = files.parse_json(text)
        step = record.pop("step")
        if "kind" not in record:
          # Non-finite numbers are stored as strings.
          values = {k: float(v) for k, v in record.items()}
          yield {"step": int(step), "scalars": values}
      except (
          ValueError, TypeError, KeyError, AttributeError, OverflowError
      ):
        continue


def smooth(values: np.ndarray, reach: int) -> np.ndarray:
  """Moving average of the finite values in a window of 2 reach + 1.

  Args:
    values: [n].
    reach: half width of the window.

  Returns:
    [n]; NaN where the window has no finite value.
  """
  finite = np.isfinite(values)
  center = np.arange(len(values))
  first = np.maximum(center - reach, 0)
  last = np.minimum(center + reach, len(values) - 1)

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
  """Reads the results of the newest evaluated step, one per moving average."""
  if os.path.isfile(run.path):
    paths = [pathlib.Path(run.path)]
  else:
    paths = pathlib.Path(run.path, "eval").glob("*.json")
  # The newest file of an average replaces older ones.
  paths = sorted(paths, key=lambda p: (p.stat().st_mtime_ns, p))
  keys = {"samplers", "step", "average", "protocol"}
  records = [
      r for r in map(_read_json, paths)
      # Images of other programs have no step.
      if keys <= r.keys() and r["step"] is not None
  ]
  if not records:
    raise errors.UserError(
        f"{run.path}: has no results; --mode=eval writes them"
    )
  newest = max(r["step"] for r in records)
  return list(
      {r["average"]: r for r in records if r["step"] == newest}.values()
  )


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    content = files.read_json(path)
  except ValueError as e:
    raise errors.UserError(
        f"{path}: not valid JSON ({e}); write it again with --mode=eval"
    ) from e
  if not isinstance(content, dict):
    return {}
  # A key of results of the first version.
  if "compared_one_by_one" in content.get("protocol", {}):
    raise errors.outdated(path)
  return content


def _names(run: Run) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields (name in a legend, result) of a run's results."""
  results_of_run = results(run)
  for result in results_of_run:
    protocol, name = result["protocol"], run.label
    if protocol["method"] not in name:
      name += f" ({protocol['method']})"
    if len(results_of_run) > 1:
      name += f", {result['average']}"
    if "guidance" in protocol:
      name += f", guidance {protocol['guidance']:g}"
    if "rejection" in protocol:
      name += ", rejection"
    yield name, result


def quality(run: Run) -> list[Curve]:
  """Reads the Frechet distance, precision and recall over NFE.

  Curves of samplers that equal 'onestep' at one evaluation start with its
  point.
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
        f"{run.path}: results have no samplers; set eval.samplers"
    )
  return curves


def _families(samplers: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
  """Groups samplers such as 'ancestral_nfe2@0.7' by the name before _nfe."""
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
      facts["num_real_for_prdc"], facts["neighbors_k"],
  )


def inversion_curves(
    numbers: dict[str, dict[str, Any]],
) -> dict[str, list[tuple[float, float]]]:
  """Groups inversion errors: solver and NFE -> [(initial noise, MSE)].

  Args:
    numbers: 'inversion' of a result file.

  Returns:
    Curves sorted by initial noise.
  """
  curves: dict[str, list[tuple[float, float]]] = {}
  for r in numbers.values():
    name = f"{r.get('solver', 'network')}, NFE {r['nfe']}"
    curves.setdefault(name, []).append((r["noise"], r["mse"]))
  return {name: sorted(points) for name, points in sorted(curves.items())}


def inversions(run: Run) -> Inversions:
  """Reads inversion errors: dataset -> label -> [(initial noise, MSE)]."""
  panels: Inversions = {}
  noises = set()
  for name, result in _names(run):
    noises |= {r["noise"] for r in result["inversion"].values()}
    for solver, points in inversion_curves(result["inversion"]).items():
      panel = panels.setdefault(result["protocol"]["data"], {})
      panel[f"{name}: {solver}"] = points
  if not noises:
    raise errors.UserError(
        f"{run.path}: results have no inversion errors; --mode=eval measures "
        "them for networks that support inversion"
    )
  if len(noises) < 2:
    raise errors.UserError(
        f"{run.path}: results have only one initial noise, {noises.pop():g}; "
        "--config.eval.inversion_noise=0.03,0.07,0.15,0.3 measures more"
    )
  return panels


# Images -----------------------------------------------------------------------


def interpolation(run: Run) -> list[Rows]:
  """Reads interpolations between pairs of real images."""
  folder = os.path.join(_directory(run), "edits", "interpolate")
  arrays = _arrays(os.path.join(folder, "interpolation.npz"), "edit", "images")
  images = arrays["images"][:_SHOWN_PAIRS]
  names = [f"pair {i + 1}" for i in range(len(images))]
  labels = arrays.get("labels", np.zeros(1))[:_SHOWN_PAIRS]
  if np.any(labels):  # All labels are 0 in datasets without classes.
    names = [f"{a} to {b}" for a, b in labels]
  weights = np.linspace(0, 1, images.shape[1] - 2)
  return [Rows(
      "between real images, through their latents",
      "weight of the right image's latent",
      ["real", *(f"{w:.3g}" for w in weights), "real"], names, images,
  )]


def reconstruction(run: Run) -> list[Rows]:
  """Reads real images, latents and reconstructions of every inversion."""
  folder = pathlib.Path(_directory(run), "inversions")
  blocks = []
  paths = folder.glob("*/inversion.npz")
  # Those of other settings have a digest after the NFE.
  paths = [p for p in paths if "_" not in p.parent.name]
  for path in sorted(paths, key=_by_number):
    arrays = _arrays(str(path), "invert", "originals", "latents", "mse")
    shown = slice(0, _SHOWN_INVERSIONS)
    latents = arrays["latents"][shown]
    # Maps two standard deviations to the range of pixels.
    visible = image_source.to_uint8(latents / (2 * np.std(latents)))
    mse = arrays["mse"]
    blocks.append(Rows(
        f"inverted in {path.parent.name.removeprefix('nfe')} NFE, "
        f"reconstructed in 1: MSE {np.mean(mse):.4f} over {len(mse)} test "
        "images",
        "MSE of the image, on the [0, 1] scale",
        [f"{v:.4f}".removeprefix("0") for v in mse[shown]],
        ["real", "latent", "reconstruction"],
        np.stack([
            arrays["originals"][shown], visible,
            arrays["reconstructions"][shown],
        ]),
    ))
  if not blocks:
    raise errors.UserError(f"{folder}: has no inversions; --mode=invert "
                           "writes them")
  return blocks


def _by_number(path: pathlib.Path) -> tuple[int, str]:
  digits = re.findall(r"\d+", path.parent.name)
  return int(digits[0]) if digits else 0, path.parent.name


def _arrays(path: str, mode: str, *required: str) -> dict[str, np.ndarray]:
  if not os.path.isfile(path):
    raise errors.UserError(
        f"{path}: file does not exist; --mode={mode} writes it"
    )
  try:
    with np.load(path) as f:
      return {k: f[k] for k in (*required, *f.files)}
  except (KeyError, ValueError, OSError, EOFError, zipfile.BadZipFile) as e:
    raise errors.UserError(
        f"{path}: corrupt file ({e}); write it again with --mode={mode}"
    ) from e
