"""How much of their text agents have in common, and leaves that they share.

What is the same in meaning has one name in `agents/core`; an agent's file says
what is its own. The bounds are on lines, so that a leaf that is written twice
is noticed before it drifts apart.

Lines of a file are compared without leading and trailing blanks, and without

* imports, docstrings, comments and blank lines;
* the fields of configs, of which each agent has its own defaults;
* headers: decorators, `class` lines, and the signatures of functions, from
  `def` to the colon. `make_networks`, `make_losses`, `make` and what they
  return have one signature in all agents.

A run is a block of consecutive lines that are equal in two files. The common
lines of a pair are those of `difflib.SequenceMatcher`'s matching blocks (no
junk), whichever of the two orders finds more, and its share is their number
over the number of lines of the shorter file. Headers count in a run, so that a
run cannot hide behind a signature.
"""

import ast
import difflib
import itertools
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from agents import efficientzero
from agents.core import efficient
from agents.core.types import Experience, Sample, Trajectory
from search.model import TimeStep

ROOT = pathlib.Path(__file__).resolve().parent.parent
AGENTS = sorted((ROOT / 'agents').glob('[a-z]*.py'))

LONGEST_RUN = 11
LARGEST_SHARE = 0.35
# Of any function of an agent, docstring included.
LONGEST_FUNCTION = 85
# Of a MuZero-like agent's file, with its docstrings.
MUZERO_LIKE = 250


def lines(source: str, *, headers: bool) -> list[str]:
  """The lines of a file that are compared, see the module's docstring."""
  dropped = set()
  drop = lambda first, last: dropped.update(range(first, last + 1))
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import | ast.ImportFrom) or (
      isinstance(node, ast.Expr)
      and isinstance(node.value, ast.Constant)
      and isinstance(node.value.value, str)
    ):
      drop(node.lineno, node.end_lineno)
    if not isinstance(node, ast.FunctionDef | ast.ClassDef):
      continue
    if isinstance(node, ast.ClassDef) and node.name.endswith('Config'):
      for field in node.body:
        if isinstance(field, ast.AnnAssign):
          drop(field.lineno, field.end_lineno)
    if not headers:
      starts = [node.lineno, *(x.lineno for x in node.decorator_list)]
      drop(min(starts), node.body[0].lineno - 1)
  stripped = enumerate(map(str.strip, source.splitlines()), 1)
  return [
    line
    for number, line in stripped
    if line and not line.startswith('#') and number not in dropped
  ]


def blocks(one: list[str], other: list[str]) -> list[int]:
  """Sizes of the blocks of equal lines."""
  found = [
    [
      x.size
      for x in difflib.SequenceMatcher(None, *pair, False).get_matching_blocks()
    ]
    for pair in ((one, other), (other, one))
  ]
  return max(found, key=sum)


def longest_run(one: list[str], other: list[str]) -> int:
  matcher = difflib.SequenceMatcher(None, one, other, False)
  return matcher.find_longest_match().size


def pairs(*, headers: bool):
  texts = {x.stem: lines(x.read_text(), headers=headers) for x in AGENTS}
  assert len(texts) >= 14
  return {
    f'{a} {b}': (texts[a], texts[b])
    for a, b in itertools.combinations(texts, 2)
  }


def test_no_two_agents_share_a_long_run_of_lines():
  runs = {k: longest_run(*pair) for k, pair in pairs(headers=True).items()}
  assert {k: v for k, v in runs.items() if v > LONGEST_RUN} == {}


def test_no_two_agents_share_a_large_part_of_their_lines():
  shares = {
    k: sum(blocks(*pair)) / min(map(len, pair))
    for k, pair in pairs(headers=False).items()
  }
  assert {k: v for k, v in shares.items() if v > LARGEST_SHARE} == {}


def test_lines_are_compared_as_said():
  source = '''"""A file."""
import a
@decorator
class Config:
  """A config."""
  field: int = 1
  def check(self,
            more):
    # A comment.
    return more


class Params:
  policy: Any
'''
  assert lines(source, headers=False) == ['return more', 'policy: Any']
  own = ['a = 1', 'b = 2', 'c = 3']
  assert blocks(own, ['b = 2', 'c = 3', 'd = 4', 'a = 1']) == [2, 0]
  assert longest_run(own, ['b = 2', 'c = 3', 'd = 4']) == 2


def test_functions_of_agents_are_not_long():
  lengths = {
    f'{path.stem}.{node.name}': node.end_lineno - node.lineno + 1
    for path in AGENTS
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.FunctionDef)
  }
  assert {k: v for k, v in lengths.items() if v > LONGEST_FUNCTION} == {}


def test_a_muzero_like_agent_is_short():
  assert len((ROOT / 'agents/muzero.py').read_text().splitlines()) < MUZERO_LIKE


def windows(reward, discount, truncated, valid, value, sample=None):
  """One window of a row each; observations and actions are of no matter."""
  row = lambda x, dtype=np.float32: jnp.asarray(x, dtype)[None]
  zeros = jnp.zeros((1, len(reward)))
  timestep = TimeStep(
    zeros, row(reward), row(discount), zeros > 0, row(truncated, bool)
  )
  experience = Experience(timestep, zeros, {'search_value': row(value)})
  return Trajectory(experience, row(valid, bool), sample)


def drawn(age):
  """A row that was written so many decisions ago."""
  one = jnp.ones(1)
  return Sample(one.astype(int), one.astype(int), one, jnp.float32([age]))


CONFIG = efficientzero.Config(
  gamma=0.5,
  unroll_steps=2,
  td_steps=2,
  prefix_horizon=1,
  off_policy_fraction=0.5,
  total_decisions=100,
)
PLAIN = ([9, 1, 2, 4, 8], [1] * 5, [0] * 5, [1] * 5, [0, 16, 32, 64, 128])


@pytest.mark.parametrize(
  ('age', 'horizon', 'value'),
  [
    # r_1 + r_2 / 2 + v_2 / 4 and so on; then r_1 + v_1 / 2.
    (None, 2, [10, 20, 40]),
    (0, 2, [10, 20, 40]),
    (49, 2, [10, 20, 40]),
    (50, 1, [9, 18, 36]),
    (1e6, 1, [9, 18, 36]),
  ],
)
def test_efficientzeros_targets_by_hand(age, horizon, value):
  sample = None if age is None else drawn(age)
  target, found = efficient.make_targets(CONFIG, windows(*PLAIN, sample))
  np.testing.assert_array_equal(found, [horizon])
  np.testing.assert_array_equal(target.value, [value])
  # The prefix starts again at every step, so it is the reward.
  np.testing.assert_array_equal(target.reward, [[0, 1, 2]])
  np.testing.assert_array_equal(target.value_mask, [[1, 1, 1]])
  np.testing.assert_array_equal(target.reward_mask, [[0, 1, 1]])
