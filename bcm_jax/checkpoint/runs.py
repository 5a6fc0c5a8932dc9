"""What a work directory holds: checkpoints, and parameters out of them."""

from collections.abc import Mapping
import os
from typing import Any

import jax
import ml_collections
import numpy as np

from bcm_jax import __version__
from bcm_jax import errors
from bcm_jax.checkpoint import checkpoint
from bcm_jax.config import build
from bcm_jax.config import resolve
from bcm_jax.export import model_folder
from bcm_jax.training import phema
from bcm_jax.training import train_state
from bcm_jax.utils import files

Params = Any
_POSTHOC = "posthoc_"


def checkpoint_dir(workdir: str) -> str:
  """Where a run keeps its checkpoints."""
  return os.path.join(workdir, "checkpoints")


def split_place(place: str, what: str) -> tuple[str, int | None]:
  """'DIR@STEP' -> (DIR, STEP), 'DIR' -> (DIR, None).

  Raises:
    UserError: the step is no number; `what` is the flag or key to name.
  """
  folder, at, step = place.rpartition("@")
  if not at:
    return place, None
  if not step.isdigit():
    raise errors.UserError(
        f"{what}={place}: the step after @ must be a number"
    )
  return folder, int(step)


def config_of(
    workdir: str, overrides: Mapping[str, str] | None = None
) -> ml_collections.ConfigDict:
  """The config of the run in a work directory, with 'section.key' -> text.

  Raises:
    UserError: no run there.
  """
  config = resolve.of_run(workdir, overrides)
  if config is None:
    raise errors.UserError(
        f"{workdir} holds no run (no config.json); give the work directory of "
        "one, trained or converted"
    )
  return config


def write(
    workdir: str,
    experiment: build.Experiment,
    params: Params,
    step: int,
    facts: dict[str, Any],
) -> None:
  """Makes a work directory of one network, whole or not at all.

  It can be sampled, evaluated and started from (training.init_from); a run
  cannot go on in it, since it has no optimiser's state.

  Args:
    workdir: must not hold anything yet.
    experiment: that the network belongs to; its config becomes the run's.
    params: of the sampled network; there are no averages beside them.
    step: of the checkpoint.
    facts: JSON values, where the network comes from.

  Raises:
    UserError: something is there already.
  """
  config = experiment.config
  state = {
      "networks": {experiment.method.sampled_network: {"params": params}},
      "averages": {},
  }
  meta = {"config": resolve.to_json(config), "version": __version__, **facts}
  with files.new_folder(workdir) as made:
    resolve.write(config, made)
    with checkpoint.Checkpoints(checkpoint_dir(made)) as saved:
      saved.save(step, state, meta)


def choose(
    network: str, state: Any, average: str | None, what: str
) -> tuple[str, Params]:
  """Parameters of a network or one of its averages, out of a state's dict.

  Args:
    network: name of the sampled network.
    state: nested dict as a checkpoint holds it.
    average: name of an average, 'params' for the parameters themselves, None
      for the first average (the parameters where there is none).
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
  """Parameters of the newest good checkpoint of another run, on the host.

  Raises:
    UserError: no run there, or no good checkpoint.
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
    experiment: build.Experiment,
    workdir: str,
    average: str | None = None,
    step: int | None = None,
) -> tuple[int, str, Params]:
  """(step, name of the average, parameters) of a good checkpoint of a run.

  Args:
    experiment: of the run.
    workdir: where it is.
    average: which of its averages, 'posthoc_0.15' for one of that sigma_rel
      made of all checkpoints; None is what section sample says.
    step: of the checkpoint; None is the newest.

  Raises:
    UserError: no checkpoint, or a folder to give away in place of a run.
  """
  if model_folder.is_released(workdir):
    raise errors.UserError(
        f"{workdir} is a network to give away and no run; make one of it by "
        f"python -m bcm_jax.release.hub unpack {workdir} WORKDIR"
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
  """An average of any length, of the power-function averages on disk."""
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
