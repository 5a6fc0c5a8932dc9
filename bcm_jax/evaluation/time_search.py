"""Search for a sampler's times: mode search.

Multistep consistency sampling is searched as its authors did (Song et al.,
2023, appendix C): ternary search over the indices of a Karras grid. Ancestral
and zigzag sampling take a greedy grid: one time after another, those found
before kept. Every candidate gets the same noise. What was measured is written
down at once, so that a search goes on where it was stopped.
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


# Algorithms: pure, over a cost of samplers in planning's notation -----------


def ternary(cost: Callable[[int], float], low: int, high: int) -> int:
  """Index in [low, high] of the least cost, taken to have one valley.

  The interval is cut at its thirds and the worse side dropped until at most
  three indices remain, which are all looked at.
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
  """Times of cm_multistep, one after another.

  Args:
    cost: of a sampler in planning's notation.
    grid: descending candidates, the first is where sampling starts and the
      last where it ends.
    nfe: evaluations; nfe - 1 times are found.
  """
  found: tuple[float, ...] = ()
  start = 1
  for k in range(nfe - 1):

    def cost_at(i, found=found):
      return cost(planning.write("cm_multistep", (*found, grid[i])))

    # Room is left for the times that are still to come.
    best = ternary(cost_at, start, len(grid) - 2 - (nfe - 2 - k))
    found, start = (*found, grid[best]), best + 1
  return found


def greedy_times(
    cost: Cost,
    name: str,
    nfe: int,
    mid_times: Sequence[float],
    pairs: Sequence[tuple[float, float]],
) -> str:
  """The best sampler of a greedy grid, in planning's notation.

  Args:
    cost: of a sampler in planning's notation.
    name: 'ancestral', 'zigzag' or 'mixture'.
    nfe: evaluations; a mixture has one zigzag.
    mid_times: candidates of intermediate times.
    pairs: candidates (e, t) of a zigzag.
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
  """Costs measured so far, in a file of their own.

  Args:
    path: of the JSON file; read if it is there.
    facts: what the costs depend on.
    measure: sampler -> cost.
  """

  def __init__(self, path: str, facts: dict[str, Any], measure: Cost):
    self._path, self._measure = path, measure
    self.content = {"costs": {}, "best": None} | facts
    if os.path.exists(path):
      with open(path, encoding="utf-8") as f:
        self.content["costs"] = json.load(f)["costs"]

  def __call__(self, sampler: str) -> float:
    costs = self.content["costs"]
    if sampler not in costs:
      costs[sampler] = self._measure(sampler)
      print(f"{sampler}: {costs[sampler]:.4f}")
      self.save()
    return costs[sampler]

  def save(self) -> None:
    """Writes the file, whole or not at all."""
    files.write_json(self._path, self.content)


def check(experiment: build.Experiment) -> None:
  """Finds a search that cannot be made before the checkpoint is read."""
  section = experiment.search
  least = {"ancestral": 2, "cm_multistep": 2, "zigzag": 3, "mixture": 4}
  name, nfe = section.sampler, section.nfe
  if nfe < least[name] or (name == "zigzag" and nfe % 2 == 0):
    odd = ", odd" if name == "zigzag" else ""
    raise errors.UserError(
        f"search.nfe={nfe} leaves {name} nothing to search; expected "
        f"{least[name]} or more{odd}"
    )
  if name == "cm_multistep":
    if section.steps < nfe + 1:
      raise errors.UserError(
          f"search.steps={section.steps} grid points hold no {nfe - 1} inner "
          f"times; set search.steps to {nfe + 1} or more"
      )
    return
  # The first candidates must make a plan that this network can run.
  mid, pairs = _candidates(section)
  if len(set(mid)) < nfe - 1 and name == "ancestral":
    raise errors.UserError(
        f"search.mid_times has {len(set(mid))} values for {nfe - 1} times; "
        "give more"
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
  """Mode search: writes workdir/search/*.json and a plot beside it."""
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
  # Six digits, as the notation writes them.
  grid = [float(f"{t:g}") for t in np.asarray(grid)]
  return planning.write(
      "cm_multistep", ternary_times(cost, grid, section.nfe)
  )


def _digest(facts: dict[str, Any]) -> str:
  """Names a search by all that its costs depend on, but not by the machine."""
  keys = ("features_digest", "reference_digest")
  rest = {k: v for k, v in facts.items() if k != "protocol"}
  rest |= {k: facts["protocol"][k] for k in keys}
  return hashlib.sha256(json.dumps(rest).encode()).hexdigest()[:8]
