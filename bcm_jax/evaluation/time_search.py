"""Search for a sampler's times: mode search.

Times of multistep consistency sampling are found as in Song et al. (2023,
arXiv:2303.01469, appendix C): ternary search over the indices of a Karras grid.
Ancestral and zigzag sampling use a greedy grid search: one time after another,
with the earlier ones fixed. All candidates use the same noise. Every measured
cost is saved at once, so that an interrupted search continues.
"""

from collections.abc import Callable, Sequence
import hashlib
import itertools
import json
import os
from typing import Any

import numpy as np

from bcm_jax import errors
from bcm_jax.checkpoint import runs
from bcm_jax.config import build
from bcm_jax.config import schema
from bcm_jax.diffusion import schedules
from bcm_jax.evaluation import evaluate
from bcm_jax.generate import batched_sampler
from bcm_jax.generate import planning
from bcm_jax.plots import draw
from bcm_jax.utils import files

Cost = Callable[[str], float]


# Algorithms: pure functions of a cost of samplers in planning's notation -----


def ternary(cost: Callable[[int], float], low: int, high: int) -> int:
  """Finds the index in [low, high] of least cost, assumed unimodal.

  Compares the interval at its thirds and drops the worse side, until at most
  three indices remain, which are all evaluated.
  """
  while high - low >= 3:
    first = low + (high - low) // 3
    second = high - (high - low) // 3
    if cost(first) < cost(second):
      high = second
    else:
      low = first
  return min(range(low, high + 1), key=cost)


def ternary_times(
    cost: Cost, grid: Sequence[float], nfe: int
) -> tuple[float, ...]:
  """Finds the times of cm_multistep, one after another.

  Args:
    cost: cost of a sampler in planning's notation.
    grid: descending candidates; the first is the initial level, the last the
      final one.
    nfe: network evaluations; nfe - 1 times are searched.

  Returns:
    The nfe - 1 times, descending.
  """
  times: tuple[float, ...] = ()
  start = 1
  for k in range(nfe - 1):

    def cost_at(i, times=times):
      return cost(planning.write("cm_multistep", (*times, grid[i])))

    # Leaves at least one grid index for each of the remaining times.
    best = ternary(cost_at, start, len(grid) - 2 - (nfe - 2 - k))
    times, start = (*times, grid[best]), best + 1
  return times


def greedy_times(
    cost: Cost,
    name: str,
    nfe: int,
    mid_times: Sequence[float],
    pairs: Sequence[tuple[float, float]],
) -> str:
  """Finds the best sampler of a greedy grid search, in planning's notation.

  Args:
    cost: cost of a sampler in planning's notation.
    name: 'ancestral', 'zigzag' or 'mixture'.
    nfe: network evaluations; a mixture has one zigzag.
    mid_times: candidates for intermediate times.
    pairs: candidates (e, t) for a zigzag.
  """
  zigzags = {"ancestral": 0, "zigzag": (nfe - 1) // 2, "mixture": 1}[name]
  times: tuple[float, ...] = ()
  chosen: tuple[tuple[float, float], ...] = ()
  # Without its zigzags a sampler is an ancestral one.
  for _ in range(nfe - 1 - 2 * zigzags):
    below = [t for t in mid_times if not times or t < times[-1]]
    times = min(
        ((*times, t) for t in below),
        key=lambda ts: cost(planning.write("ancestral", ts)),
    )
  for _ in range(zigzags):
    chosen = min(
        ((*chosen, p) for p in pairs),
        key=lambda ps: cost(planning.write(name, times, ps)),
    )
  return planning.write(name, times, chosen)


# The command ----------------------------------------------------------------


class Record:
  """Measured costs, saved to a JSON file.

  Args:
    path: path of the file; read if it exists.
    facts: settings that the costs depend on.
    measure: sampler -> cost.
  """

  def __init__(self, path: str, facts: dict[str, Any], measure: Cost):
    self._path, self._measure = path, measure
    self.content = {"costs": {}, "best": None} | facts
    if os.path.exists(path):
      try:
        costs = dict(files.read_json(path)["costs"])
        if not all(isinstance(x, float) for x in costs.values()):
          raise ValueError("a cost is not a number")
      except (ValueError, TypeError, KeyError) as e:
        raise errors.UserError(
            f"{path}: got a damaged file ({e!r}), expected the costs of a "
            "search; remove it to search again"
        ) from e
      self.content["costs"] = costs

  def __call__(self, sampler: str) -> float:
    costs = self.content["costs"]
    if sampler not in costs:
      costs[sampler] = self._measure(sampler)
      print(f"{sampler}: {costs[sampler]:.4f}")
      self.save()
    return costs[sampler]

  def save(self) -> None:
    """Writes the file atomically."""
    files.write_json(self._path, self.content)


def check(experiment: build.Experiment) -> None:
  """Raises UserError for an invalid search, before the checkpoint is loaded."""
  section = experiment.search
  minimum = {"ancestral": 2, "cm_multistep": 2, "zigzag": 3, "mixture": 4}
  name, nfe = section.sampler, section.nfe
  if nfe < minimum[name] or (name == "zigzag" and nfe % 2 == 0):
    odd = ", odd" if name == "zigzag" else ""
    raise errors.UserError(
        f"search.nfe: got {nfe} for {name}, expected {minimum[name]} or "
        f"more{odd}"
    )
  if name == "cm_multistep":
    if section.steps < nfe + 1:
      raise errors.UserError(
          f"search.steps: got {section.steps} grid points for {nfe - 1} inner "
          f"times, expected {nfe + 1} or more"
      )
    return
  # Candidates must be inside the trained range of noise levels.
  mid, pairs = _candidates(section)
  if len(set(mid)) < nfe - 1 and name == "ancestral":
    raise errors.UserError(
        f"search.mid_times: got {len(set(mid))} values for {nfe - 1} times, "
        f"expected {nfe - 1} or more"
    )
  for t in mid:
    planning.plan_of(experiment, planning.write("ancestral", (t,)))
  for pair in pairs if name != "ancestral" else ():
    planning.plan_of(experiment, planning.write("zigzag", (), (pair,)))


def _candidates(section: schema.Search):
  mid = sorted(section.mid_times, reverse=True)
  pairs = [
      (e, t) for e, t in itertools.product(section.noises, section.levels)
      if e < t
  ]
  return mid, pairs


def run(experiment: build.Experiment, workdir: str) -> dict[str, Any]:
  """Mode search: writes workdir/search/*.json and a plot of the costs.

  Returns:
    The content of the JSON file.
  """
  check(experiment)
  section = experiment.search
  step, average, params = runs.load_run(experiment, workdir)
  evaluation = evaluate.Evaluation(experiment, workdir)
  runner = batched_sampler.BatchedSampler(
      experiment, params, experiment.sample.batch_size
  )
  facts = {
      "sampler": section.sampler, "nfe": section.nfe, "step": step,
      "average": average, "num_samples": section.num_samples,
      "seed": section.seed, "distance": evaluation.features.distance,
  } | {"protocol": evaluation.facts}
  name = f"{section.sampler}_nfe{section.nfe}_{_digest(facts)}"
  record = Record(
      os.path.join(workdir, "search", f"{name}.json"), facts,
      lambda sampler: evaluation.distance(
          runner, planning.plan_of(experiment, sampler),
          section.num_samples, section.seed,
      ),
  )
  best = _search(experiment, section, record)
  record.content["best"] = best
  record.save()
  path = os.path.join(workdir, "search", f"{name}.png")
  draw.search(record.content, path)
  print(f"best: {best} at {record(best):.4f}; evaluate it with "
        f"--mode=eval --config.eval.samplers='{best}'\nplot: {path}")
  return record.content


def _search(experiment, section: schema.Search, cost: Cost) -> str:
  if section.sampler != "cm_multistep":
    return greedy_times(
        cost, section.sampler, section.nfe, *_candidates(section)
    )
  levels = experiment.levels
  grid = schedules.karras_sigmas(
      section.steps, levels.sigma_min, levels.sigma_max, experiment.method.rho
  )[::-1]
  # Rounded to the six digits of planning's notation.
  grid = [float(f"{t:g}") for t in np.asarray(grid)]
  return planning.write(
      "cm_multistep", ternary_times(cost, grid, section.nfe)
  )


def _digest(facts: dict[str, Any]) -> str:
  """Hash of all settings that the costs depend on, without the machine."""
  keys = ("features_digest", "reference_digest")
  rest = {k: v for k, v in facts.items() if k != "protocol"}
  rest |= {k: facts["protocol"][k] for k in keys}
  return hashlib.sha256(json.dumps(rest).encode()).hexdigest()[:8]
