"""What the host does for an update of images, around an agent that does none.

The agent's functions are stubs, so what is left is the loop: taking a row from
simulators (stubs, too), drawing and stacking windows, feedback, publishing
parameters. It is measured with Atari's frames (Ye 2021: 96x96 RGB, stacks of 4)
and with frames of 2x2 pixels, which leave what the host does whatever a frame's
size; the rest is the copying of pixels, which with frames on an accelerator is
the accelerator's.
"""

from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from agents.core.types import Agent, ArraySpec, Discrete, Info, Spec
from experiments.benchmarks.cases import Case
from experiments.benchmarks.timing import Measurement, interleaved, once
from experiments.envs.host import EpisodeStats, HostEnvironment, Simulator
from experiments.runtime import host, loop, mesh, parts, replay, sources
from experiments.runtime import updates as compiled
from search.model import TimeStep

_STACK, _WINDOW, _LEAVES, _ACTIONS = 4, 11, 146, 6
# How a replay keeps its frames.
_KEPT = {
  'frames compressed on the host': {'compress': True},
  'frames on the host': {},
  'frames on the device': {'device': True},
}


class _State(NamedTuple):
  params: Any


def _environment(side: int, envs: int) -> HostEnvironment:
  """Frames of flat squares, which compress as those of games do."""
  rng = np.random.default_rng(0)
  square = min(side, 8)
  cells = rng.integers(0, 255, (64, *2 * (side // square,), 3), np.uint8)
  frames = cells.repeat(square, axis=1).repeat(square, axis=2)
  stacks = [
    np.concatenate(np.roll(frames, -i, axis=0)[:_STACK], -1) for i in range(64)
  ]

  def start(seed):
    del seed
    steps = 0

    def time_step():
      nonlocal steps
      steps += 1
      one, no = np.ones(envs, np.float32), np.zeros(envs, bool)
      seen = np.stack([stacks[steps % 64]] * envs)
      return TimeStep(seen, 0 * one, one, no | (steps == 1), no)

    def step(action):
      del action
      none = np.zeros(envs)
      stats = EpisodeStats(none.astype(bool), none, none.astype(int))
      return time_step(), stats

    return Simulator(time_step, step, lambda: None)

  seen = ArraySpec((side, side, 3 * _STACK), np.uint8)
  spec = Spec(seen, Discrete(_ACTIONS), frame_stack=_STACK, name='stub')
  return HostEnvironment(spec, envs, start)


def _agent() -> Agent:
  """As many arrays of parameters as EfficientZero's Atari network has."""

  def act(params, key, timestep):
    del params
    rows = timestep.reward.shape[0]
    action = jax.random.randint(key, (rows,), 0, _ACTIONS)
    policy = jnp.full((rows, _ACTIONS), 1 / _ACTIONS)
    return action, {'search_policy': policy, 'search_value': timestep.reward}

  def init(key):
    del key
    return _State([jnp.zeros((64, 64)) for _ in range(_LEAVES)])

  def update(state, batch, key):
    del key
    metrics = {f'metric_{i}': jnp.float32(i) for i in range(15)}
    params = [x + 1 for x in state.params]
    return _State(params), Info(metrics, jnp.abs(batch.sample.weight))

  def refresh(state, batch, step, key):
    del state, step, key
    return batch

  return Agent(init, act, update, refresh)


class _Loop:
  """A run that goes on for some updates at each call."""

  def __init__(self, side: int, kept: dict[str, Any], case: Case, envs: int):
    self._agent, self._number = _agent(), case.updates
    if 'device' in kept:
      kept = {'device': jax.local_devices()[0]}
    env = _environment(side, envs)
    inner = host.from_host(env, self._agent, publish_every=100)
    memory = replay.host_replay(case.rows, case.batch, _WINDOW, _STACK, **kept)
    pace = sources.Pace(envs, case.rows // 2, Fraction(1))
    source = sources.replayed(inner, memory, pace, total_updates=10**6)
    own = mesh.make_mesh(jax.local_devices()[:1])
    source = parts.hosted([source], 1, own, case.batch)
    self._source = sources.reanalyzed(source, self._agent)
    self._update = compiled.compiled(self._agent)
    self._key = jax.random.key(0)
    self._carry = loop.init(self._agent, self._source, self._key)
    self()

  def __call__(self) -> None:
    self._carry = loop.run(
      self._agent,
      self._source,
      self._carry,
      key=self._key,
      steps=int(self._carry.step) + self._number,
      intervals=loop.Intervals(log=10**6),
      update=self._update,
    )
    jax.block_until_ready(self._carry.agent)

  def close(self) -> None:
    self._source.close(self._carry.source)


def frames_rows(case: Case, envs: int = 4) -> Iterator[list[Measurement]]:
  """CPU milliseconds an update, a list for each way to keep frames."""
  for name, kept in _KEPT.items():
    rows = []
    for side in (96, 2):
      run = _Loop(side, kept, case, envs)
      try:
        timing = interleaved({name: run}, case.repeats)[name]
      finally:
        run.close()
      spent = 1e3 * np.asarray(timing.cpu) / case.updates
      row = once(
        'frames',
        name,
        f'{side}x{side} E={envs} batch={case.batch} window={_WINDOW}',
        'CPU ms an update, all threads',
        float(np.median(spent)),
      )
      rows.append(row._replace(low=float(spent.min()), high=float(spent.max())))
    yield rows
