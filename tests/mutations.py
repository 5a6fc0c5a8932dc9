"""Breaks the code on purpose and sees the tests turn red.

  python -m tests.mutations            # all, in a copy of the checkout
  python -m tests.mutations lock       # those whose name holds 'lock'

Each mutation is an exact replacement of text and a test that must fail for it;
tests/mutations.md says why. A mutation that no test notices, or one whose text
is not there any more, is an error.
"""

from concurrent import futures
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[1]
COPIED = ("bcm_jax", "tests", "configs", "pyproject.toml")


class Mutation(NamedTuple):
  """What is replaced in a file of bcm_jax, and the test that notices."""

  name: str
  file: str
  old: str
  new: str
  test: str


_RESUMING = "training/test_resuming.py::"
_ROLLING = "training/test_rolling_back.py::"
_ONCE = _ROLLING + "test_a_roll_back_goes_on_with_other_data[once]"
_NOTICE = (
    _RESUMING
    + "test_a_notice_saves_the_step_and_the_next_start_goes_on[5]"
)
_DAMAGED = (
    _RESUMING + "test_a_damaged_newest_checkpoint_costs_its_steps_alone"
)

MUTATIONS = (
  Mutation(
    "data position dropped on resuming",
    "train.py",
    "read(data_offset + step))",
    "read(data_offset + step - calls[0][0]))",
    _NOTICE,
  ),
  Mutation(
    "data offset dropped",
    "train.py",
    "read(data_offset + step))",
    "read(step))",
    _ONCE,
  ),
  Mutation(
    "Adam's count reset on resuming",
    "checkpoint/recovery.py",
    '    logging.info("resuming at step %d", restored_step)\n',
    "    state = jax.tree_util.tree_map_with_path(\n"
    "        lambda p, x: 0 * x if 'count' in str(p[-1]) else x, state)\n",
    _NOTICE,
  ),
  Mutation(
    "key of the step reused",
    "training/train_step.py",
    "position = state.step + state.data_offset",
    "position = 0 * state.step",
    "training/test_train_step.py::test_every_step_draws_anew_and_the_seed_matters",
  ),
  Mutation(
    "averages late by one",
    "training/train_step.py",
    "averages = _averages(\n          method, options, state, networks,",
    "averages = _averages(\n          method, options, state, state.networks,",
    "training/test_train_step.py::"
    "test_averages_take_the_updated_parameters_at_their_own_rates",
  ),
  Mutation(
    "bad update not skipped",
    "training/train_step.py",
    "finite, updated, lambda:",
    "True, updated, lambda:",
    _ROLLING + "test_one_bad_step_is_skipped_and_leaves_no_trace",
  ),
  Mutation(
    "updated parameters not judged",
    "training/train_step.py",
    'metrics[name]["grad_norm"], new_networks[name])',
    'metrics[name]["grad_norm"])',
    "training/test_train_step.py::"
    "test_an_update_that_is_not_finite_is_not_kept_of_any_network",
  ),
  Mutation(
    "saves within a streak count as progress",
    "checkpoint/recovery.py",
    "if s <= before",
    "",
    _ROLLING + "test_a_run_that_diverges_never_ends_as_done",
  ),
  Mutation(
    "pmean left out",
    "training/train_step.py",
    "result = jax.lax.pmean(result, options.axis_name)",
    "pass",
    "training/test_sharding.py::test_training_is_the_same[pmap-4]",
  ),
  Mutation(
    "all agree where one does",
    "training/multihost.py",
    ".all())",
    ".any())",
    "training/test_checkpoint_processes.py::"
    "test_two_hosts_agree_on_the_fallback",
  ),
  Mutation(
    "notice forgotten after a call",
    "training/multihost.py",
    "self._preempted |= multi",
    "self._preempted = multi",
    "training/test_multihost.py::test_jax_tells_once_and_the_notice_remembers",
  ),
  Mutation(
    "notice at the end ignored",
    "training/multihost.py",
    "    if self._preempted:\n      raise errors.Preempted(_NOTHING_TO_SAVE)\n",
    "",
    "training/test_multihost.py::test_a_notice_waits_where_it_is_deferred",
  ),
  Mutation(
    "lock ignored",
    "checkpoint/workdir_lock.py",
    "    if self._free(record):\n      return number\n    logging",
    "    return number\n    logging",
    "checkpoint/test_workdir_lock.py::"
    "test_a_second_writer_is_refused_while_the_first_beats",
  ),
  Mutation(
    "lock of a dead process waited for",
    "checkpoint/workdir_lock.py",
    "return started is None or started != record.get(\"started\")",
    "return False",
    "checkpoint/test_workdir_lock.py::"
    "test_a_dead_process_of_this_machine_is_not_waited_for",
  ),
  Mutation(
    "lock that is gone counts as held",
    "checkpoint/workdir_lock.py",
    "number != self._number or bool(",
    "number > self._number or bool(",
    "checkpoint/test_workdir_lock.py::"
    "test_a_lost_lock_is_noticed_and_not_released[False]",
  ),
  Mutation(
    "lock not looked at before a save",
    "train.py",
    "(committing and not self.lock.look())",
    "False",
    "training/test_mishaps.py::"
    "test_a_writer_that_was_replaced_stops_before_it_saves",
  ),
  Mutation(
    "digest not checked",
    "checkpoint/digests.py",
    'if _digest(array) != entry["sha256"]:',
    "if False:",
    "training/test_corruption.py::test_damage",
  ),
  Mutation(
    "digest of the record not checked",
    "checkpoint/checkpoint.py",
    "if digest != hashing.json_digest(record):",
    "if False:",
    "checkpoint/test_checkpoint.py",
  ),
  Mutation(
    "call crosses a save",
    "training/sharding.py",
    "for s in (most, *stops))",
    "for s in (most,))",
    "training/test_layout.py",
  ),
  Mutation(
    "rules ignored",
    "training/sharding.py",
    "spec = spec_of(self.rules,",
    "spec = spec_of((),",
    "training/test_sharding.py::test_the_state_is_really_cut",
  ),
  Mutation(
    "state not donated",
    "training/sharding.py",
    'static_argnames="phase", donate_argnums=0)',
    'static_argnames="phase")',
    "training/test_sharding.py::"
    "test_one_executable_no_transfer_and_no_copy[jit-4]",
  ),
  Mutation(
    "sharding spelt in two ways",
    "training/sharding.py",
    "PartitionSpec(*rule.spec[:used])",
    "PartitionSpec(*rule.spec)",
    "training/test_sharding.py::"
    "test_one_executable_no_transfer_and_no_copy[pattern-2x2]",
  ),
  Mutation(
    "data offset kept on rolling back",
    "training/train_state.py",
    "data_offset=jnp.int32(position - int(good.step))",
    "data_offset=good.data_offset",
    _ONCE,
  ),
  Mutation(
    "saved before it was checked",
    "train.py",
    "guard.check(step, metrics, wait=saving,",
    "guard.check(step, metrics, wait=last,",
    _ROLLING + "test_a_roll_back_goes_on_with_other_data[at_save]",
  ),
  Mutation(
    "rollbacks forgotten on resuming",
    "checkpoint/recovery.py",
    "rollback and rollback.position", "None",
    _ROLLING
    + "test_a_roll_back_that_is_killed_resumes_bit_for_bit[after_second]",
  ),
  Mutation(
    "rollbacks counted anew at every checkpoint",
    "training/nonfinite.py",
    "newest <= rollbacks[-1].reached:",
    "newest <= rollbacks[-1].step:",
    _ROLLING + "test_a_run_that_fails_at_the_same_step_for_ever_stops",
  ),
  Mutation(
    "metrics of lost steps kept",
    "training/metric_writers.py",
    "jsonl.truncate_after(resume_step)",
    "pass",
    _DAMAGED,
  ),
  Mutation(
    "last save not waited for",
    "checkpoint/checkpoint.py",
    "if not (self._settle() and started):",
    "self.known = [*self.known, step]\n      if not started:",
    "checkpoint/test_saver.py",
  ),
  Mutation(
    "failed saves not counted",
    "checkpoint/checkpoint.py",
    "self.failures += 1",
    "pass",
    "checkpoint/test_saver.py",
  ),
  Mutation(
    "watchdog does not bite",
    "training/watchdog.py",
    "self._end(errors.EXIT_HANGING)",
    "pass",
    "training/test_watchdog.py",
  ),
  Mutation(
    "seconds counted twice",
    "training/goodput.py",
    "if self._inside is not None:\n      yield\n      return",
    "if False:\n      yield\n      return",
    "training/test_goodput.py",
  ),
  Mutation(
    "config drift let pass",
    "config/resolve.py",
    '_FREE = (\n    "parallel",',
    '_FREE = (\n    "optimizer", "model", "parallel",',
    _RESUMING + "test_config_drift_is_refused_with_a_difference",
  ),
)


def mutate(root: pathlib.Path, mutation: Mutation) -> None:
  """Replaces the text, which must be there once."""
  path = root / "bcm_jax" / mutation.file
  text = path.read_text(encoding="utf-8")
  if text.count(mutation.old) != 1:
    raise ValueError(f"{mutation.name}: {mutation.old!r} is not there once")
  path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")


def notices(mutation: Mutation, folder: pathlib.Path) -> bool:
  """Whether the test fails under a mutation, in a copy of the checkout."""
  root = folder / mutation.name.replace(" ", "-")
  for name in COPIED:
    copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
    root.mkdir(exist_ok=True)
    copy(ROOT / name, root / name)
  mutate(root, mutation)
  env = os.environ | {
    "PYTHONPATH": str(root),
    "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"),
    "JAX_PLATFORMS": "cpu",
  }
  done = subprocess.run(
    [
      sys.executable,
      "-m",
      "pytest",
      "-x",
      "-q",
      "-p",
      "no:cacheprovider",
      f"tests/{mutation.test}",
    ],
    cwd=root,
    env=env,
    capture_output=True,
    text=True,
    timeout=600,
    check=False,
  )
  shutil.rmtree(root)
  # 1: tests failed. Others: none was found, or pytest itself broke.
  if done.returncode not in (0, 1):
    raise RuntimeError(f"{mutation.name}: {done.stdout}{done.stderr}")
  return done.returncode == 1


def main(wanted: str = "") -> int:
  """Runs mutations, two at a time; returns how many no test noticed."""
  chosen = [m for m in MUTATIONS if wanted in m.name]
  missed = 0
  with tempfile.TemporaryDirectory() as folder:
    with futures.ThreadPoolExecutor(2) as pool:
      found = pool.map(lambda m: (m, notices(m, pathlib.Path(folder))), chosen)
      for mutation, noticed in found:
        missed += not noticed
        print(
          f"{'noticed' if noticed else 'MISSED '}  {mutation.name}", flush=True
        )
  print(f"{len(chosen) - missed} of {len(chosen)} mutations were noticed")
  return missed


if __name__ == "__main__":
  sys.exit(min(main(*sys.argv[1:2]), 1))
