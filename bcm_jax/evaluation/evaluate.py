"""Evaluation of checkpoints: mode eval, and the end of training.

The protocol is that of the papers: 50,000 samples in equal shares of all
classes, as 8-bit images, against statistics of the training set. Metrics are
reported per seed, with mean and standard deviation, never as the minimum over
seeds.
"""

from collections.abc import Callable, Iterator
import math
import os
import time
from typing import Any

from absl import logging
import jax
import numpy as np
import PIL.Image

from bcm_jax import errors
from bcm_jax import sample
from bcm_jax.checkpoint import checkpoint
from bcm_jax.checkpoint import runs
from bcm_jax.config import build
from bcm_jax.config import resolve
from bcm_jax.config import schema
from bcm_jax.editing import edit
from bcm_jax.editing import pretrained
from bcm_jax.evaluation import bits_per_dim
from bcm_jax.evaluation import inversion
from bcm_jax.evaluation import references
from bcm_jax.evaluation import sample_files
from bcm_jax.generate import batched_sampler
from bcm_jax.generate import planning
from bcm_jax.generate import rejection
from bcm_jax.metrics import class_accuracy
from bcm_jax.metrics import fid
from bcm_jax.metrics import image_grid
from bcm_jax.metrics import moments
from bcm_jax.metrics import nearest_neighbors
from bcm_jax.metrics import precision_recall
from bcm_jax.metrics import quality
from bcm_jax.plots import draw
from bcm_jax.training import goodput
from bcm_jax.training import metric_writers
from bcm_jax.utils import files
from bcm_jax.utils import hashing
from bcm_jax.utils import provenance

# Number of samples of published FIDs.
PROTOCOL_SAMPLES = 50_000
# Dataset -> classifier for class accuracy, fitted to the training split.
CLASSIFIERS = {"digits": class_accuracy.DigitsSVC}
# Number of images of a grid for TensorBoard.
_GRID_IMAGES = 100
# Largest training set for memorization, whose cost is quadratic, in pixels.
_MEMORIZATION_IMAGES = 5000
_STEPS = ("last", "all", "follow")
# Seconds between two checks for a new checkpoint.
_POLL_SECS = 30.0


class Progress:
  """Numbers measured so far, which a stopped evaluation continues from.

  Args:
    path: JSON file, removed by `done`; '' keeps nothing. With several hosts
      nothing is read, since they might not agree.
  """

  def __init__(self, path: str = ""):
    self._path, self._numbers = path if jax.process_count() == 1 else "", {}
    if self._path and os.path.exists(self._path):
      self._numbers = _read_object(self._path)
      print(f"continues from {self._path}")

  def __call__(self, name: str, measure: Callable[[], Any]) -> Any:
    """Returns the numbers of this name, measured if they are not known."""
    if name not in self._numbers:
      self._numbers[name] = measure()
      if self._path:
        files.write_json(self._path, self._numbers)
    return self._numbers[name]

  def done(self) -> None:
    """Removes the file."""
    if self._path and os.path.exists(self._path):
      os.remove(self._path)


class Evaluation:
  """Metrics of section eval, for all checkpoints and moving averages of a run.

  Raises:
    UserError: on construction, for fewer samples than the protocol's without
      eval.allow_fewer_samples, invalid features or references, and invalid
      samplers or times.
  """

  def __init__(self, experiment: build.Experiment, workdir: str):
    self.experiment, self.workdir = experiment, workdir
    self.section = experiment.eval
    self.progress = Progress()
    check_outputs(experiment)
    check_protocol(self.section)
    self.features = references.open_features(self.section)
    self.target = references.open_target(
        experiment, self.features, os.path.join(workdir, "eval")
    )
    self.classifier, self.classifier_accuracy = None, None
    self.train_test: tuple[np.ndarray, np.ndarray] | None = None
    self._open_small_dataset()
    self.facts = provenance.facts(experiment.config) | self._protocol()

  def _open_small_dataset(self) -> None:
    """Prepares the metrics that are computed for small datasets only."""
    splits = [
        self.experiment.source_if_available(split)
        for split in ("train", "test")
    ]
    if None in splits or len(splits[0]) > _MEMORIZATION_IMAGES:
      return
    train, test = (s.fetch(np.arange(len(s))) for s in splits)
    self.train_test = train["image"], test["image"]
    name = self.experiment.config.data.name
    if name in CLASSIFIERS:
      self.classifier = CLASSIFIERS[name]().fit(train["image"], train["label"])
      correct = self.classifier.predict(test["image"]) == test["label"]
      self.classifier_accuracy = float(np.mean(correct))

  def __call__(
      self, step: int, average: str, params: Any
  ) -> dict[str, Any]:
    """Computes all metrics of section eval for one set of parameters.

    Args:
      step: training step of the parameters.
      average: name of the moving average.
      params: parameters of the network.

    Returns:
      The content of a result file, see docs/evaluation.md.
    """
    experiment, section = self.experiment, self.section
    runner = batched_sampler.BatchedSampler(
        experiment, params, experiment.sample.batch_size
    )
    self._runner = runner
    result: dict[str, Any] = {"step": step, "average": average}
    if self.classifier is not None:
      result["classifier_test_accuracy"] = self.classifier_accuracy
    result["samplers"] = {}
    for sampler in section.samplers:
      plan = planning.plan_of(experiment, sampler)
      key = _key(plan, sampler)
      result["samplers"][key] = self._sampler(runner, key, plan)
    result["inversion"] = self.progress(
        "inversion", lambda: inversion.curve(experiment, runner)
    )
    if section.likelihood_images:
      result["likelihood"] = self.progress(
          "likelihood", lambda: bits_per_dim.measure(experiment, params)
      )
    return result | {"protocol": self.facts}

  def grids(self) -> dict[str, np.ndarray]:
    """Samples a grid per sampler, with the newest parameters and first seed."""
    section, grids = self.section, {}
    count = min(_GRID_IMAGES, section.num_samples)
    for sampler in section.samplers:
      plan = planning.plan_of(self.experiment, sampler)
      images, _, _ = self._draw(self._runner, plan, count, section.seeds[0])
      grids[_key(plan, sampler)] = image_grid.image_grid(
          images, 10, scale=sample.scale(self.experiment)
      )
    return grids

  def of_files(self) -> dict[str, Any]:
    """Computes the metrics of the images in eval.samples, like `__call__`.

    Raises:
      UserError: unsuitable files, or another number of images than
        eval.num_samples.
    """
    experiment, section = self.experiment, self.section
    images, labels = sample_files.read(
        section.samples, experiment.image_shape, experiment.num_classes
    )
    if len(images) > section.num_samples or (
        len(images) < section.num_samples and not section.allow_fewer_samples
    ):
      raise errors.UserError(
          f"eval.samples: got {len(images)} images in {section.samples}, "
          f"expected {section.num_samples}; set "
          f"eval.num_samples={len(images)}"
      )
    numbers = self._numbers(images, self.features(images), labels)
    name = os.path.basename(os.path.abspath(section.samples))
    facts = provenance.facts(experiment.config) | self._protocol(len(images))
    return {
        "step": None, "average": name,
        "samplers": {f"{name}_nfe0": {
            "plan": [section.samples], "nfe": 0, **numbers,
            "std": dict.fromkeys(numbers),
        }},
        "inversion": {},
        "protocol": facts | {"seeds": [], "method": "images of a file"},
    }

  def _sampler(self, runner, key: str, plan) -> dict[str, Any]:
    """Metrics of one sampler: per seed, mean and standard deviation."""
    seeds = {
        s: self.progress(
            f"{key}, seed {s}", lambda s=s: self._metrics(runner, plan, s)
        )
        for s in self.section.seeds
    }
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
    """Returns (images, activations, labels) of samples, balanced classes."""
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
    """Computes only the Frechet distance of samples by a plan.

    Args:
      runner: batched sampler of the network.
      plan: sampling plan.
      count: number of samples.
      seed: seed of the noise.
    """
    _, activations, _ = self._draw(runner, plan, count, seed)
    return fid.frechet_distance(
      moments.from_features(activations.pooled).gaussian(),
      self.target.reference.pooled,
    )

  def _metrics(self, runner, plan, seed: int) -> dict[str, Any]:
    section = self.section
    return self._numbers(
        *self._draw(runner, plan, section.num_samples, seed)
    )

  def _numbers(self, images, activations, labels) -> dict[str, Any]:
    """Computes all metrics of images with these features."""
    section = self.section
    numbers = quality.sample_quality(
      activations, self.features.distance, self.target, section.k
    )
    if labels is not None:
      numbers |= self._class_accuracy(images, activations, labels)
    if self.train_test is not None:
      train, test = self.train_test
      numbers |= nearest_neighbors.memorization(images, train, test)
    return {k: _as_json(v) for k, v in numbers.items()}

  def _class_accuracy(self, images, activations, labels) -> dict[str, float]:
    """Fraction of samples classified as the requested class."""
    if self.classifier is not None:
      predicted = self.classifier.predict(images)
    elif self.section.features == "classifier":
      predicted = np.argmax(activations.probabilities, axis=1)
    else:
      return {}
    r = class_accuracy.class_accuracy(predicted, labels)
    return {
      "class_accuracy": r["accuracy"],
      "worst_class_accuracy": r["worst_class_accuracy"],
    }

  def _protocol(self, count: int | None = None) -> dict[str, Any]:
    """Facts that must agree for two results to be comparable.

    Args:
      count: number of samples; None is eval.num_samples.
    """
    section, reference = self.section, self.target.reference
    real = self.target.real
    count = section.num_samples if count is None else count
    facts = {
        "samples": count,
        "seeds": list(section.seeds),
        "features": self.features.name,
        "features_digest": self.features.digest,
        "reference": reference.data,
        "reference_digest": reference.digest(),
        "reference_images": reference.count,
        "num_real_for_prdc": 0 if real is None else len(real),
        "neighbors_k": section.k,
        "uint8": self.experiment.method.rounding,
    }
    sampling = self.experiment.sample
    if sampling.rejection:
      facts["rejection"] = f"{sampling.rejection:g} more samples per class"
    if sampling.guidance != 1:
      facts["guidance"] = sampling.guidance
    if count < PROTOCOL_SAMPLES:
      facts["few_samples"] = f"{count} of the protocol's {PROTOCOL_SAMPLES}"
    return facts


def _key(plan, sampler: str) -> str:
  """Name of a sampler in results: plan, NFE and given times."""
  _, at, times = sampler.partition("@")
  return f"{plan.name}_nfe{plan.nfe}{at}{times}"


def _as_json(v: Any) -> float | None:
  """Converts a number to a JSON value; NaN and infinity become null."""
  v = v.item() if hasattr(v, "item") else v
  return None if isinstance(v, float) and not np.isfinite(v) else v


def summary(result: dict[str, Any]) -> str:
  """Formats a result as lines of text."""
  step = "" if result["step"] is None else f"step {result['step']}, "
  lines = [f"{step}{result['average']}"]
  if "classifier_test_accuracy" in result:
    accuracy = result["classifier_test_accuracy"]
    lines.append(f"classifier: {accuracy:.2%} accuracy on real test images")
  for name, r in result["samplers"].items():
    lines.append(f"{name}: " + "  ".join(_format_metrics(r)))
  lines += inversion.summary(result["inversion"])
  if "likelihood" in result:
    lines.append(bits_per_dim.summary(result["likelihood"]))
  few = result["protocol"].get("few_samples")
  if few:
    lines.append(f"few samples: {few}; not comparable with papers")
  return "\n".join(lines)


_FORMATS = {
  "class_accuracy": "{:.1%}",
  "worst_class_accuracy": "{:.0%}",
  "KID": "{:.2e}",
  "IS": "{:.2f}",
}
_OMITTED_COLUMNS = ("plan", "nfe", "std", "seeds")


def _format_metrics(numbers: dict[str, Any]) -> Iterator[str]:
  for name, value in numbers.items():
    if name in _OMITTED_COLUMNS or value is None:
      continue
    decimals = _FORMATS.get(name, "{:.3f}")
    std = numbers["std"][name]
    plus_minus = "" if std is None else f" +- {decimals.format(std)}"
    yield f"{name} {decimals.format(value)}{plus_minus}"


def run(
    experiment: build.Experiment, workdir: str
) -> list[dict[str, Any]]:
  """Mode eval: writes workdir/eval/STEP[_AVERAGE].json and prints the metrics.

  A result of other settings is kept under the digest of its settings. With
  eval.samples the images of a file are evaluated, without a checkpoint.

  Returns:
    The results, one per checkpoint and moving average.
  """
  evaluation = Evaluation(experiment, workdir)
  section = evaluation.section
  if section.samples is not None:
    result = evaluation.of_files()
    _write(evaluation, f"samples_{result['average']}", result)
    return [result]
  results = []
  for step in _steps(experiment, workdir, section.steps):
    for average in section.averages or (None,):
      at, name, params = runs.load_run(experiment, workdir, average, step)
      results.append(_evaluate_and_write(evaluation, at, name, params))
      grids = evaluation.grids()
      if jax.process_index() == 0:
        prefix = f"{name}/" if len(section.averages) > 1 else ""
        metric_writers.write_evaluation(
            workdir, at, results[-1], grids, prefix
        )
  return results


def _steps(experiment, workdir: str, which: str) -> Iterator[int | None]:
  """Yields the steps of the checkpoints to evaluate; waits for new ones."""
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
          f"{workdir}: has no checkpoint; train first, or use "
          "eval.steps=follow to wait for one"
      )
    logging.info("waiting for a checkpoint after step %s", max(done, default=0))
    time.sleep(_POLL_SECS)


def _training(experiment, workdir: str, step: int) -> dict[str, Any]:
  """Training cost up to a step: 'images' seen, and 'seconds' at the last step.

  Seconds are summed over restarts and exclude evaluation. Returns {} for
  converted weights.
  """
  account = goodput.total(workdir)
  if account is None:
    return {}
  images = step * experiment.config.training.batch_size
  cost: dict[str, Any] = {"images": images}
  if account["last"] == step:
    cost["seconds"] = account["wall"] - account["seconds"]["eval"]
  return cost


def _evaluate_and_write(evaluation, step, average, params) -> dict[str, Any]:
  name = f"{step}"
  if len(evaluation.section.averages) > 1:
    name = f"{step}_{average}"
  digest = _settings_digest(evaluation, average)
  evaluation.progress = Progress(os.path.join(
      evaluation.workdir, "eval", f"{name}_{digest}.partial"
  ))
  result = evaluation(step, average, params)
  result["training"] = _training(
    evaluation.experiment, evaluation.workdir, step
  )
  _write(evaluation, name, result)
  evaluation.progress.done()
  return result


def _settings_digest(evaluation, average: str) -> str:
  """Returns eight hex digits of the settings that a result depends on."""
  config = resolve.to_json(evaluation.experiment.config)
  settings = {k: config[k] for k in ("eval", "sample", "invert")}
  for key in ("steps", "averages", "at_end"):
    del settings["eval"][key]
  # Contents of the files that the settings name.
  digests = ("features_digest", "reference_digest")
  settings |= {k: evaluation.facts.get(k) for k in digests}
  return hashing.json_digest([average, settings])[:8]


def _write(evaluation, name: str, result: dict[str, Any]) -> None:
  """Writes workdir/eval/NAME.json and prints it; keeps one of other settings.

  The other one becomes NAME_DIGEST.json.
  """
  base = os.path.join(evaluation.workdir, "eval", name)
  digest = _settings_digest(evaluation, result["average"])
  if jax.process_index() == 0:
    if os.path.exists(f"{base}.json"):
      old = _read_object(f"{base}.json")
      # Results of earlier versions do not have it.
      kept = old.get("settings_digest") or hashing.json_digest(old)[:8]
      if kept != digest:
        for end in (".json", "_inversion.png"):
          if os.path.exists(base + end):
            os.replace(base + end, f"{base}_{kept}{end}")
    files.write_json(f"{base}.json", result | {"settings_digest": digest})
    if os.path.exists(f"{base}_{digest}.json"):  # The same, written earlier.
      os.remove(f"{base}_{digest}.json")
    if len({r["noise"] for r in result["inversion"].values()}) > 1:
      draw.inversion(result["inversion"], f"{base}_inversion.png")
  print(summary(result))
  print(f"numbers: {base}.json")


def _read_object(path: str) -> dict[str, Any]:
  """Reads a JSON object that an evaluation wrote."""
  try:
    content = files.read_json(path)
    if not isinstance(content, dict):
      raise ValueError("not an object")
  except ValueError as e:
    raise errors.UserError(
        f"{path}: got a damaged file ({e}), expected numbers of mode eval; "
        "remove it to evaluate again"
    ) from e
  return content


def finish(
  experiment: build.Experiment,
  workdir: str,
  step: int,
  average: str,
  params: Any,
) -> dict[str, Any] | None:
  """Ends training: metrics if eval.at_end, sample and inversion images.

  Returns:
    The result of mode eval, or None without eval.at_end.
  """
  section, source = experiment.eval, f"step {step}, {average}"
  result = None
  if section.at_end:
    evaluation = Evaluation(experiment, workdir)
    result = _evaluate_and_write(evaluation, step, average, params)
  runner = batched_sampler.BatchedSampler(
      experiment, params, experiment.sample.batch_size
  )
  folders = []
  for sampler in section.samplers:
    folders.append(
        sample.sample(experiment, workdir, runner, sampler, source)
    )
  if experiment.method.supports_inversion and experiment.has_split("test"):
    for nfe in section.inversion_nfe:
      folders.append(sample.invert(experiment, workdir, runner, nfe, source))
    folders.append(
        edit.interpolate(pretrained.Model(runner, source), workdir)
    )
  if jax.process_index() == 0:
    metric_writers.write_evaluation(workdir, step, result or {}, {
        os.path.relpath(folder, workdir): np.asarray(
            PIL.Image.open(os.path.join(folder, "grid.png")).convert("RGB")
        )
        for folder in folders
    })
  print("images: " + ", ".join(f"{f}/grid.png" for f in folders))
  print(f"overview: {draw.overview(experiment, workdir)}")
  if not section.at_end:
    print(f"numbers: python -m bcm_jax.main --workdir={workdir} --mode=eval")
  return result


def check_before_training(experiment: build.Experiment) -> None:
  """Raises UserError before training for errors that `finish` would meet."""
  check_outputs(experiment)
  section = experiment.eval
  if section.at_end:
    check_protocol(section)
    references.check(experiment)


def check_outputs(experiment: build.Experiment) -> None:
  """Raises UserError for invalid times and labels."""
  section = experiment.eval
  for sampler in section.samplers:
    planning.plan_of(experiment, sampler)
  planning.requested_labels(experiment, experiment.sample)
  inversion.check(experiment)
  bits_per_dim.check(experiment)
  rejection.check(experiment)


def check_protocol(section: schema.Eval) -> None:
  """Raises UserError if section eval deviates from the protocol."""
  if section.steps not in _STEPS and not section.steps.isdigit():
    raise errors.unknown_name(
      "eval.steps", section.steps, [*_STEPS, "the number of a checkpoint"]
    )
  if not section.seeds:
    raise errors.UserError("eval.seeds: got none, expected at least one seed")
  fewest = min(section.num_samples, section.num_real_for_prdc or math.inf)
  most_neighbors = max(section.k, precision_recall.DENSITY_K)
  if fewest <= most_neighbors:
    raise errors.UserError(
        f"eval.k: got {section.k} with eval.num_samples={section.num_samples} "
        f"and eval.num_real_for_prdc={section.num_real_for_prdc}, expected "
        f"more than {most_neighbors} images of each, since density and "
        f"coverage use {precision_recall.DENSITY_K} neighbors"
    )
  if section.num_samples < PROTOCOL_SAMPLES and not section.allow_fewer_samples:
    raise errors.UserError(
        f"eval.num_samples: got {section.num_samples}, expected "
        f"{PROTOCOL_SAMPLES} as in publications, because the Frechet distance "
        "is biased upward for fewer samples; set "
        "eval.allow_fewer_samples=true to accept this"
    )
