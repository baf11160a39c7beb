"""What a sweep's rows will have measured, before the first one runs."""

import dataclasses
import difflib
from typing import Any

from experiments import build
from experiments.files.errors import UserError


def check(experiment: build.Experiment, metric: str) -> None:
  """Refuses a metric that no row will have; traces, and compiles nothing.

  `metric` is a column of curves.csv; all rows have those of `experiment`.

  Raises:
    UserError: no row will have it; names the nearest.
  """
  # Where a data set lies does not change what is measured.
  run = dataclasses.replace(experiment.run, data_on='device')
  experiment = experiment._replace(run=run)
  agent, source, spec = build.row(experiment)
  known = experiment.material.columns(experiment, agent)
  held_out = experiment.run.hold_out and metric.startswith('held_')
  if metric in known or held_out:
    return
  known |= _of_learning(experiment, agent, source, spec)
  if metric not in known:
    near = difflib.get_close_matches(metric, sorted(known), n=1)
    hint = f'; did you mean {near[0]}?' if near else ''
    raise UserError(
      f'metric={metric}: no row will have it; there are '
      f'{", ".join(sorted(known))}{hint}'
    )


def _of_learning(experiment, agent, source, spec) -> set[str]:
  """Columns of updates and of the experience that they learn from."""
  import jax

  from experiments.runtime import loop

  key = jax.random.key(0)
  names = {'updates_per_second', 'compiled'}
  if experiment.material.acts:
    if not source.is_pure:
      source = build.make_source(experiment, _stand_in(spec), agent)
      names |= {'wait_seconds', 'policy_lag'}
    names |= {'episode_return', 'episode_length'}
  carry = jax.eval_shape(lambda: loop.init(agent, source, key))
  _, means, counts = jax.eval_shape(
    lambda carry: loop.step(agent, source, carry, key), carry
  )
  names |= set(means) | set(counts)
  return names - {'return_sum', 'length_sum'}


def _stand_in(spec: Any):
  """A JAX environment with the right shapes and nothing else."""
  import jax
  import jax.numpy as jnp

  from experiments.runtime import sources
  from search.model import Environment

  shapes = sources.timestep_shapes(spec, 1)
  zeros = lambda x: jnp.zeros(x.shape[1:], x.dtype)
  reset = lambda key: (jnp.zeros(()), jax.tree.map(zeros, shapes))
  return Environment(reset, lambda state, action, key: reset(key), spec)
