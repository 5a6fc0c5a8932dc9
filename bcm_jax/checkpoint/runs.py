"""Work directories: reads parameters and averages from checkpoints."""

from collections.abc import Mapping
import os
from typing import Any

import jax
import numpy as np

from bcm_jax import __version__
from bcm_jax import errors
from bcm_jax.checkpoint import checkpoint
from bcm_jax.training import phema
from bcm_jax.training import train_state
from bcm_jax.utils import files

Params = Any
_POSTHOC = "posthoc_"
# File with the weights of a released model.
RELEASED = "model.safetensors"


def checkpoint_dir(workdir: str) -> str:
  """Returns the folder of a run's checkpoints."""
  return os.path.join(workdir, "checkpoints")


def split_place(place: str, what: str) -> tuple[str, int | None]:
  """Splits 'DIR@STEP' into (DIR, STEP) and 'DIR' into (DIR, None).

  The name of a folder that exists is not split.

  Args:
    place: value of a flag or config key.
    what: the flag or key, for the error.

  Raises:
    UserError: the step is not a number.
  """
  folder, at, step = place.rpartition("@")
  if not at or os.path.isdir(place):
    return place, None
  if not step.isdigit():
    raise errors.UserError(
        f"{what}: got {place}, expected DIR@STEP with a number after @; "
        "correct the step"
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
  """Writes a work directory with one network, atomically.

  The result can be sampled, evaluated and used by training.init_from. It cannot
  be resumed, since it has no optimizer state.

  Args:
    workdir: folder to create; must be empty or absent.
    config: resolved config of the network, as JSON values.
    network: name of the sampled network.
    params: parameters of that network; no averages are written.
    step: step of the checkpoint.
    facts: JSON values that describe the source of the network.

  Raises:
    UserError: workdir exists and is not empty.
  """
  state = {"networks": {network: {"params": params}}, "averages": {}}
  meta = {"config": config, "version": __version__, **facts}
  with files.new_folder(workdir) as folder:
    files.write_json(os.path.join(folder, "config.json"), config)
    with checkpoint.Checkpoints(checkpoint_dir(folder)) as saved:
      saved.save(step, state, meta)


def check_finite(place: str, params: Params) -> None:
  """Raises UserError if parameters are NaN or infinite.

  Args:
    place: file or folder, for the error.
    params: nested dicts of arrays on the host.
  """
  bad = [
      "/".join(str(getattr(k, "key", k)) for k in path)
      for path, value in jax.tree_util.tree_leaves_with_path(params)
      if not np.isfinite(np.asarray(value, np.float32)).all()
  ]
  if bad:
    raise errors.UserError(
        f"{place}: got values that are not finite in {len(bad)} tensors, such "
        f"as {bad[0]}, expected finite weights; use a checkpoint from before "
        "they diverged"
    )


def choose(
    network: str, state: Any, average: str | None, what: str
) -> tuple[str, Params]:
  """Selects parameters of a network, or one of its averages, from a state.

  Args:
    network: name of the sampled network.
    state: nested dicts, as in a checkpoint.
    average: name of an average; 'params' selects the parameters; None selects
      the first average, or the parameters of a state without averages.
    what: the config key, for the error.

  Returns:
    (name of the average or 'params', parameters).

  Raises:
    UserError: unknown average.
  """
  averages = dict(state["averages"])
  if average is None:
    names = [n for n in averages if n.startswith(("ema_", "phema_"))]
    average = names[0] if names else "params"
  if average == "params":
    return average, state["networks"][network]["params"]
  if average not in averages:
    raise errors.unknown_name(what, average, [*averages, "params"])
  return average, averages[average]


def load_params(place: str, average: str | None) -> Params:
  """Loads parameters of training.init_from from a checkpoint, on the host.

  Args:
    place: work directory of the run, DIR or DIR@STEP; without a step the newest
      good checkpoint.
    average: see `choose`.

  Raises:
    UserError: no good checkpoint, none of this step, unknown average, or values
      that are not finite.
  """
  workdir, step = split_place(place, "training.init_from")
  saved = checkpoint.Checkpoints(checkpoint_dir(workdir))
  _, state, _ = saved.read_raw(step)
  # All methods with several networks name the sampled one 'student'.
  network = "student"
  params = choose(network, state, average, "training.init_average")[1]
  check_finite(workdir, params)
  return params


def load_run(
    experiment: Any,
    workdir: str,
    average: str | None = None,
    step: int | None = None,
) -> tuple[int, str, Params]:
  """Loads parameters of the sampled network from a checkpoint, on the host.

  Args:
    experiment: build.Experiment of the run.
    workdir: work directory of the run.
    average: name of an average; 'posthoc_0.15' computes the power-function EMA
      of sigma_rel 0.15 from all checkpoints (EDM2, algorithm 3); None is
      `sample.average`.
    step: step of the checkpoint; None is the newest good one.

  Returns:
    (step, name of the average, parameters).

  Raises:
    UserError: no good checkpoint, unknown average, values that are not finite,
      another config or network than that of the checkpoint, or a released model
      instead of a run.
  """
  if is_released(workdir):
    raise errors.UserError(
        f"{workdir}: a released model, expected a run; convert it by bcm_jax "
        f"hub unpack {workdir} WORKDIR"
    )
  saved = checkpoint.Checkpoints(checkpoint_dir(workdir))
  average = average or experiment.config.sample.average
  step, state, meta = saved.read_raw(step)
  experiment.check_config(meta, workdir)
  name = experiment.method.sampled_network
  if average is not None and average.startswith(_POSTHOC):
    params = _posthoc(
        saved, step, average, experiment.config.training.ema_stds
    )
  else:
    average, params = choose(name, state, average, "sample.average")
  params = experiment.method.networks[name].without_heads(params)
  experiment.check_params(params, f"{workdir}, step {step}")
  check_finite(f"{workdir}, step {step}, {average}", params)
  return step, average, params


def _posthoc(saved, step: int, average: str, stds) -> Params:
  """Computes a power-function EMA of any sigma_rel; see training/phema.py."""
  try:
    std = float(average.removeprefix(_POSTHOC))
  except ValueError as e:
    raise errors.UserError(
        f"sample.average: got {average!r}, expected {_POSTHOC} and a number "
        "(sigma_rel); write for example posthoc_0.15"
    ) from e
  if not stds:
    raise errors.UserError(
        f"sample.average: got {average!r}, expected a run with power-function "
        "EMAs; train with training.ema_stds=0.05,0.1 and checkpoint.keep=none"
    )
  stored = [(t, s) for t in saved.all_steps() if 0 < t <= step for s in stds]
  weights = phema.coefficients(
      [t for t, _ in stored], [s for _, s in stored], step, std
  )

  def trees():
    for time in sorted({t for t, _ in stored}):
      _, state, _ = saved.read_raw(time)
      yield from (state["averages"][train_state.phema_name(s)] for s in stds)

  return phema.reconstruct(trees(), weights)
