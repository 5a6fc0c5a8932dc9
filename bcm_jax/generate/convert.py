"""Converts published weights: bcm_jax convert SOURCE OUT.

SOURCE is a published checkpoint (PyTorch .pt or .pth, safetensors or the index
file of its shards, an EDM or EDM2 .pkl, a jcm msgpack). OUT becomes a work
directory for modes sample, invert and eval, and for training.init_from. With
--reverse, SOURCE is a work directory and OUT a .safetensors file with PyTorch's
parameter names.

The tensors do not determine the method of a network with one noise level:
--as=METHOD says it (edm, ct, cd, ict, ect, dmd, dmd2, sid). Other settings that
they do not determine have the published values; they are printed and can be
changed, such as --config.model.num_head_channels=32 (docs/checkpoints.md). Exit
status: 0 done, 65 bad input.
"""

import os
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
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

# Family of checkpoints -> model.name of the config.
_MODELS = {
    "openai": "adm", "edm-adm": "dhariwal", "edm-song": "ddpmpp",
    "edm2": "edm2", "jcm": "ncsnpp",
}
_FAMILIES = {model: family for family, model in _MODELS.items()} | {
    "ncsnpp": "edm-song"
}
# Default network of a file with several: the first of these that it contains.
_AVERAGES = ("ema", "params_ema", "model_ema", "ema_model", "ema_state_dict",
             "state_dict_ema", "ema_params")
_GROUPS = (*_AVERAGES, "", "params", "model", "net", "state_dict",
           "model_state_dict")


def data_of(model: dict[str, Any], image_size: int) -> dict[str, Any]:
  """Returns config section data of a converted network.

  Args:
    model: config section model.
    image_size: height and width in pixels.
  """
  names = {(64, 1000): "imagenet64", (32, 10): "cifar10", (32, None): "cifar10"}
  name = names.get((image_size, model["num_classes"]), "none")
  if name != "none":
    return {"name": name}
  return {
      "name": name,
      "image_shape": (image_size, image_size, model["out_channels"]),
      "num_classes": model["num_classes"],
  }


def _choose_group(groups: dict[str, Any], name: str | None) -> str:
  """Returns the group of the network, the user's or the average of the file.

  Raises:
    UserError: the user's does not exist, or several are possible.
  """
  if name is not None:
    if name not in groups:
      raise errors.UserError(
          f"--group: got {name}, expected one of "
          f"{', '.join(map(repr, groups))}, the groups of the file; choose one"
      )
    return name
  networks = {
      g for g, tensors in groups.items()
      if transfer.prefixes(transfer.unwrap(tensors))
  }
  # No known network: the error lists the tensors of this group.
  candidates = networks or groups.keys()
  averages = [g for g in _AVERAGES if g in groups]
  if averages and candidates.isdisjoint(averages):
    raise errors.UserError(
        f"--group: got none, and the average {averages[0]!r} has no names of a "
        f"network, expected one of {', '.join(map(repr, sorted(candidates)))}; "
        f"choose one, such as --group={min(candidates)}, for weights without "
        "the average"
    )
  chosen = next((g for g in _GROUPS if g in candidates), None)
  if chosen is None and len(candidates) == 1:
    return next(iter(candidates))
  if chosen is None:
    raise errors.UserError(
        "--group: got none, expected one of "
        f"{', '.join(map(repr, sorted(candidates)))}, the groups of the file; "
        f"choose one, such as --group={min(candidates)}"
    )
  return chosen


def _split_model(
    overrides: dict[str, str], model: dict[str, Any], kind: str, method: str
) -> tuple[dict[str, Any], dict[str, str]]:
  """Applies --config.model.*; returns (model section, other overrides)."""
  model_overrides = {
      k: v for k, v in overrides.items() if k.startswith("model.")
  }
  section = {"name": _MODELS[kind]} | model
  config = resolve.resolve(
      {"model": section, **sections.METHODS[method]}, model_overrides
  )
  rest = {k: v for k, v in overrides.items() if k not in model_overrides}
  return config.model.to_dict(), rest


def to_workdir(
    source: str,
    out: str,
    kind: str = "auto",
    group: str | None = None,
    step: int | None = None,
    overrides: dict[str, str] | None = None,
    image_size: int | None = None,
    method: str | None = None,
    prefix: str | None = None,
) -> str:
  """Converts a published checkpoint to a work directory.

  Args:
    source: file of the checkpoint.
    out: directory to create; must be empty or absent.
    kind: family of the checkpoint, or 'auto' to detect it.
    group: name of the network, for a file with several; None is its EMA.
    step: step of the new checkpoint; None takes it from the file name.
    overrides: 'section.key' -> text, for settings that the tensors do not
      determine.
    image_size: height and width in pixels; None is that of the tensors.
    method: method of the network, a key of sections.METHODS; None is that of
      the tensors or of the file.
    prefix: prefix of the network's names, of a file with several; None finds
      it.

  Returns:
    Summary of detected and assumed settings, several lines of text.

  Raises:
    UserError: the file cannot be read, does not fit its network, has values
      that are not finite, or does not determine a required setting.
  """
  files.check_free(out)
  step = step_of(source) if step is None else step
  if not 0 <= step < 2**31:
    raise errors.UserError(
        f"--step: got {step}, expected 0 to {2**31 - 1}; change it"
    )
  file = weight_files.read(source)
  group = _choose_group(file.groups, group)
  metadata = dict(file.metadata)
  if image_size is not None:
    metadata["image_size"] = image_size
  family, tensors, options = transfer.recognize(
      file.groups[group], kind, metadata, prefix
  )
  size = options.pop("image_size")
  method, known = sections.method_of(
      family.NAME, options, method, os.path.basename(source), file.metadata
  )
  if family is transfer.FAMILIES["openai"] and not known.startswith("assumed"):
    options["qkv_norm"] = method in sections.QKV_NORM
  config = _config(options, family.NAME, size, overrides or {}, method)
  experiment = build.build(config, to_train=False)
  params = transfer.read_params(
      family, experiment.method.network, size, tensors
  )
  for name, value in tensors.items():
    if not jnp.issubdtype(value.dtype, jnp.floating):
      raise errors.UserError(
          f"{source}: got tensor {name} of {value.dtype}, expected floating "
          "point weights; convert the file that training wrote"
      )
  params = jax.tree.map(lambda v: np.asarray(v, np.float32), params)
  runs.check_finite(source, params)
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
  listed, assumed = (
      ", ".join(f"{k}={config.model[k]}" for k in sorted(keys)) or "nothing"
      for keys in (options.keys() - set(family.ASSUMED), family.ASSUMED)
  )
  return (
    f"{file.kind}, network {group or 'of the file'!r}, kind {family.NAME}: "
    f"{len(tensors)} tensors, {count:,} parameters, {size}x{size}\n"
    f"found: {listed}\n"
    f"assumed (--config.model.NAME changes it): {assumed}\n"
    f"method {method} ({known}): method.name={config.method.name!r} with "
    f"preconditioning {config.method.preconditioning!r}\nwritten: {out}"
  )


def _config(
    options, kind, image_size, overrides, method
) -> ml_collections.ConfigDict:
  """Returns the config of a converted network, with the user's overrides."""
  model, rest = _split_model(overrides, options, kind, method)
  return resolve.resolve(
    {
      "model": model,
      **sections.METHODS[method],
      "data": data_of(model, image_size),
      "training": {"ema_rates": ()},
    },
    rest,
  )


def step_of(source: str) -> int:
  """Returns the step in a file name: 'ema_0.99997_234000.pt', 'model006000.pt'.

  The last integer between separators or after 'model'; 0 without one. In EDM's
  file names it counts thousands of images.
  """
  stem = re.sub(r"\.[a-zA-Z]\w*$", "", pathlib.Path(source).name)
  numbers = re.findall(r"(?:^|[-_]|model)(\d+)(?=$|[-_])", stem)
  return int(numbers[-1]) if numbers else 0


def to_file(workdir: str, out: str, average: str | None = None) -> str:
  """Writes the weights of a run with PyTorch's parameter names.

  Args:
    workdir: work directory of the run.
    out: .safetensors file to create.
    average: name of the average, as in sample.average.

  Returns:
    Summary, one line of text.

  Raises:
    UserError: no run, no good checkpoint, or out exists.
  """
  weight_files.check_suffix(out)
  files.check_free(out)
  config = resolve.of_run(workdir)
  if config is None:
    raise errors.UserError(
      f"SOURCE: got {workdir}, which has no config.json, expected a work "
      "directory; omit --reverse to convert a file"
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
  """Runs the command; exits with status 65 and one line on bad input."""
  parser = cli.Parser("convert", __doc__, config="values")
  add = parser.add_argument
  add("source", metavar="SOURCE", help="file; with --reverse a work directory")
  add("out", metavar="OUT", help="work directory; with --reverse a file")
  add(
    "--kind",
    default="auto",
    metavar="NAME",
    help=", ".join(["auto", *transfer.FAMILIES]),
  )
  add(
    "--as",
    dest="method",
    metavar="METHOD",
    help=", ".join(sections.METHODS),
  )
  add("--group", metavar="NAME", help="the network, of a file with several")
  add("--prefix", metavar="TEXT", help="prefix of the network's tensor names")
  add("--step", type=int, metavar="N", help="step of the new checkpoint")
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
          args.method,
          args.prefix,
        )
      )


if __name__ == "__main__":
  main()
