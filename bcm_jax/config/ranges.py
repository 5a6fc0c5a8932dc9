"""Ranges of config values, by key.

The defaults are those of the type: integers in [0, 2^31), finite numbers in
[0, 1e9], and texts that are neither empty nor the address of another machine.
The tables below list the keys with other ranges. Ranges apply to each entry of
a tuple; keys that a class declares in several sections are listed once.
"""

import re
from typing import Any

from bcm_jax.utils import addresses

_INT = f"[0, {2**31 - 1}]"
_FLOAT = "[0, 1e9]"
# Interval -> keys. Upper bounds of counts keep lists and grids in memory.
_INTERVALS = {
    # JAX takes seeds modulo 2^32.
    f"[0, {2**32 - 1}]": (
        "seed", "sample.seed", "invert.seed", "edit.seed", "eval.seeds",
        "search.seed",
    ),
    f"[1, {2**31 - 1}]": (
        "data.num_classes", "training.num_steps", "training.batch_size",
        "training.max_consecutive_nonfinite", "parallel.substeps",
        "parallel.heartbeat_secs", "checkpoint.every_steps", "checkpoint.keep",
        "checkpoint.keep_every", "checkpoint.max_failures", "log.every_steps",
        "invert.num_images", "edit.num_images", "edit.pairs",
        "eval.num_real_for_prdc", "eval.k", "optimizer.schedule_steps",
        "method.curriculum_steps", "method.ect_stage_steps",
        "method.max_solver_steps", "method.gan_period",
        "method.gan_max_solver_steps", "method.steps", "method.fake_updates",
    ),
    "[1, 100000000]": ("sample.num_samples",),
    "[2, 100000000]": ("eval.num_samples", "search.num_samples"),
    "[1, 1000000]": (
        "sample.batch_size", "invert.batch_size", "method.s0", "method.s1",
        "model.num_classes",
    ),
    "[1, 65536]": (
        "data.size", "data.image_shape", "model.model_channels",
        "model.out_channels", "model.channel_mult",
        "model.attention_resolutions", "model.num_head_channels",
        "model.num_heads", "model.num_groups", "model.min_group_channels",
        "model.embedding_mult", "model.resample_filter",
        "model.num_heads_upsample", "model.channel_mult_emb",
        "model.channel_mult_noise",
        "model.logvar_channels", "method.gan_features",
    ),
    "[1, 10000]": (
        "sample.nfe", "invert.nfe", "edit.nfe", "eval.inversion_nfe",
        "eval.inversion_baseline_nfe",
    ),
    "[2, 10000]": (
        "sample.num_levels", "search.nfe", "search.steps", "method.num_levels",
    ),
    "[2, 1000]": ("edit.num_interpolants",),
    "[2, 4096]": ("edit.factor",),
    "[0, 1024]": ("data.threads", "parallel.cpu_devices", "model.augment_dim"),
    "[1, 95]": ("edit.quality",),
    "[1, 3]": ("data.channels",),
    # Noise levels and other positive numbers.
    "(0, 1e6]": (
        "sample.times", "sample.zigzag_noise", "sample.zigzag_level",
        "invert.times", "invert.noise", "edit.times", "edit.sigma",
        "edit.noise", "eval.inversion_noise", "search.mid_times",
        "search.noises", "search.levels", "method.sigma_min",
        "method.sigma_max",
        "method.feature_sigma", "method.gan_sigma_max", "optimizer.eps",
        "optimizer.grad_clip", "model.clip_act", "model.fourier_scale",
        "training.ema_halflife_kimg", "training.ema_rampup_ratio",
    ),
    "(1, 1e6]": ("method.ect_q",),
    "[0.1, 1000]": ("method.rho",),
    "[0, 1e6]": (
        "sample.s_churn", "sample.s_tmin", "sample.s_tmax", "sample.s_noise",
        "sample.guidance", "sample.guidance_interval",
    ),
    # Any float32; what diverges is found in training.
    "[0, 1e38]": ("optimizer.learning_rate",),
    "(0, 1e38]": ("method.sigma_data",),
    "[-1e6, 1e6]": ("edit.strength",),
    "[-10, 10]": ("method.p_mean",),
    "[0.1, 100]": ("method.p_std",),
    "[0, 1000]": ("model.num_res_blocks", "sample.rejection"),
    # Fractions, rates and probabilities.
    "[0, 1]": (
        "data.augment", "sample.gamma", "optimizer.final_fraction",
        "method.dsm_high_share", "model.label_balance", "model.concat_balance",
        "model.res_balance", "model.attn_balance",
    ),
    "[0, 1)": (
        "training.ema_rates", "optimizer.b1", "optimizer.b2", "model.dropout",
        "model.low_res_dropout", "method.target_mu", "method.target_mu0",
        "method.label_dropout",
    ),
    # sigma_rel of t^gamma is below 1 / sqrt(12), its value at gamma = 0.
    "(0, 0.288]": ("training.ema_stds",),
}
_RANGES = {key: text for text, keys in _INTERVALS.items() for key in keys}
# Key of a tuple -> accepted numbers of entries.
_LENGTHS = {
    "data.image_shape": (0, 3), "sample.guidance_interval": (0, 2),
    "model.channel_mult": range(1, 17), "model.resample_filter": range(1, 17),
    "eval.seeds": range(1, 10_001), "search.mid_times": range(1, 10_001),
    "search.noises": range(1, 10_001), "search.levels": range(1, 10_001),
}
_INTERVAL = re.compile(r"([\[(])(.+), (.+)([\])])")


def problem(key: str, value: Any) -> str | None:
  """Returns the expected values of a key, or None if `value` is one of them.

  Args:
    key: 'section.key'.
    value: a value of the type of the key.
  """
  key = key.replace("auxiliary_optimizer.", "optimizer.")
  if isinstance(value, tuple):
    lengths = _LENGTHS.get(key)
    if lengths is not None and len(value) not in lengths:
      if isinstance(lengths, range):
        return f"{lengths[0]} to {lengths[-1]} entries"
      return f"{' or '.join(map(str, lengths))} entries"
    return next(filter(None, (problem(key, entry) for entry in value)), None)
  if isinstance(value, str):
    if not value.strip():
      return "a text that is not empty"
    return addresses.LOCAL if addresses.is_address(value) else None
  if value is None or isinstance(value, bool):
    return None
  text = _RANGES.get(key, _FLOAT if isinstance(value, float) else _INT)
  left, low, high, right = _INTERVAL.fullmatch(text).groups()
  above = value > float(low) or (left == "[" and value == float(low))
  below = value < float(high) or (right == "]" and value == float(high))
  return None if above and below else f"a value in {text}"
