"""A tiny run that is broken in many ways, for `test_faults`.

`python faults_run.py FOLDER FAULT...` prints one line of JSON for each fault:
how the broken run ended, how the same run began again, and its final numbers.
One process forks them all, so that JAX is imported once.
"""

import json
import os
import pathlib
import resource
import signal
import sys
import warnings
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from agents.core.types import Agent, ArraySpec, Discrete, Info, Spec
from experiments.envs.host import EpisodeStats, HostEnvironment, Simulator
from experiments.runtime import (
  checkpoint,
  host,
  integrity,
  loop,
  orbax_arrays,
  sources,
)
from experiments.runtime import config as configs
from experiments.runtime.loop import Carry, Hooks, Intervals
from experiments.runtime.replay import host_replay
from search.model import TimeStep

UPDATES, EVERY, E, LENGTH = 12, 4, 2, 3


class State(NamedTuple):
  """Parameters that every number of a batch goes into."""

  params: Any
  noise: Any


def make_env(fail_at: int | None = None) -> HostEnvironment:
  """Episodes of `LENGTH` decisions; raises at a step of the simulators."""
  spec = Spec(ArraySpec((1,), np.float32), Discrete(100))
  steps = 0

  def start(seed):
    t = 0

    def time_step(reward):
      return TimeStep(
        observation=np.full((E, 1), seed % 1000 + t, np.float32),
        reward=np.full(E, reward, np.float32),
        discount=np.full(E, float(t < LENGTH), np.float32),
        is_first=np.full(E, t == 0),
        truncated=np.zeros(E, bool),
      )

    def step(action):
      nonlocal t, steps
      steps += 1
      if steps == fail_at:
        raise RuntimeError('the simulator broke')
      t = 0 if t == LENGTH else t + 1
      over = np.full(E, t == LENGTH)
      return time_step(action[0] / 7), EpisodeStats(over, over * 1.0, over * 3)

    return Simulator(lambda: time_step(0), step, lambda: None)

  return HostEnvironment(spec, E, start)


def make_agent() -> Agent:
  """Moves its parameters by what it is handed; big enough to be a file."""

  def act(params, key, timestep):
    drawn = jax.random.randint(key, timestep.reward.shape, 0, 50)
    return drawn + jnp.int32(params[0]) % 50, {}

  def init(key):
    # Incompressible.
    return State(jnp.zeros(4), jax.random.uniform(key, (1 << 14,)))

  def update(state, batch, key):
    seen = batch.experience.timestep
    parts = (seen.reward, seen.observation, batch.sample.weight)
    total = sum(jnp.sum(x) for x in parts) + jax.random.uniform(key)
    priorities = 1 + jnp.abs(seen.reward[:, 0])
    params = state.params * 0.9 + total / 1000
    noise = state.noise.at[0].add(1)  # counts
    return State(params, noise), Info({'loss': total}, priorities)

  return Agent(init, act, update)


def run(folder: pathlib.Path, fault: str = '') -> tuple[int, Carry]:
  """Trains to the end; returns the update that it began at."""
  agent, env = make_agent(), make_env(10 if fault == 'environment' else None)
  if fault == 'loss':
    agent = agent._replace(update=_spoil(agent.update))
  source = sources.replayed(
    host.from_host(env, agent, mode='synchronous'),
    host_replay(40, 4, 2),
    sources.Pace(E, 8, Fraction(2)),
    total_updates=UPDATES,
  )
  key = jax.random.key(3)
  kept = checkpoint.open(folder / 'checkpoints')
  carry, begin = loop.init(agent, source, key), 0
  found = kept.peek()
  if found is not None:
    template = carry._replace(source=source.kept.template())
    carry, extra = kept.restore(template)
    state = source.kept.load(
      carry.source, extra['source'], folder / 'replay', loop.source_key(key)
    )
    carry, begin = carry._replace(source=state), int(carry.step)

  def save(carry):
    step = int(carry.step)
    if step == 2 * EVERY and fault:
      kept.wait()
      _arm(fault)
    newest = kept.latest_step()
    with integrity.saving(step, folder / 'replay', newest):
      arrays, facts = source.kept.save(carry.source, folder / 'replay', step)
    if step == 2 * EVERY and fault == 'after the rows':
      _die()
    kept.save(step, carry._replace(source=arrays), {'source': facts})
    if step == 2 * EVERY and fault == 'while writing':
      _die()

  try:
    carry = loop.run(
      agent, source, carry, key=key, steps=UPDATES,
      intervals=Intervals(log=3, checkpoint=EVERY), hooks=Hooks(save=save),
    )  # fmt: skip
  finally:
    kept.close()
  return begin, carry


def _die(*_):
  os.kill(os.getpid(), signal.SIGKILL)


def _spoil(update):
  """Its 9th loss is NaN, and the parameters are not."""

  def spoilt(state, batch, key):
    new, info = update(state, batch, key)
    loss = jnp.where(state.noise[0] > 8, jnp.nan, info.metrics['loss'])
    return new, info._replace(metrics={'loss': loss})

  return spoilt


def _arm(fault: str) -> None:
  """Breaks what comes next."""
  if fault == 'before the rows':
    os.replace = _die  # of the segment's temporary file
  if fault == 'before the renaming':
    integrity.seal = _die  # all is written but the sums
  if fault == 'no room for arrays':
    # Each has its own files, as of several processes; when the first fails,
    # tensorstore is still writing others.
    orbax_arrays._SMALL = -1
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14,) * 2)
  if fault == 'no room for rows':
    resource.setrlimit(resource.RLIMIT_FSIZE, (100,) * 2)


def _numbers(carry: Carry) -> list[float]:
  kept = carry.source.replay
  arrays = (carry.agent.params, carry.agent.noise[:3], kept.priority[:3])
  flat = [np.asarray(x, np.float64).ravel() for x in arrays]
  return [*np.concatenate(flat).tolist(), float(kept.count)]


def _forked(folder: pathlib.Path, fault: str) -> tuple[int, str, Any]:
  """Exit status, what was written on stderr, and the result of one run."""
  result = folder / 'result.json'
  reader, writer = os.pipe()  # a file would have no room either
  pid = os.fork()
  if not pid:
    os.dup2(writer, 2)
    os._exit(_child(folder, fault, result))
  os.close(writer)
  with os.fdopen(reader) as file:
    errors = file.read()
  status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
  done = json.loads(result.read_text()) if result.exists() else None
  return status, errors, done


def _child(folder: pathlib.Path, fault: str, result: pathlib.Path) -> int:
  try:
    begin, carry = run(folder, fault)
    result.write_text(json.dumps([begin, _numbers(carry)]))
  except configs.UserError as error:
    try:
      configs.fail(str(error))
    except SystemExit as stop:
      return int(stop.code or 0)
  except BaseException:
    sys.excepthook(*sys.exc_info())  # as Python does at the end
    return 1
  return 0


def main() -> None:
  root = pathlib.Path(sys.argv[1])
  for fault in sys.argv[2:]:
    folder = root / fault.replace(' ', '_')
    folder.mkdir()
    status, errors, _ = _forked(folder, fault)
    steps = sorted(
      int(p.name) for p in (folder / 'checkpoints').glob('*') if
      p.name.isdigit()
    )  # fmt: skip
    again = _forked(folder, '')
    print(
      json.dumps(
        {
          'fault': fault,
          'status': status,
          'errors': errors,
          'steps': steps,
          'again': again,
        }
      ),
      flush=True,
    )


if __name__ == '__main__':
  warnings.simplefilter('ignore')  # of the forks
  main()
