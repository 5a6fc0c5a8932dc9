"""Measures of image quality."""

import re

import numpy as np

from bcm_jax.metrics import fid
from bcm_jax.metrics import moments
from bcm_jax.metrics import nearest_neighbors
from bcm_jax.metrics import precision_recall as pr
from tests.parity import files
from tests.parity import report

# Radii are float32 there.
_RADII = 2e-7
_SINGULAR = 3e-8


def manifold_radii(points, k, block_size=nearest_neighbors.BLOCK_SIZE):
  """Returns distances to the k-th nearest other point, float64 [N]."""
  points = nearest_neighbors.as_features("points", points)
  return np.sqrt(pr._squared_to_nearest(points, k, block_size)[:, k - 1])


def precision_recall(file, precision):
  """Precision and recall, and squared radii of the balls."""
  del precision
  sizes = file.meta.get("nhood_sizes", [3])
  names = [n.removesuffix("_real") for n in file.group("in/")
           if n.endswith("_real")]
  for name in names:
    real, fake = file[f"in/{name}_real"], file[f"in/{name}_gen"]
    both = [pr.prdc(real, fake, k, k)[:2] for k in sizes]
    for i, what in enumerate(("precision", "recall")):
      expected = file[f"out/{name}_{what}"]
      ours = np.reshape([values[i] for values in both], expected.shape)
      yield report.Check(f"{name}_{what}", ours, expected, 0)
    for points, side in ((real, "real"), (fake, "gen")):
      key = f"{name}_radii_{side}"
      expected = file[f"out/{key}"].astype(np.float64)
      ours = np.stack([manifold_radii(points, k) for k in sizes], axis=1)
      # A distance of 0 comes out of the product form as 1e-15 or so.
      yield report.Check(key, ours**2, expected, _RADII * expected + 1e-12)


def frechet_distance(file, precision):
  """Frechet distances, against four implementations."""
  del precision
  for name in file.outputs:
    case = re.sub("_(exact|edm|adm|pytorch_fid)$", "", name)
    a, b = (
        moments.Gaussian(file[f"in/{case}_mu{i}"], file[f"in/{case}_sigma{i}"])
        for i in (1, 2)
    )
    ranks = [np.linalg.matrix_rank(g.covariance) for g in (a, b)]
    # Theirs take roots of eigenvalues: 1e-8 each where they should be 0.
    rel = files.EXACT if min(ranks) == len(a.mean) else _SINGULAR
    expected = file[f"out/{name}"]
    ours = np.float64(fid.frechet_distance(a, b))
    yield report.Check(name, ours, expected, rel * np.abs(expected) + 1e-12)


RUNNERS = [
    (lambda f: any(o.endswith("_radii_real") for o in f.outputs),
     precision_recall),
    (lambda f: f.has("full_exact", "singular_exact", "identical_exact"),
     frechet_distance),
]
