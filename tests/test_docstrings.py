"""Docstrings say what is true: of whom there must be one, and what is in it.

`tests/docstrings.py` says how they are read; functions of arrays are called as
they are documented (`tests/docstring_calls.py`).
"""

import ast
import doctest
import importlib
import re
import textwrap
from typing import Any, NamedTuple

import chex
import docstring_calls as calls
import docstring_cases
import docstrings
import jax.numpy as jnp
import pytest

# Where functions are leaves: shapes, sources and calls are asked of them.
LEAVES = ('agents.core.', 'networks.', 'search.')

# What says a paper: its year, or where the idea is from.
_SOURCE = re.compile(r'\b(?:18|19|20)\d\d\b|\bSource:')

# Nothing published: they move, mask, name or check arrays.
PLUMBING = {
  'agents.core.planning.Share.mask',
  'agents.core.spread.effective_rank',
  'agents.core.spread.mean_cosine',
  'agents.core.spread.metrics',
  'agents.core.conservative.draw_noise',
  'agents.core.conservative.q_values',
  'agents.core.losses.cross_entropy',
  'agents.core.losses.lowest',
  'agents.core.losses.masked_mean',
  'agents.core.optim.matrix_squares',
  'agents.core.optim.norms',
  'agents.core.optim.periodic',
  'agents.core.replay.scale',
  'agents.core.replay.to_window',
  'agents.core.rollout.expect',
  'agents.core.unroll.support_metrics',
  'networks.actor_critic.flatten',
  'networks.actor_critic.v_network',
  'networks.balance.chosen',
  'networks.balance.count',
  'networks.balance.prune',
  'networks.ensemble.Prediction.cases',
  'networks.ensemble.Prediction.expected_reward',
  'networks.ensemble.row_uniforms',
  'networks.ensemble.unflatten',
  'networks.mlp.spread',
  'networks.ragged.ragged_dot',
  'networks.resnet.convolve',
  'search.engine.batched_search',
  'search._mctx.from_mctx',
  'search._mctx.search',
  'search.roots.as_bool',
  'search.roots.dirichlet',
  'search.roots.log_probs',
  'search.roots.mask_logits',
  'search.roots.most_visited',
  'search.roots.sample',
  'search.kernels.climb',
  'search.kernels.descend',
  'search.model.TimeStep.is_last',
  'search.policies.raw',
  'search.rows.draw',
  'search.rows.split',
  'search.trees.at',
  'search.trees.climb',
  'search.trees.expand',
  'search.trees.to_mctx',
}

# Why a function is not called as documented.
NOT_CALLED = {
  'agents.core.actor_critic.init': 'its networks are objects',
  'agents.core.actor_critic.soft_steps': 'its steps are functions',
  'agents.core.latent.account': "reads all of a pass's outputs",
  'agents.core.latent.model_terms': "reads all of a pass's outputs",
  'agents.core.latent.replace': 'its extras are a dict',
  'agents.core.optim.norms': 'takes any number of steps',
  'agents.core.planning.decide': 'its search is a function',
  'agents.core.sampling.any_actions': 'its distribution is an object',
  'agents.core.sampling.policy_terms': "reads all of a pass's outputs",
  'agents.core.optim.matrix_squares': 'which axes it keeps depends on a path',
  'agents.core.replay.to_window': 'its rows have two axes in front',
  'networks.actions.factored_bins': 'see the objects',
  'networks.actions.tanh_gaussian': 'see the objects',
  'networks.actor_critic.gaussian_policy': 'see the objects',
  'networks.actor_critic.q_ensemble': 'see the objects',
  'networks.actor_critic.q_mixture': 'see the objects',
  'networks.actor_critic.squash': 'see the objects',
  'networks.actor_critic.v_network': 'see the objects',
  'networks.ensemble.make': 'see the objects',
  'networks.mixture.gate_key': 'makes a key',
  'networks.mixture.next_key': 'makes a key',
  'search.engine.batched_search': "returns mctx's tree",
  'search._mctx.search': "returns mctx's tree",
  'search.exact.bellman.check': 'looks at numbers',
  'search.exact.bellman.check_policy': 'looks at numbers',
  'search.exact.bellman.model': 'see the objects',
  'search.exact.examples.random_games': 'its games have an axis in front',
  'search.lookahead.num_evaluations': 'looks at numbers',
  'search.rows.split': 'makes keys',
  'search._mctx.from_mctx': 'returns functions',
  'search.sampled.slot_recurrent_fn': 'returns a function',
  'search.kernels.descend': 'takes a rule',
  'search.trees.expand': 'takes a model',
  'search.trees.to_mctx': "returns mctx's tree",
}

# What the rule sees and cannot happen.
NEVER_RAISED = {
  'search.exact.offline_game.pessimism_term': 'its mode exists',
}

# Modules with examples.
EXAMPLES = (
  'agents.core.losses',
  'agents.core.replay',
  'agents.core.targets',
  'experiments.data.d4rl',
  'experiments.data.d4rl_names',
  'experiments.data.layout',
  'experiments.data.text',
  'experiments.envs.host',
  'experiments.envs.options',
  'experiments.envs.host',
  'experiments.envs.names',
  'experiments.envs.recorded',
  'experiments.files.errors',
  'experiments.runtime.signals',
  'experiments.files.reading',
  'experiments.files.tables',
  'experiments.playing.match',
  'experiments.playing.planners',
  'experiments.runtime.overrides',
  'experiments.report.statistics',
  'experiments.sweeps.run',
  'networks.balance',
  'networks.heads',
  'networks.routing',
  'search.exact.bellman',
  'search.exact.improvement',
  'search.lookahead',
  'search.exact.riccati',
  'search.gumbel',
  'search.proposals',
  'search.value_prefix',
)

PUBLIC = list(docstrings.public())
FUNCTIONS = [x for x in PUBLIC if isinstance(x.node, ast.FunctionDef)]
CLASSES = [x for x in PUBLIC if isinstance(x.node, ast.ClassDef)]


def test_everything_public_has_a_summary_of_one_line():
  first = {x.name: x.doc.strip().split('\n')[0] for x in PUBLIC}
  assert len(first) > 1000
  assert {k: v for k, v in first.items() if not v.endswith('.')} == {}


def test_every_array_of_a_function_has_a_shape():
  missing = {
    x.name: docstrings.undocumented_arrays(x.doc, x.node) for x in FUNCTIONS
  }
  assert {k: v for k, v in missing.items() if v} == {}


def test_every_array_of_a_class_has_a_shape_and_a_dtype():
  missing = []
  for x in CLASSES:
    said = docstrings.parse(x.doc).sections.get('Attributes', {})
    for field in x.node.body:
      if not isinstance(field, ast.AnnAssign):
        continue
      name = ast.unparse(field.target)
      if not docstrings.is_array(field.annotation) or name == 'key':
        continue
      found = docstrings.shapes(said.get(name, ''))
      if not found or not found[0].dtypes:
        missing.append(f'{x.name}.{name}')
  assert missing == []


def test_every_error_is_documented():
  missing = {}
  for x in FUNCTIONS:
    found = docstrings.undocumented_errors(
      x.doc, docstrings.raised(x.node, x.module)
    )
    if found:
      missing[x.name] = found
  assert set(missing) == set(NEVER_RAISED), missing


def test_every_array_function_of_a_paper_names_it():
  unnamed = {
    x.name for x in _of_arrays() if not _SOURCE.search(x.doc + x.around)
  }
  assert unnamed == PLUMBING


def _of_arrays():
  for x in FUNCTIONS:
    is_leaf = x.name.startswith(LEAVES)
    has_arrays = docstrings.arrays(x.node) or docstrings.is_array(
      x.node.returns
    )
    if is_leaf and has_arrays:
      yield x


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_functions_do_to_shapes_what_their_docstrings_say():
  of_arrays = {x.name for x in _of_arrays()}
  checked, wrong, not_called = set(), [], {}
  for x in FUNCTIONS:
    is_method = any(x.name.startswith(f'{c.name}.') for c in CLASSES)
    if not x.name.startswith(LEAVES) or is_method:
      continue
    given = dict(docstring_cases.CASES.get(x.name, {}))
    rest = given.pop('rest', calls.REST)
    if x.name in NOT_CALLED:
      continue
    try:
      calls.call(x, calls.load(x.name), given, rest)
      checked.add(x.name)
    except calls.Unbuildable as error:
      not_called[x.name] = str(error)
    except calls.Wrong as error:
      wrong.append(str(error))
  assert wrong == []
  assert {k: v for k, v in not_called.items() if k in of_arrays} == {}
  assert set(NOT_CALLED) <= {x.name for x in FUNCTIONS}
  assert set(docstring_cases.CASES) <= checked
  assert len(checked) >= 160, sorted(checked)


def test_functions_in_objects_do_what_is_documented():
  checked, unknown = set(), []
  for label, made in docstring_cases.OBJECTS.items():
    where = calls.load(made.where)
    if isinstance(made.functions, dict):
      parts = docstrings.parse(where.__doc__)
      text = ' '.join([parts.prose[0], parts.sections.get('Returns', '')])
      functions = {k: (f, text) for k, f in made.functions.items()}
    else:
      said = calls.fields(where)
      functions = {
        k: (getattr(made.functions, k), said.get(k, ''))
        for k in made.functions._fields
      }
    for name, (function, text) in functions.items():
      if not callable(function):
        continue
      name = f'{label}.{name}'
      if calls.call_signature(name, function, text, made.given, made.rest):
        checked.add(name)
      else:
        unknown.append(name)
  assert sorted(unknown) == sorted(docstring_cases.WITHOUT_SHAPES)
  assert len(checked) >= 75, sorted(checked)


def _call(source, **given):
  """Calls a function of a text as its docstring says."""
  scope: dict[str, Any] = {'jnp': jnp, 'chex': chex, 'Pair': _Pair}
  source = textwrap.dedent(source)
  exec(source, scope)
  tree = ast.parse(source)
  node: Any = tree.body[0]
  doc = ast.get_docstring(node) or ''
  what = docstrings.Documented(node.name, node, doc, '', tree)
  calls.call(what, scope[node.name], given)


class _Pair(NamedTuple):
  """Two arrays.

  Attributes:
    sums: float32 `[B]`.
    places: int32 `[B]`.
  """

  sums: object
  places: object


RIGHT = '''
  def total(x: chex.Array, k: int) -> chex.Array:
    """The sum of the first k.

    Args:
      x: float32 `[B, A]`.
      k: K.

    Returns:
      float32 `[B, K + 1]`.
    """
    return jnp.pad(x[:, :k].cumsum(1), ((0, 0), (1, 0)))
'''


def test_the_check_passes_what_is_right():
  _call(RIGHT)
  _call(
    '''
    def both(x: chex.Array) -> Pair:
      """Of numbers `[B, A]` sums and places."""
      return Pair(x.sum(1), x.argmax(1))
    '''
  )
  _call(
    '''
    def halves(x: chex.Array) -> chex.Array:
      """Numbers `[2N, ...]` in two: `[2, N, ...]`."""
      return x.reshape(2, -1, *x.shape[1:])
    '''
  )


@pytest.mark.parametrize(
  ('was', 'is_now', 'words'),
  [
    ('`[B, K + 1]`', '`[B, K]`', 'documented as'),
    ('`[B, K + 1]`', '`[B, A]`', 'documented as'),
    ('`[B, K + 1]`', '`[B, K + 1, 1]`', 'documented as'),
    ('float32 `[B, K', 'int32 `[B, K', 'documented as int32'),
    ('`[B, A]`', '`[B]`', 'called as documented'),
    ('x: float32', 'x: bool', 'documented as float32'),
  ],
)
def test_the_check_finds_a_wrong_docstring(was, is_now, words):
  wrong = RIGHT.replace(was, is_now)
  assert wrong != RIGHT
  with pytest.raises(calls.Wrong, match=words):
    _call(wrong)


def test_the_check_finds_a_wrong_attribute():
  with pytest.raises(calls.Wrong, match='places: documented as int32'):
    _call(
      '''
      def both(x: chex.Array) -> Pair:
        """Of numbers `[B, A]` sums and no places."""
        return Pair(x.sum(1), x.max(1))
      '''
    )


def test_the_check_does_not_guess():
  with pytest.raises(calls.Unbuildable, match='total: x'):
    _call(RIGHT.replace('float32 `[B, A]`', 'numbers'))
  with pytest.raises(calls.Unbuildable, match='no documented result'):
    _call(RIGHT.replace('float32 `[B, K + 1]`', 'sums'))


@pytest.mark.parametrize(
  ('text', 'axes', 'dtypes'),
  [
    ('float32 `[B, A]`, logits', [('B', 'A')], [('float32',)]),
    ('int32 or float32 `[B, ...]`.', [('B', '...')], [('int32', 'float32')]),
    ('`bool [2N]`', [('2N',)], [('bool',)]),
    ('float32 scalar', [()], [('float32',)]),
    ('a scalar system', [], []),
    ('`[]`, in `[0, 1]`', [()], [()]),
    ('within `[low, high]`', [], []),
    ('pytree `[B, ...]`', [('B', '...')], [('any',)]),
    ('`[B, L, ...] -> [B * L, ...]`', None, None),
    ('`(x [B]) -> y [B]`', [], []),
  ],
)
def test_shapes_are_read(text, axes, dtypes):
  found = docstrings.shapes(text)
  if axes is None:
    axes = [('B', 'L', '...'), ('B * L', '...')]
    dtypes = [(), ()]
  assert [x.axes for x in found] == axes
  assert [x.dtypes for x in found] == dtypes


@pytest.mark.parametrize('name', EXAMPLES)
def test_examples_are_right(name):
  result = doctest.testmod(importlib.import_module(name))
  assert result.attempted > 0
  assert result.failed == 0


def test_modules_with_examples_are_listed():
  found = {x.name for x in PUBLIC if '>>> ' in x.doc}
  assert all(name.startswith(EXAMPLES) for name in found)
