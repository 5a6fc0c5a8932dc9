"""A flow map made of a network and a preconditioning."""

import jax
import jax.numpy as jnp

from bcm_jax.diffusion import preconditioning


class NetworkMap:
  """f(x, t, u) of methods that have `network`, `scalings` and `noise`."""

  @property
  def takes_end_time(self) -> bool:
    """Whether the network takes an end level."""
    return self.network.two_time

  def init(self, key, images, labels):
    """Fresh parameters for images [B, H, W, C] and labels [B] or None."""
    t = jnp.ones(images.shape[:1], jnp.float32)
    end = t if self.takes_end_time else None
    return self.network.init(key, images, t, end, labels)["params"]

  def f(
      self, params, x, t, u, labels, dropout_keys=None, augment_labels=None
  ) -> jax.Array:
    """The preconditioned network f(x, t, u): [B, ...] from level t to u."""
    # Only networks with augment_dim take them.
    extra = () if augment_labels is None else (augment_labels,)

    def network(x, c_noise, c_noise_end):
      end = c_noise_end if self.takes_end_time else None
      return self.network.apply(
          {"params": params}, x, c_noise, end, labels, dropout_keys, *extra
      )

    return preconditioning.precondition(
        network, self.scalings, x, t, u, self.noise
    )

  def flow_map(self, params):
    """f(x, t, u, labels) in evaluation mode; u is sigma_min if one-time."""
    return lambda x, t, u, labels=None: self.f(params, x, t, u, labels)
