"""A few training steps of a toy on any devices, and all that is drawn in them.

`python -m tests.training.topologies FILE NAME` writes what a topology gives to
an .npz file, for those that need other devices than the tests have.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bcm_jax.diffusion import preconditioning
from bcm_jax.diffusion import process
from bcm_jax.methods import ctm as trajectory
from bcm_jax.training import rng
from bcm_jax.training import sharding
from bcm_jax.training import train_state
from bcm_jax.training import train_step
from tests import toys

B = 16
STEPS = 3
RULES = {
    "jit": (),
    "fsdp": ("fsdp",),
    # One tensor along its first axis, all other kernels along their last; what
    # fits no rule, and two dimensions of three, is everywhere.
    "pattern": ("out/kernel=fsdp -", "kernel$=- fsdp", "bias=replicate",
                "nothing=- - fsdp", ".=replicate"),
}


def method():
  return toys.bidirectional_toy(
      toys.MLP(width=8, depth=1, dropout=0.3, num_classes=3)
  )


def batch(step=0):
  return {
      "image": toys.images(B, seed=step),
      "label": np.arange(B, dtype=np.int32) % 3,
      "index": np.arange(B, dtype=np.int32),
  }


def runner(topology):
  """The backend of 'jit-4', 'pmap-4', or, as data x fsdp, of 'fsdp-2x2'."""
  kind, sizes = topology.split("-")
  data, _, fsdp = sizes.partition("x")
  n = int(data) * int(fsdp or 1)
  devices = jax.devices()[:n]
  assert len(devices) == n
  if kind == "pmap":
    return sharding.Pmap(tuple(devices))
  mesh = sharding.make_mesh(devices, int(fsdp or 1))
  return sharding.Jit(mesh, sharding.parse_rules(RULES[kind]))


def optimizers():
  return {"student": optax.radam(1e-2)}


@functools.cache
def compiled(topology, microbatches=1, several=False):
  devices = runner(topology)
  options = train_step.StepOptions(
      ema_rates=(0.9,), microbatches=microbatches,
      axis_name=devices.axis_name,
  )
  step = train_step.make_step(method(), optimizers(), options)
  return devices, devices.compile(step, several)


def create():
  one = batch()
  return train_state.create(
      method(), optimizers(), (0.9,), 0, one["image"], one["label"]
  )


@functools.cache
def first_state():
  """The state before the first step, on the host."""
  return jax.tree.map(np.asarray, jax.jit(create)())


class Ramp:
  """The toy's curriculum, ten times as fast."""

  def curriculum(self, step):
    return method().curriculum(10 * step)


def inputs(devices, *at):
  """Batches and curricula of steps, on the devices."""
  return devices.batch(*map(batch, at)), devices.replicate(
      sharding.curricula(Ramp(), at[0], len(at))
  )


def train(topology, microbatches=1, at_once=False):
  """(state, metrics of each step) on the host after a few steps."""
  devices, step = compiled(topology, microbatches, at_once)
  state, rows = devices.place(first_state()), []
  if at_once:
    state, metrics = step(
        state, *inputs(devices, *range(STEPS)), ("student",)
    )
  else:
    for k in range(STEPS):
      state, row = step(state, *inputs(devices, k), ("student",))
      rows.append(jax.tree.map(np.asarray, devices.fetch(row)))
    metrics = None
  state = jax.tree.map(np.asarray, devices.fetch(state))
  if metrics is not None:
    return state, jax.tree.map(np.asarray, devices.fetch(metrics))
  return state, jax.tree.map(lambda *x: np.stack(x), *rows)


@functools.cache
def weighed(topology):
  """CTM's parameters after two rounds, and the weights of its terms in each.

  Its discriminator has its turns, too.
  """
  ctm = trajectory.TrajectoryDistillation(
      network=toys.GaussianFlow(), c_noise=preconditioning.adm_c_noise,
      teacher=toys.gaussian_teacher()[0], metric="l2", gan=True,
      gan_features=4, gan_sigma_max=1.0,
  )
  optimizer = {name: optax.sgd(1e-2) for name in ctm.networks}
  devices = runner(topology)
  step = devices.compile(train_step.make_step(
      ctm, optimizer,
      train_step.StepOptions(ema_rates=(), axis_name=devices.axis_name),
  ))
  images = toys.images(B, 4)
  state = jax.jit(
      lambda: train_state.create(ctm, optimizer, (), 0, images, None)
  )()
  # Away from the optimum, where there is nothing to weigh.
  state.networks["student"].params["scale"] = jnp.float32(0.7)
  state = devices.place(state.replace(
      frozen={"teacher": {"scale": jnp.zeros(())}}
  ))
  rows = []
  for k in range(4):
    data = devices.batch({"image": images, "index": batch()["index"]})
    state, row = step(
        state, data, devices.replicate(ctm.curriculum(k)), ctm.phase(k)
    )
    row = devices.fetch(row)
    rows += [np.asarray(v) for n, v in sorted(row.items()) if "weight" in n]
  params = {n: p.params for n, p in devices.fetch(state).networks.items()}
  return jax.tree.map(np.asarray, params), np.stack(rows)


def draw(index):
  """All that is random in a step: times, ends, noise, dropout masks."""
  m = method()
  ctx = toys.context(
      jnp.zeros((len(index), 2, 2, 1)), m.curriculum(10), index=index, step=4
  )
  times = m.sample_times(ctx)
  z = process.normal_like(ctx.keys("noise"), ctx.images)
  keys = jax.random.key_data(
      rng.example_keys(0, "dropout", jnp.int32(4), index)
  )
  return times.t, times.r, m.sample_end(ctx, times.index), z, keys


@functools.cache
def drawn(topology):
  devices = runner(topology)
  index = devices.batch({"index": batch()["index"]})["index"]
  if "pmap" in topology:
    out = jax.pmap(draw, devices=devices.local_devices)(index)
    return [np.asarray(x).reshape(B, *x.shape[2:]) for x in out]
  return [np.asarray(x) for x in jax.jit(draw)(index)]


def flat(topology):
  """Draws, then states and metrics of a topology, as one list of arrays."""
  return drawn(topology) + jax.tree.leaves(
      (train(topology), weighed(topology))
  )


if __name__ == "__main__":
  np.savez(sys.argv[1], *flat(sys.argv[2]))
