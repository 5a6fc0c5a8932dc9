"""Grids, laws of times, curricula, preconditioning, quantisation."""

import re

import jax.numpy as jnp
import numpy as np

from bcm_jax.data import image_source
from bcm_jax.diffusion import preconditioning as pre
from bcm_jax.diffusion import schedules
from bcm_jax.diffusion import solvers
from bcm_jax.methods import consistency
from bcm_jax.models import embeddings
from tests.parity import files
from tests.parity import report

# Names of the curricula here by theirs. What iCT and BCM call progressive is
# not what OpenAI's code does under that name.
_CURRICULA = {
    "ict_progressive": "doubling", "bcm_progressive": "doubling",
    "ict_v1": "sqrt", "bcm_v1": "sqrt", "ict_exponential": "linear",
    "bcm_exponential": "linear", "cm_progressive": "sqrt",
    "cm_fixed_progressive": "sqrt", "cm_adaptive_progressive": "sqrt",
}
# The tables of a training step are float32.
_TABLE = 3e-7


def grids(file, precision):
  """get_sigmas_karras: descending, with a zero at the end."""
  for name in file.outputs:
    n, low, high, rho = map(float, re.fullmatch(
        r"karras_n(.+)_min(.+)_max(.+)_rho(.+)", name
    ).groups())
    ours = schedules.karras_sigmas(int(n), low, high, rho)[::-1]
    ours = np.append(ours, 0.0).astype(
        np.float64 if precision == "exact" else precision
    )
    yield file.check(name, ours, precision)


def _relative(name, actual, expected, rel):
  return report.Check(name, actual, expected, rel * np.abs(expected))


def laws(file, precision):
  """Probabilities of (t, r) and of t3, and the levels of indices."""
  del precision
  names = {"p_mean": "P_mean", "p_std": "P_std"} | {
      k: k for k in ("sigma_min", "sigma_max", "rho")
  }
  options = {k: file.meta[v] for k, v in names.items() if v in file.meta}
  law = {k: options.pop(k) for k in ("p_mean", "p_std") if k in options}
  for name in file.outputs:
    family, what, count = name.split("_")
    n = int(count.removeprefix("N"))
    grid = schedules.karras_sigmas(n, **options)
    mass = schedules.lognormal_bins(grid, **law)
    tables = schedules.grid_tables(
        n, n, **options, **law, include_T=family != "bcm"
    )
    expected = file[f"out/{name}"].astype(np.float64)
    index = file[f"in/idx_{family}_{count}"]
    if what == "t":
      levels = np.stack([grid[index + 1], grid[index]])
      yield _relative(name, levels, expected, files.ROUNDED)
      continue
    if what == "P3":
      ours = np.where(np.arange(n - 1) == index[:, None] + 1, 0, mass)
      drawn = np.diff(tables.end_cdf.astype(np.float64), prepend=0)[:n - 1]
      drawn = np.where(np.arange(n - 1) == index[:, None] + 1, 0, drawn)
      drawn /= drawn.sum(-1, keepdims=True)
    else:
      ours = np.append(mass[:-1], 0) if family == "bcm" else mass
      drawn = np.diff(tables.cdf.astype(np.float64))[:n - 1]
    ours = ours / ours.sum(-1, keepdims=True)
    yield _relative(name, ours, expected, files.EXACT)
    yield report.Check(f"table of {name}", drawn, expected, _TABLE)


def curricula(file, precision):
  """N by step, exactly."""
  del precision
  for name in file.outputs:
    theirs, total, s0, s1 = re.fullmatch(
        r"(\w+)_T(\d+)_s(\d+)_e(\d+)", name
    ).groups()
    if theirs not in _CURRICULA:
      yield report.Missing(name, f"no known curriculum is {theirs!r}")
      continue
    n = schedules.CURRICULA[_CURRICULA[theirs]]
    steps = file[f"in/steps_T{total}_s{s0}_e{s1}"].tolist()
    ours = np.array([n(k, int(total), int(s0), int(s1)) for k in steps])
    yield report.Check(name, ours, file[f"out/{name}"].astype(np.float64), 0)


def _weight(name, sigma, sigma_data):
  method = consistency.ConsistencyTraining(
      None, None, sigma_data=sigma_data, weighting=name
  )
  return method.weight(sigma, sigma)


def coefficients(file, precision):
  """Coefficients of preconditionings, weights, embeddings, ancestral steps."""
  sd, low = file.setting("sigma_data", 0.5), file.setting("sigma_min", 0.002)
  sigma, end = (
      jnp.asarray(file[f"in/{k}"], precision) for k in ("sigma", "sigma_end")
  )
  forms = {
      "edm": pre.EDM(sd), "cm": pre.ConsistencyBoundary(sd, low),
      "bcm": pre.Bidirectional(sd),
  }
  ancestral = getattr(solvers, "ancestral_levels", None)
  for name in file.outputs:
    head, _, rest = name.partition("_")
    if rest in pre.Coefficients._fields:
      value = getattr(forms[head](sigma, end), rest)
    elif name == "rescaled_t":
      value = pre.adm_c_noise(sigma)
    elif head == "weight" or name == "edm_loss_weight":
      weighting = rest if head == "weight" else "edm"
      try:
        value = _weight(weighting, sigma, sd)
      except KeyError:
        reason = f"methods.consistency has no weighting {weighting!r}"
        yield report.Missing(name, reason)
        continue
    elif head == "ancestral":
      if ancestral is None:
        reason = "diffusion.solvers has no ancestral step (ancestral_levels)"
        yield report.Missing(name, reason)
        continue
      down, up = ancestral(jnp.maximum(sigma, end), jnp.minimum(sigma, end))
      value = {"down": down, "up": up}[rest]
    elif name.startswith("temb"):
      value = embeddings.sinusoidal_embedding(
          pre.adm_c_noise(sigma), int(name.removeprefix("temb"))
      )
    else:
      continue
    yield file.check(name, value, precision)


def uint8(file, precision):
  """Quantisation of images, exactly."""
  del precision
  yield report.Check(
      "uint8", image_source.to_uint8(file["in/v"]),
      file["out/uint8"].astype(np.float64), 0,
  )


RUNNERS = [
    (lambda f: f.has("karras_n"), grids),
    (lambda f: f.has("ict_P_N", "bcm_P_N"), laws),
    (lambda f: any(k.startswith("in/steps_T") for k in f.arrays), curricula),
    (lambda f: f.has("edm_c_", "cm_c_", "bcm_c_", "weight_"), coefficients),
    (lambda f: f.has("uint8") and "in/v" in f, uint8),
]
