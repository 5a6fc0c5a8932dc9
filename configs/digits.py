"""BCM from scratch on 8x8 handwritten digits.

  python -m bcm_jax.main --config=configs/digits.py --workdir=runs/digits
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.data = dict(name="digits")
  config.model = dict(
      name="adm", model_channels=32, out_channels=1, channel_mult=(1, 2),
      num_res_blocks=1, attention_resolutions=(), num_head_channels=32,
      num_classes=10, two_time=True, num_groups=8,
  )
  config.method = dict(
      name="bcm", sigma_data=0.75, scales="doubling", s0=10, s1=160,
  )
  config.optimizer = dict(
      name="radam", learning_rate=1e-3, schedule="cosine", warmup_steps=100,
      final_fraction=0.05,
  )
  config.training = dict(
      num_steps=2000, batch_size=64, ema_rates=(0.999,), ema_warmup=True,
  )
  config.checkpoint = dict(every_steps=500, keep=3)
  config.log = dict(every_steps=50)
  config.sample = dict(times=(1.2,))
  return config
