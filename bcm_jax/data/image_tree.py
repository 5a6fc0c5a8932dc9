"""Folders of images on disk or in a zip file, behind one interface."""

from collections.abc import Iterable, Iterator
import os
import re
from typing import NamedTuple, Protocol

from bcm_jax import errors
from bcm_jax.data import dataset_spec

EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib",
    ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".avif",
    ".jp2", ".j2k",
)
# Files that give labels.
TABLES = ("dataset.json", "metadata.jsonl", "metadata.csv")
_LIKE_LABELS = re.compile(
    r"(.*[\W_])?(labels?|class(es)?|annotations?|metadata|dataset|targets?)"
    r"\.(csv|tsv|jsonl?|txt|parquet|npy|npz|mat|xml|xlsx?"
    r"|ya?ml|pkl|pickle)", re.IGNORECASE,
)
# Written by file managers and archivers next to the files of the user.
_JUNK = frozenset((
    "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir",
    "$recycle.bin", "system volume information", "lost+found",
))
# Encoded images above this are refused before they are read.
_MAX_BYTES = 2**30


class Entries(NamedTuple):
  """Visible names in one folder, each sorted."""

  files: list[str]
  folders: list[str]


class Tree(Protocol):
  """A folder with everything below it.

  Attributes:
    path: path for error messages.
    packed: in an archive, which often has one top folder around everything.
  """

  path: str
  packed: bool

  def entries(self) -> Entries:
    """Returns the visible files and folders."""

  def sub(self, name: str) -> "Tree":
    """Returns a folder of this one."""

  def identity(self) -> object:
    """Returns a value that is equal for two paths of one folder."""

  def read(self, file: str) -> bytes:
    """Returns the content of a file, whose name is relative to this folder.

    Raises:
      OSError: a temporary failure.
      CorruptImage: a permanent one.
    """


class Disk:
  """A `Tree` of the file system.

  Args:
    path: path of the folder.
  """

  packed = False

  def __init__(self, path: str):
    self.path = path

  def entries(self) -> Entries:
    """Returns the visible files and folders; follows links.

    Raises:
      UserError: the folder cannot be read, or has a broken link or something
        that is neither a file nor a folder.
    """
    found = Entries([], [])
    try:
      with os.scandir(self.path) as entries:
        for entry in entries:
          if is_hidden(entry.name):
            continue
          if entry.is_symlink() and not os.path.exists(entry.path):
            raise errors.UserError(
                f"{entry.path}: got a broken link to"
                f" {os.readlink(entry.path)}, expected a link to a file or"
                " folder; repair or delete it"
            )
          if entry.is_dir():
            found.folders.append(entry.name)
          elif entry.is_file():
            found.files.append(entry.name)
          else:
            # Reading a pipe would wait for ever.
            raise errors.UserError(
                f"{entry.path}: got a pipe, socket or device, expected files"
                " and folders; delete it"
            )
    except OSError as e:
      raise errors.UserError(
          f"{self.path}: cannot be read ({e.strerror}), expected a folder of"
          " images or class folders; correct data.path"
      ) from e
    return Entries(*map(sorted, found))

  def sub(self, name: str) -> "Disk":
    """Returns a folder of this one."""
    return Disk(os.path.join(self.path, name))

  def identity(self) -> tuple[int, int]:
    """Returns device and inode.

    Raises:
      UserError: the folder does not exist.
    """
    try:
      status = os.stat(self.path)
    except OSError as e:
      raise errors.UserError(
          f"{self.path}: cannot be read ({e.strerror}), expected a folder of"
          " images; correct data.path"
      ) from e
    return status.st_dev, status.st_ino

  def read(self, file: str) -> bytes:
    """Returns the content of a file."""
    path = os.path.join(self.path, file)
    check_bytes(path, os.path.getsize(path))
    with open(path, "rb") as f:
      return f.read()


def check_bytes(path: str, size: int) -> None:
  """Raises UserError for an encoded image that is too large to read."""
  if size > _MAX_BYTES:
    raise errors.UserError(
        f"{path}: too large, got {size:,} bytes, expected at most"
        f" {_MAX_BYTES:,}; shrink the image, or delete the file"
    )


def is_hidden(name: str) -> bool:
  """Returns True for names that start with a dot and for system files."""
  return name.startswith(".") or name.casefold() in _JUNK


def is_image(name: str) -> bool:
  """Returns True if the name has the suffix of an image or array file."""
  name = name.lower()
  if name.endswith(".npy"):  # EDM2's dataset_tool.py writes arrays.
    return not may_be_labels(name)
  return name.endswith(EXTENSIONS)


def may_be_labels(name: str) -> bool:
  """Returns True for files that people keep labels in, and that are not read.
  """
  return bool(_LIKE_LABELS.fullmatch(name)) and name.lower() not in TABLES


def walk(tree: Tree, seen: dict | None = None) -> Iterator[str]:
  """Yields the relative names of all visible files, in the order of names.

  Args:
    tree: top folder.
    seen: {identity: path} of folders that were read; is extended.

  Raises:
    UserError: a link leads to a folder that was read before.
  """
  seen = {} if seen is None else seen
  visit(tree, seen)
  files, folders = tree.entries()
  below = set(folders)
  for name in sorted(files + folders):
    if name in below:
      yield from (f"{name}/{inner}" for inner in walk(tree.sub(name), seen))
    else:
      yield name


def visit(tree: Tree, seen: dict) -> None:
  """Adds a folder to `seen`; raises UserError if it was read before."""
  first = seen.setdefault(tree.identity(), tree.path)
  if first != tree.path:
    raise errors.UserError(
        f"{tree.path}: got a link to {first}, whose images would be read twice,"
        " expected each folder once; delete the link, or start its name with a"
        " dot to skip it"
    )


def top(tree: Tree, classes: Iterable[str] = ()) -> Tree:
  """Returns the folder of the data: without single folders around it.

  A single folder on disk with images in it is a class. In an archive it is the
  folder that was packed, unless `classes` names it.
  """
  seen = {}
  while True:
    visit(tree, seen)
    files, folders = tree.entries()
    if len(folders) != 1 or any(map(is_image, files)) or tables(files):
      return tree
    name = folders[0]
    if dataset_spec.split_word(name) or name in classes:
      return tree
    inner = tree.sub(name)
    found = inner.entries()
    if any(map(is_image, found.files)) and not (
        tree.packed or tables(found.files)
    ):
      return tree
    tree = inner


def tables(files: Iterable[str]) -> list[str]:
  """Returns the names of files that give labels."""
  return [name for name in files if name.lower() in TABLES]
