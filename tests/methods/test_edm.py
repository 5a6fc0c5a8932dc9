"""Diffusion training against the closed form of Gaussian images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bcm_jax.diffusion import process
from bcm_jax.diffusion import schedules
from bcm_jax.diffusion import solvers
from bcm_jax.methods import edm
from bcm_jax.models import adm
from bcm_jax.models import edm2
from bcm_jax.models import song
from bcm_jax.sampling import samplers
from bcm_jax.sampling import sampling_plan
from tests import quick
from tests import toys

IMAGES = toys.images(4096)
LEVELS = sampling_plan.NoiseRange()


def test_the_exact_denoiser_loses_one_at_every_level():
  """w E|D - x_0|^2 = (s^2 + sd^2) / (s sd)^2 * s^2 sd^2 / (s^2 + sd^2) = 1."""
  method, params = toys.gaussian_teacher()
  loss, metrics = method.loss(params, toys.context(IMAGES))
  assert np.mean(loss) == pytest.approx(1, abs=0.03)
  np.testing.assert_array_equal(metrics["loss_denoising"], loss)
  sigma = np.asarray(method.lognormal_sigma(toys.context(IMAGES)))
  for low, high in ((0, 0.1), (0.1, 0.5), (0.5, 100)):
    part = loss[(low < sigma) & (sigma < high)]
    assert len(part) > 300
    assert np.mean(part) == pytest.approx(1, abs=0.1)


def test_it_is_the_minimum():
  method, params = toys.gaussian_teacher()

  def mean(scale):
    return jnp.mean(method.loss({"scale": scale}, toys.context(IMAGES))[0])

  at = {s: float(mean(jnp.float32(s))) for s in (-0.3, 0.0, 0.3)}
  assert at[0.0] < at[-0.3] - 0.05 and at[0.0] < at[0.3] - 0.05
  # F has unit variance of its target, so its square adds to the loss.
  assert at[0.3] - at[0.0] == pytest.approx(0.09, abs=0.02)
  assert abs(jax.grad(mean)(params["scale"])) < 0.03


def test_levels_are_log_normal():
  method, _ = toys.gaussian_teacher(p_mean=-0.8, p_std=1.6)
  logs = np.log(method.lognormal_sigma(toys.context(IMAGES)))
  assert np.mean(logs) == pytest.approx(-0.8, abs=0.1)
  assert np.std(logs) == pytest.approx(1.6, abs=0.07)


class Told(edm.Diffusion):
  """Keeps the labels that the network was told."""

  def denoise(self, params, x, sigma, labels, *args):
    TOLD.append(labels)
    return super().denoise(params, x, sigma, None)


TOLD = []


def test_label_dropout_hides_its_share_and_says_none():
  method = Told(
      toys.GaussianDenoiser(), label_dropout=0.25
  )
  labels = jnp.arange(len(IMAGES)) % 10
  TOLD.clear()
  method.loss({"scale": jnp.zeros(())}, toys.context(IMAGES, labels=labels))
  (told,) = TOLD
  hidden = np.asarray(told) == -1
  assert np.mean(hidden) == pytest.approx(0.25, abs=0.03)
  np.testing.assert_array_equal(told[~hidden], labels[~hidden])


@pytest.mark.slow
def test_the_log_variance_head_balances_the_loss():
  network = edm2.EDM2(
      model_channels=8, channel_mult=(1,), num_res_blocks=1,
      attention_resolutions=(), num_head_channels=8, out_channels=1,
      logvar_channels=8,
  )
  plain, told = (
      edm.Diffusion(network, uncertainty=u)
      for u in (False, True)
  )
  images = toys.images(4, 4)
  params = toys.parameters(plain, images)
  ctx = toys.context(images)
  loss, (balanced, metrics) = quick.jit(lambda params: (
      plain.loss(params, ctx)[0], told.loss(params, ctx)
  ))(params)
  u = network.apply(
      {"params": params}, plain.c_noise(plain.lognormal_sigma(ctx)),
      method="logvar",
  )
  np.testing.assert_allclose(balanced, loss * jnp.exp(-u) + u, rtol=1e-4)
  np.testing.assert_allclose(metrics["loss_denoising"], loss, rtol=1e-5)


# Its flow map ----------------------------------------------------------------


def grid(n):
  return [float(s) for s in schedules.karras_sigmas(n)[::-1]]


def start(n=64):
  keys = jax.random.split(jax.random.key(3), n)
  return samplers.start_noise(keys, (2, 2, 1), 80.0)


@pytest.mark.parametrize("heun, order", [(False, 1), (True, 2)])
def test_solvers_converge_to_the_exact_flow(heun, order):
  method, params = toys.gaussian_teacher()
  x = start()
  exact = toys.exact_flow(x, 80.0, 0.0)
  errors = []
  for n in (20, 40, 80):
    plan = sampling_plan.ode(grid(n), solvers.Churn(), heun, LEVELS)
    assert plan.nfe == (2 * n - 1 if heun else n)
    out = samplers.run(plan, method.flow_map(params), x)
    errors.append(float(np.max(np.abs(out - exact))))
  ratios = np.array(errors[:-1]) / errors[1:]
  assert np.all(ratios > 2**order * 0.8), (errors, ratios)


def test_a_heun_jump_is_the_solvers_step():
  method, params = toys.gaussian_teacher()
  x, t, u = start(8), 3.0, 1.2
  plan = sampling_plan.Plan("one", t, (sampling_plan.HeunJump(t, u),))
  out = samplers.run(plan, method.flow_map(params), x)

  def denoise(x, sigma):
    return method.denoise(params, x, jnp.full(len(x), sigma), None)

  expected = solvers.heun_step(denoise, x, t, u)
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_churn_keeps_the_spread_of_the_images():
  method, params = toys.gaussian_teacher()
  churn = solvers.Churn(40.0, 0.05, 50.0, 1.0)
  plan = sampling_plan.ode(grid(200), churn, True, LEVELS)
  added = [s for s in plan.steps if isinstance(s, sampling_plan.AddNoise)]
  assert added and all(0.05 <= s.level <= 50 * np.sqrt(2) for s in added)
  keys = jax.random.split(jax.random.key(5), 4096)
  x = samplers.start_noise(keys, (2, 2, 1), 80.0)
  out = samplers.run(plan, method.flow_map(params), x, keys=keys)
  assert np.std(out) == pytest.approx(toys.SIGMA_DATA, rel=0.02)
  # Fresh noise: the images no longer follow from their start.
  plain = toys.exact_flow(x, 80.0, 0.0)
  assert np.corrcoef(np.ravel(out), np.ravel(plain))[0, 1] < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("network, widths", [
    (adm.ADM(
        model_channels=8, channel_mult=(1, 2), num_res_blocks=1,
        num_groups=4, num_head_channels=8, out_channels=1,
        attention_resolutions=(),
     ), (8, 16)),
    (song.SongUNet(
        model_channels=8, channel_mult=(1, 2), num_res_blocks=1,
        out_channels=1, attention_resolutions=(),
     ), (8, 16)),
    (edm2.EDM2(
        model_channels=8, channel_mult=(1, 2), num_res_blocks=1,
        attention_resolutions=(), num_head_channels=8, out_channels=1,
        logvar_channels=8,
     ), (8, 16)),
], ids=["adm", "song", "edm2"])
def test_features_are_the_encoders_one_a_level(network, widths):
  method = edm.Diffusion(network)
  images = toys.images(3, 8)
  params = toys.parameters(method, images)
  sigma = jnp.array([0.1, 1.0, 10.0])
  encode = quick.jit(method.features)
  features = encode(params, images, sigma, None)
  assert [f.shape for f in features] == [
      (3, 8, 8, widths[0]), (3, 4, 4, widths[1])
  ]
  # An example at a time, and they see the image and its level.
  for i, changed in enumerate((images[::-1], images)):
    other = encode(params, changed, sigma[::-1] if i else sigma, None)
    assert not np.allclose(other[1][0], features[1][0], atol=1e-4)
    # The middle one is where and what it was.
    np.testing.assert_allclose(
        other[1][1], features[1][1], rtol=1e-4, atol=1e-5
    )
  assert "intermediates" not in params


def test_noise_is_added_once():
  method, params = toys.gaussian_teacher()
  x = jnp.asarray(IMAGES[:2])
  z = process.normal_like(toys.context(x).keys("noise"), x)
  assert z.shape == x.shape
  sigma = method.lognormal_sigma(toys.context(x))
  noisy = process.add_noise(x, sigma, z)
  d = method.denoise(params, noisy, sigma, None)
  expected = np.mean(np.square(d - x), axis=(1, 2, 3)) * method.weight(sigma)
  loss, _ = method.loss(params, toys.context(x))
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
