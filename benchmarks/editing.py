"""How well a checkpoint edits real images, beside simple ways to do the same.

  python benchmarks/editing.py runs/digits --classifier=runs/classifier \\
      --out=docs/results/editing_digits.json --pictures=docs/images/editing
  python benchmarks/editing.py --table       # docs/editing.md again

On the odd half of the test split (constants of recipes.py were chosen on the
even half): holes, JPEG, noise, small images, other classes, and an attack
against a classifier that does not know of the defence. Classes are the true
ones, which a conditional network is told.
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
# Images in a picture.
SHOWN = 12
QUALITIES = (5, 10, 20, 40)
NOISES = (0.1, 0.3, 0.6, 1.0)
# What JPEG's artefacts are taken for, in units of sigma.
ARTEFACTS = 0.1
# L_inf of the attack, in units of [-1, 1]; its steps are a fifth as long.
ATTACKS = (0.1, 0.2, 0.4)
# How far images are moved from dark to bright ones.
STRENGTHS = (-2.0, 2.0)


class Bench:
  """A model, the images that it edits, and a judge of classes."""

  def __init__(self, workdir: str, classifier_dir: str, count: int | None):
    self.workdir = workdir
    self.model = bcm_jax.load(workdir, batch_size=50)
    source = self.model.experiment.source("test")
    odd = np.arange(1, len(source), 2)
    # Spread evenly: folders are in the order of their classes.
    count = min(count or len(odd), len(odd))
    batch = source.fetch(odd[np.arange(count) * len(odd) // count])
    self.images, self.classes = batch["image"], batch["label"]
    self.labels = None if self.model.num_classes is None else self.classes
    train = self.model.experiment.source("train")
    some = np.random.default_rng(0).permutation(len(train))[:10_000]
    self.train = train.fetch(np.sort(some))
    self.judge = classifier.load_classifier(classifier_dir)

  def some(self, count: int) -> tuple[np.ndarray, np.ndarray, Any]:
    """So many images, their classes, and what the network is told of them."""
    chosen = np.arange(count) * len(self.images) // count
    classes = self.classes[chosen]
    told = None if self.labels is None else classes
    return self.images[chosen], classes, told

  def brightening(self) -> np.ndarray:
    """The way from the darker half of each class to the brighter."""
    images, classes = self.train["image"], self.train["label"]
    means = images.mean(axis=(1, 2, 3))
    middle = np.array([
        np.median(means[classes == c]) for c in range(classes.max() + 1)
    ])
    bright = means > middle[classes]
    told = self.labels is not None
    return self.model.direction(
        images[bright], images[~bright], classes[bright] if told else None,
        classes[~bright] if told else None,
    )

  def told(self, images: np.ndarray, hole: np.ndarray | None = None) -> dict:
    """PSNR against the originals, and the share whose class is recognised."""
    right = np.mean(self.judge.classify(images) == self.classes)
    told = {"class_accuracy": float(right)}
    mse = similarity.errors(self.images, images, None)["mse"]
    if mse:
      # Around a hole all is equal.
      told["psnr"] = float(
          reconstruction.psnr(mse if hole is None else mse / hole.mean())
      )
    return told


# Tasks ----------------------------------------------------------------------


def holes(bench: Bench) -> Iterator[tuple[str, dict]]:
  """A square in the middle, of half the height and width."""
  height, width = bench.model.image_shape[:2]
  hole = np.zeros((height, width), bool)
  hole[height // 4 : -(height // 4), width // 4 : -(width // 4)] = True
  put = lambda x: np.where(hole[..., None], x, bench.images)  # noqa: E731
  yield "mean of training images", bench.told(
      put(bench.train["image"].mean(0).astype(np.uint8)), hole
  )
  yield "nearest training image", bench.told(
      put(_nearest(bench, ~hole, None)), hole
  )
  yield "nearest of the class", bench.told(
      put(_nearest(bench, ~hole, bench.classes)), hole
  )
  for task in ("inpaint", "inpaint_cm"):
    draws = [
        bench.model.inpaint(bench.images, hole, bench.labels, seed, task)
        for seed in range(DRAWS)
    ]
    yield f"`{task}`", bench.told(draws[0], hole)
    mean = np.mean(draws, axis=0).round().astype(np.uint8)
    yield f"`{task}`, mean of {DRAWS} seeds", bench.told(mean, hole)


def _nearest(bench: Bench, known: np.ndarray, classes) -> np.ndarray:
  """For each image, the training image that is most like what is known."""
  mine, theirs = (
      x[:, known].reshape(len(x), -1).astype(np.float32)
      for x in (bench.images, bench.train["image"])
  )
  distance = (
      (mine**2).sum(1)[:, None] + (theirs**2).sum(1) - 2 * mine @ theirs.T
  )
  if classes is not None:
    other = classes[:, None] != bench.train["label"]
    distance = np.where(other, np.inf, distance)
  return bench.train["image"][distance.argmin(axis=1)]


def jpeg(bench: Bench) -> Iterator[tuple[str, dict]]:
  """Files of several qualities, and what is restored of them."""
  for quality in QUALITIES:
    given = np.stack([edit_inputs.compress(i, quality) for i in bench.images])
    yield f"JPEG of quality {quality}", bench.told(given)
    yield f"`restore` of quality {quality}", bench.told(
        bench.model.restore(given, bench.labels)
    )
    out, _ = bench.model.denoise(given, ARTEFACTS, bench.labels)
    yield f"`denoise` of quality {quality}, level {ARTEFACTS:g}", bench.told(
        out
    )


def noise(bench: Bench) -> Iterator[tuple[str, dict]]:
  """White noise of known and of measured level."""
  rng = np.random.default_rng(0)
  clean = image_source.to_float(bench.images)
  for level in NOISES:
    noisy = clean + level * rng.standard_normal(clean.shape)
    noisy = noisy.astype(np.float32)
    yield f"noise of {level:g}", bench.told(image_source.to_uint8(noisy))
    out, _ = bench.model.denoise(noisy, level, bench.labels)
    yield f"`denoise` of {level:g}", bench.told(out)
    out, found = bench.model.denoise(noisy, None, bench.labels)
    measured = f"{found.mean():.3f} ± {found.std():.3f}"
    yield f"`denoise`, level measured as {measured}", bench.told(out)


def small(bench: Bench) -> Iterator[tuple[str, dict]]:
  """Half the height and width."""
  given = image_source.to_uint8(
      np.asarray(zero_shot.shrink(image_source.to_float(bench.images), 2))
  )
  yield "half the size, pixels repeated", bench.told(
      given.repeat(2, 1).repeat(2, 2)
  )
  yield "`super_resolve`", bench.told(
      bench.model.super_resolve(given, 2, bench.labels)
  )


def colours(bench: Bench) -> Iterator[tuple[str, dict]]:
  """Grey images."""
  if bench.model.image_shape[-1] != 3:
    return
  grey = image_source.to_uint8(
      np.asarray(zero_shot.to_grey(image_source.to_float(bench.images)))
  )
  yield "grey", bench.told(grey)
  yield "`colorize`", bench.told(bench.model.colorize(grey, bench.labels))


def classes(bench: Bench) -> Iterator[tuple[str, dict]]:
  """The next class, of the same latent."""
  if bench.labels is None:
    return
  new = (bench.classes + 1) % bench.model.num_classes
  out = bench.model.relabel(bench.images, bench.labels, new)
  yield "`relabel` to the next class: that one", {
      "class_accuracy": float(np.mean(bench.judge.classify(out) == new))
  }


def attributes(bench: Bench) -> Iterator[tuple[str, dict]]:
  """Latents moved from darker images to brighter, and the other way."""
  way = bench.brightening()
  before = bench.images.mean()
  for strength in STRENGTHS:
    out = bench.model.shift(bench.images, way, strength, bench.labels)
    yield (
      (
        f"`shift` by {strength:g}: mean grey level {before:.0f} to "
        f"{out.mean():.0f}"
      ),
      {
        "class_accuracy": float(
          np.mean(bench.judge.classify(out) == bench.classes)
        )
      },
    )


def attack(bench: Bench) -> Iterator[tuple[str, dict]]:
  """Projected gradient ascent of a classifier's loss (Madry et al., 2018)."""
  clean = jnp.asarray(image_source.to_float(bench.images))
  for size in (0.0, *ATTACKS):
    name = f"attack of {size:g}" if size else "no attack"
    images = bench.images
    if size:
      images = image_source.to_uint8(
        np.asarray(_perturb(bench, clean, size, bench.classes))
      )
    yield name, bench.told(images)
    found = None
    if bench.labels is not None:
      # What purification is told where the class is not known.
      found = bench.model.classify(images)
      yield (
        f"{name}, `classify`",
        {"class_accuracy": float(np.mean(found == bench.classes))},
      )
    yield f"{name}, `purify`", bench.told(bench.model.purify(images, found))


def _perturb(
  bench: Bench, clean: jax.Array, size: float, classes: np.ndarray
) -> jax.Array:
  network, params = bench.judge.network, bench.judge.params

  @jax.jit
  def ascend(x):
    def loss(x):
      # The classifier wants grey levels.
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
  "colours": colours,
  "classes": classes,
  "attributes": attributes,
  "attack": attack,
}


def latency(bench: Bench) -> dict[str, float]:
  """Milliseconds of edits of one image, after the first."""
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
      began = time.perf_counter()
      edit(bench.images[i : i + 1])
      seconds.append(time.perf_counter() - began)
    times[name] = 1e3 * sorted(seconds[2:])[len(seconds[2:]) // 2]
  return times


def _corner(images: np.ndarray) -> np.ndarray:
  mask = np.zeros(images.shape[1:3], bool)
  mask[:2, :2] = True
  return mask


# Pictures -------------------------------------------------------------------


def draw(bench: Bench, start: str) -> None:
  """Every task on the first images, as PNG files: START_TASK.png."""
  images, _, labels = bench.some(SHOWN)
  scale = max(1, 32 // images.shape[1])
  rows = _undone(bench) | _changed(bench)
  for task, made in rows.items():
    image_grid.save_png(
      f"{start}_{task}.png",
      image_grid.captioned_rows([("image", images), *made], scale=scale),
    )
  half = len(images) // 2
  between = bench.model.interpolate(
    images[:half],
    images[half:],
    None if labels is None else labels[:half],
    None if labels is None else labels[half:],
    points=len(images),
  )
  image_grid.save_png(
    f"{start}_interpolate.png",
    image_grid.image_grid(
      between.reshape(-1, *images.shape[1:]), len(images), scale=scale
    ),
  )


def _undone(bench: Bench) -> dict[str, list[tuple[str, np.ndarray]]]:
  """Rows of tasks that undo damage: damaged, and mended."""
  model, (images, true, labels) = bench.model, bench.some(SHOWN)
  height, width = model.image_shape[:2]
  hole = np.zeros((height, width), bool)
  hole[height // 4 : -(height // 4), width // 4 : -(width // 4)] = True
  covered = np.where(hole[..., None], np.uint8(127), images)
  poor = np.stack([edit_inputs.compress(i, 10) for i in images])
  floats = image_source.to_float(images)
  small = image_source.to_uint8(np.asarray(zero_shot.shrink(floats, 2)))
  noisy = floats + 0.6 * np.random.default_rng(0).standard_normal(floats.shape)
  noisy = noisy.astype(np.float32)
  repeated = small.repeat(2, 1).repeat(2, 2)
  attacked = image_source.to_uint8(
    np.asarray(_perturb(bench, jnp.asarray(floats), 0.2, true))
  )
  rows = {
    "inpaint": [
      ("covered", covered),
      ("inpaint", model.inpaint(covered, hole, labels)),
      ("inpaint_cm", model.inpaint(covered, hole, labels, task="inpaint_cm")),
    ],
    "restore": [("JPEG, 10", poor), ("restore", model.restore(poor, labels))],
    "denoise": [
      ("noise 0.6", image_source.to_uint8(noisy)),
      ("denoise", model.denoise(noisy, None, labels)[0]),
    ],
    "super_resolve": [
      ("half", repeated),
      ("super_resolve", model.super_resolve(small, 2, labels)),
    ],
    "stroke": [
      ("sketch", repeated),
      ("stroke", model.stroke(repeated, labels)),
    ],
    "purify": [("attack", attacked), ("purify", model.purify(attacked))],
  }
  if model.image_shape[-1] == 3:
    grey = image_source.to_uint8(np.asarray(zero_shot.to_grey(floats)))
    rows["colorize"] = [
      ("grey", grey),
      ("colorize", model.colorize(grey, labels)),
    ]
  return rows


def _changed(bench: Bench) -> dict[str, list[tuple[str, np.ndarray]]]:
  """Rows of tasks that change what an image shows."""
  model, (images, _, labels) = bench.model, bench.some(SHOWN)
  way = bench.brightening()
  rows = {
    "attribute": [
      (f"shift {strength:+g}", model.shift(images, way, strength, labels))
      for strength in STRENGTHS
    ]
  }
  if labels is not None:
    new = (labels + 1) % model.num_classes
    rows["relabel"] = [("next class", model.relabel(images, labels, new))]
  return rows


# The page -------------------------------------------------------------------


def table(record: dict[str, Any], task: str) -> str:
  """A task's rows as Markdown."""
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
  return tables.markdown(["", "PSNR, dB", "class recognised"], rows)


def page(text: str) -> str:
  """docs/editing.md with what is between its marks made anew."""

  def fill(match: re.Match) -> str:
    name, _, task = match[2].partition("_")
    path = RESULTS / f"editing_{name}.json"
    body = "Not run yet."
    if path.exists():
      body = table(json.loads(path.read_text()), task)
    return f"{match[1]}{body}\n{match[3]}"

  return MARKED.sub(fill, text)


def main(argv: list[str] | None = None) -> None:
  """Measures, prints and writes."""
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
        "give a WORKDIR and its --classifier, or --table alone"
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
