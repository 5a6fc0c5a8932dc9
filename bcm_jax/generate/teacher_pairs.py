"""Mode pairs: generates (noise, teacher sample) pairs for DMD's regression.

  python -m bcm_jax.main --workdir=runs/edm --mode=pairs \\
      --config.sample.num_samples=10000

writes runs/edm/pairs.npz, the file for --config.data.pairs. Config section
sample sets sampler, guidance, number of pairs and seed; all classes have the
same number of pairs. Source: DMD (Yin et al., 2024), section 4.1.
"""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np

from bcm_jax import errors
from bcm_jax.checkpoint import runs
from bcm_jax.config import build
from bcm_jax.data import image_source
from bcm_jax.generate import batched_sampler
from bcm_jax.generate import planning
from bcm_jax.sampling import sampling_plan
from bcm_jax.training import rng
from bcm_jax.utils import files
from bcm_jax.utils import provenance


def run(experiment: build.Experiment, workdir: str) -> str:
  """Generates the pairs of a run.

  Args:
    experiment: experiment of the teacher.
    workdir: work directory of the teacher.

  Returns:
    Path of pairs.npz: 'noise' [n, H, W, C] float16 of standard deviation 1,
    'image' [n, H, W, C] uint8, 'label' [n] int32, 'facts' JSON.

  Raises:
    UserError: the sampler is not a deterministic solver of a denoiser, or the
      run has no good checkpoint.
  """
  section = experiment.sample
  plan = planning.plan_of(experiment)
  if not experiment.method.is_denoiser or any(
      isinstance(step, sampling_plan.AddNoise) for step in plan.steps
  ):
    raise errors.UserError(
        f"sample.sampler: got {section.sampler!r} with "
        f"sample.s_churn={section.s_churn}, expected a deterministic solver "
        "(mode pairs) of a denoiser; set sample.sampler=heun and "
        "sample.s_churn=0"
    )
  labels = planning.requested_labels(experiment, section)
  step, average, params = runs.load_run(experiment, workdir)
  runner = batched_sampler.BatchedSampler(
    experiment, params, section.batch_size
  )
  print(plan)

  def rows(index):
    noise = _noise(experiment, section.seed, index)
    start = noise.astype(np.float32) * np.float32(plan.start)
    row_labels = None if labels is None else labels[index]
    images = runner(plan, start, row_labels, _keys(section.seed, index))
    # The floor would make all targets half a gray level darker.
    return noise, image_source.to_uint8(images, "nearest")

  noise, images = batched_sampler.on_all_hosts(section.num_samples, rows)
  path = os.path.join(workdir, "pairs.npz")
  facts = provenance.facts(experiment.config) | {
    "step": step,
    "average": average,
    "plan": str(plan).splitlines(),
  }
  if labels is None:
    labels = np.zeros(len(images), np.int32)
  if jax.process_index() == 0:
    files.write_npz(
      path, noise=noise, image=images, label=labels, facts=json.dumps(facts)
    )
  print(f"written: {path}, {len(images)} pairs")
  return path


def _keys(seed: int, index: np.ndarray) -> jax.Array:
  return rng.example_keys(seed, "pairs", 0, jnp.asarray(index))


def _noise(experiment, seed: int, index: np.ndarray) -> np.ndarray:
  """Returns the noise [n, H, W, C] of the images at `index` [n].

  Rounded to float16, as stored, before the teacher uses it.
  """
  draw = jax.vmap(lambda k: jax.random.normal(k, experiment.image_shape))
  return np.asarray(draw(_keys(seed, index)), np.float16)
