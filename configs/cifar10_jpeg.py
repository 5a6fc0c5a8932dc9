"""A small BCM on a prepared folder of 32x32 photographs; two CPU cores.

  python -m bcm_jax.data.prepare PHOTOS data/cifar10_jpeg --size=32
  python -m bcm_jax.main --config=configs/cifar10_jpeg.py \\
      --workdir=runs/cifar10_jpeg

Made for trying the whole way, from a folder of images to a table, on any
computer (docs/datasets.md): a small network and a short run, which leaves
images blurred. The numbers measured for CIFAR-10 as JPEG files are in
docs/results.md; no paper's number compares with them. For images of your own
set config.data.path, image_shape, num_classes and config.model.num_classes.

What differs from configs/cifar10.py: ADM with 16 to 48 channels instead of
NCSN++, class labels, N from 11 to 161, a higher rate with cosine decay.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """The config; every value can be set as --config.section.key=value."""
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
  # A glance at the end; docs/evaluation.md measures with features and seeds.
  config.eval = dict(
    num_samples=1000, allow_fewer_samples=True, num_real_for_prdc=1000
  )
  config.invert = dict(num_images=500)
  return config
