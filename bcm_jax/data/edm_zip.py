"""Zip files of images, such as those of EDM and EDM2's dataset_tool.py.

An archive of EDM has images with names such as 00000/img00000000.png and a
dataset.json with {"labels": [["00000/img00000000.png", 6], ...]}, or null
without labels. Any other archive is read as a folder with its content. PATH is
a file (the train split, or all splits as folders) or a folder with train.zip
and test.zip.
"""

import lzma
import os
import zipfile
import zlib

from bcm_jax import errors
from bcm_jax.data import dataset_spec
from bcm_jax.data import decoding
from bcm_jax.data import folder
from bcm_jax.data import image_tree

_ENCRYPTED = 0x1


class Archive:
  """Thread-safe, picklable `image_tree.Tree` of a zip file.

  ZipFile locks the file position that its open members share. Members are read
  into memory and never extracted.

  Args:
    file: path of the zip file.
    prefix: folder in the archive, '' or ending with '/'.
    parent: archive of the same file, whose open file is used.

  Raises:
    UserError: the file cannot be opened, is encrypted, or has names that are
      repeated or lead out of the archive.
  """

  packed = True

  def __init__(
      self, file: str, prefix: str = "", parent: "Archive | None" = None
  ):
    self._file, self._prefix = file, prefix
    self.path = f"{file}/{prefix}".rstrip("/")
    if parent is not None:
      self._zip = parent._zip
      self._members, self._folders = parent._members, parent._folders
      return
    try:
      self._zip = zipfile.ZipFile(file)
    except (
        OSError, ValueError, EOFError, NotImplementedError, zipfile.BadZipFile
    ) as e:
      raise errors.UserError(
          f"{file}: cannot be read as a zip file ({type(e).__name__}: {e});"
          " correct data.path, or copy the file again"
      ) from e
    self._members, self._folders = _index(file, self._zip.infolist())

  def __reduce__(self):
    return Archive, (self._file, self._prefix)

  def entries(self) -> image_tree.Entries:
    """Returns the visible files and folders."""
    return self._folders[self._prefix]

  def sub(self, name: str) -> "Archive":
    """Returns a folder of this one."""
    return Archive(self._file, f"{self._prefix}{name}/", self)

  def identity(self) -> str:
    """Returns the folder's name; an archive has no links."""
    return self._prefix

  def read(self, file: str) -> bytes:
    """Returns the bytes of one member.

    Raises:
      CorruptImage: the checksum or the compressed data is wrong.
      UserError: the member is too large.
    """
    name = self._prefix + file
    member, path = self._members[name], f"{self._file}/{name}"
    image_tree.check_bytes(path, member.file_size)
    try:
      return self._zip.read(member)
    except NotImplementedError as e:
      raise errors.UserError(
          f"{path}: cannot be read ({e}), expected a stored or deflated member;"
          " pack the files again"
      ) from e
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError) as e:
      raise decoding.corrupt(path, e) from e


def _index(
    file: str, infos: list[zipfile.ZipInfo]
) -> tuple[dict[str, zipfile.ZipInfo], dict[str, image_tree.Entries]]:
  """Returns {name: member} and {prefix: entries} of the visible files."""
  members, folders = {}, {"": image_tree.Entries([], [])}
  for info in infos:
    # Windows programs write backslashes.
    name = info.filename.replace("\\", "/").removeprefix("./")
    *parents, last = name.split("/")
    if name.startswith("/") or ".." in (*parents, last):
      raise errors.UserError(
          f"{file}: got the member {info.filename}, which leads out of the"
          " archive, expected names within it; pack the files again"
      )
    if not last or any(map(image_tree.is_hidden, (*parents, last))):
      continue
    if info.flag_bits & _ENCRYPTED:
      raise errors.UserError(
          f"{file}: got the encrypted member {name}, expected a zip file"
          " without a password; pack the files again"
      )
    if name in members:
      raise errors.UserError(
          f"{file}: got two members {name}, expected different names; pack the"
          " files again"
      )
    members[name] = info
    prefix = ""
    for parent in parents:
      below = f"{prefix}{parent}/"
      if below not in folders:
        folders[below] = image_tree.Entries([], [])
        folders[prefix].folders.append(parent)
      prefix = below
    folders[prefix].files.append(last)
  for entries in folders.values():
    entries.files.sort()
    entries.folders.sort()
  return members, folders


def data_set(
    path: str,
    decoder: decoding.Decoder,
    skip_corrupt: bool = False,
    threads: int | None = None,
    labels: str = "auto",
) -> dataset_spec.DataSet:
  """Returns the dataset specification of zip files of images.

  Reads only the labels and the header of one image.

  Args:
    path: zip file or folder.
    decoder: decodes the images.
    skip_corrupt: decode all images once when a split is opened, and skip those
      that cannot be decoded.
    threads: number of decoding threads; None: one per core.
    labels: source of the labels, see `image_labels.find`.

  Raises:
    UserError: no zip file, no images, or invalid labels.
  """
  files = dataset_spec.split_files(path, ".zip")
  if os.path.isfile(path):
    roots = folder.splits(Archive(path))
  else:
    roots, classes = {}, ()
    for split, file in files.items():
      inner = folder.splits(Archive(file), classes)
      # A packed folder may have the name of its split.
      roots[split] = inner.get(split) or next(iter(inner.values()))
      classes = classes or roots[split][0].entries().folders
  return folder.from_roots(
      "zip", path, roots, decoder, skip_corrupt, threads, labels
  )
