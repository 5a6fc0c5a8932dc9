"""Every method on the digits under one protocol: trains, evaluates, tables.

  python benchmarks/methods_digits.py runs/methods            # all, hours
  python benchmarks/methods_digits.py runs/methods --only=cd --seeds=0
  python benchmarks/methods_digits.py --table                 # the page again

Trains the teacher and every method from it, for every seed, by the commands
that docs/methods.md names; measures all with the features of one classifier,
1,437 samples, three seeds of noise; keeps what mode eval wrote in
docs/results/methods_digits and writes the tables into docs/methods.md. What
the work directory holds is kept: a run goes on where it stopped, and one that
was measured is not measured again. What a step costs is
benchmarks/step_cost.py's.
"""

import argparse
from collections.abc import Iterable, Mapping
import contextlib
import json
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import textwrap
from typing import Any, NamedTuple

from bcm_jax.evaluation import published
from bcm_jax.evaluation import tables
from bcm_jax.utils import cli
from bcm_jax.utils import files

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results" / "methods_digits"
COST = ROOT / "docs" / "results" / "step_cost_digits.json"
PAGE = ROOT / "docs" / "methods.md"
# What stands between such marks is written here.
MARKED = re.compile(r"(<!-- digits: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
FEATURES = "FD (digits ResNet)"


class Run(NamedTuple):
  """A method's run.

  Attributes:
    config: file in configs/.
    samplers: that are measured.
    needs: flag of the config -> place below the run of another method.
  """

  config: str
  samplers: str
  needs: Mapping[str, str] = {}


_TEACHER = {"method.teacher": "edm"}
_MULTISTEP = "onestep,cm_multistep:2,cm_multistep:4,cm_multistep:8"
_JUMPS = "ancestral:2,ancestral:4,ancestral:8"
RUNS = {
    "edm": Run("digits_edm.py", "heun,heun:7,ddim:8"),
    "ict": Run("digits_ict.py", _MULTISTEP),
    "bcm": Run("digits.py", f"onestep,{_JUMPS}"),
    "cd": Run("digits_cd.py", _MULTISTEP, _TEACHER),
    "ctm": Run("digits_ctm.py", f"{_MULTISTEP},{_JUMPS}", _TEACHER),
    "ctm_gan": Run(
        "digits_ctm.py:gan", f"{_MULTISTEP},{_JUMPS}",
        _TEACHER | {"training.init_from": "ctm"},
    ),
    "dmd": Run(
        "digits_dmd.py:dmd", "onestep",
        _TEACHER | {"data.pairs": "edm/pairs.npz"},
    ),
    "dmd2_no_gan": Run("digits_dmd.py:no_gan", "onestep", _TEACHER),
    "dmd2": Run("digits_dmd.py", "onestep", _TEACHER),
}
# Made once, whatever the seed: all students share a teacher.
_ONCE = ("edm",)


def _do(*arguments: str | pathlib.Path) -> None:
  print("$ python -m", *arguments, flush=True)
  subprocess.run([sys.executable, "-m", *map(str, arguments)], check=True,
                 cwd=ROOT)


def folder(work: pathlib.Path, name: str, seed: int) -> pathlib.Path:
  """Work directory of a run."""
  return work / (name if name in _ONCE else f"{name}-seed{seed}")


def train(work: pathlib.Path, name: str, seed: int) -> None:
  """Trains a method and measures it, as far as that is not done."""
  run, place = RUNS[name], folder(work, name, seed)
  needs = []
  for flag, other in run.needs.items():
    first, _, rest = other.partition("/")
    path = folder(work, first, seed) / rest
    needs.append(f"--config.{flag}={path}")
  if not (place / "DONE").exists():
    _do("bcm_jax.main", f"--config=configs/{run.config}", f"--workdir={place}",
        f"--config.seed={seed}", "--config.eval.at_end=False", *needs)
  if name == "edm" and not (place / "pairs.npz").exists():
    _do("bcm_jax.main", f"--workdir={place}", "--mode=pairs",
        "--config.sample.num_samples=10000")
  if not list(place.glob("eval/*.json")):
    _do("bcm_jax.main", f"--workdir={place}", "--mode=eval", *needs,
        f"--config.eval.samplers={run.samplers}",
        "--config.eval.features=classifier",
        f"--config.eval.features_path={work / 'classifier'}",
        "--config.eval.num_samples=1437", "--config.eval.seeds=0,1,2",
        "--config.eval.num_real_for_prdc=None", "--config.eval.inversion_nfe=")
  newest = max(place.glob("eval/*.json"), key=lambda p: int(p.stem))
  RESULTS.mkdir(parents=True, exist_ok=True)
  shutil.copy(newest, RESULTS / f"{place.name}.json")


# The table ------------------------------------------------------------------


def read() -> dict[str, list[dict[str, Any]]]:
  """Results by method, one of every seed of training."""
  found = {}
  for name in RUNS:
    paths = sorted(
        [*RESULTS.glob(f"{name}.json"), *RESULTS.glob(f"{name}-seed*.json")]
    )
    if paths:
      found[name] = [json.loads(p.read_text()) for p in paths]
  return found


def numbers(
    results: Iterable[Mapping[str, Any]], sampler: str, metric: str
) -> tuple[float, float]:
  """Mean and spread of a metric over seeds: of training, or else of noise."""
  runs = [r["samplers"][sampler] for r in results]
  if len(runs) == 1:
    return runs[0][metric], runs[0]["std"][metric]
  values = [r[metric] for r in runs]
  return statistics.fmean(values), statistics.stdev(values)


def rows(found: Mapping[str, list[dict[str, Any]]]) -> Iterable[list[str]]:
  """Lines of the table."""
  teacher = None
  if "edm" in found:
    full = next(iter(found["edm"][0]["samplers"]))
    teacher, _ = numbers(found["edm"], full, FEATURES)
  for name, results in found.items():
    for key, sampler in results[0]["samplers"].items():
      mean, std = numbers(results, key, FEATURES)
      share, precision, recall = (
          numbers(results, key, m)[0]
          for m in ("class_accuracy", "precision", "recall")
      )
      yield [
          f"`{name}`", key.rpartition("_nfe")[0], str(sampler["nfe"]),
          f"{mean:.3f} ± {std:.3f}",
          tables.NOT_RUN if teacher is None else f"{mean / teacher:.2f}",
          f"{share:.1%}", f"{precision:.2f}", f"{recall:.2f}",
          f"{results[0]['training']['images']:,}",
          f"{statistics.fmean(_minutes(results)):.1f}", str(len(results)),
      ]


def _minutes(results) -> Iterable[float]:
  return [r["training"]["seconds"] / 60 for r in results]


def table() -> str:
  """The table of all results that are there."""
  head = [
      "run", "sampler", "NFE", FEATURES, "ratio to teacher", "class accuracy",
      "precision", "recall", "training images", "training minutes", "n",
  ]
  found = read()
  return tables.markdown(head, rows(found)) if found else "Not run yet."


def costs() -> Mapping[str, float]:
  """Time of a step over iCT's, by method."""
  if not COST.exists():
    return {}
  methods = json.loads(COST.read_text())["methods"]
  return {name: row["ratio"] for name, row in methods.items()}


def sentence(name: str) -> str:
  """A method's numbers in words."""
  found, cost = read(), costs().get(name)
  parts = []
  if name in found:
    parts += [
      f"{mean:.3f} ± {std:.3f} with {sampler['nfe']} NFE "
      f"({key.rpartition('_nfe')[0]})"
      for key, sampler in found[name][0]["samplers"].items()
      for mean, std in [numbers(found[name], key, FEATURES)]
    ]
  reached = ", ".join(parts) or tables.NOT_RUN
  step = tables.NOT_RUN if cost is None else f"{cost:.2f}"
  return (
    f"Digits, `{name}`, {FEATURES}: {reached} "
    f"(n = {len(found.get(name, ()))}). Step time relative to iCT: {step}."
    f"{_published(name)}"
  )


def _published(name: str) -> str:
  """Papers' FIDs of a method; '' if there are none."""
  found: dict[tuple[str, str, str], list[published.Published]] = {}
  for row in published.ROWS:
    if row.ours == name and row.verified:
      found.setdefault((row.data, row.method, row.source), []).append(row)
  parts = [
    f"{method} on {data} "
    + " / ".join(f"{r.numbers['FID']:.2f}" for r in rows)
    + " with "
    + " / ".join(str(r.nfe) for r in rows)
    + f" NFE ({source})"
    for (data, method, source), rows in found.items()
  ]
  return f" Published FID: {'; '.join(parts)}." if parts else ""


# What was expected before anything was run -----------------------------------


def expectations() -> str:
  """What was expected, and what came out, as a Markdown list."""
  found = read()
  lines = [_near_teacher(found, name) for name in ("cd", "ctm", "dmd2")]
  lines += [
    _more_steps(found, "ctm", "ancestral", False),
    _more_steps(found, "cd", "cm_multistep", True),
    _worse(found, "dmd2_no_gan", "dmd2"),
  ]
  return "\n".join(
    textwrap.fill(f"* {line}", 80, subsequent_indent="  ") for line in lines
  )


def _one_step(found, name: str) -> tuple[float, float] | None:
  if name not in found:
    return None
  return numbers(found[name], "onestep_nfe1", FEATURES)


def _near_teacher(found, name: str) -> str:
  claim = f"`{name}` in one step within 1.5 times the teacher's distance: "
  mine = _one_step(found, name)
  if mine is None or "edm" not in found:
    return claim + tables.NOT_RUN
  full = next(iter(found["edm"][0]["samplers"]))
  ratio = mine[0] / numbers(found["edm"], full, FEATURES)[0]
  return claim + f"{ratio:.2f} times, {'yes' if ratio <= 1.5 else 'no'}"


def _more_steps(found, name: str, sampler: str, rises: bool) -> str:
  """Whether the distance rises from one step to the most, beyond spreads."""
  way = "gets" if rises else "does not get"
  claim = f"`{name}` {way} worse with more steps"
  if name not in found:
    return f"{claim}: {tables.NOT_RUN}"
  keys = ["onestep_nfe1"] + [
    k for k in found[name][0]["samplers"] if k.startswith(sampler)
  ]
  values = [numbers(found[name], k, FEATURES) for k in keys]
  (first, a), (last, b) = values[0], values[-1]
  nfe = [str(found[name][0]["samplers"][k]["nfe"]) for k in keys]
  said = "yes" if (last - first > a + b) == rises else "no"
  text = " / ".join(f"{v:.3f} ± {s:.3f}" for v, s in values)
  return f"{claim} ({sampler}): {text} with {' / '.join(nfe)} NFE, {said}"


def _worse(found, name: str, other: str) -> str:
  claim = f"`{name}` is worse than `{other}` in one step: "
  mine, its = _one_step(found, name), _one_step(found, other)
  if mine is None or its is None:
    return claim + tables.NOT_RUN
  said = "yes" if mine[0] - its[0] > mine[1] + its[1] else "no"
  return (
    claim + f"{mine[0]:.3f} ± {mine[1]:.3f} and {its[0]:.3f} ± {its[1]:.3f}, "
    f"{said}"
  )


# The page -------------------------------------------------------------------


def page(text: str) -> str:
  """docs/methods.md with what is between its marks made anew."""

  def fill(match: re.Match) -> str:
    name = match[2]
    if name in _BLOCKS:
      made = _BLOCKS[name]()
    else:
      made = textwrap.fill(sentence(name), 80)
    return f"{match[1]}{made}\n{match[3]}"

  return MARKED.sub(fill, text)


_BLOCKS = {"table": table, "expectations": expectations}


def write_page() -> None:
  """Writes docs/methods.md."""
  text = page(PAGE.read_text(encoding="utf-8"))
  files.write_bytes(str(PAGE), text.encode())
  print(f"written: {PAGE}")


def main(argv: list[str] | None = None) -> None:
  """Trains, measures and writes what is missing."""
  parser = cli.Parser("benchmarks/methods_digits.py", __doc__)
  parser.add_argument("work", nargs="?", default="runs/methods")
  parser.add_argument("--only", default=",".join(RUNS), metavar="cd,ctm")
  parser.add_argument("--seeds", default="0,1,2", metavar="0,1,2")
  parser.add_argument("--table", action="store_true")
  args: argparse.Namespace = parser.parse_args(
    sys.argv[1:] if argv is None else argv
  )
  work = pathlib.Path(args.work).resolve()
  if not args.table:
    if not (work / "classifier" / "classifier.json").exists():
      _do(
        "bcm_jax.tools.train_classifier",
        "--config=configs/digits.py",
        f"--out={work / 'classifier'}",
      )
    seeds = [int(seed) for seed in args.seeds.split(",")]
    for seed in seeds:
      for name in args.only.split(","):
        if seed == seeds[0] or name not in _ONCE:
          train(work, name, seed)
  write_page()


if __name__ == "__main__":
  with contextlib.suppress(KeyboardInterrupt), cli.reporting():
    main()
