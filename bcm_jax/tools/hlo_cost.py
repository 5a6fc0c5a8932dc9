"""Cost of a compiled step per device: memory, FLOPs, bytes, collectives.

Taken from the executable that XLA compiled, not estimated. Loops are the
exception: XLA counts the body of a loop once, so a step that accumulates
gradients over microbatches is counted for one of them, and the caller
multiplies.
"""

from collections.abc import Mapping
import dataclasses
import math
import re
from typing import Any

import jax

from bcm_jax import errors

# Names in the HLO text; '-start' marks the asynchronous form.
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all",
                "collective-permute")
_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}
_SHAPE = re.compile(r"([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\](\{[^}]*\})?")
_COLLECTIVE = re.compile(
    rf"= (.*?) ({'|'.join(_COLLECTIVES)})(-start)?\("
)
_INSTRUCTION = re.compile(
    r"\s+(?:ROOT )?(%[\w.\-]+) = (.*?) ([\w\-]+)\((.*?)\)(?:, |$)"
)
# Instructions that move no data.
_FREE = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant",
         "while", "conditional", "call")


@dataclasses.dataclass(frozen=True)
class Chip:
  """Published peaks of a TPU device as JAX sees it.

  Attributes:
    flops: peak bfloat16 operations per second.
    bandwidth: bytes per second from its memory.
    memory: bytes that a program may use.
    megacore: whether its two cores are one device.
  """

  flops: float
  bandwidth: float
  memory: float
  megacore: bool = False


_GIB = 2**30
# Google Cloud's documentation, system architecture pages of TPU v4, v5e, v5p
# and v6e (Trillium), recalled without a look-up. Usable memory is what the
# compiler (libtpu 0.0.52) allows.
CHIPS = {
    "v4": Chip(275e12, 1.228e12, 30.75 * _GIB, megacore=True),
    "v5e": Chip(197e12, 0.819e12, 15.75 * _GIB),
    "v5p": Chip(459e12, 2.765e12, 95.73 * _GIB),
    "v6e": Chip(918e12, 1.640e12, 31.24 * _GIB),
}


def find_chip(topology: str) -> Chip:
  """Returns the chip of a topology such as 'v5e:16x16'.

  Raises:
    UserError: unknown name.
  """
  name = topology.partition(":")[0]
  if name not in CHIPS:
    raise errors.unknown_name("TPU in --topology", name, CHIPS)
  return CHIPS[name]


@dataclasses.dataclass(frozen=True)
class Cost:
  """Cost of one step (or one of its microbatches) on one device.

  Attributes:
    arguments, outputs, temporaries, code: bytes.
    aliased: bytes of outputs in the buffers of donated arguments.
    flops: floating-point operations.
    bytes_moved: read from and written to the device's main memory.
    collectives: kind -> (count, total bytes of their results).
  """

  arguments: int
  outputs: int
  temporaries: int
  code: int
  aliased: int
  flops: float
  bytes_moved: float
  collectives: Mapping[str, tuple[int, int]]

  @property
  def peak(self) -> int:
    """Peak bytes in memory."""
    return (self.arguments + self.outputs - self.aliased + self.temporaries
            + self.code)


def cost(compiled: jax.stages.Compiled) -> Cost:
  """Returns the cost of an executable."""
  memory = compiled.memory_analysis()
  numbers = compiled.cost_analysis() or {}
  text = compiled.as_text()
  return Cost(
      arguments=memory.argument_size_in_bytes,
      outputs=memory.output_size_in_bytes,
      temporaries=memory.temp_size_in_bytes,
      code=memory.generated_code_size_in_bytes,
      aliased=memory.alias_size_in_bytes,
      flops=numbers.get("flops", 0.0),
      bytes_moved=bytes_moved(text),
      collectives=collectives(text),
  )


def collectives(text: str) -> dict[str, tuple[int, int]]:
  """Returns kind -> (count, bytes of results) of the collectives in HLO text.

  The output of an asynchronous start includes operands; its largest part is the
  result.
  """
  found: dict[str, tuple[int, int]] = {}
  for line in text.splitlines():
    match = _COLLECTIVE.search(line)
    if match is None:
      continue
    result, kind, started = match.groups()
    sizes = [_bytes(*shape[:2]) for shape in _SHAPE.findall(result)]
    if started and kind != "all-reduce":
      size = max(sizes, default=0)
    else:
      size = sum(sizes)
    count, total = found.get(kind, (0, 0))
    found[kind] = count + 1, total + size
  return found


def bytes_moved(text: str) -> int:
  """Counts bytes that a module reads from and writes to main memory.

  XLA's own 'bytes accessed' includes the chip's fast memory, twice where it is
  prefetched. Here every instruction outside of a fusion reads its operands and
  writes its result, except those in fast memory (space 1 and up in their
  layout), and an asynchronous copy counts at its start. Of branches the largest
  counts; the body of a loop counts once.
  """
  computations: dict[str, list[str]] = {}
  entry, lines = "", []
  for line in text.splitlines():
    head = re.match(r"(ENTRY )?(%[\w.\-]+) \(", line)
    if head:
      lines = computations.setdefault(head.group(2), [])
      entry = head.group(2) if head.group(1) else entry
    else:
      lines.append(line)

  def count(name: str) -> int:
    total, shapes = 0, {}
    for line in computations.get(name, []):
      match = _INSTRUCTION.match(line)
      if match is None:
        continue
      inner = [count(n) for n in _called(match.group(3), line)]
      total += max(inner, default=0) + _traffic(match, shapes)
    return total

  return count(entry)


def _called(op: str, line: str) -> list[str]:
  """Returns the computations that an instruction calls, not fused."""
  key = {"while": "body", "call": "to_apply", "conditional": (
      "branch_computations|true_computation|false_computation"
  )}.get(op)
  if key is None:
    return []
  found = re.findall(rf"(?:{key})=(\{{[^}}]*\}}|%[\w.\-]+)", line)
  return re.findall(r"%[\w.\-]+", " ".join(found))


def _traffic(match: re.Match, shapes: dict[str, int]) -> int:
  """Returns bytes of an instruction; adds those of its result to shapes."""
  name, result, op, operands = match.groups()
  shapes[name] = _slow_bytes(result)
  if op in _FREE or op.endswith("-done"):
    return 0
  read = sum(
      shapes.get(operand, 0) for operand in re.findall(r"%[\w.\-]+", operands)
  )
  if op == "slice-start":  # Its result names the operand, then the slice.
    taken = [_bytes(*s[:2]) for s in _SHAPE.findall(result)[1:2]]
    read, shapes[name] = min([read, *taken]), 0
  elif op == "copy-start":  # Its result names destination and source.
    shapes[name] -= read
  return read + shapes[name]


def _slow_bytes(shapes: str) -> int:
  """Returns bytes in main memory of a shape, or a tuple of shapes."""
  return sum(
      _bytes(dtype, dims)
      for dtype, dims, layout in _SHAPE.findall(shapes)
      if not re.search(r"S\([1-9]", layout)
  )


def _bytes(dtype: str, dims: str) -> int:
  bits = _BITS.get(dtype)
  if bits is None:
    digits = re.search(r"\d+", dtype)
    bits = int(digits.group()) if digits else 0
  shape = [int(d) for d in dims.split(",") if d]
  return math.prod(shape) * bits // 8


def count_flops(function: Any, *args: Any, **kwargs: Any) -> int:
  """Counts FLOPs of the matrix products and convolutions of a function.

  Counted in its jaxpr, loops as often as they run: two per multiply-add. These
  are the model FLOPs of MFU; norms, activations and optimizers do not count,
  and the result does not depend on how XLA shards the work.

  Args:
    function: to trace; static arguments by functools.partial.
    *args: arrays or their shapes.
    **kwargs: the same.
  """
  return _flops(jax.make_jaxpr(function)(*args, **kwargs).jaxpr)


def _flops(jaxpr: Any) -> int:
  total = 0
  for eqn in jaxpr.eqns:
    inner = sum(map(_flops, _inner(eqn.params)))
    total += inner * eqn.params.get("length", 1)
    if eqn.primitive.name == "dot_general":
      total += _dot_flops(eqn)
    elif eqn.primitive.name == "conv_general_dilated":
      total += _conv_flops(eqn)
  return total


def _inner(params: Mapping[str, Any]):
  """Yields the jaxprs among the parameters of an equation."""
  for value in params.values():
    for item in value if isinstance(value, (tuple, list)) else [value]:
      if hasattr(item, "jaxpr"):
        item = item.jaxpr
      if hasattr(item, "eqns"):
        yield item


def _dot_flops(eqn: Any) -> int:
  (contracted, _), _ = eqn.params["dimension_numbers"]
  left = eqn.invars[0].aval.shape
  return 2 * eqn.outvars[0].aval.size * math.prod(left[i] for i in contracted)


def _conv_flops(eqn: Any) -> int:
  """Counts padding as image and omits the zeros of dilation.

  With that the forward pass and its two gradients have equal counts.
  """
  numbers = eqn.params["dimension_numbers"]
  kernel = eqn.invars[1].aval.shape
  products = math.prod(kernel) // kernel[numbers.rhs_spec[0]]
  zeros = math.prod(eqn.params["lhs_dilation"])
  return 2 * eqn.outvars[0].aval.size * products // zeros
