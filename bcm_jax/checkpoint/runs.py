"""Work directories: parameters and averages out of checkpoints."""

from collections.abc import Mapping
import os
from typing import Any

import jax
import numpy as np

from bcm_jax import __version__
from bcm_jax import errors
from bcm_jax.checkpoint import checkpoint
from bcm_jax.config import build
from bcm_jax.training import phema
from bcm_jax.training import train_state
from bcm_jax.utils import files

Params = Any
_POSTHOC = "posthoc_"
# Weights of a released model.
RELEASED = "model.safetensors"


def checkpoint_dir(workdir: str) -> str:
  """Returns the folder of a run's checkpoints."""
  return os.path.join(workdir, "checkpoints")


def split_place(place: str, what: str) -> tuple[str, int | None]:
  """Splits 'DIR@STEP' to (DIR, STEP) and 'DIR' to (DIR, None).

  Args:
    place: from a flag or config key.
    what: that flag or key, for the error.

  Raises:
    UserError: the step is not a number.
  """
  folder, at, step = place.rpartition("@")
  if not at:
    return place, None
  if not step.isdigit():
    raise errors.UserError(
        f"{what}={place}: the step after @ must be a number"
    )
  return folder, int(step)


def is_released(folder: str) -> bool:
  """Returns whether a folder is a released model (export/model_folder.py)."""
  return os.path.isfile(os.path.join(folder, RELEASED))


def write(
    workdir: str,
    config: Mapping[str, Any],
    network: str,
    params: Params,
    step: int,
    facts: Mapping[str, Any],
) -> None:
  """Writes a work directory of one network, atomically.

  It can be sampled, evaluated and started from (training.init_from); it cannot
  be resumed, since it has no optimizer state.

  Args:
    workdir: must be empty or absent.
    config: resolved config of the network, as JSON values.
    network: name of the sampled network.
    params: of that network; there are no averages.
    step: of the checkpoint.
    facts: JSON values, the source of the network.

  Raises:
    UserError: workdir exists.
  """
  state = {"networks": {network: {"params": params}}, "averages": {}}
  meta = {"config": config, "version": __version__, **facts}
  with files.new_folder(workdir) as folder:
    files.write_json(os.path.join(folder, "config.json"), config)
    with checkpoint.Checkpoints(checkpoint_dir(folder)) as saved:
      saved.save(step, state, meta)


def choose(
    network: str, state: Any, average: str | None, what: str
) -> tuple[str, Params]:
  """Returns parameters of a network, or one of its averages, from a state.

  Args:
    network: name of the sampled network.
    state: nested dict, as in a checkpoint.
    average: name of an average, 'params' for the parameters, None for the first
      average (the parameters if there is none).
    what: the config key, for the error.

  Returns:
    (name of the average, or 'params'; parameters).
  """
  averages = dict(state["averages"])
  if average is None:
    names = [n for n in averages if n.startswith(("ema_", "power_"))]
    average = names[0] if names else "params"
  if average == "params":
    return average, state["networks"][network]["params"]
  if average not in averages:
    raise errors.unknown_name(what, average, [*averages, "params"])
  return average, averages[average]


def load_params(workdir: str, average: str | None) -> Params:
  """Loads parameters of the newest good checkpoint of a run, on the host.

  Raises:
    UserError: no run, or no good checkpoint.
  """
  saved = checkpoint.Checkpoints(checkpoint_dir(workdir))
  _, state, _ = saved.read_raw()
  # The sampled network of every method with several.
  network = "student"
  return choose(network, state, average, "training.init_average")[1]


def load_frozen(experiment: build.Experiment) -> dict[str, Params]:
  """Loads the parameters of the frozen networks, on the host.

  Raises:
    UserError: no good checkpoint of a run.
  """
  section = experiment.config.method
  inputs = build.example_batch(experiment)

  def load(name, part):
    if isinstance(part, build.Experiment):
      return load_run(part, section[name], section[f"{name}_average"])[2]
    # The same draws at every start, whatever the seed: they are not saved.
    params = part.init(jax.random.key(0), *inputs)
    return jax.tree.map(np.asarray, params)

  return {k: load(k, v) for k, v in experiment.frozen.items()}


def load_run(
    experiment: Any,
    workdir: str,
    average: str | None = None,
    step: int | None = None,
) -> tuple[int, str, Params]:
  """Loads (step, name of the average, parameters) of a good checkpoint.

  Args:
    experiment: build.Experiment of the run.
    workdir: of the run.
    average: name; 'posthoc_0.15' is the average of that sigma_rel, computed
      from all checkpoints; None is `sample.average`.
    step: of the checkpoint; None is the newest.

  Raises:
    UserError: no checkpoint, or a released model in place of a run.
  """
  if is_released(workdir):
    raise errors.UserError(
        f"{workdir} is a released model, expected a run; convert it by python "
        f"-m bcm_jax.release.hub unpack {workdir} WORKDIR"
    )
  saved = checkpoint.Checkpoints(checkpoint_dir(workdir))
  average = average or experiment.config.sample.average
  step, state, _ = saved.read_raw(step)
  name = experiment.method.sampled_network
  if average is not None and average.startswith(_POSTHOC):
    params = _posthoc(
        saved, step, average, experiment.config.training.ema_stds
    )
  else:
    average, params = choose(name, state, average, "sample.average")
  network = experiment.method.networks[name]
  return step, average, network.without_heads(params)


def _posthoc(saved, step: int, average: str, stds) -> Params:
  """Computes a power-function average of any length; see training/phema.py."""
  try:
    std = float(average.removeprefix(_POSTHOC))
  except ValueError as e:
    raise errors.UserError(
        f"sample.average={average!r} must end in a sigma_rel: posthoc_0.15"
    ) from e
  if not stds:
    raise errors.UserError(
        f"sample.average={average!r} needs power-function averages; train "
        "with training.ema_stds=0.05,0.1 and checkpoint.keep=none"
    )
  stored = [(at, s) for at in saved.all_steps() if 0 < at <= step for s in stds]
  weights = phema.coefficients(
      [at for at, _ in stored], [s for _, s in stored], step, std
  )

  def trees():
    for at in sorted({at for at, _ in stored}):
      _, state, _ = saved.read_raw(at)
      yield from (state["averages"][train_state.power_name(s)] for s in stds)

  return phema.reconstruct(trees(), weights)
