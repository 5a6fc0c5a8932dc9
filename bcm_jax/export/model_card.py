"""Model card of a released network: README.md with YAML front matter.

Metrics are from the result file; without it they are 'not measured'. Fields of
the front matter: https://huggingface.co/docs/hub/model-cards
"""

from collections.abc import Mapping
import json
from typing import Any

from bcm_jax.config import registry

# Entries of a result that are not metrics.
_NO_ROWS = ("plan", "std", "seeds")
_UNKNOWN = "not measured"

_LOADING = """## Usage

```sh
pip install 'bcm_jax[hub]'
python -m bcm_jax.release.hub pull OWNER/NAME model
python -m bcm_jax.release.hub unpack model runs/model
python -m bcm_jax.main --workdir=runs/model --mode=sample
```

```python
import bcm_jax

model = bcm_jax.load("model")
```
"""


def text(
    config: Mapping[str, Any],
    metadata: Mapping[str, Any],
    parameters: int,
    result: Mapping[str, Any] | None = None,
    license_id: str | None = None,
) -> str:
  """Returns the text of the card.

  Args:
    config: config of the run, as in its config.json.
    metadata: header of the weights, see `model_folder.write`.
    parameters: number of parameters of the network.
    result: result of mode eval for these weights, or None.
    license_id: license identifier of the hub, such as 'apache-2.0', or None.
  """
  parts = [
      _front_matter(config, license_id),
      f"# {config['method']['name']} on {metadata['data']}\n",
      _summary(config, metadata) + "\n",
      _facts(config, metadata, parameters, result or {}),
      "## Metrics\n",
      _UNKNOWN + "\n" if result is None else _metrics(result),
      _LOADING,
  ]
  return "\n".join(parts)


def _front_matter(config, license_id: str | None) -> str:
  """Returns YAML; strings are quoted as in JSON, which is valid YAML."""
  fields = {
      "library_name": "bcm_jax",
      "license": license_id,
      "pipeline_tag": "unconditional-image-generation",
      "tags": ["bcm_jax", "jax", "flax", config["method"]["name"]],
  }
  lines = [
      f"{key}: {json.dumps(value)}"
      for key, value in fields.items() if value is not None
  ]
  return "\n".join(["---", *lines, "---", ""])


def _summary(config, metadata) -> str:
  """Returns one sentence on method, images and classes."""
  name = config["method"]["name"]
  method = registry.METHODS.get(name)
  kind = method.title if method else f"model of method {name}"
  article = "An" if kind[0] in "aeiou" else "A"
  height, width, channels = metadata["image_shape"]
  colors = {1: "grey", 3: "RGB"}.get(channels, f"{channels}-channel")
  classes = config["model"].get("num_classes")
  suffix = f"of {classes} classes" if classes else "without classes"
  return (
      f"{article} {kind} of {height}x{width} {colors} images {suffix}, trained "
      f"with bcm_jax by method `{name}`."
  )


def _facts(config, metadata, parameters: int, result) -> str:
  """Returns the table of data, network, training and provenance."""
  training = result.get("training") or {}
  images, seconds = training.get("images"), training.get("seconds")
  method = config["method"]
  rows = {
      "data": metadata["data"],
      "network": f"`{config['model']['name']}`, {parameters:,} parameters, "
                 f"stored as {metadata['dtype']}",
      "noise levels": f"{method['sigma_min']:g} to {method['sigma_max']:g}",
      "training step": f"{metadata['step']:,}",
      "weights": f"`{metadata['average']}`",
      "images seen in training": f"{images:,}" if images else _UNKNOWN,
      "training time": f"{seconds:,.0f} s" if seconds else _UNKNOWN,
      "config": f"`{metadata['config_digest']}` (config.json)",
      "created with": f"bcm_jax {metadata['bcm_jax']}",
  }
  lines = [f"| {name} | {value} |" for name, value in rows.items()]
  return "\n".join(["| | |", "|---|---|", *lines, ""])


def _metrics(result: Mapping[str, Any]) -> str:
  """Returns the tables of a result of mode eval, and its protocol."""
  parts = [
      "From `result.json` of mode eval; +- is the standard deviation over "
      "seeds.\n"
  ]
  likelihood = result.get("likelihood")
  for title, columns in (
      ("Samples", result.get("samplers")),
      ("Inversion and reconstruction", result.get("inversion")),
      ("Likelihood", {"test images": likelihood} if likelihood else None),
  ):
    if columns:
      parts += [f"{title}:\n", _table(columns)]
  protocol = result.get("protocol", {})
  rows = {
      "samples": protocol.get("few_samples") or protocol.get("samples"),
      "seeds": ", ".join(map(str, protocol.get("seeds", []))),
      "features": protocol.get("features"),
      "reference": protocol.get("reference"),
      "hardware": protocol.get("hardware"),
      "commit": protocol.get("commit"),
  }
  facts = "; ".join(f"{k}: {v}" for k, v in rows.items() if v)
  return "\n".join([*parts, f"Protocol: {facts}.\n" if facts else ""])


def _table(columns: Mapping[str, Mapping[str, Any]]) -> str:
  """Returns a table with a row per metric and a column per sampler."""
  names = dict.fromkeys(
      name for column in columns.values() for name, value in column.items()
      if name not in _NO_ROWS and type(value) in (int, float)
  )
  lines = [
      "| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"
  ]
  for name in names:
    cells = [_cell(column, name) for column in columns.values()]
    lines.append(f"| {name} | {' | '.join(cells)} |")
  return "\n".join([*lines, ""])


def _cell(column: Mapping[str, Any], name: str) -> str:
  """Formats a metric as mean +- standard deviation over seeds."""
  value, std = column.get(name), column.get("std", {}).get(name)
  if value is None:
    return _UNKNOWN
  return f"{value:.4g}" + (f" +- {std:.2g}" if std is not None else "")
