"""Pictures of what a run can do, and of what was measured."""

import collections
import os
from typing import Any

import numpy as np

from bcm_jax import experiment as experiments
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
  # Slow to import, and used here alone.
  from matplotlib import figure

  stages = collections.defaultdict(list)
  for sampler, cost in record["costs"].items():
    stem, _, last = sampler.replace("@", "/").rpartition("/")
    e, _, t = last.rpartition(">")
    stages[stem].append((float(e) if e else None, float(t), cost))
  picture = figure.Figure(
      figsize=(4 * len(stages), 3), layout="constrained"
  )
  axes = picture.subplots(1, len(stages), squeeze=False)[0]
  for axis, (stem, points) in zip(axes, stages.items(), strict=True):
    for e in sorted({p[0] for p in points}, key=lambda e: e or 0):
      curve = sorted(p[1:] for p in points if p[0] == e)
      axis.plot(*zip(*curve, strict=True), "o-",
                label=None if e is None else f"e = {e:g}")
    if points[0][0] is not None:
      axis.legend(fontsize="small")
    axis.set(xscale="log", xlabel="time (sigma)", title=f"{stem}/...")
  axes[0].set_ylabel(record["distance"])
  picture.suptitle(f"best: {record['best']}")
  os.makedirs(os.path.dirname(path), exist_ok=True)
  picture.savefig(path + ".tmp", dpi=120, format="png")
  os.replace(path + ".tmp", path)
