"""Plots figures of runs: bcm_jax plots RUN [RUN ...].

Training curves, quality over NFE, inversion error over the initial noise,
reconstructions, interpolations and trajectories, as PNG, PDF or SVG files
(docs/plots.md).
Figures without data are skipped. Exit status: 0 for one figure or more, 65 for
none and for invalid input.
"""

import collections
from collections.abc import Callable, Collection, Sequence
import itertools
import os
import pathlib
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
  """Writes an image of samples, inversions and interpolations of a run.

  The images are read from the files in workdir, so that they are those of the
  metrics.

  Returns:
    Path of the PNG.
  """
  rows = []
  folder = pathlib.Path(workdir, "samples")
  # Those of other settings have a digest after the NFE.
  for path in sorted(folder.glob("*_nfe*/samples.npz")):
    name = path.parent.name
    if not name.rpartition("_nfe")[2].isdigit():
      continue
    with np.load(path) as f:
      rows.append((name.replace("_nfe", "\nNFE "), f["arr_0"][:_COLUMNS]))
  rows.sort(key=lambda row: "onestep" not in row[0])
  inversions = sorted(pathlib.Path(workdir, "inversions").glob("nfe*/*.npz"))
  if inversions:
    name = inversions[0].parent.name
    with np.load(inversions[0]) as f:
      latents = sample.latents_as_images(
          f["latents"], experiment.method.sigma_max
      )
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


@figures.styled
def search(record: dict[str, Any], path: str) -> None:
  """Plots the distances of all candidates of a search.

  Candidates that differ from the best one only in their last time are a curve
  over that time, one panel per time.

  Args:
    record: content of the search's JSON file.
    path: path of the PNG.
  """
  stages = collections.defaultdict(list)
  for sampler, cost in record["costs"].items():
    last = sampler.replace("@", "/").rpartition("/")[2]
    e, _, t = last.rpartition(">")
    varied = sampler.removesuffix(last) + ("e>t" if e else "t")
    stages[varied].append((float(e) if e else None, float(t), cost))
  figure = figures.blank(figures.COLUMN * len(stages), 2.4)
  axes = figure.subplots(1, len(stages), squeeze=False)[0]
  for axis, (varied, points) in zip(axes, stages.items(), strict=True):
    ends = sorted({p[0] for p in points}, key=lambda e: e or 0)
    for (e, style), marker in zip(
        figures.styles(ends).items(), itertools.cycle(figures.SHAPES)
    ):
      curve = sorted(p[1:] for p in points if p[0] == e)
      axis.plot(*zip(*curve, strict=True), marker=marker,
                label=None if e is None else f"e = {e:g}", **style)
    if points[0][0] is not None:
      axis.legend()
    axis.set(xscale="log", xlabel="t (sigma)", title=varied)
    figures.mark(axis, {p[1] for p in points})
  axes[0].set_ylabel(record["distance"])
  figure.suptitle(f"best: {record['best']}")
  figures.save(figure, path)


def inversion(numbers: dict[str, dict[str, Any]], path: str) -> None:
  """Plots reconstruction error over noise, one curve per solver and NFE.

  Args:
    numbers: 'inversion' of a result file.
    path: path of the PNG.
  """
  figures.inversion({"": records.inversion_curves(numbers)}, path)


# The command ----------------------------------------------------------------


class Kind(NamedTuple):
  """A kind of figure.

  Attributes:
    read: run -> data to draw; raises UserError if the run has none.
    draw: ({label of a run: data}, path of the file) -> None.
    together: one figure for all runs instead of one per run.
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
    runs: Sequence[records.Run], out: str, names: Sequence[str],
    formats: Sequence[str] = ("png",),
) -> list[str]:
  """Draws figures of these kinds; prints their paths, and reasons for skipping.

  Args:
    runs: runs to draw.
    out: folder of the files.
    names: keys of KINDS.
    formats: of figures.FORMATS.

  Returns:
    Paths of the files.
  """
  written = []
  for name in names:
    kind = KINDS[name]
    groups = {"": runs} if kind.together else {
        "_" + run.label.replace("/", "_"): [run] for run in runs
    }
    for suffix, group in groups.items():
      data = {}
      for run in group:
        try:
          data[run.label] = kind.read(run)
        except errors.UserError as e:
          print(f"{name} of {run.label} skipped: {e}")
      for extension in formats if data else ():
        written.append(os.path.join(out, f"{name}{suffix}.{extension}"))
        kind.draw(data, written[-1])
        print(f"written: {written[-1]}")
  return written


def _names(flag: str, value: str, known: Collection[str]) -> list[str]:
  """Parses a comma-separated list of known names."""
  names = [name for name in value.split(",") if name]
  for name in names:
    if name not in known:
      raise errors.unknown_name(flag, name, known)
  if not names:
    raise errors.unknown_name(flag, value, known)
  return names


def _parser() -> cli.Parser:
  parser = cli.Parser("plots", __doc__)
  parser.add_argument("runs", nargs="+", metavar="RUN",
                      help="work directory, or a result file of mode eval")
  parser.add_argument("--out", metavar="DIR",
                      help="folder of the figures (plots/ in the first RUN)")
  parser.add_argument("--only", default=",".join(KINDS), metavar="NAMES",
                      help="figures to draw, such as "
                      f"{','.join(list(KINDS)[:2])} (all)")
  parser.add_argument("--formats", default="png", metavar="NAMES",
                      help=f"of {','.join(figures.FORMATS)} (%(default)s)")
  return parser


def run(
    paths: Sequence[str], out: str | None, only: str, formats: str = "png"
) -> list[str]:
  """Draws the figures of the command; returns paths of the files.

  Args:
    paths: work directories or result files.
    out: folder of the figures, None for the default.
    only: comma-separated kinds of figures.
    formats: comma-separated formats of files.

  Raises:
    UserError: unknown figures, no runs, a folder that is not writable, or no
      data to draw.
  """
  names = _names("figure in --only", only, KINDS)
  extensions = _names("--formats", formats, figures.FORMATS)
  runs = records.open_runs(paths)
  if out is None:
    first = runs[0].path
    out = os.path.join(
        first if os.path.isdir(first) else os.path.dirname(first), "plots"
    )
  try:
    os.makedirs(out, exist_ok=True)
  except OSError as e:
    raise errors.UserError(
        f"--out: cannot write to {out}: {e.strerror}; choose another folder"
    ) from e
  written = make(runs, out, names, extensions)
  if not written:
    raise errors.UserError(
        f"{', '.join(paths)}: no data to draw; run the commands named above "
        "first"
    )
  return written


def main(argv: list[str] | None = None) -> None:
  """Entry point; exits with 65 and one line on bad input."""
  logging.set_verbosity(logging.WARNING)
  with cli.reporting():
    flags = _parser().parse_args(argv)
    run(flags.runs, flags.out, flags.only, flags.formats)
