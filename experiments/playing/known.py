"""A user's own rule of rewards or terminations, beside a learned ensemble.

A rule is a function of a module, `MODULE:FUNCTION`, that a flag names; nothing
that is read from a run's folder is imported.
"""

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from agents.core.types import Spec
from experiments.files.errors import UserError, shown
from networks.ensemble import Known

_SHAPES = (
  'must be a function (observation, action, next_observation) of batches that '
  'returns one number a row'
)


def load(reward: str, termination: str, spec: Spec, factor: float) -> Known:
  """Imports what flags name, and tries it on the shapes of a spec.

  Args:
    reward: `MODULE:FUNCTION`, or '' for the learned one. It returns rewards in
      the environment's units.
    termination: the same, of what returns whether a step ends the episode.
    spec: of the environment, its actions vectors.
    factor: what rewards were multiplied by when the ensemble was trained.

  Raises:
    UserError: a rule cannot be imported or called, or returns other than one
      number a row.
  """
  found = {}
  for flag, name in (('reward', reward), ('termination', termination)):
    if name:
      found[flag] = _checked(f'{flag}_rule={shown(name)}', name, spec)
  if 'reward' in found:
    raw = found['reward']
    found['reward'] = lambda *args: factor * raw(*args)
  return Known(**found)


def _checked(what: str, name: str, spec: Spec) -> Callable[..., jax.Array]:
  rule = _imported(what, name)
  floats = lambda shape: jax.ShapeDtypeStruct((2, *shape), jnp.float32)
  observation = jax.tree.map(
    lambda x: floats(x.shape),
    spec.observation,
    is_leaf=lambda x: hasattr(x, 'dtype'),
  )
  action: Any = spec.action
  try:
    out = jax.eval_shape(rule, observation, floats(action.shape), observation)
  except Exception as error:
    text = shown(' '.join(str(error).split()))
    raise UserError(
      f'{what}: raised {type(error).__name__}: {text}; {_SHAPES}, in jax.numpy'
    ) from error
  if getattr(out, 'shape', None) != (2,):
    is_array = hasattr(out, 'shape')
    returned = f'shape {out.shape}' if is_array else type(out).__name__
    raise UserError(
      f'{what}: returned {returned} for a batch of 2; {_SHAPES}, here (2,)'
    )
  return lambda *args: jnp.asarray(rule(*args), jnp.float32)


def _imported(what: str, name: str) -> Callable[..., Any]:
  module, colon, function = name.partition(':')
  if not (module and colon and function.isidentifier()):
    raise UserError(f'{what}: must be MODULE:FUNCTION, such as rules:at_goal')
  try:
    found = importlib.import_module(module)
  except (Exception, SystemExit) as error:
    text = shown(' '.join(str(error).split()))
    raise UserError(
      f'{what}: importing {shown(module)} raised {type(error).__name__}: '
      f'{text}; its folder must be in PYTHONPATH, or the package installed'
    ) from error
  rule = getattr(found, function, None)
  if not callable(rule):
    raise UserError(
      f'{what}: {shown(module)} has no function {shown(function)}; {_SHAPES}'
    )
  return rule
