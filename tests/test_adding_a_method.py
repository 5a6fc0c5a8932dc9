"""The example of docs/methods.md, 'Adding a method', runs as it stands."""

import pathlib
import re
import sys
import types

import jax
import numpy as np
import optax
import pytest

from bcm_jax import errors
from bcm_jax import methods
from bcm_jax.config import build
from bcm_jax.config import registry
from bcm_jax.config import resolve
from bcm_jax.methods import base
from bcm_jax.tools import inspect_config
from bcm_jax.training import train_step
from tests import quick
from tests import toys

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "methods.md"
BLOCK = re.compile(r"<!-- code: (\w+) -->\n```python\n(.*?)```", re.DOTALL)
CODE = dict(BLOCK.findall(PAGE.read_text(encoding="utf-8")))


@pytest.fixture
def example(monkeypatch):
  """The method's module, registered as the page says."""
  module = types.ModuleType("bcm_jax.methods.ratio")
  monkeypatch.setitem(sys.modules, module.__name__, module)
  monkeypatch.setattr(methods, "ratio", module, raising=False)
  exec(compile(CODE["method"], "ratio.py", "exec"), module.__dict__)
  table = dict(registry.METHODS)
  monkeypatch.setattr(registry, "METHODS", table)
  exec(CODE["registry"], {
      "METHODS": table, "Method": registry.Method, "ratio": module
  })
  return module


def config(**overrides):
  space = {}
  exec(CODE["config"], space)
  values = toys.TINY | {k.replace("__", "."): v for k, v in overrides.items()}
  return resolve.resolve(space["get_config"](), values)


def test_the_page_has_all_four_parts():
  assert set(CODE) == {"method", "registry", "config", "test"}


def test_the_example_trains_three_steps(example):
  built = build.build(config(training__batch_size="4"))
  method = built.method
  assert isinstance(method, example.RatioTraining)
  state = quick.jit(lambda: build.create_state(built))()
  step = jax.jit(
      train_step.make_step(
          method, {"student": optax.adam(1e-2)},
          train_step.StepOptions(ema_rates=built.training.ema_rates),
      ),
      static_argnames="phase",
  )
  state = state.replace(networks={
      "student": state.networks["student"].replace(
          opt_state=optax.adam(1e-2).init(state.networks["student"].params)
      )
  })
  before = state.networks["student"].params
  rng = np.random.default_rng(0)
  for k in range(3):
    batch = {
        "image": rng.integers(0, 256, (4, 8, 8, 1), np.uint8),
        "label": np.arange(4, dtype=np.int32), "index": np.arange(4),
    }
    state, metrics = step(
        state, batch, method.curriculum(k), method.phase(k)
    )
    assert np.isfinite(metrics["loss"]) and metrics["loss"] > 0
    assert metrics["loss"] == metrics["loss_ratio"]
  assert state.step == 3 and state.skipped == 0
  moved = jax.tree.map(
    lambda a, b: np.abs(a - b).max(), before, state.networks["student"].params
  )
  assert max(jax.tree.leaves(moved)) > 1e-3


def test_the_examples_declarations_take_effect(example):
  with pytest.raises(errors.UserError, match="method.ratio: got 1.5"):
    build.build(config(method__ratio="1.5"))
  with pytest.raises(errors.UserError, match="did you mean"):
    config(method__rato="0.5")
  assert registry.METHODS["ratio"].title == example.RatioTraining.title
  report = inspect_config.report(config(), None, None)
  assert "t (20000 draws)" in report and "method.ratio" in report


def test_the_examples_own_test_passes(example):
  space = {}
  exec(CODE["test"], space)
  space["test_levels_keep_their_ratio"]()


def test_every_field_of_the_context_is_listed():
  page = PAGE.read_text(encoding="utf-8")
  table = page[page.index("| `ctx.` | is |"):page.index("What a method may")]
  for field in base.Context._fields:
    assert f"`{field}" in table, field
