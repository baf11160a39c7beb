"""What is known of a compiled program before it runs, for one device.

Memory, operations and bytes are the compiler's own analysis; loops, kernels and
collectives are counted in its text. The compiler counts a loop's body once
whatever its length, and a custom kernel as nothing, so only figures of similar
programs compare.
"""

import math
import re
from collections import Counter
from typing import Any, NamedTuple

COLLECTIVES = (
  'all-reduce',
  'all-gather',
  'all-to-all',
  'reduce-scatter',
  'collective-permute',
  'collective-broadcast',
  'ragged-all-to-all',
)

# Opcodes that launch no kernel.
_FREE = {
  'parameter',
  'constant',
  'tuple',
  'get-tuple-element',
  'bitcast',
  'while',
  'conditional',
  'call',
  'after-all',
  'partition-id',
  'replica-id',
  'opt-barrier',
  'add-dependency',
}
_BYTES = {'pred': 1, 'token': 0}


class Memory(NamedTuple):
  """Bytes that a program takes on a device; see `Counts`."""

  temporaries: int
  arguments: int
  results: int
  code: int


def memory(compiled: Any) -> Memory:
  """The compiler's own analysis of the memory of a `jax.stages.Compiled`."""
  found = compiled.memory_analysis()
  return Memory(
    found.temp_size_in_bytes,
    found.argument_size_in_bytes,
    found.output_size_in_bytes - found.alias_size_in_bytes,
    found.generated_code_size_in_bytes,
  )


class Counts(NamedTuple):
  """A compiled program in numbers, each of one device.

  Attributes:
    temporaries: bytes that it needs while it runs, besides the next two.
    arguments: bytes of its arguments.
    results: bytes of its results, without those written over arguments.
    code: bytes of the program.
    flops: operations as the compiler counts them; NaN if it does not say.
    bytes: read and written, likewise.
    loops_known: of them, those whose length is known beforehand.
    kernels: operations that are launched one by one.
    kernels_in_loops: of them, those within a loop, each turn again.
    host: calls of the host, infeeds and outfeeds.
    float64: arrays of 64-bit floats.
    collectives: how many of each kind there are.
    reduced: bytes of all results of all-reduces.
    exchanged: bytes of all results of the other collectives.
  """

  temporaries: int
  arguments: int
  results: int
  code: int
  flops: float
  bytes: float
  loops: int
  loops_known: int
  kernels: int
  kernels_in_loops: int
  host: int
  float64: int
  collectives: dict[str, int]
  collectives_in_loops: int
  reduced: int
  exchanged: int

  @property
  def memory(self) -> int:
    """Bytes on a device while the program runs."""
    return self.temporaries + self.arguments + self.results + self.code


def count(compiled: Any) -> Counts:
  """Counts what a `jax.stages.Compiled` has."""
  text = compiled.as_text()
  cost = compiled.cost_analysis() or {}
  code = read(text)
  collectives = [i for i in code if i.opcode in COLLECTIVES]
  sizes = Counter()
  for i in collectives:
    sizes[i.opcode == 'all-reduce'] += i.size
  loops = [i for i in code if i.opcode == 'while']
  launched = [i for i in code if not i.is_fused and i.opcode not in _FREE]
  return Counts(
    **memory(compiled)._asdict(),
    flops=cost.get('flops', math.nan),
    bytes=cost.get('bytes accessed', math.nan),
    loops=len(loops),
    loops_known=sum(i.is_bounded for i in loops),
    kernels=len(launched),
    kernels_in_loops=sum(i.in_loop for i in launched),
    host=sum(i.asks_host for i in code),
    float64=len(re.findall(r'\bf64\[', text)),
    collectives=dict(Counter(i.opcode for i in collectives)),
    collectives_in_loops=sum(i.in_loop for i in collectives),
    reduced=sizes[True],
    exchanged=sizes[False],
  )


class Instruction(NamedTuple):
  """A line of a compiled program.

  Attributes:
    opcode: without `-start`; the matching `-done` are left out.
    size: bytes of the result.
    is_fused: whether it is part of another kernel.
    in_loop: whether a loop's body holds it, directly or by calls.
    is_bounded: of a loop, whether its length is known beforehand.
  """

  opcode: str
  size: int
  line: str
  is_fused: bool
  in_loop: bool
  is_bounded: bool = False

  @property
  def asks_host(self) -> bool:
    """Whether the host takes part."""
    if self.opcode in ('infeed', 'outfeed'):
      return True
    return self.opcode == 'custom-call' and 'callback' in self.line.lower()


def copies(text: str) -> list[int]:
  """Bytes of the arrays that loops copy at every turn, in ascending order.

  Where one of them grows with a tree or a replay, what was meant to be written
  in place is copied whole. Unsigned integers are left out: they are the bits
  that a random generator mixes in a few rounds.

  Args:
    text: of a program, as `compiled.as_text()` has it.
  """
  return sorted(
    i.size
    for i in read(text)
    if i.in_loop and i.opcode == 'copy' and ' = u32[' not in i.line
  )


_HEAD = re.compile(r'^(?:ENTRY )?%?([\w.\-]+) .*\{$')
_LINE = re.compile(
  r'^\s*(?:ROOT )?%?[\w.\-]+ = (?P<type>\(.*?\)|\S+) (?P<opcode>[a-z][\w\-]*)\('
)
_CALLED = re.compile(
  r'\b(body|condition|calls|to_apply|true_computation|false_computation)='
  r'%?([\w.\-]+)'
)
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_SHAPE = re.compile(r'\b([a-z]+)(\d*)[a-z\d]*\[([\d,]*)\]')


def read(text: str) -> list[Instruction]:
  """The instructions of a program's text, as `compiled.as_text()` has it."""
  lines: dict[str, list[tuple[str, str, int]]] = {}
  calls: dict[str, list[tuple[str, str, str]]] = {}
  name = ''
  for line in text.splitlines():
    if head := _HEAD.match(line):
      name = head[1]
      lines[name], calls[name] = [], []
      continue
    found = _LINE.match(line)
    if not found or not name:
      continue
    opcode = found['opcode'].removesuffix('-start')
    # Their arguments hold shapes like parameters of an asynchronous call.
    if not opcode.endswith(('-done', '-update')):
      lines[name].append((opcode, line, _size(found['type'])))
    for how, callee in _CALLED.findall(line):
      calls[name].append((opcode, how, callee))
    for branches in _BRANCHES.findall(line):
      for callee in branches.split(','):
        calls[name].append((opcode, 'branch', callee.strip().lstrip('%')))
  fused = _reached(
    calls, lambda opcode, how: opcode != 'while' and how == 'calls'
  )
  for_one_number = _reached(calls, lambda opcode, how: how == 'to_apply')
  looped = _reached(calls, lambda opcode, how: how in ('body', 'condition'))
  bounded = {name for name, some in lines.items() if _counts_up(some)}
  return [
    Instruction(
      opcode,
      size,
      line,
      name in fused or name in for_one_number,
      name in looped,
      opcode == 'while' and _is_bounded(line, bounded),
    )
    for name, some in lines.items()
    for opcode, line, size in some
  ]


def _is_bounded(line: str, bounded: set[str]) -> bool:
  if 'known_trip_count' in line:
    return True
  # Not all compilers say so; then it is seen by the condition.
  return any(
    how == 'condition' and callee in bounded
    for how, callee in _CALLED.findall(line)
  )


def _counts_up(lines: list[tuple[str, str, int]]) -> bool:
  """Whether a condition compares a counter with a constant, and no more."""
  opcodes = Counter(opcode for opcode, _, _ in lines)
  plain = {'parameter', 'get-tuple-element', 'constant', 'compare'}
  return (
    set(opcodes) == plain
    and opcodes['compare'] == opcodes['get-tuple-element'] == 1
  )


def _reached(calls, begins) -> set[str]:
  """Computations called in a certain way, and all that these call."""
  found: set[str] = set()
  todo = [
    callee
    for some in calls.values()
    for opcode, how, callee in some
    if begins(opcode, how) and opcode != 'call'
  ]
  while todo:
    name = todo.pop()
    if name not in found:
      found.add(name)
      todo += [callee for _, _, callee in calls.get(name, ())]
  return found


def _size(kind: str) -> int:
  total = 0
  for letters, bits, shape in _SHAPE.findall(kind):
    each = _BYTES.get(letters, int(bits or 8) / 8)
    for length in filter(None, shape.split(',')):
      each *= int(length)
    total += int(each)
  return total
