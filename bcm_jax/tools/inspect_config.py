"""Mode inspect: describes a config and a checkpoint."""

import os
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from bcm_jax import errors
from bcm_jax.checkpoint import checkpoint
from bcm_jax.checkpoint import runs
from bcm_jax.config import build
from bcm_jax.config import resolve
from bcm_jax.generate import planning
from bcm_jax.methods import base
from bcm_jax.training import goodput
from bcm_jax.training import hooks
from bcm_jax.training import rng
from bcm_jax.training import train_state

# Number of sampled noise levels in histograms, over this many training steps;
# some levels are shared by all examples of a step.
_DRAWS, _STEPS = 20_000, 200
# Number of rows of tables and histograms.
_ROWS = 12


def report(
    config: ml_collections.ConfigDict,
    workdir: str | None,
    compare: str | None,
) -> str:
  """Describes a config and, if workdir contains a run, its checkpoint.

  Args:
    config: resolved config.
    workdir: work directory, or None.
    compare: 'DIR', 'DIR@STEP' or '@STEP', a checkpoint to compare with the
      newest one of workdir, or None.

  Returns:
    Text of several sections.

  Raises:
    UserError: `compare` without `workdir`, or no readable checkpoint.
  """
  experiment = build.build(config)
  sections = [
      ("config", _config(experiment)),
      ("networks and phases", _networks(experiment)),
      *_noise_levels(experiment),
      ("plans", _plans(experiment)),
      ("parameters", _parameters(experiment)),
  ]
  if workdir is not None and os.path.isdir(runs.checkpoint_dir(workdir)):
    sections.append((f"run {workdir}", _run(workdir)))
  if compare is not None:
    if workdir is None:
      raise errors.UserError(
          f"--workdir: got None, expected a run for --compare={compare}"
      )
    sections.append((f"compared with {compare}", _compare(workdir, compare)))
  return "\n\n".join(f"== {title}\n{text}" for title, text in sections)


def _noise_levels(experiment) -> list[tuple[str, str]]:
  """Returns sections on curriculum, noise levels and weighting of a method."""
  if hasattr(experiment.method, "sampled_levels"):
    return [("levels", _levels(experiment))]
  if not hasattr(experiment.method, "num_scales"):
    return []
  return [
      ("schedule", _schedule(experiment)),
      ("times at the last N", _times(experiment)),
      ("weighting at the last N", _weighting(experiment)),
  ]


def _config(experiment) -> str:
  """Lists all config values."""
  flat = resolve.flatten(experiment.config)
  width = max(map(len, flat))
  lines = [f"digest {resolve.digest(experiment.config)}"]
  return "\n".join(lines + [f"{k:<{width}}  {v}" for k, v in flat.items()])


def _networks(experiment) -> str:
  """Lists networks with their initialization, phases and averages."""
  method: base.Method = experiment.method
  lines = []
  for name, network in method.networks.items():
    start = experiment.config.training.init_from
    if name != method.sampled_network or not start:
      start = network.init_from and f"the {network.init_from}"
    start = f"starts from {start}" if start else "starts fresh"
    lines.append(f"network {name}: {type(network.network).__name__}, {start}")
  for phase in method.phases():
    lines.append(f"phase: updates {', '.join(phase)}")
  training = experiment.training
  averages = [
      *map(train_state.average_name, training.ema_rates),
      *map(train_state.phema_name, training.ema_stds),
      *map(train_state.halflife_name, training.ema_halflife_kimg),
      *method.averages,
  ]
  lines.append(f"averages: {', '.join(averages)}")
  return "\n".join(lines)


def _changes(values: list[Any]) -> list[int]:
  """Returns at most _ROWS indices at which a list changes."""
  indices = [i for i, v in enumerate(values) if i == 0 or v != values[i - 1]]
  if len(indices) > _ROWS:
    rows = np.linspace(0, len(indices) - 1, _ROWS)
    indices = [indices[round(i)] for i in rows]
  return indices


def _schedule(experiment) -> str:
  """Tabulates the discretization curriculum and the learning rate."""
  method, steps = experiment.method, experiment.config.training.num_steps
  rate = experiment.optimizer.rate()
  if method.time_distribution == "continuous":
    grid, name = range(0, steps, max(1, steps // 1000)), "gap ratio"
    values = [float(method.curriculum(s)["gap_ratio"]) for s in grid]
  else:
    grid, name = range(0, steps, max(1, steps // 100_000)), "N"
    values = [method.num_scales(s) for s in grid]
  lines = [f"{'from step':>10}  {name:>10}  learning rate"]
  for i in _changes(values):
    step = grid[i]
    lines.append(f"{step:>10}  {values[i]:>10.6g}  {float(rate(step)):.3g}")
  lines.append(f"{steps - 1:>10}  {'(last)':>10}  {float(rate(steps - 1)):.3g}")
  return "\n".join(lines)


def _draw(experiment) -> tuple[Any, np.ndarray | None]:
  """Samples (times, end levels or None) at the curriculum of the last step."""
  method = experiment.method
  curriculum = method.curriculum(experiment.config.training.num_steps - 1)
  index = jnp.arange(_DRAWS)
  context = base.Context(
      images=None, labels=None,
      keys=lambda stream: rng.example_keys(0, stream, 0, index),
      curriculum=curriculum, networks={}, averages={},
  )
  times = method.sample_times(context)
  ends = None
  if hasattr(method, "sample_end"):
    ends = np.asarray(method.sample_end(context, times.index))
  return times, ends


def _levels(experiment) -> str:
  """Returns histograms of the noise levels that a method samples."""
  method = experiment.method
  curriculum = method.curriculum(experiment.config.training.num_steps - 1)
  index = jnp.arange(_DRAWS // _STEPS)

  def draw(step):
    return method.sampled_levels(base.Context(
        images=jnp.zeros((len(index), 1, 1, 1)), labels=None,
        keys=lambda stream: rng.example_keys(0, stream, step, index),
        curriculum=curriculum, networks={}, averages={}, index=index,
        shared_key=lambda stream: rng.step_key(0, stream, step),
    ))

  samples = jax.vmap(draw)(jnp.arange(_STEPS))
  edges = np.geomspace(
      method.sigma_min * 0.9999, method.sigma_max * 1.0001, _ROWS + 1
  )
  lines = []
  for name, values in samples.items():
    lines += [f"{name} ({_DRAWS} draws)", *_bars(np.ravel(values), edges)]
  return "\n".join(lines)


def _bars(values: np.ndarray, edges: np.ndarray) -> list[str]:
  """Formats a histogram."""
  shares = np.histogram(values, edges)[0] / len(values)
  lines = []
  for low, high, share in zip(edges, edges[1:], shares, strict=False):
    bar = "#" * round(200 * share)
    lines.append(f"  {low:>9.4g} .. {high:<9.4g} {share:>6.1%} {bar}")
  return lines


def _times(experiment) -> str:
  """Returns histograms of start levels t and end levels u."""
  times, ends = _draw(experiment)
  method = experiment.method
  t = np.asarray(times.t)
  edges = np.geomspace(
      min(method.sigma_min, t.min()), max(method.sigma_max, t.max()) * 1.0001,
      _ROWS + 1,
  )
  lines = [f"start level t ({_DRAWS} draws)", *_bars(t, edges)]
  if ends is not None:
    lines += ["end level u", *_bars(ends, edges)]
    lines.append(f"  above t in {np.mean(ends > t):.1%} of the draws")
  return "\n".join(lines)


def _weighting(experiment) -> str:
  """Tabulates the loss weight over quantiles of t."""
  times, ends = _draw(experiment)
  method = experiment.method
  t, r = np.asarray(times.t), np.asarray(times.r)
  weight = np.asarray(method.weight(times.t, times.r))
  lines = [f"{method.weighting}, {method.metric}",
           f"{'quantile':>8} {'t':>10} {'t - r':>10} {'weight':>10}"]
  order = np.argsort(t)
  for q in (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99):
    i = order[int(q * (len(t) - 1))]
    lines.append(f"{q:>8} {t[i]:>10.4g} {t[i] - r[i]:>10.4g} "
                 f"{weight[i]:>10.4g}")
  if ends is not None:
    soft = np.asarray(method.weight(times.t, jnp.asarray(ends)))
    lines.append(
        f"soft trajectory term: median weight {np.median(soft):.4g}, "
        f"consistency term: {np.median(weight):.4g}"
    )
  return "\n".join(lines)


def _plans(experiment) -> str:
  """Describes the plans of sampling and inversion."""
  parts = [str(planning.plan_of(experiment))]
  if experiment.method.supports_inversion:
    parts.append(str(planning.inversion_plan(experiment)))
  return "\n".join(parts)


def _parameters(experiment) -> str:
  """Tabulates the parameters of each network."""
  images, labels = build.example_batch(experiment)
  parts = []
  for name, network in experiment.method.networks.items():
    shapes = jax.eval_shape(
        lambda key, network=network: network.init(key, images, labels),
        jax.random.key(0),
    )
    parts.append(f"{name}\n{hooks.parameter_table(shapes)}")
  return "\n".join(parts)


def _run(workdir: str) -> str:
  """Describes the checkpoints of a run."""
  checkpoints = checkpoint.Checkpoints(runs.checkpoint_dir(workdir))
  step, state, meta = checkpoints.read_raw()
  lines = [
      f"checkpoints at steps {', '.join(map(str, checkpoints.all_steps()))}",
      f"newest valid checkpoint: step {step}, written by bcm_jax "
      f"{meta.get('version')}",
  ]
  if "skipped" in state:  # Absent in converted networks.
    lines.append(f"skipped steps: {int(state['skipped'])}")
  for name, network in state["networks"].items():
    updates = ""
    if "num_updates" in network:
      updates = f"{int(network['num_updates'])} updates, "
    lines.append(
        f"network {name}: {updates}"
        f"norm of parameters {_norm(network['params']):.6g}"
    )
  for name, average in state["averages"].items():
    lines.append(f"average {name}: norm {_norm(average):.6g}")
  return "\n".join(lines + _goodput(workdir))


def _goodput(workdir: str) -> list[str]:
  """Describes the wall-clock breakdown of a run."""
  total = goodput.total(workdir)
  if total is None:
    return []
  parts = ", ".join(
      f"{name} {hooks.format_secs(secs)}"
      for name, secs in total["seconds"].items() if secs >= 0.5
  )
  return [
      f"{total['starts']} start(s), {hooks.format_secs(total['wall'])} in "
      f"total: {parts}",
      f"{total['repeated_steps']} step(s) repeated; goodput "
      f"{100 * total['goodput']:.1f}% of the time",
  ]


def _norm(tree: Any) -> float:
  """Computes the global L2 norm of a tree."""
  leaves = jax.tree.leaves(tree)
  return float(np.sqrt(sum(np.sum(np.square(x, dtype=np.float64))
                           for x in leaves)))


def _read(place: str, workdir: str) -> tuple[str, Any, dict[str, Any]]:
  """Reads a checkpoint: (DIR@STEP, state, metadata)."""
  folder, step = runs.split_place(place, "--compare")
  folder = folder or workdir
  checkpoints = checkpoint.Checkpoints(runs.checkpoint_dir(folder))
  step, state, meta = checkpoints.read_raw(step)
  return f"{folder}@{step}", state, meta


def _compare(workdir: str, compare: str) -> str:
  """Compares configs and parameters of two checkpoints."""
  (a_name, a, a_meta), (b_name, b, b_meta) = (
      _read(place, workdir) for place in (workdir, compare)
  )
  lines = [f"a = {a_name}, b = {b_name}"]
  configs = [
      traverse_util.flatten_dict(m.get("config", {}), sep=".")
      for m in (a_meta, b_meta)
  ]
  for key in sorted(configs[0].keys() | configs[1].keys()):
    x, y = (config.get(key) for config in configs)
    if x != y:
      lines.append(f"config {key}: {x!r} against {y!r}")
  trees = [traverse_util.flatten_dict(
      {n: p["params"] for n, p in s["networks"].items()}, sep=".")
           for s in (a, b)]
  num_equal, rows = 0, []
  for key in sorted(trees[0].keys() | trees[1].keys()):
    x, y = (tree.get(key) for tree in trees)
    if x is None or y is None or x.shape != y.shape:
      shapes = [None if v is None else v.shape for v in (x, y)]
      rows.append((np.inf, f"{key}: {shapes[0]} against {shapes[1]}"))
    elif np.array_equal(x, y):
      num_equal += 1
    else:
      relative = _norm(x - y) / max(_norm(x), 1e-30)
      rows.append((relative, f"{key}: |a - b| / |a| = {relative:.3g}"))
  lines.append(f"{num_equal} tensors equal, {len(rows)} differ"
               + (", largest difference first:" if rows else ""))
  rows.sort(key=lambda row: -row[0])
  return "\n".join(lines + [f"  {text}" for _, text in rows[:40]])
