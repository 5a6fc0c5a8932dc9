"""Draws figures of runs: python -m bcm_jax.plots RUN [RUN ...].

Figures are curves (of training), quality (over NFE), inversion (error over the
initial noise), reconstruction, interpolation and trajectory, each a PNG if the
runs hold its data (docs/plots.md). Exit status: 0 one figure or more, 65 no
figure or bad input.
"""

import collections
from collections.abc import Callable, Sequence
import os
from typing import Any, NamedTuple

from absl import logging
import numpy as np

from bcm_jax import errors
from bcm_jax import sample
from bcm_jax.config import build
from bcm_jax.metrics import image_grid
from bcm_jax.plots import figures
from bcm_jax.plots import records
from bcm_jax.plots import strips
from bcm_jax.utils import cli

_COLUMNS = 20


def overview(experiment: build.Experiment, workdir: str) -> str:
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
      latents = sample.visible(f["latents"], experiment.method.sigma_max)
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
      path, image_grid.captioned_rows(rows, scale=sample.scale(experiment))
  )
  return path


def search(record: dict[str, Any], path: str) -> None:
  """Plots what a search measured: the distance of every candidate.

  Candidates that differ from the best one in their last time alone are drawn
  as a curve over that time, one panel a time.
  """
  stages = collections.defaultdict(list)
  for sampler, cost in record["costs"].items():
    last = sampler.replace("@", "/").rpartition("/")[2]
    e, _, t = last.rpartition(">")
    varied = sampler.removesuffix(last) + ("e>t" if e else "t")
    stages[varied].append((float(e) if e else None, float(t), cost))
  picture = figures.blank(4 * len(stages), 3)
  axes = picture.subplots(1, len(stages), squeeze=False)[0]
  for axis, (varied, points) in zip(axes, stages.items(), strict=True):
    for e in sorted({p[0] for p in points}, key=lambda e: e or 0):
      curve = sorted(p[1:] for p in points if p[0] == e)
      axis.plot(*zip(*curve, strict=True), "o-",
                label=None if e is None else f"e = {e:g}")
    if points[0][0] is not None:
      axis.legend(fontsize="small")
    axis.set(xscale="log", xlabel="t (sigma)", title=varied)
    figures.mark(axis, {p[1] for p in points})
  axes[0].set_ylabel(record["distance"])
  picture.suptitle(f"best: {record['best']}")
  figures.save(picture, path)


def inversion(numbers: dict[str, dict[str, Any]], path: str) -> None:
  """Plots reconstruction error over the initial noise, a curve a way and NFE.

  Args:
    numbers: 'inversion' of a result.
    path: of the PNG.
  """
  figures.inversion({"": records.inversion_curves(numbers)}, path)


# The command ----------------------------------------------------------------


class Kind(NamedTuple):
  """A kind of figure.

  Attributes:
    read: run -> what is drawn of it; raises UserError where there is nothing.
    draw: {name of a run: what was read}, path of the PNG -> None.
    together: one figure of all runs, or one each.
  """

  read: Callable[[records.Run], Any]
  draw: Callable[[dict[str, Any], str], None]
  together: bool


KINDS = {
    "curves": Kind(records.scalars, figures.curves, True),
    "quality": Kind(records.quality, figures.quality, True),
    "inversion": Kind(records.inversions, figures.all_inversions, True),
    "reconstruction": Kind(
        records.reconstruction, figures.image_rows, False
    ),
    "interpolation": Kind(records.interpolation, figures.image_rows, False),
    "trajectory": Kind(strips.trajectory, figures.image_rows, False),
}


def make(
    runs: Sequence[records.Run], out: str, names: Sequence[str]
) -> list[str]:
  """Draws figures of these kinds; says what was written and what was not, why.

  Returns:
    Paths of the PNGs.
  """
  written = []
  for name in names:
    kind = KINDS[name]
    groups = {"": runs} if kind.together else {
        "_" + run.label.replace("/", "_"): [run] for run in runs
    }
    for suffix, group in groups.items():
      found = {}
      for run in group:
        try:
          found[run.label] = kind.read(run)
        except errors.UserError as e:
          print(f"no {name} of {run.label}: {e}")
      if found:
        written.append(os.path.join(out, f"{name}{suffix}.png"))
        kind.draw(found, written[-1])
        print(f"written: {written[-1]}")
  return written


def _names(asked: str) -> list[str]:
  """The kinds of figures in a list with commas."""
  names = [name for name in asked.split(",") if name]
  for name in names:
    if name not in KINDS:
      raise errors.unknown_name("figure in --only", name, KINDS)
  return names


def _parser() -> cli.Parser:
  parser = cli.Parser("bcm_jax.plots", __doc__)
  parser.add_argument("runs", nargs="+", metavar="RUN",
                      help="work directory, or a result file of mode eval")
  parser.add_argument("--out", metavar="DIR",
                      help="folder of the figures (plots/ in the first RUN)")
  parser.add_argument("--only", default=",".join(KINDS), metavar="NAMES",
                      help="figures to draw, such as "
                      f"{','.join(list(KINDS)[:2])} (all)")
  return parser


def run(paths: Sequence[str], out: str | None, only: str) -> list[str]:
  """The command; returns paths of the PNGs.

  Raises:
    UserError: unknown figures, no runs, a folder that cannot be written, or
      nothing to draw.
  """
  names, runs = _names(only), records.open_runs(paths)
  if out is None:
    first = runs[0].path
    out = os.path.join(
        first if os.path.isdir(first) else os.path.dirname(first), "plots"
    )
  try:
    os.makedirs(out, exist_ok=True)
  except OSError as e:
    raise errors.UserError(
        f"cannot write to {out}: {e.strerror}; choose another --out"
    ) from e
  written = make(runs, out, names)
  if not written:
    raise errors.UserError(
        f"there is nothing to draw in {', '.join(paths)}; the lines above say "
        "what would write it"
    )
  return written


def main(argv: list[str] | None = None) -> None:
  """Entry point; exits with 65 and one line on bad input."""
  logging.set_verbosity(logging.WARNING)
  with cli.reporting():
    flags = _parser().parse_args(argv)
    run(flags.runs, flags.out, flags.only)
