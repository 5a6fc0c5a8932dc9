"""Texts that must not change unnoticed; UPDATE_GOLDENS=1 rewrites them."""

import difflib
import os
import pathlib


def check(path: pathlib.Path, text: str) -> None:
  """Asserts that text is what the file holds."""
  if os.environ.get("UPDATE_GOLDENS"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  old = path.read_text() if path.exists() else ""
  changes = "\n".join(
      difflib.unified_diff(old.splitlines(), text.splitlines(), lineterm="")
  )
  assert not changes, f"{path} is out of date (UPDATE_GOLDENS=1):\n{changes}"
