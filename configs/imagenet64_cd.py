"""Consistency distillation on ImageNet 64x64, from a teacher in runs/edm.

  python -m bcm_jax.main --config=configs/imagenet64_cd.py --workdir=DIR

Teacher: configs/imagenet64_edm.py. Published FID for 1 / 2 NFE with LPIPS:
6.20 / 4.70 (Song et al., 2023); not reproduced.

Deviations: a distance of teacher features (published: method.metric=lpips);
NVIDIA's ADM instead of OpenAI's, the same function with another c_noise;
bfloat16 instead of float16.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """Returns the config; override values with --config.section.key=value."""
  config = ml_collections.ConfigDict()
  config.data = dict(
      name="prepared", path="data/imagenet64_edm", flip=True,
      image_shape=(64, 64, 3), num_classes=1000,
  )
  config.model = dict(
      name="dhariwal", num_classes=1000, dropout=0.0, dtype="bfloat16",
      float32_levels=0,
  )
  config.method = dict(
      name="cd", teacher="runs/edm", s0=39, s1=39, target_mu0=0.95
  )
  config.optimizer = dict(name="radam", learning_rate=8e-6)
  config.training = dict(
      num_steps=600_000, batch_size=2048,
      ema_rates=(0.9999, 0.999, 0.9999432),
  )
  config.parallel = dict(microbatch_size_per_device=16)
  config.sample = dict(
      sampler="cm_multistep", times=(1.38,), num_samples=50_000
  )
  config.eval = dict(samplers=("onestep", "cm_multistep"), at_end=False)
  return config
