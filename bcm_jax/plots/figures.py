"""Drawing, with Matplotlib: numbers and images in, a PNG out.

What is drawn comes from records and strips. Colours are those of Okabe and
Ito, which colour-blind people tell apart too.
"""

from collections.abc import Iterable, Mapping, Sequence
import io
import textwrap
from typing import Any

import numpy as np

from bcm_jax.metrics import image_grid
from bcm_jax.plots import records
from bcm_jax.utils import files

COLOURS = (
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
_TITLES = {"steps_per_sec": "steps a second", "skipped": "steps skipped"}
_PANELS_A_ROW = 3
# Inches of a panel, and of an image in a row.
_PANEL = (3.4, 2.6)
_SMALL_IMAGE, _IMAGE = 0.5, 0.8
# Inches of a letter, on the average.
_LETTER = 0.075
_TICKS = 8
# Ratio of two NFEs whose ticks do not run into one another.
_APART = 1.3


def blank(width: float, height: float):
  """An empty figure of so many inches."""
  # Slow to import, and not needed by most commands.
  from matplotlib import figure

  return figure.Figure(figsize=(width, height), layout="constrained")


def save(picture, path: str, dpi: int = _DPI) -> None:
  """Writes a PNG whole or not at all."""
  content = io.BytesIO()
  picture.savefig(content, dpi=dpi, format="png")
  files.write_bytes(path, content.getvalue())


def mark(axis, values: Iterable[float]) -> None:
  """Ticks at the values themselves, as far as they are few."""
  values = sorted(set(values))
  if len(values) <= _TICKS:  # The usual ticks are powers of ten.
    axis.set_xticks(values, [f"{v:g}" for v in values])
    axis.set_xticks([], minor=True)


def styles(labels: Iterable[str]) -> dict[str, dict[str, Any]]:
  """Colour and kind of line of each label, in order of appearance."""
  labels, n = dict.fromkeys(labels), len(COLOURS)
  return {
      label: {
          "color": COLOURS[i % n], "linestyle": _LINES[i // n % len(_LINES)]
      }
      for i, label in enumerate(labels)
  }


def wide(values: np.ndarray) -> bool:
  """Whether values want a logarithmic axis: positive, over a decade or more."""
  finite = values[np.isfinite(values)]
  return bool(finite.size and finite.min() > 0
              and finite.max() >= 10 * finite.min())


# Training curves --------------------------------------------------------------


def curves(runs: Mapping[str, records.Series], path: str) -> None:
  """Every metric over the step, a panel each; smoothed, the raw curve faint."""
  from matplotlib import ticker

  panels = sorted({key for series in runs.values() for key in series},
                  key=_panel_order)
  columns = min(_PANELS_A_ROW, len(panels))
  rows = -(-len(panels) // columns)
  picture = blank(_PANEL[0] * columns, _PANEL[1] * rows + 0.4)
  axes = picture.subplots(rows, columns, squeeze=False).ravel()
  style = styles(runs)
  for axis, key in zip(axes, panels, strict=False):
    lines = {name: s[key] for name, s in runs.items() if key in s}
    for name, (steps, values) in lines.items():
      dot = "o" if len(steps) == 1 else None
      axis.plot(steps, values, alpha=0.25, linewidth=0.8, **style[name])
      axis.plot(steps, records.smooth(values, len(values) // 25), marker=dot,
                linewidth=1.5, **style[name])
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
    _legend(picture, style)
  save(picture, path)


def _panel_order(key: tuple[str, str]) -> tuple:
  network, metric = key
  first = _FIRST.index(metric) if metric in _FIRST else len(_FIRST)
  return metric == "steps_per_sec", network != "student", network, first, metric


def _plain(axis) -> None:
  axis.spines[["top", "right"]].set_visible(False)
  axis.grid(alpha=0.25)
  axis.tick_params(labelsize="small")


def _legend(picture, styles_of: Mapping[str, dict[str, Any]]) -> None:
  """One legend below all panels, in as many columns as there is room for."""
  from matplotlib import lines

  handles = [lines.Line2D([], [], label=k, **s) for k, s in styles_of.items()]
  # Besides its name an entry takes a line and space.
  each = _LETTER * max(map(len, styles_of)) + 0.6
  inches = picture.bbox.width / picture.figure.dpi
  picture.legend(
      handles=handles, loc="outside lower center", fontsize="small",
      ncols=max(1, min(len(handles), int(inches / each))), frameon=False,
  )


# Numbers of mode eval ---------------------------------------------------------


def quality(runs: Mapping[str, Sequence[records.Curve]], path: str) -> None:
  """Quality over NFE: a row of panels a protocol, a curve a run and family."""
  found = [curve for mine in runs.values() for curve in mine]
  protocols = list(dict.fromkeys(curve.protocol for curve in found))
  colours = styles(curve.label for curve in found)
  rows = [
      [curve for curve in found if curve.protocol == p] for p in protocols
  ]
  columns = max(len({c.metric for c in row}) for row in rows)
  heights = [
      3.4 + 0.22 * len({(c.label, c.family) for c in row}) / columns
      for row in rows
  ]
  picture = blank(max(5.5, 3.6 * columns), sum(heights))
  parts = picture.subfigures(len(rows), 1, squeeze=False, height_ratios=heights)
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
          axis, metric, [c for c in row if c.metric == metric], colours
      )
    _legend(part, {
        f"{c.label}: {c.family}": _quality_style(c, colours) for c in row
    })
  save(picture, path)


def _quality_style(curve: records.Curve, colours) -> dict[str, Any]:
  return colours[curve.label] | {
      "marker": _MARKERS.get(curve.family.removesuffix("_churn"), "h"),
      "markersize": 5,
  }


def _quality_panel(
    axis, metric: str, curves: Sequence[records.Curve], colours
) -> None:
  for curve in curves:
    nfe, mean, std = zip(*curve.points, strict=True)
    axis.errorbar(
        nfe, mean, [np.nan if s is None else s for s in std],
        capsize=2.5, linewidth=1.3, **_quality_style(curve, colours),
    )
  better = "lower" if metric.startswith(("FD", "FID")) else "higher"
  axis.set_xscale("log", base=2)
  axis.set(xlabel="NFE", ylabel=f"{better} is better")
  axis.set_title(metric, fontsize="medium")
  if wide(np.array([p.mean for c in curves for p in c.points])):
    axis.set_yscale("log")
  axis.xaxis.set_major_formatter("{x:g}")
  values = sorted({p.nfe for c in curves for p in c.points})
  if all(b >= _APART * a for a, b in zip(values, values[1:], strict=False)):
    mark(axis, values)
  axis.margins(x=0.12)
  _plain(axis)


def inversion(panels: records.Inversions, path: str) -> None:
  """Reconstruction error over the initial noise, a panel a data set.

  Args:
    panels: title of the panel -> name of a curve -> [(noise, error)].
    path: of the PNG.
  """
  from matplotlib import ticker

  picture = blank(6 * len(panels), 4)
  axes = picture.subplots(1, len(panels), squeeze=False)[0]
  for axis, (title, found) in zip(axes, panels.items(), strict=True):
    for (name, points), style in zip(
        found.items(), styles(found).values(), strict=True
    ):
      axis.plot(*zip(*points, strict=True), label=name, marker="o",
                markersize=5, **style)
    axis.set(
        xscale="log", yscale="log", xlabel="initial noise e (sigma)",
        ylabel="reconstruction MSE on [0, 1]", title=title,
    )
    if wide(np.array([e for points in found.values() for _, e in points])):
      axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
      axis.yaxis.set_minor_formatter(ticker.NullFormatter())
    else:
      axis.yaxis.set_minor_formatter("{x:g}")
    axis.yaxis.set_major_formatter("{x:g}")
    mark(axis, (noise for points in found.values() for noise, _ in points))
    axis.legend(fontsize="small")
    axis.grid(alpha=0.25)
  save(picture, path)


def all_inversions(
    runs: Mapping[str, records.Inversions], path: str
) -> None:
  """`inversion` of several runs, each data set in its own panel."""
  panels: records.Inversions = {}
  for mine in runs.values():
    for data, found in mine.items():
      panels.setdefault(data, {}).update(found)
  inversion(panels, path)


# Images -----------------------------------------------------------------------


def image_rows(
    runs: Mapping[str, Sequence[records.Rows]], path: str
) -> None:
  """Blocks of rows of images, one below the other, each over its own axis."""
  blocks = [block for mine in runs.values() for block in mine]
  side = max(map(_side, blocks))
  heights = [side * len(block.rows) + 0.9 for block in blocks]
  widest = max(len(block.columns) for block in blocks)
  picture = blank(side * widest + 1.2, sum(heights) + 0.3)
  picture.get_layout_engine().set(hspace=0.06)
  axes = picture.subplots(len(blocks), 1, squeeze=False, height_ratios=heights)
  for axis, block in zip(axes[:, 0], blocks, strict=True):
    _block(axis, block)
  picture.suptitle(", ".join(runs), fontsize="medium")
  save(picture, path)


def _side(block: records.Rows) -> float:
  """Inches of its images."""
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

  def centres(count, size):
    return pad + (np.arange(count) + 0.5) * (size * scale + pad) - pad / 2

  axis.set_xticks(centres(columns, width), block.columns)
  axis.set_yticks(centres(rows, height), block.rows)
  axis.tick_params(length=0, labelsize="small")
  letters = int(columns * _side(block) / _LETTER)
  axis.set_title(
      textwrap.fill(block.title, letters), fontsize="medium", loc="left"
  )
  axis.set_anchor("W")
  axis.set_xlabel(block.axis)
  axis.spines[:].set_visible(False)
