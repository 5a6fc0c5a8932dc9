"""BCM from scratch on 8x8 handwritten digits: the quick start.

  python -m bcm_jax.main --config=configs/digits.py --workdir=runs/digits

About 8 minutes on two CPU cores; measured results: docs/results.md.

The network is a small version of the ADM U-Net in the ImageNet-64 config, with
two levels and 8 groups per GroupNorm instead of 32 (one channel per group would
remove the embeddings). Differences from the published hyperparameters:

* sigma_data 0.75: the standard deviation of these images in [-1, 1].
* sigma_max 40 instead of 80: 8x8 images have fewer pixels and are destroyed by
  less noise, so that more of the training is spent on levels with signal.
* p_mean, p_std: shifted towards the levels that determine 8x8 images.
* N grows from 21 to 161 instead of 11 to 1281: the run is 200 times shorter.
* bidirectional_weight 2.5: the weight 1 / |t - u| of the soft trajectory
  constraint is small for the long jumps of inversion.
* Cosine decay of the learning rate, which is constant in the published runs.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """Returns the config; override values with --config.section.key=value."""
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.data = dict(name="digits")
  config.model = dict(
      name="adm",
      model_channels=24,
      out_channels=1,
      channel_mult=(1, 2),
      num_res_blocks=1,
      attention_resolutions=(),  # The middle block always has attention.
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
  # Levels of the jump and of the zigzag of four steps; a jump below 0.3 is
  # inaccurate.
  config.sample = dict(
      times=(0.7,), zigzag_noise=(0.1,), zigzag_level=(0.4,)
  )
  # With 1,437 training images, 50,000 samples are not more informative.
  config.eval = dict(
    samplers=("onestep", "ancestral", "mixture"), num_samples=1000,
    allow_fewer_samples=True, num_real_for_prdc=1000,
  )
  return config
