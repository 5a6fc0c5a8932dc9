"""CTM on ImageNet 64x64, from a teacher in runs/edm.

  python -m bcm_jax.main --config=configs/imagenet64_ctm.py --workdir=runs/ctm
  python -m bcm_jax.main --config=configs/imagenet64_ctm.py:gan --workdir=DIR

Teacher: configs/imagenet64_edm.py. Published FID for 1 / 2 NFE with the
discriminator: 1.92 / 1.73 (Kim et al., 2024); not reproduced. Published
hardware: 8 A100. ':gan' continues from runs/ctm.

Deviations: those of cifar10_ctm.py; NVIDIA's ADM instead of OpenAI's EDM
weights; bfloat16 instead of float16.
"""

import ml_collections

VARIANTS = ("dsm", "gan")


def get_config(variant: str = "dsm") -> ml_collections.ConfigDict:
  """Returns the config of --config=configs/imagenet64_ctm.py:VARIANT."""
  config = ml_collections.ConfigDict()
  config.data = dict(
      name="prepared", path="data/imagenet64_edm", flip=True,
      image_shape=(64, 64, 3), num_classes=1000,
  )
  config.model = dict(
      name="dhariwal", num_classes=1000, dropout=0.0, dtype="bfloat16",
      float32_levels=0,
      two_time=True, end_branch="blocks",
  )
  config.method = dict(
      name="ctm", teacher="runs/edm", num_levels=40, max_solver_steps=39
  )
  config.optimizer = dict(name="radam", learning_rate=4e-4)
  config.training = dict(
      num_steps=50_000, batch_size=1440, ema_rates=(0.999, 0.9999, 0.9999432)
  )
  if variant == "gan":
    config.method.update(
        gan=True, max_solver_steps=20, gan_own_times=True,
        gan_max_solver_steps=39,
    )
    config.optimizer.learning_rate = 8e-6
    config.auxiliary_optimizer = dict(learning_rate=2e-3, b1=0.5, b2=0.9)
    config.training.update(
        num_steps=30_000, batch_size=4224, init_from="runs/ctm"
    )
  config.parallel = dict(microbatch_size_per_device=8)
  config.sample = dict(sampler="ancestral", nfe=2, num_samples=50_000)
  config.eval = dict(samplers=("onestep", "ancestral"), at_end=False)
  return config
