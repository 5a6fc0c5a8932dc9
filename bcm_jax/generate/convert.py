"""Converts published weights: python -m bcm_jax.interop.convert SOURCE OUT.

SOURCE is a published checkpoint (PyTorch .pt or .pth, safetensors, an EDM or
EDM2 .pkl, a jcm msgpack); OUT becomes a work directory for modes sample,
invert and eval, from which training can start. With --reverse, SOURCE is a
work directory and OUT a .safetensors under PyTorch's names.

Settings that tensors do not determine are those published; they are printed
and can be set, such as --config.model.num_head_channels=32
(docs/checkpoints.md). Exit status: 0 done, 65 bad input.
"""

import os
import pathlib
import re
from typing import Any

import jax
import ml_collections
import numpy as np

from bcm_jax import errors
from bcm_jax.checkpoint import runs
from bcm_jax.config import build
from bcm_jax.config import resolve
from bcm_jax.interop import transfer
from bcm_jax.interop import weight_files
from bcm_jax.interop.families import sections
from bcm_jax.utils import cli
from bcm_jax.utils import files

# Name in the config of a family's network.
_MODELS = {
    "openai": "adm", "edm-adm": "dhariwal", "edm-song": "ddpmpp",
    "edm2": "edm2", "jcm": "ncsnpp",
}
_FAMILIES = {model: family for family, model in _MODELS.items()} | {
    "ncsnpp": "edm-song"
}
# Tensors to use of a file with several networks; the first that exists.
_GROUPS = ("ema", "params_ema", "model_ema", "", "params", "model", "net")


def data_of(model: dict[str, Any], image_size: int) -> dict[str, Any]:
  """The data set that a network was made for, by size and classes."""
  known = {(64, 1000): "imagenet64", (32, 10): "cifar10", (32, None): "cifar10"}
  name = known.get((image_size, model["num_classes"]), "none")
  if name != "none":
    return {"name": name}
  return {
      "name": name,
      "image_shape": (image_size, image_size, model["out_channels"]),
      "num_classes": model["num_classes"],
  }


def _choose_group(groups: dict[str, Any], asked: str | None) -> str:
  if asked is None:
    asked = next((g for g in _GROUPS if g in groups), None)
  if asked is None and len(groups) == 1:
    return next(iter(groups))
  if asked not in groups:
    raise errors.UserError(
        f"--group={asked}: the file holds {', '.join(map(repr, groups))}; "
        "choose one of these"
    )
  return asked


def _split_model(
    overrides: dict[str, str], model: dict[str, Any], kind: str
) -> tuple[dict[str, Any], dict[str, str]]:
  """Applies --config.model.*; returns (model section, the other overrides)."""
  mine = {k: v for k, v in overrides.items() if k.startswith("model.")}
  section = {"name": _MODELS[kind]} | model
  config = resolve.resolve(
      {"model": section, **sections.of(kind, model)}, mine
  )
  rest = {k: v for k, v in overrides.items() if k not in mine}
  return config.model.to_dict(), rest


def to_workdir(
    source: str,
    out: str,
    kind: str = "auto",
    group: str | None = None,
    step: int | None = None,
    overrides: dict[str, str] | None = None,
    image_size: int | None = None,
) -> str:
  """Converts a published checkpoint into a work directory.

  Args:
    source: the file.
    out: directory to make; must not hold anything yet.
    kind: family, or 'auto' to recognise it.
    group: which network of the file; None takes its moving average.
    step: step of the checkpoint; None takes what the file's name says.
    overrides: 'section.key' -> text, for settings tensors do not determine.
    image_size: pixels per side; None is the family's default.

  Returns:
    What was found and assumed, for a terminal.

  Raises:
    UserError: a file that cannot be read or does not fit its network.
  """
  files.check_free(out)
  file = weight_files.read(source)
  group = _choose_group(file.groups, group)
  metadata = dict(file.metadata)
  if image_size is not None:
    metadata["image_size"] = image_size
  family, tensors, found = transfer.recognize(
      file.groups[group], kind, metadata
  )
  size = found.pop("image_size")
  config = _config(found, family.NAME, size, overrides or {})
  experiment = build.build(config)
  params = transfer.read_params(
      family, experiment.method.network, size, tensors
  )
  params = jax.tree.map(lambda v: np.asarray(v, np.float32), params)
  if step is None:
    step = step_of(source)
  facts = {"converted_from": os.path.basename(source), "kind": family.NAME}
  runs.write(
    out,
    resolve.to_json(experiment.config),
    experiment.method.sampled_network,
    params,
    step,
    facts,
  )
  count = sum(v.size for v in jax.tree.leaves(params))
  shown = ", ".join(f"{k}={v}" for k, v in sorted(found.items()))
  return (
    f"{file.kind}, network {group or 'of the file'!r}, kind {family.NAME}: "
    f"{len(tensors)} tensors, {count:,} parameters, {size}x{size}\n"
    f"found: {shown}\n"
    f"sampled as method {config.method.name!r} with preconditioning "
    f"{config.method.preconditioning!r}\nwritten: {out}"
  )


def _config(found, kind, image_size, overrides) -> ml_collections.ConfigDict:
  """The config of a converted network, with what the user sets."""
  model, rest = _split_model(overrides, found, kind)
  return resolve.resolve(
    {
      "model": model,
      **sections.of(kind, model),
      "data": data_of(model, image_size),
      "training": {"ema_rates": ()},
    },
    rest,
  )


def step_of(source: str) -> int:
  """The step in a file's name: 'ema_0.99997_234000.pt', 'model006000.pt'.

  The last whole number that stands alone or after 'model'; EDM's are thousands
  of images. 0 where there is none.
  """
  stem = re.sub(r"\.[a-zA-Z]\w*$", "", pathlib.Path(source).name)
  numbers = re.findall(r"(?:^|[-_]|model)(\d+)(?=$|[-_])", stem)
  return int(numbers[-1]) if numbers else 0


def to_file(workdir: str, out: str, average: str | None = None) -> str:
  """Writes a run's weights under PyTorch's names.

  Args:
    workdir: directory of the run.
    out: .safetensors file.
    average: which average, as sample.average.

  Returns:
    What was written, for a terminal.
  """
  weight_files.check_suffix(out)
  files.check_free(out)
  config = resolve.of_run(workdir)
  if config is None:
    raise errors.UserError(
      f"{workdir} holds no run (no config.json); SOURCE must be a work "
      "directory with --reverse"
    )
  experiment = build.build(config, to_train=False)
  step, _, params = runs.load_run(experiment, workdir, average)
  family = transfer.FAMILIES[_FAMILIES[config.model.name]]
  tensors = transfer.write_tensors(
    family, experiment.method.network, experiment.image_shape[0], params
  )
  weight_files.write(out, tensors)
  return f"step {step}, kind {family.NAME}: {len(tensors)} tensors in {out}"


def main(argv: list[str] | None = None) -> None:
  """Entry point; exits with 65 and one line on bad input."""
  parser = cli.Parser("bcm_jax.interop.convert", __doc__, config="values")
  add = parser.add_argument
  add("source", metavar="SOURCE", help="file; with --reverse a work directory")
  add("out", metavar="OUT", help="work directory; with --reverse a file")
  add(
    "--kind",
    default="auto",
    metavar="NAME",
    help=", ".join(["auto", *transfer.FAMILIES]),
  )
  add("--group", metavar="NAME", help="the network, of a file with several")
  add("--step", type=int, metavar="N", help="step to write in the checkpoint")
  add("--image-size", type=int, metavar="N", help="side in pixels")
  add("--average", metavar="NAME", help="with --reverse: the moving average")
  add("--reverse", action="store_true", help="from a run to PyTorch's names")
  with cli.reporting():
    args = parser.parse_args(argv)
    if args.reverse:
      print(to_file(args.source, args.out, args.average))
    else:
      print(
        to_workdir(
          args.source,
          args.out,
          args.kind,
          args.group,
          args.step,
          args.overrides,
          args.image_size,
        )
      )


if __name__ == "__main__":
  main()
