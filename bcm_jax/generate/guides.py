"""Guidance networks: sample.guidance_network of the config."""

from collections.abc import Callable
from typing import Any, NamedTuple

from bcm_jax import errors
from bcm_jax.checkpoint import runs
from bcm_jax.config import build
from bcm_jax.config import resolve
from bcm_jax.sampling import guidance

Params = Any


class Guide(NamedTuple):
  """A guidance network.

  Attributes:
    flow_map: parameters -> flow map.
    params: parameters; None uses those of the guided network.
  """

  flow_map: Callable[[Params], Callable]
  params: Params | None


def open_guide(experiment: build.Experiment) -> Guide | None:
  """Returns the guidance network of config section sample, or None.

  Classifier-free guidance (Ho & Salimans, 2022) without
  sample.guidance_network; autoguidance (Karras et al., 2024) with it.

  Raises:
    UserError: the network cannot be guided as configured.
  """
  sample = experiment.sample
  if sample.guidance == 1.0:
    return None
  method = experiment.method
  if sample.guidance_network is None:
    hidden = getattr(method, "label_dropout", 0.0)
    if experiment.num_classes is None or not hidden:
      raise errors.UserError(
          f"sample.guidance: got {sample.guidance} without "
          "sample.guidance_network, expected a network trained with label "
          "dropout; train with method.label_dropout=0.1 or set "
          "sample.guidance_network"
      )
    return Guide(
        lambda p: guidance.without_class(method.flow_map(p)), None
    )
  workdir, step = runs.split_place(
    sample.guidance_network, "sample.guidance_network"
  )
  run = build.build(resolve.of_existing_run(workdir), to_train=False)
  if not run.method.is_denoiser:
    raise errors.UserError(
      f"sample.guidance_network: got {workdir}, expected a denoiser; use a "
      "weaker network of the same kind, such as an early checkpoint DIR@STEP"
    )
  expected, data = ((e.image_shape, e.num_classes) for e in (experiment, run))
  if expected != data:
    raise errors.UserError(
      f"sample.guidance_network: got {workdir} with images {data[0]} of "
      f"{data[1]} classes, expected {expected[0]} of {expected[1]}; use a "
      "network of the same data"
    )
  _, _, params = runs.load_run(run, workdir, step=step)
  return Guide(run.method.flow_map, params)
