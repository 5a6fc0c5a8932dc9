"""CTM: times, jumps, what reaches whom, against the Gaussian closed form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bcm_jax.diffusion import preconditioning
from bcm_jax.methods import cd
from bcm_jax.methods import ctm
from bcm_jax.models import adm
from bcm_jax.models import end_time
from bcm_jax.models import song
from bcm_jax.sampling import samplers
from bcm_jax.sampling import sampling_plan
from bcm_jax.training import train_state
from bcm_jax.training import train_step
from tests import quick
from tests import toys

IMAGES = toys.images(512)
ONE, ZERO = {"scale": jnp.ones(())}, {"scale": jnp.zeros(())}


def make(**options):
  """CTM whose network is the exact flow map where its scale is 1."""
  teacher, _ = toys.gaussian_teacher()
  settings = dict(
      network=toys.GaussianFlow(),
      c_noise=preconditioning.adm_c_noise, teacher=teacher, metric="l2",
  )
  return ctm.TrajectoryDistillation(**(settings | options))


def context(images=IMAGES, target=ONE, seed=0, step=0, **more):
  return toys.context(
      images, {"gan": jnp.float32(1)}, averages={"target": target},
      frozen={"teacher": ZERO}, seed=seed, step=step, **more,
  )


# Levels -----------------------------------------------------------------------


@pytest.mark.parametrize("law, most", [
    ("weighted", 17), ("uniform", 5), ("fixed", 5),
])
def test_levels_descend_and_share_one_number_of_steps(law, most):
  method = make(solver_steps_law=law, max_solver_steps=most)
  grid = np.asarray(method.grid)
  counts = np.zeros(most + 1)
  draw = jax.jit(
      lambda step: method.sample_times(context(IMAGES[:64], step=step))
  )
  for step in range(200):
    times = draw(step)
    h, i = int(times.solver_steps), np.asarray(times.index)
    counts[h] += 1
    assert np.all(times.s <= times.u) and np.all(times.u < times.t)
    assert i.min() >= 0 and i.max() <= 17 - h
    np.testing.assert_allclose(times.u, grid[i + h])
  expected = {
      "weighted": np.arange(most + 1.0), "uniform": np.ones(most + 1),
      "fixed": np.eye(most + 1)[-1],
  }[law]
  expected[0] = 0
  share = expected / expected.sum()
  error = np.sqrt(share * (1 - share) / 200)
  assert np.all(np.abs(counts / 200 - share) <= 4 * error + 1e-9)


def test_end_levels():
  smallest = make(end_law="smallest").sample_times(context())
  np.testing.assert_allclose(smallest.s, 0.002)
  times = make(solver_steps_law="fixed", max_solver_steps=1).sample_times(
      context(toys.images(20_000))
  )
  # Uniform over the levels from u down to the last one.
  grid = np.asarray(make().grid)
  i = np.asarray(times.index)
  j = np.searchsorted(-grid, -np.asarray(times.s) - 1e-6)
  place = (j - i - 1) / np.maximum(17 - i - 1, 1)
  inner = i < 12
  assert np.mean(place[inner]) == pytest.approx(0.5, abs=0.02)


def test_half_of_the_denoising_is_at_high_levels():
  method = make()
  sigma = np.asarray(method.dsm_levels(context(toys.images(20_000))))
  normal, high = sigma[::2], sigma[1::2]
  assert np.mean(np.log(normal)) == pytest.approx(-1.2, abs=0.05)
  assert np.std(np.log(normal)) == pytest.approx(1.2, abs=0.05)
  assert high.min() >= 0.317 and high.max() <= 80
  ramp = (high ** (1 / 7) - 80 ** (1 / 7)) / (0.002 ** (1 / 7) - 80 ** (1 / 7))
  assert np.mean(ramp) == pytest.approx(0.35, abs=0.01)


# Jumps ------------------------------------------------------------------------


@pytest.mark.slow
def test_a_jump_of_no_length_is_none_and_anchors_are_linear():
  network = adm.ADM(
      model_channels=8, channel_mult=(1,), num_res_blocks=0, num_groups=4,
      num_head_channels=8, out_channels=1, attention_resolutions=(),
      two_time=True, end_branch="blocks",
  )
  method = make(network=network)
  x = jnp.asarray(toys.images(4, 4))
  params = jax.tree.map(
      lambda p: p + 0.1, toys.parameters(method, np.asarray(x))
  )
  t, s = jnp.array([0.5, 1.0, 5.0, 60.0]), jnp.array([0.1, 0.002, 5.0, 1.0])
  f = jax.jit(method.f)
  toys.assert_close(f(params, x, t, t, None), x)
  g = f(params, x, t, jnp.full(4, 1e-9), None)  # s/t vanishes.
  assert np.all(np.isfinite(g))
  out = f(params, x, t, s, None)
  ratio = (s / t)[:, None, None, None]
  inner = dataclasses.replace(method, preconditioning="edm")
  inner_f = jax.jit(inner.f)
  expected = ratio * x + (1 - ratio) * inner_f(params, x, t, s, None)
  np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)
  # On the diagonal the inner part is the denoiser that L_DSM trains.
  np.testing.assert_allclose(
      jax.jit(method.denoise)(params, x, t, None),
      inner_f(params, x, t, t, None),
      rtol=1e-5, atol=1e-6,
  )


def test_the_solver_takes_h_steps_of_the_teacher():
  method = make(num_levels=400, max_solver_steps=300)
  times = method.sample_times(context())
  x = method.sample_x_t(context(), times.t)
  out = method.solve(context(), x, times)
  t, u = (np.asarray(v)[:, None, None, None] for v in (times.t, times.u))
  exact = toys.exact_flow(np.asarray(x), t, u)
  assert int(times.solver_steps) > 50
  np.testing.assert_allclose(out, exact, rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_the_exact_map_loses_nothing():
  """Up to the solver's error, which finer grids make smaller."""
  losses = []
  for n in (18, 72):
    method = make(num_levels=n, max_solver_steps=n - 1)
    terms, _ = method.student_loss(ONE, context())
    losses.append(float(np.mean(terms["ctm"])))
    # The optimal denoiser loses 1 at every level.
    assert np.mean(terms["dsm"]) == pytest.approx(1, abs=0.1)
  assert losses[1] < losses[0] / 4 and losses[0] < 1e-2
  wrong, _ = make().student_loss({"scale": jnp.float32(0.7)}, context())
  assert np.mean(wrong["ctm"]) > 10 * losses[0]


@pytest.mark.parametrize("pooling", ["average", "max"])
def test_lpips_sees_enlarged_images(monkeypatch, pooling):
  def distance(params, a, b, pooling):
    seen.append((params, a.shape, b.shape, pooling))
    return jnp.mean((a - b) ** 2, axis=(1, 2, 3))

  seen = []
  monkeypatch.setattr(cd.lpips, "distance", distance)
  method = make(metric="lpips", lpips_pooling=pooling)
  a, b = (jnp.full((2, 8, 8, 1), v) for v in (0.5, 0.25))
  ctx = context(a)._replace(frozen={"lpips": "weights"})
  np.testing.assert_allclose(method.distance(a, b, ctx), 1 / 16)
  shape = (2, 224, 224, 1)
  assert seen == [("weights", shape, shape, pooling)]


def test_from_scratch_the_average_takes_the_teachers_place():
  method = make(teacher=None)
  assert method.networks["student"].init_from is None
  terms, _ = method.student_loss(ONE, context())
  np.testing.assert_allclose(terms["ctm"], 0, atol=1e-8)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.9, 1.0])
def test_gamma_sampling_keeps_the_spread(gamma):
  plan = sampling_plan.gamma_sampling(
      (10.0, 1.0, 0.3), gamma, sampling_plan.NoiseRange()
  )
  keys = jax.random.split(jax.random.key(1), 20_000)
  x = samplers.start_noise(keys, (2, 2, 1), 80.0)
  out = samplers.run(plan, make().flow_map(ONE), x, keys=keys)
  assert np.var(out) == pytest.approx(0.25, rel=0.02)


# What reaches whom ------------------------------------------------------------


def gradient(method, wrt, online=0.9, target=0.8):
  """d mean L_CTM / d scale of the online network or of its average."""

  def mean(online, target):
    ctx = context(IMAGES[:64], target={"scale": target})
    terms, _ = method.student_loss({"scale": online}, ctx)
    return jnp.mean(terms["ctm"])

  grad = quick.jit(jax.grad(mean, wrt))
  return float(grad(jnp.float32(online), jnp.float32(target)))


@pytest.mark.slow
def test_gradients_pass_the_outer_jump_to_the_inner_one():
  method = make()
  assert gradient(method, 0) != 0

  class Blocked(ctm.TrajectoryDistillation):
    def jump_to_zero(self, ctx, x, s, stream):
      return super().jump_to_zero(ctx, jax.lax.stop_gradient(x), s, stream)

  fields = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
  assert gradient(Blocked(**fields), 0) == 0


def test_the_target_takes_no_gradient():
  """The derivative is that of the estimate with the target held still."""
  method = make()
  ctx = context(IMAGES[:64], target={"scale": jnp.float32(0.8)})
  times = method.sample_times(ctx)
  x_t = method.sample_x_t(ctx, times.t)
  target = method.target({"scale": jnp.float32(0.9)}, ctx, x_t, times)

  def held(scale):
    estimate = method.estimate({"scale": scale}, ctx, x_t, times)
    return jnp.mean(jnp.square(estimate - target))

  np.testing.assert_allclose(
    gradient(method, 0), jax.grad(held)(jnp.float32(0.9)), rtol=1e-4
  )
  online, average = (
    make(target_inner=name).target({"scale": jnp.float32(0.9)}, ctx, x_t, times)
    for name in ("online", "average")
  )
  assert not np.allclose(online, average)


def test_weights_make_gradients_equally_long():
  method = make(gan=True)
  norms = {
    "ctm": jnp.float32(2.0),
    "dsm": jnp.float32(0.5),
    "gan": jnp.float32(1e-6),
  }
  weights = method.loss_weights(norms)
  assert weights["ctm"] == 1
  assert weights["dsm"] == pytest.approx(4, rel=1e-3)
  assert weights["gan"] == 10  # Its bound.
  assert method.loss_weights(norms | {"gan": jnp.float32(1e6)})["gan"] == (
    pytest.approx(0.01)
  )
  fixed = make(gan=True, adaptive=False, dsm_weight=0.5, gan_weight=0.1)
  plain = fixed.loss_weights(norms)
  assert (plain["ctm"], plain["dsm"], plain["gan"]) == pytest.approx(
    (1, 0.5, 0.1)
  )


def test_unweighed_terms_are_summed():
  method = make(adaptive=False, dsm_weight=0.5)
  loss, parts = method.student_loss({"scale": jnp.float32(0.9)}, context())
  np.testing.assert_allclose(
    loss, parts["loss_ctm"] + 0.5 * parts["loss_dsm"], rtol=1e-5
  )
  assert method.networks["student"].adaptive_weight is None


# Turns ------------------------------------------------------------------------


def start(method, images):
  optimizers = {name: optax.adam(1e-2) for name in method.networks}
  state = quick.jit(
    lambda: train_state.create(method, optimizers, (0.9,), 0, images, None)
  )()
  state = state.replace(frozen={"teacher": ZERO})
  step = train_step.make_step(
    method, optimizers, train_step.StepOptions(ema_rates=(0.9,))
  )
  return state, jax.jit(step, static_argnames="phase")


@pytest.mark.slow
def test_turns_update_one_network_and_its_averages_alone():
  images = toys.images(8, 4)
  method = make(gan=True, gan_start=2, gan_features=4)
  state, step = start(method, images)
  turns = []
  for k in range(6):
    batch = {"image": images, "index": np.arange(8)}
    phase = method.phase(k)
    new, metrics = step(state, batch, method.curriculum(k), phase)
    other = {"student": "discriminator", "discriminator": "student"}[phase[0]]
    toys.assert_equal(new.networks[other], state.networks[other])
    if phase == ("discriminator",):
      toys.assert_equal(new.averages, state.averages)
    else:
      assert (float(metrics["student/loss_gan"]) != 0) == (k >= 2)
    toys.assert_equal(new.frozen, state.frozen)
    turns.append(phase[0][0])
    state = new
  assert "".join(turns) == "sssdsd"
  assert step._cache_size() == len(method.phases()) == 2


@pytest.mark.slow
def test_a_discriminator_learns_to_tell():
  images = toys.images(32, 4)
  method = make(gan=True, gan_features=4, gan_sigma_max=0.1)
  state, step = start(method, images)
  # A student that makes noise of another spread.
  state.networks["student"].params["scale"] = jnp.float32(3.0)
  losses = []
  for _ in range(150):
    batch = {"image": images, "index": np.arange(32)}
    state, metrics = step(
      state, batch, method.curriculum(1), ("discriminator",)
    )
    losses.append(float(metrics["discriminator/loss"]))
  assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])
  assert (
    metrics["discriminator/logit_real"] > (metrics["discriminator/logit_fake"])
  )


# The start --------------------------------------------------------------------


def filled(network, seed, *arguments):
  """Returns random parameters without a zero among them."""
  random = np.random.default_rng(seed)
  shapes = jax.eval_shape(network.init, jax.random.key(0), *arguments)
  return jax.tree.map(
    lambda s: np.float32(0.3 * random.standard_normal(s.shape)),
    shapes["params"],
  )


def networks(cls, **options):
  one = cls(
    model_channels=8,
    channel_mult=(1, 2),
    num_res_blocks=0,
    out_channels=1,
    attention_resolutions=(),
    **options,
  )
  return one, one.clone(two_time=True, end_branch="blocks")


@pytest.mark.slow
@pytest.mark.parametrize(
  "cls, options",
  [
    (adm.ADM, dict(num_groups=4, num_head_channels=8)),
    (song.SongUNet, dict(augment_dim=9)),
  ],
  ids=["adm", "song"],
)
def test_it_starts_as_the_teachers_euler_step(cls, options):
  one, two = networks(cls, **options)
  two = two.clone(augment_dim=0) if "augment_dim" in options else two
  x = jnp.asarray(toys.images(3, 8))
  t, s = jnp.array([0.3, 2.0, 20.0]), jnp.array([0.1, 0.002, 5.0])
  teacher = filled(one, 0, x, t)
  fresh = filled(two, 1, x, t, s)
  new, random = (
    end_time.add_end(teacher, fresh, zero) for zero in (True, False)
  )
  assert jax.tree.structure(new) == jax.tree.structure(fresh)
  out = quick.jit(one.apply)({"params": teacher}, x, t)
  assert np.abs(out).max() > 0.1
  toys.assert_close(quick.jit(two.apply)({"params": new}, x, t, s), out)
  assert end_time.add_end(new, fresh, True) is new
  # As released the branch is fresh: only what is new differs.
  for tree in (new, random):
    toys.assert_equal(shared(tree, teacher), shared(teacher, tree))


def shared(tree, like):
  """{path: leaf} of what `like` has too."""
  return dict(_walk(tree, like))


def _walk(tree, like, path=()):
  for name, value in tree.items():
    if name not in like:
      continue
    if isinstance(value, dict):
      yield from _walk(value, like[name], (*path, name))
    else:
      yield "/".join((*path, name)), value
