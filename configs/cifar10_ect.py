"""Easy consistency tuning (ECT) on CIFAR-10, unconditional, from EDM's weights.

  python -m bcm_jax.main --config=configs/cifar10_edm.py:uncond \
      --workdir=runs/edm
  python -m bcm_jax.main --config=configs/cifar10_ect.py --workdir=runs/ect

or convert NVIDIA's weights, as in the published runs:

  python -m bcm_jax.interop.convert edm-cifar10-32x32-uncond-vp.pkl runs/edm

--config.training.init_from=DIR selects another run. Published FID for 1 / 2 NFE
(Geng et al., 2024, README): 3.86 / 2.15 after 200,000 steps, 3.60 / 2.11 after
400,000 (--config.training.num_steps=400000); not reproduced. BCM from the
result: configs/cifar10.py:from_ect.

Deviations: steps with non-finite gradients are skipped instead of replacing
NaN; sampling uses the preconditioning of training (docs/methods.md).
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """Returns the config; override values with --config.section.key=value."""
  config = ml_collections.ConfigDict()
  config.data = dict(name="cifar10")
  # EDM's weights include the layer of the augmentation labels.
  config.model = dict(name="ddpmpp", augment_dim=9, dropout=0.2)
  config.method = dict(
      name="ect", p_mean=-1.1, p_std=2.0, ect_q=2.0, ect_stage_steps=25_000,
      ect_k=8.0, ect_b=1.0,
  )
  config.optimizer = dict(name="radam", learning_rate=1e-4)
  config.training = dict(
      num_steps=200_000, batch_size=128, ema_rates=(0.9999,),
      init_from="runs/edm",
  )
  config.parallel = dict(microbatch_size_per_device=64)
  config.sample = dict(
      sampler="cm_multistep", times=(0.821,), num_samples=50_000
  )
  config.eval = dict(samplers=("onestep", "cm_multistep"), at_end=False)
  return config
