"""CTM's losses at recorded levels, without a teacher, and their gradients."""

import jax
import jax.numpy as jnp

from bcm_jax.diffusion import process
from bcm_jax.methods import ctm as trajectory
from tests import toys
from tests.parity import files
from tests.parity import weights

# Names of the recorded target networks -> ours.
_INNER = {"model_sg": "online", "target_model_sg": "average", "no": "none"}
_ITERATIVE = "self_learn_iterative"


class Recorded(trajectory.TrajectoryDistillation):
  """At recorded levels, with recorded noise.

  `recorded` holds times, dsm_sigma, noise and dsm_noise; `jumps` in how many
  jumps theta- goes from t to u.
  """

  recorded = None
  jumps = 1

  def sample_times(self, ctx, gan=False):
    return self.recorded["times"]

  def dsm_levels(self, ctx):
    return self.recorded["dsm_sigma"]

  def sample_x_t(self, ctx, t, stream="noise"):
    return process.add_noise(
        ctx.images, t, self.recorded[stream.replace("/", "_")]
    )

  def solve(self, ctx, x_t, times):
    count = int(times.solver_steps)
    if self.jumps == 1:
      return super().solve(ctx, x_t, times)
    for k in range(count):
      step = times._replace(
          t=self.grid[times.index + k], u=self.grid[times.index + k + 1]
      )
      x_t = super().solve(ctx, x_t, step)
    return x_t


# What the released code can do besides, and its value here.
_ONLY = {
    "target_subtract": False, "rescaling": False, "time_continuous": False,
    "target_matching": False, "ctm_target_matching": False,
    "weight_schedule": "uniform", "diffusion_weight_schedule": "karras_weight",
    "ctm_estimate_inner_type": "model",
    "ctm_estimate_outer_type": "target_model_sg",
}


def method(file: files.Reference, cls, model, **options):
  """A method with the parametrizations and levels of a file.

  Raises:
    ValueError: for options of the released code that have no match here.
  """
  args = file.meta["ctm_args"]
  other = {k: args[k] for k, v in _ONLY.items() if args.get(k, v) != v}
  if args.get("training_mode", "ctm") != "ctm":
    other["training_mode"] = args["training_mode"]
  if other:
    raise ValueError(f"ctm_args: no match for {other}")
  inner = args["inner_parametrization"].lower()
  return cls(
      model.compiled, model.noise, teacher=None,
      sigma_data=file.setting("sigma_data", 0.5),
      sigma_min=file.setting("sigma_min", 0.002),
      sigma_max=file.setting("sigma_max", 80.0), rho=file.setting("rho", 7.0),
      inner_preconditioning={"no": "none"}.get(inner, inner),
      outer_skip=args["outer_parametrization"].lower(), **options,
  )


def ctm(file: files.Reference, precision: str):
  """Estimates, targets, both terms and gradients of their sum."""
  model = weights.model(file)
  params = model.weights(precision)
  target = weights.model(file, "target_recipe").weights(precision)
  images, noise, dsm_noise = (
      jnp.asarray(file.image(f"in/{k}"), precision)
      for k in ("x_start", "noise", "dsm_noise")
  )
  ctx = toys.context(
      images, {"gan": jnp.zeros(())}, model.labels(file), {"target": target}
  )
  steps = file.meta["num_heun_step"]

  def make(inner, jumps=1):
    cls = type("Bound", (Recorded,), {"jumps": jumps})
    made = method(
        file, cls, model, metric="l2", target_inner=inner, adaptive=False,
        num_levels=int(file.meta["ctm_args"]["start_scales"]),
    )
    i = jnp.asarray(file["in/t_idx"])
    grid = made.grid.astype(precision)
    cls.recorded = {
        "times": trajectory.Times(
            grid[i], grid[i + steps], grid[jnp.asarray(file["in/s_idx"])], i,
            jnp.asarray(steps),
        ),
        "dsm_sigma": jnp.asarray(file["in/dsm_sigma"], precision),
        "noise": noise, "dsm_noise": dsm_noise,
    }
    return made

  modes = {f"self_learn_{k}": (v, 1) for k, v in _INNER.items()}
  modes[f"{_ITERATIVE}_model_sg"] = ("online", steps)
  for mode, (inner, jumps) in modes.items():
    if f"{mode}_dsm" not in file.outputs:
      continue
    made = make(inner, jumps)
    times = made.sample_times(ctx)
    x_t = made.sample_x_t(ctx, times.t)
    values = {
        "estimate": made.estimate(params, ctx, x_t, times),
        "target": made.target(params, ctx, x_t, times),
    }
    _, parts = made.student_loss(params, ctx)
    values |= {"consistency": parts["loss_ctm"], "dsm": parts["loss_dsm"]}
    for name, value in values.items():
      # Levels of L_DSM are in the file in float32 alone.
      rel = files.ROUNDED if name == "dsm" else files.EXACT
      if f"{mode}_{name}" in file.outputs:
        yield file.check(f"{mode}_{name}", value, precision, rel)
  if precision == "float64" and file.has("grad/"):
    online = make("online")
    grad = jax.grad(
        lambda p: jnp.mean(online.student_loss(p, ctx)[0])
    )(params)
    yield from file.tensors("grad", model.named(grad), precision)


RUNNERS = [
    (lambda f: f.source.endswith("sony/ctm") and "in/t_idx" in f, ctm),
]
