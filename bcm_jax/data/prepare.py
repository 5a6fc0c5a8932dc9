"""Writes images as raw pixels that are read by index: data.name='prepared'.

  bcm_jax prepare photos photos64 --size=64

IN is a folder of images, a .npz file, a zip file of images, a folder with train
and test files of these kinds, or tfds:cifar10, tfds:imagenet_resized/64x64 or
tfds:imagenet2012. The same input gives the same bytes on every machine
(docs/datasets.md). Exit status: 0 done, 65 bad input.
"""

from collections.abc import Callable, Iterator, Mapping
import os
from typing import Any

import numpy as np
import tqdm

from bcm_jax import __version__
from bcm_jax import errors
from bcm_jax.data import dataset_spec
from bcm_jax.data import datasets
from bcm_jax.data import encoded
from bcm_jax.data import image_labels
from bcm_jax.data import image_source
from bcm_jax.data import image_tree
from bcm_jax.data import pipeline
from bcm_jax.data import prepared
from bcm_jax.data import resizing
from bcm_jax.utils import cli
from bcm_jax.utils import files

# Maximum number of examples per block; the next block is decoded while one is
# written.
_BLOCK = 512
_BLOCK_BYTES = 64 * 2**20
# Number of classes listed in the summary.
_MAX_LISTED = 20
GAPS = ("refuse", "close", "keep")
_TFDS = {
    "tfds:cifar10": "cifar10",
    "tfds:imagenet_resized/64x64": "imagenet64",
    "tfds:imagenet2012": "imagenet2012",
}


def prepare(
    source: str,
    out: str,
    size: int | None = None,
    crop: str = "adm",
    skip_corrupt: bool = False,
    holdout: int = 0,
    channels: int = 3,
    shard_mb: int = 256,
    workers: int | None = None,
    overwrite: bool = False,
    data_dir: str | None = None,
    labels: str = "auto",
    gaps: str = "refuse",
) -> str:
  """Writes a prepared dataset atomically.

  Args:
    source: IN of the command.
    out: output folder.
    size: height and width; None keeps the stored size, which must be the same
      for all images.
    crop: cropping and resizing method, a key of `resizing.BY_NAME`.
    skip_corrupt: skip files that cannot be decoded.
    holdout: number of train examples to move to the test split if the input has
      none: the first of a permutation with seed 0.
    channels: 3 (RGB) or 1 (gray).
    shard_mb: maximum MiB of pixels per shard.
    workers: number of decoding threads; None: one per core. Threads are as fast
      as processes, because PIL releases the GIL.
    overwrite: replace an existing prepared dataset.
    data_dir: TFDS folder; None uses TFDS's default.
    labels: source of the labels, see `image_labels.find`.
    gaps: a key of GAPS: if train has no images of some class, as with labels
      that start at 1.

  Returns:
    Summary of the written files, for the terminal.

  Raises:
    UserError: bad input, or `out` already exists.
  """
  name, path = kind_of(source)
  out = os.path.expanduser(out)
  _check_free(out, overwrite, path)
  _check_positive(shard_mb=shard_mb, workers=workers)
  if gaps not in GAPS:
    raise errors.unknown_name("--gaps", gaps, GAPS)
  dataset = datasets.find(
      name, path=path, size=size, crop=crop, skip_corrupt=skip_corrupt,
      channels=channels, threads=workers, labels=labels,
  )
  with files.new_folder(out, overwrite=True) as folder:
    sources = {s: dataset.open(s, data_dir) for s in dataset.splits}
    dataset, remap = _without_gaps(dataset, sources, gaps)
    splits, skipped = _write_splits(sources, holdout, folder, shard_mb, remap)
    prepared.write_manifest(
        folder,
        image_shape=dataset.image_shape,
        num_classes=dataset.num_classes,
        class_names=dataset.class_names,
        splits=splits,
        made=dict(
            source=os.path.basename(os.path.abspath(path)) if path else source,
            size=size, crop=None if size is None else crop, holdout=holdout,
            skipped=skipped, labels=labels, gaps=gaps, bcm_jax=__version__,
        ),
    )
  return _summary(dataset, splits, skipped, out)


def kind_of(source: str) -> tuple[str, str | None]:
  """Returns data.name and data.path of an input.

  Args:
    source: IN of the command.

  Raises:
    UserError: the input does not exist or has an unknown format.
  """
  if source.startswith("tfds:"):
    if source not in _TFDS:
      raise errors.unknown_name("IN", source, _TFDS)
    return _TFDS[source], None
  path = os.path.expanduser(source)
  if os.path.isdir(path):
    if prepared.is_prepared(path):
      raise errors.UserError(
          f"IN: {source} is already prepared, expected its source images; pass"
          " those"
      )
    names = image_tree.Disk(path).entries().files
    for stem, suffix in map(os.path.splitext, names):
      kind = suffix[1:].lower()
      if kind in ("npz", "zip") and dataset_spec.split_word(stem) == "train":
        return kind, path
    return "folder", path
  for kind in ("npz", "zip"):
    if path.lower().endswith(f".{kind}"):
      return kind, path
  raise errors.UserError(
      f"IN: got {source}, expected a folder, a .npz or .zip file, or one of"
      f" {', '.join(_TFDS)}; correct it"
  )


def _check_free(out: str, overwrite: bool, source: str | None) -> None:
  inside = source and os.path.realpath(out).startswith(
      os.path.join(os.path.realpath(source), "")
  )
  if not out or inside:
    raise errors.UserError(
        f"OUT: got {out!r}, expected a folder outside IN; choose another OUT"
    )
  if not os.path.exists(out) or (os.path.isdir(out) and not os.listdir(out)):
    return
  if not prepared.is_prepared(out):
    raise errors.UserError(
        f"OUT: {out} already exists and is not a prepared dataset; choose"
        " another OUT"
    )
  if not overwrite:
    raise errors.UserError(
        f"OUT: {out} is already prepared; choose another OUT, or replace it"
        " with --overwrite"
    )


def _check_positive(**values: int | None) -> None:
  for name, value in values.items():
    if value is not None and value < 1:
      raise errors.UserError(
          f"--{name}: got {value}, expected 1 or more; raise it"
      )


def _without_gaps(
    dataset: dataset_spec.DataSet,
    sources: Mapping[str, image_source.Source],
    gaps: str,
) -> tuple[dataset_spec.DataSet, Callable[[np.ndarray], np.ndarray]]:
  """Returns the dataset as it is written, and a map of labels to written ones.

  Raises:
    UserError: train has no images of some class and `gaps` is 'refuse', or
      another split has a class that train does not have.
  """
  # TFDS's datasets have no such array, and no gaps.
  labels = getattr(sources.get("train"), "labels", None)
  if dataset.num_classes is None or labels is None:
    return dataset, lambda labels: labels
  present = np.unique(labels)
  missing = image_labels.missing_classes(present, dataset.num_classes)
  if not missing or gaps == "keep":
    return dataset, lambda labels: labels
  if gaps == "refuse":
    raise errors.UserError(
        f"IN: got {missing}, labels {present[0]} to {present[-1]}, expected"
        " images of every class from 0; --gaps=close numbers those with images"
        " 0, 1, ..., --gaps=keep keeps the labels"
    )
  for source in sources.values():
    unknown = np.setdiff1d(source.labels, present)
    if unknown.size:
      raise errors.UserError(
          f"--gaps: got label {unknown[0]} of {source.name}, expected a label"
          " of train; correct the labels, or set --gaps=keep"
      )
  names = dataset.class_names or range(dataset.num_classes)
  dataset = dataset._replace(
      num_classes=len(present),
      class_names=tuple(str(names[k]) for k in present.tolist()),
  )
  return dataset, lambda labels: np.searchsorted(present, labels)


def _write_splits(
    sources: Mapping[str, image_source.Source],
    holdout: int,
    folder: str,
    shard_mb: int,
    remap: Callable[[np.ndarray], np.ndarray],
) -> tuple[dict[str, Any], list[str]]:
  """Writes all shards; returns the manifest entries and the skipped files."""
  splits, skipped = {}, []
  for split, source in sources.items():
    if isinstance(source, encoded.EncodedSource):
      skipped += [f"{split}/{file}" for file in source.skipped]
    parts = _parts(split, len(source), holdout, tuple(sources))
    for name, ids in parts.items():
      splits[name] = _write(source, ids, name, folder, shard_mb, remap)
  return splits, skipped


def _parts(
    split: str, n: int, holdout: int, splits: tuple[str, ...]
) -> dict[str, np.ndarray]:
  """Returns {output split: example ids} of one split of the input."""
  if not holdout:
    return {split: np.arange(n)}
  if "test" in splits:
    raise errors.UserError(
        f"--holdout: got {holdout}, expected 0, because the input has a test"
        " split; omit it"
    )
  if not 0 < holdout < n:
    raise errors.UserError(
        f"--holdout: got {holdout}, expected 1 to {n - 1}, fewer than the {n}"
        " examples of train; change it"
    )
  order = pipeline.epoch_permutation(0, 0, n)
  return {
      "train": np.sort(order[holdout:]), "test": np.sort(order[:holdout])
  }


def _write(
    source: image_source.Source,
    ids: np.ndarray,
    split: str,
    folder: str,
    shard_mb: int,
    remap: Callable[[np.ndarray], np.ndarray],
) -> dict[str, Any]:
  """Writes the shards of a split; returns its manifest entry."""
  record = prepared.record_bytes(source.image_shape)
  per_shard = max(1, shard_mb * 2**20 // record)
  shards = np.split(ids, range(per_shard, len(ids), per_shard))
  block = max(1, min(_BLOCK, _BLOCK_BYTES // record))
  entries = []
  with tqdm.tqdm(total=len(ids), unit=" images", desc=split) as bar:
    for k, examples in enumerate(shards):
      file = f"{split}-{k:05d}-of-{len(shards):05d}.array_record"
      writer = prepared.ShardWriter(os.path.join(folder, file))
      for batch in _batches(source, examples, block):
        writer.write(batch["image"], remap(batch["label"]))
        bar.update(len(batch["label"]))
      entries.append(writer.close())
  return {"count": len(ids), "shards": entries}


def _batches(
    source: image_source.Source, ids: np.ndarray, block: int
) -> Iterator[dict[str, np.ndarray]]:
  """Yields blocks of examples in order, prefetched by a thread."""

  def fetch(k):
    examples = ids[k * block : (k + 1) * block]
    batch = source.fetch(examples)
    image_source.check_labels(
        batch["label"], examples, source.num_classes, source.name
    )
    return batch

  return pipeline.prefetch(fetch, 0, -(-len(ids) // block))


def _summary(dataset, splits, skipped, out) -> str:
  counts = ", ".join(f"{name} {s['count']:,}" for name, s in splits.items())
  height, width, channels = dataset.image_shape
  classes = "no" if dataset.num_classes is None else f"{dataset.num_classes:,}"
  return (
      f"{counts} images of {height}x{width}x{channels}, {classes} classes,"
      f" {len(skipped)} files skipped\n{_mapping(dataset)}written: {out}; use"
      f" it with --config.data.name=prepared --config.data.path={out}"
  )


def _mapping(dataset: dataset_spec.DataSet) -> str:
  """Returns a line with the source of the labels and the class of each."""
  text = ""
  if dataset.label_source:
    text = f"labels from {dataset.label_source}"
  if dataset.class_names:
    listed = [
        f"{k} {errors.printable(name)}"
        for k, name in enumerate(dataset.class_names[:_MAX_LISTED])
    ]
    more = ", ..." if len(dataset.class_names) > _MAX_LISTED else ""
    text += f": {', '.join(listed)}{more}"
  return f"{text}\n" if text else ""


def _parser() -> cli.Parser:
  parser = cli.Parser("prepare", __doc__)
  add = parser.add_argument
  add("source", metavar="IN", help="images, or tfds:NAME")
  add("out", metavar="OUT", help="folder to make")
  add("--size", type=int, metavar="N", help="side in pixels (the images' own)")
  add("--crop", default="adm", metavar="NAME",
      help=f"{', '.join(resizing.BY_NAME)} (%(default)s)")
  add("--skip_corrupt", action="store_true",
      help="check all files first, skip those that do not decode")
  add("--labels", default="auto", metavar="SOURCE",
      help=f"{', '.join(image_labels.CHOICES)}, a file, a regex (%(default)s)")
  add("--gaps", default="refuse", metavar="NAME",
      help=f"classes without images: {', '.join(GAPS)} (%(default)s)")
  add("--holdout", type=int, default=0, metavar="N",
      help="if there is no test split, N train examples become it")
  add("--channels", type=int, default=3, metavar="N",
      help="1 (gray) or 3 (RGB) (%(default)s)")
  add("--shard_mb", type=int, default=256, metavar="N",
      help="largest size of a file in MiB (%(default)s)")
  add("--workers", type=int, metavar="N",
      help="threads that decode (one per core)")
  add("--overwrite", action="store_true", help="replace a prepared OUT")
  add("--data_dir", metavar="DIR", help="folder of TFDS")
  return parser


def main(argv: list[str] | None = None) -> None:
  """Entry point; exits with 65 and one line on bad input."""
  with cli.reporting():
    print(prepare(**vars(_parser().parse_args(argv))))


if __name__ == "__main__":
  main()
