"""Consistency models and BCM on ImageNet 64x64, class-conditional.

  python -m bcm_jax.data.prepare tfds:imagenet2012 data/imagenet64 --size=64
  python -m bcm_jax.main --config=configs/imagenet64.py:VARIANT --workdir=DIR

The first once: ADM's crop, as in the published runs; TFDS's own 64x64 images
(config.data.name=imagenet64) are another data set.

FID of 1 / 2 / 3 / 4 NFE as published (Li & He, README; ct: Song et al., 2023,
recalled); none has been run here.
  finetune (default)   4.18 / 2.88 / 2.78 / 2.68   BCM from an iCT run
  finetune_deep        3.14 / 2.45 / 2.61 / 2.35   the same, twice the blocks
  bcm, bcm_deep        no number: both terms from step 0
  ict                  4.60 / 3.40                 (iCT's own paper 4.02 / 3.20)
  ict_deep             3.94 / 3.14                 (3.25 / 2.77)
  ct                   13.0 / 11.1                 OpenAI's CM trained alone
  from_edm             no number: BCM from EDM's ImageNet-64 weights

Start: finetune from a run of ict, from_edm from converted weights, both by
--config.training.init_from=DIR. Deviations from the published runs:
* End and start levels reach sigma_max (method.include_T=False is as published).
* Compute in bfloat16 where they took float16 with a loss scale.
* ct: l2 instead of LPIPS, whose VGG weights do not come with the package.
* ECT's ImageNet-64 networks are EDM2's, which take no end level: no variant.
* from_edm is our own design; the form f(x, t, u) allows it (docs/methods.md).
"""

import ml_collections

_ADM = dict(name="adm", num_classes=1000, low_res_dropout=0.2,
            dtype="bfloat16")
_CM = dict(
    use_scale_shift_norm=True, attention_resolutions=(32, 16, 8),
    qkv_norm=False, low_res_dropout=None,
)
_CURRICULUM = dict(s0=10, s1=1280, huber_c=0.06)
# One batch size in all passes of a step: fewer shapes to compile.
_BCM = dict(name="bcm", concat_jumps=False)
_FIXED = _BCM | dict(discretization="fixed", s0=320, s1=320, huber_c=0.06)
_TIMES = dict(times=(2.4,), zigzag_noise=(0.1,), zigzag_level=(1.2,))

# Variant -> (model, method, training, times of samplers).
_DEEP = dict(num_res_blocks=6)
VARIANTS = {
    "finetune": (dict(two_time=True), _FIXED, dict(init_from="runs/ict"),
                 _TIMES),
    "bcm": (dict(two_time=True), _BCM | _CURRICULUM, {}, _TIMES),
    "ict": ({}, dict(name="ict") | _CURRICULUM, {}, dict(times=(0.7,))),
    "ct": (_CM, dict(name="ct", s0=2, s1=200, target_mu0=0.95),
           dict(batch_size=2048, ema_rates=(0.9999, 0.999, 0.9999432)),
           dict(times=(1.91,))),
    "from_edm": (dict(name="dhariwal", dropout=0.0, two_time=True), _FIXED,
                 dict(init_from="runs/edm"), _TIMES),
}
for _name in ("finetune", "bcm", "ict"):
  _model, *_rest = VARIANTS[_name]
  VARIANTS[f"{_name}_deep"] = (_model | _DEEP, *_rest)


def get_config(variant: str = "finetune") -> ml_collections.ConfigDict:
  """The config of a variant: --config=configs/imagenet64.py:VARIANT."""
  model, method, training, times = VARIANTS[variant]
  config = ml_collections.ConfigDict()
  config.data = dict(
      name="prepared", path="data/imagenet64", flip=True,
      image_shape=(64, 64, 3), num_classes=1000,
  )
  config.model = _ADM | model
  config.method = method
  config.optimizer = dict(name="radam", learning_rate=1e-4)
  config.training = dict(
      num_steps=800_000, batch_size=4096, ema_rates=(0.99997,)
  ) | training
  config.parallel = dict(microbatch_size_per_device=16)  # What 16 GB hold.
  several = "ancestral" if model.get("two_time") else "cm_multistep"
  config.sample = dict(sampler=several, num_samples=50_000) | times
  config.invert = dict(times=(15.0,))
  # FID needs Inception's weights: mode eval, docs/evaluation.md.
  config.eval = dict(samplers=("onestep", several), at_end=False)
  return config
