"""Training from the first step, or the newest checkpoint, to the last number.

`train_and_evaluate(config, workdir)` can be called from a notebook; main.py
is a thin shell around it. The loop itself is loop.py.
"""

import contextlib
import os
import time

from flax import serialization
import jax
import ml_collections

from bcm_jax import __version__
from bcm_jax import errors
from bcm_jax import loop
from bcm_jax.checkpoint import runs
from bcm_jax.checkpoint import workdir_lock
from bcm_jax.config import build
from bcm_jax.config import resolve
from bcm_jax.evaluation import evaluate
from bcm_jax.training import fault_injection
from bcm_jax.training import goodput
from bcm_jax.training import multihost
from bcm_jax.training import train_state
from bcm_jax.utils import files

# Written when a run is finished; launchers stop there.
DONE = "DONE"


def train_and_evaluate(
    config: ml_collections.ConfigDict, workdir: str
) -> train_state.TrainState:
  """Trains, resuming if the work directory holds a run, then evaluates.

  Args:
    config: resolved config, see config.resolve.
    workdir: receives config.json, metrics.jsonl, tensorboard/, checkpoints/,
      goodput/, at the end eval/, samples/ and pictures, and DONE. All hosts
      must see the same folder.

  Returns:
    The final state.

  Raises:
    UserError: for a config that contradicts itself or the run in workdir, for
      a second writer, or for a run of non-finite steps.
    MachineError: checkpoints cannot be written.
    Preempted: by SIGTERM; the state is saved.
  """
  began = time.monotonic()
  experiment = build.build(config)
  # First of all: what is missing stops it before it writes.
  evaluate.check_before_training(experiment)
  source = experiment.training_source()
  with contextlib.ExitStack() as stack:
    owner = _take(experiment.config, workdir, stack)
    accounts = goodput.Goodput(
        workdir if jax.process_index() == 0 else None, began=began
    )
    notice = multihost.Notice()
    stack.enter_context(notice.listening())
    run = loop.Run(experiment, workdir, source, accounts, notice, owner)
    state = run.train()
    _finish(experiment, workdir, state, accounts)
  return state


def _take(
    config: ml_collections.ConfigDict, workdir: str, stack
) -> workdir_lock.Lock | None:
  """Makes this job the folder's one writer; process 0 does it for all."""
  owner, error = None, None
  if jax.process_index() == 0:
    try:
      owner = prepare_workdir(config, workdir)
      stack.callback(owner.release)
    except errors.UserError as e:
      error = e
  multihost.raise_everywhere(error)
  return owner


def prepare_workdir(
    config: ml_collections.ConfigDict, workdir: str
) -> workdir_lock.Lock:
  """Makes the directory, or checks that its run may go on; writes config.json.

  Returns:
    The lock of the directory, to be released in the end.

  Raises:
    UserError: another config's run or another job is there, or it cannot be
      written.
  """
  with contextlib.ExitStack() as stack:
    try:
      run = resolve.of_run(workdir)
      if run is not None:
        resolve.check_resume(run, config)
      os.makedirs(workdir, exist_ok=True)
      owner = stack.enter_context(workdir_lock.Lock(workdir))
      done = os.path.join(workdir, DONE)
      if os.path.exists(done):  # More steps, or numbers made anew.
        os.remove(done)
      resolve.write(config, workdir)
    except OSError as e:
      raise errors.UserError(
          f"cannot write to --workdir={workdir}: {e.strerror}; choose another"
      ) from e
    stack.pop_all()  # The lock is kept from here on.
  fault_injection.point("config_written")
  return owner


def _finish(experiment, workdir: str, state, accounts) -> None:
  """Numbers and pictures of the last step, then the mark that all is done."""
  total = experiment.config.training.num_steps
  with accounts.part("eval"):
    average, params = runs.choose(
        experiment.method.sampled,
        serialization.to_state_dict(state),
        experiment.config.sample.average,
        "sample.average",
    )
    params = multihost.to_host(params)
    evaluate.finish(experiment, workdir, total, average, params)
  accounts.save(total, total)
  fault_injection.point("before_done")
  if jax.process_index() == 0:
    facts = {"step": total, "version": __version__}
    files.write_json(os.path.join(workdir, DONE), facts)
