"""The SLURM job, with stand-ins for srun and scontrol."""

import pathlib
import re
import subprocess

import pytest

from tests.launch import harness


def slurm(checkout, *args, **more):
  """A SLURM job: a copy of the script, from a folder of SLURM's."""
  copy = checkout.folder / "spool_script"
  copy.write_text((checkout.root / "launch" / "slurm.sh").read_text())
  copy.chmod(0o755)
  log = pathlib.Path(checkout.env()["STAND_IN_LOG"])
  log.write_text("")
  settings = {"SLURM_JOB_ID": "17", "SLURM_SUBMIT_DIR": checkout.root} | more
  result = subprocess.run(
      [str(copy), *args], env=checkout.env(**settings), text=True,
      capture_output=True, check=False, cwd=checkout.root, timeout=30,
  )
  result.log = checkout.plain(log.read_text())
  return result


@pytest.mark.parametrize("status", [0, 65, 75])
def test_slurm_requeues_what_was_preempted(checkout, status):
  checkout.answer({"to": "srun", "status": status})
  result = slurm(checkout, "--config=a b")
  assert result.returncode == status
  harness.check_golden(f"slurm_{status}.txt", result.log)


def test_slurm_starts_crashes_again_in_the_allocation(checkout):
  checkout.answer({"to": "srun", "status": 134, "times": 1})
  supervise = checkout.root / "launch" / "supervise.sh"
  text = supervise.read_text().replace("first_pause=10", "first_pause=0")
  supervise.write_text(text)
  result = slurm(checkout, "--config=a")
  assert result.returncode == 0, result.stderr
  assert result.log.count('["srun"') == 2
  assert "scontrol" not in result.log


def test_slurm_asks_for_what_jax_expects(checkout):
  text = (checkout.root / "launch" / "slurm.sh").read_text()
  asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text, re.MULTILINE))
  # One task a GPU, which finds its own by its number.
  assert asked["ntasks-per-node"] == asked["gpus-per-node"]
  assert "gpus-per-task" not in asked
  # To the tasks, not to the script.
  assert asked["signal"].startswith("TERM@")
  assert {"requeue", "open-mode"} <= set(asked)


def test_slurm_from_elsewhere_and_without_slurm(checkout):
  result = slurm(checkout, SLURM_SUBMIT_DIR=checkout.folder)
  assert result.returncode == 65
  assert "submit from the root" in result.stderr
  outside = checkout.run("slurm.sh", "--config=a")
  assert outside.returncode == 65
  assert "not a SLURM job" in outside.stderr
  dry = checkout.run("slurm.sh", "--dry-run", "--config=a b")
  assert not dry.calls
  assert "srun --kill-on-bad-exit=0" in dry.stdout
  assert "scontrol requeue" in dry.stdout
