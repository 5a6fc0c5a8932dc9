"""DMD and DMD2 on ImageNet 64x64, from a teacher in runs/edm.

  python -m bcm_jax.main --config=configs/imagenet64_dmd.py --workdir=runs/dmd2

Teacher: configs/imagenet64_edm.py. Published one-step FID (Yin et al., 2023 and
2024); not reproduced. Published hardware: 7 A100, 38 to 70 hours.
  dmd2 (default)   1.51
  dmd2_longer      1.28   continues from runs/dmd2 at a lower learning rate
  no_gan           2.61   DMD2 without the discriminator
  dmd              2.62   with 25,000 pairs:
      python -m bcm_jax.main --workdir=runs/edm --mode=pairs \
          --config.sample.num_samples=25000 --config.sample.num_levels=256

Deviations: the regression loss uses a distance of teacher features instead of
LPIPS (method.metric). The warmup has 500 updates; in the official code the
schedule advances once per GPU in each update. dmd2_longer initializes the fake
score from the teacher again.
"""

import ml_collections

VARIANTS = ("dmd2", "dmd2_longer", "no_gan", "dmd")


def get_config(variant: str = "dmd2") -> ml_collections.ConfigDict:
  """Returns the config of --config=configs/imagenet64_dmd.py:VARIANT."""
  config = ml_collections.ConfigDict()
  config.data = dict(
      name="prepared", path="data/imagenet64_edm", image_shape=(64, 64, 3),
      num_classes=1000,
  )
  config.model = dict(
      name="dhariwal", num_classes=1000, dropout=0.0, dtype="bfloat16",
      float32_levels=0,
  )
  config.method = dict(
      name="dmd" if variant == "dmd" else "dmd2", teacher="runs/edm"
  )
  config.optimizer = dict(
      name="adamw", learning_rate=2e-6, weight_decay=0.01, grad_clip=10.0,
      warmup_steps=500,
  )
  config.training = dict(
      num_steps=200_000, batch_size=280, ema_rates=(0.9999,)
  )
  if variant == "dmd2_longer":
    config.optimizer.learning_rate = 5e-7
    config.training.update(num_steps=140_000, init_from="runs/dmd2")
  elif variant == "no_gan":
    config.method.gan_weight = 0.0
    config.training.num_steps = 410_000
  elif variant == "dmd":
    config.data.pairs = "runs/edm/pairs.npz"
    config.training.update(num_steps=350_000, batch_size=336)
  config.parallel = dict(microbatch_size_per_device=8)
  # The published networks have no EMA.
  config.sample = dict(num_samples=50_000, average="params")
  config.eval = dict(samplers=("onestep",), at_end=False)
  return config
