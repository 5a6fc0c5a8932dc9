"""The studio in a browser: headless Chromium generates, uploads and paints.

Screenshots go to $BCM_JAX_SCREENSHOTS, if it is set.
"""

import concurrent.futures
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys

import gradio_client
import httpx
import numpy as np
import PIL.Image
import psutil
import pytest

from bcm_jax import errors
from bcm_jax.editing import pretrained
from bcm_jax.studio import app
from tests import exact

pytestmark = pytest.mark.slow

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or (
    shutil.which("google-chrome")
)


def free_port() -> int:
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


@pytest.fixture(scope="module")
def address():
  """Where a studio of the exact network listens."""
  model = pretrained.Model(exact.runner(exact.experiment()))
  port = free_port()
  page = app.launch(model, port=port, upload_mb=1, block=False)
  yield f"http://127.0.0.1:{port}"
  page.close()


@pytest.fixture(scope="module")
def browser():
  if CHROMIUM is None:
    if os.environ.get("BCM_JAX_NEEDS_CHROMIUM"):
      pytest.fail("Chromium is not there, and this run has to have it")
    pytest.skip("Chromium is not installed (.ci/run installs it)")
  from playwright import sync_api

  with sync_api.sync_playwright() as playwright:
    # Of one context, so that all pages share a cache.
    yield playwright.chromium.launch(
        executable_path=CHROMIUM, args=["--no-sandbox"]
    ).new_context(viewport={"width": 1280, "height": 1000})


@pytest.fixture
def page(browser, address):
  page = browser.new_page()
  page.set_default_timeout(30_000)
  page.goto(address)
  page.get_by_role("button", name="Generate").wait_for()
  yield page
  page.close()


def look(page, name: str) -> None:
  folder = os.environ.get("BCM_JAX_SCREENSHOTS")
  if folder:
    page.screenshot(path=str(pathlib.Path(folder) / f"{name}.png"))


def photo(path, size=(40, 30)) -> str:
  noise = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
  PIL.Image.fromarray(noise).save(path)
  return str(path)


def milliseconds(page) -> float:
  """What the visible tab says that the last action took."""
  told = page.locator("strong:visible", has_text="NFE").first
  return float(re.search(r"([\d.]+) ms", told.inner_text())[1])


def test_images_are_generated(page):
  page.get_by_role("button", name="Generate").click()
  page.get_by_text("onestep: 1 NFE").wait_for()
  shown = page.locator("img:visible").first
  assert shown.bounding_box()["width"] > 100
  look(page, "generate")


def test_the_slider_of_evaluations_is_shown_where_it_acts(page):
  slider = page.get_by_text("network evaluations (NFE)", exact=True)
  assert not slider.locator("visible=true").count()
  page.get_by_label("sampler").click()
  page.get_by_role("option", name="ancestral").click()
  slider.locator("visible=true").first.wait_for()
  page.get_by_role("button", name="Generate").click()
  page.get_by_text("ancestral: 2 NFE").wait_for()
  look(page, "sampler")


def test_an_uploaded_image_is_inverted(page, tmp_path):
  page.get_by_role("tab", name="Invert").click()
  page.get_by_label("Remove Image").first.click()
  page.locator("input[type=file]:not([disabled])").first.set_input_files(
      photo(tmp_path / "photo.png")
  )
  page.get_by_role("button", name="Invert and reconstruct").click()
  page.get_by_text("PSNR").wait_for()
  look(page, "invert")


def test_a_bad_upload_is_told_in_a_message(page, tmp_path):
  page.get_by_role("tab", name="Invert").click()
  page.get_by_label("Remove Image").first.click()
  bad = tmp_path / "no_image.png"
  bad.write_bytes(b"these are no pixels")
  page.locator("input[type=file]:not([disabled])").first.set_input_files(
      str(bad)
  )
  page.get_by_role("button", name="Invert and reconstruct").click()
  page.get_by_text("cannot be read as an image").wait_for()
  assert not page.get_by_text("Traceback").count()
  look(page, "bad_upload")


def test_what_is_painted_over_is_filled(page):
  page.get_by_role("tab", name="Inpaint").click()
  canvas = page.locator("canvas:visible").first
  canvas.wait_for()
  page.wait_for_timeout(1500)  # The editor draws its background when it likes.
  box = canvas.bounding_box()
  x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
  page.mouse.move(x - 40, y)
  page.mouse.down()
  for step in range(1, 9):
    page.mouse.move(x - 40 + 10 * step, y + 4 * (step % 2))
  page.mouse.up()
  page.wait_for_timeout(500)
  look(page, "paint")
  page.get_by_role("button", name="Fill").click()
  page.get_by_text(re.compile(r"\d+ pixels filled")).wait_for()
  look(page, "filled")


def test_painting_nothing_is_told(page):
  page.get_by_role("tab", name="Inpaint").click()
  page.wait_for_timeout(1500)
  page.get_by_role("button", name="Fill").click()
  page.get_by_text("nothing is painted").wait_for()


def test_images_are_interpolated_and_restored(page):
  page.get_by_role("tab", name="Interpolate").click()
  page.get_by_role("button", name="Interpolate").click()
  page.get_by_text("interpolate: 2 NFE").wait_for()
  look(page, "interpolate")
  page.get_by_role("tab", name="Restore").click()
  page.get_by_role("button", name="Compress and restore").click()
  page.get_by_text("dB restored").wait_for()
  look(page, "restore")


def test_edits_are_quick_once_they_are_compiled(page):
  page.get_by_role("tab", name="Invert").click()
  for _ in range(2):
    page.get_by_role("button", name="Invert and reconstruct").click()
    page.get_by_text("PSNR").wait_for()
    page.wait_for_timeout(500)
  assert milliseconds(page) < 200


# Without a browser ----------------------------------------------------------


def test_ten_users_at_once(address):
  def user(seed: int) -> str:
    client = gradio_client.Client(address, verbose=False)
    _, words = client.predict(
        3, seed, 4, "ancestral", 2, api_name="/generate"
    )
    return words

  with concurrent.futures.ThreadPoolExecutor(10) as pool:
    told = list(pool.map(user, range(10)))
  assert all(words.startswith("**2 NFE") for words in told)


def test_errors_reach_a_client_as_one_line(address):
  client = gradio_client.Client(address, verbose=False)
  with pytest.raises(Exception, match="seed.*-1"):
    client.predict(3, -1, 4, "onestep", 1, api_name="/generate")


def test_large_uploads_are_refused(address, tmp_path):
  large = tmp_path / "large.png"
  large.write_bytes(b"0" * 2 * 2**20)
  client = gradio_client.Client(address, verbose=False)
  with pytest.raises(Exception, match="(?i)size|large|413"):
    client.predict(
        gradio_client.handle_file(str(large)), 3, 0.1, 1, 0,
        api_name="/reconstruct",
    )


def test_only_this_machine_is_listened_to_unless_told_otherwise(monkeypatch):
  asked = {}
  monkeypatch.setattr(
      app.pretrained, "load", lambda *a, **k: asked.update(loaded=a)
  )
  monkeypatch.setattr(
      app, "launch", lambda model, *a, allow_hosts: asked.update(
          launched=a, hosts=allow_hosts
      )
  )
  monkeypatch.setattr(app.signal, "signal", lambda *a: None)
  app.main([])
  assert asked == {
      "loaded": (None,), "launched": ("127.0.0.1", 7860, 5), "hosts": []
  }
  app.main(["runs/x", "--host=0.0.0.0", "--port=80", "--upload-mb=9",
            "--allow-host=a.org", "--allow-host=*.b.org"])
  assert asked["launched"] == ("0.0.0.0", 80, 9)
  assert asked["hosts"] == ["a.org", "*.b.org"]


def test_a_bad_canvas_is_told_in_a_message(address, tmp_path):
  bad = tmp_path / "canvas.png"
  bad.write_bytes(b"these are no pixels")
  file = gradio_client.handle_file(str(bad))
  client = gradio_client.Client(address, verbose=False)
  with pytest.raises(Exception, match="image"):
    client.predict(
        {"background": file, "layers": [], "composite": file}, 3, 0, "inpaint",
        api_name="/inpaint",
    )


@pytest.mark.parametrize("port", [99_999, -1])
def test_ports_that_do_not_exist_are_said(port):
  model = pretrained.Model(exact.runner(exact.experiment()))
  with pytest.raises(errors.UserError, match=str(port)):
    app.launch(model, port=port, block=False)


def test_a_taken_port_is_said(address):
  model = pretrained.Model(exact.runner(exact.experiment()))
  port = int(address.rpartition(":")[2])
  with pytest.raises(errors.UserError, match=str(port)):
    app.launch(model, port=port, block=False)


# Requests of other programs -------------------------------------------------


def upload(address: str, **headers: str) -> httpx.Response:
  return httpx.post(
      f"{address}/gradio_api/upload", headers=headers,
      files={"files": ("private.png", os.urandom(99), "image/png")},
  )


def call(client: httpx.Client, address: str, name: str, data: str) -> str:
  """Calls an endpoint with JSON text; returns the server's last event."""
  url = f"{address}/gradio_api/call/{name}"
  event = client.post(
      url, content=f'{{"data": {data}}}',
      headers={"content-type": "application/json"},
  ).json()["event_id"]
  return client.get(f"{url}/{event}").text


def test_other_hosts_and_origins_are_refused(address):
  port = address.rpartition(":")[2]
  evil = "http://evil.example"
  assert upload(address).status_code == 200
  assert upload(address, origin=address).status_code == 200
  assert upload(address, origin=f"http://localhost:{port}").status_code == 200
  for headers in (
      {"origin": evil}, {"origin": "null"}, {"host": "evil.example"},
      {"host": "evil.example", "origin": evil},
      {"origin": f"{evil}:{port}"}, {"origin": "http://localhost:1"},
  ):
    answer = upload(address, **headers)
    assert answer.status_code == 403, headers
    assert "access-control-allow-origin" not in answer.headers
  for path in ("/", "/config", "/gradio_api/info", "/gradio_api/queue/status"):
    host = {"host": f"evil.example:{port}"}
    assert httpx.get(address + path, headers=host).status_code == 403
  preflight = httpx.options(
      f"{address}/gradio_api/call/generate",
      headers={"origin": evil, "access-control-request-method": "POST"},
  )
  assert preflight.status_code == 403


@pytest.mark.parametrize("name, data", [
    ("generate", "[3, NaN, 1, \"onestep\", 1]"),
    ("generate", "[3, 0, null, \"onestep\", 1]"),
    ("generate", "[3, 0, 1, null, 1]"),
    ("generate", "[]"),
    ("reconstruct", "[NaN, 3, 0.1, 1, 0]"),
    ("reconstruct", "[null, 3, 0.1, 1, 0]"),
    ("reconstruct", '[{"path": "/etc/passwd", "meta": '
     '{"_type": "gradio.FileData"}}, 3, 0.1, 1, 0]'),
    ("restore", "[\"x\", 3, 20, 0.1, 3, 0]"),
    ("inpaint", "[null, 3, 0, \"inpaint\"]"),
    ("inpaint", '[{"background": {"path": null}, "layers": [], '
     '"composite": null}, 3, 0, "inpaint"]'),
    ("inpaint", '[{"background": null, "layers": null}, 3, 0, "inpaint"]'),
])
def test_odd_requests_get_a_message(address, name, data, capfd):
  with httpx.Client(timeout=60) as client:
    answer = call(client, address, name, data)
  assert "event: error" in answer and '{"error": "' in answer
  assert "Traceback" not in capfd.readouterr().err


def test_memory_stays_flat(address):
  process = psutil.Process()
  with httpx.Client(timeout=60) as client:
    for seed in range(300):
      answer = call(
          client, address, "generate", f'[3, {seed}, 1, "onestep", 1]'
      )
      assert "event: complete" in answer
      if seed == 100:
        before = process.memory_info().rss
  assert process.memory_info().rss - before < 10 * 2**20


def test_uploads_are_private_and_deleted_at_the_end(monkeypatch, tmp_path):
  monkeypatch.setenv("GRADIO_TEMP_DIR", "of_the_user")
  model = pretrained.Model(exact.runner(exact.experiment()))
  port = free_port()
  page = app.launch(model, port=port, block=False)
  try:
    assert page.delete_cache == (600, 3600)
    path = pathlib.Path(upload(f"http://127.0.0.1:{port}").json()[0])
    folder = path.parents[1]
    assert folder.name.startswith("bcm_jax_studio_")
    assert folder.stat().st_mode & 0o777 == 0o700
  finally:
    page.close(verbose=False)
  assert not folder.exists()
  assert os.environ["GRADIO_TEMP_DIR"] == "of_the_user"


def test_ctrl_c_stops_the_studio(monkeypatch, capsys):
  port, folders = free_port(), []

  def interrupt():
    folders.append(os.environ["GRADIO_TEMP_DIR"])
    assert upload(f"http://127.0.0.1:{port}").status_code == 200
    raise KeyboardInterrupt

  monkeypatch.setattr(app, "_wait", interrupt)
  app.launch(pretrained.Model(exact.runner(exact.experiment())), port=port)
  assert capsys.readouterr().out.splitlines()[-1] == "studio stopped"
  assert not os.path.exists(folders[0])


def test_the_command_says_when_it_is_ready_and_cleans_up(tmp_path):
  port = free_port()
  process = subprocess.Popen(
      [sys.executable, "-m", "bcm_jax.studio", f"--port={port}"],
      stdout=subprocess.PIPE, text=True,
      env={**os.environ, "TMPDIR": str(tmp_path)},
  )
  try:
    lines = [process.stdout.readline() for _ in range(2)]
    assert "compiling" in lines[0]
    assert f"ready: http://127.0.0.1:{port}" in lines[1]
    assert upload(f"http://127.0.0.1:{port}").status_code == 200
    assert list(tmp_path.glob("bcm_jax_studio_*/*/private.png"))
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
  finally:
    process.kill()
  assert not list(tmp_path.glob("bcm_jax_studio_*"))
