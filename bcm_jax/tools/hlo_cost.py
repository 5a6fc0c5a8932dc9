"""Cost of a compiled step per device: memory, FLOPs, bytes, collectives.

Costs are read from the executable of XLA. XLA counts the body of a loop once,
so that the cost of a step with gradient accumulation is that of one
microbatch; callers multiply it.
"""

from collections.abc import Mapping
import dataclasses
import math
import re
from typing import Any

import jax

from bcm_jax import errors

# Names in HLO text; the suffix '-start' marks asynchronous collectives.
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
  """Published peaks of a TPU device, one entry of jax.devices().

  Attributes:
    flops: peak bfloat16 FLOP/s.
    bandwidth: memory bandwidth, bytes/s.
    memory: memory available to a program, bytes.
    megacore: whether two cores form one device.
  """

  flops: float
  bandwidth: float
  memory: float
  megacore: bool = False


_GIB = 2**30
# Peaks: Google Cloud documentation, system architecture of TPU v4, v5e, v5p
# and v6e (Trillium); recalled, not verified. Memory: limit of the compiler of
# libtpu 0.0.52.
CHIPS = {
    "v4": Chip(275e12, 1.228e12, 30.75 * _GIB, megacore=True),
    "v5e": Chip(197e12, 0.819e12, 15.75 * _GIB),
    "v5p": Chip(459e12, 2.765e12, 95.73 * _GIB),
    "v6e": Chip(918e12, 1.640e12, 31.24 * _GIB),
}


def find_chip(topology: str) -> Chip:
  """Returns the chip of a topology such as 'v5e:16x16'.

  Raises:
    UserError: an unknown chip.
  """
  name = topology.partition(":")[0]
  if name not in CHIPS:
    raise errors.unknown_name("TPU in --topology", name, CHIPS)
  return CHIPS[name]


@dataclasses.dataclass(frozen=True)
class Cost:
  """Cost of one step, or of one microbatch, on one device.

  Attributes:
    arguments, outputs, temporaries, code: sizes in bytes.
    aliased: bytes of outputs that reuse the buffers of donated arguments.
    flops: number of floating-point operations.
    bytes_moved: bytes read from and written to main memory.
    collectives: kind -> (count, total bytes of the results).
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
    """Peak memory in bytes."""
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
  """Counts collectives in HLO text: kind -> (count, bytes of the results).

  The output of an asynchronous start includes its operands; the largest element
  is the result.
  """
  totals: dict[str, tuple[int, int]] = {}
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
    count, total = totals.get(kind, (0, 0))
    totals[kind] = count + 1, total + size
  return totals


def bytes_moved(text: str) -> int:
  """Counts the bytes that a module reads from and writes to main memory.

  XLA's 'bytes accessed' includes fast on-chip memory, twice for prefetches.
  Here every instruction outside of a fusion reads its operands and writes its
  result, except values in fast memory (memory space 1 or higher in the layout).
  An asynchronous copy counts at its start. Only the most expensive branch of a
  conditional counts; the body of a loop counts once.
  """
  computations: dict[str, list[str]] = {}
  entry, lines = "", []
  for line in text.splitlines():
    header = re.match(r"(ENTRY )?(%[\w.\-]+) \(", line)
    if header:
      lines = computations.setdefault(header.group(2), [])
      entry = header.group(2) if header.group(1) else entry
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
  """Returns the computations that an instruction calls, without fusions."""
  key = {"while": "body", "call": "to_apply", "conditional": (
      "branch_computations|true_computation|false_computation"
  )}.get(op)
  if key is None:
    return []
  calls = re.findall(rf"(?:{key})=(\{{[^}}]*\}}|%[\w.\-]+)", line)
  return re.findall(r"%[\w.\-]+", " ".join(calls))


def _traffic(match: re.Match, shapes: dict[str, int]) -> int:
  """Returns the traffic of an instruction in bytes; records its result size.

  Args:
    match: match of _INSTRUCTION.
    shapes: name -> bytes of earlier results in main memory; updated.
  """
  name, result, op, operands = match.groups()
  shapes[name] = _slow_bytes(result)
  if op in _FREE or op.endswith("-done"):
    return 0
  read = sum(
      shapes.get(operand, 0) for operand in re.findall(r"%[\w.\-]+", operands)
  )
  if op == "slice-start":  # The result shape is (operand, slice, ...).
    slices = [_bytes(*s[:2]) for s in _SHAPE.findall(result)[1:2]]
    read, shapes[name] = min([read, *slices]), 0
  elif op == "copy-start":  # The result shape is (destination, source, ...).
    shapes[name] -= read
  return read + shapes[name]


def _slow_bytes(shapes: str) -> int:
  """Returns the bytes in main memory of a shape or a tuple of shapes."""
  return sum(
      _bytes(dtype, dims)
      for dtype, dims, layout in _SHAPE.findall(shapes)
      if not re.search(r"S\([1-9]", layout)
  )


def _bytes(dtype: str, dims: str) -> int:
  """Returns the size in bytes of an HLO shape such as ('f32', '8,16')."""
  bits = _BITS.get(dtype)
  if bits is None:
    digits = re.search(r"\d+", dtype)
    bits = int(digits.group()) if digits else 0
  shape = [int(d) for d in dims.split(",") if d]
  return math.prod(shape) * bits // 8


def count_flops(function: Any, *args: Any, **kwargs: Any) -> int:
  """Counts FLOPs of the matrix products and convolutions of a function.

  Counts two FLOPs per multiply-add in the jaxpr, and loops as often as they
  run. These are the model FLOPs of MFU (Chowdhery et al., PaLM, 2022): norms,
  activations and optimizers are excluded, and sharding has no effect.

  Args:
    function: function to trace; bind static arguments by functools.partial.
    *args, **kwargs: arguments of the function, arrays or their shapes.
  """
  return _flops(jax.make_jaxpr(function)(*args, **kwargs).jaxpr)


def _flops(jaxpr: Any) -> int:
  """Counts FLOPs of a jaxpr and of the jaxprs in its equations."""
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
  """Counts FLOPs of a dot_general."""
  (contracted, _), _ = eqn.params["dimension_numbers"]
  left = eqn.invars[0].aval.shape
  return 2 * eqn.outvars[0].aval.size * math.prod(left[i] for i in contracted)


def _conv_flops(eqn: Any) -> int:
  """Counts FLOPs of a convolution, with padding, without dilation zeros.

  With this convention the forward pass and both gradients have equal counts.
  """
  numbers = eqn.params["dimension_numbers"]
  kernel = eqn.invars[1].aval.shape
  products = math.prod(kernel) // kernel[numbers.rhs_spec[0]]
  zeros = math.prod(eqn.params["lhs_dilation"])
  return 2 * eqn.outvars[0].aval.size * products // zeros
