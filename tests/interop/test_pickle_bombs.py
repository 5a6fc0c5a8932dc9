"""Small pickles that ask for hours or gigabytes are refused at once."""

import json
import os
import pathlib
import struct
import subprocess
import sys

import pytest

from tests.interop import craft
from tests.interop.craft import blob
from tests.interop.craft import call
from tests.interop.craft import name
from tests.interop.craft import number
from tests.interop.craft import storage
from tests.interop.craft import tensor
from tests.interop.craft import text

ROOT = pathlib.Path(__file__).parents[2]
MANY = 100_000
LONG = 400_000
LAYER = name("torch.nn.modules.linear", "Linear")


def get(index: int) -> bytes:
  return b"h" + bytes([index])


def put(index: int, value: bytes) -> bytes:
  """Returns opcodes that only memoise a value."""
  return value + b"q" + bytes([index]) + b"0"


def repeated(part: bytes, count: int = MANY) -> bytes:
  """Returns a list of one value again and again."""
  return b"](" + part * count + b"e"


# The C unpickler would hash for hours, allocate 2.4 GB, or exhaust the stack.
THREE = {
    "a_long_tuple_as_key_again_and_again": (
        b"(" + b"K\x01" * 300_000 + b"tq\x00}q\x01h\x01" + b"h\x00Ns" * 300_000,
        "key: got a tuple",
    ),
    "a_memo_index_of_300_million": (
        b"Nr" + struct.pack("<I", 300_000_000), "memo index: got 300000000"
    ),
    "nested_tuples_as_key": (
        b"})" + b"\x85" * 300_000 + b"Ns", "key: got a tuple"
    ),
}

ARRAY = name("numpy.core.multiarray", "_reconstruct")
DTYPE = call(name("numpy", "dtype"), text("f4"), b"\x89", b"\x88")
BOOLS = call(
    name("torch._utils", "_rebuild_tensor_v3"),
    storage("0", 24, "UntypedStorage"),
    *(number(0), craft.tuple_of(number(1)), craft.tuple_of(number(1))),
    *(b"\x89", b"}", name("torch", "bool")),
)
BUDGET = "got too many objects or copies"
TREE = "more than 1000000 values"

QUADRATIC = {
    "equal_long_keys": (
        put(1, text("x" * LONG)) + b"}" + text("x" * LONG) + b"Ns"
        + (get(1) + b"Ns") * MANY,
        "key: got 'xxx",
    ),
    "keys_of_one_hash": (
        b"}(" + b"".join(
            number(n * (2**61 - 1)) + b"N" for n in range(1, 50_000)
        ) + b"u",
        "key: got a huge number",
    ),
    "sets_of_one_list": (
        put(1, repeated(b"K\x01")) + put(2, name("builtins", "set"))
        + repeated(get(2) + get(1) + b"\x85R"),
        BUDGET,
    ),
    "one_set_in_many_lists": (
        b"\x8f(" + b"".join(b"M" + struct.pack("<H", n) for n in range(65536))
        + b"\x90q\x010" + repeated(get(1)),
        TREE,
    ),
    "one_tuple_of_arguments": (
        put(1, b"(" + b"K\x01" * MANY + b"t") + put(2, ARRAY)
        + repeated(get(2) + get(1) + b"R"),
        BUDGET,
    ),
    "one_text_as_state": (
        put(1, text("x" * LONG)) + put(2, DTYPE)
        + repeated(get(2) + get(1) + b"b"),
        BUDGET,
    ),
    "one_text_as_bytes": (
        put(1, text("x" * LONG)) + put(2, text("latin1"))
        + put(3, name("_codecs", "encode"))
        + repeated(get(3) + get(1) + get(2) + b"\x86R"),
        BUDGET,
    ),
    "one_name_of_many_globals": (
        put(1, text("torch.nn.modules." + "x" * 4000)) + put(2, text("x"))
        + repeated(get(1) + get(2) + b"\x93"),
        BUDGET,
    ),
    "one_long_shape": (
        ARRAY + b")R" + craft.tuple_of(
            number(1), b"(" + number(2**62) * 60_000 + b"t", DTYPE, b"\x89",
            blob(b""),
        ) + b"b",
        "shape of a NumPy array: got a tuple",
    ),
    "bools_of_one_storage": (BOOLS, "'torch.bool'"),
}

# An error, or None where the value is small enough.
FLOODS = {
    "marks": (b"(" * LONG, "ends early"),
    "lists": (b"]" * LONG, "no tensors"),
    "dicts": (b"}K\x01Ns" * MANY, "no tensors"),
    "sets": (b"\x8f" * LONG, BUDGET),
    "frozensets": (b"(\x91" * MANY, BUDGET),
    "memo": (b"N" + b"\x94" * LONG, "no tensors"),
    "duplicates": (b"N" + b"2" * LONG, "no tensors"),
    "objects": (put(1, LAYER) + (get(1) + b")\x81") * MANY, "no tensors"),
    "tensors": (put(1, tensor(storage())) + repeated(get(1)), None),
}


def _laughs(count: int) -> bytes:
  """Returns a list of twice a list of twice ...: 2 ** count lists."""
  return b"]" + b"".join(
      put(i, b"") + b"](" + get(i) * 2 + b"e" for i in range(count)
  )


def _long_names(depth: int) -> bytes:
  """Returns dicts of 30 long keys in each other: 30 ** depth tensors."""
  body = tensor(storage())
  for i in range(depth):
    keys = (text(f"{n}" + "x" * 1000) + get(i) for n in range(30))
    body += put(i, b"") + b"}(" + b"".join(keys) + b"u"
  return body


LOOPS = {
    "billion_laughs": (_laughs(40), TREE),
    "billion_long_names": (craft.dict_of(group=_long_names(4)), TREE),
    "list_in_itself": (b"]q\x01h\x01a", TREE),
    "dict_in_itself": (b"}q\x01" + text("a") + get(1) + b"s", TREE),
    "tuple_in_itself": (b"]q\x01(" + get(1) + b"tq\x02a" + get(2), TREE),
    "object_in_itself": (
        LAYER + b")\x81q\x01"
        + craft.dict_of(_modules=craft.dict_of(a=get(1))) + b"b",
        TREE,
    ),
    "state_of_itself": (
        b"}q\x01" + text("class_name") + text("A") + b"s" + text("state")
        + get(1) + b"s0" + call(
            name("torch_utils.persistence", "_reconstruct_persistent_obj"),
            get(1),
        ),
        "no tensors",
    ),
    "deep_objects": (
        b"N" + (
            put(0, b"") + LAYER + b")\x81"
            + craft.dict_of(_modules=craft.dict_of(a=get(0))) + b"b"
        ) * 5000,
        TREE,
    ),
    "deep_arguments": (
        b"]" + (
            put(0, b"") + LAYER + b")\x81}("
            + text("_init_args") + get(0) + b"ub"
        ) * 5000,
        TREE,
    ),
}

LENGTHS = {
    f"length_{i}": (body, "")
    for i, body in enumerate((
        *(b"\x8b\xff\xff\xff\x7f", b"\x8b\xff\xff\xff\xff", b"U\xff", b"C\xff"),
        *(b"T\xff\xff\xff\xff", b"T\x00\x00\x00\x80", b"X\xff\xff\xff\xff"),
        *(b"B\xff\xff\xff\xff", b"\x8e" + b"\xff" * 8, b"\x8d" + b"\x7f" * 8),
        *(b"\x96" + b"\x7f" * 8, b"\x95" + b"\x7f" * 8, b"\x80\xff", b"j\xff"),
    ))
}

BOMBS = THREE | QUADRATIC | FLOODS | LOOPS | LENGTHS

# Prints {file: (error or None, CPU seconds, peak memory in MB beyond that of
# the imports)}; the peak is that of all files so far.
SCRIPT = """
import json, pathlib, resource, sys, time
from bcm_jax import errors
from bcm_jax.interop import weight_files

def peak():
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

base, found = peak(), {}
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
  error, start = None, time.process_time()
  try:
    weight_files.read(str(path))
  except errors.UserError as e:
    error = str(e)
  found[path.name] = error, time.process_time() - start, peak() - base
print(json.dumps(found))
"""


# Those that burn the most time before they are refused have faster neighbors.
SLOW = {
    "billion_laughs", "sets_of_one_list", "one_set_in_many_lists",
    *FLOODS.keys() - {"marks", "frozensets"},
}


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
  """Returns what one process reports of the selected bombs; their folder."""
  folder = tmp_path_factory.mktemp("bombs")
  cases = {
      item.callspec.params["case"] for item in request.session.items
      if item.path == request.path
  }
  for case in cases:
    craft.write_zip(folder / case, BOMBS[case][0], {"data/0": bytes(24)})
  memo = "a_memo_index_of_300_million"
  if memo in cases:
    (folder / memo).write_bytes(craft.pickled(THREE[memo][0]))
  done = subprocess.run(
      [sys.executable, "-c", SCRIPT, str(folder)], cwd=ROOT, check=True,
      env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
      timeout=300,
  )
  return folder, json.loads(done.stdout)


@pytest.mark.parametrize("case", [
    pytest.param(case, marks=pytest.mark.slow) if case in SLOW else case
    for case in BOMBS
])
def test_bombs_are_refused_quickly(case, results):
  folder, found = results
  words = BOMBS[case][1]
  error, seconds, megabytes = found[case]
  assert seconds < (1 if case in THREE else 10) and megabytes < 200
  if words is None:
    assert error is None
  else:
    assert error.startswith(f"{folder / case}: ") and "\n" not in error
    assert words in error
