"""A checkpoint in, numbers out: mode eval, and the end of training.

The protocol is that of the papers: 50,000 samples, all classes in equal
shares, as 8-bit images, against statistics of the training set; several seeds
are told one by one, with mean and spread, never a minimum alone.
"""

from collections.abc import Iterator
import os
import time
from typing import Any

from absl import logging
import jax
import numpy as np

from bcm_jax import errors
from bcm_jax import sample
from bcm_jax.checkpoint import checkpoint
from bcm_jax.checkpoint import runs
from bcm_jax.config import build
from bcm_jax.config import schema
from bcm_jax.editing import edit
from bcm_jax.editing import pretrained
from bcm_jax.evaluation import bits_per_dim
from bcm_jax.evaluation import inversion
from bcm_jax.evaluation import references
from bcm_jax.generate import batched_sampler
from bcm_jax.generate import planning
from bcm_jax.generate import rejection
from bcm_jax.metrics import class_accuracy
from bcm_jax.metrics import fid
from bcm_jax.metrics import moments
from bcm_jax.metrics import nearest_neighbors
from bcm_jax.metrics import quality
from bcm_jax.plots import draw
from bcm_jax.training import goodput
from bcm_jax.utils import files
from bcm_jax.utils import provenance

# Samples that published numbers are taken of.
PROTOCOL_SAMPLES = 50_000
# Data set -> classifier that says which class an image shows.
JUDGES = {"digits": class_accuracy.DigitJudge}
# Memorisation looks up every image in pixels; larger sets than this wait.
_MEMORISATION_IMAGES = 5000
_STEPS = ("last", "all", "follow")
# Seconds between two looks for a new checkpoint.
_POLL_SECS = 30.0


class Evaluation:
  """What all checkpoints and averages of a run are measured with.

  Raises:
    UserError: on making it, for fewer samples than the protocol's without
      eval.allow_fewer_samples, features or references that cannot be used, and
      bad samplers or times.
  """

  def __init__(self, experiment: build.Experiment, workdir: str):
    self.experiment, self.workdir = experiment, workdir
    self.section = experiment.eval
    check_outputs(experiment)
    check_protocol(self.section)
    self.features = references.open_features(self.section)
    self.target = references.open_target(
        experiment, self.features, os.path.join(workdir, "eval")
    )
    self.judge, self.judge_accuracy = None, None
    self.neighbours: tuple[np.ndarray, np.ndarray] | None = None
    self._open_small()
    self.facts = provenance.facts(experiment.config) | self._protocol()

  def _open_small(self) -> None:
    """What only sets of few images are asked."""
    splits = [
        self.experiment.source_if_there(split) for split in ("train", "test")
    ]
    if None in splits or len(splits[0]) > _MEMORISATION_IMAGES:
      return
    train, test = (s.fetch(np.arange(len(s))) for s in splits)
    self.neighbours = train["image"], test["image"]
    name = self.experiment.config.data.name
    if name in JUDGES:
      self.judge = JUDGES[name]().fit(train["image"], train["label"])
      right = self.judge.predict(test["image"]) == test["label"]
      self.judge_accuracy = float(np.mean(right))

  def __call__(
      self, step: int, average: str, params: Any
  ) -> dict[str, Any]:
    """All numbers of section eval for one set of parameters."""
    experiment, section = self.experiment, self.section
    runner = batched_sampler.BatchedSampler(
        experiment, params, experiment.sample.batch_size
    )
    result: dict[str, Any] = {"step": step, "average": average}
    if self.judge is not None:
      result["judge_test_accuracy"] = self.judge_accuracy
    result["samplers"] = {}
    for sampler in section.samplers:
      plan = planning.plan_of(experiment, sampler)
      key = f"{plan.name}_nfe{plan.nfe}"
      if "@" in sampler:
        key += "@" + sampler.partition("@")[2]
      result["samplers"][key] = self._sampler(runner, plan)
    result["inversion"] = inversion.curve(experiment, runner)
    if section.likelihood_images:
      result["likelihood"] = bits_per_dim.measure(experiment, params)
    return result | {"protocol": self.facts}

  def _sampler(self, runner, plan) -> dict[str, Any]:
    """Numbers of one sampler: of every seed, mean and spread."""
    seeds = {s: self._numbers(runner, plan, s) for s in self.section.seeds}
    names = next(iter(seeds.values()))
    spread = {
      n: quality.spread([numbers[n] for numbers in seeds.values()])
      for n in names
    }
    return {
      "plan": str(plan).splitlines(),
      "nfe": plan.nfe,
      **{n: s["mean"] for n, s in spread.items()},
      "std": {n: s["std"] for n, s in spread.items()},
      "seeds": {str(s): numbers for s, numbers in seeds.items()},
    }

  def _draw(self, runner, plan, count: int, seed: int):
    """(images, activations, labels) of samples, all classes equally."""
    labels = None
    if self.experiment.config.sample.rejection:
      images, labels = rejection.generate(
        self.experiment, runner, plan, count, seed
      )
      return images, self.features(images), labels
    if self.experiment.num_classes is not None:
      labels = np.arange(count) % self.experiment.num_classes
      labels = labels.astype(np.int32)

    def rows(index):
      images = batched_sampler.generate(
        self.experiment, runner, plan, labels, index, seed
      )
      return images, self.features(images)

    return *batched_sampler.on_all_hosts(count, rows), labels

  def distance(self, runner, plan, count: int, seed: int) -> float:
    """The Frechet distance alone of samples by a plan."""
    _, activations, _ = self._draw(runner, plan, count, seed)
    return fid.frechet_distance(
      moments.from_features(activations.pooled).gaussian(),
      self.target.reference.pooled,
    )

  def _numbers(self, runner, plan, seed: int) -> dict[str, Any]:
    section = self.section
    images, activations, labels = self._draw(
      runner, plan, section.num_samples, seed
    )
    numbers = quality.sample_quality(
      activations, self.features.distance, self.target, section.k
    )
    if labels is not None:
      numbers |= self._recognition(images, activations, labels)
    if self.neighbours is not None:
      train, test = self.neighbours
      numbers |= nearest_neighbors.memorisation(images, train, test)
    return {k: _plain(v) for k, v in numbers.items()}

  def _recognition(self, images, activations, labels) -> dict[str, float]:
    """How often the class is seen that was asked for."""
    if self.judge is not None:
      seen = self.judge.predict(images)
    elif self.section.features == "classifier":
      seen = np.argmax(activations.probabilities, axis=1)
    else:
      return {}
    r = class_accuracy.recognition(seen, labels)
    return {
      "class_accuracy": r["accuracy"],
      "worst_class_accuracy": r["worst_class_accuracy"],
    }

  def _protocol(self) -> dict[str, Any]:
    """Everything that one must know to compare the numbers."""
    section, reference = self.section, self.target.reference
    real = self.target.real
    facts = {
      "samples": section.num_samples,
      "seeds": list(section.seeds),
      "features": self.features.name,
      "features_digest": self.features.digest,
      "reference": reference.data,
      "reference_digest": reference.digest(),
      "reference_images": reference.count,
      "compared_one_by_one": 0 if real is None else len(real),
      "neighbours_k": section.k,
    }
    sampling = self.experiment.sample
    if sampling.rejection:
      facts["rejection"] = (
          f"{sampling.rejection:g} more were drawn per class"
      )
    if sampling.guidance != 1:
      facts["guidance"] = sampling.guidance
    if section.num_samples < PROTOCOL_SAMPLES:
      facts["few_samples"] = (
        f"{section.num_samples} of the protocol's {PROTOCOL_SAMPLES}"
      )
    return facts


def _plain(v: Any) -> float | None:
  """A number as JSON knows it; NaN and infinity become null."""
  v = v.item() if hasattr(v, "item") else v
  return None if isinstance(v, float) and not np.isfinite(v) else v


def summary(result: dict[str, Any]) -> str:
  """The numbers as lines for a terminal."""
  lines = [f"step {result['step']}, {result['average']}"]
  if "judge_test_accuracy" in result:
    lines.append(
      f"judge: {result['judge_test_accuracy']:.2%} right on real test images"
    )
  for name, r in result["samplers"].items():
    lines.append(f"{name}: " + "  ".join(_written(r)))
  lines += inversion.summary(result["inversion"])
  if "likelihood" in result:
    lines.append(bits_per_dim.summary(result["likelihood"]))
  few = result["protocol"].get("few_samples")
  if few:
    lines.append(f"few samples: {few}; no number to compare with papers")
  return "\n".join(lines)


_FORMATS = {
  "class_accuracy": "{:.1%}",
  "worst_class_accuracy": "{:.0%}",
  "KID": "{:.2e}",
  "IS": "{:.2f}",
}
_TOLD_ELSEWHERE = ("plan", "nfe", "std", "seeds")


def _written(numbers: dict[str, Any]) -> Iterator[str]:
  for name, value in numbers.items():
    if name in _TOLD_ELSEWHERE or value is None:
      continue
    decimals = _FORMATS.get(name, "{:.3f}")
    std = numbers["std"][name]
    plus_minus = "" if std is None else f" +- {decimals.format(std)}"
    yield f"{name} {decimals.format(value)}{plus_minus}"


def run(experiment: build.Experiment, workdir: str) -> list[dict[str, Any]]:
  """Mode eval: writes workdir/eval/STEP[_AVERAGE].json, prints the numbers."""
  evaluation = Evaluation(experiment, workdir)
  section = evaluation.section
  results = []
  for step in _steps(experiment, workdir, section.steps):
    for average in section.averages or (None,):
      at, name, params = runs.load_run(experiment, workdir, average, step)
      results.append(_evaluate_and_write(evaluation, at, name, params))
  return results


def _steps(experiment, workdir: str, which: str) -> Iterator[int | None]:
  """Steps of the checkpoints to evaluate, waiting for them to be written."""
  if which == "last" or which.isdigit():
    yield None if which == "last" else int(which)
    return
  saved = checkpoint.Checkpoints(runs.checkpoint_dir(workdir))
  last, done = experiment.config.training.num_steps, set()
  while True:
    for step in saved.all_steps():
      if step not in done:
        done.add(step)
        yield step
    if which == "all" and done or last in done:
      return
    if which == "all":
      raise errors.UserError(
        f"{workdir} holds no checkpoint; train it first, or use "
        "eval.steps=follow to wait for one"
      )
    logging.info("waiting for a checkpoint after step %s", max(done, default=0))
    time.sleep(_POLL_SECS)


def _training(experiment, workdir: str, step: int) -> dict[str, Any]:
  """'images' that a run saw up to a step; 'seconds', if it is the last one.

  Seconds are of all starts, but for evaluation. {} for converted weights.
  """
  account = goodput.total(workdir)
  if account is None:
    return {}
  images = step * experiment.config.training.batch_size
  found: dict[str, Any] = {"images": images}
  if account["last"] == step:
    found["seconds"] = account["wall"] - account["seconds"]["eval"]
  return found


def _evaluate_and_write(evaluation, step, average, params) -> dict[str, Any]:
  result = evaluation(step, average, params)
  result["training"] = _training(
    evaluation.experiment, evaluation.workdir, step
  )
  name = f"{step}.json"
  if len(evaluation.section.averages) > 1:
    name = f"{step}_{average}.json"
  path = os.path.join(evaluation.workdir, "eval", name)
  if jax.process_index() == 0:
    files.write_json(path, result)
    if len({r["noise"] for r in result["inversion"].values()}) > 1:
      draw.inversion(
        result["inversion"], path.removesuffix(".json") + "_inversion.png"
      )
  print(summary(result))
  print(f"numbers: {path}")
  return result


def finish(
  experiment: build.Experiment,
  workdir: str,
  step: int,
  average: str,
  params: Any,
) -> dict[str, Any] | None:
  """The end of training: numbers if they are asked for, and pictures."""
  section = experiment.eval
  result = None
  if section.at_end:
    evaluation = Evaluation(experiment, workdir)
    result = _evaluate_and_write(evaluation, step, average, params)
  runner = batched_sampler.BatchedSampler(
      experiment, params, experiment.sample.batch_size
  )
  folders = []
  for sampler in section.samplers:
    folders.append(sample.sample(experiment, workdir, runner, sampler))
  if experiment.method.supports_inversion and experiment.has_split("test"):
    for nfe in section.inversion_nfe:
      folders.append(sample.invert(experiment, workdir, runner, nfe))
    folders.append(edit.interpolate(pretrained.Model(runner), workdir))
  print("pictures: " + ", ".join(f"{f}/grid.png" for f in folders))
  print(f"all at a glance: {draw.overview(experiment, workdir)}")
  if not section.at_end:
    print(f"numbers: python -m bcm_jax.main --workdir={workdir} --mode=eval")
  return result


def check_before_training(experiment: build.Experiment) -> None:
  """Finds what would stop `finish` before training, not after it."""
  check_outputs(experiment)
  section = experiment.eval
  if section.at_end:
    check_protocol(section)
    references.check(section)


def check_outputs(experiment: build.Experiment) -> None:
  """Finds bad times and labels before any work is done."""
  section = experiment.eval
  for sampler in section.samplers:
    planning.plan_of(experiment, sampler)
  planning.asked_labels(experiment, experiment.sample)
  inversion.check(experiment)
  bits_per_dim.check(experiment)
  rejection.check(experiment)


def check_protocol(section: schema.Eval) -> None:
  """Raises UserError where numbers would be no measurement of the protocol."""
  if section.steps not in _STEPS and not section.steps.isdigit():
    raise errors.unknown_name(
      "eval.steps", section.steps, [*_STEPS, "the number of a checkpoint"]
    )
  if not section.seeds:
    raise errors.UserError("eval.seeds is empty; give at least one seed")
  if section.num_samples < PROTOCOL_SAMPLES and not section.allow_fewer_samples:
    raise errors.UserError(
      f"eval.num_samples={section.num_samples}, but the protocol of "
      f"published numbers takes {PROTOCOL_SAMPLES}, and fewer give other "
      "(larger) distances; set eval.allow_fewer_samples=true if that is meant"
    )
