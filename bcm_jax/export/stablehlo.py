"""Exports samplers: bcm_jax export WORKDIR OUT.zip.

Writes the samplers of a run as StableHLO, with weights and a loader, to one
file that requires only jax and flatbuffers (docs/export.md):

  bcm_jax export runs/digits digits.zip \\
      --samplers=onestep,ancestral@0.7 --invert

--samplers uses the notation of bcm_jax/generate/planning.py; the default is
`sample.sampler`. Config sections `sample` and `invert` can be changed, for
example --config.sample.guidance=2. Exit status: 0 success, 65 invalid input.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import hashlib
import importlib.util
import io
import json
import os
import pathlib
from typing import Any, NamedTuple
import zipfile

from flax import traverse_util
import jax
from jax import export as jax_export
import jax.numpy as jnp
import numpy as np

from bcm_jax import __version__
from bcm_jax import errors
from bcm_jax.checkpoint import runs
from bcm_jax.config import build
from bcm_jax.config import resolve
from bcm_jax.data import image_source
from bcm_jax.export import stablehlo_runtime
from bcm_jax.generate import guides
from bcm_jax.generate import planning
from bcm_jax.sampling import guidance
from bcm_jax.sampling import samplers
from bcm_jax.sampling import sampling_plan
from bcm_jax.training import rng
from bcm_jax.utils import cli
from bcm_jax.utils import files
from bcm_jax.utils import provenance

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
DEFAULT_PLATFORMS = ("cpu", "cuda", "tpu")
# Description of `seed` and `index` in the manifest.
SEEDS = (
  "sample: image i draws from keys of (seed, i), i its entry of index; "
  "invert: the same of other streams; seed is uint32, keys are threefry's"
)
# Float values of the 256 gray levels, as in training/train_step.py.
_GRAY_LEVELS = image_source.to_float(np.arange(256, dtype=np.uint8))

Weights = dict[str, Any]  # 'network/path/of/tensor' -> array or its spec.


class Function(NamedTuple):
  """A function to export.

  Attributes:
    arguments: names of the arguments in order, keys of `specs`.
    call: function of these arguments.
    plan: plan that the function executes.
  """

  arguments: tuple[str, ...]
  call: Callable[..., jax.Array]
  plan: sampling_plan.Plan


def write(
  workdir: str,
  out: str,
  sampler_names: Sequence[str] = (),
  invert: bool = False,
  platforms: Sequence[str] = DEFAULT_PLATFORMS,
  average: str | None = None,
  step: int | None = None,
  overrides: Mapping[str, str] | None = None,
) -> str:
  """Exports the samplers of a run to a file for `stablehlo_runtime.load`.

  Args:
    workdir: work directory of the run.
    out: file to create; must not exist.
    sampler_names: samplers in the notation of `planning`; empty is
      `sample.sampler`.
    invert: also export inversion, with config section `invert`, and decoding.
    platforms: keys of PLATFORMS; these devices need not be present.
    average: name of the moving average; None is `sample.average`.
    step: step of the checkpoint; None is the newest valid one.
    overrides: 'section.key' -> text, changes of the config.

  Returns:
    A summary for the terminal.

  Raises:
    UserError: no readable checkpoint, an unknown sampler or platform, an
      existing `out`, or a config that cannot be exported.
  """
  files.check_free(out)
  _check_platforms(platforms)
  if importlib.util.find_spec("flatbuffers") is None:
    raise errors.UserError(
      "flatbuffers: got no such package, expected it for exports; pip install "
      "'bcm_jax[export]'"
    )
  experiment = _open(workdir, overrides)
  plans = {s: planning.plan_of(experiment, s) for s in sampler_names}
  if not plans:
    plans = {experiment.config.sample.sampler: planning.plan_of(experiment)}
  inversion = planning.inversion_plan(experiment) if invert else None
  guide = guides.open_guide(experiment)
  step, average, params = runs.load_run(experiment, workdir, average, step)
  weights = to_weights(params, guide)
  functions = {
    name: sampler(experiment, guide, plan) for name, plan in plans.items()
  }
  if inversion is not None:  # No sampler is named invert or decode.
    functions["invert"] = _inverter(experiment, guide, inversion)
    functions["decode"] = _decoder(experiment, guide)
  shapes = specs(experiment, weights)
  blobs = [serialize(f, shapes, platforms) for f in functions.values()]
  facts = dict(step=step, average=average, platforms=list(platforms))
  _store(out, _members(functions, blobs, weights, _facts(experiment) | facts))
  plan_texts = "\n".join(str(f.plan) for f in functions.values())
  return (
    f"step {step}, {average}, for {', '.join(platforms)}\n{plan_texts}\n"
    f"written: {out}, {os.path.getsize(out):,} bytes"
  )


# Validation -------------------------------------------------------------------


def _check_platforms(platforms: Sequence[str]) -> None:
  """Raises UserError for unknown or repeated platforms."""
  unknown = [p for p in platforms if p not in PLATFORMS]
  if unknown or len(set(platforms)) < len(platforms):
    raise errors.UserError(
      f"--platforms: got {','.join(platforms)}, expected each of "
      f"{', '.join(PLATFORMS)} at most once; GPUs are cuda (NVIDIA) or rocm "
      "(AMD)"
    )


def _open(
  workdir: str, overrides: Mapping[str, str] | None
) -> build.Experiment:
  """Builds the experiment of a run; UserError if it cannot be exported."""
  config = resolve.of_existing_run(workdir, overrides)
  if config.sample.rejection:
    raise errors.UserError(
      f"sample.rejection: got {config.sample.rejection}, expected 0, since the "
      "classifier is not exported; set --config.sample.rejection=0"
    )
  if config.model.get("attention") == "cudnn":
    raise errors.UserError(
      "model.attention: got 'cudnn', expected 'xla', since jax cannot export "
      "cuDNN calls; set --config.model.attention=xla, which computes the same"
    )
  return build.build(config, to_train=False)


def to_weights(params: Any, guide: guides.Guide | None = None) -> Weights:
  """Returns the tensors of the network and of its guidance network by path."""
  networks = {"network": params}
  if guide is not None and guide.params is not None:
    networks["guide"] = guide.params
  return traverse_util.flatten_dict(networks, sep="/")


def specs(experiment: build.Experiment, weights: Weights) -> dict[str, Any]:
  """Returns the specs of all arguments; the batch size is the symbol b."""
  (b,) = jax_export.symbolic_shape("b")
  spec, shape = jax.ShapeDtypeStruct, (b, *experiment.image_shape)
  return {
    "weights": {k: spec(v.shape, v.dtype) for k, v in weights.items()},
    "seed": spec((), jnp.uint32),
    "index": spec((b,), jnp.int32),
    "labels": spec((b,), jnp.int32),
    "images": spec(shape, jnp.uint8),
    "latents": spec(shape, jnp.float32),
  }


# Functions --------------------------------------------------------------------


def _maps(
  experiment: build.Experiment, guide: guides.Guide | None
) -> Callable[[Weights], tuple[Callable, Callable | None]]:
  """Returns a function weights -> (flow map, guided map or None).

  Networks read their batch size, which is symbolic in an export. Therefore the
  maps apply the network to one image and vmap over the batch. They are jitted,
  so that the program contains the network only once per plan.
  """
  method = experiment.method

  def batched(f):
    def single(*args):
      return f(*jax.tree.map(lambda a: a[None], args))[0]

    return jax.jit(jax.vmap(single))

  def maps(weights):
    networks = traverse_util.unflatten_dict(weights, sep="/")
    main = method.flow_map(networks["network"])
    if guide is None:
      return batched(main), None
    guide_map = guide.flow_map(networks.get("guide", networks["network"]))
    weight = experiment.config.sample.guidance
    return batched(main), batched(guidance.guided(main, guide_map, weight))

  return maps


def _argument_names(experiment, *arguments: str) -> tuple[str, ...]:
  """Returns names of arguments; adds labels for conditional networks."""
  labels = [] if experiment.num_classes is None else ["labels"]
  return ("weights", *arguments, *labels)


def sampler(experiment, guide, plan: sampling_plan.Plan) -> Function:
  """Returns the sampler of `batched_sampler.generate`: uint8 [b, H, W, C]."""
  maps = _maps(experiment, guide)

  def sample(weights, seed, index, labels=None):
    noise = samplers.start_noise(
      rng.example_keys(seed, "sample/start", 0, index),
      experiment.image_shape,
      experiment.method.sigma_max,
    )
    keys = rng.example_keys(seed, "sample/added", 0, index)
    images = samplers.run_rolled(plan, *maps(weights), noise, labels, keys)
    return _to_uint8(images, experiment.method.rounding)

  return Function(_argument_names(experiment, "seed", "index"), sample, plan)


def _inverter(experiment, guide, plan: sampling_plan.Plan) -> Function:
  """Returns the inversion of `Model.invert`: latents float32 [b, H, W, C]."""
  maps = _maps(experiment, guide)

  def invert(weights, seed, index, images, labels=None):
    x = jnp.asarray(_GRAY_LEVELS)[images]
    keys = rng.example_keys(seed, "invert/added", 0, index)
    return samplers.run_rolled(plan, *maps(weights), x, labels, keys)

  arguments = _argument_names(experiment, "seed", "index", "images")
  return Function(arguments, invert, plan)


def _decoder(experiment, guide) -> Function:
  """Returns one-step generation from latents: uint8 [b, H, W, C]."""
  maps = _maps(experiment, guide)
  plan = sampling_plan.ancestral((), experiment.levels)

  def decode(weights, latents, labels=None):
    images = samplers.run_rolled(plan, *maps(weights), latents, labels, None)
    return _to_uint8(images, experiment.method.rounding)

  return Function(_argument_names(experiment, "latents"), decode, plan)


def _to_uint8(x: jax.Array, rounding: str) -> jax.Array:
  """Computes image_source.to_uint8 in JAX."""
  scaled = {"floor": (x + 1) * 127.5, "nearest": x * 127.5 + 128}[rounding]
  return jnp.floor(jnp.clip(scaled, 0, 255)).astype(jnp.uint8)


# File -------------------------------------------------------------------------


@contextlib.contextmanager
def _without_paths() -> Iterator[None]:
  """Disables tracebacks in programs: they contain local file names."""
  limit = jax.config.jax_traceback_in_locations_limit
  jax.config.update("jax_traceback_in_locations_limit", 0)
  try:
    yield
  finally:
    jax.config.update("jax_traceback_in_locations_limit", limit)


def serialize(
  function: Function, shapes: dict[str, Any], platforms: Sequence[str]
) -> bytes:
  """Exports a function for some platforms; returns the serialized program."""
  with _without_paths():
    traced = jax_export.export(jax.jit(function.call), platforms=platforms)
    return bytes(traced(*(shapes[a] for a in function.arguments)).serialize())


def _facts(experiment: build.Experiment) -> dict[str, Any]:
  """Returns the manifest entries of a config and its network."""
  config, method = experiment.config, experiment.method
  return {
    "versions": {"bcm_jax": __version__, "jax": jax.__version__},
    "calling_convention_version": (
      jax.config.jax_export_calling_convention_version
    ),
    "method": config.method.name,
    "data": provenance.data_name(config.data),
    "config_digest": resolve.digest(config),
    "image_shape": list(experiment.image_shape),
    "num_classes": experiment.num_classes,
    "sigma_min": method.sigma_min,
    "sigma_max": method.sigma_max,
    "seeds": SEEDS,
  }


def _members(
  functions: dict[str, Function],
  blobs: Sequence[bytes],
  weights: Weights,
  facts: dict[str, Any],
) -> dict[str, bytes]:
  """Returns the archive members by name, first the manifest."""
  entries, contents = {}, {}
  for (name, f), blob in zip(functions.items(), blobs, strict=True):
    file = f"{f.call.__name__}_{len(contents)}.bin"
    contents[file] = blob
    steps = [
      {"kind": type(s).__name__} | dataclasses.asdict(s) for s in f.plan.steps
    ]
    entries[name] = {
      "file": file,
      "arguments": f.arguments,
      "nfe": f.plan.nfe,
      "plan": str(f.plan),
      "steps": steps,
    }
  buffer = io.BytesIO()
  np.savez(buffer, **weights)
  contents[stablehlo_runtime.WEIGHTS] = buffer.getvalue()
  contents[stablehlo_runtime.LOADER] = pathlib.Path(
      stablehlo_runtime.__file__
  ).read_bytes()
  manifest = (
    {"format": stablehlo_runtime.FORMAT}
    | facts
    | {
      "invert": entries.pop("invert", None),
      "decode": entries.pop("decode", None),
      "samplers": entries,
      "files": {
        name: hashlib.sha256(content).hexdigest()
        for name, content in contents.items()
      },
    }
  )
  manifest["sha256"] = stablehlo_runtime.record_digest(manifest)
  text = json.dumps(manifest, indent=2) + "\n"
  return {stablehlo_runtime.MANIFEST: text.encode()} | contents


def _store(out: str, members: dict[str, bytes]) -> None:
  """Writes the archive atomically; its bytes depend only on the members."""
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, "w") as file:
    for name, content in members.items():
      info = zipfile.ZipInfo(name)
      info.external_attr = 0o644 << 16
      if name != stablehlo_runtime.WEIGHTS:  # Weights are incompressible.
        info.compress_type = zipfile.ZIP_DEFLATED
      file.writestr(info, content)
  try:
    files.write_bytes(os.path.abspath(out), buffer.getvalue())
  except OSError as e:
    raise errors.UserError(
      f"OUT: got {out}, which is not writable ({e}); choose another path"
    ) from e


def main(argv: list[str] | None = None) -> None:
  """Runs the command; exits with 65 and a one-line error on invalid input."""
  parser = cli.Parser("export", __doc__, config="values")
  parser.add_argument(
    "workdir", metavar="WORKDIR", help="work directory of the run"
  )
  parser.add_argument("out", metavar="OUT.zip", help="file to create")
  parser.add_argument(
    "--samplers", default="", metavar="LIST",
    help="for example onestep,ancestral@0.7 (sample.sampler)",
  )
  parser.add_argument(
    "--invert", action="store_true", help="also export inversion and decoding"
  )
  parser.add_argument(
    "--platforms", default=",".join(DEFAULT_PLATFORMS), metavar="LIST",
    help=f"subset of {','.join(PLATFORMS)} (%(default)s)",
  )
  parser.add_argument(
    "--average", metavar="NAME", help="name of the moving average"
  )
  parser.add_argument(
    "--step", type=int, metavar="N", help="step of the checkpoint"
  )
  with cli.reporting():
    args = parser.parse_args(argv)
    print(
      write(
        args.workdir,
        args.out,
        [s for s in args.samplers.split(",") if s],
        args.invert,
        args.platforms.split(","),
        args.average,
        args.step,
        args.overrides,
      )
    )


if __name__ == "__main__":
  main()
