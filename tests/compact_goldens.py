"""Makes the compact copy of the reference numbers in tests/goldens.

  python -m tests.compact_goldens SOURCE

Keeps the files below, packs them with LZMA (NumPy reads them as they are),
and leaves out float32 outputs that have a float64 twin (tolerances are
relative to the twin) and what LEFT_OUT says.
"""

import io
import pathlib
import re
import sys
import zipfile

import numpy as np

GOLDENS = pathlib.Path(__file__).parent / "goldens"
# One file of every family; whole sets of weights are what costs.
FILES = (
    "bcm_finetune_init", "bcm_loss", "bcm_samplers", "bcm_unet", "cm_loss",
    "cm_unet", "ctm_songunet", "ect_loss", "edm2_phema", "edm2_precond",
    "edm_adm", "edm_augment", "edm_ncsnpp", "fid_frechet", "jcm_ncsnpp",
    "precision_recall", "sched_curriculum", "sched_ict_discretisation",
    "sched_karras", "sched_scalings", "uint8_quantise",
)

# Images among the outputs of CTM's losses, EDM's losses by pixel, gradients,
# the largest of 26 of BCM's and of the covariances.
LEFT_OUT = re.compile(
    r"(edm_|ctm).* out(64)?/(self_learn.*(estimate|target)$|grad|loss_map)"
    r"|cm_loss out/grad_cd"
    r"|bcm_loss out/grad_loss_ct/time_embed_align"
    r"|fid_frechet (in|out)/d48_"
)


def compact(source: pathlib.Path, target: pathlib.Path) -> None:
  """Packs one file."""
  with np.load(source, allow_pickle=False) as file, zipfile.ZipFile(
      target, "w"
  ) as archive:
    for key in file.files:
      if key.startswith("out/") and f"out64/{key[4:]}" in file.files:
        continue
      if LEFT_OUT.match(f"{source.stem} {key}"):
        continue
      array = io.BytesIO()
      np.save(array, file[key])
      # Without a date, so that the same content gives the same file.
      entry = zipfile.ZipInfo(f"{key}.npy")
      archive.writestr(entry, array.getvalue(), zipfile.ZIP_LZMA)


def main() -> None:
  """Packs all FILES of the folder that the command line names."""
  source = pathlib.Path(sys.argv[1])
  for old in GOLDENS.glob("*.npz"):
    old.unlink()
  for name in FILES:
    compact(source / f"{name}.npz", GOLDENS / f"{name}.npz")
  size = sum(p.stat().st_size for p in GOLDENS.glob("*.npz"))
  print(f"{len(FILES)} files, {size / 1e6:.2f} MB")


if __name__ == "__main__":
  main()
