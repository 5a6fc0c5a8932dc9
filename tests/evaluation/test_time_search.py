"""Search for times: algorithms over known costs, and resuming."""

import json
import types

import numpy as np
import pytest

from bcm_jax import errors
from bcm_jax.config import build
from bcm_jax.config import schema
from bcm_jax.evaluation import time_search
from bcm_jax.generate import planning
from bcm_jax.plots import draw
from tests.generate.test_planning import digits


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 40, 201])
def test_ternary_finds_every_valley_in_few_looks(size):
  for valley in range(size):
    looked = {}

    def cost(i, valley=valley, looked=looked):
      looked[i] = abs(i - valley) + 0.1 * (i > valley)
      return looked[i]

    assert time_search.ternary(cost, 0, size - 1) == valley
    # Two looks a third off, and the rest of four.
    assert len(looked) <= 4 + 2 * np.ceil(np.log(size) / np.log(1.5))


def valley_cost(*targets, count=None):
  """Cost of a sampler: how far its times are from targets, in log sigma."""

  def cost(sampler):
    if count is not None:
      count.append(sampler)
    request = planning.parse(sampler)
    numbers = [*(request.times or ())]
    for pair in request.pairs or ():
      numbers += pair
    missing = len(targets) - len(numbers)
    return missing + sum(
        (np.log(n) - np.log(t)) ** 2
        for n, t in zip(numbers, targets, strict=False)
    )

  return cost


def test_multistep_times_follow_one_another_down_the_grid():
  grid = [80.0, 40, 20, 10, 5, 2, 1, 0.5, 0.1, 0.002]
  assert time_search.ternary_times(valley_cost(10), grid, 2) == (10,)
  assert time_search.ternary_times(valley_cost(10, 1), grid, 3) == (10, 1)
  # The best first time would be the last inner one: room is left for three.
  assert time_search.ternary_times(valley_cost(0.1, 0.1, 0.1), grid, 4) == (
      1, 0.5, 0.1
  )


def test_greedy_grids_keep_what_they_found():
  mid, pairs = (4.0, 3, 2, 1), [(e, t) for e in (0.1, 0.2) for t in (0.4, 0.8)]
  looked = []
  best = time_search.greedy_times(
      valley_cost(3, count=looked), "ancestral", 2, mid, pairs
  )
  assert best == "ancestral@3"
  assert len(looked) == 4
  assert time_search.greedy_times(
      valley_cost(3, 1), "ancestral", 3, mid, pairs
  ) == "ancestral@3/1"
  assert time_search.greedy_times(
      valley_cost(0.2, 0.4), "zigzag", 3, mid, pairs
  ) == "zigzag@0.2>0.4"
  assert time_search.greedy_times(
      valley_cost(2, 0.1, 0.8), "mixture", 4, mid, pairs
  ) == "mixture@2/0.1>0.8"
  assert time_search.greedy_times(
      valley_cost(0.2, 0.4, 0.1, 0.8), "zigzag", 5, mid, pairs
  ) == "zigzag@0.2>0.4/0.1>0.8"


def test_a_search_goes_on_where_it_stopped(tmp_path, capsys):
  path, measured = str(tmp_path / "search" / "a.json"), []

  def measure(sampler):
    if len(measured) == 2:
      raise KeyboardInterrupt
    measured.append(sampler)
    return valley_cost(3)(sampler)

  def go():
    record = time_search.Record(path, {"nfe": 2}, measure)
    return time_search.greedy_times(record, "ancestral", 2, (4.0, 3, 2), ())

  with pytest.raises(KeyboardInterrupt):
    go()
  before, kept = list(measured), json.loads(open(path).read())["costs"]
  assert list(kept) == before == ["ancestral@4", "ancestral@3"]
  measured.clear()
  assert go() == "ancestral@3"
  assert measured == ["ancestral@2"]


def test_what_was_measured_is_plotted(tmp_path):
  costs = {"ancestral@4": 3.0, "ancestral@2": 2.0,
           "mixture@2/0.1>0.4": 1.0, "mixture@2/0.1>0.8": 1.5,
           "mixture@2/0.2>0.8": 1.2}
  path = tmp_path / "plots" / "a.png"
  draw.search(
      {"costs": costs, "best": "mixture@2/0.1>0.4", "distance": "FD (x)"},
      str(path),
  )
  assert path.read_bytes().startswith(b"\x89PNG")
  assert not list(path.parent.glob("*.tmp"))


@pytest.mark.parametrize("overrides, said", [
    ({"nfe": 1}, "search.nfe"),
    ({"sampler": "zigzag", "nfe": 4}, "search.nfe"),
    ({"sampler": "mixture", "nfe": 3}, "search.nfe"),
    ({"sampler": "cm_multistep", "nfe": 4, "steps": 4}, "search.steps"),
    ({"nfe": 4, "mid_times": (1.0, 2.0)}, "search.mid_times"),
    ({"mid_times": (100.0,)}, "100"),
    ({"sampler": "zigzag", "nfe": 3, "noises": (1e-9,)}, "1e-09"),
])
def test_searches_that_cannot_be_made(overrides, said):
  built = build.build(digits())
  section = schema.Search(**overrides)
  experiment = types.SimpleNamespace(
      levels=built.levels, method=built.method,
      search=section, sample=built.sample,
  )
  with pytest.raises(errors.UserError, match=said):
    time_search.check(experiment)
