"""The training step: pure, the same for every method.

  gradients of the networks in the phase  (each of its own loss, all others
  stop-gradiented; summed over microbatches; averaged over devices)
  -> finite?  -> optimisers -> averages -> metrics

One executable is compiled a phase; the curriculum enters as arguments.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bcm_jax.data import augmentation
from bcm_jax.data import image_source
from bcm_jax.methods import base
from bcm_jax.training import ema
from bcm_jax.training import phema
from bcm_jax.training import rng
from bcm_jax.training import train_state

Batch = dict[str, jax.Array]
# Floats of the 256 grey levels, looked up: XLA divides by a constant in other
# ways than NumPy, and images would depend on where they were converted.
_GREY = image_source.to_float(np.arange(256, dtype=np.uint8))
# Fields of a batch that a loss finds in its context by another name.
_KNOWN = ("image", "label", "index")
Step = Callable[..., tuple[train_state.TrainState, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class StepOptions:
  """What the step needs beside method and optimisers.

  Attributes:
    seed: of all randomness of the step.
    ema_rates: rates of the sampled network's averages.
    ema_warmup: let the averages forget the start early, see ema.warmed_rate.
    ema_stds: lengths of its power-function averages, see power_ema.
    microbatches: gradient accumulation; the batch is cut into this many.
    axis_name: mapped axis to average over under pmap; None under jit, where
      the global batch is one array.
    augment: what is done to the images on the devices, and told the network
      by labels; None does nothing.
  """

  seed: int = 0
  ema_rates: tuple[float, ...] = (0.9999,)
  ema_warmup: bool = False
  ema_stds: tuple[float, ...] = ()
  microbatches: int = 1
  axis_name: str | None = None
  augment: augmentation.AugmentPipe | None = None


def make_step(
    method: base.Method,
    optimizers: Mapping[str, optax.GradientTransformation],
    options: StepOptions,
) -> Step:
  """Returns step(state, batch, curriculum, phase) -> (state, metrics).

  batch: 'image' [B, H, W, C] uint8 or float in [-1, 1], 'label' [B] int32
  (optional), 'index' [B] int32 positions in the global batch, and what else the
  method's losses read. phase is static. metrics are scalars, means over the
  global batch.
  """

  def step(state, batch, curriculum, phase):
    grads, metrics = {}, {}
    for name in phase:
      grads[name], metrics[name] = _gradients(
          method, options, state, batch, curriculum, name
      )
    finite = jnp.array(True)
    for name in phase:
      norm = optax.global_norm(grads[name])
      finite &= jnp.isfinite(norm) & jnp.isfinite(metrics[name]["loss"])
      metrics[name]["grad_norm"] = norm

    def updated():
      networks = dict(state.networks)
      for name in phase:
        networks[name] = _update(
            state.networks[name], grads[name], optimizers[name],
            method.networks[name].project,
        )
      averages = _averages(
          method, options, state, networks, curriculum, phase
      )
      return networks, averages

    # A branch, not a selection: XLA would read and write twice as much.
    networks, averages = jax.lax.cond(
        finite, updated, lambda: (dict(state.networks), dict(state.averages))
    )
    bad = 1 - finite.astype(jnp.int32)
    new = train_state.TrainState(
        step=state.step + 1,
        data_offset=state.data_offset,
        networks=networks,
        averages=averages,
        skipped=state.skipped + bad,
        skipped_in_row=(state.skipped_in_row + 1) * bad,
        log2_loss_scale=_next_loss_scale(state.log2_loss_scale, finite),
        frozen=state.frozen,
    )
    return new, _reported(method, new, metrics)

  return step


def _reported(method, new: train_state.TrainState, metrics) -> dict[str, Any]:
  """Metrics of all networks of the phase, and what the state counts."""
  flat = {
      (k if len(method.networks) == 1 else f"{name}/{k}"): v
      for name in metrics
      for k, v in metrics[name].items()
  }
  flat["skipped"] = new.skipped
  flat["skipped_in_row"] = new.skipped_in_row
  if new.log2_loss_scale is not None:
    flat["log2_loss_scale"] = new.log2_loss_scale
  return flat


def _loss(params, term, name, method, options, state, batch, curriculum):
  """Mean of a term of a network's loss over a (micro)batch, and metrics."""
  networks, averages, frozen = jax.lax.stop_gradient((
      {n: p.params for n, p in state.networks.items()}, state.averages,
      state.frozen,
  ))
  position = state.step + state.data_offset

  def keys(stream):
    return rng.example_keys(options.seed, stream, position, batch["index"])

  images, augment_labels = batch["image"], None
  if images.dtype == jnp.uint8:
    images = jnp.asarray(_GREY)[images]
  if options.augment is not None:
    images, augment_labels = augmentation.apply(
        options.augment, images, augmentation.draw(keys("augment"))
    )
  context = base.Context(
      images=images,
      labels=batch.get("label"),
      augment_labels=augment_labels,
      keys=keys,
      curriculum=curriculum,
      networks=networks,
      averages=averages,
      index=batch["index"],
      frozen=frozen,
      shared_key=lambda stream: rng.step_key(options.seed, stream, position),
      extra={k: v for k, v in batch.items() if k not in _KNOWN},
  )
  loss, metrics = method.losses[name](params, context)
  means = {k: jnp.mean(v) for k, v in metrics.items()}
  if term is None:
    mean = means["loss"] = jnp.mean(loss)
  else:
    mean = means[f"loss_{term}"] = jnp.mean(loss[term])
  return mean * _loss_scale(state), means


def _loss_scale(state) -> jax.Array | float:
  """What losses are multiplied by, and gradients divided by again."""
  if state.log2_loss_scale is None:
    return 1.0
  return 2.0**state.log2_loss_scale


# An overflow halves the scale; it takes 1,000 good steps to double it again
# (OpenAI's consistency_models, fp16_util.py).
_LOSS_SCALE_GROWTH = 1e-3


def _next_loss_scale(log2_scale, finite):
  if log2_scale is None:
    return None
  return log2_scale + jnp.where(finite, _LOSS_SCALE_GROWTH, -1.0)


def _gradients(method, options, state, batch, curriculum, name):
  """Gradient of a network's mean loss over the global batch, and metrics."""
  params = state.networks[name].params
  adaptive_weight = method.networks[name].adaptive_weight
  terms = (None,) if adaptive_weight is None else adaptive_weight.terms

  def one(batch):
    grads, metrics = [], {}
    for term in terms:  # XLA computes once what they have in common.
      grad, found = jax.grad(_loss, has_aux=True)(
          params, term, name, method, options, state, batch, curriculum
      )
      if state.log2_loss_scale is not None:
        grad = jax.tree.map(lambda g: g / _loss_scale(state), grad)
      grads.append(grad)
      metrics |= found
    return grads, metrics

  m = options.microbatches
  if m == 1:
    result = one(batch)
  else:
    # Every m-th example, not contiguous runs: a batch that is sharded over
    # devices then stays where it is.
    parts = jax.tree.map(
        lambda x: x.reshape(x.shape[0] // m, m, *x.shape[1:]).swapaxes(0, 1),
        batch,
    )
    shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def accumulate(total, part):
      return jax.tree.map(lambda a, b: a + b / m, total, one(part)), None

    result, _ = jax.lax.scan(accumulate, zeros, parts)
  if options.axis_name is not None:
    result = jax.lax.pmean(result, options.axis_name)
  grads, metrics = result
  if adaptive_weight is None:
    return grads[0], metrics
  return _balanced(adaptive_weight, grads, metrics)


def _balanced(adaptive_weight: base.AdaptiveWeight, grads, metrics):
  """The sum of the terms' gradients by the weights that a method gives them.
  """
  norms = {
      term: jnp.linalg.norm(adaptive_weight.last_layer(grad).ravel())
      for term, grad in zip(adaptive_weight.terms, grads, strict=True)
  }
  weights = jax.lax.stop_gradient(adaptive_weight.loss_weights(norms))
  factors = [weights[term] for term in adaptive_weight.terms]
  total = jax.tree.map(
      lambda *leaves: sum(
          w * leaf for w, leaf in zip(factors, leaves, strict=True)
      ), *grads,
  )
  metrics = metrics | {f"weight_{t}": w for t, w in weights.items()}
  metrics["loss"] = sum(
      weights[term] * metrics[f"loss_{term}"] for term in adaptive_weight.terms
  )
  return total, metrics


def _update(network, grads, optimizer, project):
  updates, opt_state = optimizer.update(
      grads, network.opt_state, network.params
  )
  params = optax.apply_updates(network.params, updates)
  if project is not None:
    params = project(params)
  return train_state.NetworkState(params, opt_state, network.num_updates + 1)


def _averages(
    method, options, state, networks, curriculum, phase
) -> dict[str, Any]:
  """Moving averages after the updates, of the networks of the phase."""
  averages = dict(state.averages)
  if method.sampled_network in phase:
    averages |= _sampled_averages(
        options, averages, networks[method.sampled_network]
    )
  for name, average in method.averages.items():
    if average.network in phase:
      averages[name] = ema.update(
          averages[name],
          networks[average.network].params,
          curriculum[average.rate],
      )
  return averages


def _sampled_averages(options, old, sampled) -> dict[str, Any]:
  """The sampled network's averages after its update."""
  averages = {}
  for rate in options.ema_rates:
    name = train_state.average_name(rate)
    if options.ema_warmup:
      rate = ema.warmed_rate(rate, sampled.num_updates)
    averages[name] = ema.update(old[name], sampled.params, rate)
  for std in options.ema_stds:
    name = train_state.power_name(std)
    averages[name] = phema.update(
        old[name], sampled.params, std, sampled.num_updates, 1
    )
  return averages
