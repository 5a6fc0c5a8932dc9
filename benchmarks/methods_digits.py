"""Compares all methods on the digits: trains, evaluates, renders tables.

  python benchmarks/methods_digits.py runs/methods            # all, hours
  python benchmarks/methods_digits.py runs/methods --only=cd --seeds=0
  python benchmarks/methods_digits.py --table                 # renders only

Trains the teacher and every method from it, for every seed, by the commands of
docs/methods.md; evaluates all with the features of one classifier, 1,437
samples and three seeds of noise; copies the results to
docs/results/methods_digits and renders the tables of docs/methods.md. Runs in
the work directory are resumed, and evaluated runs are not evaluated again. See
benchmarks/step_cost.py for the cost of a training step.
"""

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
# Blocks of the page that are rendered.
MARKED = re.compile(r"(<!-- digits: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
FEATURES = "FD (digits ResNet)"


class Run(NamedTuple):
  """Run of a method.

  Attributes:
    config: file in configs/.
    samplers: samplers to evaluate.
    needs: config flag -> path relative to the run of another method.
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
    "bcm": Run("digits.py", f"onestep,{_JUMPS},mixture@0.7/0.1>0.4"),
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
# Trained for one seed only: all students share a teacher.
_ONCE = ("edm",)


def _run_module(*arguments: str | pathlib.Path) -> None:
  print("$ python -m", *arguments, flush=True)
  subprocess.run([sys.executable, "-m", *map(str, arguments)], check=True,
                 cwd=ROOT)


def folder(work: pathlib.Path, name: str, seed: int) -> pathlib.Path:
  """Returns the work directory of a run."""
  return work / (name if name in _ONCE else f"{name}-seed{seed}")


def train(work: pathlib.Path, name: str, seed: int) -> None:
  """Trains and evaluates a method; skips finished steps."""
  run, workdir = RUNS[name], folder(work, name, seed)
  needs = []
  for flag, other in run.needs.items():
    first, _, rest = other.partition("/")
    path = folder(work, first, seed) / rest
    needs.append(f"--config.{flag}={path}")
  if not (workdir / "DONE").exists():
    _run_module(
        "bcm_jax.main", f"--config=configs/{run.config}",
        f"--workdir={workdir}", f"--config.seed={seed}",
        "--config.eval.at_end=False", *needs,
    )
  if name == "edm" and not (workdir / "pairs.npz").exists():
    _run_module(
        "bcm_jax.main", f"--workdir={workdir}", "--mode=pairs",
        "--config.sample.num_samples=10000",
    )
  if not list(workdir.glob("eval/*.json")):
    _run_module(
        "bcm_jax.main", f"--workdir={workdir}", "--mode=eval", *needs,
        f"--config.eval.samplers={run.samplers}",
        "--config.eval.features=classifier",
        f"--config.eval.features_path={work / 'classifier'}",
        "--config.eval.num_samples=1437", "--config.eval.seeds=0,1,2",
        "--config.eval.num_real_for_prdc=None", "--config.eval.inversion_nfe=",
    )
  newest = max(workdir.glob("eval/*.json"), key=lambda p: int(p.stem))
  RESULTS.mkdir(parents=True, exist_ok=True)
  shutil.copy(newest, RESULTS / f"{workdir.name}.json")


# The table ------------------------------------------------------------------


def read() -> dict[str, list[dict[str, Any]]]:
  """Reads the results by method, one per training seed."""
  results = {}
  for name in RUNS:
    paths = sorted(
        [*RESULTS.glob(f"{name}.json"), *RESULTS.glob(f"{name}-seed*.json")]
    )
    if paths:
      results[name] = [json.loads(p.read_text()) for p in paths]
  return results


def numbers(
    results: Iterable[Mapping[str, Any]], sampler: str, metric: str
) -> tuple[float, float]:
  """Mean and standard deviation of a metric over seeds.

  Over training seeds if there are several, otherwise over seeds of the noise.
  """
  runs = [r["samplers"][sampler] for r in results]
  if len(runs) == 1:
    return runs[0][metric], runs[0]["std"][metric]
  values = [r[metric] for r in runs]
  return statistics.fmean(values), statistics.stdev(values)


def rows(by_method: Mapping[str, list[dict[str, Any]]]) -> Iterable[list[str]]:
  """Yields the rows of the table."""
  teacher = None
  if "edm" in by_method:
    sampler = next(iter(by_method["edm"][0]["samplers"]))
    teacher, _ = numbers(by_method["edm"], sampler, FEATURES)
  for name, results in by_method.items():
    for key, sampler in results[0]["samplers"].items():
      mean, std = numbers(results, key, FEATURES)
      accuracy, precision, recall = (
          numbers(results, key, m)[0]
          for m in ("class_accuracy", "precision", "recall")
      )
      yield [
          f"`{name}`", key.rpartition("_nfe")[0], str(sampler["nfe"]),
          f"{mean:.3f} ± {std:.3f}",
          tables.NOT_RUN if teacher is None else f"{mean / teacher:.2f}",
          f"{accuracy:.1%}", f"{precision:.2f}", f"{recall:.2f}",
          f"{results[0]['training']['images']:,}",
          f"{statistics.fmean(_minutes(results)):.1f}", str(len(results)),
      ]


def _minutes(results) -> Iterable[float]:
  return [r["training"]["seconds"] / 60 for r in results]


def table() -> str:
  """Formats a table of all results."""
  head = [
      "run", "sampler", "NFE", FEATURES, "ratio to teacher", "class accuracy",
      "precision", "recall", "training images", "training minutes", "n",
  ]
  results = read()
  return tables.markdown(head, rows(results)) if results else "Not run yet."


def costs() -> Mapping[str, float]:
  """Reads the time of a training step relative to iCT's, by method."""
  if not COST.exists():
    return {}
  methods = json.loads(COST.read_text())["methods"]
  return {name: row["ratio"] for name, row in methods.items()}


def sentence(name: str) -> str:
  """Formats the results of a method as a sentence."""
  results, cost = read(), costs().get(name)
  parts = []
  if name in results:
    parts += [
      f"{mean:.3f} ± {std:.3f} with {sampler['nfe']} NFE "
      f"({key.rpartition('_nfe')[0]})"
      for key, sampler in results[name][0]["samplers"].items()
      for mean, std in [numbers(results[name], key, FEATURES)]
    ]
  distances = ", ".join(parts) or tables.NOT_RUN
  step = tables.NOT_RUN if cost is None else f"{cost:.2f}"
  return (
    f"Digits, `{name}`, {FEATURES}: {distances} "
    f"(n = {len(results.get(name, ()))}). Step time relative to iCT: {step}."
    f"{_published(name)}"
  )


def _published(name: str) -> str:
  """Formats the published FIDs of a method; '' without any."""
  groups: dict[tuple[str, str, str], list[published.Published]] = {}
  for row in published.ROWS:
    if row.ours == name and row.verified:
      groups.setdefault((row.data, row.method, row.source), []).append(row)
  parts = [
    f"{method} on {data} "
    + " / ".join(f"{r.numbers['FID']:.2f}" for r in rows)
    + " with "
    + " / ".join(str(r.nfe) for r in rows)
    + f" NFE ({source})"
    for (data, method, source), rows in groups.items()
  ]
  return f" Published FID: {'; '.join(parts)}." if parts else ""


# Hypotheses, fixed before the first run --------------------------------------


def expectations() -> str:
  """Formats hypotheses and outcomes as a Markdown list."""
  results = read()
  lines = [_near_teacher(results, name) for name in ("cd", "ctm", "dmd2")]
  lines += [
    _more_steps(results, "ctm", "ancestral", False),
    _more_steps(results, "cd", "cm_multistep", True),
    _worse(results, "dmd2_no_gan", "dmd2"),
  ]
  return "\n".join(
    textwrap.fill(f"* {line}", 80, subsequent_indent="  ") for line in lines
  )


def _one_step(results, name: str) -> tuple[float, float] | None:
  if name not in results:
    return None
  return numbers(results[name], "onestep_nfe1", FEATURES)


def _near_teacher(results, name: str) -> str:
  claim = f"`{name}` in one step within 1.5 times the teacher's distance: "
  student = _one_step(results, name)
  if student is None or "edm" not in results:
    return claim + tables.NOT_RUN
  sampler = next(iter(results["edm"][0]["samplers"]))
  ratio = student[0] / numbers(results["edm"], sampler, FEATURES)[0]
  return claim + f"{ratio:.2f} times, {'yes' if ratio <= 1.5 else 'no'}"


def _more_steps(results, name: str, sampler: str, rises: bool) -> str:
  """Tests if the distance rises with NFE by more than the deviations."""
  verb = "gets" if rises else "does not get"
  claim = f"`{name}` {verb} worse with more steps"
  if name not in results:
    return f"{claim}: {tables.NOT_RUN}"
  keys = ["onestep_nfe1"] + [
    k for k in results[name][0]["samplers"] if k.startswith(sampler)
  ]
  values = [numbers(results[name], k, FEATURES) for k in keys]
  (first, a), (last, b) = values[0], values[-1]
  nfe = [str(results[name][0]["samplers"][k]["nfe"]) for k in keys]
  said = "yes" if (last - first > a + b) == rises else "no"
  text = " / ".join(f"{v:.3f} ± {s:.3f}" for v, s in values)
  return f"{claim} ({sampler}): {text} with {' / '.join(nfe)} NFE, {said}"


def _worse(results, name: str, other: str) -> str:
  claim = f"`{name}` is worse than `{other}` in one step: "
  a, b = _one_step(results, name), _one_step(results, other)
  if a is None or b is None:
    return claim + tables.NOT_RUN
  outcome = "yes" if a[0] - b[0] > a[1] + b[1] else "no"
  return (
    claim + f"{a[0]:.3f} ± {a[1]:.3f} and {b[0]:.3f} ± {b[1]:.3f}, {outcome}"
  )


# The page -------------------------------------------------------------------


def page(text: str) -> str:
  """Renders the marked blocks of docs/methods.md."""

  def fill(match: re.Match) -> str:
    name = match[2]
    if name in _BLOCKS:
      content = _BLOCKS[name]()
    else:
      content = textwrap.fill(sentence(name), 80)
    return f"{match[1]}{content}\n{match[3]}"

  return MARKED.sub(fill, text)


_BLOCKS = {"table": table, "expectations": expectations}


def write_page() -> None:
  """Writes docs/methods.md."""
  text = page(PAGE.read_text(encoding="utf-8"))
  files.write_bytes(str(PAGE), text.encode())
  print(f"written: {PAGE}")


def main(argv: list[str] | None = None) -> None:
  """Runs the command."""
  parser = cli.Parser("benchmarks/methods_digits.py", __doc__)
  add = parser.add_argument
  add("work", nargs="?", default="runs/methods",
      help="directory of all runs (%(default)s)")
  add("--only", default=",".join(RUNS), metavar="cd,ctm",
      help="runs to do (all)")
  add("--seeds", default="0,1,2", metavar="0,1,2", help="seeds (%(default)s)")
  add("--table", action="store_true", help="only render docs/methods.md again")
  args = parser.parse_args(argv)
  work = pathlib.Path(args.work).resolve()
  if not args.table:
    if not (work / "classifier" / "classifier.json").exists():
      _run_module(
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
