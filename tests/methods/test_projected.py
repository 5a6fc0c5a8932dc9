"""A discriminator on features that a user gives."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bcm_jax import errors
from bcm_jax.config import build
from bcm_jax.config import resolve
from bcm_jax.diffusion import preconditioning
from bcm_jax.methods import ctm
from bcm_jax.methods import gan
from bcm_jax.metrics import lpips
from bcm_jax.training import train_state
from bcm_jax.training import train_step
from tests import toys


def pyramid(params, images):
  """Means of 1, 2 x 2 and 4 x 4 pixels, each in some channels."""
  features = []
  for size, width in ((1, 3), (2, 5), (4, 2)):
    b, h, w, c = images.shape
    blocks = images.reshape(b, h // size, size, w // size, size, c)
    features.append(
        blocks.mean(axis=(2, 4)) * params["scale"] * jnp.arange(1.0, width + 1)
    )
  return features


def backbone():
  """What method.gan_encoder='tests.methods.test_projected:backbone' names."""
  return pyramid, {"scale": np.float32(2)}


NAME = "tests.methods.test_projected:backbone"


def test_mixing_by_hand():
  rng = np.random.default_rng(0)
  fine, coarse = rng.normal(size=(2, 4, 4, 3)), rng.normal(size=(2, 2, 2, 5))
  fine[1], coarse[1] = 7.0, -3.0  # Constant images stay constant.
  inputs = [jnp.float32(fine), jnp.float32(coarse)]
  params = gan.Projection().init(jax.random.key(0), inputs)["params"]
  out = gan.Projection().apply({"params": params}, inputs)
  assert [x.shape for x in out] == [(2, 4, 4, 64), (2, 2, 2, 64)]
  kernel = {k: np.asarray(v["kernel"])[0, 0] for k, v in params.items()}
  below = coarse @ kernel["channels1"] @ kernel["scales1"]
  np.testing.assert_allclose(out[1], below, rtol=1e-4, atol=1e-5)
  own = fine[1] @ kernel["channels0"]
  np.testing.assert_allclose(
      out[0][1], (own + below[1, 0, 0]) @ kernel["scales0"],
      rtol=1e-4, atol=1e-4,
  )
  # Fine features see coarse ones.
  moved = gan.Projection().apply(
      {"params": params}, [inputs[0], inputs[1] + 1]
  )
  assert np.abs(moved[0] - out[0]).max() > 0.1


@pytest.mark.slow
def test_a_discriminator_of_it_plays_and_it_stays_as_it_was():
  encoder = gan.projected(NAME, ())
  teacher, _ = toys.gaussian_teacher()
  method = ctm.TrajectoryDistillation(
      network=toys.GaussianFlow(), c_noise=preconditioning.adm_c_noise,
      teacher=teacher, metric="l2", gan=True, gan_features=4,
      gan_encoder=encoder,
  )
  images = toys.images(8, 4)
  optimizers = {name: optax.adam(1e-2) for name in method.networks}
  state = train_state.create(method, optimizers, (), 0, images, None)
  frozen = {"teacher": {"scale": jnp.zeros(())},
            "gan_encoder": encoder.init(jax.random.key(0), images, None)}
  state = state.replace(frozen=frozen)
  step = jax.jit(
    train_step.make_step(
      method, optimizers, train_step.StepOptions(ema_rates=())
    ),
    static_argnames="phase",
  )
  batch = {"image": images, "index": np.arange(8)}
  new, row = step(state, batch, method.curriculum(0), ("student",))
  assert row["student/loss_gan"] != 0
  last, row = step(new, batch, method.curriculum(1), ("discriminator",))
  assert row["discriminator/logit_real"] != row["discriminator/logit_fake"]
  toys.assert_equal(last.frozen, frozen)
  heads = last.networks["discriminator"].params
  assert set(heads) == {"level0", "level1", "level2"}
  moved = jax.tree.map(
    lambda a, b: np.abs(a - b).max(),
    heads,
    new.networks["discriminator"].params,
  )
  for level in moved.values():
    assert level["logit"]["kernel"] > 0 and level["last"]["kernel"] > 0


def test_vgg_sees_images_of_its_size(monkeypatch):
  def features(params, images):
    seen.append((params, images.shape))
    return [images, images + 1, images + 2]

  seen = []
  monkeypatch.setattr(lpips, "features", features)
  encoder = gan.projected("vgg", ("a.pth",))
  found = encoder.backbone("weights", jnp.zeros((2, 8, 8, 3)))
  assert seen == [("weights", (2, 224, 224, 3))]
  np.testing.assert_array_equal(found[0][0, 0, 0], [1, 1, 1])
  assert len(found) == 2  # The first block's are left out.


def config(**method):
  return resolve.resolve(
    {
      "data": {"name": "digits"},
      "model": dict(
        name="adm",
        model_channels=8,
        channel_mult=(1,),
        num_res_blocks=1,
        attention_resolutions=(),
        num_head_channels=8,
        out_channels=1,
        num_groups=4,
        two_time=True,
        end_branch="blocks",
      ),
      "method": dict(name="ctm", sigma_data=0.75, gan=True, **method),
    }
  )


def test_a_config_names_it():
  experiment = build.build(config(gan_encoder=NAME))
  assert experiment.method.discriminator.encoder.backbone is pyramid
  first, second = (build.load_frozen(experiment) for _ in range(2))
  toys.assert_equal(first, second)
  shapes = build.frozen_shapes(experiment)
  assert jax.tree.map(np.shape, first) == jax.tree.map(
    lambda s: s.shape, shapes
  )


@pytest.mark.parametrize(
  "method, words",
  [
    (dict(gan_encoder="vgg"), "method.gan_encoder_path"),
    (dict(gan_encoder="vg"), "did you mean 'vgg'"),
    (dict(gan_encoder="nowhere:backbone"), "cannot be imported"),
    (dict(gan_encoder="tests.toys:nothing"), "cannot be imported"),
    (dict(), "method.gan_encoder"),
  ],
)
def test_what_cannot_be_judged_by(method, words):
  with pytest.raises(errors.UserError, match=words):
    build.build(config(**method))
