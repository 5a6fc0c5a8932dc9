"""Settings of the shipped configs against the published tables.

The numbers are copied from these sources, not from the configs:

BCM   Mosasaur5526/BCM-iCT-torch: scripts/bcf_imagenet64_no32_qkv_4096.sh,
      scripts/image_sample.py, README
iCT   the same repository, scripts/ict_imagenet64.sh; Song & Dhariwal (2023)
CM    openai/consistency_models: scripts/launch.sh; consistency_models_cifar10:
      launch.sh and configs/cifar10_ve_cd.py
ECT   locuslab/ect: run_ecm.sh and ct_train.py
EDM   NVlabs/edm: train.py and README (Karras et al., 2022, table 2)
EDM2  NVlabs/edm2: train_edm2.py and generate_images.py (Karras et al., 2024)
CTM   sony/ctm: commands and script_util.py (Kim et al., 2024)
DMD   Yin et al. (2023), appendix
DMD2  tianweiy/DMD2: experiments/imagenet (Yin et al., 2024); CIFAR-10: FastGen
"""

import math

import pytest

from bcm_jax.config import resolve

_LEVELS = {"method.sigma_min": 0.002, "method.sigma_max": 80.0,
           "method.sigma_data": 0.5, "method.rho": 7.0}
_RADAM = {"optimizer.name": "radam", "optimizer.b1": 0.9,
          "optimizer.b2": 0.999, "optimizer.eps": 1e-8,
          "optimizer.weight_decay": 0.0, "optimizer.grad_clip": None,
          "optimizer.schedule": "constant", "optimizer.warmup_steps": 0}
_ADAM = _RADAM | {"optimizer.name": "adam"}
_ADAMW = _RADAM | {"optimizer.name": "adamw", "optimizer.weight_decay": 0.01,
                   "optimizer.grad_clip": 10.0}


def _training(steps, batch, rate, emas):
  return {"training.num_steps": steps, "training.batch_size": batch,
          "optimizer.learning_rate": rate, "training.ema_rates": emas}


def _grid(discretization, s0, s1, distribution, mu):
  return {"method.discretization": discretization, "method.s0": s0,
          "method.s1": s1, "method.time_distribution": distribution,
          "method.target_mu0": mu}


_LOGNORMAL = {"method.p_mean": -1.1, "method.p_std": 2.0}
_ICT = _LEVELS | _RADAM | _LOGNORMAL | {
    "method.metric": "pseudo_huber", "method.weighting": "inverse_gap",
}
_ADM = {
    "model.model_channels": 192, "model.channel_mult": (1, 2, 3, 4),
    "model.num_res_blocks": 3, "model.num_classes": 1000,
    "model.num_head_channels": 64, "data.image_shape": (64, 64, 3),
}
_BCM_ADM = _ADM | {
    "model.attention_resolutions": (16, 8), "model.use_scale_shift_norm": False,
    "model.qkv_norm": True, "model.dropout": 0.0, "model.low_res_dropout": 0.2,
    "model.resblock_updown": True, "data.flip": True,
}
_EDM_ADM = _ADM | {
    "model.attention_resolutions": (32, 16, 8),
    "model.use_scale_shift_norm": True, "model.qkv_norm": False,
}
_SONG = {"model.model_channels": 128, "model.channel_mult": (2, 2, 2),
         "model.num_res_blocks": 4, "model.attention_resolutions": (16,)}
_DDPMPP = _SONG | {"model.name": "ddpmpp", "model.embedding": "positional",
                   "model.encoder": "standard",
                   "model.resample_filter": (1, 1)}
_NCSNPP = _SONG | {"model.name": "ncsnpp", "model.embedding": "fourier",
                   "model.encoder": "residual",
                   "model.resample_filter": (1, 3, 3, 1)}
_BCM64 = _ICT | _BCM_ADM | {"method.huber_c": 0.06}
_FINETUNE = _BCM64 | _grid("fixed", 320, 320, "lognormal", 0.0) | _training(
    234_000, 4096, 1e-4, (0.99997,)
) | {
    "method.bidirectional_weight": 1.0, "method.preconditioning": "bcm",
    "eval.samplers": ("onestep", "ancestral@2.4", "zigzag@0.1>1.2",
                      "mixture@3/0.12>0.4"),
    "invert.times": (15.0,), "invert.noise": 0.07,
    "training.init_from": "runs/ict@600000",
}
_CTM = _LEVELS | _RADAM | {
    "method.p_mean": -1.2, "method.p_std": 1.2, "method.target_mu": 0.999,
    "method.dsm_high_share": 0.7, "method.target_inner": "online",
    "method.solver_steps_law": "weighted", "method.dsm_weight": 1.0,
}
_GAN = {
    "method.gan": True, "method.gan_period": 2, "method.gan_weight": 1.0,
    "auxiliary_optimizer.learning_rate": 2e-3, "auxiliary_optimizer.b1": 0.5,
    "auxiliary_optimizer.b2": 0.9,
}
_DMD = _LEVELS | _ADAMW | {"optimizer.warmup_steps": 500,
                           "model.dropout": 0.0,
                           "method.dm_weight": "normalized"}
_DMD64 = _DMD | _EDM_ADM | {"sample.average": "params"}
_DMD2 = {"method.fake_updates": 5, "method.regression_weight": 0.0}
_EDM = _LEVELS | _ADAM | {
    "method.p_mean": -1.2, "method.p_std": 1.2, "data.flip": False,
    "sample.sampler": "heun", "training.ema_rampup_ratio": 0.05,
}
_EDM10 = _EDM | _training(200_000_000 // 512, 512, 1e-3, ()) | {
    "data.augment": 0.12, "model.dropout": 0.13, "sample.num_levels": 18,
    "training.ema_halflife_kimg": (500,),
    "optimizer.warmup_steps": 10_000_000 // 512,
}


def _edm2(width, mebi, rate, dropout):
  return _LEVELS | _ADAM | _training(mebi * 2**20 // 2048, 2048, rate, ()) | {
      "model.name": "edm2", "model.model_channels": width,
      "model.dropout": dropout, "model.channel_mult": (1, 2, 3, 4),
      "model.num_res_blocks": 3, "model.attention_resolutions": (16, 8),
      "model.logvar_channels": 128, "model.num_classes": 1000,
      "method.p_mean": -0.8, "method.p_std": 1.6, "method.uncertainty": True,
      "optimizer.b2": 0.99, "optimizer.schedule": "rsqrt",
      "optimizer.schedule_steps": 35_000,
      "optimizer.warmup_steps": 10_000_000 // 2048,
      "training.ema_stds": (0.05, 0.1), "sample.num_levels": 32,
      "data.flip": False, "data.augment": 0.0,
  }


# Deviations that the docstrings of the configs name are not listed: l2 and
# teacher features instead of LPIPS, bfloat16 instead of float16.
PUBLISHED = {
    "imagenet64.py:finetune": _FINETUNE,
    "imagenet64.py:finetune_deep": _FINETUNE | {"model.num_res_blocks": 6},
    "imagenet64.py:ict": _BCM64 | _grid("doubling", 10, 1280, "lognormal", 0.0)
    | _training(800_000, 4096, 1e-4, (0.99997,)),
    "imagenet64.py:ct": _LEVELS | _RADAM | _EDM_ADM
    | _grid("sqrt", 2, 200, "uniform", 0.95)
    | _training(800_000, 2048, 1e-4, (0.9999, 0.999, 0.9999432))
    | {"method.weighting": "uniform", "model.dropout": 0.0},
    "imagenet64_cd.py": _LEVELS | _RADAM | _EDM_ADM
    | _grid("fixed", 39, 39, "uniform", 0.95)
    | _training(600_000, 2048, 8e-6, (0.9999, 0.999, 0.9999432))
    | {"method.weighting": "uniform", "model.dropout": 0.0,
       "method.solver": "heun", "data.flip": True},
    "imagenet64_ctm.py:dsm": _CTM | _EDM_ADM
    | _training(50_000, 1440, 4e-4, (0.999, 0.9999, 0.9999432))
    | {"method.num_levels": 40, "method.max_solver_steps": 39,
       "model.dropout": 0.0, "data.flip": True},
    "imagenet64_ctm.py:gan": _CTM | _GAN | _EDM_ADM
    | _training(30_000, 4224, 8e-6, (0.999, 0.9999, 0.9999432))
    | {"method.num_levels": 40, "method.max_solver_steps": 20,
       "method.gan_own_times": True, "method.gan_max_solver_steps": 39},
    "imagenet64_dmd.py:dmd": _DMD64 | _training(350_000, 336, 2e-6, (0.9999,))
    | {"method.regression_weight": 0.25, "method.fake_updates": 1,
       "method.gan_weight": 0.0},
    "imagenet64_dmd.py:dmd2": _DMD64 | _DMD2
    | _training(200_000, 280, 2e-6, (0.9999,))
    | {"method.gan_weight": 3e-3, "method.gan_fake_weight": 1e-2},
    "imagenet64_dmd.py:dmd2_longer": _DMD64 | _DMD2
    | _training(140_000, 280, 5e-7, (0.9999,)) | {"method.gan_weight": 3e-3},
    "imagenet64_dmd.py:no_gan": _DMD64 | _DMD2
    | _training(410_000, 280, 2e-6, (0.9999,)) | {"method.gan_weight": 0.0},
    "imagenet64_edm.py": _EDM | _EDM_ADM
    | _training(2_500_000_000 // 4096, 4096, 1e-4, ())
    | {"model.dropout": 0.1, "sample.num_levels": 40, "data.augment": 0.0,
       "training.ema_halflife_kimg": (50_000,),
       "optimizer.warmup_steps": 10_000_000 // 4096},
    "imagenet64_edm2.py:xs": _edm2(128, 1024, 0.0120, 0.0),
    "imagenet64_edm2.py:s": _edm2(192, 1024, 0.0100, 0.0)
    | {"sample.average": "posthoc_0.075"},
    "imagenet64_edm2.py:m": _edm2(256, 2048, 0.0090, 0.1)
    | {"sample.average": "posthoc_0.06"},
    "imagenet64_edm2.py:l": _edm2(320, 1024, 0.0080, 0.1)
    | {"sample.average": "posthoc_0.04"},
    "imagenet64_edm2.py:xl": _edm2(384, 640, 0.0070, 0.1)
    | {"sample.average": "posthoc_0.04"},
    "cifar10.py:ct": _LEVELS | _RADAM | _NCSNPP
    | _grid("sqrt", 2, 150, "uniform", 0.9)
    | _training(800_000, 512, 4e-4, (0.9999,))
    | {"model.dropout": 0.0, "method.weighting": "uniform", "data.flip": True},
    "cifar10.py:ict": _ICT | _NCSNPP
    | _grid("doubling", 10, 1280, "lognormal", 0.0)
    | _training(400_000, 1024, 1e-4, (0.99993,))
    | {"sample.times": (0.821,), "data.flip": True},
    "cifar10.py:ict_deep": {"model.num_res_blocks": 8},
    "cifar10_cd.py": _LEVELS | _RADAM | _NCSNPP
    | _grid("fixed", 17, 17, "uniform", 0.0)
    | _training(800_000, 512, 4e-4, (0.9999,))
    | {"model.dropout": 0.0, "method.weighting": "uniform",
       "sample.times": (0.585,), "data.flip": True},
    "cifar10_ect.py": _LEVELS | _RADAM | _DDPMPP | _LOGNORMAL
    | _training(25_600_000 // 128, 128, 1e-4, (0.9999,)) | {
        "method.time_distribution": "continuous", "method.ect_q": 2.0,
        "method.ect_k": 8.0, "method.ect_b": 1.0,
        "method.ect_stage_steps": 250 * 12_800 // 128,
        "method.preconditioning": "edm", "method.weighting": "inverse_gap",
        "method.huber_c": 0.0, "method.huber_normalize": False,
        "model.dropout": 0.2, "model.num_classes": None, "data.augment": 0.0,
        "sample.times": (0.821,), "method.target_mu0": 0.0,
    },
    "cifar10_ctm.py:dsm": _CTM | _DDPMPP
    | _training(50_000, 256, 4e-4, (0.999, 0.9999))
    | {"method.num_levels": 18, "method.max_solver_steps": 17,
       "model.dropout": 0.13, "data.flip": True},
    "cifar10_ctm.py:gan": _CTM | _GAN | {"training.batch_size": 528},
    "cifar10_dmd.py:dmd": _DMD | _DDPMPP
    | _training(300_000, 392, 5e-5, (0.9999,))
    | {"method.regression_weight": 0.25, "model.num_classes": 10,
       "method.fake_updates": 1, "sample.average": "params"},
    "cifar10_dmd.py:dmd_uncond": _DMD | _DDPMPP
    | _training(300_000, 392, 5e-5, (0.9999,))
    | {"method.regression_weight": 0.5, "model.num_classes": None,
       "sample.average": "params"},
    "cifar10_dmd.py:dmd2": _LEVELS | _ADAMW | _DDPMPP | _DMD2
    | _training(100_000, 2048, 1e-4, (0.9999, 0.99995, 0.9996))
    | {"method.gan_weight": 1e-3, "method.gan_levels": (0, 1, 2)},
    "cifar10_edm.py:cond": _EDM10 | _DDPMPP | {"model.num_classes": 10},
    "cifar10_edm.py:uncond": _EDM10 | _DDPMPP | {"model.num_classes": None},
    "cifar10_edm.py:cond_ve": _EDM10 | _NCSNPP | {"model.num_classes": 10},
    "cifar10_edm.py:uncond_ve": _EDM10 | _NCSNPP | {"model.num_classes": None},
}


@pytest.mark.parametrize("file", PUBLISHED)
def test_settings_are_the_published_ones(file):
  config = resolve.resolve(resolve.read_file(file))
  actual = {
      key: config[section].get(name, "missing")
      for key in PUBLISHED[file] for section, name in [key.split(".")]
  }
  assert actual == PUBLISHED[file]


def test_every_published_config_is_compared():
  ours = {"digits", "cifar10_jpeg"}  # Not published.
  unpublished = {
      "imagenet64.py:bcm", "imagenet64.py:bcm_deep", "imagenet64.py:from_edm",
      "imagenet64.py:ict_deep",  # As ict; its steps are not published.
      "cifar10.py:bcm", "cifar10.py:bcm_deep", "cifar10.py:finetune",
      "cifar10.py:from_edm", "cifar10.py:from_ect",
  }
  files = set()
  for path in resolve.shipped_configs():
    if path.stem.startswith("digits") or path.stem in ours:
      continue
    variants = getattr(resolve.run_file(path), "VARIANTS", None)
    files |= {f"{path.name}:{v}" for v in variants or ()} or {path.name}
  assert files == PUBLISHED.keys() | unpublished


def test_constants_of_the_methods():
  """iCT: c = 0.00054 sqrt(D); EDM2's networks; steps that are kept."""
  for side, published in ((64, 0.06), (32, 0.02993)):
    c = 0.00054 * math.sqrt(side * side * 3)
    assert c == pytest.approx(published, rel=3e-3)
  finetune = resolve.resolve(resolve.read_file("imagenet64.py:finetune"))
  ict = resolve.resolve(resolve.read_file("imagenet64.py:ict"))
  for config, steps in ((finetune, [234_000]), (ict, [600_000, 680_000])):
    kept = config.checkpoint
    assert kept.keep_every % kept.every_steps == 0
    for step in steps:
      assert step % kept.keep_every == 0 and step <= config.training.num_steps
  edm2 = resolve.resolve(resolve.read_file("imagenet64_edm2.py"))
  assert edm2.checkpoint.every_steps * 2048 == 8 * 2**20
  assert edm2.checkpoint.keep_every % edm2.checkpoint.every_steps == 0
