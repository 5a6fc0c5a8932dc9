"""FIDs from papers and official repositories, for comparison with our results.

Every row names its source. Rows with verified=False are quoted from memory;
no table shows them and no test uses them.
"""

from typing import NamedTuple


class Published(NamedTuple):
  """One published result.

  Attributes:
    data: dataset, as in result files.
    method: name of the method in the paper.
    nfe: network evaluations.
    numbers: metric -> value.
    source: paper or repository.
    ours: method.name of our runs to compare with; '' if not implemented.
    verified: False for a number quoted from memory.
  """

  data: str
  method: str
  nfe: int
  numbers: dict[str, float]
  source: str
  ours: str = ""
  verified: bool = True


def _fids(data, method, values, source, ours="", verified=True):
  return [
      Published(data, method, nfe, {"FID": fid}, source, ours, verified)
      for nfe, fid in values.items()
  ]


_BCM = "official BCM repository, README"
_SCM = "Lu & Song (sCM), 2025, table 1"
_PAPER = "Li & He (BCM), 2024"

ROWS: tuple[Published, ...] = (
    *_fids("cifar10", "EDM", {35: 2.01}, _SCM, "edm"),
    *_fids("cifar10", "CD, LPIPS", {1: 3.55, 2: 2.93}, _SCM, "cd"),
    *_fids("cifar10", "iCT", {1: 2.83, 2: 2.46}, _SCM, "ict"),
    *_fids("cifar10", "iCT-deep", {1: 2.51, 2: 2.24}, _SCM),
    *_fids("cifar10", "ECT", {1: 3.60, 2: 2.11}, _SCM, "ect"),
    *_fids("cifar10", "CTM", {1: 1.87}, _SCM, "ctm"),
    *_fids("cifar10", "DMD", {1: 3.77}, _SCM, "dmd"),
    *_fids("cifar10", "sCT", {1: 2.85, 2: 2.06}, _SCM, "sct"),
    *_fids("cifar10", "sCD", {1: 3.66, 2: 2.52}, _SCM, "scd"),
    *_fids("cifar10", "BCM", {1: 3.10, 2: 2.39, 3: 2.50, 4: 2.29}, _PAPER,
           "bcm", verified=False),
    *_fids("cifar10", "BCM-deep", {1: 2.64, 2: 2.36, 3: 2.19, 4: 2.07},
           _PAPER, verified=False),
    *_fids("imagenet64", "EDM", {79: 2.44}, _SCM, "edm"),
    *_fids("imagenet64", "CD, LPIPS", {1: 6.20, 2: 4.70}, _SCM, "cd"),
    *_fids("imagenet64", "iCT", {1: 4.02, 2: 3.20}, _SCM, "ict"),
    *_fids("imagenet64", "iCT, reproduced by BCM's authors",
           {1: 4.60, 2: 3.40}, _BCM),
    *_fids("imagenet64", "iCT-deep", {1: 3.25, 2: 2.77}, _SCM),
    *_fids("imagenet64", "ECT-XL", {1: 2.49, 2: 1.67}, _SCM, "ect"),
    *_fids("imagenet64", "CTM", {1: 1.92, 2: 1.73}, _SCM, "ctm"),
    *_fids("imagenet64", "DMD", {1: 2.62}, _SCM, "dmd"),
    *_fids("imagenet64", "DMD2", {1: 1.28}, _SCM, "dmd2"),
    *_fids("imagenet64", "BCM", {1: 4.18, 2: 2.88, 3: 2.78, 4: 2.68}, _BCM,
           "bcm"),
    *_fids("imagenet64", "BCM-deep", {1: 3.14, 2: 2.45, 3: 2.61, 4: 2.35},
           _BCM),
)

# Targets for configs/digits.py, fixed before its first run: dataset -> NFE ->
# metric -> value.
AIMS: dict[str, dict[int, dict[str, float]]] = {
    "digits": {
        1: {"class_accuracy": 0.97, "worst_class_accuracy": 0.90,
            "precision": 0.65, "recall": 0.65, "mse": 0.0080},
        2: {"class_accuracy": 0.985, "precision": 0.80, "recall": 0.80,
            "mse": 0.0050},
    },
}
