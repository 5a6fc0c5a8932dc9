"""Consistency distillation on CIFAR-10, from a teacher in runs/edm.

  python -m bcm_jax.main --config=configs/cifar10_edm.py:uncond_ve \
      --workdir=runs/edm
  python -m bcm_jax.main --config=configs/cifar10_cd.py --workdir=DIR

Published FID for 1 / 2 NFE with LPIPS: 3.55 / 2.93 (Song et al., 2023); not
reproduced. --config.method.teacher=DIR selects another teacher, whose network
must be the same as the student's.

Deviation: a distance of teacher features instead of LPIPS, because the package
has no VGG weights. The published distance is --config.method.metric=lpips with
--config.method.lpips_path=PATH.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """Returns the config; override values with --config.section.key=value."""
  config = ml_collections.ConfigDict()
  config.data = dict(name="cifar10", flip=True)
  # The teacher's weights include the layer of the augmentation labels.
  config.model = dict(name="ncsnpp", augment_dim=9)
  config.method = dict(
      name="cd", teacher="runs/edm", s0=17, s1=17, target_mu0=0.0
  )
  config.optimizer = dict(name="radam", learning_rate=4e-4)
  config.training = dict(
      num_steps=800_000, batch_size=512, ema_rates=(0.9999,)
  )
  config.parallel = dict(microbatch_size_per_device=64)
  config.sample = dict(
      sampler="cm_multistep", times=(0.585,), num_samples=50_000
  )
  config.eval = dict(samplers=("onestep", "cm_multistep"), at_end=False)
  return config
