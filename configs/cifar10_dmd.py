"""DMD and DMD2 on CIFAR-10, from a teacher in runs/edm.

  python -m bcm_jax.main --config=configs/cifar10_edm.py --workdir=runs/edm
  python -m bcm_jax.main --config=configs/cifar10_dmd.py --workdir=DIR

DMD requires teacher pairs:

  python -m bcm_jax.main --workdir=runs/edm --mode=pairs \
      --config.sample.num_samples=100000

Published one-step FID; not reproduced.
  dmd2 (default)   1.99   settings of FastGen; the DMD2 paper has no CIFAR-10
  dmd              2.66   class-conditional (Yin et al., 2023)
  dmd_uncond       3.77   with 500,000 pairs and an unconditional teacher

Deviations: the regression loss uses a distance of teacher features instead of
LPIPS (method.metric). As in DMD2, there are five updates of the fake score per
update of the generator, and the discriminator uses features of the fake score;
FastGen uses four updates and features of the teacher.
"""

import ml_collections

VARIANTS = ("dmd2", "dmd", "dmd_uncond")


def get_config(variant: str = "dmd2") -> ml_collections.ConfigDict:
  """Returns the config of --config=configs/cifar10_dmd.py:VARIANT."""
  config = ml_collections.ConfigDict()
  config.data = dict(name="cifar10")
  # The teacher's weights include the layer of the augmentation labels.
  config.model = dict(
      name="ddpmpp", augment_dim=9,
      num_classes=None if variant == "dmd_uncond" else 10,
  )
  config.optimizer = dict(name="adamw", weight_decay=0.01, grad_clip=10.0)
  config.method = dict(name=variant[:4].rstrip("_"), teacher="runs/edm")
  if variant == "dmd2":
    config.method.update(gan_weight=1e-3, gan_levels=(0, 1, 2))
    config.data.flip = True
    config.optimizer.learning_rate = 1e-4
    config.training = dict(
        num_steps=100_000, batch_size=2048,
        ema_rates=(0.9999, 0.99995, 0.9996),
    )
  else:
    config.method.regression_weight = 0.25 if variant == "dmd" else 0.5
    config.data.pairs = "runs/edm/pairs.npz"
    config.optimizer.update(learning_rate=5e-5, warmup_steps=500)
    config.training = dict(
        num_steps=300_000, batch_size=392, ema_rates=(0.9999,)
    )
  config.parallel = dict(microbatch_size_per_device=32)
  config.sample = dict(num_samples=50_000)
  if variant != "dmd2":
    config.sample.average = "params"  # DMD has no EMA.
  config.eval = dict(samplers=("onestep",), at_end=False)
  return config
