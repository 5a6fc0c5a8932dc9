"""The training step: a pure function, the same for all methods.

  1. Gradients of the loss of each network in the phase, with stop-gradient on
     all other networks; averaged over microbatches and devices.
  2. Optimizer updates and moving averages, if all losses, gradients and updated
     networks are finite; otherwise nothing changes except the counters.
  3. Metrics.

Each phase compiles to one executable; the curriculum is an argument.
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
from bcm_jax.models import embeddings
from bcm_jax.training import ema
from bcm_jax.training import phema
from bcm_jax.training import rng
from bcm_jax.training import train_state

Batch = dict[str, jax.Array]
# Look-up table uint8 -> float in [-1, 1]: XLA and NumPy round a division by a
# constant differently, so that images would depend on where they are converted.
_GRAY = image_source.to_float(np.arange(256, dtype=np.uint8))
# Fields of a batch that have their own field in base.Context.
_CONTEXT_FIELDS = ("image", "label", "index")
Step = Callable[..., tuple[train_state.TrainState, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True)
class StepOptions:
  """Options of the training step.

  Attributes:
    seed: seed of the run.
    ema_rates: decay rates of the EMAs of the sampled network.
    ema_warmup: whether to reduce these rates early, see ema.warmed_rate.
    ema_stds: sigma_rel of its power-function EMAs, see phema.
    ema_halflife_kimg: half-lives of its other EMAs, in thousands of images.
    ema_rampup_ratio: limit of the half-life, see phema.halflife_beta.
    batch_size: images per step, for the half-lives.
    microbatches: number of microbatches (gradient accumulation).
    axis_name: mapped axis over which gradients and metrics are averaged; None
      under jit on a global batch.
    augment: augmentation on the devices, with its parameters passed to the
      network as labels; None disables it.
  """

  seed: int = 0
  ema_rates: tuple[float, ...] = (0.9999,)
  ema_warmup: bool = False
  ema_stds: tuple[float, ...] = ()
  ema_halflife_kimg: tuple[float, ...] = ()
  ema_rampup_ratio: float | None = None
  batch_size: int = 1
  microbatches: int = 1
  axis_name: str | None = None
  augment: augmentation.AugmentPipe | None = None


def make_step(
    method: base.Method,
    optimizers: Mapping[str, optax.GradientTransformation],
    options: StepOptions,
) -> Step:
  """Returns step(state, batch, curriculum, phase) -> (state, metrics).

  Args of step:
    state: TrainState.
    batch: 'image' [B, H, W, C], uint8 or float in [-1, 1]; 'label' [B] int32,
      optional; 'index' [B] int32, positions in the global batch; and other
      fields [B, ...] that the losses read.
    curriculum: method.curriculum(step).
    phase: names of the networks to update; static.

  Metrics are scalars, means over the global batch.

  Args:
    method: declares networks and losses.
    optimizers: network -> optimizer.
    options: see StepOptions.
  """

  def step(state, batch, curriculum, phase):
    grads, metrics = {}, {}
    for name in phase:
      grads[name], metrics[name] = _gradients(
          method, options, state, batch, curriculum, name
      )
    for name in phase:
      metrics[name]["grad_norm"] = optax.global_norm(grads[name])

    def updated_networks():
      return dict(state.networks) | {
          name: _update(
              state.networks[name], grads[name], optimizers[name],
              method.networks[name].project,
          )
          for name in phase
      }

    def updated():
      networks = updated_networks()
      averages = _averages(
          method, options, state, networks, curriculum, phase
      )
      return networks, averages

    # One decision for all networks. The updates are computed twice: here XLA
    # fuses them into the reduction and stores none of them.
    new_networks = updated_networks()
    finite = _all_finite([
        (metrics[name]["loss"], metrics[name]["grad_norm"], new_networks[name])
        for name in phase
    ])
    # cond, not where: XLA would read and write twice as much memory.
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
    return new, _flat_metrics(method, new, metrics)

  return step


def _flat_metrics(
    method, new: train_state.TrainState, metrics
) -> dict[str, Any]:
  """Returns the metrics of all networks of the phase and the counters."""
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
  """Returns (mean loss of a network over a microbatch, metrics).

  The loss is multiplied by the loss scale. term selects a term of a loss with
  an AdaptiveWeight; None is a loss with one value per example.
  """
  networks, averages, frozen = jax.lax.stop_gradient((
      {n: p.params for n, p in state.networks.items()}, state.averages,
      state.frozen,
  ))
  position = state.step + state.data_offset

  def keys(stream):
    return rng.example_keys(options.seed, stream, position, batch["index"])

  images, augment_labels = batch["image"], None
  if images.dtype == jnp.uint8:
    images = jnp.asarray(_GRAY)[images]
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
      extra={k: v for k, v in batch.items() if k not in _CONTEXT_FIELDS},
  )
  loss, metrics = method.losses[name](params, context)
  means = {k: jnp.mean(v) for k, v in metrics.items()}
  if term is None:
    mean = means["loss"] = jnp.mean(loss)
  else:
    mean = means[f"loss_{term}"] = jnp.mean(loss[term])
  return mean * _loss_scale(state), means


def _loss_scale(state) -> jax.Array | float:
  """Returns the factor on losses, by which gradients are divided again."""
  if state.log2_loss_scale is None:
    return 1.0
  return 2.0**state.log2_loss_scale


# An overflow halves the scale; 1,000 finite steps double it (OpenAI's
# consistency_models, fp16_util.py).
_LOSS_SCALE_GROWTH = 1e-3


def _next_loss_scale(log2_scale, finite):
  if log2_scale is None:
    return None
  return log2_scale + jnp.where(finite, _LOSS_SCALE_GROWTH, -1.0)


def _gradients(method, options, state, batch, curriculum, name):
  """Returns (gradient of a network's mean loss over the global batch, metrics).
  """
  params = state.networks[name].params
  adaptive_weight = method.networks[name].adaptive_weight
  terms = (None,) if adaptive_weight is None else adaptive_weight.terms

  def grads_of(batch):
    grads, metrics = [], {}
    for term in terms:  # XLA shares the common subexpressions of the terms.
      grad, term_metrics = jax.grad(_loss, has_aux=True)(
          params, term, name, method, options, state, batch, curriculum
      )
      if state.log2_loss_scale is not None:
        grad = jax.tree.map(lambda g: g / _loss_scale(state), grad)
      grads.append(grad)
      metrics |= term_metrics
    return grads, metrics

  m = options.microbatches
  if m == 1:
    result = grads_of(batch)
  else:
    # A microbatch takes every m-th example, not a contiguous block, so that a
    # sharded batch needs no communication.
    parts = jax.tree.map(
        lambda x: x.reshape(x.shape[0] // m, m, *x.shape[1:]).swapaxes(0, 1),
        batch,
    )
    shapes = jax.eval_shape(grads_of, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def accumulate(total, part):
      return jax.tree.map(lambda a, b: a + b / m, total, grads_of(part)), None

    result, _ = jax.lax.scan(accumulate, zeros, parts)
  if options.axis_name is not None:
    result = jax.lax.pmean(result, options.axis_name)
  grads, metrics = result
  if adaptive_weight is None:
    return grads[0], metrics
  return _adaptive_sum(adaptive_weight, grads, metrics)


def _adaptive_sum(adaptive_weight: base.AdaptiveWeight, grads, metrics):
  """Returns (sum of the terms' gradients with adaptive weights, metrics)."""
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


def _all_finite(tree) -> jax.Array:
  """Returns whether all values are finite, the same on all devices.

  A sum, unlike a logical and, is reduced over the devices once for all tensors.
  """
  return 0 == sum(
      jnp.sum(~jnp.isfinite(x), dtype=jnp.float32)
      for x in jax.tree.leaves(tree)
  )


def _update(network, grads, optimizer, project):
  updates, opt_state = optimizer.update(
      grads, network.opt_state, network.params
  )
  # Weight decay would change constants, although their gradient is 0.
  updates = jax.tree_util.tree_map_with_path(
      lambda path, u: (
          jnp.zeros_like(u)
          if getattr(path[-1], "key", None) in embeddings.CONSTANTS else u
      ), updates,
  )
  params = optax.apply_updates(network.params, updates)
  if project is not None:
    params = project(params)
  return train_state.NetworkState(params, opt_state, network.num_updates + 1)


def _averages(
    method, options, state, networks, curriculum, phase
) -> dict[str, Any]:
  """Returns all averages, with those of the networks of the phase updated."""
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
  """Returns the updated EMAs of the sampled network."""
  averages = {}
  for rate in options.ema_rates:
    name = train_state.average_name(rate)
    if options.ema_warmup:
      rate = ema.warmed_rate(rate, sampled.num_updates)
    averages[name] = ema.update(old[name], sampled.params, rate)
  for std in options.ema_stds:
    name = train_state.phema_name(std)
    averages[name] = phema.update(
        old[name], sampled.params, std, sampled.num_updates, 1
    )
  for kimg in options.ema_halflife_kimg:
    name = train_state.halflife_name(kimg)
    # Times in steps. EDM ramps up by the images seen before the step.
    rate = phema.halflife_beta(
        sampled.num_updates - 1, 1, kimg * 1000 / options.batch_size,
        options.ema_rampup_ratio,
    )
    averages[name] = ema.update(old[name], sampled.params, rate)
  return averages
