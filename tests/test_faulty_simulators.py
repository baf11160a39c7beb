"""Users' environments that break Gymnasium's interface, at once or in mid-run.

Each fault is one line that names the environment, the call and what came
back, in the main thread and in an actor's; nothing hangs.
"""

import pathlib
import threading

import gymnasium
import jax
import numpy as np
import pytest
from gymnasium import spaces

from agents import muzero, sac
from agents.core import planning
from experiments.envs.contract import SimulatorError
from experiments.envs.gymnasium import make_gymnasium
from experiments.runtime import config as configs
from experiments.runtime import host
from networks.muzero import NetworkConfig

LATE = 30  # Calls that go well before a late fault.


class Line(gymnasium.Env):
  """Walks for six steps; what it returns passes through `spoil`."""

  observation_space: spaces.Space = spaces.Box(-10, 10, (3,), np.float32)
  action_space: spaces.Space = spaces.Discrete(2)

  def __init__(self, spoil, budget):
    self.spoil, self.budget = spoil, budget

  def answer(self, call, result):
    self.budget[0] -= 1
    return self.spoil(call, result) if self.budget[0] < 0 else result

  def reset(self, *, seed=None, options=None):
    super().reset(seed=seed)
    self.t = 0
    return self.answer('reset', (np.zeros(3, np.float32), {}))

  def step(self, action):
    self.t += 1
    observation = np.full(3, self.t, np.float32)
    row = observation, 1.0, False, self.t == 6, {}
    return self.answer('step', row)


class Reaches(Line):
  """With actions that SAC takes."""

  action_space = spaces.Box(-1, 1, (1,), np.float32)


def at(index, value):
  """Puts a value into what `step` returns; index 0 of a reset's, too."""

  def spoil(call, row):
    if call == 'reset' and index != 0:
      return row
    return (*row[:index], value, *row[index + 1 :])

  return spoil


def raises(error):
  def spoil(call, row):
    raise error

  return spoil


def old_api(call, row):
  if call == 'reset':
    return row[0]
  observation, reward, ended, cut, info = row
  return observation, reward, ended or cut, info


three = lambda *x: np.array(x, np.float64)
FAULTS = {
  'old interface': (old_api, 'returned .*; (reset|step)'),
  'none': (lambda call, row: None, 'returned None; (reset|step)'),
  'observation of four': (at(0, np.zeros(4)), r'shape \(4,\); must be \(3,\)'),
  'scalar observation': (at(0, 1.0), r'shape \(\); must be \(3,\)'),
  'no observation': (at(0, None), 'returned None as observation; must hold'),
  'text observation': (at(0, 'left'), "returned 'left' as observation"),
  'ragged observation': (at(0, [[1], [1, 2]]), 'list of 2 values'),
  'nan observation': (at(0, three(0, np.nan, 0)), r'nan at \[1\]; must be fin'),
  'inf observation': (at(0, three(0, 0, -np.inf)), r'-inf at \[2\]; must be'),
  'huge observation': (at(0, three(1e300, 0, 0)), r'1e\+300 at \[0\]; must'),
  'nan reward': (at(1, np.nan), 'returned the reward nan; must be finite'),
  'huge reward': (at(1, 1e300), r'the reward 1e\+300; must be finite'),
  'no reward': (at(1, None), 'returned None as reward; must'),
  'text reward': (at(1, '1.0'), "returned '1.0' as reward; must hold numbers"),
  'two rewards': (at(1, np.ones(2)), r'float64 \(2,\) as reward; must be one'),
  'complex reward': (at(1, 1j), 'returned complex as reward; must hold'),
  'no end': (at(2, None), 'returned None as terminated; must'),
  'three as an end': (at(2, 3), 'returned 3 as terminated; must be True or'),
  'two truncations': (at(3, np.zeros(2, bool)), 'as truncated; must be True'),
  'no info': (at(4, None), 'returned None as info; must be a dict'),
  'exception': (raises(OSError('lost')), 'raised OSError: lost; OUTPLAY_TRAC'),
  'exit': (raises(SystemExit(3)), 'raised SystemExit: 3; OUTPLAY_TRACEBACK'),
  'assertion': (raises(AssertionError()), 'raised AssertionError'),
}


@pytest.fixture(scope='module')
def agents():
  """A tiny agent and its parameters for each kind of environment."""
  found = {}
  network = NetworkConfig(
    torso='vector',
    latent_size=8,
    blocks=0,
    norm='layer',
    head_hidden=(8,),
    value_bins=5,
    reward_bins=5,
  )
  search = planning.SearchConfig(rule='gumbel', num_simulations=2)
  for kind, module, config in (
    (Reaches, sac, sac.Config(hidden_sizes=(8,))),
    (Line, muzero, muzero.Config(network=network, search=search)),
  ):
    spec = simulator(kind, None, 10**9).spec
    networks = module.make_networks(config, spec)
    agent = module.make(config, networks, module.make_losses(), spec)
    found[kind] = agent, jax.jit(agent.init)(jax.random.key(0))
  return found


def simulator(kind, spoil, budget):
  """Two copies that share what goes well before the fault."""
  left = [budget]
  return make_gymnasium(lambda: kind(spoil, left), 2)


def play(env, agent, state, mode):
  """Takes rows until the simulator fails; far more than it takes to fail."""
  source = host.from_host(env, agent, mode=mode)
  stream = source.init(jax.random.key(1))
  try:
    for step in range(4 * LATE):
      key = jax.random.key(step)
      stream, _, _ = source.next(stream, state, step, key)
  finally:
    source.close(stream)


@pytest.mark.parametrize('kind', [Line, Reaches], ids=['muzero', 'sac'])
@pytest.mark.parametrize('name', FAULTS)
def test_a_fault_in_mid_run_is_one_line(kind, name, agents):
  spoil, what = FAULTS[name]
  before = threading.active_count()
  for mode in ('synchronous', 'asynchronous'):
    env = simulator(kind, spoil, LATE)
    with pytest.raises(SimulatorError, match=what) as caught:
      play(env, *agents[kind], mode)
    line = str(caught.value)
    assert line.startswith('env=simulator.<locals>.<lambda>: '), line
    assert '\n' not in line
  assert threading.active_count() == before


@pytest.mark.parametrize('name', FAULTS)
def test_a_fault_at_once_is_found_before_anything_is_compiled(name):
  spoil, what = FAULTS[name]
  with pytest.raises(SimulatorError, match=what):
    simulator(Line, spoil, 0)


@pytest.mark.parametrize('kind', [Line, Reaches])
@pytest.mark.parametrize(
  'spoil',
  [
    at(1, np.ones(1)),
    at(1, np.float64(1)),
    at(1, True),
    at(2, np.zeros((1,), bool)),
    at(3, 0),
    at(0, [0, 1, 2]),
    at(0, np.zeros(3, bool)),
    lambda call, row: list(row),
  ],
)
def test_what_is_no_fault_runs(kind, spoil):
  running = simulator(kind, spoil, 0).start(0)
  running.reset()
  for _ in range(9):
    action = running.reset().reward.astype(int)
    action = action if kind is Line else np.zeros((2, 1), np.float32)
    timestep, _ = running.step(action)
    assert timestep.observation.dtype == np.float32
    assert timestep.reward.tolist() in ([1, 1], [0, 0])


def fails(match, make):
  with pytest.raises(ValueError, match=match) as caught:
    make_gymnasium(make, 1)
  assert '\n' not in str(caught.value)


def test_what_cannot_be_made_is_one_line():
  class Needs(Line):
    def __init__(self, size):
      pass

  class NoSpace(gymnasium.Env):
    pass

  class OddSpace(Line):
    observation_space = (3,)

  class Unseeded(Line):
    def reset(self):
      return np.zeros(3, np.float32), {}

  fails(r"making it raised TypeError: .*argument: 'size'", Needs)
  fails('its observation_space raised AttributeError', NoSpace)
  odd = lambda: OddSpace(None, [9])
  fails('observation_space is tuple of 1 values; must be a space of', odd)
  unseeded = lambda: Unseeded(None, [9])
  fails(r"argument 'seed'; reset\(\*, seed=None, options=None\)", unseeded)
  reads = lambda: pathlib.Path('x.xml').read_text()
  fails("FileNotFoundError: .*'x.xml'; OUTPLAY_TRACEBACK=1 shows where", reads)


def test_modules_and_ids_that_are_not_there_are_one_line(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(tmp_path)
  (tmp_path / 'brokenmodule.py').write_text('def f(:\n')
  (tmp_path / 'emptymodule.py').write_text('')
  fails("No module named 'nosuch'; its folder must be in PYTHON", 'nosuch:X-v0')
  fails('importing brokenmodule raised SyntaxError', 'brokenmodule:X-v0')
  fails("env='gymnasium:emptymodule:X-v0': .*doesn't exist", 'emptymodule:X-v0')


def test_an_image_is_not_wrapped_or_cut():
  class Image(Line):
    observation_space = spaces.Box(0, 255, (4, 4, 3), np.uint8)
    value = np.zeros((4, 4, 3))

    def reset(self, *, seed=None, options=None):
      return self.value, {}

  class Integers(Image):
    value = np.full((4, 4, 3), 256)

  fails('observation of float64; must be uint8', lambda: Image(None, [9]))
  fails(r'from 256 to 256; must be in \[0, 255\]', lambda: Integers(None, [9]))


def test_parts_of_an_observation_are_named():
  class Parts(Line):
    observation_space = spaces.Dict(a=spaces.Discrete(3), b=spaces.Box(0, 1))
    value: object = None

    def reset(self, *, seed=None, options=None):
      return self.value, {}

  for value, what in (
    ({'a': 1}, "returned dict as observation; must be a dict with 'b'"),
    ({'a': 3, 'b': [0.0]}, r"3 as observation\['a'\]; .* from 0 to 2"),
    ({'a': 1, 'b': [np.nan]}, r"observation\['b'\] with nan at \[0\]"),
  ):
    parts = type('Parts', (Parts,), {'value': value})
    fails(what, lambda parts=parts: parts(None, [9]))


def test_an_observation_may_be_written_to_again():
  class Reuses(Line):
    shared = np.zeros(3, np.float32)

    def step(self, action):
      _, *rest = super().step(action)
      self.shared += 1
      return (self.shared, *rest)

  running = make_gymnasium(lambda: Reuses(None, [9**9]), 2).start(0)
  running.reset()
  before = float(Reuses.shared[0])
  first, _ = running.step(np.zeros(2, int))
  running.step(np.zeros(2, int))
  np.testing.assert_array_equal(
    first.observation[:, 0], [before + 1, before + 2]
  )


def test_far_outside_of_its_space_is_said_once(capsys):
  outside = at(0, np.full(3, 1e6, np.float32))
  running = simulator(Line, outside, LATE).start(0)
  running.reset()
  for _ in range(LATE):
    running.step(np.zeros(2, int))
  notes = capsys.readouterr().err
  assert notes.count('1e+06 is outside [-10, 10]') == 1


def test_what_fails_to_close_hides_nothing(capsys, agents):
  class Stays(Line):
    def close(self):
      raise RuntimeError('still busy')

  left = [LATE]
  env = make_gymnasium(lambda: Stays(raises(OSError('lost')), left), 2)
  with pytest.raises(SimulatorError, match='raised OSError: lost'):
    play(env, *agents[Line], 'asynchronous')
  assert 'close() raised RuntimeError: still busy' in capsys.readouterr().err


def test_the_traceback_is_shown_on_request(capsys, monkeypatch):
  for asked in ('', '1'):
    monkeypatch.setenv('OUTPLAY_TRACEBACK', asked)
    with pytest.raises(SystemExit) as left, configs.user_errors():
      try:
        simulator(Line, raises(OSError('lost')), 0)
      except SimulatorError as error:
        configs.fail(str(error), error.__cause__)
    assert left.value.code == 2
    shown = capsys.readouterr().err.splitlines()
    assert shown[0].startswith('error: env=')
    assert ('raise error' in ''.join(shown)) == bool(asked)
    assert asked or len(shown) == 1
