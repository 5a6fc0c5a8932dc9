"""EDM's augmentation with every random draw recorded."""

import dataclasses

import jax.numpy as jnp

from bcm_jax.data import augmentation
from tests import quick
from tests.parity import report


def pipe(file, precision):
  """AugmentPipe(x) -> images and labels."""
  fields = {f.name for f in dataclasses.fields(augmentation.AugmentPipe)}
  unknown = {k: v for k, v in file.constructor.items() if k not in fields}
  # Strengths of transforms that are off do nothing.
  lacking = sorted(
      k for k, v in unknown.items()
      if v and not k.endswith(("_std", "_max", "_prob"))
  )
  if lacking:
    for name in file.outputs:
      reason = f"data.augmentation has no {', '.join(lacking)}"
      yield report.Missing(name, reason)
    return
  settings = augmentation.AugmentPipe(
      **{k: v for k, v in file.constructor.items() if k in fields}
  )
  numbers = [v for _, v in sorted(file.group("in/draw").items())]
  draws = augmentation.recorded_draws(settings, numbers)
  x = jnp.asarray(file.image("in/x"), precision)
  margin = augmentation.exact_margin(settings, draws, x.shape[1:])
  run = quick.jit(lambda x, d: augmentation.apply(settings, x, d, margin))
  y, labels = run(x, draws)
  columns = list(settings.label_columns)
  for name, value in (("y", y), ("labels", labels[:, columns])):
    if name in file.outputs:
      yield file.check(name, value, precision)


RUNNERS = [(lambda f: any(k.startswith("in/draw") for k in f.arrays), pipe)]
