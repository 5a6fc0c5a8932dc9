"""The step: gradients, guard, averages, metrics, the state."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bcm_jax.data import augmentation
from bcm_jax.data import image_source
from bcm_jax.methods import base
from bcm_jax.models import edm2
from bcm_jax.models import embeddings
from bcm_jax.models import song
from bcm_jax.training import ema
from bcm_jax.training import optim
from bcm_jax.training import phema
from bcm_jax.training import rng
from bcm_jax.training import sharding
from bcm_jax.training import train_state
from bcm_jax.training import train_step
from tests import toys

B = 8


@dataclasses.dataclass(frozen=True)
class Regression(base.SingleNetworkMethod):
  """Fits w x to labels, with noise on w that depends on the keys."""

  averages = {}
  spoil: bool = False

  @property
  def networks(self):
    return {"student": toys.scale_network()}

  def curriculum(self, step):
    return {"rate": jnp.float32(1 - 0.5 ** (step + 1))}

  def loss(self, params, ctx):
    noise = jax.vmap(jax.random.normal)(ctx.keys("noise"))
    error = params["w"] * ctx.images[:, 0, 0, 0] - ctx.labels + noise
    loss = error**2
    if self.spoil:  # An infinite loss of finite gradient.
      worst = jnp.max(ctx.images)
      loss = loss + jnp.where(worst > 50, jnp.inf, 0)
    return loss, {"error": error}


class Averaged(Regression):
  """The same, and a moving average of its own."""

  averages = {"target": base.Average("student", "rate")}


def batch(seed=0, size=B):
  rng = np.random.default_rng(seed)
  return {
      "image": np.float32(rng.standard_normal((size, 1, 1, 1))),
      "label": np.arange(size, dtype=np.int32) % 3,
      "index": np.arange(size, dtype=np.int32),
  }


def poisoned(value=np.nan):
  one = batch()
  one["image"][3] = value
  return one


def begin(method, optimizers=None, rates=(0.9,), **options):
  """(state, jitted step) of a method; SGD unless told."""
  optimizers = optimizers or {
      name: optax.sgd(0.1) for name in method.networks
  }
  data = batch()
  state = train_state.create(
      method, optimizers, rates, 0, data["image"], data["label"]
  )
  options = train_step.StepOptions(ema_rates=rates, **options)
  step = train_step.make_step(method, optimizers, options)
  return state, jax.jit(step, static_argnames="phase")


def run(method, step, state, data):
  return step(state, data, method.curriculum(int(state.step)), ("student",))


def test_an_update_is_the_optimisers_of_the_mean_gradient():
  method = Regression()
  state, step = begin(method)
  data = batch()
  new, metrics = run(method, step, state, data)
  ctx = toys.context(data["image"], labels=data["label"])
  loss, values = method.loss({"w": 1.0}, ctx)
  x = data["image"][:, 0, 0, 0]
  gradient = np.mean(2 * np.asarray(values["error"]) * x)
  np.testing.assert_allclose(
      new.networks["student"].params["w"], 1 - 0.1 * gradient, rtol=1e-5
  )
  np.testing.assert_allclose(metrics["loss"], np.mean(loss), rtol=1e-5)
  np.testing.assert_allclose(
      metrics["error"], np.mean(values["error"]), rtol=1e-4
  )
  np.testing.assert_allclose(metrics["grad_norm"], abs(gradient), rtol=1e-5)
  assert new.step == new.networks["student"].num_updates == 1
  assert set(metrics) == {
      "loss", "error", "grad_norm", "skipped", "skipped_in_row"
  }


def test_every_step_draws_anew_and_the_seed_matters():
  method = Regression()
  state, step = begin(method, {"student": optax.sgd(0.0)})
  state, first = run(method, step, state, batch())
  state, second = run(method, step, state, batch())
  assert state.networks["student"].params["w"] == 1
  assert first["loss"] != second["loss"]
  state, step = begin(method, {"student": optax.sgd(0.0)}, seed=1)
  assert run(method, step, state, batch())[1]["loss"] != first["loss"]


# Gradient accumulation.


@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_change_nothing(microbatches):
  whole, cut = (
      accumulated(m) for m in (1, microbatches)
  )
  toys.assert_close(cut[0].networks, whole[0].networks, rtol=1e-5)
  toys.assert_close(cut[0].averages, whole[0].averages, rtol=1e-5)
  for name in ("loss", "error", "grad_norm"):
    np.testing.assert_allclose(cut[1][name], whole[1][name], rtol=1e-4)


@functools.cache
def accumulated(microbatches):
  method = Regression()
  state, step = begin(
      method, {"student": optax.adam(0.1)}, microbatches=microbatches
  )
  for i in range(3):
    state, metrics = run(method, step, state, batch(i))
  return state, metrics


# The guard.


@pytest.mark.parametrize(
    "value,spoil", [(np.nan, False), (np.inf, False), (100.0, True)],
    ids=["nan-image", "inf-image", "inf-loss"],
)
@pytest.mark.parametrize("microbatches", [1, 4])
def test_a_bad_step_changes_nothing_but_the_counts(
    value, spoil, microbatches
):
  method = Averaged(spoil)
  state, step = begin(
      method, {"student": optax.adam(0.1)}, microbatches=microbatches
  )
  good, _ = run(method, step, state, batch())
  before = (good.networks, good.averages)

  bad, metrics = run(method, step, good, poisoned(value))
  toys.assert_equal((bad.networks, bad.averages), before)
  assert (bad.step, bad.skipped, bad.skipped_in_row) == (2, 1, 1)
  assert metrics["skipped"] == metrics["skipped_in_row"] == 1
  assert not np.isfinite(metrics["loss"])

  bad, _ = run(method, step, bad, poisoned(value))
  toys.assert_equal((bad.networks, bad.averages), before)
  assert (bad.step, bad.skipped, bad.skipped_in_row) == (3, 2, 2)

  after, metrics = run(method, step, bad, batch())
  assert (after.step, after.skipped, after.skipped_in_row) == (4, 2, 0)
  assert after.networks["student"].num_updates == 2
  assert np.isfinite(metrics["loss"])
  w = after.networks["student"].params["w"]
  assert np.isfinite(w) and w != before[0]["student"].params["w"]


@dataclasses.dataclass(frozen=True)
class Pair(base.Method):
  """Two networks of finite losses and gradients; the second one diverges."""

  averages = {}

  @property
  def networks(self):
    return {name: toys.scale_network() for name in ("student", "critic")}

  @property
  def losses(self):
    return dict.fromkeys(self.networks, self.loss)

  def curriculum(self, step):
    return {}

  def phase(self, step):
    return tuple(self.networks)

  def loss(self, params, ctx):
    return params["w"] * ctx.images[:, 0, 0, 0] + 1.0, {}


@pytest.mark.parametrize("optimizer", [
    optax.sgd(np.inf), optax.sgd(np.nan), optax.adam(0.1, b1=1.0),
    # Infinite second moments would end all learning in silence.
    optax.chain(optax.scale(1e20), optax.scale_by_rms(1.0), optax.scale(0.0)),
])
@pytest.mark.parametrize("diverging", ["student", "critic"])
def test_an_update_that_is_not_finite_is_not_kept_of_any_network(
    optimizer, diverging
):
  method = Pair()
  optimizers = {name: optax.sgd(0.1) for name in method.networks}
  state, step = begin(method, optimizers | {diverging: optimizer})
  data, phase = batch(), tuple(method.networks)
  new, metrics = step(state, data, method.curriculum(0), phase)
  assert np.isfinite(metrics[f"{diverging}/loss"])
  assert np.isfinite(metrics[f"{diverging}/grad_norm"])
  toys.assert_equal(
      (new.networks, new.averages), (state.networks, state.averages)
  )
  assert (new.step, new.skipped, new.skipped_in_row) == (1, 1, 1)
  # The other network alone takes the same step.
  other = next(name for name in method.networks if name != diverging)
  new, _ = step(new, data, method.curriculum(1), (other,))
  assert new.skipped_in_row == 0 and new.networks[other].num_updates == 1


# Averages.


def test_averages_take_the_updated_parameters_at_their_own_rates():
  method = Averaged()
  state, step = begin(method, rates=(0.9, 0.99))
  expected = dict.fromkeys(("ema_0.9", "ema_0.99", "target"), 1.0)
  assert set(state.averages) == set(expected)
  for k in range(4):
    state, _ = run(method, step, state, batch(k))
    w = float(state.networks["student"].params["w"])
    for name, rate in (
        ("ema_0.9", 0.9), ("ema_0.99", 0.99), ("target", 1 - 0.5 ** (k + 1))
    ):
      expected[name] = rate * expected[name] + (1 - rate) * w
  assert abs(w - 1) > 0.01
  for name, value in expected.items():
    np.testing.assert_allclose(state.averages[name]["w"], value, rtol=1e-5)


def test_warm_up_of_averages_counts_updates():
  method = Regression()
  state, step = begin(method, rates=(0.9,), ema_warmup=True)
  state, _ = run(method, step, state, poisoned())  # Counts for nothing.
  expected = 1.0
  for n in (1, 2):
    state, _ = run(method, step, state, batch())
    w = float(state.networks["student"].params["w"])
    rate = float(ema.warmed_rate(0.9, jnp.int32(n)))
    expected = rate * expected + (1 - rate) * w
  np.testing.assert_allclose(
      state.averages["ema_0.9"]["w"], expected, rtol=1e-5
  )


@pytest.mark.slow
def test_the_target_network_of_ct_lags_by_mu_of_k():
  method = toys.consistency_toy(
      toys.MLP(width=4, two_time=False), discretization="sqrt", s0=2, s1=20,
      curriculum_steps=4, target_mu0=0.9,
  )
  optimizers = {"student": optax.sgd(0.1)}
  images = toys.images()
  create = functools.partial(train_state.create, method, optimizers, (0.9,), 0)
  state = jax.jit(create)(images, None)
  step = jax.jit(
    train_step.make_step(
      method, optimizers, train_step.StepOptions(ema_rates=(0.9,))
    ),
    static_argnames="phase",
  )
  expected = state.networks["student"].params
  data = {"image": images, "index": np.arange(len(images))}
  for k in range(4):
    n = int(np.ceil(np.sqrt(k / 4 * (21**2 - 4) + 4) - 1)) + 1
    mu = np.exp(2 * np.log(0.9) / (n - 1))
    state, _ = run(method, step, state, data)
    expected = jax.tree.map(
      lambda e, p, mu=mu: mu * e + (1 - mu) * p,
      expected,
      state.networks["student"].params,
    )
  toys.assert_close(state.averages["target"], expected)
  assert step._cache_size() == 1


@pytest.mark.slow
def test_the_curriculum_does_not_recompile_the_step():
  method = toys.bidirectional_toy(toys.MLP(width=4))
  optimizers = {"student": optax.adam(1e-3)}
  images = toys.images()
  create = functools.partial(train_state.create, method, optimizers, (0.9,), 0)
  state = jax.jit(create)(images, None)
  step = jax.jit(
    train_step.make_step(
      method, optimizers, train_step.StepOptions(ema_rates=(0.9,))
    ),
    static_argnames="phase",
  )
  data = {"image": images, "index": np.arange(len(images))}
  scales = set()
  for _ in range(34):
    scales.add(method.num_scales(int(state.step)))
    state, metrics = run(method, step, state, data)
    assert np.isfinite(metrics["loss"])
  assert scales == {11, 21, 41} and step._cache_size() == 1


# The state.


def test_a_state_is_a_function_of_the_seed():
  method = toys.bidirectional_toy(toys.MLP(width=4))
  optimizers = {"student": optax.adam(1e-3)}

  @functools.partial(jax.jit, static_argnums=0)
  def create(seed):
    return train_state.create(
      method, optimizers, (0.9, 0.9999), seed, toys.images(), None
    )

  one, two = create(0), create(1)
  toys.assert_equal(one, create(0))
  kernels = [s.networks["student"].params["out"]["kernel"] for s in (one, two)]
  assert np.any(kernels[0] != kernels[1])
  assert set(one.averages) == {"ema_0.9", "ema_0.9999"}
  for average in one.averages.values():
    toys.assert_equal(average, one.networks["student"].params)
  assert one.step == one.skipped == one.skipped_in_row == 0


def test_a_head_that_the_source_lacks_starts_fresh():
  class Headed(Regression):
    @property
    def networks(self):
      return {"student": base.TrainableNetwork(
          None, lambda key, x, y: {"w": jnp.ones(()), "head": jnp.zeros(2)},
          heads=("head",),
      )}

  method = Headed()
  state = train_state.create(
      method, {"student": optax.sgd(0.1)}, (), 0, jnp.zeros((1, 1)), None,
      {"student": {"w": jnp.float32(5)}},
  )
  params = state.networks["student"].params
  assert params["w"] == 5 and params["head"].shape == (2,)
  network = method.networks["student"]
  assert set(network.without_heads(params)) == {"w"}


@pytest.mark.parametrize("load", [None, lambda s, f: {"w": s["w"] + f["w"]}])
def test_starting_from_another_run(load):
  class From(Regression):
    @property
    def networks(self):
      network = toys.scale_network()
      return {"student": dataclasses.replace(network, load_pretrained=load)}

  data = batch()
  state = train_state.create(
    From(),
    {"student": optax.adam(0.1)},
    (0.9,),
    0,
    data["image"],
    None,
    {"student": {"w": jnp.float32(5)}},
  )
  expected = 6 if load else 5
  assert state.networks["student"].params["w"] == expected
  assert state.averages["ema_0.9"]["w"] == expected


def test_no_buffer_of_the_state_appears_twice():
  # The engine donates the state; a shared buffer could not be donated.
  method = Averaged()
  optimizers = {"student": optax.sgd(0.1)}
  state, _ = begin(method)
  step = sharding.Jit(sharding.make_mesh(jax.devices()[:1])).compile(
    train_step.make_step(
      method, optimizers, train_step.StepOptions(ema_rates=(0.9,))
    )
  )
  new, _ = run(method, step, state, batch())
  assert state.step.is_deleted() and new.step == 1


def test_a_projection_follows_every_update():
  class Projected(Regression):
    @property
    def networks(self):
      network = toys.scale_network()
      return {
        "student": dataclasses.replace(
          network, project=lambda p: {"w": jnp.round(p["w"])}
        )
      }

  method = Projected()
  state, step = begin(method, {"student": optax.sgd(0.7)})
  free, _ = begin(Regression(), {"student": optax.sgd(0.7)})
  free, _ = run(
    Regression(),
    begin(Regression(), {"student": optax.sgd(0.7)})[1],
    free,
    batch(),
  )
  state, _ = run(method, step, state, batch())
  plain = float(free.networks["student"].params["w"])
  assert plain != round(plain)
  assert float(state.networks["student"].params["w"]) == round(plain)
  np.testing.assert_allclose(
    state.averages["ema_0.9"]["w"], 0.9 + 0.1 * round(plain), rtol=1e-6
  )


def test_power_function_average_forgets_the_start():
  method = Regression()
  optimizers = {"student": optax.sgd(0.1)}
  data = batch()
  state = train_state.create(
    method,
    optimizers,
    (),
    0,
    data["image"],
    data["label"],
    ema_stds=(0.1,),
  )
  step = jax.jit(
    train_step.make_step(
      method, optimizers, train_step.StepOptions(ema_rates=(), ema_stds=(0.1,))
    ),
    static_argnames="phase",
  )
  expected = None
  for k in range(1, 6):
    state, _ = run(method, step, state, data)
    w = float(state.networks["student"].params["w"])
    keep = float(phema.beta(0.1, k, 1))
    expected = w if k == 1 else keep * expected + (1 - keep) * w
  np.testing.assert_allclose(
    state.averages["phema_0.1"]["w"], expected, rtol=1e-5
  )


@dataclasses.dataclass(frozen=True)
class Seen(Regression):
  """Tells what images and labels of augmentation a loss is handed."""

  def loss(self, params, ctx):
    loss = params["w"] * jnp.zeros(B)
    metrics = {"images": jnp.mean(ctx.images, (1, 2, 3))}
    if ctx.augment_labels is not None:
      metrics["labels"] = jnp.sum(jnp.abs(ctx.augment_labels), -1)
    return loss, metrics


def photographs():
  image = np.random.default_rng(0).integers(0, 256, (B, 8, 8, 3), np.uint8)
  return batch() | {"image": image}


def test_bytes_become_floats_on_the_devices():
  state, step = begin(Seen())
  _, metrics = step(state, photographs(), {}, ("student",))
  expected = image_source.to_float(photographs()["image"])
  _, same = step(state, photographs() | {"image": expected}, {}, ("student",))
  assert metrics["images"] == same["images"]
  np.testing.assert_allclose(metrics["images"], expected.mean(), rtol=1e-5)
  assert "labels" not in metrics


@pytest.mark.slow
def test_augmentation_is_keyed_and_told_to_the_loss():
  pipe = augmentation.training_pipe(0.5)
  state, step = begin(Seen(), augment=pipe, seed=3)
  _, metrics = step(state, photographs(), {}, ("student",))
  keys = rng.example_keys(3, "augment", 0, np.arange(B))
  images, labels = augmentation.apply(
    pipe, image_source.to_float(photographs()["image"]), augmentation.draw(keys)
  )
  assert float(jnp.sum(jnp.abs(labels))) > 0
  np.testing.assert_allclose(metrics["images"], jnp.mean(images), rtol=1e-3)
  np.testing.assert_allclose(
    metrics["labels"], jnp.mean(jnp.sum(jnp.abs(labels), -1)), rtol=1e-5
  )


@pytest.mark.slow
@pytest.mark.parametrize("toy", ["bidirectional_toy", "consistency_toy"])
def test_labels_of_augmentation_reach_every_pass(toy):
  """A network that adds them to its output: none of the passes forgets."""

  class Told(toys.MLP):
    augment_dim: int = 9

    @nn.compact
    def __call__(self, x, c_noise, end, labels, keys, augment_labels=None):
      assert augment_labels is not None
      assert augment_labels.shape == (len(x), 9)
      told.append(augment_labels[0, 0])
      return x * self.param("w", nn.initializers.ones, ())

    def init(self, key, x, *rest):
      return {"params": {"w": jnp.ones(())}}

  told = []
  two_time = toy == "bidirectional_toy"
  method = getattr(toys, toy)(network=Told(two_time=two_time))
  ctx = toys.context(toys.images(), method.curriculum(0))._replace(
    augment_labels=jnp.ones((B, 9))
  )
  method.loss({"w": jnp.ones(())}, ctx)
  # The two online passes of BCM are one of twice the batch.
  assert len(told) == (3 if two_time else 2)


@dataclasses.dataclass(frozen=True)
class WithConstant(Regression):
  """Its network has a constant among its parameters, as Fourier features."""

  @property
  def networks(self):
    def init(*_):
      return {"w": jnp.ones(()), "f": {"freqs": jnp.arange(1.0, 4.0)}}

    return {"student": base.TrainableNetwork(toys.Scale(), init)}


@pytest.mark.parametrize("name", ["adamw", "radam", "adam"])
def test_constants_do_not_change(name):
  optimizer = optim.Optimizer(name, learning_rate=0.1, weight_decay=0.5)
  state, step = begin(WithConstant(), {"student": optimizer.build()})
  new = state
  for _ in range(3):
    new, _ = run(WithConstant(), step, new, batch())
  old, new = (s.networks["student"].params for s in (state, new))
  toys.assert_equal(new["f"], old["f"])
  assert new["w"] != old["w"]


@pytest.mark.parametrize("network, options, names", [
    (song.SongUNet, song.NCSNPP, {"freqs"}),
    (edm2.EDM2, dict(num_head_channels=8), {"freqs", "phases"}),
])
def test_constants_of_the_networks_are_declared(network, options, names):
  """Constants are the parameters without gradient, by name."""
  net = network(
      **options | dict(model_channels=8, channel_mult=(1,), num_res_blocks=1)
  )
  x, t = jnp.ones((1, 8, 8, 3)), jnp.ones(1)

  def shapes():
    return net.init(jax.random.key(0), x, t)["params"]

  leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(shapes))
  found = {path[-1].key for path, _ in leaves}
  assert found & set(embeddings.CONSTANTS) == names


def test_half_life_in_images_with_ramp_up():
  """EDM's training loop: images seen before the step limit the half-life."""
  method, data = Regression(), batch()
  optimizers = {"student": optax.sgd(0.1)}
  halflives = dict(ema_halflife_kimg=(0.02,))
  state = train_state.create(
      method, optimizers, (), 0, data["image"], data["label"], **halflives
  )
  options = train_step.StepOptions(
      ema_rates=(), ema_rampup_ratio=0.5, batch_size=B, **halflives
  )
  step = jax.jit(
      train_step.make_step(method, optimizers, options), static_argnames="phase"
  )
  expected = None
  for images in range(0, 10 * B, B):
    state, _ = run(method, step, state, data)
    w = float(state.networks["student"].params["w"])
    beta = 0.5 ** (B / max(min(20, 0.5 * images), 1e-8))
    expected = w if not images else beta * expected + (1 - beta) * w
  np.testing.assert_allclose(
      state.averages["ema_0.02kimg"]["w"], expected, rtol=1e-5
  )
