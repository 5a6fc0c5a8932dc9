"""Matplotlib figures: data from `records` and `strips` to image files.

Figures are as wide as a column (3.25 in) or page (6.75 in) of a paper, with
text of 7 and 8 points, so that they can be included at their size. Colors are
the colorblind-safe palette of Okabe and Ito; lines and markers differ too.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import functools
import io
import textwrap
from typing import Any

import numpy as np

from bcm_jax.metrics import image_grid
from bcm_jax.plots import records
from bcm_jax.utils import files

COLORS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"
)
_LINES = ("-", "--", "-.", ":")
SHAPES = ("o", "s", "^", "D", "v", "P", "X", "*")
_MARKERS = {
    "onestep": "o", "ancestral": "s", "cm_multistep": "^", "heun": "D",
    "ddim": "v", "gamma": "P", "zigzag": "X", "mixture": "*",
}
FORMATS = ("png", "pdf", "svg")
# Widths of a column and of a page in inches.
COLUMN, PAGE = 3.25, 6.75
_STYLE = {
    "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8,
    "figure.titlesize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "legend.fontsize": 7, "legend.handlelength": 2.8, "axes.linewidth": 0.6,
    "grid.linewidth": 0.5, "grid.alpha": 0.25, "lines.linewidth": 1.2,
    "lines.markersize": 4, "savefig.dpi": 300,
    # Text stays text: TrueType fonts, which publishers ask for.
    "pdf.fonttype": 42, "svg.fonttype": "none",
}
# Omitted, so that equal data give equal files.
_DATES = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
# Panels of training curves: these first, speed last.
_FIRST = ("loss", "grad_norm")
_TITLES = {"steps_per_sec": "steps/s", "skipped": "steps skipped"}
_PANELS_PER_ROW = 3
# Sizes in inches of a panel and of an image in a row.
_PANEL = (PAGE / _PANELS_PER_ROW, 1.8)
_SMALL_IMAGE, _IMAGE = 0.42, 0.7
# Mean width of a letter of 7 points in inches.
_LETTER = 0.055
_TICKS = 8
# Smallest ratio of two NFEs whose tick labels do not overlap.
_TICK_RATIO = 1.3


def styled(draw: Callable) -> Callable:
  """Wraps a function that draws a figure: sizes for papers, see _STYLE."""

  @functools.wraps(draw)
  def run(*args):
    import matplotlib

    with matplotlib.rc_context(_STYLE):
      return draw(*args)

  return run


def blank(width: float, height: float):
  """Returns an empty figure, width x height in inches."""
  # Imported here, because it is slow and most commands do not need it.
  from matplotlib import figure

  return figure.Figure(figsize=(width, height), layout="constrained")


def save(figure, path: str) -> None:
  """Writes a figure atomically, in the format of the path's extension."""
  content, extension = io.BytesIO(), path.rpartition(".")[2]
  figure.savefig(content, format=extension, metadata=_DATES.get(extension))
  files.write_bytes(path, content.getvalue())


def mark(axis, values: Iterable[float]) -> None:
  """Sets the x ticks to the values themselves, if there are at most eight."""
  values = sorted(set(values))
  if len(values) <= _TICKS:  # The default ticks are powers of ten.
    axis.set_xticks(values, [f"{v:g}" for v in values])
    axis.set_xticks([], minor=True)


def styles(labels: Iterable[str]) -> dict[str, dict[str, Any]]:
  """Returns color and line style per label, in order of appearance."""
  labels, n = dict.fromkeys(labels), len(COLORS)
  return {
      label: {
          # Unique for 28 labels: 7 and 4 have no common divisor.
          "color": COLORS[i % n], "linestyle": _LINES[i % len(_LINES)]
      }
      for i, label in enumerate(labels)
  }


def wide(values: np.ndarray) -> bool:
  """Returns True for positive values over a decade or more (log axis)."""
  finite = values[np.isfinite(values)]
  return bool(finite.size and finite.min() > 0
              and finite.max() >= 10 * finite.min())


def _log_y(axis, values: np.ndarray) -> None:
  """Makes the y axis logarithmic, with numbers at its ticks."""
  from matplotlib import ticker

  axis.set_yscale("log")
  decades = np.log10(np.nanmax(values) / np.nanmin(values))
  if decades >= 1:
    subs = (1, 2, 5) if decades < 3 else (1,)
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=subs))
    axis.yaxis.set_minor_formatter(ticker.NullFormatter())
  else:
    axis.yaxis.set_minor_formatter("{x:g}")
  axis.yaxis.set_major_formatter("{x:g}")


# Training curves --------------------------------------------------------------


@styled
def curves(runs: Mapping[str, records.Series], path: str) -> None:
  """Plots every metric over the step, raw and smoothed, one panel each."""
  from matplotlib import ticker

  panels = sorted({key for series in runs.values() for key in series},
                  key=_panel_order)
  columns = min(_PANELS_PER_ROW, len(panels))
  rows = -(-len(panels) // columns)
  figure = blank(_PANEL[0] * columns, _PANEL[1] * rows + 0.4)
  axes = figure.subplots(rows, columns, squeeze=False).ravel()
  style = styles(runs)
  for axis, key in zip(axes, panels, strict=False):
    lines = {name: s[key] for name, s in runs.items() if key in s}
    for name, (steps, values) in lines.items():
      marker = "o" if len(steps) == 1 else None
      axis.plot(steps, values, alpha=0.25, linewidth=0.6,
                color=style[name]["color"])
      axis.plot(steps, records.smooth(values, len(values) // 25),
                marker=marker, **style[name])
    together = np.concatenate([values for _, values in lines.values()])
    together = together[np.isfinite(together)]
    if wide(together):
      _log_y(axis, together)
    elif together.size and np.ptp(together) <= 1e-6 * abs(together[0]):
      # A constant, whose rounding errors would be magnified.
      axis.set_ylim(*sorted((0.9 * together[0], 1.1 * together[0])))
    network, metric = key
    title = _TITLES.get(metric, metric)
    axis.set_title(title if network == "student" else f"{title}, {network}")
    axis.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    axis.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
    _plain(axis)
  for axis in axes[len(panels) - columns : len(panels)]:
    axis.set_xlabel("training step")
  for axis in axes[len(panels):]:
    axis.set_axis_off()
  if len(runs) > 1:
    _legend(figure, style)
  save(figure, path)


def _panel_order(key: tuple[str, str]) -> tuple:
  network, metric = key
  rank = _FIRST.index(metric) if metric in _FIRST else len(_FIRST)
  return metric == "steps_per_sec", network != "student", network, rank, metric


def _plain(axis) -> None:
  axis.spines[["top", "right"]].set_visible(False)
  axis.grid(True)


def _legend(figure, styles_of: Mapping[str, dict[str, Any]]) -> None:
  """Adds one legend below all panels, in as many columns as fit."""
  from matplotlib import lines

  handles = [lines.Line2D([], [], label=k, **s) for k, s in styles_of.items()]
  # An entry has a line and spacing, 0.5 inches, in addition to its text.
  entry_width = _LETTER * max(map(len, styles_of)) + 0.5
  width = figure.bbox.width / figure.figure.dpi
  figure.legend(
      handles=handles, loc="outside lower center",
      ncols=max(1, min(len(handles), int(width / entry_width))), frameon=False,
  )


# Results of mode eval ---------------------------------------------------------


@styled
def quality(runs: Mapping[str, Sequence[records.Curve]], path: str) -> None:
  """Plots quality over NFE: one row of panels per evaluation protocol.

  Args:
    runs: label of a run -> its curves, one per metric and family of samplers.
    path: path of the file.
  """
  curves = [curve for curves_of_run in runs.values() for curve in curves_of_run]
  protocols = list(dict.fromkeys(curve.protocol for curve in curves))
  colors = styles(curve.label for curve in curves)
  rows = [
      [curve for curve in curves if curve.protocol == p] for p in protocols
  ]
  columns = max(len({c.metric for c in row}) for row in rows)
  width = COLUMN if columns == 1 else PAGE
  heights = [
      2.5 + 0.15 * len({(c.label, c.family) for c in row}) * COLUMN / width
      for row in rows
  ]
  figure = blank(width, sum(heights))
  parts = figure.subfigures(len(rows), 1, squeeze=False, height_ratios=heights)
  for part, protocol, row in zip(parts[:, 0], protocols, rows, strict=True):
    bars = any(p.std for curve in row for p in curve.points)
    title = f"{protocol}"
    if bars:
      title += "; bars: standard deviation over seeds"
    part.suptitle(
        textwrap.fill(title, int(width / _LETTER)), fontsize=7
    )
    metrics = list(dict.fromkeys(curve.metric for curve in row))
    axes = part.subplots(1, columns, squeeze=False)[0]
    for axis in axes[len(metrics):]:
      axis.set_axis_off()
    for axis, metric in zip(axes, metrics, strict=False):
      _quality_panel(
          axis, metric, [c for c in row if c.metric == metric], colors
      )
    _legend(part, {
        f"{c.label}: {c.family}": _quality_style(c, colors) for c in row
    })
  save(figure, path)


def _quality_style(curve: records.Curve, colors) -> dict[str, Any]:
  return colors[curve.label] | {
      "marker": _MARKERS.get(curve.family.removesuffix("_churn"), "h"),
  }


def _quality_panel(
    axis, metric: str, curves: Sequence[records.Curve], colors
) -> None:
  for curve in curves:
    nfe, mean, std = zip(*curve.points, strict=True)
    axis.errorbar(
        nfe, mean, [np.nan if s is None else s for s in std],
        capsize=2, elinewidth=0.8, **_quality_style(curve, colors),
    )
  better = "lower" if metric.startswith(("FD", "FID")) else "higher"
  axis.set_xscale("log", base=2)
  axis.set(
      xlabel="network evaluations (NFE)", ylabel=f"{better} is better",
      title=metric,
  )
  means = np.array([p.mean for c in curves for p in c.points])
  if wide(means):
    _log_y(axis, means)
  axis.xaxis.set_major_formatter("{x:g}")
  values = sorted({p.nfe for c in curves for p in c.points})
  pairs = zip(values, values[1:], strict=False)
  if all(b >= _TICK_RATIO * a for a, b in pairs):
    mark(axis, values)
  axis.margins(x=0.12)
  _plain(axis)


@styled
def inversion(panels: records.Inversions, path: str) -> None:
  """Plots reconstruction error over the initial noise, one panel per dataset.

  Args:
    panels: dataset -> label of a curve -> [(noise, MSE)].
    path: path of the file.
  """
  entries = max(map(len, panels.values()))
  figure = blank(COLUMN * len(panels), 2.4 + 0.14 * entries)
  axes = figure.subplots(1, len(panels), squeeze=False)[0]
  for axis, (title, curves) in zip(axes, panels.items(), strict=True):
    for i, ((name, points), style) in enumerate(
        zip(curves.items(), styles(curves).values(), strict=True)
    ):
      axis.plot(*zip(*points, strict=True), label=name,
                marker=SHAPES[i % len(SHAPES)], **style)
    axis.set(
        xscale="log", xlabel="initial noise e (sigma)",
        ylabel="reconstruction MSE on [0, 1]", title=title,
    )
    _log_y(axis, np.array([e for p in curves.values() for _, e in p]))
    mark(axis, (noise for points in curves.values() for noise, _ in points))
    # Below the panel: curves may be anywhere in it.
    axis.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.22), frameon=False
    )
    _plain(axis)
  save(figure, path)


def all_inversions(
    runs: Mapping[str, records.Inversions], path: str
) -> None:
  """Plots `inversion` of several runs, one panel per dataset."""
  panels: records.Inversions = {}
  for inversions in runs.values():
    for data, curves in inversions.items():
      panels.setdefault(data, {}).update(curves)
  inversion(panels, path)


# Images -----------------------------------------------------------------------


@styled
def image_rows(
    runs: Mapping[str, Sequence[records.Rows]], path: str
) -> None:
  """Plots blocks of rows of images, one below the other, each with an axis."""
  blocks = [block for blocks_of_run in runs.values() for block in blocks_of_run]
  widest = max(len(block.columns) for block in blocks)
  # The names of the rows are beside the images.
  side = min(max(map(_side, blocks)), (PAGE - 1) / widest)
  width = max(COLUMN, side * widest + 1)
  heights = [side * len(block.rows) + 0.75 for block in blocks]
  figure = blank(width, sum(heights) + 0.25)
  figure.get_layout_engine().set(hspace=0.06)
  axes = figure.subplots(len(blocks), 1, squeeze=False, height_ratios=heights)
  for axis, block in zip(axes[:, 0], blocks, strict=True):
    _block(axis, block, int(width / _LETTER))
  figure.suptitle(", ".join(runs))
  save(figure, path)


def _side(block: records.Rows) -> float:
  """Side of an image in inches."""
  return _SMALL_IMAGE if block.images.shape[2] <= 16 else _IMAGE


def _block(axis, block: records.Rows, letters: int) -> None:
  rows, columns, height, width, channels = block.images.shape
  pad, scale = 4, max(1, 64 // height)
  mosaic = image_grid.image_grid(
      block.images.reshape(-1, height, width, channels), columns, pad, scale
  )
  axis.imshow(
      np.squeeze(mosaic), cmap="gray", vmin=0, vmax=255, interpolation="nearest"
  )

  def centers(count, size):
    return pad + (np.arange(count) + 0.5) * (size * scale + pad) - pad / 2

  axis.set_xticks(centers(columns, width), block.columns)
  axis.set_yticks(centers(rows, height), block.rows)
  axis.tick_params(length=0)
  axis.set_title(
      textwrap.fill(block.title, int(0.75 * letters)), fontsize=7, loc="left"
  )
  axis.set_anchor("W")
  axis.set_xlabel(block.axis)
  axis.spines[:].set_visible(False)
