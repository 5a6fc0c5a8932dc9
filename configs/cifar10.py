"""Consistency models and BCM on CIFAR-10, unconditional.

  python -m bcm_jax.main --config=configs/cifar10.py:VARIANT --workdir=DIR

Published FID for 1 / 2 / 3 / 4 NFE ([R]: not verified); none was reproduced.
  bcm (default)   3.10 / 2.39 / 2.50 / 2.29 [R]   both loss terms from step 0
  bcm_deep        2.64 / 2.36 / 2.19 / 2.07 [R]   twice the blocks
  ict             2.83 / 2.46
  ict_deep        2.51 / 2.24
  ct              8.70 / 5.83 [R]                 consistency training (OpenAI)
  finetune        not published: BCM from a run of ict
  from_edm        not published: BCM from EDM-VP's weights (DDPM++)
  from_ect        not published: BCM from an ECT run with DDPM++

Set --config.training.init_from=DIR, a run or converted weights, for the last
three. Deviations from the published runs, and unpublished settings:
* BCM's CIFAR-10 code was not released: the end-level embedding of NCSN++ is our
  design, the hyperparameters are iCT's, and the sampling times are not
  verified [R].
* Batch size, learning rate, dropout and Fourier scale of iCT are not
  verified [R].
* Start and end levels include sigma_max (method.include_T=False: BCM's code).
* ct: l2 instead of LPIPS, because the package has no VGG weights.
"""

import ml_collections

_NCSNPP = dict(name="ncsnpp", fourier_scale=0.02, dropout=0.3)
_DDPMPP = dict(name="ddpmpp", two_time=True, dropout=0.2)
_CURRICULUM = dict(s0=10, s1=1280)
# The same batch size in all forward passes, to compile fewer shapes.
_BCM = dict(name="bcm", concat_jumps=False)
_FIXED = _BCM | dict(discretization="fixed", s0=320, s1=320)
_TIMES = dict(times=(1.2,), zigzag_noise=(0.2,), zigzag_level=(0.8,))
# BCM's samplers with 1 to 4 NFE [R].
_SAMPLERS = (
    "onestep", "ancestral@1.2", "zigzag@0.2>0.8", "mixture@1.2/0.1>0.3"
)
_START = "runs/start"

# Variant -> (model, method, training, sampling times).
_DEEP = dict(num_res_blocks=8)
VARIANTS = {
    "bcm": (_NCSNPP | dict(two_time=True), _BCM | _CURRICULUM, {},
            _TIMES),
    "ict": (_NCSNPP, dict(name="ict") | _CURRICULUM, {}, dict(times=(0.821,))),
    "ct": (dict(name="ncsnpp"),
           dict(name="ct", s0=2, s1=150, target_mu0=0.9),
           dict(num_steps=800_000, batch_size=512, ema_rates=(0.9999,)),
           dict(times=(1.0,))),
    "finetune": (_NCSNPP | dict(two_time=True), _FIXED,
                 dict(init_from=_START), _TIMES),
    # EDM's weights include the layer of the augmentation labels.
    "from_edm": (_DDPMPP | dict(augment_dim=9), _FIXED,
                 dict(init_from=_START), _TIMES),
    "from_ect": (_DDPMPP | dict(augment_dim=9), _FIXED,
                 dict(init_from=_START), _TIMES),
}
for _name in ("bcm", "ict"):
  _model, *_rest = VARIANTS[_name]
  VARIANTS[f"{_name}_deep"] = (_model | _DEEP, *_rest)


def get_config(variant: str = "bcm") -> ml_collections.ConfigDict:
  """Returns the config of --config=configs/cifar10.py:VARIANT."""
  model, method, training, times = VARIANTS[variant]
  rate = 4e-4 if variant == "ct" else 1e-4
  config = ml_collections.ConfigDict()
  config.data = dict(name="cifar10", flip=True)
  config.model = model
  config.method = method
  config.optimizer = dict(name="radam", learning_rate=rate)
  config.training = dict(
      num_steps=400_000, batch_size=1024, ema_rates=(0.99993,)
  ) | training
  config.parallel = dict(microbatch_size_per_device=64)  # Fits in 16 GB.
  sampler = "ancestral" if model.get("two_time") else "cm_multistep"
  config.sample = dict(sampler=sampler, num_samples=50_000) | times
  config.invert = dict(times=(15.0,))
  # FID requires Inception weights: --mode=eval, docs/evaluation.md.
  samplers = _SAMPLERS if model.get("two_time") else ("onestep", sampler)
  config.eval = dict(samplers=samplers, at_end=False)
  return config
