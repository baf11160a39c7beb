"""The one loop: it knows no agent, and an agent knows nothing of it.

A step takes a batch from the source, updates the agent and returns the result
to the source; its key is the run's folded with the step. With a pure source a
whole interval is one compiled program; else only `agent.update` is compiled,
its state donated.
"""

import functools
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from agents.core.types import Agent
from experiments.files.errors import UserError
from experiments.runtime import keys, updates
from experiments.runtime.budget import Budget
from experiments.runtime.sources import Source, Stopped


class Carry(NamedTuple):
  """All that changes in a run; one pytree where the source is pure."""

  agent: Any
  source: Any
  step: Any


class Intervals(NamedTuple):
  """Updates between logs, checkpoints and evaluations; 0 for never.

  Host simulators start afresh at a checkpoint.
  """

  log: int
  checkpoint: int = 0
  evaluate: int = 0

  def next_stop(self, step: int, end: int) -> int:
    """The first multiple of any interval above `step`, at most `end`."""
    stops = [(step // n + 1) * n for n in self if n]
    return min([*stops, end])


class Hooks(NamedTuple):
  """What the loop calls; each may be None.

  Attributes:
    log: `(step, metrics: dict of floats)`.
    save: `(carry)`, at checkpoints and at the end.
    evaluate: `(step, agent_state) -> metrics`.
    stopping: `(step) -> bool`, asked after every step on the host and every
      interval of a pure run; True saves and leaves. Several processes must get
      the same answer at the same step.
    sum_counts: `(counts) -> counts`, over all processes, for a host source.
  """

  log: Callable[[int, dict[str, float]], None] | None = None
  save: Callable[[Carry], None] | None = None
  evaluate: Callable[[int, Any], dict[str, float]] | None = None
  stopping: Callable[[int], bool] | None = None
  sum_counts: Callable[[dict[str, float]], dict[str, float]] | None = None


_NO_HOOKS = Hooks()


class Diverged(UserError):
  """A metric or a parameter is not finite: the run cannot continue."""


class Watch(NamedTuple):
  """The first update with a number that is not finite, or the last one.

  Attributes:
    step: int32, counted from 1; 0 if all are finite.
    values: dict of float32 scalars, metrics, gauges and counts.
  """

  step: Any
  values: dict[str, Any]


def init(
  agent: Agent,
  source: Source,
  key: chex.PRNGKey,
  shardings: Carry | None = None,
) -> Carry:
  """The carry of step 0.

  Args:
    shardings: of the carry's parts, over several devices (`runtime.mesh.init`).
  """
  where = shardings or Carry(None, None, None)
  state = init_agent(agent, key, where.agent)
  make = source.init
  # What is loaded from elsewhere must not become a constant of a program.
  if source.is_pure and source.kept is None:
    make = jax.jit(source.init, out_shardings=where.source)
  step, source_state = jnp.zeros((), jnp.int32), make(source_key(key))
  if where.step is not None and source.is_pure:
    step = jax.device_put(step, where.step)
    source_state = jax.device_put(source_state, where.source)
  return Carry(state, source_state, step)


def init_agent(agent: Agent, key: chex.PRNGKey, sharding: Any = None) -> Any:
  """The agent's state of step 0, from a compiled function.

  So its leaves share no buffers and can be donated.
  """
  agent_key, _ = jax.random.split(jax.random.fold_in(key, 2**31 - 1))
  return jax.jit(agent.init, out_shardings=sharding)(agent_key)


def source_key(key: chex.PRNGKey) -> chex.PRNGKey:
  """The key that `init` passes to the source, for `Persistence.load`."""
  return jax.random.split(jax.random.fold_in(key, 2**31 - 1))[1]


def step(
  agent: Agent, source: Source, carry: Carry, key: chex.PRNGKey, update=None
) -> tuple[Carry, dict[str, Any], dict[str, Any]]:
  """One update, perhaps by a compiled `agent.update`.

  Returns the carry, means (agent metrics and the source's gauges) and sums (the
  source's counts).
  """
  update = update or agent.update
  carry, metrics, measures = _step(source, carry, key, update)
  return carry, metrics | measures.gauges, measures.counts


def _step(source: Source, carry: Carry, key: Any, update: Callable):
  """One update; its metrics and the source's measures, not read yet."""
  next_key, update_key = keys.split(keys.fold_in(key, carry.step))
  source_state, batch, measures = source.next(
    carry.source, carry.agent, carry.step, next_key
  )
  state, info = update(carry.agent, batch, update_key)
  source_state = source.feedback(source_state, batch, info)
  return Carry(state, source_state, carry.step + 1), info.metrics, measures


def compile_interval(agent: Agent, source: Source) -> Callable:
  """A compilable `(carry, key, num_steps) -> (carry, means, counts)`.

  One program serves every number of steps and can be vmapped over carries and
  keys, with a shared step. A number that is not finite shows in the means.
  """
  watched = watched_interval(agent, source)
  return lambda carry, key, num_steps: watched(carry, key, num_steps)[:3]


def watched_interval(agent: Agent, source: Source) -> Callable:
  """`compile_interval` with the interval's `Watch` as a fourth result."""
  one = functools.partial(step, agent, source)

  def interval(carry: Carry, key, num_steps):
    _, means, counts = jax.eval_shape(one, carry, key)
    zeros = lambda tree: jax.tree.map(
      lambda x: jnp.zeros(x.shape, jnp.float32), tree
    )
    watch = Watch(jnp.zeros((), jnp.int32), zeros(means | counts))

    def body(_, scanned):
      carry, sums, watch = scanned
      carry, means, counts = one(carry, key)
      sums = jax.tree.map(jnp.add, sums, (means, counts))
      return carry, sums, _look(watch, carry.step, means | counts)

    carry, (means, counts), watch = jax.lax.fori_loop(
      0, num_steps, body, (carry, zeros((means, counts)), watch)
    )
    means = jax.tree.map(lambda x: x / num_steps, means)
    return carry, means, counts, watch

  return interval


def _look(watch: Watch, step, values) -> Watch:
  """The watch so far, or this update if it is the first with a bad number."""
  values = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), values)
  finite = [jnp.isfinite(x).all() for x in values.values()]
  bad = ~jnp.stack(finite).all() if finite else False
  unset = watch.step == 0
  return Watch(
    jnp.where(unset & bad, step, watch.step),
    jax.tree.map(
      lambda new, old: jnp.where(unset, new, old), values, watch.values
    ),
  )


def _check_numbers(step: int, values: dict[str, Any]) -> None:
  bad = {n: float(x) for n, x in values.items() if not np.isfinite(x)}
  if bad:
    what = ', '.join(f'{name} is {x}' for name, x in sorted(bad.items()))
    raise Diverged(f'{what} at update {step}; nothing since then was saved')


@jax.jit
def _are_finite(leaves):
  return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves])


def not_finite(params: Any) -> list[str]:
  """Key paths of the floating-point leaves that are not all finite."""
  floats = {
    jax.tree_util.keystr(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
  }
  if not floats:
    return []
  finite = np.asarray(_are_finite(list(floats.values())))
  return [name or 'params' for name, ok in zip(floats, finite) if not ok]


def _check_params(step: int, params: Any) -> None:
  """Raises `Diverged` if an update made the parameters not finite.

  The metrics of that update may still be finite.
  """
  bad = not_finite(params)
  if bad:
    more = f' and {len(bad) - 1} more' if len(bad) > 1 else ''
    raise Diverged(
      f'the parameters {bad[0]}{more} are not finite after update {step}; they '
      'were not saved'
    )


class Piece(NamedTuple):
  """What was measured in consecutive updates, in `seconds` of wall time.

  `means` and `counts` are dicts of scalars, or of arrays with a row for each
  run; counts add up.
  """

  means: dict[str, Any]
  counts: dict[str, Any]
  seconds: float
  updates: int


def joined(pieces: Sequence[Piece]) -> Piece:
  """Pieces as one: means over all updates, sums of all counts.

  A mean that some pieces lack is taken over the others.
  """
  if len(pieces) == 1:
    return pieces[0]
  means, counts = {}, {}
  for name in dict.fromkeys(n for piece in pieces for n in piece.means):
    known = [piece for piece in pieces if name in piece.means]
    values = np.asarray([piece.means[name] for piece in known])
    weights = [piece.updates for piece in known]
    means[name] = np.average(values, axis=0, weights=weights)
  for name in dict.fromkeys(n for piece in pieces for n in piece.counts):
    counts[name] = sum(piece.counts.get(name, 0.0) for piece in pieces)
  seconds = sum(piece.seconds for piece in pieces)
  return Piece(means, counts, seconds, sum(p.updates for p in pieces))


def _summary(means, counts, seconds, num_steps) -> dict[str, float]:
  metrics = {name: float(x) for name, x in means.items()}
  counts = {name: float(x) for name, x in counts.items()}
  episodes = counts.pop('episodes', 0.0)
  for name in ('return', 'length'):
    total = counts.pop(f'{name}_sum', None)
    if total is not None and episodes:
      metrics[f'episode_{name}'] = total / episodes
  if episodes:
    metrics['episodes'] = episodes
  metrics |= counts
  if seconds > 0:
    metrics['updates_per_second'] = num_steps / seconds
  return metrics


class Reading(NamedTuple):
  """How the numbers of some updates are checked and summarised.

  `check(step, agent_state, piece)` raises if the run cannot continue;
  `summary(piece)` gives the metrics to log.
  """

  check: Callable[[int, Any, Piece], None]
  summary: Callable[[Piece], dict[str, Any]]


def _check(step: int, agent_state: Any, piece: Piece) -> None:
  _check_numbers(step, piece.means | piece.counts)
  _check_params(step, agent_state.params)


ONE_RUN = Reading(_check, lambda piece: _summary(*piece))


def _host_interval(source, update, stopping, carry, key, num_steps):
  gathered: list[Any] = []
  counted: list[dict[str, Any]] = []
  sums: dict[str, float] = {}
  carry = carry._replace(step=int(carry.step))
  if source.derives:
    key = keys.Derived(key)
  for _ in range(num_steps):
    carry, metrics, measures = _step(source, carry, key, update)
    gathered.append((metrics, measures.gauges))
    counted.append(measures.counts)
    for name, value in measures.counts.items():
      sums[name] = sums.get(name, 0.0) + float(value)
    if stopping is not None and stopping(carry.step):
      break
  # Nothing is read before: the device would wait for the host.
  gathered = updates.read(gathered)
  names = sorted({name for means in gathered for name in means})
  means = {}
  for name in names:
    values = [np.asarray(m[name], np.float32) for m in gathered if name in m]
    means[name] = float(np.mean(values))
  if not np.isfinite([*means.values(), *sums.values()]).all():
    first = carry.step - len(gathered) + 1
    for i, row in enumerate(zip(gathered, counted)):
      _check_numbers(first + i, row[0] | row[1])
  carry = carry._replace(step=np.asarray(carry.step, np.int32))
  return carry, means, sums, len(gathered)


def run(
  agent: Agent,
  source: Source,
  carry: Carry,
  *,
  key: chex.PRNGKey,
  steps: int | None,
  intervals: Intervals,
  hooks: Hooks = _NO_HOOKS,
  update: Callable | None = None,
  interval: Callable | None = None,
  budget: Budget | None = None,
  reading: Reading = ONE_RUN,
) -> Carry:
  """Runs updates until the carry's step is `steps`, or the budget is spent.

  An exception, also one of an environment, passes through and nothing more is
  saved: what it left half done must not become a checkpoint. The same command
  resumes from the last one.

  Args:
    carry: where to begin; its agent state is donated.
    steps: updates of the whole run; None where the budget ends it.
    update: for a host source, from `runtime.mesh` or `runtime.updates`; its key
      may be a `keys.Derived`. None compiles one.
    interval: for a pure source, likewise.
    budget: ends the run by its decisions, which are added to it.

  Raises:
    Diverged: a metric, gauge, count or parameter is not finite; at the end of
      the interval, before anything of it is evaluated, logged or saved.
  """
  if source.is_pure:
    compiled = interval or jax.jit(
      watched_interval(agent, source), donate_argnums=0
    )
  else:
    update = update or updates.compiled(agent)
    compiled = None
  # If nothing is done there is nothing to save.
  done = saved = int(carry.step)
  stop = hooks.stopping or (lambda step: False)
  # Parts of an interval that the budget divides; it is logged as one.
  pieces: list[Piece] = []

  def end() -> int:
    limits = [] if steps is None else [steps]
    return min(limits + ([] if budget is None else [budget.stop(done)]))

  while done < (limit := end()) and not stop(done):
    start = time.perf_counter()
    if budget is not None and budget.acted is not None and source.rest:
      carry = carry._replace(source=source.rest(carry.source))
    halt = intervals.next_stop(done, sys.maxsize)
    due = min(halt, limit) - done
    if compiled is not None:
      carry, means, counts, *watch = compiled(carry, key, due)
      means, counts, watch = jax.device_get((means, counts, watch))
      for found in watch:
        _check_numbers(int(found.step), found.values)
    else:
      try:
        carry, means, counts, due = _host_interval(
          source, update, hooks.stopping, carry, key, due
        )
      except Stopped:
        return carry
      if hooks.sum_counts is not None:
        counts = hooks.sum_counts(counts)
    seconds = time.perf_counter() - start
    done = int(carry.step)
    pieces.append(Piece(means, counts, seconds, due))
    reading.check(done, carry.agent, pieces[-1])
    if budget is not None:
      was_acting = budget.acted is None
      budget.add(counts.get('decisions', 0.0))
      # A row also says where acting ended.
      continues = end() > done and (budget.acted is None) == was_acting
      if continues and done < halt:
        continue
    metrics, pieces = reading.summary(joined(pieces)), []
    if intervals.evaluate and done % intervals.evaluate == 0 and hooks.evaluate:
      metrics |= hooks.evaluate(done, carry.agent)
    if hooks.log is not None:
      hooks.log(done, metrics)
    if intervals.checkpoint and done % intervals.checkpoint == 0:
      carry = _save(source, carry, hooks)
      saved = done
  if pieces and hooks.log is not None:  # left within an interval
    hooks.log(done, reading.summary(joined(pieces)))
  if hooks.save is not None and saved != done:
    carry = _save(source, carry, hooks)
  return carry


def _save(source: Source, carry: Carry, hooks: Hooks) -> Carry:
  # Also if nothing is saved: the run is the same with and without.
  restarted = source.restart(carry.source, int(carry.step))
  carry = carry._replace(source=restarted)
  if hooks.save is not None:
    hooks.save(carry)
  return carry
