"""Networks of the files: recognised, read, written back, compiled once."""

from collections.abc import Callable
import dataclasses
import functools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bcm_jax.diffusion import preconditioning
from bcm_jax.interop import transfer
from bcm_jax.interop.families import edm2_names
from tests import quick
from tests.parity import files

# Their attention has no normalisation of queries, keys and values.
PLAIN = ("openai/consistency_models", "sony/ctm")


class Unreadable(ValueError):
  """Weights that do not come back as they were."""


@functools.cache
def passes(network, precision: str) -> Callable[..., jax.Array]:
  """F(params, x, rest) of a network; forward and backward compiled once.

  All losses share the two programs, which see params and x alone as variables.
  """
  # Without optimisation, a filter of many channels in float64 takes seconds.
  filtered = len(getattr(network, "resample_filter", ())) > 2
  slow = filtered and precision == "float64"

  def apply(params, x, rest):
    c_noise, c_noise_end, labels, augment_labels = rest
    extra = () if augment_labels is None else (None, augment_labels)
    return network.apply(
        {"params": params}, x, c_noise, c_noise_end, labels, *extra
    )

  def pull(params, x, rest, cotangent):
    _, vjp = jax.vjp(lambda p, x: apply(p, x, rest), params, x)
    return vjp(cotangent)

  forward = jax.jit(apply) if slow else quick.jit(apply)
  backward = quick.jit(pull)

  def run(*args):
    with jax.disable_jit(False):
      return forward(*args)

  def run_back(saved, cotangent):
    with jax.disable_jit(False):
      return *backward(*saved, cotangent), None

  f = jax.custom_vjp(run)
  f.defvjp(lambda *args: (run(*args), args), run_back)
  return f


@dataclasses.dataclass(frozen=True, eq=False)
class Compiled:
  """Stands for a network where a method or a sampler wants one.

  Runs whole batches of one size, whatever it is given, so that there is one
  program a network; examples do not see each other. Without dropout.
  """

  network: Any
  batch: int

  @property
  def two_time(self) -> bool:
    return getattr(self.network, "two_time", False)

  def apply(
      self, variables, x, c_noise=None, c_noise_end=None, labels=None,
      dropout_keys=None, augment_labels=None, method=None,
  ):
    """Evaluates F as the network's own `apply` does."""
    del dropout_keys
    if method is not None:
      return self.network.apply(variables, x, method=method)
    rest = (c_noise, c_noise_end, labels, augment_labels)
    out = []
    for i in range(0, len(x), self.batch):
      part, others = jax.tree.map(
          lambda v, i=i: v[i:i + self.batch], (x, rest)
      )
      count = len(part)
      part, others = jax.tree.map(
          lambda v, n=count: v[np.arange(self.batch) % n], (part, others)
      )
      f = passes(self.network, str(x.dtype))
      y = f(variables["params"], part, others)
      out.append(y[:count])
    return jnp.concatenate(out)


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
  """A file's network with its weights.

  Attributes:
    family: module of names.
    network: Linen module.
    image_size: pixels a side.
    batch: examples that programs are compiled for.
    tensors: weights under their foreign names.
  """

  family: ModuleType
  network: Any
  image_size: int
  batch: int
  tensors: dict[str, np.ndarray]

  @functools.cached_property
  def params(self) -> dict:
    """Our tree in float32; checked to give the tensors back to the last bit.

    Raises:
      Unreadable: where it does not.
    """
    stripped = transfer.strip(self.family, self.tensors)
    params = transfer.read_params(
        self.family, self.network, self.image_size, stripped
    )
    back = self.named(params)
    if back.keys() != self.tensors.keys():
      names = sorted(back.keys() ^ self.tensors.keys())
      raise Unreadable(f"other names when written back: {names[:8]}")
    for name, value in self.tensors.items():
      ours = back[name]
      if (ours.dtype, ours.shape) != (value.dtype, value.shape) or (
          ours.tobytes() != value.tobytes()
      ):
        raise Unreadable(f"{name} is another when written back")
    return params

  def named(self, tree: dict) -> dict[str, np.ndarray]:
    """A tree like params, such as a gradient, under the file's names."""
    written = transfer.write_tensors(
        self.family, self.network, self.image_size, tree
    )
    prefix = self.family.PREFIXES[0]
    if all(name.startswith(prefix) for name in self.tensors):
      return written
    return transfer.strip(self.family, written)

  def weights(self, precision: str) -> dict:
    """Parameters on the device."""
    return jax.tree.map(lambda v: jnp.asarray(v, precision), self.params)

  @property
  def compiled(self) -> Compiled:
    return Compiled(self.network, self.batch)

  @property
  def noise(self):
    """Conditioning value of a level, as the network takes it."""
    if self.family.NAME == "openai":
      return preconditioning.adm_c_noise
    return preconditioning.edm_c_noise

  def labels(self, file: files.Reference, none: bool = False):
    """[B] classes of a file's 'in/y' or rows 'in/labels', -1 for none."""
    classes = self.network.num_classes
    if not classes:
      return None
    rows = file["in/y" if "in/y" in file else "in/labels"]
    labels = rows
    if rows.ndim == 2:
      if not (np.isin(rows, (0, 1)) & (rows.sum(-1, keepdims=True) < 2)).all():
        raise ValueError("labels are no classes: rows of 0 with at most one 1")
      labels = np.where(rows.any(-1), rows.argmax(-1), -1)
    labels = jnp.asarray(labels, jnp.int32)
    return jnp.full_like(labels, -1) if none else labels

  def raw(self, params, x, c_noise, c_noise_end=None, labels=None, aug=None):
    """F in the precision of the inputs."""
    return self.compiled.apply(
        {"params": params}, x, c_noise,
        c_noise_end if self.compiled.two_time else None, labels, None, aug,
    )

  def map(self, params, form, x, t, u, labels=None, aug=None, seen=None):
    """D = c_skip x + c_out F; F is appended to `seen`."""

    def network(x, c_noise, c_noise_end):
      f = self.raw(params, x, c_noise, c_noise_end, labels, aug)
      if seen is not None:
        seen.append(f)
      return f

    return preconditioning.precondition(network, form, x, t, u, self.noise)


# Constructor arguments by family: those that the tensors tell, that are used
# (see `_openai` and others), that do nothing outside of training; and the
# values of those that have no match here.
_TOLD = {
    "openai": (
        "model_channels", "num_res_blocks", "channel_mult", "num_classes",
        "use_scale_shift_norm", "resblock_updown", "conv_resample",
        "in_channels", "out_channels",
        # Without effect in the released attention.
        "use_new_attention_order", "attention_type",
    ),
    "edm": (
        "img_resolution", "img_channels", "label_dim", "augment_dim",
        "model_channels", "channel_mult", "channel_mult_emb", "num_blocks",
        "attn_resolutions", "embedding_type", "channel_mult_noise",
        "encoder_type", "decoder_type", "resample_filter", "arch",
        "sigma_min", "sigma_max", "sigma_data",
    ),
    "edm2": (
        "img_resolution", "img_channels", "label_dim", "model_channels",
        "channel_mult", "channel_mult_noise", "channel_mult_emb", "num_blocks",
        "attn_resolutions", "logvar_channels", "sigma_data",
    ),
    "jcm": (
        "nf", "ch_mult", "num_res_blocks", "data_std", "t_min", "t_max", "rho",
        "embedding_type", "name", "num_scales", "beta_min", "beta_max",
        "sigma_min", "sigma_max", "ema_rate", "fourier_scale", "init_scale",
    ),
}
_USED = {
    "openai": (
        "image_size", "attention_resolutions", "num_head_channels",
        "num_heads", "num_heads_upsample",
    ),
    "edm": (),
    "edm2": (
        "channels_per_head", "label_balance", "concat_balance", "res_balance",
        "attn_balance", "clip_act",
    ),
    "jcm": ("attn_resolutions", "fir", "fir_kernel"),
}
_TRAINING = ("dropout", "label_dropout", "use_checkpoint")
_ONLY = {
    "openai": {"dims": (2,), "use_fp16": (False,), "training_mode": ("ctm",)},
    "edm": {
        "use_fp16": (False,), "model_type": ("SongUNet", "DhariwalUNet"),
        "training_mode": ("ctm",),
    },
    "edm2": {
        "use_fp16": (False,), "resample_filter": ([1, 1],),
    },
    "jcm": {
        "attention_type": ("ddpm",), "conv_size": (3,),
        "double_heads": (False,), "nonlinearity": ("swish",),
        "normalization": ("GroupNorm",), "progressive": ("none",),
        "progressive_combine": ("sum",),
        "progressive_input": ("none", "residual"),
        "resamp_with_conv": (True,), "resblock_type": ("biggan",),
        "skip_rescale": (True,), "conditional": (True,),
    },
}


def _check_constructor(family: str, c: dict) -> None:
  """Raises Unreadable for arguments that have no match here."""
  family = family.replace("edm-song", "edm").replace("edm-adm", "edm")
  known = {*_TOLD[family], *_USED[family], *_TRAINING}
  other = {
      k: v for k, v in c.items()
      if k not in known and v not in _ONLY[family].get(k, ())
  }
  if c.get("in_channels", 0) != c.get("out_channels", 0):
    other |= {"in_channels": c["in_channels"]}
  if other:
    raise Unreadable(
        f"constructor: got {other}, which the network here does not have"
    )


def _openai(c: dict, source: str) -> dict:
  """What state dicts of OpenAI's U-Net do not tell."""
  size, heads = c["image_size"], c.get("num_head_channels", -1)
  upsample = c.get("num_heads_upsample", -1)
  return dict(
      image_size=size,
      attention_resolutions=tuple(
          size // factor for factor in c["attention_resolutions"]
      ),
      num_head_channels=None if heads == -1 else heads,
      num_heads=c.get("num_heads", 1),
      num_heads_upsample=None if upsample == -1 else upsample,
      qkv_norm=source not in PLAIN,
  )


def _edm2(c: dict) -> dict:
  """What state dicts of EDM2 do not tell."""
  same = {k: c[k] for k in _USED["edm2"] if k in c and "_per_" not in k}
  return same | dict(num_head_channels=c.get("channels_per_head", 64))


@functools.cache
def model(
    file: files.Reference, recipe: str | None = None, part: str = ""
) -> Model:
  """The network of a file.

  Args:
    file: with weights or with the name of the file that has them.
    recipe: key of meta that moves the weights, such as 'target_recipe'.
    part: of a file with several networks the name of one: its weights are
      'state_dict/<part>/', its arguments 'constructor_<part>'.

  Raises:
    UserError, Unreadable: for weights that are no known network's.
  """
  if recipe is not None and file.meta.get(recipe) is None:
    return model(file)
  tensors = file.moved(file.meta[recipe] if recipe else None)
  if part:
    tensors = file.group(f"state_dict/{part}/")
  home = file
  while "state_dict_from" in home.meta:
    home = home.beside(home.meta["state_dict_from"])
  c = file.meta[f"constructor_{part}"] if part else file.constructor
  if "unet.out_gain" in tensors:
    family, found = edm2_names, edm2_names.recognize(tensors, {})
    found |= _edm2(c)
  else:
    size = file.meta.get("image_size", c.get("image_size"))
    metadata = {} if size is None else dict(
        image_size=size,
        attention_resolutions=tuple(c.get("attn_resolutions", ())),
    )
    family, _, found = transfer.recognize(tensors, metadata=metadata)
  _check_constructor(family.NAME, c)
  if family.NAME == "openai":
    found |= _openai(c, file.source)
  if family.NAME == "jcm":
    taps = tuple(c["fir_kernel"]) if c.get("fir", True) else (1, 1)
    found |= dict(resample_filter=taps)
  size = found.pop("image_size")
  batch = len(next(v for k, v in home.arrays.items() if k.startswith("in/x")))
  return Model(family, family.NETWORK(**found), size, batch, tensors)
