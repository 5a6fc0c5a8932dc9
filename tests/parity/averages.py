"""EDM2's power-function averages and learning rate."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from bcm_jax.training import ema
from bcm_jax.training import phema as power_ema
from tests.parity import files
from tests.parity import report

# The systems of the coefficients are ill conditioned.
_COEFFICIENTS = 1e-6


def _tracks(file, stds):
  """(power-function averages, ordinary ones) after every update."""
  batch = file.setting("batch", 256)
  halflife = 1e6 * file.setting("halflife_Mimg", 0.005)
  rampup = file.setting("rampup", 0.09)

  @jax.jit
  def step(powers, plain, value, images):
    powers = [
        power_ema.update(p, value, std, images, batch)
        for p, std in zip(powers, stds, strict=True)
    ]
    rate = power_ema.halflife_beta(images, batch, halflife, rampup)
    return powers, ema.update(plain, value, rate)

  seq = file["out/seq"]
  plain = jnp.zeros(seq.shape[1])
  powers, power_track, plain_track = [plain] * len(stds), [], []
  for k, value in enumerate(seq, 1):
    powers, plain = step(powers, plain, value, k * batch)
    power_track.append(np.stack(powers))
    plain_track.append(plain)
  return np.stack(power_track), np.stack(plain_track)


def _rates(file):
  """Learning rates at 'nimg 0,1e5,...' images of 'schedule(nimg,batch)'."""
  batch = int(re.search(r"schedule\(nimg, ?(\d+)\)", file.notes)[1])
  listed = re.search(r"for nimg ([-+.,e\d]+)", file.notes)[1]
  images = jnp.asarray(files.numbers(listed)[:len(file["out/lr"])])
  return power_ema.learning_rate(images, batch)


def phema(file, precision):
  """Exponents, betas, correlations, coefficients, tracks: all in float64."""
  del precision
  stds = file.meta["stds"]
  known = {k: file[f"out/{k}"] for k in (
      "in_ofs", "in_std", "out_ofs", "out_std", "beta_t_next", "beta_t_delta",
      "seq",
  ) if f"out/{k}" in file}  # Inputs, though among the outputs.
  stored = known["in_ofs"], known["in_std"]
  power, plain = _tracks(file, file.meta["instd"])
  time = int(file.setting("ofs", 50))
  outputs = known | {
      "std_to_exp": power_ema.std_to_exp(stds),
      "exp_to_std": power_ema.exp_to_std(file["out/std_to_exp"]),
      "beta": np.stack([
          power_ema.beta(s, known["beta_t_next"], known["beta_t_delta"])
          for s in stds
      ]),
      "coefficients": power_ema.solve_posthoc_coefficients(
          *stored, known["out_ofs"], known["out_std"]
      ),
      "correlation": power_ema.correlation(*stored, *stored),
      "response": np.stack([
          power_ema.response(time, s, file["out/response"].shape[1])
          for s in stds
      ]),
      "ema_track": power,
      "traditional_track": plain,
      "lr": _rates(file),
  }
  for name in file.outputs:
    if name in outputs:
      rel = _COEFFICIENTS if name == "coefficients" else files.EXACT
      yield report.Check(
          name, outputs[name], file[f"out/{name}"],
          rel * np.abs(file[f"out/{name}"]).max(),
      )


RUNNERS = [(lambda f: f.source.endswith("NVlabs/edm2") and f.has("beta"),
            phema)]
