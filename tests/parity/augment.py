"""EDM's augmentation with every random draw recorded."""

from collections.abc import Sequence
import dataclasses

import jax.numpy as jnp
import numpy as np

from bcm_jax.data import augmentation
from bcm_jax.data import warp
from tests import quick
from tests.parity import report


def recorded_draws(
  pipe: augmentation.AugmentPipe, numbers: Sequence[np.ndarray]
) -> augmentation.Draws:
  """The first of `recorded`."""
  return recorded(pipe, numbers)[0]


def recorded(
  pipe: augmentation.AugmentPipe, numbers: Sequence[np.ndarray]
) -> tuple[augmentation.Draws, augmentation.MoreDraws | None]:
  """Draws as the official pipe made them, from a record of its calls.

  Args:
    pipe: that pipe's settings; it draws nothing for a multiplier of 0.
    numbers: what its calls returned, in their order; each holds B numbers, or
      2 x B with x before y.

  Returns:
    float64 NumPy arrays; numbers not drawn are 0. Those of the transforms that
    the paper does not use are None if none is on.

  Raises:
    ValueError: for more or fewer calls than the pipe makes, or none at all.
  """
  tables = augmentation._TRANSFORMS, augmentation._MORE
  on = [name for name in augmentation._ORDER if getattr(pipe, name) > 0]
  calls = [
    (name, what) for name in on for what in (tables[0] | tables[1])[name][1]
  ]
  if not calls or len(calls) != len(numbers):
    raise ValueError(f"{len(numbers)} recorded calls, expected {len(calls)}")
  batch = numbers[-1].size  # Every transform ends with one number an example.
  classes = augmentation.Draws, augmentation.MoreDraws
  fields = {
    name: np.zeros(batch) for cls in classes for name in cls._fields
  }
  fields["shift"] = fields["shift_int"] = np.zeros((batch, 2))
  gates = [np.ones((batch, len(table))) for table in tables]
  for (name, what), values in zip(calls, numbers, strict=True):
    if what == "gate":
      which = name in tables[1]
      gates[which][:, list(tables[which]).index(name)] = values.ravel()
    elif what.startswith("shift"):
      fields[what] = values.reshape(2, batch).T.astype(np.float64)
    else:
      fields[what] = values.ravel().astype(np.float64)
  first, more = (
    cls(**{k: fields[k] for k in cls._fields if k != "gates"}, gates=gate)
    for cls, gate in zip(classes, gates, strict=True)
  )
  return first, more if pipe.needs_more else None


def exact_margin(
  pipe: augmentation.AugmentPipe,
  draws: augmentation.Draws,
  image_shape: Sequence[int],
) -> warp.Margin:
  """The margin of the official pipe, as wide as this batch needs; on the host.

  Args:
    pipe: its settings.
    draws: of the whole batch.
    image_shape: (H, W, C).

  Returns:
    ((top, bottom), (left, right)) in pixels, at most H - 1 and W - 1.
  """
  height, width = image_shape[:2]
  dtype = jnp.result_type(draws.shift)
  centre = np.array([width - 1, height - 1]) / 2
  corners = np.array([[-1, 1, 1, -1], [-1, -1, 1, 1]]) * centre[:, None]
  x, y = jnp.asarray(corners, dtype)[:, None]
  params = augmentation._parameters(pipe, draws, dtype)
  points = np.stack(augmentation._sources(pipe, params, height, width, x, y))
  points = points.reshape(2, -1)  # (x, y) of all corners in the batch.
  beyond = np.stack([-points.min(1), points.max(1)], axis=1) - centre[:, None]
  limit = [[width - 1], [height - 1]]
  pixels = np.ceil(np.clip(beyond + 2 * warp.REACH, 0, limit))
  horizontal, vertical = pixels.astype(int).tolist()
  return tuple(vertical), tuple(horizontal)


def pipe(file, precision):
  """AugmentPipe(x) -> images and labels."""
  fields = {f.name for f in dataclasses.fields(augmentation.AugmentPipe)}
  unknown = sorted(file.constructor.keys() - fields)
  if unknown:
    for name in file.outputs:
      reason = f"data.augmentation has no {', '.join(unknown)}"
      yield report.Missing(name, reason)
    return
  settings = augmentation.AugmentPipe(**file.constructor)
  numbers = [v for _, v in sorted(file.group("in/draw").items())]
  draws, more = recorded(settings, numbers)
  x = jnp.asarray(file.image("in/x"), precision)
  margin = exact_margin(settings, draws, x.shape[1:])
  run = quick.jit(
    lambda x, d, m: augmentation.apply(settings, x, d, margin, m)
  )
  y, labels = run(x, draws, more)
  columns = list(settings.label_columns)
  for name, value in (("y", y), ("labels", labels[:, columns])):
    if name in file.outputs:
      yield file.check(name, value, precision)


RUNNERS = [(lambda f: any(k.startswith("in/draw") for k in f.arrays), pipe)]
