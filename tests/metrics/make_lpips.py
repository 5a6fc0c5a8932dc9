"""Records lpips.npz: what the package `lpips` says in float64.

Run from the root of the repository, in an environment of its own:

    python -m venv /tmp/torch
    /tmp/torch/bin/pip install torch==2.13.0 numpy scipy tqdm
    /tmp/torch/bin/pip install --no-deps lpips==0.1.4
    PYTHONPATH=. /tmp/torch/bin/python tests/metrics/make_lpips.py

Weights and images are those of `lpips_recipe`. Of torchvision, the package
wants the layers of VGG16 alone, which are listed here in its place.
"""

import pathlib
import re
import sys
import types

import numpy as np
import torch
from torch import nn

from tests.metrics import lpips_recipe

CHANNELS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512,
            512, 512)


class VGG16(nn.Module):
  """The convolutions of torchvision's vgg16."""

  def __init__(self):
    super().__init__()
    layers, before = [], 3
    for channels in CHANNELS:
      if channels:
        layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU()]
        before = channels
      else:
        layers.append(nn.MaxPool2d(2, 2))
    self.features = nn.Sequential(*layers)


def network():
  """lpips.LPIPS with recipe weights, in float64."""
  models = types.ModuleType("torchvision.models")
  models.vgg16 = lambda pretrained: VGG16()
  torchvision = types.ModuleType("torchvision")
  torchvision.models = models
  sys.modules |= {"torchvision": torchvision, "torchvision.models": models}
  import lpips

  found = lpips.LPIPS(
      net="vgg", pretrained=False, pnet_rand=True, verbose=False
  )
  with torch.no_grad():
    for name, value in found.named_parameters():
      name = re.sub(r"^net\.slice\d\.", "features.", name)
      recipe = lpips_recipe.tensor(name, tuple(value.shape))
      value.copy_(torch.from_numpy(recipe))
  found = found.double().eval()
  # Kept in float32 by the package.
  scaling = found.scaling_layer
  for key, value in (("shift", (-0.030, -0.088, -0.188)),
                     ("scale", (0.458, 0.448, 0.450))):
    exact = torch.tensor(value, dtype=torch.float64)[None, :, None, None]
    setattr(scaling, key, exact)
  return found


def main() -> None:
  """Records distances and the gradient of their sum."""
  found = network()
  x, y = (
      torch.from_numpy(v.transpose(0, 3, 1, 2)).double()
      for v in lpips_recipe.images()
  )
  x.requires_grad_()
  distance = found(x, y)
  distance.sum().backward()
  gradient = np.moveaxis(x.grad.numpy(), 1, -1)
  np.savez_compressed(
      pathlib.Path(__file__).with_name("lpips.npz"),
      distance=distance.detach().numpy().ravel(),
      gradient=gradient[:, ::6, ::6],
  )


if __name__ == "__main__":
  main()
