"""Mode edit on files and on test images, around an exact network."""

import json

import numpy as np
import PIL.Image
import pytest

from bcm_jax import errors
from bcm_jax.checkpoint import runs
from bcm_jax.data import image_source
from bcm_jax.editing import edit
from bcm_jax.editing import edit_inputs
from bcm_jax.editing import tasks
from tests import exact


@pytest.fixture(autouse=True)
def no_checkpoint(monkeypatch):
  monkeypatch.setattr(runs, "load_run", lambda *args: (0, "params", {}))


def experiment(shape=(8, 8, 1), num_classes=10, method=None, **edit_keys):
  overrides = {f"edit.{k}": str(v) for k, v in edit_keys.items()}
  return exact.experiment(shape, num_classes, overrides, **(method or {}))


def run(tmp_path, built):
  (folder,) = edit.run(built, str(tmp_path / "run"))
  return tmp_path / "run" / "edits" / folder.rpartition("/")[2]


def write(path, image):
  plane = image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image
  path.parent.mkdir(parents=True, exist_ok=True)
  PIL.Image.fromarray(plane).save(path)


def picture(seed=0, size=8, channels=1):
  x = np.random.default_rng(seed).normal(0, 0.3, (size, size, channels))
  return image_source.to_uint8(x)


def read(path):
  pixels = np.asarray(PIL.Image.open(path))
  return pixels if pixels.ndim == 3 else pixels[..., None]


# Test images ----------------------------------------------------------------

GREY_TASKS = [t for t in tasks.TASKS if t not in (
    "interpolate", "colorize", "attribute")]


@pytest.mark.slow
@pytest.mark.parametrize("task", GREY_TASKS)
def test_every_task_on_test_images(tmp_path, task):
  built = experiment(task=task, num_images=3, new_label=4, seed=1)
  folder = run(tmp_path, built)
  with np.load(folder / "edit.npz") as f:
    results, given = f["results"], f["images"]
    reference = f["reference"] if "reference" in f else None
  assert results.shape == (3, 8, 8, 1) and results.dtype == np.uint8
  names = sorted(p.name for p in (folder / "images").iterdir())
  assert len(names) == 3
  test = built.source("test")
  originals = test.fetch(np.array([int(n[:5]) for n in names]))["image"]
  by_name = np.stack([read(folder / "images" / n) for n in names])
  order = np.argsort(np.random.default_rng(1).permutation(len(test))[:3])
  np.testing.assert_array_equal(by_name, results[order])
  record = json.loads((folder / "result.json").read_text())
  assert record["task"] == task and record["nfe"] > 0
  assert record["run"]["config_digest"]
  if task == "relabel":
    assert reference is None and "numbers" not in record
    return
  np.testing.assert_array_equal(reference[order], originals)
  error = np.mean((results / 255 - reference / 255) ** 2)
  assert record["numbers"]["result"]["mse"] == pytest.approx(error)
  if task == "super_resolve":
    assert given.shape == (3, 4, 4, 1)
  elif task == "purify":
    np.testing.assert_array_equal(given, reference)
  else:
    assert (given != reference).any()
  with PIL.Image.open(folder / "grid.png") as grid:
    assert grid.size[0] > 3 * 32 and grid.size[1] > 3 * 32


def test_coloured_test_images_become_grey_and_get_colours(tmp_path):
  built = experiment((8, 8, 3), None, task="colorize", num_images=2)
  images = np.stack([picture(i, channels=3) for i in range(6)])
  source = image_source.ArraySource(images)
  object.__setattr__(built, "source", lambda split: source)
  with np.load(run(tmp_path, built) / "edit.npz") as f:
    given, results = f["images"], f["results"]
  assert (np.ptp(given, axis=-1) == 0).all()
  assert np.ptp(results, axis=-1).mean() > 10


def test_pairs_of_test_images(tmp_path):
  folder = run(tmp_path, experiment(pairs=2, num_interpolants=4, noise=0.01))
  with np.load(folder / "interpolation.npz") as f:
    assert f["images"].shape == (2, 6, 8, 8, 1) and f["labels"].shape == (2, 2)
    ends = f["images"][:, [0, -1]].astype(int), f["images"][:, [1, -2]]
  assert np.abs(ends[0] - ends[1]).max() < 12


def test_jpeg_of_lower_quality_is_further_from_the_image():
  image = picture(size=16, channels=3)
  gaps = [
      np.abs(edit_inputs.compress(image, q).astype(int) - image).mean()
      for q in (5, 30, 95)
  ]
  assert gaps[0] > gaps[1] > gaps[2] > 0


# Files ----------------------------------------------------------------------


def test_files_with_masks_and_references(tmp_path):
  for i in range(3):
    write(tmp_path / "in" / f"{i}.png", picture(i))
    write(tmp_path / "clean" / f"{i}.png", picture(i))
  (tmp_path / "in" / "notes.txt").write_text("no image")
  mask = np.zeros((8, 8), np.uint8)
  mask[:, 5:] = 255
  write(tmp_path / "mask.png", mask)
  folder = run(tmp_path, experiment(
      task="inpaint", input=tmp_path / "in", mask=tmp_path / "mask.png",
      reference=tmp_path / "clean", label="1,2,3",
  ))
  for i in range(3):
    result, image = read(folder / "images" / f"{i}.png"), picture(i)
    np.testing.assert_array_equal(result[:, :5], image[:, :5])
    assert (result[:, 5:] != image[:, 5:]).any()
  numbers = json.loads((folder / "result.json").read_text())["numbers"]
  images = np.stack([picture(i) for i in range(3)])
  grey = images.copy()
  grey[:, :, 5:] = 127  # What the grid shows is what is measured.
  expected = np.mean((grey / 255.0 - images / 255.0) ** 2)
  assert numbers["input"]["mse"] == pytest.approx(expected, rel=1e-4)
  assert numbers["result"]["mse"] > 0
  with np.load(folder / "edit.npz") as f:
    assert list(f["labels"]) == [1, 2, 3]


def test_two_files_and_what_lies_between_them(tmp_path):
  write(tmp_path / "a.png", picture(0))
  write(tmp_path / "b.png", picture(1))
  folder = run(
    tmp_path,
    experiment(
      input=tmp_path / "a.png",
      end_images=tmp_path / "b.png",
      label=3,
      num_interpolants=3,
    ),
  )
  with np.load(folder / "interpolation.npz") as f:
    assert f["images"].shape == (1, 5, 8, 8, 1)
    np.testing.assert_array_equal(f["images"][0, -1], picture(1))
    assert f["labels"].tolist() == [[3, 3]]
  folder = run(
    tmp_path,
    experiment(
      input=tmp_path / "a.png",
      end_images=tmp_path / "b.png",
      label=3,
      new_label=5,
      method=dict(tint=0.05),
    ),
  )
  with np.load(folder / "interpolation.npz") as f:
    assert f["labels"].tolist() == [[3, 5]]


def test_files_of_one_name_and_results_of_before(tmp_path):
  write(tmp_path / "in" / "a.png", picture(0))
  write(tmp_path / "in" / "a.bmp", picture(1))
  (tmp_path / "in" / "folder.png").mkdir()
  (tmp_path / "in" / "gone.png").symlink_to(tmp_path / "nowhere")
  settings = dict(task="restore", noise=0.002)
  folder = run(tmp_path, experiment(input=tmp_path / "in", label=3, **settings))
  names = sorted(p.name for p in (folder / "images").iterdir())
  assert names == ["a_bmp.png", "a_png.png"]
  gap = read(folder / "images" / "a_png.png").astype(int) - picture(0)
  assert np.abs(gap).max() <= 2
  run(tmp_path, experiment(num_images=2, **settings))
  names = {p.name for p in (folder / "images").iterdir()}
  assert len(names) == 2 and "a_png.png" not in names


def test_nothing_is_told_of_images_without_damage(tmp_path):
  folder = run(tmp_path, experiment(task="purify", num_images=2))
  text = (folder / "result.json").read_text()
  assert "Infinity" not in text
  assert list(json.loads(text)["numbers"]) == ["result"]


def test_holes_are_covered_where_classes_are_found(tmp_path):
  bright = np.full((8, 8, 1), 255, np.uint8)
  bright[:, :2] = 127  # All that is known: class 0.
  write(tmp_path / "a.png", bright)
  mask = np.zeros((8, 8), np.uint8)
  mask[:, 2:] = 255
  write(tmp_path / "mask.png", mask)
  folder = run(
    tmp_path,
    experiment(
      task="inpaint",
      input=tmp_path / "a.png",
      mask=tmp_path / "mask.png",
      predict_labels=True,
      method=dict(tint=0.2),
      num_classes=5,
    ),
  )
  with np.load(folder / "edit.npz") as f:
    assert list(f["labels"]) == [0]


def test_small_files_get_details(tmp_path):
  write(tmp_path / "small.png", picture(size=4))
  folder = run(
    tmp_path,
    experiment(
      task="super_resolve",
      input=tmp_path / "small.png",
      label=3,
    ),
  )
  assert read(folder / "images" / "small.png").shape == (8, 8, 1)


def test_grey_files_get_colours(tmp_path):
  write(tmp_path / "grey.png", picture())
  folder = run(
    tmp_path,
    experiment(
      (8, 8, 3),
      None,
      task="colorize",
      input=tmp_path / "grey.png",
    ),
  )
  assert np.ptp(read(folder / "images" / "grey.png"), axis=-1).mean() > 10


def test_other_sizes_and_channels_are_made_to_fit_if_asked(tmp_path):
  write(tmp_path / "photo.png", picture(size=20, channels=3))
  folder = run(
    tmp_path,
    experiment(
      task="restore",
      input=tmp_path / "photo.png",
      label=3,
      resize=True,
    ),
  )
  assert read(folder / "images" / "photo.png").shape == (8, 8, 1)


def test_classes_of_files_are_found(tmp_path, capsys):
  dark, light = picture(1), picture(2)
  light = np.clip(light.astype(int) + 100, 0, 255).astype(np.uint8)
  write(tmp_path / "photos" / "a.png", dark)
  write(tmp_path / "photos" / "b.png", light)
  built = experiment(
    task="restore",
    input=tmp_path / "photos",
    predict_labels=True,
    method=dict(tint=0.2),
    num_classes=5,
  )
  with np.load(run(tmp_path, built) / "edit.npz") as f:
    labels = list(f["labels"])
  assert labels == [0, 4]  # 100 of 127.5 grey levels, nearest to 4 tints.
  assert "labels: 0 4" in capsys.readouterr().out
  record = json.loads((tmp_path / "run/edits/restore/result.json").read_text())
  assert record["nfe_to_classify"] == 100 and record["nfe"] == 3


def test_groups_of_an_attribute_have_the_classes_that_are_found(tmp_path):
  for name, lift in (("dark", 0), ("light", 100)):
    lifted = np.clip(picture(1).astype(int) + lift, 0, 255).astype(np.uint8)
    write(tmp_path / name / "a.png", lifted)
  settings = dict(
    task="attribute",
    positive_images=tmp_path / "light",
    negative_images=tmp_path / "dark",
    input=tmp_path / "dark",
    noise=0.002,
    num_classes=5,
    method=dict(tint=0.2),
  )
  norms = []
  for how in (dict(predict_labels=True), dict(label=0)):
    folder = run(tmp_path, experiment(**settings, **how))
    record = json.loads((folder / "result.json").read_text())
    norms.append(record["direction_norm"])
  # All that the groups differ in is their class, once that is known.
  assert norms[0] < 0.2 * norms[1]


@pytest.mark.parametrize("num_classes", [None, 10])
def test_attributes_of_folders(tmp_path, num_classes):
  for i in range(12):
    dark = picture(i).astype(int)
    write(tmp_path / "dark" / f"{i}.png", dark.astype(np.uint8))
    light = np.clip(dark + 60, 0, 255).astype(np.uint8)
    write(tmp_path / "light" / f"{i}.png", light)
  built = experiment(
    num_classes=num_classes,
    task="attribute",
    positive_images=tmp_path / "light",
    negative_images=tmp_path / "dark",
    input=tmp_path / "dark",
    noise=0.01,
    **({} if num_classes is None else {"label": 3}),
  )
  with np.load(run(tmp_path, built) / "edit.npz") as f:
    moved = f["results"].mean() - f["images"].mean()
  assert moved == pytest.approx(60, abs=6)


def test_attributes_of_classes_of_the_data(tmp_path):
  folder = run(
    tmp_path,
    experiment(
      num_classes=None,
      task="attribute",
      num_images=2,
      label=1,
      new_label=0,
    ),
  )
  record = json.loads((folder / "result.json").read_text())
  assert record["direction_norm"] > 0


# What is refused ------------------------------------------------------------


def files(tmp_path):
  write(tmp_path / "ok.png", picture())
  write(tmp_path / "large.png", picture(size=9))
  write(tmp_path / "rgb.png", picture(channels=3))
  write(tmp_path / "black.png", np.zeros((8, 8), np.uint8))
  (tmp_path / "broken.png").write_bytes(b"\x89PNG not")
  (tmp_path / "empty").mkdir()
  write(tmp_path / "two" / "a.png", picture())
  write(tmp_path / "two" / "b.png", picture())


@pytest.mark.parametrize(
  "keys, said",
  [
    (dict(input="gone.png"), "gone.png"),
    (dict(input="empty"), "/empty"),
    (dict(input="large.png"), "9x9.*edit.resize"),
    (dict(input="rgb.png"), "rgb.png"),
    (dict(input="broken.png"), "broken.png"),
    (dict(input="ok.png", label="()"), "edit.label"),
    (dict(input="ok.png", label="12"), "0 to 9"),
    (dict(input="ok.png", predict_labels=True), "edit.predict_labels"),
    (dict(input="two", label="1,2,3"), "edit.label"),
    (dict(input="ok.png", reference="two"), "edit.reference"),
    (dict(task="inpaint", input="ok.png", mask="black.png"), "black.png"),
    (dict(task="inpaint", input="ok.png", mask="large.png"), "large.png.*9x9"),
    (dict(task="inpaint", input="ok.png", mask="two"), "edit.mask"),
    (dict(task="interpolate", input="ok.png"), "edit.end_images"),
    (dict(task="relabel", input="ok.png"), "edit.new_label"),
    (
      dict(task="attribute", input="ok.png"),
      "edit.positive_images",
    ),
    (dict(reference="ok.png", label="()"), "edit.reference"),
    (dict(num_images=1000, label="()"), "1 to 360"),
    (dict(num_images=2), "edit.label"),
    (dict(task="super_resolve", factor=3), "edit.factor"),
    (dict(task="super_resolve", factor=0, input="ok.png"), "edit.factor"),
    (dict(seed=-1), "edit.seed"),
    (
      dict(num_interpolants=1, task="interpolate"),
      "edit.num_interpolants",
    ),
    (dict(quality=0), "edit.quality"),
    (dict(task="inpaint", noise=0.0), "edit.noise"),
    (
      dict(
        task="attribute",
        input="two",
        positive_images="two",
        negative_images="two",
        label="1,2",
      ),
      "edit.label",
    ),
    (dict(task="interpolate", pairs=181, label="()"), "1 to 180"),
  ],
)
def test_files_that_do_not_fit(tmp_path, keys, said):
  files(tmp_path)
  paths = ("input", "mask", "reference", "positive_images", "negative_images")
  keys = {k: tmp_path / v if k in paths else v for k, v in keys.items()}
  with pytest.raises(errors.UserError, match=said):
    built = experiment(**({"task": "restore", "label": "3"} | keys))
    edit.run(built, str(tmp_path / "run"))
  assert not (tmp_path / "run").exists()


def test_tasks_that_a_network_cannot_do_are_refused_before_files_are_read(
  tmp_path,
):
  built = experiment(
      task="restore", input="gone", method=dict(supports_inversion=False)
  )
  with pytest.raises(errors.UserError, match="edit.task.*'restore'"):
    edit.run(built, str(tmp_path))
