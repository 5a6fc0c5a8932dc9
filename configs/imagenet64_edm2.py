"""EDM2 on ImageNet 64x64, a diffusion model with magnitude-preserving layers.

  python -m bcm_jax.data.prepare tfds:imagenet2012 data/imagenet64 --size=64
  python -m bcm_jax.main --config=configs/imagenet64_edm2.py:SIZE --workdir=DIR

or convert NVIDIA's weights (bcm_jax.interop.convert). The dataset has ADM's
crop and differs from that of configs/imagenet64_edm.py.

Published FID for 63 NFE and sigma_rel of its average (Karras et al., 2024); not
reproduced.
  xs              weaker guide of autoguidance, no published FID
  s (default)     1.58   0.075
  m               1.43   0.060
  l               1.33   0.040
  xl              1.33   0.040

Checkpoints are kept every 32 Mi images, from which sample.average=posthoc_STD
computes an average of any sigma_rel. Deviations: bfloat16 instead of float16;
steps with non-finite gradients are skipped.
"""

import ml_collections

_MEBI = 2**20
_BATCH = 2048
# Size -> (base width, Mi images, learning rate, dropout, sigma_rel).
VARIANTS = {
    "xs": (128, 1024, 0.0120, 0.0, 0.075),
    "s": (192, 1024, 0.0100, 0.0, 0.075),
    "m": (256, 2048, 0.0090, 0.1, 0.060),
    "l": (320, 1024, 0.0080, 0.1, 0.040),
    "xl": (384, 640, 0.0070, 0.1, 0.040),
}


def get_config(variant: str = "s") -> ml_collections.ConfigDict:
  """Returns the config of --config=configs/imagenet64_edm2.py:SIZE."""
  width, duration, rate, dropout, std = VARIANTS[variant]
  config = ml_collections.ConfigDict()
  config.data = dict(
      name="prepared", path="data/imagenet64", image_shape=(64, 64, 3),
      num_classes=1000,
  )
  config.model = dict(
      name="edm2", model_channels=width, dropout=dropout, num_classes=1000,
      dtype="bfloat16",
      float32_levels=0,
  )
  config.method = dict(name="edm", p_mean=-0.8, p_std=1.6, uncertainty=True)
  config.optimizer = dict(
      name="adam", learning_rate=rate, b1=0.9, b2=0.99, schedule="rsqrt",
      warmup_steps=10_000_000 // _BATCH, schedule_steps=35_000,
  )
  config.training = dict(
      num_steps=duration * _MEBI // _BATCH, batch_size=_BATCH, ema_rates=(),
      ema_stds=(0.05, 0.1),
  )
  config.checkpoint = dict(
      every_steps=8 * _MEBI // _BATCH, keep_every=32 * _MEBI // _BATCH
  )
  config.parallel = dict(microbatch_size_per_device=16)
  config.sample = dict(
      sampler="heun", num_levels=32, num_samples=50_000,
      average=f"posthoc_{std:g}",
  )
  config.eval = dict(samplers=("heun",), at_end=False)
  return config
