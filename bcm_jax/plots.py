"""One picture that shows what a run can do."""

import os

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
