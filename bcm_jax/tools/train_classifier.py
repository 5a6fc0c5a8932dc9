"""Trains a classifier: python -m bcm_jax.train_classifier --config=F --out=DIR.

A small ResNet learns the classes of the images of the config's section data;
its pooled activations are features for Frechet distances:
--config.eval.features=classifier --config.eval.features_path=DIR
(docs/evaluation.md). Exit status: 0 done, 65 bad input.
"""

import contextlib
import dataclasses
import functools
import math
import os
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from bcm_jax import errors
from bcm_jax.config import build
from bcm_jax.config import resolve
from bcm_jax.data import image_source
from bcm_jax.data import pipeline
from bcm_jax.metrics import classifier
from bcm_jax.models import resnet
from bcm_jax.training import hooks
from bcm_jax.training import multihost
from bcm_jax.training import optim
from bcm_jax.training import rng
from bcm_jax.training import sharding
from bcm_jax.utils import cli
from bcm_jax.utils import provenance

_MIN_SIDE = 8
# Test images fetched at a time.
_BLOCK = 1000
# Small sets are learnt after as many epochs; the steps are ten minutes of two
# cores on 32x32 images.
_EPOCHS, _MAX_STEPS = 50, 4500


@dataclasses.dataclass(frozen=True)
class Settings:
  """The numbers of a training.

  Attributes:
    steps: of the optimiser; None is 50 epochs, at most 4,500 steps.
    batch_size: images per step.
    learning_rate: peak rate of AdamW; it rises for a tenth of the steps, then
      falls to 0 as a cosine.
    seed: of initial weights, order, flips and crops.
    weight_decay: decoupled decay.
    grad_clip: bound of the gradient's global norm.
    label_smoothing: share of the probability that is spread over all classes
      (Szegedy et al., "Rethinking the Inception Architecture", 2016).
  """

  steps: int | None = None
  batch_size: int = 128
  learning_rate: float = 3e-3
  seed: int = 0
  weight_decay: float = 0.05
  grad_clip: float = 1.0
  label_smoothing: float = 0.1

  def __post_init__(self):
    for name, low in (("steps", 1), ("batch_size", 1), ("seed", 0)):
      value = getattr(self, name)
      if value is not None and value < low:
        raise errors.UserError(f"--{name}={value} must be at least {low}")
    if not 0 < self.learning_rate < math.inf:
      raise errors.UserError(
          f"--learning_rate={self.learning_rate} must be above 0"
      )

  def for_images(self, count: int) -> "Settings":
    """These settings with a number of steps, for so many images."""
    steps = min(_MAX_STEPS, -(-_EPOCHS * count // self.batch_size))
    return dataclasses.replace(self, steps=self.steps or steps)

  def optimizer(self) -> optax.GradientTransformation:
    """AdamW with its schedule."""
    return optim.Optimizer(
        name="adamw",
        learning_rate=self.learning_rate,
        schedule="cosine",
        warmup_steps=self.steps // 10,
        schedule_steps=self.steps,
        weight_decay=self.weight_decay,
        grad_clip=self.grad_clip,
    ).build()


def crop_margin(image_shape: tuple[int, int, int]) -> int:
  """Pixels of padding for random crops: 1 of 8, 4 of 32 and more."""
  return min(4, min(image_shape[:2]) // 8)


def random_crop(key: jax.Array, image: jax.Array, margin: int) -> jax.Array:
  """Moves an image [H, W, C] by up to `margin` pixels; edges are reflected.

  The crop of 4 pixels is that of He et al. (2016) on CIFAR-10.
  """
  padded = jnp.pad(image, [(margin, margin)] * 2 + [(0, 0)], mode="reflect")
  corner = jax.random.randint(key, (2,), 0, 2 * margin + 1)
  return jax.lax.dynamic_slice(padded, (*corner, 0), image.shape)


def make_step(network: resnet.ResNet, settings: Settings, margin: int):
  """Returns step(params, opt_state, step, batch) -> (params, opt_state, loss).

  batch: 'image' uint8 [B, H, W, C], 'label' int32 [B] and 'index' int32 [B],
  the positions in the batch, by which crops are keyed. loss is the mean
  cross-entropy before the step.
  """
  optimizer = settings.optimizer()

  def loss(params, images, labels):
    _, logits = network.apply({"params": params}, images)
    targets = optax.smooth_labels(
        jax.nn.one_hot(labels, network.num_classes), settings.label_smoothing
    )
    return optax.softmax_cross_entropy(logits, targets).mean()

  def step_fn(params, opt_state, step, batch):
    keys = rng.example_keys(settings.seed, "crop", step, batch["index"])
    crop = jax.vmap(functools.partial(random_crop, margin=margin))
    images = crop(keys, batch["image"]).astype(jnp.float32)
    value, grads = jax.value_and_grad(loss)(params, images, batch["label"])
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value

  return step_fn


def fit(
    network: resnet.ResNet,
    source: image_source.Source,
    settings: Settings,
    flip: bool,
    progress: hooks.Progress,
) -> Any:
  """Trains a network on all devices.

  Args:
    source: labelled images, those that `network` takes.
    flip: mirror images left to right at random.
    progress: shows steps and losses.

  Returns:
    Parameters, on the host.

  Raises:
    UserError: a batch larger than the data set, or a loss that is not finite.
  """
  batches = pipeline.Batches(
      source, settings.seed, settings.batch_size, flip=flip
  )
  devices = jax.devices()[: math.gcd(jax.device_count(), settings.batch_size)]
  runner = sharding.Jit(sharding.make_mesh(devices))
  params = runner.place(_init(network, source.image_shape, settings.seed))
  opt_state = runner.place(settings.optimizer().init(params))
  step_fn = jax.jit(
      make_step(network, settings, crop_margin(source.image_shape)),
      donate_argnums=(0, 1),
  )
  stream = pipeline.prefetch(batches, 0, settings.steps)
  with contextlib.closing(stream):
    for step, batch in enumerate(stream):
      batch = {k: batch[k] for k in ("image", "label", "index")}
      params, opt_state, loss = step_fn(
          params, opt_state, step, runner.batch(batch)
      )
      # Waited for: where devices are cores of one host, many steps under way
      # can take each other's threads and never end.
      if not np.isfinite(loss):
        raise errors.UserError(
            f"step {step + 1}: the loss is {float(loss)}; lower "
            f"--learning_rate={settings.learning_rate}"
        )
      progress.update(step + 1, loss=loss)
  return jax.device_get(params)


def _init(network, image_shape, seed: int) -> Any:
  images = jnp.zeros((1, *image_shape))
  key = rng.stream_key(seed, "init")
  return jax.jit(network.init)(key, images)["params"]


def accuracy(
    model: classifier.Classifier, source: image_source.Source
) -> float:
  """Share of the images of a source whose class is recognised, in [0, 1]."""
  right = 0
  for first in range(0, len(source), _BLOCK):
    ids = np.arange(first, min(first + _BLOCK, len(source)))
    batch = source.fetch(ids)
    right += np.sum(model.classify(batch["image"]) == batch["label"])
  return float(right / len(source))


def train_classifier(
    config: ml_collections.ConfigDict,
    out: str,
    settings: Settings,
    name: str | None = None,
    overwrite: bool = False,
) -> str:
  """Trains a classifier, measures and writes it.

  Args:
    config: resolved config; its section data gives the images.
    out: folder, receives classifier.safetensors and classifier.json.
    settings: numbers of the training.
    name: of the features; None is '<data set> ResNet'.
    overwrite: replace an existing classifier.

  Returns:
    What was written, for a terminal.

  Raises:
    UserError: images without labels or too small, a batch larger than the
      data set, a folder that cannot be written or holds a classifier.
  """
  _check_out(out, overwrite)
  experiment = build.build(config, to_train=False)
  train, test = experiment.source("train"), _test_source(experiment)
  _check_source(train)
  settings = settings.for_images(len(train))
  network = resnet.for_images(train.image_shape, train.num_classes)
  progress = hooks.Progress(
      settings.steps, every_secs=config.log.progress_secs
  )
  with contextlib.closing(progress):
    params = fit(network, train, settings, config.data.flip, progress)
  data_name = provenance.data_name(config.data)
  found = classifier.Classifier(
      name or f"{data_name} ResNet", network, params, train.image_shape
  )
  share = None if test is None else accuracy(found, test)
  classifier.save_classifier(out, found, {
      "test_accuracy": share,
      "test_images": None if test is None else len(test),
      "data": {
          "name": data_name,
          "digest": image_source.fingerprint(train),
          "images": len(train),
      },
      "training": dataclasses.asdict(settings) | {
          "flip": config.data.flip, "crop": crop_margin(train.image_shape)
      },
      **provenance.machine(),
  })
  told = "no test split" if share is None else f"{share:.2%} of {len(test):,}"
  return f"{found.name} ({found.digest}): test accuracy {told}\nwritten: {out}"


def _check_out(out: str, overwrite: bool) -> None:
  """Finds out before the training that its result could not be written."""
  if os.path.exists(os.path.join(out, classifier.FACTS)) and not overwrite:
    raise errors.UserError(
        f"--out={out} holds a classifier already; choose another folder, or "
        "replace it with --overwrite"
    )
  try:
    os.makedirs(out, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()
  except OSError as e:
    raise errors.UserError(
        f"cannot write to --out={out}: {e.strerror}; choose another folder"
    ) from e


def _test_source(experiment: build.Experiment) -> image_source.Source | None:
  """The test split; where there is none, that is said."""
  try:
    return experiment.source("test")
  except errors.UserError as e:
    print(f"the accuracy will not be measured: {e}", file=sys.stderr)
    return None


def _check_source(source: image_source.Source) -> None:
  if source.num_classes is None:
    raise errors.UserError(
        f"{source.name} has no labels, but a classifier needs classes; use "
        "labelled images, for example one folder a class"
    )
  if min(source.image_shape[:2]) < _MIN_SIDE:
    height, width, _ = source.image_shape
    raise errors.UserError(
        f"images of {source.name} are {height}x{width}, expected at least "
        f"{_MIN_SIDE}x{_MIN_SIDE}; enlarge them"
    )


def _parser() -> cli.Parser:
  parser = cli.Parser("bcm_jax.train_classifier", __doc__, config="file")
  default = Settings()
  add = parser.add_argument
  add("--out", required=True, metavar="DIR", help="folder to make")
  add("--steps", type=int, metavar="N",
      help="optimizer steps (50 epochs, at most 4500)")
  add("--batch_size", type=int, default=default.batch_size, metavar="N",
      help="images per step (%(default)s)")
  add("--learning_rate", type=float, default=default.learning_rate,
      metavar="RATE", help="peak learning rate of AdamW (%(default)s)")
  add("--seed", type=int, default=default.seed, metavar="N",
      help="seed of weights, order and augmentation (%(default)s)")
  add("--name", help="name of the features ('<data set> ResNet')")
  add("--overwrite", action="store_true", help="replace a classifier in DIR")
  return parser


def main(argv: list[str] | None = None) -> None:
  """Entry point; exits with 65 and one line on bad input."""
  with cli.reporting():
    flags = vars(_parser().parse_args(argv))
    file, overrides = flags.pop("config"), flags.pop("overrides")
    where = {k: flags.pop(k) for k in ("out", "name", "overwrite")}
    settings = Settings(**flags)
    config = resolve.load(file, overrides, None, False)
    multihost.use_cores(config.parallel.cpu_devices, settings.batch_size)
    print(train_classifier(config, settings=settings, **where))


if __name__ == "__main__":
  main()
