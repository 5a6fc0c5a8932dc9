"""BCM from scratch on 8x8 handwritten digits: the quick start.

  python -m bcm_jax.main --config=configs/digits.py --workdir=runs/digits

Two CPU cores, about 8 minutes. The numbers to expect, and how far they are
from those aimed at: docs/results.md (measured).

The network is the ADM U-Net of the ImageNet-64 config, only small: two levels,
8 groups a norm instead of 32 (one channel a group would wipe out
the embeddings). What differs from the published hyperparameters, and why:

* sigma_data 0.75: the standard deviation of these images in [-1, 1].
* sigma_max 40, not 80: 64 pixels drown in less noise than 12,288, and what is
  not spent on levels without signal goes into inversion.
* P_mean, P_std: towards the levels where 8x8 images are decided.
* N grows from 21 to 161, not 11 to 1281: the run is 200 times shorter.
* The soft term counts 2.5 times: its weight 1 / |t - u| is small for the long
  jumps that inversion makes.
* Cosine decay of the rate, where the published runs keep it constant.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """The config; every value can be set as --config.section.key=value."""
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.data = dict(name="digits")
  config.model = dict(
      name="adm",
      model_channels=24,
      out_channels=1,
      channel_mult=(1, 2),
      num_res_blocks=1,
      attention_resolutions=(),  # The middle block attends always.
      num_head_channels=24,
      num_classes=10,
      two_time=True,
      resblock_updown=False,
      num_groups=8,
  )
  config.method = dict(
      name="bcm",
      sigma_data=0.75,
      sigma_max=40.0,
      p_mean=-0.5,
      p_std=1.9,
      discretization="doubling",
      s0=20,
      s1=160,
      bidirectional_weight=2.5,
  )
  config.optimizer = dict(
      name="radam",
      learning_rate=2e-3,
      schedule="cosine",
      warmup_steps=100,
      final_fraction=0.05,
  )
  config.training = dict(
      num_steps=1900, batch_size=64, ema_rates=(0.999,), ema_warmup=True
  )
  config.checkpoint = dict(every_steps=500, keep=2)
  config.log = dict(every_steps=50, progress_secs=15.0)
  config.sample = dict(times=(0.7,))  # The middle time of two steps.
  # 1,437 training images: 50,000 samples of them would say no more.
  config.eval = dict(
    num_samples=1000, allow_fewer_samples=True, num_real_for_prdc=1000
  )
  return config
