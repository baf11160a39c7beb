"""From a simulator of one's own to a plan in a learned model, by flags."""

import csv

import jax
import launching
import numpy as np
import pytest
from launching import ROOT

from agents.core.types import Continuous
from experiments.data import npz
from experiments.training import collector

ENV = 'gymnasium:push:Push-v0'


@pytest.mark.slow
def test_data_of_an_environment_of_ones_own_are_planned_with(tmp_path):
  def run(words, **flags):
    given = [f'--{name}={value}' for name, value in flags.items()]
    done = launching.launch(
      words, f'--env={ENV}', *given, PYTHONPATH=str(ROOT / 'tests')
    )
    return done.stdout

  sac = (
    'warmup=200 hidden_sizes=32,32 batch_size=32 updates=0.5 evaluate_every=800'
  )
  fields = [f'--set={x}' for x in (*sac.split(), 'reference_episodes=8')]
  data = tmp_path / 'data'
  said = run(
    ' '.join(['collect', *fields]), out=data, steps=8000, transitions=600
  )
  # What is printed next is a command that works.
  assert f'--dataset={data}/medium --env={ENV}' in said
  rows = npz.load(data / 'medium-replay')
  assert rows.about.env == ENV and rows.about.name == 'Push-v0-medium-replay'
  few = ['--set=checkpoint_every=200', '--set=log_every=100']
  agent = ' '.join(['train', *few, '--set=evaluate_every=0'])
  run(
    agent,
    preset='cql_small',
    dataset=data / 'medium-replay',
    steps=400,
    workdir=tmp_path / 'cql',
  )
  model = ' '.join(['train', *few])
  run(
    model,
    preset='dynamics_small',
    dataset=data / 'medium-replay',
    steps=400,
    workdir=tmp_path / 'model',
  )
  with open(tmp_path / 'model' / 'metrics.csv') as lines:
    last = list(csv.DictReader(lines))[-1]
  assert 0 <= float(last['end_chance_else']) < float(last['end_chance']) <= 1
  run(
    'play',
    workdir=tmp_path / 'cql',
    players='actor,lookahead=1+rollout=2',
    dynamics=tmp_path / 'model',
    termination_rule='push:goes_to_goal',
    episodes=8,
  )
  with open(tmp_path / 'cql' / 'play.csv') as lines:
    played = {row['planner']: row for row in csv.DictReader(lines)}
  assert set(played) == {'actor', 'lookahead=1+rollout=2'}
  assert all(np.isfinite(float(r['return_mean'])) for r in played.values())


def test_simulators_are_named_as_they_were_asked_for():
  env = collector.simulators(ENV, 2, ())
  assert env.spec.name == ENV
  assert isinstance(env.spec.action, Continuous)
  assert jax.tree.leaves(env.spec.observation)


def test_a_pure_environment_is_no_simulator():
  with pytest.raises(ValueError, match='env=jax:pendulum: is not a simulator'):
    collector.simulators('jax:pendulum', 2, ())
