"""Samplers with recorded noise: plans of jumps, and solvers of the ODE."""

from collections.abc import Callable
import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from bcm_jax.diffusion import preconditioning as pre
from bcm_jax.diffusion import process
from bcm_jax.diffusion import schedules
from bcm_jax.diffusion import solvers
from bcm_jax.sampling import guidance
from bcm_jax.sampling import samplers
from bcm_jax.sampling import sampling_plan
from tests.parity import karras_solvers
from tests.parity import report
from tests.parity import weights

# Names of the solvers here by theirs.
_SOLVERS = {"dpm": "dpm2"}


@dataclasses.dataclass(frozen=True)
class Start:
  """What the samplers of a file share.

  Attributes:
    flow_map: f(x, t, u, labels) of levels [B].
    labels: [B] or None.
    levels: noise levels of the network.
    precision: of everything.
  """

  flow_map: Callable
  labels: jax.Array | None
  levels: sampling_plan.NoiseRange
  precision: str

  def run(self, plan, x, noises, clip=np.inf):
    """Runs a plan; its noise is taken from a list."""
    noises = [jnp.asarray(z, self.precision) for z in noises]
    keys = jax.random.split(jax.random.key(0), len(x))

    def flow_map(*args):
      return jnp.clip(self.flow_map(*args), -clip, clip)

    with mock.patch.object(
        process, "normal_like", lambda *_: noises.pop(0)
    ):
      return samplers.run(plan, flow_map, x, self.labels, keys)

  def solve(self, x, sigmas, solver, churn, noises, clip=np.inf):
    """Solves the ODE with the denoiser that jumps to the lowest level."""

    def denoiser(x, t):
      batch = jnp.ones(len(x), x.dtype)
      out = self.flow_map(
          x, t * batch, self.levels.sigma_min * batch, self.labels
      )
      return jnp.clip(out, -clip, clip)

    # Step by step, so that the network is compiled once and not in each loop.
    with jax.disable_jit():
      return karras_solvers.solve(
          denoiser, x, sigmas, solver, churn,
          lambda i: jnp.asarray(noises[int(i)], x.dtype),
      )


def _shortened(plan: sampling_plan.Plan, count: int) -> sampling_plan.Plan:
  return dataclasses.replace(plan, steps=plan.steps[:count])


def _sequence(numbers, levels: sampling_plan.NoiseRange) -> sampling_plan.Plan:
  """(top, mid ..., bottom, [added noise, amplified to, bottom] ...)."""
  end = numbers.index(levels.sigma_min)
  rest = numbers[end + 1:]
  pairs = [tuple(rest[i:i + 2]) for i in range(0, len(rest), 3)]
  return sampling_plan.mixture(numbers[1:end], pairs, levels)


def _jumps(file, start: Start):
  """BCM's own samplers and inversions, (name, result)."""
  p, z = file.meta["params"], file.image("in/z1")
  top = jnp.asarray(
      start.levels.sigma_max * file.image("in/zT"), start.precision
  )
  generation = {
      "one": "bcm_1step", "two": "bcm_2step", "zig": "bcm_3step",
      "mix": "bcm_4step",
  }
  for key, name in generation.items():
    if key not in p:
      continue
    plan = _sequence(p[key], start.levels)
    count = len(plan.steps)
    for suffix, steps in (
        ("", count), ("_mid", 1), ("_amplified", count - 1)
    ):
      if file.has(name + suffix):
        noises = [z] * count  # One recorded noise for every injection.
        yield name + suffix, start.run(_shortened(plan, steps), top, noises)
  for key in (k for k in p if k.startswith("inv")):
    noise, *mid, high, low = p[key]
    levels = sampling_plan.NoiseRange(low, high)
    there = sampling_plan.inversion(noise, mid, levels)
    image = jnp.asarray(file.image("in/img"), start.precision)
    latent = start.run(there, image, [z])
    yield f"{key}_latent", latent
    onestep = sampling_plan.ancestral((), levels)
    yield f"{key}_recon", start.run(onestep, latent, [])


def _multistep(file, start: Start, clip: bool) -> sampling_plan.Plan:
  """stochastic_iterative_sampler's plan: at recorded indices of a grid."""
  steps = int(file.setting("steps", 40))
  low, high = start.levels.sigma_min, start.levels.sigma_max
  rho = file.meta["params"].get("rho", 7.0)
  # Their arithmetic: at the lowest level what is left of it is a scale of
  # noise, of 1e-10 or so.
  ends = [high ** (1 / rho), low ** (1 / rho)]
  times = [
    min(
      max((ends[0] + i / (steps - 1) * (ends[1] - ends[0])) ** rho, low), high
    )
    for i in file.meta["params"]["ts"]
  ]
  plan = sampling_plan.cm_multistep(
    times[1:-1], sampling_plan.NoiseRange(low, times[0]), clip=clip
  )
  scale = float(np.sqrt(times[-1] ** 2 - low**2))
  added = sampling_plan.AddNoise(scale, times[-1])
  return dataclasses.replace(plan, steps=(*plan.steps, added))


def _karras(file, start: Start, name: str):
  """One output of karras_sample; a string says what is lacking."""
  _, sampler, *options = name.split("_")
  clip = np.inf if "noclip" in options else 1.0
  p, zs = file.meta["params"], file.image("in/zs")
  top = jnp.asarray(
    start.levels.sigma_max * file.image("in/zT"), start.precision
  )
  if sampler == "onestep":
    out = start.run(sampling_plan.ancestral((), start.levels), top, [], clip)
  elif sampler == "multistep":
    plan = _multistep(file, start, clip="noclip" not in options)
    out = start.run(plan, top, list(zs))
  else:
    solver = _SOLVERS.get(sampler, sampler)
    if solver not in karras_solvers.NAMES:
      return f"there is no solver {sampler!r}"
    grid = schedules.karras_sigmas(
      int(p.get(sampler) or p["anc"]),
      start.levels.sigma_min,
      start.levels.sigma_max,
      p.get("rho", 7.0),
    )[::-1]
    churn = solvers.Churn()
    if "churn" in options:
      churn = solvers.Churn(**file.meta[f"{sampler}_churn"])
    out = start.solve(top, np.append(grid, 0.0), solver, churn, zs, clip)
  return jnp.clip(out, -1, 1)


def bcm(file, precision):
  """BCM's samplers and inversions, and karras_sample on its network."""
  model = weights.model(file)
  params = model.weights(precision)
  form = pre.Bidirectional(file.setting("sigma_data", 0.5))

  def flow_map(x, t, u, labels):
    return model.map(params, form, x, t, u, labels)

  top, *_, low = file.meta["params"].get("one", (80.0, 0.002))
  start = Start(
    flow_map, model.labels(file), sampling_plan.NoiseRange(low, top), precision
  )
  for name, value in _jumps(file, start):
    yield file.check(name, value, precision)
  for name in file.outputs:
    if name.startswith("ks_"):
      value = _karras(file, start, name)
      if isinstance(value, str):
        yield report.Missing(name, value)
      else:
        yield file.check(name, value, precision)


def edm(file, precision):
  """EDM's edm_sampler: Heun's method with churn."""
  model = weights.model(file)
  params = model.weights(precision)
  form = pre.EDM(file.setting("sigma_data", 0.5))

  def denoise(x, t, u, labels):
    return model.map(params, form, x, t, u, labels)

  # EDM's denoiser knows no lower end.
  start = Start(
    denoise, model.labels(file), sampling_plan.NoiseRange(0.0), precision
  )
  for name in file.outputs:
    options = file.settings(name)
    options |= file.meta.get(name.removeprefix("edm_heun_"), {})
    low, high, rho = (
      options.pop(k, v)
      for k, v in (("sigma_min", 0.002), ("sigma_max", 80.0), ("rho", 7.0))
    )
    steps = int(options.pop("num_steps", file.meta["num_steps"]))
    churn = solvers.Churn(
      **{
        {"s_min": "s_tmin", "s_max": "s_tmax"}.get(k.lower(), k.lower()): float(
          v
        )
        for k, v in options.items()
      }
    )
    low = max(low, float(file.constructor.get("sigma_min", 0)))
    high = min(high, float(file.constructor.get("sigma_max", "inf")))
    sigmas = schedules.karras_sigmas(steps, low, high, rho)[::-1]
    x = jnp.asarray(high * file.image("in/latents"), precision)
    out = start.solve(
      x, np.append(sigmas, 0.0), "heun", churn, file.image("in/zs")
    )
    yield file.check(name, out, precision)


def autoguidance(file, precision):
  """EDM2's edm_sampler: Heun's method guided by a second network."""

  def load(part):
    model = weights.model(file, part=part)
    params = model.weights(precision)
    form = pre.EDM(file.meta[f"constructor_{part}"].get("sigma_data", 0.5))

    def denoise(x, t, u, labels):
      labels = None if model.network.num_classes is None else labels
      return model.map(params, form, x, t, u, labels)

    return model, denoise

  (main_model, main), (_, guide) = load("main"), load("guide")
  labels = main_model.labels(file)
  xs = jnp.asarray(file.image("in/xs"), precision)
  sigma = jnp.asarray(file["in/sigma"], precision)
  for name, denoise in (("main_D", main), ("guide_D", guide)):
    if name in file.outputs:
      value = denoise(xs, sigma, 0 * sigma, labels)
      yield file.check(name, value, precision)
  for run, given in file.meta["runs"].items():
    options = {k.lower(): v for k, v in given.items()}
    count, low, high, rho, weight = (
      options.pop(k, v)
      for k, v in (
        ("num_steps", 32), ("sigma_min", 0.002), ("sigma_max", 80.0),
        ("rho", 7.0), ("guidance", 1.0),
      )
    )
    churn = solvers.Churn(
      **{
        {"s_min": "s_tmin", "s_max": "s_tmax"}.get(k, k): float(v)
        for k, v in options.items()
      }
    )
    other = guidance.without_class(main) if "null" in run else guide
    guided = main if weight == 1 else guidance.guided(main, other, weight)
    start = Start(guided, labels, sampling_plan.NoiseRange(0.0), precision)
    sigmas = schedules.karras_sigmas(count, low, high, rho)[::-1]
    # A draw is recorded for a step that adds noise, and for no other.
    adds = (churn.s_churn > 0) & (sigmas >= churn.s_tmin) & (
      sigmas <= churn.s_tmax
    )
    drawn = file.image("in/churn")
    noises = [drawn[sum(adds[:i])] for i in range(count)]
    x = jnp.asarray(sigmas[0] * file.image("in/noise"), precision)
    out = start.solve(x, np.append(sigmas, 0.0), "heun", churn, noises)
    yield file.check(f"sample_{run}", out, precision)


RUNNERS = [
  (lambda f: f.source.endswith("NVlabs/edm2") and "runs" in f.meta,
   autoguidance),
  (lambda f: "in/zT" in f and "params" in f.meta, bcm),
  (lambda f: "in/latents" in f and f.source.endswith("NVlabs/edm"), edm),
]
