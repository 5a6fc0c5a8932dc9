"""Trains a classifier: bcm_jax train_classifier --config=F --out=DIR.

Trains a small ResNet on the labeled images of config section `data`. Its
pooled activations are features for Frechet distances:
--config.eval.features=classifier --config.eval.features_path=DIR
(docs/evaluation.md). Exit status: 0 success, 65 invalid input.
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
# Number of test images per block.
_BLOCK = 1000
# Default number of steps: 50 epochs, at most 4,500 (ten minutes on two cores
# for 32x32 images).
_EPOCHS, _MAX_STEPS = 50, 4500


@dataclasses.dataclass(frozen=True)
class Settings:
  """Hyperparameters of the classifier training.

  Attributes:
    steps: number of optimizer steps; None is 50 epochs, at most 4,500 steps.
    batch_size: images per step.
    learning_rate: peak learning rate of AdamW, with linear warmup over a tenth
      of the steps and cosine decay to 0.
    seed: seed of initialization, order, flips and crops.
    weight_decay: decoupled weight decay.
    grad_clip: maximal global norm of the gradient.
    label_smoothing: probability mass that is spread over all classes
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
    for name, low, high in (
        ("steps", 1, 2**31 - 1), ("batch_size", 1, 2**31 - 1),
        ("seed", 0, 2**32 - 1),
    ):
      value = getattr(self, name)
      if value is not None and not low <= value <= high:
        raise errors.UserError(
            f"--{name}: got {value}, expected {low} to {high}"
        )
    if not 0 < self.learning_rate < math.inf:
      raise errors.UserError(
          f"--learning_rate: got {self.learning_rate}, expected a positive "
          "finite number"
      )

  def for_images(self, count: int) -> "Settings":
    """Returns settings with the default number of steps for `count` images."""
    steps = min(_MAX_STEPS, -(-_EPOCHS * count // self.batch_size))
    return dataclasses.replace(self, steps=self.steps or steps)

  def optimizer(self) -> optax.GradientTransformation:
    """Returns AdamW with its learning-rate schedule."""
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
  """Returns the padding of random crops: an eighth of the size, at most 4."""
  return min(4, min(image_shape[:2]) // 8)


def random_crop(key: jax.Array, image: jax.Array, margin: int) -> jax.Array:
  """Shifts an image [H, W, C] by up to `margin` pixels with reflected edges.

  He et al. (2016) use a margin of 4 pixels on CIFAR-10.
  """
  padded = jnp.pad(image, [(margin, margin)] * 2 + [(0, 0)], mode="reflect")
  corner = jax.random.randint(key, (2,), 0, 2 * margin + 1)
  return jax.lax.dynamic_slice(padded, (*corner, 0), image.shape)


def make_step(network: resnet.ResNet, settings: Settings, margin: int):
  """Returns step(params, opt_state, step, batch) -> (params, opt_state, loss).

  `batch` contains 'image' uint8 [B, H, W, C], 'label' int32 [B] and 'index'
  int32 [B], the position in the batch, which determines the key of the crop.
  `loss` is the mean cross-entropy before the update.
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
    network: ResNet for the images of `source`.
    source: labeled images.
    settings: hyperparameters.
    flip: apply random horizontal flips.
    progress: displays steps and losses.

  Returns:
    Parameters, on the host.

  Raises:
    UserError: a batch larger than the dataset, or a non-finite loss.
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
      # Blocks until the step is done: with several CPU devices, many concurrent
      # steps can deadlock in the thread pool.
      if not np.isfinite(loss):
        raise errors.UserError(
            f"loss: got {float(loss)} at step {step + 1}, expected a finite "
            f"number; lower --learning_rate={settings.learning_rate}"
        )
      progress.update(step + 1, loss=loss)
  return jax.device_get(params)


def _init(network, image_shape, seed: int) -> Any:
  """Initializes the parameters."""
  images = jnp.zeros((1, *image_shape))
  key = rng.stream_key(seed, "init")
  return jax.jit(network.init)(key, images)["params"]


def accuracy(
    model: classifier.Classifier, source: image_source.Source
) -> float:
  """Computes the top-1 accuracy in [0, 1]."""
  num_correct = 0
  for first in range(0, len(source), _BLOCK):
    ids = np.arange(first, min(first + _BLOCK, len(source)))
    batch = source.fetch(ids)
    num_correct += np.sum(model.classify(batch["image"]) == batch["label"])
  return float(num_correct / len(source))


def train_classifier(
    config: ml_collections.ConfigDict,
    out: str,
    settings: Settings,
    name: str | None = None,
    overwrite: bool = False,
) -> str:
  """Trains a classifier, computes its test accuracy and writes it.

  Args:
    config: resolved config; section `data` specifies the images.
    out: folder of classifier.safetensors and classifier.json.
    settings: hyperparameters.
    name: name of the features; None is '<dataset> ResNet'.
    overwrite: replace an existing classifier.

  Returns:
    A summary for the terminal.

  Raises:
    UserError: images without labels or too small, a batch larger than the
      dataset, a folder that is not writable or contains a classifier.
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
  model = classifier.Classifier(
      name or f"{data_name} ResNet", network, params, train.image_shape
  )
  test_accuracy = None if test is None else accuracy(model, test)
  classifier.save_classifier(out, model, {
      "test_accuracy": test_accuracy,
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
  summary = "not measured (no test split)"
  if test_accuracy is not None:
    summary = f"{test_accuracy:.2%} of {len(test):,}"
  return (
      f"{model.name} ({model.digest}): test accuracy {summary}\n"
      f"written: {out}"
  )


def _check_out(out: str, overwrite: bool) -> None:
  """Raises UserError if `out` is not writable or contains a classifier."""
  if os.path.exists(os.path.join(out, classifier.FACTS)) and not overwrite:
    raise errors.UserError(
        f"--out: got {out}, which contains a classifier; choose another "
        "folder, or replace it with --overwrite"
    )
  try:
    os.makedirs(out, exist_ok=True)
    tempfile.TemporaryFile(dir=out).close()
  except OSError as e:
    raise errors.UserError(
        f"--out: got {out}, expected a writable folder ({e.strerror}); choose "
        "another one"
    ) from e


def _test_source(experiment: build.Experiment) -> image_source.Source | None:
  """Returns the test split; prints a warning and returns None without one."""
  try:
    return experiment.source("test")
  except errors.UserError as e:
    print(f"warning: test accuracy will not be measured: {e}", file=sys.stderr)
    return None


def _check_source(source: image_source.Source) -> None:
  """Raises UserError for images without labels or too small."""
  if source.num_classes is None:
    raise errors.UserError(
        f"data.name: got {source.name} without labels, expected labeled "
        "images, for example one folder per class"
    )
  if min(source.image_shape[:2]) < _MIN_SIDE:
    height, width, _ = source.image_shape
    raise errors.UserError(
        f"data.name: got {source.name} of {height}x{width} pixels, expected at "
        f"least {_MIN_SIDE}x{_MIN_SIDE}; enlarge them"
    )


def _parser() -> cli.Parser:
  parser = cli.Parser("train_classifier", __doc__, config="file")
  default = Settings()
  add = parser.add_argument
  add("--out", required=True, metavar="DIR", help="folder to create")
  add("--steps", type=int, metavar="N",
      help="optimizer steps (50 epochs, at most 4500)")
  add("--batch_size", type=int, default=default.batch_size, metavar="N",
      help="images per step (%(default)s)")
  add("--learning_rate", type=float, default=default.learning_rate,
      metavar="RATE", help="peak learning rate of AdamW (%(default)s)")
  add("--seed", type=int, default=default.seed, metavar="N",
      help="seed of weights, order and augmentation (%(default)s)")
  add("--name", help="name of the features ('<dataset> ResNet')")
  add("--overwrite", action="store_true", help="replace a classifier in DIR")
  return parser


def main(argv: list[str] | None = None) -> None:
  """Runs the command; exits with 65 and a one-line error on invalid input."""
  with cli.reporting():
    flags = vars(_parser().parse_args(argv))
    file, overrides = flags.pop("config"), flags.pop("overrides")
    output = {k: flags.pop(k) for k in ("out", "name", "overwrite")}
    settings = Settings(**flags)
    config = resolve.load(file, overrides)
    multihost.use_cores(config.parallel.cpu_devices, settings.batch_size)
    print(train_classifier(config, settings=settings, **output))


if __name__ == "__main__":
  main()
