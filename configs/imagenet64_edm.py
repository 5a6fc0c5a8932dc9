"""EDM on ImageNet 64x64, the teacher of the distillations.

  python -m bcm_jax.data.prepare tfds:imagenet2012 data/imagenet64_edm \
      --size=64 --crop=edm
  python -m bcm_jax.main --config=configs/imagenet64_edm.py --workdir=runs/edm

or convert NVIDIA's weights, which the students also accept as a teacher:

  python -m bcm_jax.interop.convert edm-imagenet-64x64-cond-adm.pkl runs/edm

Published FID (Karras et al., 2022): 2.22 with 79 NFE, 1.36 with 511 NFE and
churn (--config.sample.num_levels=256 --config.sample.s_churn=40
--config.sample.s_tmin=0.05 --config.sample.s_tmax=50
--config.sample.s_noise=1.003); not reproduced. Published hardware: 32 A100, 13
days.

Deviations: bfloat16 instead of float16; steps with non-finite gradients are
skipped.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """Returns the config; override values with --config.section.key=value."""
  batch = 4096
  config = ml_collections.ConfigDict()
  config.data = dict(
      name="prepared", path="data/imagenet64_edm", image_shape=(64, 64, 3),
      num_classes=1000,
  )
  config.model = dict(
      name="dhariwal", num_classes=1000, dtype="bfloat16", float32_levels=0
  )
  config.method = dict(name="edm")
  config.optimizer = dict(
      name="adam", learning_rate=1e-4, warmup_steps=10_000_000 // batch
  )
  config.training = dict(
      num_steps=2_500_000_000 // batch, batch_size=batch,
      ema_rates=(), ema_halflife_kimg=(50_000,), ema_rampup_ratio=0.05,
  )
  config.parallel = dict(microbatch_size_per_device=16)
  config.sample = dict(sampler="heun", num_levels=40, num_samples=50_000)
  config.eval = dict(samplers=("heun",), at_end=False)
  return config
