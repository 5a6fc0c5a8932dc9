"""The executor of plans: closed forms, NFE, reference numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bcm_jax.diffusion import preconditioning
from bcm_jax.diffusion import process
from bcm_jax.diffusion import schedules
from bcm_jax.sampling import samplers
from bcm_jax.sampling import sampling_plan
from bcm_jax.sampling import zero_shot
from tests import gaussian
from tests import golden

LEVELS = sampling_plan.NoiseRange()
SD2, EPS2 = gaussian.SD**2, 0.002**2
ALL = [
    sampling_plan.ancestral((), LEVELS),
    sampling_plan.ancestral((9.0, 2.4), LEVELS),
    sampling_plan.zigzag([(0.1, 1.2)], LEVELS),
    sampling_plan.mixture((3.0,), [(0.12, 0.4)], LEVELS),
    sampling_plan.cm_multistep((2.0, 0.5), LEVELS),
    sampling_plan.inversion(0.07, (15.0,), LEVELS),
]


def keys(n, seed=0):
  return jax.random.split(jax.random.key(seed), n)


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


def start(n=500, size=64):
  return samplers.start_noise(keys(n), (size,), 80.0)


@pytest.mark.parametrize("plan", ALL, ids=lambda p: f"{p.name}{p.nfe}")
def test_every_jump_is_one_call(plan):
  calls = []

  def counted(x, t, u, labels):
    assert t.shape == u.shape == (3,) and labels == "labels"
    calls.append((float(t[0]), float(u[0])))
    return x

  x = jnp.ones((3, 2))
  samplers.run(plan, counted, x, "labels", keys(3))
  expected = [
    (s.t, s.u) for s in plan.steps if isinstance(s, sampling_plan.Jump)
  ]
  np.testing.assert_allclose(calls, expected, rtol=1e-6)
  assert len(calls) == plan.nfe


def test_start_noise():
  x = start()
  assert x.dtype == jnp.float32
  assert float(x.std()) == pytest.approx(80, rel=0.02)
  np.testing.assert_array_equal(
    x[2:4], samplers.start_noise(keys(500)[2:4], (64,), 80.0)
  )


def test_noise_of_a_step_and_an_example_is_its_own():
  plan = sampling_plan.zigzag([(1.0, 2.0), (1.0, 2.0)], LEVELS)
  still = lambda x, *_: x  # noqa: E731
  x, k = jnp.zeros((4, 50)), keys(4)
  out = samplers.run(plan, still, x, keys=k)
  np.testing.assert_array_equal(
    out[1:3], samplers.run(plan, still, x[1:3], keys=k[1:3])
  )
  assert len(np.unique(out)) == out.size
  # Two steps draw two noises, so variances add.
  x = jnp.zeros((400, 50))
  out = samplers.run(plan, still, x, keys=keys(400))
  assert float(out.var()) == pytest.approx(2, rel=0.05)


def test_plan_with_noise_needs_keys():
  x = jnp.zeros((4, 5))
  with pytest.raises(ValueError, match="keys"):
    samplers.run(
      sampling_plan.zigzag([(0.1, 1.0)], LEVELS), gaussian.flow_map, x
    )
  samplers.run(sampling_plan.ancestral((), LEVELS), gaussian.flow_map, x)


@pytest.mark.parametrize("mid", [(0.01,), (2.4,), (79.0,), (30.0, 2.0, 0.1)])
def test_ancestral_does_not_depend_on_its_stops(mid, x64):
  x = start(20).astype(jnp.float64)
  one = samplers.run(sampling_plan.ancestral((), LEVELS), gaussian.flow_map, x)
  out = samplers.run(sampling_plan.ancestral(mid, LEVELS), gaussian.flow_map, x)
  np.testing.assert_allclose(out, one, rtol=1e-9)
  np.testing.assert_allclose(one, gaussian.phi(x, 80.0, 0.002), rtol=1e-9)


def test_zigzag_without_pairs_is_one_step():
  x = start(20)
  np.testing.assert_array_equal(
    samplers.run(sampling_plan.zigzag((), LEVELS), gaussian.flow_map, x),
    samplers.run(sampling_plan.ancestral((), LEVELS), gaussian.flow_map, x),
  )


def test_multistep_keeps_the_variance_of_the_data():
  variance = (SD2 + EPS2) * 6400 / (6400 + SD2)
  for t in (10.0, 1.0, 0.2):
    variance = (variance + t**2 - EPS2) * (SD2 + EPS2) / (SD2 + t**2)
  assert variance == pytest.approx(SD2, rel=1e-4)
  plan = sampling_plan.cm_multistep((10.0, 1.0, 0.2), LEVELS, clip=False)
  out = samplers.run(plan, gaussian.flow_map, start(), keys=keys(500, 1))
  assert float(out.var()) == pytest.approx(variance, rel=0.03)


def test_zigzag_adds_the_published_variance():
  plan = sampling_plan.zigzag([(0.3, 2.0)], LEVELS)
  out = samplers.run(plan, gaussian.flow_map, start(), keys=keys(500, 1))
  # The noise is added in full, on top of sigma_min's.
  one = (SD2 + EPS2) * 6400 / (6400 + SD2)
  expected = (one + 0.09) * (SD2 + EPS2) / (SD2 + 0.09)
  assert float(out.var()) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("mid", [(), (15.0,), (0.5, 15.0)])
def test_inversion_round_trip(mid):
  x = gaussian.SD * jax.random.normal(jax.random.key(3), (500, 64))
  there, back = (
    sampling_plan.inversion(0.07, mid, LEVELS),
    sampling_plan.ancestral((), LEVELS),
  )
  latents = samplers.run(there, gaussian.flow_map, x, keys=keys(500))
  out = zero_shot.round_trip(gaussian.flow_map, x, there, back, keys=keys(500))
  assert float(latents.std()) == pytest.approx(80, rel=0.02)
  step_keys = jax.vmap(lambda k: jax.random.fold_in(k, 0))(keys(500))
  noisy = x + 0.07 * process.normal_like(step_keys, x)
  factor = np.sqrt((SD2 + EPS2) / (SD2 + 0.07**2))
  assert factor == pytest.approx(0.99035, abs=5e-6)
  np.testing.assert_allclose(out, factor * noisy, rtol=2e-4, atol=1e-5)
  # On the [0, 1] scale of published numbers.
  assert float(((out - x) ** 2).mean()) / 4 == pytest.approx(0.001207, rel=0.03)


def reference_case(name, g):
  """(plan, input, list of noises, output transform) of a recorded run."""
  p = g.meta["params"]
  z_t, z1, zs = g.image("in/zT"), g.image("in/z1"), g["in/zs"]
  generate = sampling_plan.ancestral((), LEVELS)
  noise = [z1]
  if name.startswith("ks_multistep"):
    grid = schedules.karras_sigmas(40)[::-1]
    # The last recorded time is sigma_min itself: a jump of length zero.
    assert p["ts"][0] == 0 and p["ts"][-1] == 39
    plan = sampling_plan.cm_multistep(
      [grid[i] for i in p["ts"][1:-1]], LEVELS, clip="noclip" not in name
    )
    noise = [np.moveaxis(zs[0].astype(np.float64), 1, -1)]
    return plan, 80 * z_t, noise
  if name.startswith("inv"):
    e, *mid, top, _ = p[name[:4]]
    assert top == 80
    return sampling_plan.inversion(e, mid, LEVELS), g.image("in/img"), noise
  plan = {
    "bcm_1step": generate,
    "ks_onestep": generate,
    "bcm_2step": sampling_plan.ancestral(p["two"][1:2], LEVELS),
    "bcm_3step": sampling_plan.zigzag([p["zig"][2:4]], LEVELS),
    "bcm_4step": sampling_plan.mixture(p["mix"][1:2], [p["mix"][3:5]], LEVELS),
  }[name]
  return plan, 80 * z_t, noise


def reference_map(g, clip=np.inf):
  raw = golden.raw_network("bcm_unet", "float64")

  def flow_map(x, t, u, labels):
    # The compiled network takes four images, the file has two.
    x, t, u, labels = (jnp.concatenate([v, v]) for v in (x, t, u, labels))
    out = preconditioning.precondition(
      lambda *a: raw(*a, labels), preconditioning.Bidirectional(), x, t, u
    )
    return jnp.clip(out[:2], -clip, clip)

  return flow_map


@pytest.mark.slow
@pytest.mark.parametrize(
  "name",
  [
    "bcm_1step",
    "bcm_2step",
    "bcm_3step",
    "bcm_4step",
    "inv1_latent",
    "inv2_latent",
    "ks_onestep",
    "ks_multistep",
    "ks_multistep_noclip",
  ],
)
def test_runs_are_the_reference_ones(name, x64, monkeypatch):
  g = golden.load("bcm_samplers")
  plan, x, noise = reference_case(name, g)
  monkeypatch.setattr(
    process, "normal_like", lambda *_: jnp.asarray(noise.pop(0))
  )
  flow_map = reference_map(g, 1.0 if name == "ks_onestep" else np.inf)
  y = jnp.asarray(g["in/y"])
  out = samplers.run(plan, flow_map, jnp.asarray(x), y, keys(2))
  final = jnp.clip(out, -1, 1) if name.startswith("ks_") else out
  # The reference adds noise once more, whose scale is zero but for rounding.
  rel = 1e-9 if "multistep" in name else 1e-10
  golden.close(final, g, name, rel=rel)
  if name.startswith("inv"):
    recon = samplers.run(sampling_plan.ancestral((), LEVELS), flow_map, out, y)
    golden.close(recon, g, name.replace("latent", "recon"), rel=1e-10)


def test_multistep_clips_every_denoised_image():
  """As the released code: noise is added to clipped images."""
  seen = []

  def flow_map(x, t, u, labels):
    seen.append(x)
    return 3 * jnp.sign(x)

  plan = sampling_plan.cm_multistep((2.0,), LEVELS)
  out = samplers.run(plan, flow_map, start(), keys=keys(500))
  assert float(jnp.abs(out).max()) == 1
  noise = seen[1] - jnp.sign(seen[0])
  scale = plan.steps[1].scale
  assert float(noise.std()) == pytest.approx(scale, rel=0.02)
  # Samplers of other papers are not clipped.
  ancestral = sampling_plan.ancestral((2.0,), LEVELS)
  assert float(jnp.abs(samplers.run(ancestral, flow_map, start())).max()) == 3
