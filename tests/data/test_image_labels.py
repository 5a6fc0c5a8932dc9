"""Sources of labels, in folders and zip files: used or named in an error."""

import json
import logging
import os
import zipfile

import numpy as np
import pytest

from bcm_jax.data import datasets
from bcm_jax.data import decoding
from bcm_jax.data import folder
from bcm_jax.data import image_labels
from bcm_jax.errors import UserError
from tests.data import pictures

PNG = pictures.encode(pictures.noise(0))
LABELS = [3, 1, 4, 1, 0, 2]
NAMES = [f"0000{k // 3}/img{k:08d}.png" for k in range(6)]


def _put(root, files):
  """Writes {name: text or bytes}, or images for a sequence of names."""
  if not isinstance(files, dict):
    files = dict.fromkeys(files, PNG)
  for name, content in files.items():
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
  return root


def _pack(root, prefix=""):
  """Packs a folder as a zip file next to it."""
  file = root.with_suffix(".zip")
  with zipfile.ZipFile(file, "w") as archive:
    for path in sorted(root.rglob("*")):
      if path.is_file():
        archive.write(path, prefix + str(path.relative_to(root)))
  return file


def _find(path, **options):
  kind = "zip" if path.suffix == ".zip" else "folder"
  return datasets.find(kind, path=str(path), **options)


def _labels(path, split="train", **options):
  """Returns {file: label} of a split."""
  source = _find(path, **options).open(split, None)
  return dict(zip(source.files, source.labels.tolist(), strict=True))


def _json(labels):
  return json.dumps({"labels": labels})


def _edm(root, table):
  return _put(_put(root, NAMES), {"dataset.json": table})


def _both(root):
  """The folder, and it as a zip file without and with its top folder."""
  return root, _pack(root), _pack(root, "my data/")


# EDM.


@pytest.mark.parametrize("rows", [
    [list(x) for x in zip(NAMES, LABELS, strict=True)],
    # Names that a Windows program wrote.
    [[n.replace("/", "\\"), x] for n, x in zip(NAMES, LABELS, strict=True)],
])
def test_the_labels_of_edm_are_those_of_its_json(tmp_path, rows):
  root = _edm(tmp_path / "in", _json(rows))
  for path in _both(root):
    found = _find(path)
    assert found.num_classes == 5 and found.label_source == "dataset.json"
    assert _labels(path) == dict(zip(NAMES, LABELS, strict=True))


@pytest.mark.parametrize("table", [None, _json(None), _json([])])
def test_the_folders_of_edm_are_no_classes(tmp_path, table, caplog):
  root = _put(tmp_path / "in", NAMES)
  if table is not None:
    _put(root, {"dataset.json": table})
  for path in _both(root):
    caplog.clear()
    assert _find(path).num_classes is None
    assert "no labels" in caplog.text
  assert _find(root, labels="folders").class_names == ("00000", "00001")


def test_numbered_folders_of_one_sequence_and_numbered_classes(tmp_path):
  ffhq = ["00000/00000.png", "01000/01000.png", "01000/01001.png"]
  assert _find(_put(tmp_path / "ffhq", ffhq)).num_classes is None
  gtsrb = ["00000/00000_00000.png", "00001/00000_00000.png"]
  assert _find(_put(tmp_path / "gtsrb", gtsrb)).num_classes == 2
  for shards in ("part_0", "part_1"), ("0000", "0001"), ("000000", "000001"):
    names = [f"{s}/img{k:08d}.png" for k, s in enumerate(shards)]
    assert _find(_put(tmp_path / shards[0], names)).num_classes is None
  restarted = ["00000/00001.png", "00001/00001.png"]
  assert _find(_put(tmp_path / "restarted", restarted)).num_classes == 2


_GOOD = [[n, 0] for n in NAMES]


@pytest.mark.parametrize("table, words", [
    ("{", ""),
    ("[" * 100_000, ""),
    (b"\xff\xfe", ""),
    ("[1]", ""),
    ("3", ""),
    (json.dumps({"format": "bcm_jax images"}), "prepared"),
    (_json({"a": 1}), ""),
    (_json([1, 2]), ""),
    (_json([[]]), ""),
    (_json([["a", 1, 2]]), ""),
    (_json([[1, 1]]), ""),
    (_json([[n, "cat"] for n in NAMES]), "'cat'"),
    (_json([[n, 1.0] for n in NAMES]), "1.0"),
    (_json([[n, True] for n in NAMES]), "True"),
    (_json([[n, None] for n in NAMES]), "None"),
    (_json([[n, [0, 1]] for n in NAMES]), r"\[0, 1\]"),
    (_json([*_GOOD[1:], [NAMES[0], -1]]), f"-1 of {NAMES[0]}"),
    (_json([*_GOOD[1:], [NAMES[0], 2**31]]), NAMES[0]),
    (_json(_GOOD[:-1]), NAMES[-1]),
    (_json([*_GOOD, ["00009/gone.png", 0]]), "gone.png"),
    (_json([*_GOOD, ["../up.png", 0]]), "up.png"),
    (_json([*_GOOD, _GOOD[2]]), NAMES[2]),
])
def test_a_bad_json_of_edm_is_named(tmp_path, table, words):
  root = _edm(tmp_path / "in", table)
  for path in (root, _pack(root, "top/")):
    with pytest.raises(UserError, match=f"dataset.json.*{words}"):
      _labels(path)
  assert _find(root, labels="none").num_classes is None


# Tables of Hugging Face's ImageFolder.


def _csv(*rows):
  return "\r\n".join(["file_name,label", *rows, ""])


def _jsonl(*rows):
  return "\n".join(map(json.dumps, rows)) + "\n\n"


def _row(file_name, label):
  return dict(file_name=file_name, label=label)


@pytest.mark.parametrize("name, table, labels, names", [
    ("metadata.csv", _csv("a.png,10", "b.png,2", "c/d.png,0"), [10, 2, 0],
     None),
    ("metadata.csv", _csv("a.png,n 10", "b.png,n 2", "c/d.png,n 10"),
     [1, 0, 1], ("n 2", "n 10")),
    ("metadata.csv", "\ufefflabel,file_name\n1,a.png\n0,b.png\n1,./c/d.png\n",
     [1, 0, 1], None),
    ("metadata.jsonl", _jsonl(_row("a.png", 2), _row("b.png", 0),
                              _row("c/d.png", 1)), [2, 0, 1], None),
    ("metadata.jsonl", _jsonl(_row("a.png", "dog"), _row("b.png", "cat"),
                              _row("c/d.png", "dog")), [1, 0, 1],
     ("cat", "dog")),
])
def test_a_table_gives_the_labels(tmp_path, name, table, labels, names):
  root = _put(tmp_path / "in", ["a.png", "b.png", "c/d.png"])
  _put(root, {name: table})
  for path in _both(root):
    found = _find(path)
    assert found.class_names == names and found.label_source == name
    assert list(_labels(path).values()) == labels


@pytest.mark.parametrize("name, table", [
    ("metadata.csv", ""),
    ("metadata.csv", "file_name,label\n"),
    ("metadata.csv", "file_name,text\na.png,a cat\nb.png,a dog\n"),
    ("metadata.csv", "file_name;label\na.png;0\nb.png;1\n"),
    ("metadata.csv", _csv("a.png,0")),
    ("metadata.csv", _csv("a.png,", "b.png,1")),
    ("metadata.csv", _csv("a.png", "b.png,1")),
    ("metadata.csv", _csv("a.png,-1", "b.png,1")),
    ("metadata.csv", _csv("a.png,1.0", "b.png,0.0")),
    ("metadata.csv", _csv("a.png,cat", "b.png,1")),
    ("metadata.csv", _csv("a.png,1", "b.png,1", "b.png,0")),
    ("metadata.csv", _csv("a.png,1", "b.png,1", "c.png,0")),
    ("metadata.csv", _csv("a.png," + "x" * 200_000)),
    ("metadata.csv", b"file_name,label\na.png,\xe9\n"),
    ("metadata.jsonl", '{"file_name": '),
    ("metadata.jsonl", _jsonl([1], [2])),
    ("metadata.jsonl", _jsonl(3)),
    ("metadata.jsonl", _jsonl(_row(3, 0))),
    ("metadata.jsonl", _jsonl({"file_name": "a.png", "objects": {}})),
    ("metadata.jsonl", _jsonl(_row("a.png", None), _row("b.png", 0))),
    ("metadata.jsonl", _jsonl(_row("a.png", [0, 1]), _row("b.png", [1]))),
    # Not read, but not ignored either.
    ("metadata.parquet", b"PAR1"),
    ("labels.txt", "0\n1\n"),
    ("train_labels.csv", "a.png,0\n"),
    ("labels.npy", b"\x93NUMPY"),
])
def test_a_bad_table_is_named(tmp_path, name, table):
  root = _put(tmp_path / "in", ["a.png", "b.png"])
  _put(root, {name: table})
  with pytest.raises(UserError, match=name):
    _labels(root)
  assert _labels(root, labels="none") == {"a.png": 0, "b.png": 0}


def test_tables_of_splits(tmp_path):
  names = ["train/a.png", "train/b.png", "test/a.png"]
  each = _put(tmp_path / "each", names)
  _put(each, {"train/metadata.csv": _csv("a.png,dog", "b.png,cat"),
              "test/metadata.csv": _csv("a.png,dog")})
  one = _put(tmp_path / "one", names)
  _put(one, {"metadata.csv": _csv(
      "train/a.png,1", "train/b.png,0", "test/a.png,1")})
  for root in (each, one):
    for path in (root, _pack(root)):
      assert _labels(path) == {"a.png": 1, "b.png": 0}
      assert _labels(path, "test") == {"a.png": 1}
  _put(each, {"test/metadata.csv": _csv("a.png,owl")})
  with pytest.raises(UserError, match="'owl'"):
    _labels(each, "test")
  (each / "test" / "metadata.csv").unlink()
  with pytest.raises(UserError, match="metadata.csv"):
    _labels(each, "test")


def test_two_tables_and_tables_in_class_folders_need_a_choice(tmp_path):
  root = _put(tmp_path / "in", ["a/1.png", "b/1.png"])
  table = _csv("a/1.png,1", "b/1.png,0")
  _put(root, {"metadata.csv": table, "dataset.json": "{"})
  with pytest.raises(UserError, match="dataset.json and .*metadata.csv"):
    _labels(root)
  assert _labels(root, labels="metadata.csv") == {"a/1.png": 1, "b/1.png": 0}
  assert _labels(root, labels="folders") == {"a/1.png": 0, "b/1.png": 1}
  deep = _put(tmp_path / "deep", ["a/1.png", "b/1.png"])
  _put(deep, {"a/metadata.csv": _csv("1.png,1")})
  with pytest.raises(UserError, match="a/metadata.csv"):
    _labels(deep)


# Classes in names.


@pytest.mark.parametrize("names, ordered", [
    (["10", "2", "1", "0"], ("0", "1", "2", "10")),
    (["c10", "c9", "C1"], ("C1", "c9", "c10")),
    (["1", "2", "3"], ("1", "2", "3")),
    (["01", "1"], ("01", "1")),
    (["9" * 240, "8"], ("8", "9" * 240)),
])
def test_class_folders_are_in_natural_order(tmp_path, names, ordered):
  root = _put(tmp_path / "in", [f"{name}/1.png" for name in names])
  for path in _both(root):
    assert _find(path).class_names == ordered
    assert _labels(path) == {
        f"{name}/1.png": k for k, name in enumerate(ordered)
    }


@pytest.mark.parametrize("labels, expected", [
    ("name", {"cat_1.png": 0, "dog_x_2.png": 1}),
    (r"_(\d+)\.", {"cat_1.png": 0, "dog_x_2.png": 1}),
    (r"(?:^|/)([a-c])?", None),
    ("(cat)", None),
])
def test_classes_from_file_names(tmp_path, labels, expected):
  root = _put(tmp_path / "in", ["cat_1.png", "dog_x_2.png"])
  for path in (root, _pack(root)):
    assert _find(path).num_classes is None
    if expected is None:
      with pytest.raises(UserError, match="dog_x_2.png"):
        _labels(path, labels=labels)
    else:
      assert _labels(path, labels=labels) == expected


def test_file_names_of_splits_have_the_classes_of_train(tmp_path):
  root = _put(tmp_path / "in", [
      "train/cat_1.png", "train/b/dog_2.png", "val/dog_1.png"])
  assert _labels(root, "test", labels="name") == {"dog_1.png": 1}
  _put(root, ["val/owl_1.png"])
  with pytest.raises(UserError, match="'owl'"):
    _labels(root, "test", labels="name")


@pytest.mark.parametrize(
    "labels", ["foo", "(a", "(a)(b)", "()(?P<x>)", "dataset.json", ""]
)
def test_sources_that_cannot_be(tmp_path, labels):
  with pytest.raises(UserError, match="labels"):
    _labels(_put(tmp_path / "in", ["a.png"]), labels=labels)


def test_only_image_files_have_sources_of_labels(tmp_path):
  np.savez(tmp_path / "x.npz", np.zeros((1, 8, 8, 3), np.uint8))
  with pytest.raises(UserError, match="data.labels"):
    datasets.find("npz", path=str(tmp_path / "x.npz"), labels="name")


# Splits.


@pytest.mark.parametrize("train, test", [
    ("Train", "Test"), ("TRAIN", "VAL"), ("training", "testing"),
    ("train", "valid"), ("Training", "Validation"), ("train2017", "val2017"),
    ("train_set", "test-set"),
])
def test_splits_never_become_classes(tmp_path, train, test):
  root = _put(tmp_path / "in", [
      f"{s}/{c}/1.png" for s in (train, test) for c in ("cat", "dog", "owl")])
  for path in _both(root):
    found = _find(path)
    assert found.splits == ("train", "test")
    assert found.class_names == ("cat", "dog", "owl")
    assert len(found.open("test", None)) == 3


@pytest.mark.parametrize("names", [
    ["train/a.png", "Train/a.png"],
    ["val/a.png", "validation/a.png"],
    ["cat/train/a.png", "cat/test/a.png", "dog/train/a.png"],
    ["train/train/a.png"],
    ["Train/a.png", "owl/a.png"],
    ["seg_train/a/1.png", "seg_test/a/1.png"],
    ["imgs_train/1.png", "imgs_test/1.png"],
    ["trainA/1.png", "trainB/1.png", "testA/1.png"],
    ["tr/1.png", "te/1.png"],
])
def test_splits_in_odd_places_are_named(tmp_path, names):
  with pytest.raises(UserError):
    _labels(_put(tmp_path / "in", names))


def test_a_class_of_a_split_may_be_called_train(tmp_path):
  root = _put(tmp_path / "in", ["train/apple/1.png", "train/train/1.png"])
  assert _find(root).class_names == ("apple", "train")


def test_names_of_classes_beside_class_folders_are_named(tmp_path, caplog):
  root = _put(tmp_path / "in", ["cat/1.png", "dog/1.png"])
  _put(root, {"classes.txt": "dog\ncat\n", "labels.npy": "x"})
  assert _labels(root) == {"cat/1.png": 0, "dog/1.png": 1}
  assert "classes.txt" in caplog.text and "labels.npy" in caplog.text


def test_what_is_not_read_is_counted_and_named(tmp_path, caplog):
  root = _put(tmp_path / "in", [
      "train/a.png", "val/a.png", "test/a.png", "x.png"])
  _put(root, {"train/a.txt": "", "train/b.HEIC": "", "train/noise": ""})
  _labels(root)
  for words in ("val", "x.png", "1 .txt", "1 .HEIC", "1 noise"):
    assert words in caplog.text


# Odd folders.


_JUNK = [
    ".DS_Store", "Thumbs.db", "desktop.ini", "cat/Thumbs.db", "cat/._1.png",
    "__MACOSX/x/._1.png", "@eaDir/1.png", ".ipynb_checkpoints/1.png",
]


def test_files_of_systems_are_ignored(tmp_path, caplog):
  root = _put(tmp_path / "in", ["cat/1.png", "dog/1.png"])
  _put(root, dict.fromkeys(_JUNK, "junk"))
  for path in _both(root):
    assert _labels(path) == {"cat/1.png": 0, "dog/1.png": 1}
  assert not caplog.records


def test_a_packed_folder_of_images_is_no_class(tmp_path):
  root = _put(tmp_path / "in", ["1.png", "2.png"])
  assert _find(_pack(root, "photos/")).num_classes is None
  outer = tmp_path / "outer"
  _put(outer, ["photos/cat/1.png", "photos/dog/1.png"])
  assert _find(outer).class_names == ("cat", "dog")


def test_zip_files_of_splits(tmp_path):
  for name, prefix, files in (
      ("Train", "", ["cat/1.png", "dog/1.png"]), ("val", "", ["cat/2.png"]),
      ("train", "train/", ["cat/1.png", "dog/1.png"]),
      ("test", "test/", ["dog/2.png"]),
  ):
    root = tmp_path / f"in{bool(prefix)}"
    _pack(_put(root / name, files), prefix)
  for root, label in ((tmp_path / "inFalse", 0), (tmp_path / "inTrue", 1)):
    found = datasets.find("zip", path=str(root))
    assert found.class_names == ("cat", "dog")
    assert found.open("test", None).labels.tolist() == [label]


@pytest.mark.parametrize("link, target", [
    ("cat/up", "."), ("cat/self", "cat"), ("dog", "cat"), ("x", "x"),
    ("gone", "nowhere"), ("cat/gone.png", "nowhere.png"),
])
def test_links_that_cannot_be_followed_once_are_named(tmp_path, link, target):
  root = _put(tmp_path / "in", ["cat/1.png"])
  os.symlink(root / target, root / link)
  with pytest.raises(UserError, match=str(root / link)):
    _labels(root)


def test_a_loop_without_images(tmp_path):
  (tmp_path / "in").mkdir()
  os.symlink(tmp_path / "in", tmp_path / "in" / "in")
  with pytest.raises(UserError, match="in/in"):
    _labels(tmp_path / "in")


def test_links_to_other_folders_and_files_are_followed(tmp_path):
  other = _put(tmp_path / "other", ["1.png"])
  root = _put(tmp_path / "in", ["cat/1.png"])
  os.symlink(other, root / "dog")
  os.symlink(other / "1.png", root / "cat" / "2.png")
  os.symlink(root, tmp_path / "link")
  expected = {"cat/1.png": 0, "cat/2.png": 0, "dog/1.png": 1}
  assert _labels(tmp_path / "link") == expected


def test_a_pipe_is_named_and_not_waited_for(tmp_path):
  root = _put(tmp_path / "in", ["a.png"])
  os.mkfifo(root / "b.png")
  with pytest.raises(UserError, match="b.png"):
    _labels(root)


@pytest.mark.parametrize("path", ["in", "in/empty", "in/a.png", "gone"])
def test_folders_that_cannot_be(tmp_path, path):
  root = _put(tmp_path / "in", {"notes": "x"})
  _put(root, {"empty/.hidden.png": PNG, "a.png/x.txt": ""})
  with pytest.raises(UserError):
    folder.data_set(str(tmp_path / path), decoding.Decoder())


def test_odd_names(tmp_path):
  names = ["a\nb/1.png", "-x/ 1.png", "日本/ñ.png", "\x1b[31m/1.png"]
  root = _put(tmp_path / "in", names)
  os.makedirs(os.fsencode(root) + b"/\xff")
  with open(os.fsencode(root) + b"/\xff/1.png", "wb") as f:
    f.write(PNG)
  source = _find(root).open("train", None)
  assert len(source) == source.num_classes == 5
  assert len(source.fetch(np.arange(5))["image"]) == 5


# Gaps.


@pytest.mark.parametrize("present, num_classes, words", [
    ([0, 1, 2], 3, ""),
    ([1, 2], 3, "class 0 of 3"),
    ([0, 2, 5], 6, "class 1 and 2 more of 6"),
    ([0, 1], 4, "class 2 and 1 more of 4"),
    ([7], 2**31 - 1, "class 0 and"),
])
def test_missing_classes(present, num_classes, words):
  found = image_labels.missing_classes(np.array(present), num_classes)
  assert words in found and bool(words) == bool(found)


def test_gaps_are_logged_on_opening(tmp_path, caplog):
  root = _put(tmp_path / "in", ["a.png", "b.png"])
  _put(root, {"metadata.csv": _csv("a.png,1", "b.png,3")})
  with caplog.at_level(logging.WARNING):
    assert _labels(root) == {"a.png": 1, "b.png": 3}
  assert "class 0 and 1 more of 4" in caplog.text
