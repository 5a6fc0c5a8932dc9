"""Files are written whole or not at all, whoever else writes them."""

import errno
import json
import os
import subprocess
import sys
import threading

import pytest

from bcm_jax.utils import files

ODD = ["", "{", "\xff", "[" * 100_000, "[1] 2"]


def test_several_writers_of_one_file_do_not_meet(tmp_path):
  path, problems = tmp_path / "result.json", []

  def write(number):
    try:
      for _ in range(100):
        files.write_json(path, {"writer": number, "list": list(range(200))})
    except OSError as e:
      problems.append(e)

  threads = [threading.Thread(target=write, args=(k,)) for k in range(3)]
  for thread in threads:
    thread.start()
  while any(thread.is_alive() for thread in threads):
    if path.exists():
      assert len(files.read_json(path)["list"]) == 200
  for thread in threads:
    thread.join()
  assert not problems
  assert os.listdir(tmp_path) == ["result.json"]


def test_two_processes_write_one_file(tmp_path):
  code = (
      "import sys; from bcm_jax.utils import files\n"
      "for k in range(200): files.write_json(sys.argv[1], list(range(99)))"
  )
  path = tmp_path / "result.json"
  processes = [
      subprocess.Popen([sys.executable, "-c", code, str(path)])
      for _ in range(2)
  ]
  assert [p.wait() for p in processes] == [0, 0]
  assert files.read_json(path) == list(range(99))


def test_the_content_is_on_the_disk_before_the_rename(tmp_path, monkeypatch):
  """A power failure then leaves the old or the new content."""
  calls = []
  for name in ("fsync", "replace"):
    function = getattr(os, name)
    monkeypatch.setattr(
        files.os, name,
        lambda *args, name=name, function=function:
        calls.append(name) or function(*args),
    )
  files.write_json(tmp_path / "a.json", 1)
  assert calls == ["fsync", "replace"]


@pytest.mark.parametrize("write", [
    lambda path: files.write_json(path, {"a": 1}),
    lambda path: files.create(path, b"1"),
])
def test_a_full_disk_leaves_nothing_and_is_named(tmp_path, monkeypatch, write):
  def full(descriptor):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(files.os, "fsync", full)
  with pytest.raises(OSError, match="No space left"):
    write(tmp_path / "a.json")
  assert os.listdir(tmp_path) == []


def test_a_file_is_created_once(tmp_path):
  files.create(tmp_path / "a", b"first")
  with pytest.raises(FileExistsError):
    files.create(tmp_path / "a", b"second")
  assert (tmp_path / "a").read_bytes() == b"first"


@pytest.mark.parametrize("text", ODD)
def test_what_is_no_json_is_a_value_error(tmp_path, text):
  (tmp_path / "a").write_text(text, encoding="latin-1")
  with pytest.raises(ValueError):
    files.read_json(tmp_path / "a")


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_what_is_no_file_is_neither_read_nor_waited_for(tmp_path, make):
  make(tmp_path / "a")
  with pytest.raises(ValueError, match="regular"):
    files.read_json(tmp_path / "a")


def test_json_is_read_back(tmp_path):
  files.write_json(tmp_path / "a", {"b": [1, 2.5, None]})
  assert files.read_json(tmp_path / "a") == {"b": [1, 2.5, None]}
  assert json.loads((tmp_path / "a").read_text()) == {"b": [1, 2.5, None]}
