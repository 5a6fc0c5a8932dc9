"""Trajectory strips: against the exact way of Gaussian data, and of networks.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest

from bcm_jax import errors
from bcm_jax.checkpoint import checkpoint
from bcm_jax.checkpoint import runs
from bcm_jax.config import build
from bcm_jax.config import resolve
from bcm_jax.config import schema
from bcm_jax.data import image_source
from bcm_jax.generate import batched_sampler
from bcm_jax.plots import draw
from bcm_jax.plots import figures
from bcm_jax.plots import records
from bcm_jax.plots import strips
from bcm_jax.sampling import samplers
from bcm_jax.training import rng
from tests import toys

SD = toys.SIGMA_DATA


# Trajectories, where they are known -------------------------------------------


def gaussian(method, params, **settings):
  """(experiment, runner) of a method for N(0, SD^2) images of 4 pixels."""
  images = np.random.default_rng(0).integers(0, 256, (9, 2, 2, 1), np.uint8)
  sections = {"sample": schema.Sample(), "invert": schema.Invert(**settings)}
  experiment = types.SimpleNamespace(
      method=method, num_classes=None, image_shape=(2, 2, 1),
      **sections, config=types.SimpleNamespace(**sections),
      source=lambda split: image_source.ArraySource(images),
  )
  return experiment, batched_sampler.BatchedSampler(experiment, params, 6)


def test_columns_are_even_in_the_logarithm():
  levels = strips.levels_between(80.0, 0.002)
  assert levels[0] == 80.0 and levels[-1] == 0.002
  np.testing.assert_allclose(
      np.diff(np.log(levels)), np.log(0.002 / 80) / (len(levels) - 1)
  )


def test_an_exact_map_shows_one_picture_at_every_level():
  # x_t / sqrt(SD^2 + t^2) stays the same along Gaussian trajectories.
  method = toys.bidirectional_toy(toys.GaussianFlow(), sigma_max=40.0)
  params = {"scale": jnp.ones(())}
  experiment, runner = gaussian(method, params, noise=0.3)
  down = strips._down(experiment, runner)
  assert down.columns[0] == "40" and down.columns[-1] == "0.002"
  assert down.rows == [f"sample {i + 1}" for i in range(6)]
  same = down.images.astype(int)
  assert np.ptp(same, axis=1).max() <= 1 and np.ptp(same[:, 0]) > 50
  up = strips._up(experiment, runner)
  assert up.columns[0] == "real" and up.columns[-1] == "recon."
  assert (up.columns[1], up.columns[-2]) == ("0.3", "40")
  assert np.ptp(up.images[:, 1:-1].astype(int), axis=1).max() <= 1
  # Images of the test split, spread over it, are where the way starts.
  originals = experiment.source("test").fetch(np.arange(6) * 9 // 6)["image"]
  np.testing.assert_array_equal(up.images[:, 0], originals)
  assert np.any(up.images[:, 1] != originals)


def test_a_solver_comes_near_the_exact_way_and_the_denoiser_is_shown():
  method, params = toys.gaussian_teacher(sigma_max=40.0)
  rows = strips._down(*gaussian(method, params))
  assert rows.rows[:2] == ["sample 1: x", "D(x, t)"] and len(rows.rows) == 6
  states, said = rows.images[::2].astype(int), rows.images[1::2].astype(int)
  assert np.ptp(states, axis=1).max() < 6 and np.ptp(states[:, 0]) > 50
  # D = SD^2 / (SD^2 + t^2) x; shown, x is SD / sqrt(SD^2 + t^2) x.
  levels = np.array(strips.levels_between(40.0, 0.002))
  factor = SD / np.hypot(SD, levels)[None, :, None, None, None]
  expected = 127.5 + (states - 127.5) * factor
  seen = (states > 0) & (states < 255)  # The rest is cut off.
  assert np.abs(said - expected)[seen].max() < 2.5


def one_way(start_levels=()):
  """A method that jumps to sigma_min alone, exactly."""
  low = 0.002

  def flow_map(params):
    def f(x, t, u, labels=None):
      t = t.reshape(-1, 1, 1, 1)
      return params * x * jnp.sqrt((SD**2 + low**2) / (SD**2 + t**2))
    return f

  return types.SimpleNamespace(
      flow_map=flow_map, takes_end_time=False, is_denoiser=False, sigma_data=SD,
      sigma_min=low, sigma_max=40.0, start_levels=start_levels,
  )


def test_a_network_without_an_end_level_is_shown_its_own_samples_noised():
  experiment, runner = gaussian(one_way(), jnp.ones(()))
  rows = strips._down(experiment, runner)
  assert rows.rows[:2] == ["sample 1: x", "f(x, t)"]
  # Of the same noises as samples of a seed are: x = x_0 + t z, and f of it.
  keys = rng.example_keys(0, "sample/start", 0, jnp.arange(3))
  z = np.asarray(samplers.start_noise(keys, (2, 2, 1), 1.0))[:, None]
  t = np.array(strips.levels_between(40.0, 0.002)).reshape(1, -1, 1, 1, 1)
  one_jump = np.hypot(SD, 0.002) / np.hypot(SD, np.array(40.0)) * 40 * z
  x = one_jump + t * z
  expected = x * SD / np.hypot(SD, t), x * np.hypot(SD, 0.002) / np.hypot(SD, t)
  for found, wanted in zip((0, 1), expected, strict=True):
    wanted = image_source.to_uint8(wanted)
    difference = rows.images[found::2].astype(int) - wanted
    assert np.abs(difference).max() <= 1
  assert "trained" not in rows.title
  rows = strips._down(*gaussian(one_way((40.0, 5.0)), jnp.ones(())))
  assert rows.title.endswith("trained at t = 40, 5 only")


# Drawing ----------------------------------------------------------------------


@pytest.mark.parametrize("channels, size", [(1, 8), (3, 32)])
def test_names_stand_at_the_images_that_they_name(monkeypatch, channels, size):
  grey = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
  images = np.broadcast_to(
    grey[..., None, None, None], (2, 3, size, size, channels)
  )
  rows = records.Rows("title", "axis", ["a", "b", "c"], ["d", "e"], images)
  drawn = []
  monkeypatch.setattr(figures, "save", lambda p, path: drawn.append(p))
  figures.image_rows({"run": [rows]}, "x.png")
  (axis,) = drawn[0].axes
  mosaic = np.asarray(axis.images[0].get_array())
  x, y = (
    np.round(t).astype(int) for t in (axis.get_xticks(), axis.get_yticks())
  )
  at_ticks = mosaic[np.ix_(y, x)]
  np.testing.assert_array_equal(at_ticks.reshape(2, 3, -1)[..., 0], grey)
  texts = [t.get_text() for t in axis.get_xticklabels()]
  assert texts == ["a", "b", "c"]
  assert axis.images[0].get_interpolation() == "nearest"


# Trajectories of checkpoints --------------------------------------------------


def untrained(folder, file, **changed):
  """A work directory with a checkpoint of random weights."""
  overrides = toys.TINY | {k.replace("__", "."): v for k, v in changed.items()}
  config = resolve.resolve(resolve.read_file(file), overrides)
  built = build.build(config, to_train=False)
  shapes = jax.eval_shape(
    built.method.init, jax.random.key(0), *build.example_batch(built)
  )
  random = np.random.default_rng(0)
  params = jax.tree.map(
    lambda s: 0.1 * random.standard_normal(s.shape, np.float32), shapes
  )
  resolve.write(config, str(folder))
  with checkpoint.Checkpoints(runs.checkpoint_dir(str(folder)), None) as saved:
    saved.save(
      7,
      {
        "networks": {"student": {"params": params}},
        "averages": {"ema_0.9": params},
      },
      {},
    )


@pytest.mark.slow
@pytest.mark.parametrize(
  "file, changed, shapes, said",
  [
    ("digits.py", {}, [(6, 12), (6, 14)], "one jump f(x, T, t)"),
    pytest.param(
      "digits_ict.py", {}, [(6, 12)], "with noise added",
      marks=pytest.mark.slow,
    ),
    # Without guidance: this run cannot guide itself.
    pytest.param(
      "digits_edm.py", {"sample__guidance": "3.0"}, [(6, 12)], "Heun's solver",
      marks=pytest.mark.slow,
    ),
  ],
)
def test_a_checkpoint_becomes_strips(
  tmp_path, monkeypatch, file, changed, shapes, said
):
  untrained(tmp_path / "run", file, **changed)
  blocks = []

  def trajectory(run):
    blocks.extend(strips.trajectory(run))
    return blocks

  kind = draw.KINDS["trajectory"]._replace(read=trajectory)
  monkeypatch.setitem(draw.KINDS, "trajectory", kind)
  draw.main([str(tmp_path / "run"), "--only=trajectory"])
  with Image.open(tmp_path / "run/plots/trajectory_run.png") as picture:
    assert len(picture.convert("L").getcolors()) > 10
  assert [b.images.shape[:2] for b in blocks] == shapes
  assert said in blocks[0].title
  assert blocks[0].title.endswith("[step 7, ema_0.9]")


def test_the_way_from_noise_needs_no_images(tmp_path, monkeypatch, capsys):
  def gone(self, split):
    raise errors.UserError(f"no {split} images here")

  untrained(tmp_path / "run", "digits.py")
  monkeypatch.setattr(build.Experiment, "source", gone)
  (block,) = strips.trajectory(records.open_runs([str(tmp_path / "run")])[0])
  assert "one jump f(x, T, t)" in block.title
  assert "no test images here" in capsys.readouterr().out
