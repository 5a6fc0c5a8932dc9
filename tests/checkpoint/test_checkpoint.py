"""Checkpoints: exact, atomic, verified, never lost to one bad file."""

import logging
import os
import pathlib
import shutil

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bcm_jax.checkpoint import digests
from bcm_jax.checkpoint.checkpoint import Checkpoints
from bcm_jax.errors import UserError
from tests.training import damages

# Orbax leaves a coroutine behind when a read fails.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning")


@struct.dataclass
class State:
  step: jax.Array
  params: dict
  opt_state: tuple
  averages: dict


def make_state(seed=0):
  rng = np.random.default_rng(seed)
  params = {
      "w": jnp.asarray(rng.normal(size=(64, 33)), jnp.float32),
      "half": jnp.asarray(rng.normal(size=7), jnp.bfloat16),
      "odd/na.me": jnp.arange(3, dtype=jnp.int32),
      "nothing": None,
      "empty": {},
      "no_elements": jnp.zeros((0, 3)),
  }
  tx = optax.adam(optax.constant_schedule(1e-3))
  opt_state = tx.init({"w": params["w"]})
  return State(step=jnp.int32(seed), params=params, opt_state=opt_state,
               averages={"ema": {"w": params["w"] + 1}, "flags": np.True_})


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert np.asarray(x).dtype == np.asarray(y).dtype
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    assert np.shape(x) == np.shape(y)


def save_run(directory, steps, **kwargs):
  with Checkpoints(directory, **kwargs) as checkpoints:
    for step in steps:
      checkpoints.save(step, make_state(step), {"position": step * 10})


@pytest.fixture
def run(tmp_path):
  """A run directory whose checkpoints hold steps 1, 2 and 3."""
  save_run(tmp_path / "checkpoints", (1, 2, 3))
  return tmp_path


def test_round_trip_keeps_every_bit_type_and_empty_leaf(run):
  ckpt = Checkpoints(run / "checkpoints")
  state = make_state(3)
  for template in (state, jax.eval_shape(lambda: make_state(3))):
    step, restored, meta = ckpt.restore(template)
    assert (step, meta) == (3, {"position": 30})
    assert isinstance(restored, State)
    assert_same(restored, state)
    assert restored.params["half"].dtype == jnp.bfloat16
    assert restored.params["nothing"] is None
    assert restored.params["empty"] == {}
    assert isinstance(restored.params["w"], jax.Array)
  assert not (run / "damaged").exists()


def test_read_raw_needs_no_classes(run):
  step, tree, meta = Checkpoints(run / "checkpoints").read_raw(2)
  assert (step, meta) == (2, {"position": 20})
  assert sorted(tree) == ["averages", "opt_state", "params", "step"]
  assert isinstance(tree["params"]["w"], np.ndarray)
  np.testing.assert_array_equal(tree["params"]["w"], make_state(2).params["w"])
  assert tree["params"]["no_elements"].shape == (0, 3)
  assert tree["opt_state"]["0"]["count"].shape == ()


@pytest.mark.parametrize("make", [np.arange, jnp.arange])
def test_saving_copies_before_the_buffer_is_reused(make):
  """On CPU np.asarray shares memory with a buffer that may be donated."""
  leaf = make(100_000)
  host = digests.to_host(("x",), leaf)
  assert not np.shares_memory(host, np.asarray(leaf))
  np.testing.assert_array_equal(host, np.arange(100_000))


def test_keeps_the_newest_and_every_nth(tmp_path):
  save_run(tmp_path / "c", range(1, 8), keep=2, keep_every=4)
  ckpt = Checkpoints(tmp_path / "c")
  assert ckpt.all_steps() == [4, 6, 7]


def test_an_existing_step_is_replaced_only_by_force(run):
  with Checkpoints(run / "checkpoints") as ckpt:
    assert not ckpt.save(2, make_state(9), {"new": True})
    assert ckpt.read_raw(2)[2] == {"position": 20}
    assert ckpt.save(2, make_state(9), {"new": True}, force=True)
    assert ckpt.read_raw(2)[2] == {"new": True}
    assert ckpt.all_steps() == [1, 2, 3]


def test_reading_creates_nothing(tmp_path):
  ckpt = Checkpoints(tmp_path / "nowhere")
  assert ckpt.all_steps() == []
  with pytest.raises(UserError, match="nowhere"):
    ckpt.restore(make_state())
  with pytest.raises(UserError, match="nowhere"):
    ckpt.read_raw()
  assert list(tmp_path.iterdir()) == []


def test_unknown_step_names_the_known_ones(run):
  with pytest.raises(UserError, match="step 5, .*1, 2, 3"):
    Checkpoints(run / "checkpoints").restore(make_state(), step=5)


def test_unwritable_place_is_a_user_error(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="--workdir"):
    Checkpoints(tmp_path / "file" / "c").save(1, make_state(), {})


@pytest.mark.parametrize("leaf", [jax.random.key(0), "text", object()])
def test_leaves_that_are_not_numbers_are_refused(tmp_path, leaf):
  with pytest.raises(TypeError, match="a/b"):
    Checkpoints(tmp_path / "c").save(1, {"a": {"b": leaf}}, {})


def test_template_mismatch_is_not_damage(run, caplog):
  state = make_state()
  params = {**state.params, "w": jnp.zeros((64, 34)), "new": jnp.ones(2)}
  del params["half"]
  with pytest.raises(UserError) as error:
    Checkpoints(run / "checkpoints").restore(state.replace(params=params))
  text = str(error.value)
  assert "params/new is missing" in text
  assert "params/half is extra" in text
  assert "params/w is float32[64, 33], expected float32[64, 34]" in text
  assert "\n" not in text
  assert not (run / "damaged").exists()
  assert not errors(caplog)
  params = {**state.params, "half": jnp.zeros(7, jnp.float32)}
  with pytest.raises(UserError, match=r"half.*bfloat16\[7\]"):
    Checkpoints(run / "checkpoints").restore(state.replace(params=params))


# Damage.


def delete_meta(folder):
  shutil.rmtree(folder / "meta")


def delete_state(folder):
  shutil.rmtree(folder / "state")


def edit_meta(folder):
  path = folder / "meta" / "metadata"
  text = path.read_text()
  assert '"position"' in text
  path.write_text(text.replace('"position"', '"positioM"'))


def empty_meta(folder):
  (folder / "meta" / "metadata").write_text("{}")


def other_step(folder):
  shutil.rmtree(folder)
  shutil.copytree(folder.parent / "1", folder)


DAMAGES = (damages.truncate, damages.flip_bit, damages.zero,
           damages.delete_file, delete_meta, delete_state, edit_meta,
           empty_meta)


def errors(caplog):
  return [r.getMessage() for r in caplog.records
          if r.levelno >= logging.WARNING]


def snapshot(folder):
  return {str(p.relative_to(folder)): p.read_bytes()
          for p in damages.files(folder)}


@pytest.mark.parametrize("damage", (*DAMAGES, other_step))
def test_damaged_newest_falls_back_and_is_set_aside(run, caplog, damage):
  damage(run / "checkpoints" / "3")
  before = snapshot(run / "checkpoints" / "3")
  step, state, meta = Checkpoints(run / "checkpoints").restore(make_state())
  assert (step, meta) == (2, {"position": 20})
  assert_same(state, make_state(2))
  assert not (run / "checkpoints" / "3").exists()
  assert snapshot(run / "damaged" / "3-0") == before
  (line,) = errors(caplog)
  assert "step 3 is set aside (damaged:" in line
  assert "falling back to step 2" in line
  assert str(run / "damaged" / "3-0") in line and "\n" not in line


@pytest.mark.parametrize("damage", DAMAGES)
def test_all_damaged_refuses_every_time(run, caplog, damage):
  for step in "123":
    damage(run / "checkpoints" / step)
  before = snapshot(run)
  for _ in range(2):  # A launcher that restarts the job changes nothing.
    with pytest.raises(UserError) as error:
      Checkpoints(run / "checkpoints").restore(make_state())
    text = str(error.value)
    for step in "321":
      assert f"step {step}: " in text
    assert "move the folder away" in text and "\n" not in text
  assert snapshot(run) == before
  assert len(errors(caplog)) == 6


def test_two_newest_damaged(run):
  damages.flip_bit(run / "checkpoints" / "3")
  delete_meta(run / "checkpoints" / "2")
  assert Checkpoints(run / "checkpoints").restore(make_state())[0] == 1
  assert sorted(p.name for p in (run / "damaged").iterdir()) == ["2-0", "3-0"]


def test_no_single_lost_file_gives_wrong_values(run):
  """Any file may vanish: the same values come back, or an older step."""
  source = run / "checkpoints" / "3"
  for path in damages.files(source):
    home = run / "copy" / "checkpoints"
    shutil.copytree(run / "checkpoints", home)
    (home / "3" / path.relative_to(source)).unlink()
    step, state, _ = Checkpoints(home).restore(make_state())
    assert step in (2, 3)
    assert_same(state, make_state(step))
    shutil.rmtree(run / "copy")


def test_a_lost_commit_marker_costs_no_step(run):
  (run / "checkpoints" / "3" / "commit_success.txt").unlink()
  with Checkpoints(run / "checkpoints", keep=None) as ckpt:
    assert ckpt.save(4, make_state(4), {})
    assert ckpt.all_steps() == [1, 2, 3, 4]
    assert ckpt.restore(make_state(), step=3)[0] == 3


def test_explicit_damaged_step_has_no_fallback(run):
  damages.flip_bit(run / "checkpoints" / "3")
  with pytest.raises(UserError, match="step 3: state.*another step .1, 2"):
    Checkpoints(run / "checkpoints").restore(make_state(), step=3)
  assert (run / "checkpoints" / "3").exists()
  assert not (run / "damaged").exists()


def test_read_raw_falls_back_without_touching_the_run(run, caplog):
  damages.flip_bit(run / "checkpoints" / "3")
  before = snapshot(run)
  assert Checkpoints(run / "checkpoints").read_raw()[0] == 2
  assert snapshot(run) == before
  (line,) = errors(caplog)
  assert "step 3" in line and "using step 2" in line


def test_the_same_step_can_be_saved_and_damaged_again(run):
  with Checkpoints(run / "checkpoints") as ckpt:
    for number in range(2):
      damages.flip_bit(run / "checkpoints" / "3")
      assert ckpt.restore(make_state())[0] == 2
      assert (run / "damaged" / f"3-{number}").exists()
      assert ckpt.save(3, make_state(3), {"again": number})
      assert ckpt.read_raw()[2] == {"again": number}


def test_trouble_of_the_machine_condemns_nothing(run, monkeypatch):
  def no_access(*args):
    raise PermissionError("no access")

  monkeypatch.setattr("bcm_jax.checkpoint.checkpoint._read_item", no_access)
  with pytest.raises(PermissionError):
    Checkpoints(run / "checkpoints").restore(make_state())
  assert not (run / "damaged").exists()


def test_other_names_are_no_steps(tmp_path):
  save_run(tmp_path / "c", [3])
  for name in ("4\u00b2", "\u0669", "007", "-5", "5.0", "notes"):
    (tmp_path / "c" / name).mkdir()
  (tmp_path / "c" / "9").write_text("a file")
  (tmp_path / "c" / "10").symlink_to("nowhere")
  saved = Checkpoints(tmp_path / "c")
  assert saved.all_steps() == [3]
  assert saved.restore(make_state())[0] == 3
  with Checkpoints(tmp_path / "c") as saved:
    assert saved.save(11, make_state(11), {})
  assert saved.all_steps() == [3, 11]


@pytest.mark.parametrize("make", [
    os.mkfifo, lambda path: os.symlink("nowhere", path),
    lambda path: pathlib.Path(path).write_text("[" * 100_000),
])
def test_a_file_that_is_none_is_damage(tmp_path, make):
  save_run(tmp_path / "c", [3, 4])
  path = tmp_path / "c" / "4" / "meta" / "metadata"
  path.unlink()
  make(path)
  assert Checkpoints(tmp_path / "c").restore(make_state())[0] == 3
  assert (tmp_path / "damaged" / "4-0").is_dir()
