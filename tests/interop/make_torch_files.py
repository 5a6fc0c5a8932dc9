"""Makes the fixtures in tests/interop/files with real torch.

Run from the root of the repository, in an environment of its own:

    python -m venv /tmp/torch
    /tmp/torch/bin/pip install torch==2.13.0 numpy ml_dtypes
    PYTHONPATH=. /tmp/torch/bin/python tests/interop/make_torch_files.py
"""

import collections
import pathlib
import pickle
import sys
import types

import numpy as np
import torch

from tests.interop import recipe

FILES = pathlib.Path(__file__).parent / "files"


def tensor(array: np.ndarray) -> torch.Tensor:
  """Returns a torch tensor, also of dtypes that torch.from_numpy refuses."""
  array = np.asarray(array, order="C")
  dtype = getattr(torch, array.dtype.name)
  if not array.size:
    return torch.zeros(array.shape, dtype=dtype)
  raw = torch.from_numpy(array.reshape(-1).view(np.uint8).copy())
  return raw.view(dtype).reshape(array.shape)


def state_dict() -> collections.OrderedDict:
  """Returns recipe.state_dict() with the views that it speaks of."""
  values = recipe.state_dict()
  base = tensor(values["base"])
  made = collections.OrderedDict(
      (name, tensor(value))
      for name, value in values.items()
      if name.startswith("dtype.")
  )
  attributed = torch.nn.Parameter(tensor(values["with_attributes"]))
  attributed.is_bias = True
  made.update(
      base=base,
      transposed=base.t(),
      sliced=base[1:3, ::2],
      last=base.reshape(-1)[20:],
      shared=base,
      scalar=tensor(values["scalar"]),
      expanded=tensor(values["expanded"][0]).expand(5, 3),
      empty=tensor(values["empty"]),
      parameter=torch.nn.Parameter(tensor(values["parameter"])),
      with_attributes=attributed,
  )
  made._metadata = collections.OrderedDict({"": {"version": 1}})
  return made


def checkpoint() -> dict:
  """Returns a training state with other things than tensors."""
  model = {"a.weight": tensor(recipe.numbers(300, 2, 2).astype(np.float32))}
  ema = {"a.weight": tensor(recipe.numbers(301, 2, 2).astype(np.float16))}
  return dict(
      model=collections.OrderedDict(model),
      ema=ema,
      step=3,
      counter=torch.tensor(7),
      config=dict(width=128, rate=1e-3, name="unet", size=torch.Size([2, 3])),
      optimizer=dict(
          state={0: dict(step=torch.tensor(2.0), exp_avg=model["a.weight"])},
          param_groups=[dict(lr=np.float64(0.25), betas=(0.9, 0.999))],
      ),
      averages=[torch.ones(2), torch.zeros(1)],
      array=np.arange(6, dtype=np.int32).reshape(2, 3).T,
      dtype=torch.float32,
      device=torch.device("cpu"),
      names={"b", "a"},
      nothing=None,
  )


class EasyDict(dict):
  """Stands for dnnlib.util.EasyDict."""


def _reconstruct_persistent_obj(meta):
  """Stands for torch_utils.persistence; only its name is pickled."""
  raise NotImplementedError(meta)


class Persistent:
  """Pickles itself as EDM's persistence does: source, class and state."""

  def keep(self, *args, **kwargs):
    self._init_args, self._init_kwargs = args, kwargs
    return self

  def __reduce__(self):
    state = object.__reduce__(self)[2]
    meta = dict(
        type="class",
        version=6,
        module_src=recipe.MODULE_SOURCE,
        class_name=type(self).__name__,
        state=state,
    )
    return _reconstruct_persistent_obj, (meta,), None


class Conv2d(Persistent, torch.nn.Module):
  """A layer with its own parameters and a buffer."""


class SongUNet(Persistent, torch.nn.Module):
  """A network with an inert layer of torch among its own."""


class EDMPrecond(Persistent, torch.nn.Module):
  """The outermost module."""


class EDMLoss(Persistent):
  """A persistent object that is no module."""


def pretend_to_be_edm() -> None:
  """Gives the stand-ins the names that EDM's pickles have."""
  utils = types.ModuleType("torch_utils")
  utils.persistence = types.ModuleType("torch_utils.persistence")
  utils.persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj
  dnnlib = types.ModuleType("dnnlib")
  dnnlib.util = types.ModuleType("dnnlib.util")
  dnnlib.util.EasyDict = EasyDict
  for module in (utils, utils.persistence, dnnlib, dnnlib.util):
    sys.modules[module.__name__] = module
  _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
  EasyDict.__module__ = "dnnlib.util"


def network(dtype) -> EDMPrecond:
  """Returns recipe.network() as modules."""
  values = {k: tensor(v) for k, v in recipe.network(dtype).items()}
  conv = Conv2d().keep(3, 4, kernel=3)
  conv.weight = torch.nn.Parameter(values["model.conv.weight"])
  conv.bias = torch.nn.Parameter(values["model.conv.bias"])
  conv.register_buffer("resample_filter", values["model.conv.resample_filter"])
  conv.register_parameter("none", None)
  model = SongUNet().keep(channel_mult=[1, 2], embedding_type="positional")
  model.conv = conv
  model.norm = torch.nn.GroupNorm(2, 4).to(values["model.gain"].dtype)
  model.activation = torch.nn.functional.silu
  model.skip_scale = np.sqrt(0.5)
  model.gain = torch.nn.Parameter(values["model.gain"])
  outer = EDMPrecond().keep(
      img_resolution=8, img_channels=3, label_dim=0, model_type="SongUNet"
  )
  outer.model = model
  outer.sigma_data = 0.5
  outer.sigma_max = float("inf")
  return outer.eval().requires_grad_(False)


def edm(dtype, key: str) -> dict:
  """Returns what a snapshot of EDM holds."""
  loss = EDMLoss().keep()
  loss.P_mean = -1.2
  loss.scale = np.array([4.0, 3.0], np.float32)
  return {
      key: network(dtype),
      "loss_fn": loss,
      "augment_pipe": None,
      "dataset_kwargs": EasyDict(class_name="training.dataset.X", path="a.zip"),
  }


def module() -> torch.nn.Module:
  """Returns a whole module, of a class whose source no file has.

  The legacy format would embed the source, which here would be torch's.
  """
  home = types.ModuleType("torch.nn.modules.tiny")
  home.Tiny = type("Tiny", (torch.nn.Module,), {"__module__": home.__name__})
  sys.modules[home.__name__] = home
  made = home.Tiny()
  made.inner = home.Tiny()
  made.inner.weight = torch.nn.Parameter(torch.arange(3.0))
  return made


def make() -> None:
  """Writes all fixtures."""
  FILES.mkdir(exist_ok=True)
  saved = {
      "state": state_dict(),
      "later": {n: tensor(recipe.of_dtype(n)) for n in recipe.LATER_DTYPES},
      "checkpoint": checkpoint(),
      "module": module(),
  }
  for name, value in saved.items():
    torch.save(value, FILES / f"{name}_zip.pt")
    torch.save(
        value,
        FILES / f"{name}_legacy.pt",
        _use_new_zipfile_serialization=False,
    )
  pretend_to_be_edm()
  for protocol in (2, 4, 5):
    content = pickle.dumps(edm(np.float32, "ema"), protocol)
    (FILES / f"edm_{protocol}.pkl").write_bytes(content)
  half = EasyDict(edm(np.float16, "ema"))
  (FILES / "edm2.pkl").write_bytes(pickle.dumps(half))
  (FILES / "net.pkl").write_bytes(pickle.dumps(edm(np.float32, "net")))


if __name__ == "__main__":
  make()
