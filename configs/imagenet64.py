"""Consistency models and BCM on ImageNet 64x64, class-conditional.

  python -m bcm_jax.data.prepare tfds:imagenet2012 data/imagenet64 --size=64
  python -m bcm_jax.main --config=configs/imagenet64.py:VARIANT --workdir=DIR

Prepare the dataset once, with ADM's crop as in the published runs. The 64x64
images of TFDS (config.data.name=imagenet64) are a different dataset.

Published FID for 1 / 2 / 3 / 4 NFE (Li & He, 2024, README; ct: Song et al.,
2023, not verified); not reproduced.
  finetune (default)   4.18 / 2.88 / 2.78 / 2.68   BCM from an iCT run
  finetune_deep        3.14 / 2.45 / 2.61 / 2.35   with twice the blocks
  bcm, bcm_deep        not published: both loss terms from step 0
  ict                  4.60 / 3.40                 (iCT paper: 4.02 / 3.20)
  ict_deep             3.94 / 3.14                 (iCT paper: 3.25 / 2.77)
  ct                   13.0 / 11.1                 consistency training (OpenAI)
  from_edm             not published: BCM from EDM's ImageNet-64 weights

Set --config.training.init_from=DIR or DIR@STEP to a run of ict for finetune,
and to converted weights for from_edm. The published network of finetune is that
of step 234,000, initialized from step 600,000 of ict and selected by FID: the
run keeps a checkpoint every 18,000 steps, which --mode=eval
--config.eval.steps=all evaluates, and runs longer with a higher
--config.training.num_steps. ict keeps one every 40,000 steps, among them the
published 600,000 and 680,000. The steps of the deep networks are not published.
Deviations from the published runs:
* Start and end levels include sigma_max (published: method.include_T=False).
* bfloat16, with float32 in the finest level (model.float32_levels), instead of
  float16 with loss scaling. At N = 1281, residuals of bfloat16 networks are
  mostly rounding errors.
* ct: l2 instead of LPIPS, because the package has no VGG weights.
* There is no variant from ECT, whose ImageNet-64 network is EDM2's, without an
  end-level embedding.
* from_edm is our own design, based on the form of f(x, t, u)
  (docs/methods.md).
"""

import ml_collections

_ADM = dict(name="adm", num_classes=1000, low_res_dropout=0.2,
            dtype="bfloat16", precision="high")
_CM = dict(
    use_scale_shift_norm=True, attention_resolutions=(32, 16, 8),
    qkv_norm=False, low_res_dropout=None,
)
_CURRICULUM = dict(s0=10, s1=1280, huber_c=0.06)
# The same batch size in all forward passes, to compile fewer shapes.
_BCM = dict(name="bcm", concat_jumps=False)
_FIXED = _BCM | dict(discretization="fixed", s0=320, s1=320, huber_c=0.06)
_TIMES = dict(times=(2.4,), zigzag_noise=(0.1,), zigzag_level=(1.2,))
# BCM's samplers with 1 to 4 NFE.
_SAMPLERS = (
    "onestep", "ancestral@2.4", "zigzag@0.1>1.2", "mixture@3/0.12>0.4"
)
# Checkpoints to keep for selection by FID, and as a start of finetune.
_CHECKPOINTS = {
    "finetune": dict(every_steps=6_000, keep_every=18_000),
    "ict": dict(every_steps=10_000, keep_every=40_000),
}

# Variant -> (model, method, training, sampling times).
_DEEP = dict(num_res_blocks=6)
VARIANTS = {
    "finetune": (dict(two_time=True), _FIXED,
                 dict(init_from="runs/ict@600000", num_steps=234_000), _TIMES),
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
  """Returns the config of --config=configs/imagenet64.py:VARIANT."""
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
  config.parallel = dict(microbatch_size_per_device=16)  # Fits in 16 GB.
  sampler = "ancestral" if model.get("two_time") else "cm_multistep"
  config.sample = dict(sampler=sampler, num_samples=50_000) | times
  config.invert = dict(times=(15.0,))
  # FID requires Inception weights: --mode=eval, docs/evaluation.md.
  samplers = _SAMPLERS if model.get("two_time") else ("onestep", sampler)
  config.eval = dict(samplers=samplers, at_end=False)
  config.checkpoint = _CHECKPOINTS.get(variant.removesuffix("_deep"), {})
  return config
