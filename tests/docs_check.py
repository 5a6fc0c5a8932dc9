"""Line numbers of code that docs/architecture.md quotes.

  python -m tests.docs_check     # updates the page
"""

import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
_QUOTE = re.compile(r"^\| `([\w/.]+):\d+` \| `([^`]+)` \|", re.MULTILINE)


def renumber(text: str, root: pathlib.Path = ROOT) -> str:
  """Returns a page with the current line of every row '| `file:line` | `code`'.

  Raises:
    ValueError: not exactly one line of the file holds the code.
  """

  def current(match: re.Match) -> str:
    file, code = match.groups()
    lines = (root / file).read_text(encoding="utf-8").splitlines()
    found = [i for i, line in enumerate(lines, 1) if code in line]
    if len(found) != 1:
      raise ValueError(f"{file}: {code!r} is in lines {found}, expected one")
    return f"| `{file}:{found[0]}` | `{code}` |"

  return _QUOTE.sub(current, text)


if __name__ == "__main__":
  PAGE.write_text(renumber(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
