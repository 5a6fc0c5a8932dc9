"""Pictures of what a run can do, and of what was measured."""

import collections
import io
import os
from typing import Any

import numpy as np

from bcm_jax import experiment as experiments
from bcm_jax import files
from bcm_jax import generate
from bcm_jax.metrics import image_grid

_COLUMNS = 20


def overview(experiment: experiments.Experiment, workdir: str) -> str:
  """Stacks samples, inversions and interpolations of a run; returns the path.

  Shows what the files below workdir hold, so that the picture and the numbers
  speak of the same images.
  """
  rows = []
  for name in sorted(os.listdir(os.path.join(workdir, "samples"))):
    with np.load(os.path.join(workdir, "samples", name, "samples.npz")) as f:
      rows.append((name.replace("_nfe", "\nNFE "), f["arr_0"][:_COLUMNS]))
  rows.sort(key=lambda row: "onestep" not in row[0])
  inversions = os.path.join(workdir, "inversions")
  if os.path.isdir(inversions):
    name = sorted(os.listdir(inversions))[0]
    with np.load(os.path.join(inversions, name, "inversion.npz")) as f:
      latents = generate.visible(f["latents"], experiment.method.sigma_max)
      rows += [
          ("real image", f["originals"][:_COLUMNS]),
          (f"latent\n{name}", latents[:_COLUMNS]),
          ("reconstruction", f["reconstructions"][:_COLUMNS]),
      ]
  edits = os.path.join(workdir, "edits", "interpolate", "interpolation.npz")
  if os.path.isfile(edits):
    with np.load(edits) as f:
      rows += [("interpolation", row[:_COLUMNS]) for row in f["images"][:4]]
  path = os.path.join(workdir, "overview.png")
  image_grid.save_png(
      path, image_grid.captioned_rows(rows, scale=generate.scale(experiment))
  )
  return path


def search(record: dict[str, Any], path: str) -> None:
  """Plots what a search measured: the distance of every candidate.

  Candidates that differ from the best one in their last time alone are drawn
  as a curve over that time, one panel a time.
  """
  # Slow to import, and not needed by most commands.
  from matplotlib import figure

  stages = collections.defaultdict(list)
  for sampler, cost in record["costs"].items():
    last = sampler.replace("@", "/").rpartition("/")[2]
    e, _, t = last.rpartition(">")
    varied = sampler.removesuffix(last) + ("e>t" if e else "t")
    stages[varied].append((float(e) if e else None, float(t), cost))
  picture = figure.Figure(
      figsize=(4 * len(stages), 3), layout="constrained"
  )
  axes = picture.subplots(1, len(stages), squeeze=False)[0]
  for axis, (varied, points) in zip(axes, stages.items(), strict=True):
    for e in sorted({p[0] for p in points}, key=lambda e: e or 0):
      curve = sorted(p[1:] for p in points if p[0] == e)
      axis.plot(*zip(*curve, strict=True), "o-",
                label=None if e is None else f"e = {e:g}")
    if points[0][0] is not None:
      axis.legend(fontsize="small")
    axis.set(xscale="log", xlabel="t (sigma)", title=varied)
    _mark(axis, {p[1] for p in points})
  axes[0].set_ylabel(record["distance"])
  picture.suptitle(f"best: {record['best']}")
  _save(picture, path)


def inversion(numbers: dict[str, dict[str, Any]], path: str) -> None:
  """Plots reconstruction error over the initial noise, a curve a way and NFE.

  Args:
    numbers: 'inversion' of a result.
    path: of the PNG.
  """
  from matplotlib import figure

  curves = collections.defaultdict(list)
  for r in numbers.values():
    way = f"{r.get('solver', 'one network')}, NFE {r['nfe']}"
    curves[way].append((r["noise"], r["mse"]))
  picture = figure.Figure(figsize=(6, 4), layout="constrained")
  axis = picture.subplots()
  for way, points in sorted(curves.items()):
    axis.plot(*zip(*sorted(points), strict=True), "o-", label=way)
  axis.set(
      xscale="log", yscale="log", xlabel="initial noise e (sigma)",
      ylabel="reconstruction MSE on [0, 1]",
  )
  axis.yaxis.set_major_formatter("{x:g}")
  axis.yaxis.set_minor_formatter("{x:g}")
  _mark(axis, {r["noise"] for r in numbers.values()})
  axis.legend(fontsize="small")
  _save(picture, path)


def _mark(axis, values: set[float]) -> None:
  """Ticks at the values themselves, as far as they are few."""
  if len(values) <= 8:  # The usual ticks are powers of ten.
    axis.set_xticks(sorted(values), [f"{v:g}" for v in sorted(values)])
    axis.set_xticks([], minor=True)


def _save(picture, path: str) -> None:
  """Writes a PNG whole or not at all."""
  content = io.BytesIO()
  picture.savefig(content, dpi=120, format="png")
  files.write_bytes(path, content.getvalue())
