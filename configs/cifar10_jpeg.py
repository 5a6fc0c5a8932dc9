"""Small BCM on a prepared dataset of 32x32 photographs, for two CPU cores.

  python -m bcm_jax.data.prepare PHOTOS data/cifar10_jpeg --size=32
  python -m bcm_jax.main --config=configs/cifar10_jpeg.py \\
      --workdir=runs/cifar10_jpeg

An end-to-end example from a folder of images to a results table
(docs/datasets.md). The network is small and the run is short, so the images are
blurred. docs/results.md has results for CIFAR-10 as JPEG files, which are not
comparable with published ones. For other images set config.data.path,
image_shape, num_classes and config.model.num_classes.

Differences from configs/cifar10.py: ADM with 16 to 48 channels instead of
NCSN++, class labels, N from 11 to 161, a higher learning rate with cosine
decay.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """Returns the config; override values with --config.section.key=value."""
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.data = dict(
      name="prepared", path="data/cifar10_jpeg", flip=True,
      image_shape=(32, 32, 3), num_classes=10,
  )
  config.model = dict(
      name="adm",
      model_channels=16,
      out_channels=3,
      channel_mult=(1, 2, 3),
      num_res_blocks=1,
      attention_resolutions=(4,),
      num_head_channels=16,
      num_classes=10,
      two_time=True,
      resblock_updown=False,
      num_groups=8,
  )
  config.method = dict(name="bcm", discretization="doubling", s0=10, s1=160)
  config.optimizer = dict(
      name="radam",
      learning_rate=2e-3,
      schedule="cosine",
      warmup_steps=50,
      final_fraction=0.05,
  )
  config.training = dict(
      num_steps=1200, batch_size=32, ema_rates=(0.998,), ema_warmup=True
  )
  config.checkpoint = dict(every_steps=100, keep=2)
  config.log = dict(every_steps=25, progress_secs=30.0)
  config.sample = dict(times=(1.2,))
  # A quick check at the end; docs/evaluation.md has the full protocol.
  config.eval = dict(
    num_samples=1000, allow_fewer_samples=True, num_real_for_prdc=1000
  )
  config.invert = dict(num_images=500)
  return config
