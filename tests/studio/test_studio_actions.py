"""What the studio's buttons do, around an exact network, without a browser."""

import io

import numpy as np
import PIL.Image
import pytest

from bcm_jax import errors
from bcm_jax.data import image_source
from bcm_jax.editing import pretrained
from bcm_jax.studio import actions
from bcm_jax.studio.actions import ALL
from bcm_jax.studio.actions import PREDICT
from tests import exact


def make(shape=(8, 8, 1), num_classes=10, **method):
  built = exact.experiment(shape, num_classes, **method)
  return actions.Studio(pretrained.Model(exact.runner(built)))


@pytest.fixture(scope="module")
def studio():
  return make()


def picture(seed=0, size=8, channels=1):
  x = np.random.default_rng(seed).normal(0, 0.3, (size, size, channels))
  return image_source.to_uint8(x)


def save(path, array):
  plane = array[..., 0] if array.shape[-1] == 1 else array
  PIL.Image.fromarray(plane).save(path)
  return str(path)


def test_pictures_of_ours_come_back_as_the_images_that_they_show(
    studio, tmp_path
):
  image = picture()
  large = studio.enlarge(image)
  assert large.shape == (256, 256, 3) and studio.scale == 32
  np.testing.assert_array_equal(
      studio.read(save(tmp_path / "a.png", large))[0], image
  )


def test_photographs_are_cropped_and_resized(studio, tmp_path):
  photo = np.zeros((90, 60, 3), np.uint8)
  photo[:, 30:] = 255
  small = studio.read(save(tmp_path / "a.jpg", photo))
  assert small.shape == (1, 8, 8, 1)
  assert small[0, :, :3].max() < 60 and small[0, :, -3:].min() > 195


def test_photographs_of_our_size_are_not_taken_for_ours(tmp_path):
  sixty = make((64, 64, 3), None)
  stripes = np.zeros((256, 256, 3), np.uint8)
  stripes[:, ::4] = 255  # What taking each fourth pixel would make white.
  seen = sixty.read(save(tmp_path / "a.png", stripes))
  assert 50 < seen.mean() < 80


def test_networks_of_oblong_images_take_what_they_show(tmp_path):
  wide = make((8, 16, 1))
  assert wide.scale == 16
  image = np.random.default_rng(0).integers(0, 256, (8, 16, 1), np.uint8)
  path = save(tmp_path / "a.png", wide.enlarge(image))
  np.testing.assert_array_equal(wide.read(path)[0], image)
  _, words = wide.inpaint(
      painted(wide, image, slice(0, 32), slice(0, 32)), 3, 0, "inpaint"
  )
  assert "4 pixels filled" in words
  photo = np.zeros((40, 40, 3), np.uint8)
  photo[:, 20:] = 255
  small = wide.read(save(tmp_path / "b.png", photo))
  assert small[0, :, :7].max() < 30 and small[0, :, 9:].min() > 225


def test_sliders_offer_the_evaluations_that_samplers_have(studio):
  assert not studio.nfe_slider("onestep")["visible"]
  assert studio.nfe_slider("ancestral") == {
      "visible": True, "minimum": 1, "step": 1, "value": 2
  }
  solvers = make(is_denoiser=True)
  heun, ddim = (solvers.nfe_slider(name) for name in ("heun", "ddim"))
  assert (heun["minimum"], heun["step"], ddim["minimum"]) == (3, 2, 2)
  for nfe in range(heun["minimum"], 10, heun["step"]):
    _, words = solvers.generate(0, 0, 1, "heun", nfe)
    assert f"**{nfe} NFE" in words and f"heun: {nfe} NFE" in words
  with pytest.raises(errors.UserError, match="sampler.*heun.*4"):
    solvers.generate(0, 0, 1, "heun", 4)


@pytest.mark.parametrize("shape", [{}, {"is_denoiser": True}])
def test_the_first_request_finds_the_network_compiled(shape, monkeypatch):
  studio = make(**shape)
  studio.warm_up()
  for model in (studio.model, studio.editor):
    assert model.runner._flow_map.func._cache_size() == 1
  studio.generate(3, 0, 1, studio.samplers[-1], 3)
  assert studio.model.runner._flow_map.func._cache_size() == 1


def test_generation(studio):
  shown, words = studio.generate(3, 1, 5, "ancestral", 4)
  assert shown.dtype == np.uint8 and shown.shape[-1] == 3
  assert words.startswith("**4 NFE, ") and "ancestral: 4 NFE" in words
  again, _ = studio.generate(3, 1, 5, "ancestral", 4)
  np.testing.assert_array_equal(shown, again)
  other, words = studio.generate(3, 2, 5, "onestep", 4)
  assert (other != shown).any() and words.startswith("**1 NFE")


def test_all_classes_in_turn():
  tinted = make(tint=0.05)
  (one, _), (each, _) = (
      tinted.generate(label, 1, 9, "onestep", 1) for label in (0, ALL)
  )
  # The classes differ in brightness, so nine images of them differ more.
  size = one.shape[0] // 3
  means = [
      [v[i * size : (i + 1) * size, j * size : (j + 1) * size].mean()
       for i in range(3) for j in range(3)]
      for v in (one, each)
  ]
  # Less than 0.05 * 127.5 a class, for the brightest pixels are clipped.
  rise = np.diff(np.subtract(means[1], means[0]))
  assert (rise > 2).all() and (rise < 6.5).all()


def test_inversion_shows_image_latent_and_reconstruction(studio, tmp_path):
  image = picture()
  path = save(tmp_path / "a.png", image)
  seen, latent, back, words = studio.reconstruct(path, 3, 0.01, 2, 0)
  np.testing.assert_array_equal(seen, studio.enlarge(image))
  assert seen.shape == latent.shape == back.shape
  gap = np.abs(back.astype(int) - seen).max()
  assert gap < 10
  assert "**3 NFE" in words and "PSNR" in words and "reconstruction" in words


def test_weights_between_images(studio, tmp_path):
  paths = [save(tmp_path / f"{i}.png", picture(i)) for i in range(2)]
  ends = [
      studio.interpolate(*paths, 3, 4, weight, 0)[0].astype(int)
      for weight in (0.0, 1.0)
  ]
  for end, seed in zip(ends, range(2), strict=True):
    # As far as the noise that inversion adds.
    assert np.abs(end - studio.enlarge(picture(seed))).mean() < 12
  half, words = studio.interpolate(*paths, 3, 4, 0.5, 0)
  assert (half != ends[0]).any() and "interpolate" in words
  with pytest.raises(errors.UserError, match="0 to 1"):
    studio.interpolate(*paths, 3, 4, 1.5, 0)


def png(array):
  content = io.BytesIO()
  PIL.Image.fromarray(array).save(content, "PNG")
  return content.getvalue()


def painted(studio, image, rows, columns):
  background = studio.enlarge(image)
  opaque = np.full(background.shape[:2], 255, np.uint8)
  layer = np.zeros((*opaque.shape, 4), np.uint8)
  layer[rows, columns] = (230, 160, 0, 255)
  return {
      "background": png(np.dstack([background, opaque])),
      "layers": [png(layer)],
  }


@pytest.mark.parametrize("task", ["inpaint", "inpaint_cm"])
def test_what_is_painted_over_is_filled(studio, task):
  image = picture()
  # Pixels 2 and 3 wholly, pixel 4 by an eighth: too little.
  editor = painted(studio, image, slice(64, 128), slice(64, 132))
  shown, words = studio.inpaint(editor, 3, 0, task)
  changed = (shown != studio.enlarge(image)).any(-1)[::32, ::32]
  hole = np.zeros((8, 8), bool)
  hole[2:4, 2:4] = True
  assert not changed[~hole].any() and changed[hole].mean() > 0.7
  assert "4 pixels filled" in words


@pytest.mark.slow
def test_classes_are_found(tmp_path):
  tinted = make(num_classes=3, tint=0.3)
  dark, light = (
      np.clip(picture(k).astype(int) + 76 * k, 0, 255).astype(np.uint8)
      for k in (0, 2)  # 76 grey levels are 0.6, two classes' tint.
  )
  paths = [save(tmp_path / f"{i}.png", x) for i, x in enumerate((dark, light))]
  editor = painted(tinted, light, slice(64, 128), slice(64, 128))
  for told, words in (
      (tinted.reconstruct(paths[0], PREDICT, 0.01, 2, 0), ["class 0"]),
      (tinted.restore(paths[1], PREDICT, 90, 0.1, 3, 0), ["class 2"]),
      (tinted.inpaint(editor, PREDICT, 0, "inpaint"), ["class 2"]),
      (tinted.interpolate(*paths, PREDICT, PREDICT, 0.5, 0),
       ["class 0", "class 2"]),
      (tinted.interpolate(*paths, 1, PREDICT, 0.5, 0), ["class 2"]),
  ):
    notes = told[-1].splitlines()[0].split(", ")
    assert [
        note.removesuffix(" predicted") for note in notes if "predicted" in note
    ] == words
  # What is found is what is used.
  np.testing.assert_array_equal(
      tinted.restore(paths[1], PREDICT, 90, 0.1, 3, 0)[1],
      tinted.restore(paths[1], 2, 90, 0.1, 3, 0)[1],
  )


def test_layers_add_up_and_photographs_can_be_painted(studio):
  photo = picture(size=64, channels=3)
  layers = [np.zeros((64, 64, 4), np.uint8) for _ in range(2)]
  layers[0][:8, :8, 3] = 255
  layers[1][-8:, -8:, 3] = 255
  _, words = studio.inpaint(
      {"background": png(photo), "layers": [png(v) for v in layers]}, 3, 0,
      "inpaint_cm",
  )
  assert "2 pixels filled" in words


def test_compression_and_restoration(studio, tmp_path):
  path = save(tmp_path / "a.png", picture())
  given, restored, words = studio.restore(path, 3, 10, 0.1, 3, 0)
  assert given.shape == restored.shape == (256, 256, 3)
  assert "dB compressed" in words and "**3 NFE" in words


def test_networks_without_classes_or_inversion():
  one_way = make(
      (8, 8, 3), None, supports_inversion=False, takes_end_time=False
  )
  assert one_way.samplers == ("onestep", "cm_multistep")
  assert one_way.classes == ()
  shown, words = one_way.generate(None, 0, 4, "cm_multistep", 3)
  assert np.ptp(shown, axis=-1).max() > 0 and "**3 NFE" in words
  image = picture(channels=3)
  _, words = one_way.inpaint(
      painted(one_way, image, slice(0, 64), slice(0, 64)), None, 0,
      "inpaint_cm",
  )
  assert "4 pixels filled" in words
  assert make(is_denoiser=True).samplers == ("heun", "ddim")


def test_examples_are_test_images(studio):
  source = studio.model.experiment.source("test")
  batch = source.fetch(np.array([5]))
  np.testing.assert_array_equal(
      studio.example(5), studio.enlarge(batch["image"][0])
  )
  assert studio.example_label(5) == batch["label"][0]


@pytest.mark.parametrize(
    "content", [b"", b"<svg></svg>", b"\x89PNG\r\n\x1a\n" + b"0" * 40]
)
def test_uploads_that_are_no_images(studio, tmp_path, content):
  path = tmp_path / "upload.png"
  path.write_bytes(content)
  with pytest.raises(errors.UserError, match="upload.png"):
    studio.read(str(path))


def test_cut_and_huge_uploads(studio, tmp_path):
  whole = io.BytesIO()
  PIL.Image.fromarray(picture(size=64)[..., 0]).save(whole, "PNG")
  (tmp_path / "cut.png").write_bytes(whole.getvalue()[:-900])
  with pytest.raises(errors.UserError, match="cut.png"):
    studio.read(str(tmp_path / "cut.png"))
  # 36 million pixels in a few kilobytes.
  PIL.Image.new("1", (6000, 6000)).save(tmp_path / "huge.png")
  assert (tmp_path / "huge.png").stat().st_size < 2**17
  with pytest.raises(errors.UserError, match="huge.png"):
    studio.read(str(tmp_path / "huge.png"))


_GENERATE = (3, 0, 4, "onestep", 1)
_NO_NUMBERS = (
    float("nan"), float("inf"), 1e300, 10**400, 0.5, -7, "x", [], {}, [None]
)
# Arguments of callbacks after the images, and their names in errors.
_AFTER_IMAGES = {
    "reconstruct": (1, (3, 0.1, 1, 0), ("class", "noise", "NFE", "seed")),
    "interpolate": (2, (3, 4, 0.5, 0), ("class", "class", "weight", "seed")),
    "restore": (1, (3, 20, 0.1, 3, 0),
                ("class", "JPEG quality", "noise", "NFE", "seed")),
}


def _with(values, i, value):
  return (*values[:i], value, *values[i + 1 :])


@pytest.mark.parametrize("name", _AFTER_IMAGES)
def test_requests_of_odd_values_are_user_errors(studio, name, tmp_path):
  images, values, keys = _AFTER_IMAGES[name]
  paths = [save(tmp_path / "a.png", picture())] * images
  for i, key in enumerate(keys):
    for value in _NO_NUMBERS:
      if key in ("noise", "weight") and value == 0.5:
        continue
      with pytest.raises(errors.UserError, match=f"^{key}: got"):
        getattr(studio, name)(*paths, *_with(values, i, value))


@pytest.mark.parametrize("call, said", [
    (lambda s: s.reconstruct(None, 3, 0.1, 1, 0), "image"),
    (lambda s: s.inpaint({"background": None}, 3, 0, "inpaint"), "image"),
    (lambda s: s.inpaint(
        {"background": png(s.enlarge(picture())), "layers": []}, 3, 0, "inpaint"
    ), "paint"),
    (lambda s: s.inpaint(
        {"background": b"GIF89a", "layers": []}, 3, 0, "inpaint"
    ), "image"),
    (lambda s: s.inpaint(
        {"background": png(np.zeros((6000, 6000), np.uint8)), "layers": []}, 3,
        0, "inpaint",
    ), "6000x6000|24 million"),
    (lambda s: s.generate(3, None, 4, "onestep", 1), "seed.*None"),
    (lambda s: s.generate(3, -1, 4, "onestep", 1), "seed.*-1"),
    (lambda s: s.generate(3, 0.5, 4, "onestep", 1), "seed.*0.5"),
    (lambda s: s.generate(3, 0, 99, "onestep", 1), "1 to 25"),
    (lambda s: s.generate(3, 0, 4, "heun", 7), "heun"),
    *[
        (lambda s, v=v, i=i: s.generate(*_with(_GENERATE, i, v)), key)
        for i, key in enumerate(("class", "seed", "images", "sampler", "NFE"))
        for v in (*_NO_NUMBERS, *((None,) if i else ()))
    ],
])
def test_what_is_missing_or_wrong_is_said(studio, call, said):
  with pytest.raises(errors.UserError, match=said):
    call(studio)
