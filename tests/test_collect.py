"""Collecting: what is a transition, what is kept, what is not made again."""

import dataclasses
import importlib.util
import itertools
import json
import shutil

import jax
import launching
import numpy as np
import pytest
from launching import refused

from agents import sac
from experiments import build
from experiments.data import layout, minari_files, npz
from experiments.envs import envpool
from experiments.files.errors import UserError
from experiments.training import behaviour, collect, collector

STEPS = 5  # of an episode
QUICK = collect.Collection(
  num_envs=2,
  warmup=20,
  batch_size=4,
  evaluate_every=20,
  evaluate_episodes=2,
  reference_episodes=2,
)
HAS_HDF5 = importlib.util.find_spec('h5py') is not None
# Fast enough for half-trained and trained policies to differ.
TINY = sac.Config(hidden_sizes=(4,), policy_rate=3e-2)


@pytest.fixture(scope='module')
def env():
  return envpool.make_envpool('Pendulum-v1', 3, max_episode_steps=STEPS)


def history_of(env, calls, seed=0):
  """What uniform actions make, and the time steps that were shown."""
  simulator = env.start(seed)
  explore = collector.uniform(env.spec, env.num_envs, seed)
  shown = []

  def choose(rows, timestep):
    shown.append((rows, timestep))
    return explore()

  stream = collector.transitions(simulator, env.spec, choose)
  history = list(itertools.islice(stream, calls))
  simulator.close()
  return history, shown


def test_dummy_steps_are_no_transitions(env):
  history, shown = history_of(env, 14)
  # An episode has five decisions and a step that begins the next one.
  valid = [rows.valid.tolist() for rows in history]
  assert valid == [[(i + 1) % (STEPS + 1) != 0] * 3 for i in range(14)]
  for i, rows in enumerate(history):
    if rows.valid.all():
      assert rows.truncated.tolist() == [i % (STEPS + 1) == STEPS - 1] * 3
      assert not rows.terminated.any()
      # Pendulum's reward, from what the row itself holds.
      cosine, sine, speed = rows.observation.T
      angle = np.arctan2(sine, cosine)
      cost = angle**2 + 0.1 * speed**2 + 0.001 * rows.action[:, 0] ** 2
      np.testing.assert_allclose(rows.reward, -cost, rtol=1e-4, atol=1e-5)
  # The chooser sees the rows before, and the time step that it acts on.
  assert shown[0][0] is None
  for before, (rows, timestep) in zip(history, shown[1:]):
    assert rows is before
    np.testing.assert_array_equal(timestep.observation, before.next_observation)


def test_actions_are_stored_within_their_bounds(env):
  simulator = env.start(0)
  beyond = np.nextafter(np.float32(2), np.float32(3))
  choose = lambda rows, timestep: np.full((3, 1), beyond)
  rows = next(collector.transitions(simulator, env.spec, choose))
  simulator.close()
  assert rows.action.dtype == np.float32
  assert rows.action.tolist() == [[2.0]] * 3


def test_an_episode_that_was_cut_short_is_not_joined_to_the_next(env):
  history, _ = history_of(env, 4)
  # Simulator 1 began afresh in the third step, in the midst of an episode.
  history[2] = history[2]._replace(valid=np.array([True, False, True]))
  about = layout.About('x', '', np.float32([-2]), np.float32([2]))
  data = collector.by_episode(history, about)
  layout.check(data, 'cut')
  assert np.bincount(data.episode).tolist() == [4, 2, 1, 4]
  assert len(layout.returns(data)) == 0


def test_each_simulator_gives_whole_episodes_and_an_equal_share(env):
  reported = []
  explore = collector.uniform(env.spec, 3, 0)
  history = collector.gather(
    env, explore, num=20, seed=1, report=reported.append
  )
  # A share is 7, and episodes are of 5: two of each simulator.
  assert sum(rows.valid.sum() for rows in history) == 30
  about = layout.About('x', '', np.float32([-2]), np.float32([2]))
  data = collector.by_episode(history, about)
  layout.check(data, 'gathered')
  assert np.bincount(data.episode).tolist() == [STEPS] * 6
  assert layout.is_finished(data)
  # The end is told once.
  assert reported == sorted(reported)
  assert [x for x in reported if x == 20] == [20]
  # One simulator behind the other, each in its own order.
  streams = [[r.reward[e] for r in history if r.valid[e]] for e in range(3)]
  np.testing.assert_array_equal(data.reward, np.concatenate(streams))
  chained = np.diff(data.episode) == 0
  np.testing.assert_array_equal(
    data.next_observation[:-1][chained], data.observation[1:][chained]
  )
  first = collector.first_rows(data, 12)
  layout.check(first, 'first')
  assert len(first.reward) == 12 and not layout.is_finished(first)
  assert len(layout.returns(first)) == 2


def test_open_episodes_are_cut(env):
  history, _ = history_of(env, 3)
  about = layout.About('x', '', np.float32([-2]), np.float32([2]))
  data = collector.by_episode(history, about)
  layout.check(data, 'cut')
  assert data.truncated.tolist() == [False, False, True] * 2 + [False] * 3
  # None of the three is a whole episode: two are cut, one is open.
  assert data.about.extra['cut_episodes'] == [0, 1]
  assert len(layout.returns(data)) == 0


def evaluations(*returns):
  return [
    behaviour.Evaluation(100 * i, value, None, i)
    for i, value in enumerate(returns)
  ]


def test_medium_is_nearest_to_a_third_of_the_way():
  found = evaluations(-100, 0, 80, 20, 100)
  choose = lambda share: collect.choose_medium(found, -100, 200, share)
  assert choose(1 / 3).decisions == 100
  assert choose(0.45).decisions == 300
  for few, low in (([], 0), (found, 200)):
    with pytest.raises(ValueError, match='steps: too few for medium'):
      collect.choose_medium(few, low, 200, 1 / 3)


def test_no_two_purposes_share_a_seed():
  seeds = {
    collect.stream_seed(seed, what, number)
    for seed in range(3)
    for what in ('train', 'evaluate', 'reference', *collect.QUALITIES)
    for number in range(4)
  }
  assert len(seeds) == 3 * 8 * 4


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'warmup': 0}, 'warmup=0: must be at least 1'),
    ({'updates': 0.3}, 'updates=0.3: times num_envs=8'),
    ({'updates': 0}, 'updates=0: times'),
    ({'medium_share': 1.0}, 'medium_share=1.0: must be between'),
  ],
)
def test_settings_out_of_range_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    collect.Collection(**fields)


@pytest.fixture(scope='module')
def referee():
  """Returns in a certain order: -1000 at random, then -900, -800, ...

  The expert without noise has -400.
  """

  def play(name, collection, act, params, episodes, seed):
    number = seed % 10**6
    if params is None:
      return -1000.0
    return 100.0 * number - 1000.0 if number else -400.0

  return play


def test_options_go_with_the_data(collected, tmp_path, referee, monkeypatch):
  held = dataclasses.replace(QUICK, options=('action_repeat=8',))
  env = collector.simulators('Pendulum-v1', 2, held.options)
  simulator = env.start(0)
  simulator.reset()
  still = np.zeros((2, 1), np.float32)
  cut = [simulator.step(still)[0].truncated.all() for _ in range(25)]
  simulator.close()
  assert cut == 24 * [False] + [True]  # 200 of the simulator's steps
  monkeypatch.setattr(collect, '_play', referee)
  launch(tmp_path / 'held', collection=held, transitions=60)
  kept = npz.load(tmp_path / 'held' / 'random')
  assert kept.about.extra['options'] == ['action_repeat=8']
  # Two episodes of 25 decisions, and a third that is cut.
  assert np.bincount(kept.episode).tolist()[:2] == [25, 25]

  def options(name, env=None, settings=()):
    experiment = build.describe(
      'bc_small', dataset=str(name), env=env, settings=settings
    )
    return experiment.env.options

  assert options(tmp_path / 'held' / 'random') == ('action_repeat=8',)
  own = ('env.options=action_repeat=2',)
  assert options(tmp_path / 'held' / 'random', settings=own) == (
    'action_repeat=2',
  )
  assert options(tmp_path / 'held' / 'random', env='jax:pendulum') == ()
  assert options(collected / 'random') == ()


def launch(out, **changes):
  settings = {'steps': 100, 'transitions': 410, 'seed': 0, 'minari': False}
  settings |= {'sac': TINY, 'collection': QUICK}
  collect.run('Pendulum-v1', out, **{**settings, **changes})


@pytest.fixture(scope='module')
def collected(tmp_path_factory, referee):
  out = tmp_path_factory.mktemp('collected') / 'pendulum'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(collect, '_play', referee)
    launch(out, minari=HAS_HDF5)
  return out


def test_five_sets_with_references_are_kept(collected):
  sets = {q: npz.load(collected / q) for q in collect.QUALITIES}
  rows = {quality: len(data.reward) for quality, data in sets.items()}
  facts = json.loads((collected / 'agent' / 'facts.json').read_text())
  for quality in ('medium', 'expert'):
    size, _ = facts[quality].pop('params')
    assert size == (collected / 'agent' / f'{quality}.bin').stat().st_size
  # Evaluations after 20, 40, ... updates, and at the end: -900, ..., -500. The
  # last is the best; a third of the way to -400 is -800. After 40 updates there
  # are 10 rows at random, and one for each two updates but the first.
  assert facts == {
    'ref_min': -1000,
    'ref_max': -400,
    'medium': {'decisions': 58, 'mean_return': -800},
    'expert': {'decisions': 100, 'mean_return': -500},
    'options': [],
  }
  assert rows == {
    'random': 410,
    'medium': 410,
    # Two decisions were cut where the simulators started afresh.
    'medium-replay': 56,
    'expert': 410,
    'medium-expert': 820,
  }
  for quality, data in sets.items():
    about = data.about
    assert about.name == f'Pendulum-v1-{quality}'
    assert (about.env, about.ref_min, about.ref_max) == (
      'Pendulum-v1',
      -1000,
      -400,
    )
    returns = layout.returns(data)
    assert about.extra['behaviour']['episodes'] == len(returns)
    if quality == 'medium-replay':  # 28 of each: no whole episode
      assert not len(returns)
      continue
    np.testing.assert_allclose(
      about.extra['behaviour']['return_mean'], returns.mean()
    )
  assert 'medium' in sets['medium-expert'].about.extra
  np.testing.assert_array_equal(
    sets['medium-expert'].reward,
    np.concatenate([sets['medium'].reward, sets['expert'].reward]),
  )
  # The seam between the two is a cut.
  assert sets['medium-expert'].truncated[409]
  lines = (collected / 'agent' / 'evaluations.csv').read_text().splitlines()
  assert lines[0] == 'decisions,mean_return' and len(lines) == 6


def contents(folder):
  return {
    path.relative_to(folder): path.read_bytes()
    for path in folder.rglob('*')
    if path.is_file()
  }


def test_a_training_that_was_killed_goes_on(
  collected, tmp_path, referee, monkeypatch
):
  """Its policies and its memory are those of one that was not."""

  class Killed(Exception):
    pass

  def killed(*args):
    # The third evaluation comes after 60 updates, checkpoints after 25 and 50.
    if args[-1] % 10**6 == 3:
      raise Killed
    return referee(*args)

  out = tmp_path / 'cut'
  monkeypatch.setattr(collect, '_play', killed)
  with pytest.raises(Killed):
    launch(out)
  assert not (out / 'agent').exists()
  evaluated = []
  monkeypatch.setattr(
    collect,
    '_play',
    lambda *args: evaluated.append(args[-1] % 10**6) or referee(*args),
  )
  launch(out)
  # What was evaluated before the checkpoint is not again.
  # At the end play random actions, and three candidates for the expert.
  assert evaluated == [3, 4, 5, *4 * [0]]
  for part in ('agent', 'medium-replay'):
    assert contents(out / part) == contents(collected / part)
  assert not (out / 'training').exists()


def test_the_expert_is_who_plays_best_again(
  collected, tmp_path, referee, monkeypatch
):
  finals = iter([-400.0, -300.0, -350.0])

  def play(*args):
    is_final = args[-1] % 10**6 == 0 and args[3] is not None
    return next(finals) if is_final else referee(*args)

  monkeypatch.setattr(collect, '_play', play)
  launch(tmp_path / 'out', transitions=20)
  read = lambda out: json.loads((out / 'agent' / 'facts.json').read_text())
  found, usual = read(tmp_path / 'out'), read(collected)
  assert found['ref_max'] == -300
  # Of evaluations that rise by 100 each time, the last but one.
  assert found['expert']['mean_return'] == usual['expert']['mean_return'] - 100


def test_what_training_has_seen_is_what_was_done(collected):
  data = npz.load(collected / 'medium-replay')
  assert np.abs(data.action).max() <= 2
  # Pendulum's reward, from what the row itself holds.
  cosine, sine, speed = data.observation.T
  cost = np.arctan2(sine, cosine) ** 2 + 0.1 * speed**2
  cost += 0.001 * data.action[:, 0] ** 2
  np.testing.assert_allclose(data.reward, -cost, rtol=1e-4, atol=1e-5)
  chained = np.diff(data.episode) == 0
  np.testing.assert_array_equal(
    data.next_observation[:-1][chained], data.observation[1:][chained]
  )


def test_the_first_rows_are_uniform():
  """Before the first update, whatever the policy is; then they are its own."""
  experiment = behaviour.describe(
    'Pendulum-v1',
    dataclasses.replace(TINY, init_temperature=2.0),
    dataclasses.replace(QUICK, num_envs=64, warmup=192),
    steps=640,
    seed=3,
  )
  opened = experiment.material.open(experiment)
  (phase,) = build.make_phases(experiment, opened.spec)
  narrow = lambda params, key, timestep: (
    0 * phase.agent.act(params, key, timestep)[0],
    {},
  )
  still = phase._replace(agent=phase.agent._replace(act=narrow))
  source = opened.make_source(experiment, still)
  key = jax.random.key(0)
  state, agent_state = source.init(key), phase.agent.init(key)
  for step in (0, 64):
    state, *_ = source.next(state, agent_state, step, key)
  source.close(state)
  actions = state.replay.rows.action[:4, :, 0]
  assert actions.min() >= -2 and actions.max() <= 2
  # Of 192 draws the quartiles of a uniform are within a fifth of the range.
  np.testing.assert_allclose(
    np.quantile(actions[:3], [0.25, 0.5, 0.75]), [-1, 0, 1], atol=0.4
  )
  assert not actions[3].any()


def test_kept_parameters_act_as_the_data_says(collected):
  """The medium policy's log-density of its own actions beats the expert's."""
  env = envpool.make_envpool('Pendulum-v1', 1)
  networks = sac.make_networks(TINY, env.spec)
  agent = collector.make_agent(TINY, env.spec)
  params = collect._load(collected / 'agent', agent).params
  mean = {}
  for data in ('medium', 'expert'):
    rows = npz.load(collected / data)
    for who in ('medium', 'expert'):
      gaussian = networks.policy.apply(params[who].policy, rows.observation)
      log_prob = networks.box.log_prob(gaussian, rows.action)
      mean[data, who] = float(log_prob.mean())
  assert mean['medium', 'medium'] > mean['medium', 'expert']
  assert mean['expert', 'expert'] > mean['expert', 'medium']


@pytest.mark.skipif(not HAS_HDF5, reason='needs h5py')
def test_minari_folders_hold_the_same(collected):
  for quality in collect.QUALITIES:
    path = collected / 'minari' / 'outplay/Pendulum-v1' / f'{quality}-v0'
    theirs, ours = minari_files.load(path), npz.load(collected / quality)
    for key in layout.KEYS:
      np.testing.assert_array_equal(getattr(theirs, key), getattr(ours, key))
    assert theirs.about.extra == ours.about.extra


def test_what_is_there_is_not_made_again(collected, monkeypatch, capsys):
  times = lambda: {
    path: path.stat().st_mtime_ns
    for path in collected.rglob('*')
    if path.is_file() and path.name != '.lock'
  }
  made = times()
  refuse = lambda *args, **kwargs: pytest.fail('collected again')
  monkeypatch.setattr(behaviour, 'learn', refuse)
  monkeypatch.setattr(collector, 'gather', refuse)
  launch(collected)
  assert made == times()
  out = capsys.readouterr().out
  # All but medium-replay, which holds no whole episode here.
  assert out.count('score') == 4
  # What is lost is, from the parameters that were kept.
  monkeypatch.undo()
  expert = npz.load(collected / 'expert')
  before = {key: np.array(getattr(expert, key)) for key in layout.KEYS}
  for path in (collected / 'expert').iterdir():
    path.unlink()
  (collected / 'expert').rmdir()
  monkeypatch.setattr(behaviour, 'learn', refuse)
  launch(collected)
  expert = npz.load(collected / 'expert')
  for key in layout.KEYS:
    np.testing.assert_array_equal(getattr(expert, key), before[key])
  with pytest.raises(UserError, match='steps'):
    launch(collected, steps=200)


def test_what_has_changed_is_noticed_and_made_again(collected, tmp_path):
  out = shutil.copytree(collected, tmp_path / 'copy')
  path = out / 'expert' / 'observation.npy'
  whole = path.read_bytes()
  path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
  with pytest.raises(UserError, match=r'expert: observation\.npy is garbled'):
    launch(out)
  path.unlink()
  with pytest.raises(UserError, match='observation'):
    launch(out)
  shutil.rmtree(path.parent)
  launch(out)
  assert path.read_bytes() == whole
  # Of an older release, which kept no note.
  (out / 'stored.json').unlink()
  launch(out)
  assert set(json.loads((out / 'stored.json').read_text())) == {
    *collect.QUALITIES
  }


def test_what_does_not_fit_is_refused_before_training(tmp_path, monkeypatch):
  with pytest.raises(ValueError, match='steps=20: must be more than warmup=20'):
    launch(tmp_path / 'a', steps=20)
  with pytest.raises(ValueError, match='continuous'):
    collect.run(
      'CartPole-v1',
      tmp_path / 'a',
      steps=100,
      transitions=10,
      seed=0,
      sac=TINY,
      collection=QUICK,
    )
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ValueError, match='minari: needs h5py'):
    launch(tmp_path / 'a', minari=True)
  assert not (tmp_path / 'a').exists()


def test_flags(tmp_path):
  flags = ('--set=hidden=3', f'--out={tmp_path / "a"}', '--env=Pendulum-v1')
  said = refused('collect', *flags)
  assert said.startswith('error: no field hidden: did you mean hidden_')
  assert '--transitions' in launching.launch('collect', '--help').stdout


@pytest.mark.slow
def test_pendulum_is_learned_and_qualities_are_in_order(tmp_path):
  steps, fields, collection = collect.TASKS['Pendulum-v1']
  launch(
    tmp_path / 'p',
    steps=steps,
    transitions=10_000,
    sac=sac.Config(**fields),
    collection=dataclasses.replace(collection, reference_episodes=50),
  )
  means = {
    quality: npz.load(tmp_path / 'p' / quality).about.extra['behaviour']
    for quality in collect.QUALITIES
  }
  means = {quality: facts['return_mean'] for quality, facts in means.items()}
  assert means['random'] < -1000
  assert -1000 < means['medium'] < -400
  assert means['expert'] > -250
