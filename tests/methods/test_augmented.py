"""Networks that see augmented images have the augmentation labels."""

from collections.abc import Callable
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from bcm_jax import errors
from bcm_jax.config import registry
from bcm_jax.config import resolve
from bcm_jax.config import validate
from bcm_jax.data import augmentation
from bcm_jax.methods import edm
from bcm_jax.models import layers
from tests import toys

_CASES = [
    *((name, {}) for name in registry.METHODS),
    ("cd", dict(metric="l2", solver="euler")),
    ("ctm", dict(gan=True, gan_own_times=True)),
    ("ctm", dict(target_inner="none", teacher=None, metric="l2")),
    ("dmd", dict(regression_weight=0.0)),
    ("dmd2", dict(steps=4, gan_levels=(0,))),
]


class _Network(nn.Module):
  """A network of one parameter that records the labels of its passes."""

  see: Callable
  two_time: bool = False
  num_classes: int | None = None

  @staticmethod
  def last_layer(tree):
    return tree["scale"]

  @nn.compact
  def __call__(
      self, x, c_noise, end=None, labels=None, keys=None, augment=None
  ):
    if not self.is_initializing():
      self.see(None if augment is None else augment.shape[1:])
    layers.sow_level(self, 0, x)
    return x * self.param("scale", nn.initializers.ones, ())


@pytest.mark.parametrize("name, options", _CASES)
def test_every_pass_has_the_labels(name, options):
  cls, preset = registry.METHODS[name]
  seen = []
  teacher = edm.Diffusion(_Network(seen.append))
  values = dict(
      network=_Network(seen.append, two_time=name in ("bcm", "ctm")),
      teacher=teacher,
      curriculum_steps=4, gan_augment=False,
  ) | preset.options | options
  if "regression_weight" in values:  # Refused with data.augment.
    values["regression_weight"] = 0.0
  method = cls(**{
      k: v for k, v in values.items() if k in inspect.signature(cls).parameters
  })

  def losses(key):
    images = jnp.zeros((2, 4, 4, 4))
    params = {
        n: network.init(key, images, None)
        for n, network in method.networks.items()
    }
    seen.clear()
    ctx = toys.context(
        images, method.curriculum(0), networks=params,
        averages={n: params[a.network] for n, a in method.averages.items()},
        frozen={"teacher": teacher.init(key, images, None)},
    )._replace(augment_labels=jnp.ones((2, augmentation.LABEL_DIM)))
    return {n: loss(params[n], ctx)[0] for n, loss in method.losses.items()}

  jax.eval_shape(losses, jax.random.key(0))
  assert seen and set(seen) == {(augmentation.LABEL_DIM,)}


def _config(**overrides):
  raw = resolve.read_file("digits_ctm.py")
  return resolve.resolve(
      raw, {k.replace("__", "."): v for k, v in overrides.items()}
  )


def test_an_encoder_without_labels_is_refused():
  options = dict(
      data__augment="0.1", method__gan="True", method__gan_encoder="vgg"
  )
  with pytest.raises(errors.UserError, match=r"method\.gan_encoder"):
    validate.method(_config(**options))
  validate.method(_config(**options | {"method__gan": "False"}))
  validate.method(_config(**options | {"method__gan_encoder": "teacher"}))
