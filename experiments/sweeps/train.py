"""Trains the rows of a program, by the one loop."""

import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any

from experiments import build
from experiments.build import environment
from experiments.sweeps import kept, program
from experiments.sweeps.kept import Point
from experiments.sweeps.program import Program


def run(
  what: Program,
  folder: pathlib.Path,
  *,
  mesh: Any,
  checkpoint_seconds: float = 300.0,
  stopping: Callable[[], bool] = lambda: False,
  report: Callable[[int, dict[str, float]], None] = lambda step, row: None,
) -> list[Point] | None:
  """Trains all rows, from the folder's checkpoint if there is one.

  It halts where `experiments.train` would, to log and to evaluate, and at the
  end, where it always evaluates. Rows share their updates: if they end by
  decisions, all continue until the row with the fewest has taken them;
  `decisions` says how many each one took. A row that diverges continues as NaN.

  `stopping` is polled at every halt: True saves and leaves; `report` is `(step,
  means over rows)`. Returns the curves, None if stopped before the end.
  """
  import numpy as np

  from experiments.runtime import checkpoint

  count = len(what.seeds)
  # Rows are repeated to fill the devices.
  spread = np.arange(-(-count // mesh.size) * mesh.size) % count
  values = np.asarray(what.values, np.float32).reshape(count, -1)[spread]
  seeds = np.asarray(what.seeds, np.uint32)[spread]
  functions = program.row_functions(what.experiment, what.paths)
  phases = [program.compiled(f, mesh) for f in functions]
  keeper = checkpoint.open(folder / 'checkpoints', run=kept.identity(what))
  try:
    rows = _Rows(what, phases, values, seeds, keeper)
    found = kept.restore(keeper, phases, values, seeds, count, mesh)
    carry, rows.points, rows.number = found or (
      phases[0].init(values, seeds, phases[0].load()),
      [],
      0,
    )
    rows.train(carry, kept.acted(keeper), checkpoint_seconds, stopping, report)
  finally:
    keeper.close()
  return None if rows.left else rows.points


class _Rows:
  """The state of the loop's hooks."""

  def __init__(self, what, phases, values, seeds, keeper):
    self._experiment, self._count = what.experiment, len(what.seeds)
    self._phases, self._values, self._seeds = phases, values, seeds
    self._keeper, self._budget = keeper, what.experiment.budget
    self.points: list[Point] = []
    self.number, self.left = 0, False
    self._finite: Any = None

  def train(self, carry, acted, seconds, stopping, report) -> None:
    """Trains the phases that are left."""
    from experiments.runtime import loop

    settings, budget = self._experiment.run, self._budget
    if budget is not None:
      budget.acted = acted
      if self.points:
        budget.taken = self.points[-1].metrics['decisions']
    self._report, self._stopping = report, stopping
    self._seconds, self._saved = seconds, time.monotonic()
    every = settings.log_every or settings.evaluate_every
    agent: Any = None  # The compiled intervals have theirs.
    run = functools.partial(
      loop.run,
      agent,
      key=self._seeds,
      # `_save` decides by time whether to save there.
      intervals=loop.Intervals(
        settings.log_every, every, settings.evaluate_every
      ),
      hooks=loop.Hooks(
        self._log, self._save, self._evaluate, lambda step: self.left
      ),
      budget=budget,
      reading=loop.Reading(
        lambda step, agent_state, piece: None, self._summary
      ),
    )
    first = self.number
    for number, phase in enumerate(self._phases[first:], first):
      if number > first:
        self.number = number
        before = self._phases[number - 1].axes.source
        shared = kept.shared_part(before, carry.source)
        assert phase.enter is not None
        carry = phase.enter(self._values, carry._replace(source=None), shared)
      carry = run(
        _source(phase),
        carry,
        steps=None if budget else phase.end,
        interval=self._interval(phase),
      )
      if self.left:
        return
    self._end(carry)

  def _interval(self, phase):
    """`loop.compile_interval` of all rows, without the repeated ones."""
    import jax
    import numpy as np

    def interval(carry, seeds, num_steps):
      carry, *measured = phase.interval(
        self._values, carry, seeds, np.int32(num_steps)
      )
      own = lambda tree: {n: x[: self._count] for n, x in tree.items()}
      return carry, *map(own, jax.device_get(measured))

    return interval

  def _is_over(self, step) -> bool:
    if self._budget is not None:
      return self._budget.stop(step) == step
    return step == self._phases[-1].end

  def _summary(self, piece) -> dict[str, Any]:
    metrics = _measured(piece.means, piece.counts)
    self._finite = metrics['finite'] > 0
    return metrics

  def _evaluate(self, step, agent_state) -> dict[str, Any]:
    """Metrics of all rows' evaluation, NaN for rows that diverged."""
    import jax
    import numpy as np

    measure = self._phases[self.number].measure
    if measure is None:
      return {}
    params = agent_state.params
    if measure.evaluate is not None:
      found = measure.evaluate(
        self._values, params, self._seeds, np.int32(step)
      )
      found = jax.device_get(found)
    else:
      found = on_host(self._experiment, measure.act, self._values, params, step)
    own = jax.tree.map(lambda x: np.asarray(x)[: self._count], found)
    return {
      name: np.where(self._finite, column, np.nan)
      for name, column in measure.summarise(own).items()
    }

  def _is_evaluated(self, step) -> bool:
    every = self._experiment.run.evaluate_every
    return bool(every) and step % every == 0

  def _log(self, step, metrics) -> None:
    if self.points and 'decisions' in metrics:
      before = self.points[-1].metrics['decisions']
      metrics['decisions'] = metrics['decisions'] + before
    self.points.append(Point(step, metrics))
    if self._is_evaluated(step) or not self._is_over(step):
      self._report(step, _means(metrics))

  def _save(self, carry) -> None:
    step = int(carry.step)
    if self._is_over(step):
      return
    self.left = self._stopping()
    if self.left or time.monotonic() - self._saved >= self._seconds:
      axes = self._phases[self.number].axes
      acted = self._budget and self._budget.acted
      kept.save(
        self._keeper, axes, carry, self.points, self._count, self.number, acted
      )
      self._saved = time.monotonic()

  def _end(self, carry) -> None:
    step, metrics = self.points[-1]
    if not self._is_evaluated(step):
      self._finite = metrics['finite'] > 0
      metrics |= self._evaluate(step, carry.agent)
      self._report(step, _means(metrics))


def _source(phase):
  """What the loop sees of a phase whose intervals are compiled."""
  from experiments.runtime import sources

  return sources.Source(
    phase.init,
    phase.interval,
    sources.no_feedback,
    lambda: None,
    is_pure=True,
    rest=phase.rest,
  )


def on_host(experiment, act, values, params, step):
  """What `Measure.evaluate` returns, on host simulators of all rows.

  `act` is compiled over the rows, with values float `[R, F]` and params of
  leaves `[R, ...]`; `step` seeds the simulators.
  """
  import jax
  import numpy as np

  from agents.core.types import Continuous
  from experiments.envs.host import HostEnvironment, side_by_side
  from experiments.runtime import evaluate as playing

  rows, episodes = len(values), experiment.run.evaluate_episodes
  # This fixes the number of episodes and which copy plays which.
  at_once = min(episodes, environment.AT_ONCE)
  env = build.make_env(experiment, training=False, num_envs=at_once)
  assert isinstance(env, HostEnvironment)
  # As `experiments.train` does, every row meets the same episodes.
  env = side_by_side(env, rows)
  kind = env.spec.action
  assert isinstance(kind, Continuous)
  shaped = lambda x: np.asarray(x).reshape(rows, -1, *x.shape[1:])
  # Without a search there is only one player.
  chosen = lambda key, timestep: act(
    values, params, key, jax.tree.map(shaped, timestep)
  )

  diverged = np.zeros((rows, at_once), bool)

  def play(params, key, timestep):
    del params
    (action,) = (np.asarray(a) for a in chosen(key, timestep).values())
    finite = np.isfinite(action)
    diverged[:] |= ~finite.all(tuple(range(2, action.ndim)))
    # Simulators would refuse NaNs, and with them the rows that are finite.
    action = np.where(finite, action, kind.low[None, None])
    return action.reshape(-1, *action.shape[2:])

  played = playing.on_host(
    env,
    play,
    params,
    key=jax.random.key(step),
    num_episodes=rows * episodes,
    seed=step,
    **environment.limit(experiment),
  )
  returns = shaped(played.returns)
  bad = np.repeat(diverged, returns.shape[1] // at_once, axis=1)
  returns = np.where(bad, np.nan, returns)
  return {'eval': (returns, shaped(played.lengths))}


def _measured(means, counts) -> dict[str, Any]:
  import numpy as np

  counts = dict(counts)
  finite = np.all([np.isfinite(x) for x in means.values()], axis=0)
  if 'episodes' in counts:
    # NaN where no episode has ended.
    ended = np.where(counts['episodes'] > 0, counts['episodes'], np.nan)
    counts['episodes'] = ended
    for name in ('return', 'length'):
      if f'{name}_sum' in counts:
        means[f'episode_{name}'] = counts.pop(f'{name}_sum') / ended
  return means | counts | {'finite': finite.astype(np.float32)}


def _means(metrics) -> dict[str, float]:
  import numpy as np

  known = {n: x[np.isfinite(x)] for n, x in metrics.items()}
  return {n: float(np.mean(x)) for n, x in known.items() if len(x)}
