"""What breaks a run, one by one: it says so, and nothing is lost."""

import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
from fractions import Fraction
from typing import Any, NamedTuple

import faults_run
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import assert_equal

from agents.core.types import Agent, Info
from experiments.files.errors import UserError
from experiments.runtime import (
  checkpoint,
  host,
  integrity,
  loop,
  metrics,
  sources,
)
from experiments.runtime import replay as host_replay
from experiments.runtime.loop import Diverged, Hooks, Intervals
from experiments.runtime.sources import Measures, Source

ROOT = pathlib.Path(__file__).resolve().parent.parent


# A damaged checkpoint.


def content(step):
  return {'w': np.random.default_rng(step).random(500), 'n': step}


@pytest.fixture(scope='module')
def two_steps(tmp_path_factory):
  folder = tmp_path_factory.mktemp('two') / 'checkpoints'
  checkpoints = checkpoint.open(folder)
  for step in (10, 20):
    checkpoints.save(step, content(step), {'of': step})
  checkpoints.close()
  return folder


@pytest.fixture
def copy(two_steps, tmp_path):
  return shutil.copytree(two_steps, tmp_path / 'copy')


def largest(folder):
  files = (path for path in folder.rglob('*') if path.is_file())
  return max(files, key=lambda path: path.stat().st_size)


def truncate(step):
  os.truncate(largest(step), 100)


def delete(step):
  largest(step).unlink()


def flip_a_bit(step):
  path = largest(step)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def garble(step):
  (step / 'manifest.json').write_bytes(b'\x00\xff{')


def change_the_manifest(step):
  path = step / 'manifest.json'
  path.write_text(path.read_text().replace('"of": 20', '"of": 21'))


def delete_the_manifest(step):
  (step / 'manifest.json').unlink()


def empty(step):
  shutil.rmtree(step)
  step.mkdir()


DAMAGES = {
  truncate: ' has 100 bytes instead of ',
  delete: ' is missing',
  flip_a_bit: ' is garbled',
  garble: 'is not JSON',
  change_the_manifest: 'manifest.json is garbled',
  delete_the_manifest: 'manifest.json is missing',
  empty: 'manifest.json is missing',
}


def check_taken(checkpoints, step):
  assert checkpoints.latest_step() == step
  assert checkpoints.peek() == (step, {'of': step})
  carry, extra = checkpoints.restore(content(0))
  assert (extra, carry['n']) == ({'of': step}, step)
  np.testing.assert_array_equal(carry['w'], content(step)['w'])


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(damage, copy, capsys):
  damage(copy / '20')
  checkpoints = checkpoint.open(copy)
  check_taken(checkpoints, 10)
  [line] = capsys.readouterr().out.splitlines()
  assert line.startswith(f'note: the checkpoint {copy}/20 is damaged (')
  assert DAMAGES[damage] in line
  assert line.endswith('it is set aside as 20.corrupt, step 10 is taken')
  # The run comes to that step again.
  checkpoints.save(20, content(20), {'of': 20})
  checkpoints.close()
  checkpoints = checkpoint.open(copy)
  check_taken(checkpoints, 20)
  checkpoints.close()
  assert not capsys.readouterr().out
  assert {p.name for p in copy.iterdir()} == {'10', '20', '20.corrupt'}


def test_a_reader_passes_over_damage_and_leaves_it(copy, capsys):
  truncate(copy / '20')
  reader = checkpoint.open(copy, read_only=True)
  check_taken(reader, 10)
  reader.close()
  assert capsys.readouterr().out.endswith('): step 10 is taken\n')
  assert {p.name for p in copy.iterdir()} == {'10', '20'}


def test_another_shape_is_no_damage(copy, capsys):
  checkpoints = checkpoint.open(copy)
  with pytest.raises(UserError, match='/20 does not fit this run'):
    checkpoints.restore({'w': np.zeros(3), 'n': 0})
  checkpoints.close()
  assert not capsys.readouterr().out
  assert (copy / '20').is_dir()


def test_only_damaged_checkpoints_end_the_run_and_stay(copy, capsys):
  truncate(copy / '10')
  garble(copy / '20')
  for read_only in (False, True, False):  # the next run says it again
    checkpoints = checkpoint.open(copy, read_only=read_only)
    for read in (
      checkpoints.peek,
      checkpoints.latest_step,
      lambda c=checkpoints: c.restore(content(0)),
    ):
      with pytest.raises(integrity.Damaged) as caught:
        read()
      message = str(caught.value)
      assert message.startswith(f'no checkpoint in {copy} is whole (step 20: ')
      assert 'step 10: ' in message and '\n' not in message
      assert 'restore one from a copy, or delete the run' in message
    checkpoints.close()
    assert {p.name for p in copy.iterdir()} == {'10', '20'}
  # Parameters that are written again anyway may be damaged.
  checkpoints = checkpoint.open(copy)
  checkpoints.save(20, content(20), {'of': 20})
  check_taken(checkpoints, 20)
  checkpoints.close()
  names = {p.name for p in copy.iterdir()}
  assert names == {'20', '10.corrupt', '20.corrupt'}


def test_a_damaged_best_is_replaced(tmp_path, capsys):
  best = checkpoint.best(tmp_path)
  best.save(10, 5.0, content(1))
  best.close()
  truncate(tmp_path / '0')
  with pytest.raises(integrity.Damaged):
    checkpoint.best(tmp_path, read_only=True)
  best = checkpoint.best(tmp_path)
  assert 'the next best takes its place' in capsys.readouterr().out
  assert best.metric() is None
  for step, metric, kept in ((20, 1.0, True), (30, 2.0, True), (40, 1, False)):
    assert best.save(step, metric, content(step)) == kept
  params, extra = best.restore(content(0))
  assert (params['n'], extra) == (30, {'step': 30, 'metric': 2.0})
  best.close()


# A disk that takes no more.


@pytest.mark.parametrize(
  ('error', 'reason', 'remedy'),
  [
    (OSError(28, 'x'), 'No space left on device', 'make room'),
    (
      PermissionError(13, 'x'),
      'Permission denied',
      'let this user write there',
    ),
    (
      OSError(24, 'x'),
      'Too many open files',
      'allow more open files (ulimit -n)',
    ),
  ],
)
def test_a_refusal_is_one_line(error, reason, remedy):
  for newest, words in (
    (6, f'that of update 6 is whole: {remedy}, then the same command resumes'),
    (None, f'there is none before it: {remedy}, then the same command begins'),
  ):
    saving = integrity.saving(7, '/a/run', newest)
    with pytest.raises(UserError) as caught, saving:
      raise error
    assert str(caught.value).startswith(
      f'cannot save the checkpoint at update 7 into /a/run: {reason}; {words}'
    )


@pytest.mark.parametrize(
  'error', [ValueError('a mistake'), OSError('x'), KeyError(), UserError('no')]
)
def test_other_errors_pass(error):
  with pytest.raises(type(error)) as caught, integrity.saving(7, '/a/run'):
    raise error
  assert caught.value is error


def test_files_without_room_are_one_line(tmp_path, monkeypatch):
  writer = metrics.csv_writer(tmp_path / 'metrics.csv')
  writer.write(1, {'loss': 1.0})

  def full(handle):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(os, 'fsync', full)
  # A new column rewrites the file.
  with pytest.raises(UserError) as caught:
    writer.write(2, {'loss': 1.0, 'more': 2.0})
  assert str(caught.value) == (
    f'cannot write {tmp_path}/metrics.csv: No space left on device; make room, '
    'then the same command resumes from the last checkpoint'
  )
  assert (tmp_path / 'metrics.csv').read_text() == 'step,loss\n1,1\n'


def test_rows_without_room_are_written_the_next_time(
  tmp_path, monkeypatch, key
):
  agent, env = faults_run.make_agent(), faults_run.make_env()
  source = host.from_host(env, agent, mode='synchronous')
  kept = host_replay.host_replay(20, 2, 2)
  state, stream = kept.init(source.example()), source.init(key)
  agent_state = agent.init(key)
  for i in range(4):
    stream, row, _ = source.next(stream, agent_state, i, key)
    state = kept.add(state, row)

  def full(handle):
    raise OSError(28, 'No space left on device')

  with monkeypatch.context() as broken, pytest.raises(UserError, match='space'):
    broken.setattr(os, 'fsync', full)
    host_replay.save(state, tmp_path)
  assert not list(tmp_path.iterdir())
  saved = host_replay.save(state, tmp_path)
  loaded = host_replay.load(kept.init(source.example()), tmp_path, *saved)
  assert_equal(loaded.rows, state.rows)
  source.close(stream)


# Numbers that are not finite.


class Learner(NamedTuple):
  params: Any


def diverging_agent(bad, value=jnp.nan, at=5, spoils=()):
  """Its update number `at` has the metrics `bad` at `value`.

  It leaves `spoils` of its parameters NaN.
  """

  def init(key):
    return Learner({'w': jnp.zeros(3), 'count': jnp.zeros((), jnp.int32)})

  def update(state, batch, key):
    count = state.params['count'] + 1
    now = count >= at
    metrics = {n: jnp.where(now, value, 1.0) for n in bad} | {'fine': batch}
    params = {
      name: jnp.where(now, jnp.nan, x) if name in spoils else x
      for name, x in state.params.items()
    }
    return Learner(params | {'count': count}), Info(metrics, None)

  return Agent(init, None, update)


def plain_source(is_pure, count=lambda step: 0.0 * step):
  def next_(state, agent_state, step, key):
    counts = {'decisions': jnp.float32(1), 'return_sum': count(step)}
    return state, jnp.float32(step), Measures(counts, {'gauge': 1.0 * step})

  return Source(
    lambda key: jnp.zeros(()), next_, lambda s, b, i: s, lambda: None, is_pure
  )


def run_to_the_end(agent, source, intervals, steps=20):
  """What was raised, and the steps of what was kept before."""
  events = []
  hooks = Hooks(
    log=lambda step, row: events.append(('log', step)),
    save=lambda carry: events.append(('save', int(carry.step))),
    evaluate=lambda step, state: events.append(('evaluate', step)) or {},
  )
  key = jax.random.key(0)
  with pytest.raises(Diverged) as caught:
    loop.run(
      agent, source, loop.init(agent, source, key), key=key, steps=steps,
      intervals=intervals, hooks=hooks,
    )  # fmt: skip
  return str(caught.value), events


@pytest.mark.parametrize('is_pure', [True, False])
@pytest.mark.parametrize(
  ('bad', 'value', 'what'),
  [
    (('loss_value',), jnp.nan, 'loss_value is nan'),
    (('b', 'a'), -jnp.inf, 'a is -inf, b is -inf'),
  ],
)
def test_a_loss_that_is_not_finite_ends_the_run(is_pure, bad, value, what):
  intervals = Intervals(log=3, checkpoint=2, evaluate=3)
  message, events = run_to_the_end(
    diverging_agent(bad, value), plain_source(is_pure), intervals
  )
  assert message == f'{what} at update 5; nothing since then was saved'
  # The interval of updates 5 and 6 leaves nothing.
  assert events == [
    ('log', 2), ('save', 2), ('evaluate', 3), ('log', 3), ('log', 4),
    ('save', 4),
  ]  # fmt: skip


@pytest.mark.parametrize('is_pure', [True, False])
def test_the_first_update_is_named_in_a_long_interval(is_pure):
  for at in (1, 17):
    message, events = run_to_the_end(
      diverging_agent(('loss',), at=at), plain_source(is_pure), Intervals(20)
    )
    assert message.startswith(f'loss is nan at update {at};')
    assert not events


@pytest.mark.parametrize('is_pure', [True, False])
def test_a_reward_that_is_not_finite_ends_the_run(is_pure):
  count = lambda step: jnp.where(step == 6, jnp.inf, 0.0)
  message, events = run_to_the_end(
    diverging_agent((), at=99), plain_source(is_pure, count), Intervals(10)
  )
  assert message.startswith('return_sum is inf at update 7;')
  assert not events


@pytest.mark.parametrize('is_pure', [True, False])
def test_parameters_that_are_not_finite_are_never_kept(is_pure):
  # As of a gradient that is NaN though the loss is not.
  message, events = run_to_the_end(
    diverging_agent((), at=4, spoils=('w',)),
    plain_source(is_pure),
    Intervals(log=2, checkpoint=2, evaluate=2),
  )
  assert message == (
    "the parameters ['w'] are not finite after update 4; they were not saved"
  )
  assert {step for _, step in events} == {2}


def test_the_compiled_interval_vmaps_and_only_one_row_diverges():
  def agent(at):
    return diverging_agent(('loss',), at=at)

  source, key = plain_source(True), jax.random.key(0)
  carry = loop.init(agent(1), source, key)

  def one(at, interval):
    return interval(agent(at), source)(carry, key, 8)

  watched = functools.partial(one, interval=loop.watched_interval)
  _, means, _, watch = jax.jit(jax.vmap(watched))(jnp.array([3, 99, 8]))
  assert watch.step.tolist() == [3, 0, 8]
  np.testing.assert_array_equal(
    watch.values['loss'], np.float32([np.nan, 1, np.nan])
  )
  # Those of the update that is named, or of the last.
  assert watch.values['gauge'].tolist() == [2, 7, 7]
  assert np.isfinite(means['loss']).tolist() == [False, True, False]
  assert means['fine'].tolist() == [3.5] * 3
  plain = functools.partial(one, interval=loop.compile_interval)
  unwatched = jax.jit(jax.vmap(plain))(jnp.array([3, 99, 8]))
  assert len(unwatched) == 3
  assert_equal(unwatched[1], means)


# An environment that raises.


@pytest.mark.parametrize('mode', ['synchronous', 'asynchronous'])
def test_an_environments_exception_reaches_the_user(mode, key):
  agent, env = faults_run.make_agent(), faults_run.make_env(fail_at=3)
  rows = host.from_host(env, agent, mode=mode)
  # Its rows are the batches of an agent that learns nothing.
  agent = agent._replace(update=lambda state, batch, key: (state, Info({})))
  before = set(threading.enumerate())
  saved, carry = [], loop.init(agent, rows, key)
  with pytest.raises(RuntimeError, match='the simulator broke') as caught:
    loop.run(
      agent, rows, carry, key=key, steps=20, intervals=Intervals(4, 4),
      hooks=Hooks(save=lambda carry: saved.append(int(carry.step))),
    )  # fmt: skip
  # Its own, from where it was raised.
  assert caught.traceback[-1].path == pathlib.Path(faults_run.__file__)
  assert set(threading.enumerate()) == before
  assert not saved
  rows.close(carry.source)


def test_an_actors_exception_outlives_a_checkpoint(key):
  # It is raised ahead of the learner, who then starts simulators afresh.
  agent, env = faults_run.make_agent(), faults_run.make_env(fail_at=6)
  rows = host.from_host(env, agent, mode='asynchronous')
  agent = agent._replace(update=lambda state, batch, key: (state, Info({})))
  with pytest.raises(RuntimeError, match='the simulator broke'):
    loop.run(
      agent, rows, loop.init(agent, rows, key), key=key, steps=20,
      intervals=Intervals(2, 2),
    )  # fmt: skip


def test_the_rows_before_the_first_update_are_not_waited_for(key):
  agent, env = faults_run.make_agent(), faults_run.make_env()
  asked = []
  source = sources.replayed(
    host.from_host(env, agent, mode='synchronous'),
    host_replay.host_replay(40, 4, 2),
    sources.Pace(faults_run.E, 60, Fraction(2)),
    total_updates=5,
    stopping=lambda: asked.append(None) or len(asked) > 7,
  )
  saved, carry = [], loop.init(agent, source, key)
  carry = loop.run(
    agent, source, carry, key=key, steps=5, intervals=Intervals(2),
    hooks=Hooks(save=saved.append, stopping=lambda step: len(asked) > 7),
  )  # fmt: skip
  assert (int(carry.step), len(asked), saved) == (0, 8, [])
  source.close(carry.source)
  # Nothing was donated.
  assert not jax.tree.leaves(carry.agent)[0].is_deleted()


# The same faults in runs that are then begun again.

KILLS = ('before the rows', 'while writing', 'before the renaming')
REFUSALS = {'no room for arrays': 'checkpoints', 'no room for rows': 'replay'}
FAULTS = ('none', *KILLS, *REFUSALS, 'loss', 'environment')


@pytest.fixture(scope='module')
def ended(tmp_path_factory):
  """How each run ended and how the same run began again."""
  folder = tmp_path_factory.mktemp('faults')
  done = subprocess.run(
    [sys.executable, faults_run.__file__, str(folder), *FAULTS],
    cwd=ROOT,
    env=os.environ
    | {
      'PYTHONPATH': str(ROOT),
      'JAX_PLATFORMS': 'cpu',
      'JAX_COMPILATION_CACHE_DIR': str(ROOT / '.jax_cache'),
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    },
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert done.returncode == 0, done.stderr
  found = {
    row['fault']: row for row in map(json.loads, done.stdout.split('\n')[:-1])
  }
  assert set(found) == set(FAULTS)
  return folder, found


def check_goes_on(found, fault, begin):
  status, errors, (began, numbers) = found[fault]['again']
  assert (status, errors, began) == (0, '', begin)
  assert numbers == found['none']['again'][2][1]


def test_the_run_ends_well_without_a_fault(ended):
  _, found = ended
  assert (found['none']['status'], found['none']['errors']) == (0, '')
  assert found['none']['steps'] == [8, 12]
  check_goes_on(found, 'none', 12)


@pytest.mark.parametrize('fault', KILLS)
def test_a_kill_while_saving_costs_that_checkpoint_only(ended, fault):
  _, found = ended
  assert found[fault]['status'] == -9
  assert found[fault]['steps'] == [4]
  check_goes_on(found, fault, 4)


@pytest.mark.parametrize('fault', REFUSALS)
def test_a_full_disk_ends_the_run_with_one_line(ended, fault):
  folder, found = ended
  where = folder / fault.replace(' ', '_') / REFUSALS[fault]
  assert found[fault]['status'] == 2
  assert found[fault]['errors'] == (
    f'error: cannot save the checkpoint at update 8 into {where}: File too '
    'large; that of update 4 is whole: make room, then the same command '
    'resumes from there\n'
  )
  assert found[fault]['steps'] == [4]
  check_goes_on(found, fault, 4)


def test_a_run_that_diverged_keeps_its_last_good_checkpoint(ended):
  _, found = ended
  assert found['loss']['status'] == 2
  assert found['loss']['errors'] == (
    'error: loss is nan at update 9; nothing since then was saved\n'
  )
  assert found['loss']['steps'] == [4, 8]
  check_goes_on(found, 'loss', 8)


def test_a_run_whose_environment_raised_goes_on(ended):
  _, found = ended
  assert found['environment']['status'] == 1
  errors = found['environment']['errors']
  assert errors.startswith('Traceback')
  assert errors.endswith('RuntimeError: the simulator broke\n')
  assert found['environment']['steps'] == [4]
  check_goes_on(found, 'environment', 4)
