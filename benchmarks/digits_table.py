"""Renders docs/results.md from the JSON files of benchmarks/digits.sh.

  python benchmarks/digits_table.py docs/results > docs/results.md

With --readme it prints the short table of the README instead. A number that
no file holds is 'not run'.
"""

import json
import pathlib
import sys

# What was asked of configs/digits.py before it was first run.
AIMS = {
    "one step: recognised (worst class)": "97% (90%)",
    "one step: precision / recall": "0.65 / 0.65",
    "two steps: recognised (worst class)": "98.5%",
    "two steps: precision / recall": "0.80 / 0.80",
    "inversion in 1 step: test MSE": "0.0080",
    "inversion in 2 steps: test MSE": "0.0050",
}
RUNS = {
    "digits": "BCM from scratch",
    "digits_no_soft_term": "the same without the bidirectional term",
    "digits_ict": "iCT",
    "digits_bcm_finetune": "BCM fine-tuned from that iCT",
}
MISSING = "not run"


def _recognised(result: dict, sampler: str) -> str:
  numbers = result["samplers"].get(sampler)
  if not numbers:
    return MISSING
  r = numbers["recognised"]
  return f"{r['accuracy']:.1%} ({r['worst_class_accuracy']:.0%})"


def _manifold(result: dict, sampler: str) -> str:
  numbers = result["samplers"].get(sampler)
  if not numbers:
    return MISSING
  return f"{numbers['precision']:.3f} / {numbers['recall']:.3f}"


def _mse(result: dict, nfe: int) -> str:
  numbers = result["inversion"].get(f"nfe{nfe}")
  return f"{numbers['mse']:.4f}" if numbers else MISSING


def column(result: dict | None) -> list[str]:
  """The cells of a run, in the order of AIMS."""
  if result is None:
    return [MISSING] * len(AIMS)
  two = next(
      (s for s in result["samplers"] if s.endswith("_nfe2")), "missing"
  )
  return [
      _recognised(result, "onestep_nfe1"), _manifold(result, "onestep_nfe1"),
      _recognised(result, two), _manifold(result, two),
      _mse(result, 1), _mse(result, 2),
  ]


def table(results: dict[str, dict | None]) -> str:
  """A Markdown table, a column a run."""
  head = ["", "aim", *(RUNS[name] for name in results)]
  columns = [column(result) for result in results.values()]
  lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
  for i, (row, aim) in enumerate(AIMS.items()):
    cells = [row, aim, *(c[i] for c in columns)]
    lines.append("| " + " | ".join(cells) + " |")
  return "\n".join(lines)


def main() -> None:
  """Prints the page, or the README's table with --readme."""
  arguments = [a for a in sys.argv[1:] if a != "--readme"]
  folder = pathlib.Path(arguments[0] if arguments else "docs/results")
  results = {}
  for name in RUNS:
    path = folder / f"{name}.json"
    results[name] = json.loads(path.read_text()) if path.is_file() else None
  if "--readme" in sys.argv:
    print(table({"digits": results["digits"]}))
    return
  print("# Results\n")
  print("Made by `benchmarks/digits.sh`; this page is rendered from the JSON "
        "files in\n[results](results), which hold the whole protocol.\n")
  print("## Handwritten digits, 8x8\n")
  print(table(results))
  print("\nRecognised: share of 1,000 samples in which an SVC sees the class "
        "asked for.\nPrecision and recall: k = 3 neighbours on raw pixels, "
        "against 1,000 training\nimages. MSE: reconstruction of the 360 test "
        "images on the [0, 1] scale after\ninversion and one step back. Two "
        "steps are ancestral, and consistency multistep\nfor iCT, which "
        "cannot invert.\n")
  for name, result in results.items():
    if result:
      p, m = result["protocol"], result["samplers"]["onestep_nfe1"]
      m = m["memorisation"]
      print(f"* `{name}`: step {result['step']}, average {p['average']}, seed "
            f"{p['seed']}, config {p['config_digest']}, commit {p['commit']},"
            f" {p['hardware']}. Judge: {result['judge_test_accuracy']:.2%} on "
            "real test images. Median\n  distance to the nearest training "
            f"image (pixels 0 to 255): one-step samples\n  "
            f"{m['median_sample_to_train']:.0f}, real test images "
            f"{m['median_test_to_train']:.0f}.")


if __name__ == "__main__":
  main()
