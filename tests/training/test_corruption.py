"""Every kind of damage x how many checkpoints have it: what is taken instead.

The step, the words that are logged, and the exit status of the command.
"""

import json
import logging
import shutil

import numpy as np
import pytest

from bcm_jax import errors
from bcm_jax.checkpoint import digests
from bcm_jax.checkpoint.checkpoint import Checkpoints
from bcm_jax.utils import cli
from bcm_jax.utils import hashing
from tests.training import damages

# Orbax leaves a coroutine behind when a read fails.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning")

STEPS = (1, 2, 3)


def state(step):
  """Two leaves of one shape, so that nothing but values tells them apart."""
  draw = np.random.default_rng(step)
  return {"params": {
      name: draw.normal(size=(40, 25)).astype(np.float32) for name in "ab"
  }, "step": np.int32(step)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  folder = tmp_path_factory.mktemp("run")
  with Checkpoints(folder / "checkpoints") as checkpoints:
    for step in STEPS:
      checkpoints.save(step, state(step), {"position": step})
  return folder


@pytest.fixture
def run(saved, tmp_path):
  shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
  return tmp_path


def delete_metadata(folder):
  (folder / "meta" / "metadata").unlink()


def swap_leaves(folder):
  """The files of two leaves change places: whole, and each a good array."""
  tree = state(int(folder.name))
  tree["params"] = {"a": tree["params"]["b"], "b": tree["params"]["a"]}
  with Checkpoints(folder.parent.parent / "swapped") as other:
    other.save(int(folder.name), tree, {})
  shutil.rmtree(folder / "state")
  swapped = folder.parent.parent / "swapped" / folder.name / "state"
  shutil.move(swapped, folder / "state")


def stale_digest(folder):
  """The record is whole, but the digest of a leaf is that of another step."""
  path = folder / "meta" / "metadata"
  record = json.loads(path.read_text())
  del record["sha256"]
  (entry,) = [e for e in record["leaves"] if e["path"] == ["params", "a"]]
  other = digests.make_record(9, digests.flatten(state(9)), {})
  (wrong,) = [e for e in other["leaves"] if e["path"] == ["params", "a"]]
  assert entry["sha256"] != wrong["sha256"]
  entry["sha256"] = wrong["sha256"]
  record["sha256"] = hashing.json_digest(record)
  path.write_text(json.dumps(record))


# Damage -> words of the reason.
DAMAGES = {
    damages.truncate: "state: ", damages.flip_bit: "state: ",
    damages.delete_file: "state: ", delete_metadata: "meta: ",
    damages.zero: "state: ",
    swap_leaves: "state: digest of leaf params/a differs",
    stale_digest: "state: digest of leaf params/a differs",
}
# Steps with the damage -> step that is taken.
EXTENTS = {(3,): 2, (3, 2): 1, (3, 2, 1): None}


def error_lines(caplog):
  return [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR]


@pytest.mark.parametrize("extent", EXTENTS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage(run, caplog, capsys, damage, extent):
  for step in extent:
    damage(run / "checkpoints" / str(step))
  taken, reason = EXTENTS[extent], DAMAGES[damage]
  checkpoints = Checkpoints(run / "checkpoints")

  def restore():
    with cli.reporting():
      return checkpoints.restore(state(0))

  if taken is None:
    with pytest.raises(SystemExit) as done:
      restore()
    assert done.value.code == errors.EXIT_BAD_INPUT
    (said,) = capsys.readouterr().err.splitlines()
    assert "got damaged checkpoints" in said
    assert all(f"step {step}: {reason}" in said for step in extent)
    assert not (run / "damaged").exists()
    assert checkpoints.all_steps() == list(STEPS)
  else:
    step, tree, meta = restore()
    assert (step, meta) == (taken, {"position": taken})
    for name, leaf in state(taken)["params"].items():
      np.testing.assert_array_equal(tree["params"][name], leaf)
    names = sorted(p.name for p in (run / "damaged").iterdir())
    assert names == sorted(f"{bad}-0" for bad in extent)
    assert checkpoints.all_steps() == [s for s in STEPS if s not in extent]
  lines = error_lines(caplog)
  assert len(lines) == len(extent)
  for bad, line in zip(extent, lines, strict=True):
    assert f"step {bad} " in line and reason in line and "\n" not in line
    ending = "left in place" if taken is None else f"to step {taken}"
    assert line.endswith((ending, f"{ending})"))
