"""Measures image editing by a checkpoint, against simple baselines.

  python benchmarks/editing.py runs/digits --classifier=runs/classifier \\
      --out=docs/results/editing_digits.json --pictures=docs/images/editing
  python benchmarks/editing.py --table       # renders docs/editing.md only

Uses the odd half of the test split (the defaults of editing.tasks were chosen
on the even half) for inpainting, JPEG restoration, denoising, super-resolution,
class changes, and purification of adversarial examples, whose attacker does not
know of the purification. Conditional networks get the true classes.
"""

from collections.abc import Callable, Iterator
import json
import pathlib
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bcm_jax
from bcm_jax import errors
from bcm_jax.data import image_source
from bcm_jax.editing import edit_inputs
from bcm_jax.editing import similarity
from bcm_jax.evaluation import tables
from bcm_jax.metrics import classifier
from bcm_jax.metrics import image_grid
from bcm_jax.metrics import reconstruction
from bcm_jax.sampling import zero_shot
from bcm_jax.utils import cli
from bcm_jax.utils import files
from bcm_jax.utils import provenance

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
PAGE = ROOT / "docs" / "editing.md"
MARKED = re.compile(r"(<!-- editing: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
DRAWS = 8
# Images per row of a figure.
SHOWN = 12
QUALITIES = (5, 10, 20, 40)
NOISES = (0.1, 0.3, 0.6, 1.0)
# Noise level (sigma) at which `denoise` is applied to JPEG artifacts.
ARTIFACT_SIGMA = 0.1
# L_inf bounds of the attack for images in [-1, 1]; its step size is a fifth.
ATTACKS = (0.1, 0.2, 0.4)
# Multiples of the brightness direction in latent space.
STRENGTHS = (-2.0, 2.0)


class Bench:
  """A model, the images to edit, and a classifier for class accuracy."""

  def __init__(self, workdir: str, classifier_dir: str, count: int | None):
    self.workdir = workdir
    self.model = bcm_jax.load(workdir, batch_size=50)
    source = self.model.experiment.source("test")
    odd = np.arange(1, len(source), 2)
    # Evenly spaced, because folders are sorted by class.
    count = min(count or len(odd), len(odd))
    batch = source.fetch(odd[np.arange(count) * len(odd) // count])
    self.images, self.classes = batch["image"], batch["label"]
    self.labels = None if self.model.num_classes is None else self.classes
    train = self.model.experiment.source("train")
    subset = np.random.default_rng(0).permutation(len(train))[:10_000]
    self.train = train.fetch(np.sort(subset))
    self.classifier = classifier.load_classifier(classifier_dir)

  def examples(self, count: int) -> tuple[np.ndarray, np.ndarray, Any]:
    """Returns (images, classes, labels); labels are None if unconditional."""
    ids = np.arange(count) * len(self.images) // count
    classes = self.classes[ids]
    labels = None if self.labels is None else classes
    return self.images[ids], classes, labels

  def brightening(self) -> np.ndarray:
    """Latent direction from the darker to the brighter half of each class."""
    images, classes = self.train["image"], self.train["label"]
    means = images.mean(axis=(1, 2, 3))
    medians = np.array([
        np.median(means[classes == c]) for c in range(classes.max() + 1)
    ])
    bright = means > medians[classes]
    labels = None if self.labels is None else classes
    return self.model.direction(
        images[bright], images[~bright],
        None if labels is None else labels[bright],
        None if labels is None else labels[~bright],
    )

  def metrics(self, images: np.ndarray, hole: np.ndarray | None = None) -> dict:
    """Computes class accuracy, and PSNR against the originals in the hole."""
    correct = np.mean(self.classifier.classify(images) == self.classes)
    metrics = {"class_accuracy": float(correct)}
    mse = similarity.errors(self.images, images, None)["mse"]
    if mse:
      # The error is zero outside the hole, so this is the MSE inside it.
      metrics["psnr"] = float(
          reconstruction.psnr(mse if hole is None else mse / hole.mean())
      )
    return metrics


# Tasks ----------------------------------------------------------------------


def holes(bench: Bench) -> Iterator[tuple[str, dict]]:
  """Inpainting of a centered square of half the height and width."""
  height, width = bench.model.image_shape[:2]
  hole = np.zeros((height, width), bool)
  hole[height // 4 : -(height // 4), width // 4 : -(width // 4)] = True
  put = lambda x: np.where(hole[..., None], x, bench.images)  # noqa: E731
  yield "mean of training images", bench.metrics(
      put(bench.train["image"].mean(0).astype(np.uint8)), hole
  )
  yield "nearest training image", bench.metrics(
      put(_nearest(bench, ~hole, None)), hole
  )
  yield "nearest of the class", bench.metrics(
      put(_nearest(bench, ~hole, bench.classes)), hole
  )
  for task in ("inpaint", "inpaint_cm"):
    draws = [
        bench.model.inpaint(bench.images, hole, bench.labels, seed, task)
        for seed in range(DRAWS)
    ]
    yield f"`{task}`", bench.metrics(draws[0], hole)
    mean = np.mean(draws, axis=0).round().astype(np.uint8)
    yield f"`{task}`, mean of {DRAWS} seeds", bench.metrics(mean, hole)


def _nearest(bench: Bench, visible: np.ndarray, classes) -> np.ndarray:
  """Returns the training images nearest to the images in visible pixels."""
  test, train = (
      x[:, visible].reshape(len(x), -1).astype(np.float32)
      for x in (bench.images, bench.train["image"])
  )
  distance = (
      (test**2).sum(1)[:, None] + (train**2).sum(1) - 2 * test @ train.T
  )
  if classes is not None:
    other = classes[:, None] != bench.train["label"]
    distance = np.where(other, np.inf, distance)
  return bench.train["image"][distance.argmin(axis=1)]


def jpeg(bench: Bench) -> Iterator[tuple[str, dict]]:
  """JPEG compression at several qualities, and its restoration."""
  for quality in QUALITIES:
    compressed = np.stack(
        [edit_inputs.compress(i, quality) for i in bench.images]
    )
    yield f"JPEG of quality {quality}", bench.metrics(compressed)
    yield (
      f"`restore` of quality {quality}",
      bench.metrics(bench.model.restore(compressed, bench.labels)),
    )
    out, _ = bench.model.denoise(compressed, ARTIFACT_SIGMA, bench.labels)
    name = f"`denoise` of quality {quality}, level {ARTIFACT_SIGMA:g}"
    yield name, bench.metrics(out)


def noise(bench: Bench) -> Iterator[tuple[str, dict]]:
  """White noise of known and of estimated level."""
  rng = np.random.default_rng(0)
  clean = image_source.to_float(bench.images)
  for level in NOISES:
    noisy = clean + level * rng.standard_normal(clean.shape)
    noisy = noisy.astype(np.float32)
    yield f"noise of {level:g}", bench.metrics(image_source.to_uint8(noisy))
    out, _ = bench.model.denoise(noisy, level, bench.labels)
    yield f"`denoise` of {level:g}", bench.metrics(out)
    out, estimates = bench.model.denoise(noisy, None, bench.labels)
    estimate = f"{estimates.mean():.3f} ± {estimates.std():.3f}"
    yield f"`denoise`, level estimated as {estimate}", bench.metrics(out)


def small(bench: Bench) -> Iterator[tuple[str, dict]]:
  """Super-resolution by a factor of 2."""
  reduced = image_source.to_uint8(
    np.asarray(zero_shot.shrink(image_source.to_float(bench.images), 2))
  )
  yield (
    "half the size, pixels repeated",
    bench.metrics(reduced.repeat(2, 1).repeat(2, 2)),
  )
  yield (
    "`super_resolve`",
    bench.metrics(bench.model.super_resolve(reduced, 2, bench.labels)),
  )


def colors(bench: Bench) -> Iterator[tuple[str, dict]]:
  """Colorization of gray images."""
  if bench.model.image_shape[-1] != 3:
    return
  grey = image_source.to_uint8(
    np.asarray(zero_shot.to_gray(image_source.to_float(bench.images)))
  )
  yield "grey", bench.metrics(grey)
  yield "`colorize`", bench.metrics(bench.model.colorize(grey, bench.labels))


def classes(bench: Bench) -> Iterator[tuple[str, dict]]:
  """Change to the next class with the same latent."""
  if bench.labels is None:
    return
  new = (bench.classes + 1) % bench.model.num_classes
  out = bench.model.relabel(bench.images, bench.labels, new)
  yield (
    "`relabel` to the next class: that one",
    {"class_accuracy": float(np.mean(bench.classifier.classify(out) == new))},
  )


def attributes(bench: Bench) -> Iterator[tuple[str, dict]]:
  """Shifts of the latents in brightness, in both directions."""
  direction = bench.brightening()
  before = bench.images.mean()
  for strength in STRENGTHS:
    out = bench.model.shift(bench.images, direction, strength, bench.labels)
    yield (
      (
        f"`shift` by {strength:g}: mean grey level {before:.0f} to "
        f"{out.mean():.0f}"
      ),
      {
        "class_accuracy": float(
          np.mean(bench.classifier.classify(out) == bench.classes)
        )
      },
    )


def attack(bench: Bench) -> Iterator[tuple[str, dict]]:
  """PGD attack on a classifier (Madry et al., 2018, arXiv:1706.06083)."""
  clean = jnp.asarray(image_source.to_float(bench.images))
  for size in (0.0, *ATTACKS):
    name = f"attack of {size:g}" if size else "no attack"
    images = bench.images
    if size:
      images = image_source.to_uint8(
        np.asarray(_perturb(bench, clean, size, bench.classes))
      )
    yield name, bench.metrics(images)
    predicted = None
    if bench.labels is not None:
      # Purification uses the predicted class, since the true one is unknown.
      predicted = bench.model.classify(images)
      yield (
        f"{name}, `classify`",
        {"class_accuracy": float(np.mean(predicted == bench.classes))},
      )
    purified = bench.model.purify(images, predicted)
    yield f"{name}, `purify`", bench.metrics(purified)


def _perturb(
  bench: Bench, clean: jax.Array, size: float, classes: np.ndarray
) -> jax.Array:
  network, params = bench.classifier.network, bench.classifier.params

  @jax.jit
  def ascend(x):
    def loss(x):
      # The classifier takes pixels in 0..255.
      _, logits = network.apply({"params": params}, 127.5 * (x + 1))
      return optax.softmax_cross_entropy_with_integer_labels(
        logits, classes
      ).sum()

    x = x + size / 5 * jnp.sign(jax.grad(loss)(x))
    return jnp.clip(jnp.clip(x, clean - size, clean + size), -1.0, 1.0)

  x = clean
  for _ in range(20):
    x = ascend(x)
  return x


TASKS: dict[str, Callable[[Bench], Iterator[tuple[str, dict]]]] = {
  "holes": holes,
  "jpeg": jpeg,
  "noise": noise,
  "small": small,
  "colors": colors,
  "classes": classes,
  "attributes": attributes,
  "attack": attack,
}


def latency(bench: Bench) -> dict[str, float]:
  """Median milliseconds of edits of one image, after compilation."""
  model = bcm_jax.load(bench.workdir, batch_size=1)
  label = None if bench.labels is None else int(bench.classes[0])
  times = {}
  for name, edit in {
    "reconstruct": lambda x: model.reconstruct(x, label, nfe=1),
    "restore": lambda x: model.restore(x, label),
    "inpaint": lambda x: model.inpaint(x, _corner(x), label),
  }.items():
    seconds = []
    for i in range(12):
      start = time.perf_counter()
      edit(bench.images[i : i + 1])
      seconds.append(time.perf_counter() - start)
    times[name] = 1e3 * sorted(seconds[2:])[len(seconds[2:]) // 2]
  return times


def _corner(images: np.ndarray) -> np.ndarray:
  mask = np.zeros(images.shape[1:3], bool)
  mask[:2, :2] = True
  return mask


# Figures --------------------------------------------------------------------


def draw(bench: Bench, start: str) -> None:
  """Writes a figure of every task on a few images to START_TASK.png."""
  images, _, labels = bench.examples(SHOWN)
  scale = max(1, 32 // images.shape[1])
  figures = _restorations(bench) | _manipulations(bench)
  for task, rows in figures.items():
    image_grid.save_png(
      f"{start}_{task}.png",
      image_grid.captioned_rows([("image", images), *rows], scale=scale),
    )
  half = len(images) // 2
  interpolated = bench.model.interpolate(
    images[:half],
    images[half:],
    None if labels is None else labels[:half],
    None if labels is None else labels[half:],
    points=len(images),
  )
  image_grid.save_png(
    f"{start}_interpolate.png",
    image_grid.image_grid(
      interpolated.reshape(-1, *images.shape[1:]), len(images), scale=scale
    ),
  )


def _restorations(bench: Bench) -> dict[str, list[tuple[str, np.ndarray]]]:
  """Rows of degraded and restored images, by task."""
  model, (images, classes, labels) = bench.model, bench.examples(SHOWN)
  height, width = model.image_shape[:2]
  hole = np.zeros((height, width), bool)
  hole[height // 4 : -(height // 4), width // 4 : -(width // 4)] = True
  covered = np.where(hole[..., None], np.uint8(127), images)
  compressed = np.stack([edit_inputs.compress(i, 10) for i in images])
  floats = image_source.to_float(images)
  reduced = image_source.to_uint8(np.asarray(zero_shot.shrink(floats, 2)))
  noisy = floats + 0.6 * np.random.default_rng(0).standard_normal(floats.shape)
  noisy = noisy.astype(np.float32)
  repeated = reduced.repeat(2, 1).repeat(2, 2)
  attacked = image_source.to_uint8(
    np.asarray(_perturb(bench, jnp.asarray(floats), 0.2, classes))
  )
  rows = {
    "inpaint": [
      ("covered", covered),
      ("inpaint", model.inpaint(covered, hole, labels)),
      ("inpaint_cm", model.inpaint(covered, hole, labels, task="inpaint_cm")),
    ],
    "restore": [
      ("JPEG, 10", compressed),
      ("restore", model.restore(compressed, labels)),
    ],
    "denoise": [
      ("noise 0.6", image_source.to_uint8(noisy)),
      ("denoise", model.denoise(noisy, None, labels)[0]),
    ],
    "super_resolve": [
      ("half", repeated),
      ("super_resolve", model.super_resolve(reduced, 2, labels)),
    ],
    "stroke": [
      ("sketch", repeated),
      ("stroke", model.stroke(repeated, labels)),
    ],
    "purify": [("attack", attacked), ("purify", model.purify(attacked))],
  }
  if model.image_shape[-1] == 3:
    grey = image_source.to_uint8(np.asarray(zero_shot.to_gray(floats)))
    rows["colorize"] = [
      ("grey", grey),
      ("colorize", model.colorize(grey, labels)),
    ]
  return rows


def _manipulations(bench: Bench) -> dict[str, list[tuple[str, np.ndarray]]]:
  """Rows of images with another attribute or class, by task."""
  model, (images, _, labels) = bench.model, bench.examples(SHOWN)
  direction = bench.brightening()
  rows = {
    "attribute": [
      (f"shift {strength:+g}", model.shift(images, direction, strength, labels))
      for strength in STRENGTHS
    ]
  }
  if labels is not None:
    new = (labels + 1) % model.num_classes
    rows["relabel"] = [("next class", model.relabel(images, labels, new))]
  return rows


# The page -------------------------------------------------------------------


def table(record: dict[str, Any], task: str) -> str:
  """Formats the rows of a task as Markdown."""
  rows = [
    [
      name,
      *(
        "-" if key not in n else form.format(n[key])
        for key, form in (("psnr", "{:.2f}"), ("class_accuracy", "{:.1%}"))
      ),
    ]
    for name, n in record["tasks"][task].items()
  ]
  return tables.markdown(["", "PSNR, dB", "class accuracy"], rows)


def page(text: str) -> str:
  """Renders the marked blocks of docs/editing.md."""

  def fill(match: re.Match) -> str:
    name, _, task = match[2].partition("_")
    path = RESULTS / f"editing_{name}.json"
    body = "Not run yet."
    if path.exists():
      body = table(json.loads(path.read_text()), task)
    return f"{match[1]}{body}\n{match[3]}"

  return MARKED.sub(fill, text)


def main(argv: list[str] | None = None) -> None:
  """Runs the command."""
  parser = cli.Parser("benchmarks/editing.py", __doc__)
  add = parser.add_argument
  add("workdir", nargs="?", metavar="WORKDIR", help="run to measure")
  add("--classifier", metavar="DIR", help="folder of bcm_jax.train_classifier")
  add("--count", type=int, metavar="N", help="number of test images (all)")
  add("--only", default=",".join(TASKS), metavar="NAMES", help="tasks (all)")
  add("--out", metavar="FILE", help="JSON to write")
  add("--pictures", metavar="PREFIX", help="prefix of the pictures' paths")
  add("--table", action="store_true", help="render docs/editing.md again")
  with cli.reporting():
    args = parser.parse_args(argv)
    if not args.table and not (args.workdir and args.classifier):
      raise errors.UserError(
        "WORKDIR, --classifier: missing; give both, or --table only"
      )
    if args.workdir:
      bench = Bench(args.workdir, args.classifier, args.count)
      record: dict[str, Any] = {"images": len(bench.images), "tasks": {}}
      for task in args.only.split(","):
        rows = record["tasks"][task] = {}
        for name, numbers in TASKS[task](bench):
          rows[name] = numbers
          print(
            f"{name}: " + ", ".join(f"{k} {v:.3f}" for k, v in numbers.items()),
            flush=True,
          )
      record["milliseconds"] = latency(bench)
      print(record["milliseconds"])
      record["run"] = provenance.facts(bench.model.experiment.config)
      if args.pictures:
        draw(bench, args.pictures)
      if args.out:
        files.write_json(args.out, record)
    if args.table or args.out:
      text = page(PAGE.read_text(encoding="utf-8"))
      files.write_bytes(str(PAGE), text.encode())
      print(f"written: {PAGE}")


if __name__ == "__main__":
  main()
