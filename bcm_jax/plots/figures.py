"""Matplotlib figures: data from `records` and `strips` to PNG files.

Colors are the colorblind-safe palette of Okabe and Ito.
"""

from collections.abc import Iterable, Mapping, Sequence
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
_LINES = ("-", "--", ":", "-.")
_MARKERS = {
    "onestep": "o", "ancestral": "s", "cm_multistep": "^", "heun": "D",
    "ddim": "v", "gamma": "P", "zigzag": "X", "mixture": "*",
}
_DPI = 160
# Panels of training curves: these first, speed last.
_FIRST = ("loss", "grad_norm")
_TITLES = {"steps_per_sec": "steps/s", "skipped": "steps skipped"}
_PANELS_PER_ROW = 3
# Sizes in inches of a panel and of an image in a row.
_PANEL = (3.4, 2.6)
_SMALL_IMAGE, _IMAGE = 0.5, 0.8
# Mean width of a letter in inches.
_LETTER = 0.075
_TICKS = 8
# Smallest ratio of two NFEs whose tick labels do not overlap.
_TICK_RATIO = 1.3


def blank(width: float, height: float):
  """Returns an empty figure, width x height in inches."""
  # Imported here, because it is slow and most commands do not need it.
  from matplotlib import figure

  return figure.Figure(figsize=(width, height), layout="constrained")


def save(figure, path: str, dpi: int = _DPI) -> None:
  """Writes a figure as PNG, atomically."""
  content = io.BytesIO()
  figure.savefig(content, dpi=dpi, format="png")
  files.write_bytes(path, content.getvalue())


def mark(axis, values: Iterable[float]) -> None:
  """Sets the x ticks to the values themselves, if there are at most eight."""
  values = sorted(set(values))
  if len(values) <= _TICKS:  # The default ticks are powers of ten.
    axis.set_xticks(values, [f"{v:g}" for v in values])
    axis.set_xticks([], minor=True)


def styles(labels: Iterable[str]) -> dict[str, dict[str, Any]]:
  """Color and line style of each label, in order of appearance."""
  labels, n = dict.fromkeys(labels), len(COLORS)
  return {
      label: {
          "color": COLORS[i % n], "linestyle": _LINES[i // n % len(_LINES)]
      }
      for i, label in enumerate(labels)
  }


def wide(values: np.ndarray) -> bool:
  """Returns True for positive values over a decade or more (log axis)."""
  finite = values[np.isfinite(values)]
  return bool(finite.size and finite.min() > 0
              and finite.max() >= 10 * finite.min())


# Training curves --------------------------------------------------------------


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
      axis.plot(steps, values, alpha=0.25, linewidth=0.8, **style[name])
      axis.plot(steps, records.smooth(values, len(values) // 25),
                marker=marker, linewidth=1.5, **style[name])
    if wide(np.concatenate([values for _, values in lines.values()])):
      axis.set_yscale("log")
    network, metric = key
    title = _TITLES.get(metric, metric)
    axis.set_title(title if network == "student" else f"{title}, {network}",
                   fontsize="medium")
    axis.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    axis.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
    _plain(axis)
  for axis in axes[len(panels) - columns : len(panels)]:
    axis.set_xlabel("training step", fontsize="small")
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
  axis.grid(alpha=0.25)
  axis.tick_params(labelsize="small")


def _legend(figure, styles_of: Mapping[str, dict[str, Any]]) -> None:
  """Adds one legend below all panels, in as many columns as fit."""
  from matplotlib import lines

  handles = [lines.Line2D([], [], label=k, **s) for k, s in styles_of.items()]
  # An entry has a line and spacing, 0.6 inches, in addition to its text.
  entry_width = _LETTER * max(map(len, styles_of)) + 0.6
  width = figure.bbox.width / figure.figure.dpi
  figure.legend(
      handles=handles, loc="outside lower center", fontsize="small",
      ncols=max(1, min(len(handles), int(width / entry_width))), frameon=False,
  )


# Results of mode eval ---------------------------------------------------------


def quality(runs: Mapping[str, Sequence[records.Curve]], path: str) -> None:
  """Plots quality over NFE: one row of panels per evaluation protocol.

  Args:
    runs: label of a run -> its curves, one per metric and family of samplers.
    path: path of the PNG.
  """
  curves = [curve for curves_of_run in runs.values() for curve in curves_of_run]
  protocols = list(dict.fromkeys(curve.protocol for curve in curves))
  colors = styles(curve.label for curve in curves)
  rows = [
      [curve for curve in curves if curve.protocol == p] for p in protocols
  ]
  columns = max(len({c.metric for c in row}) for row in rows)
  heights = [
      3.4 + 0.22 * len({(c.label, c.family) for c in row}) / columns
      for row in rows
  ]
  figure = blank(max(5.5, 3.6 * columns), sum(heights))
  parts = figure.subfigures(len(rows), 1, squeeze=False, height_ratios=heights)
  for part, protocol, row in zip(parts[:, 0], protocols, rows, strict=True):
    bars = any(p.std for curve in row for p in curve.points)
    part.suptitle(
        f"{protocol}{'; bars: standard deviation over seeds' if bars else ''}",
        fontsize="small",
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
      "markersize": 5,
  }


def _quality_panel(
    axis, metric: str, curves: Sequence[records.Curve], colors
) -> None:
  for curve in curves:
    nfe, mean, std = zip(*curve.points, strict=True)
    axis.errorbar(
        nfe, mean, [np.nan if s is None else s for s in std],
        capsize=2.5, linewidth=1.3, **_quality_style(curve, colors),
    )
  better = "lower" if metric.startswith(("FD", "FID")) else "higher"
  axis.set_xscale("log", base=2)
  axis.set(xlabel="NFE", ylabel=f"{better} is better")
  axis.set_title(metric, fontsize="medium")
  if wide(np.array([p.mean for c in curves for p in c.points])):
    axis.set_yscale("log")
  axis.xaxis.set_major_formatter("{x:g}")
  values = sorted({p.nfe for c in curves for p in c.points})
  pairs = zip(values, values[1:], strict=False)
  if all(b >= _TICK_RATIO * a for a, b in pairs):
    mark(axis, values)
  axis.margins(x=0.12)
  _plain(axis)


def inversion(panels: records.Inversions, path: str) -> None:
  """Plots reconstruction error over the initial noise, one panel per dataset.

  Args:
    panels: dataset -> label of a curve -> [(noise, MSE)].
    path: path of the PNG.
  """
  from matplotlib import ticker

  figure = blank(6 * len(panels), 4)
  axes = figure.subplots(1, len(panels), squeeze=False)[0]
  for axis, (title, curves) in zip(axes, panels.items(), strict=True):
    for (name, points), style in zip(
        curves.items(), styles(curves).values(), strict=True
    ):
      axis.plot(*zip(*points, strict=True), label=name, marker="o",
                markersize=5, **style)
    axis.set(
        xscale="log", yscale="log", xlabel="initial noise e (sigma)",
        ylabel="reconstruction MSE on [0, 1]", title=title,
    )
    if wide(np.array([e for points in curves.values() for _, e in points])):
      axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
      axis.yaxis.set_minor_formatter(ticker.NullFormatter())
    else:
      axis.yaxis.set_minor_formatter("{x:g}")
    axis.yaxis.set_major_formatter("{x:g}")
    mark(axis, (noise for points in curves.values() for noise, _ in points))
    axis.legend(fontsize="small")
    axis.grid(alpha=0.25)
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


def image_rows(
    runs: Mapping[str, Sequence[records.Rows]], path: str
) -> None:
  """Plots blocks of rows of images, one below the other, each with an axis."""
  blocks = [block for blocks_of_run in runs.values() for block in blocks_of_run]
  side = max(map(_side, blocks))
  heights = [side * len(block.rows) + 0.9 for block in blocks]
  widest = max(len(block.columns) for block in blocks)
  figure = blank(side * widest + 1.2, sum(heights) + 0.3)
  figure.get_layout_engine().set(hspace=0.06)
  axes = figure.subplots(len(blocks), 1, squeeze=False, height_ratios=heights)
  for axis, block in zip(axes[:, 0], blocks, strict=True):
    _block(axis, block)
  figure.suptitle(", ".join(runs), fontsize="medium")
  save(figure, path)


def _side(block: records.Rows) -> float:
  """Side of an image in inches."""
  return _SMALL_IMAGE if block.images.shape[2] <= 16 else _IMAGE


def _block(axis, block: records.Rows) -> None:
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
  axis.tick_params(length=0, labelsize="small")
  letters = int(columns * _side(block) / _LETTER)
  axis.set_title(
      textwrap.fill(block.title, letters), fontsize="medium", loc="left"
  )
  axis.set_anchor("W")
  axis.set_xlabel(block.axis)
  axis.spines[:].set_visible(False)
