"""Features and reference statistics that samples are evaluated with."""

from collections.abc import Iterable, Iterator
import dataclasses
import hashlib
import inspect
import os

import jax
from jax.experimental import multihost_utils
import numpy as np
import tqdm

from bcm_jax import errors
from bcm_jax.config import build
from bcm_jax.config import schema
from bcm_jax.data import image_source
from bcm_jax.interop.families import inception_names
from bcm_jax.metrics import classifier
from bcm_jax.metrics import feature_extractors
from bcm_jax.metrics import inception
from bcm_jax.metrics import moments
from bcm_jax.metrics import quality
from bcm_jax.metrics import reference_stats
from bcm_jax.utils import cli

# Images read and evaluated at a time.
_BLOCK = 1024


def open_features(section: schema.Eval) -> feature_extractors.Features:
  """Returns the features of section eval.

  Raises:
    UserError: unknown features, or weights that are missing or do not match.
  """
  name, path = section.features, section.features_path
  if name == "pixels":
    return feature_extractors.Pixels()
  if ":" in name:
    return _user_defined_features(name)
  if name not in ("inception", "classifier"):
    raise errors.unknown_name(
        "eval.features", name,
        ["pixels", "inception", "classifier", "module:function"],
    )
  if path is None:
    expected = {
        "inception": "the weights file of pytorch-fid "
                     "(pt_inception-2015-12-05-6726825d.pth)",
        "classifier": "a folder written by bcm_jax.tools.train_classifier",
    }
    raise errors.UserError(
        f"eval.features={name!r} needs eval.features_path: {expected[name]}"
    )
  if name == "classifier":
    return classifier.load_classifier(path)
  params = inception_names.load_inception(path)
  return inception.inception_features(params, section.resize)


def _user_defined_features(name: str) -> feature_extractors.Features:
  function = cli.named_function(
      "eval.features", name, "of uint8 images [n, H, W, C]"
  )
  try:
    code = inspect.getsource(function)
  except (OSError, TypeError):  # Compiled, or not a plain function.
    code = repr(function)
  digest = hashlib.sha256(code.encode()).hexdigest()[:12]
  return feature_extractors.FunctionFeatures(function, name, digest)


def check(experiment: build.Experiment) -> None:
  """Raises UserError for features or a reference that cannot be used."""
  section = experiment.eval
  features = open_features(section)
  if section.reference is not None:
    reference = reference_stats.load_reference(section.reference)
    _check_reference(reference, features, experiment.image_shape)


def _check_reference(
    reference: reference_stats.Reference, features, shape
) -> None:
  """Checks features, dimensions and images of a reference file.

  Raises:
    UserError: they are not those of the features for images of this shape.
  """
  if reference.pooled is not None:
    reference_stats.check_features(reference, features.name, features.digest)
    black = features(np.zeros((1, *shape), np.uint8))
    reference_stats.check_size(reference, features.name, black)
  if reference.images is not None:
    channels = reference.images.shape[3]
    if channels != shape[2] or isinstance(
        features, feature_extractors.Pixels
    ) and reference.images.shape[1:] != shape:
      raise errors.UserError(
          f"eval.reference: got images {reference.images.shape}, expected [n, "
          f"{', '.join(map(str, shape))}] as in this data; use the file of this"
          " data"
      )


def in_blocks(
    source: image_source.Source, ids: np.ndarray
) -> Iterator[dict[str, np.ndarray]]:
  """Yields the examples of a source with these ids, in blocks."""
  for first in range(0, len(ids), _BLOCK):
    yield source.fetch(ids[first : first + _BLOCK])


def compute(
    source: image_source.Source, features: feature_extractors.Features
) -> reference_stats.Reference:
  """Computes statistics of all images of a source, sharded over hosts."""
  shards = np.array_split(np.arange(len(source)), jax.process_count())
  ids = shards[jax.process_index()]
  blocks = (block["image"] for block in in_blocks(source, ids))
  pooled, spatial = _measure(blocks, len(ids), features, source.name)
  return _reference(
      moments.gather(pooled), spatial and moments.gather(spatial), features,
      describe(source), image_source.fingerprint(source),
  )


def _measure(
    blocks: Iterable[np.ndarray],
    count: int,
    features: feature_extractors.Features,
    name: str,
) -> tuple[moments.Moments, moments.Moments | None]:
  """Computes pooled and spatial moments of `count` images given in blocks."""
  pooled = spatial = None
  with tqdm.tqdm(
      total=count, desc=f"{features.name} of {name}", unit=" images",
      disable=None,
  ) as bar:
    for block in blocks:
      part = features(block)
      pooled = _add(pooled, part.pooled)
      if part.spatial is not None:
        spatial = _add(spatial, part.spatial)
      bar.update(len(block))
  return pooled, spatial


def _reference(
    pooled, spatial, features, data: str, images_digest: str
) -> reference_stats.Reference:
  return reference_stats.Reference(
    pooled=pooled.gaussian(),
    spatial=spatial and spatial.gaussian(),
    count=pooled.count,
    features_name=features.name,
    features_digest=features.digest,
    data=data,
    images_digest=images_digest,
  )


def _add(total: moments.Moments | None, rows: np.ndarray) -> moments.Moments:
  return (total or moments.empty(rows.shape[1])).update(rows)


def describe(source: image_source.Source) -> str:
  """Describes the images of a source, for the metadata of its statistics."""
  return (
    f"{source.name}: {len(source)} images {source.image_shape}, "
    f"fingerprint {image_source.fingerprint(source)}"
  )


def open_target(
  experiment: build.Experiment,
  features: feature_extractors.Features,
  folder: str,
) -> quality.Target:
  """Returns the real images that samples of an experiment are compared with.

  Statistics are read from eval.reference, or computed from the training split
  once and cached in `folder`.

  Raises:
    UserError: an invalid reference file, or one of other features.
  """
  section = experiment.eval
  if section.reference is not None:
    reference = _from_file(section.reference, features, experiment.image_shape)
  else:
    reference = _of_training_split(experiment, features, folder)
  if reference.images is not None:
    real = reference.images[: section.num_real_for_prdc]
    return quality.Target(reference, features(real).pooled)
  source = experiment.source_if_available("train")
  if source is None:
    print(
      "precision, recall, density and coverage: skipped; eval.reference has "
      "no images, and the training images are not available"
    )
    return quality.Target(reference, None)
  parts = [
    features(b["image"]).pooled
    for b in in_blocks(source, chosen(source, section.num_real_for_prdc))
  ]
  return quality.Target(reference, np.concatenate(parts))


def chosen(source: image_source.Source, count: int | None) -> np.ndarray:
  """Returns ids of the real images for KID and PRDC, always the same ones."""
  return np.random.default_rng(0).permutation(len(source))[:count]


def _from_file(path: str, features, shape) -> reference_stats.Reference:
  reference = reference_stats.load_reference(path)
  _check_reference(reference, features, shape)
  if not reference.data:
    name = os.path.basename(path)
    reference = dataclasses.replace(reference, data=name)
  if reference.pooled is not None:
    return reference
  # A file of samples: computes statistics of its images.
  images = reference.images
  blocks = (images[i : i + _BLOCK] for i in range(0, len(images), _BLOCK))
  pooled, spatial = _measure(blocks, len(images), features, reference.data)
  source = image_source.ArraySource(images, name=reference.data)
  measured = _reference(
      pooled, spatial, features, reference.data,
      image_source.fingerprint(source),
  )
  return dataclasses.replace(measured, images=images)


def _of_training_split(
  experiment, features, folder
) -> reference_stats.Reference:
  source = experiment.source("train")
  path = os.path.join(
    folder,
    f"reference_{features.digest}_{image_source.fingerprint(source)}.npz",
  )
  # Host 0 decides for all hosts, because `compute` is a collective.
  exists = multihost_utils.broadcast_one_to_all(np.int32(os.path.exists(path)))
  if exists:
    return reference_stats.load_reference(path)
  reference = compute(source, features)
  if jax.process_index() == 0:
    reference_stats.save_reference(path, reference)
  return reference


def run(experiment: build.Experiment, workdir: str) -> str:
  """Mode reference: writes statistics of the training split.

  The file, workdir/reference.npz, has ADM's keys, so that other evaluators can
  read it, with eval.num_real_for_prdc images for precision and recall.

  Returns:
    Path of the file.
  """
  section = experiment.eval
  features = open_features(section)
  source = experiment.source("train")
  ids = chosen(source, section.num_real_for_prdc)
  reference = dataclasses.replace(
    compute(source, features),
    images=np.concatenate([b["image"] for b in in_blocks(source, ids)]),
  )
  path = os.path.join(workdir, "reference.npz")
  if jax.process_index() == 0:
    reference_stats.save_reference(path, reference)
  print(
    f"{reference.data}\nfeatures {features.name} ({features.digest}), "
    f"statistics {reference.digest()}\nwritten: {path}"
  )
  return path
