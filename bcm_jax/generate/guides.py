"""What a config's sample.guidance_network stands for: the network that
guides."""

from collections.abc import Callable
from typing import Any, NamedTuple

from bcm_jax import errors
from bcm_jax.checkpoint import runs
from bcm_jax.config import build
from bcm_jax.config import resolve
from bcm_jax.sampling import guidance

Params = Any


class Guide(NamedTuple):
  """A guiding network.

  Attributes:
    flow_map: parameters -> its map.
    params: its own parameters; None takes those of the guided network.
  """

  flow_map: Callable[[Params], Callable]
  params: Params | None


def open_guide(experiment: build.Experiment) -> Guide | None:
  """The guide that section sample asks for, None for none.

  Raises:
    UserError: it cannot guide this network.
  """
  sample = experiment.sample
  if sample.guidance == 1.0:
    return None
  method = experiment.method
  if sample.guidance_network is None:
    hidden = getattr(method, "label_dropout", 0.0)
    if experiment.num_classes is None or not hidden:
      raise errors.UserError(
          f"sample.guidance={sample.guidance} without sample.guidance_network "
          f"takes the "
          "network without its class, which it has not learnt: train with "
          "method.label_dropout=0.1, or name another run by "
          "sample.guidance_network"
      )
    return Guide(
        lambda p: guidance.without_class(method.flow_map(p)), None
    )
  workdir, step = runs.split_place(
    sample.guidance_network, "sample.guidance_network"
  )
  other = build.build(resolve.of_existing_run(workdir), to_train=False)
  if not other.method.is_denoiser:
    raise errors.UserError(
      f"sample.guidance_network={workdir} is no denoiser; give a worse "
      f"network of the "
      "same kind, such as an early checkpoint DIR@STEP"
    )
  mine, its = ((e.image_shape, e.num_classes) for e in (experiment, other))
  if mine != its:
    raise errors.UserError(
      f"sample.guidance_network={workdir} makes images {its[0]} of {its[1]} "
      f"classes, "
      f"not {mine[0]} of {mine[1]}; give a network of the same data"
    )
  _, _, params = runs.load_run(other, workdir, step=step)
  return Guide(other.method.flow_map, params)
