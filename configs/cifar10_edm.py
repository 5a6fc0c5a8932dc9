"""EDM on CIFAR-10, a diffusion model and the teacher of the distillations.

  python -m bcm_jax.main --config=configs/cifar10_edm.py --workdir=runs/edm

or convert NVIDIA's weights, which the students also accept as a teacher:

  python -m bcm_jax.interop.convert edm-cifar10-32x32-cond-vp.pkl runs/edm

Published FID for 35 NFE (Karras et al., 2022, table 2); not reproduced.
Published hardware: 8 V100, 2 days.
  cond (default)   1.79   DDPM++, class-conditional
  uncond           1.97   DDPM++
  cond_ve          1.79   NCSN++
  uncond_ve        1.98   NCSN++ (not verified)

Deviation: steps with non-finite gradients are skipped.
"""

import ml_collections

_NETWORKS = {"vp": "ddpmpp", "ve": "ncsnpp"}
VARIANTS = ("cond", "uncond", "cond_ve", "uncond_ve")


def get_config(variant: str = "cond") -> ml_collections.ConfigDict:
  """Returns the config of --config=configs/cifar10_edm.py:VARIANT."""
  kind, _, network = variant.partition("_")
  batch = 512
  config = ml_collections.ConfigDict()
  config.data = dict(name="cifar10", augment=0.12)
  config.model = dict(
      name=_NETWORKS[network or "vp"], dropout=0.13, augment_dim=9,
      num_classes=10 if kind == "cond" else None,
  )
  config.method = dict(name="edm")
  config.optimizer = dict(
      name="adam", learning_rate=1e-3, warmup_steps=10_000_000 // batch
  )
  config.training = dict(
      num_steps=200_000_000 // batch, batch_size=batch,
      ema_rates=(), ema_halflife_kimg=(500,), ema_rampup_ratio=0.05,
  )
  config.parallel = dict(microbatch_size_per_device=64)
  config.sample = dict(sampler="heun", num_levels=18, num_samples=50_000)
  config.eval = dict(samplers=("heun",), at_end=False)
  return config
