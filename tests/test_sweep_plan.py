"""What a sweep is made of: settings, seeds, programs, and what is refused."""

import functools
import math

import numpy as np
import pytest
from launching import read_csv

from agents import atac
from experiments.build.unused import refuse_unused
from experiments.report import statistics
from experiments.runtime import config as configs
from experiments.sweeps import plan as sweep_plan
from experiments.sweeps import results as sweep_results
from experiments.sweeps.plan import Row
from experiments.sweeps.results import Result

PRESET = 'muzero_catch'


def make(**changes):
  return sweep_plan.make_plan(PRESET, env='jax:catch', **changes)


def test_grids_are_multiplied_and_reach_the_experiment():
  plan = make(
    grid=['learning_rate=1e-3,3e-3', 'network.projector=8,8;4'],
    fixed=['gamma=0.9'],
  )
  assert plan.settings == (
    ('1e-3', '8,8'),
    ('1e-3', '4'),
    ('3e-3', '8,8'),
    ('3e-3', '4'),
  )
  experiment = plan.describe(Row(3, 7))
  assert experiment.config.learning_rate == 3e-3
  assert experiment.config.network.projector == (4,)
  assert experiment.config.gamma == 0.9 and experiment.seed == 7
  assert sweep_plan.rows(plan, 2)[:3] == [Row(0, 0), Row(0, 1), Row(1, 0)]


def test_without_a_grid_the_seeds_are_left():
  assert sweep_plan.rows(make(), 3) == [Row(0, 0), Row(0, 1), Row(0, 2)]


def test_random_settings_stay_in_range_and_come_again():
  ranges = [
    'learning_rate=log:1e-4:1e-2',
    'value_weight=uniform:0.1:0.5',
    'td_steps=int:3:5',
    'optimiser=choice:adam:sgd',
  ]
  plan = make(random=ranges, samples=40)
  assert plan == make(random=ranges, samples=40)
  assert plan.settings[:10] == make(random=ranges, samples=10).settings
  assert plan.settings != make(random=ranges, samples=40, seed=1).settings
  rate, weight, steps, optimiser = zip(*plan.settings)
  rate, weight = np.array(rate, float), np.array(weight, float)
  assert np.all((rate >= 1e-4) & (rate <= 1e-2))
  # Half of a log-uniform range lies below its geometric middle.
  assert 10 <= np.sum(rate < 1e-3) <= 30
  assert np.all((weight >= 0.1) & (weight <= 0.5))
  assert set(steps) == {'3', '4', '5'} and set(optimiser) == {'adam', 'sgd'}
  assert plan.logarithmic == ('learning_rate',)


def test_what_is_drawn_twice_is_kept_once():
  plan = make(random=['td_steps=int:3:4'], samples=10)
  assert sorted(plan.settings) == [('3',), ('4',)]


MISTAKES = {
  'field': ({'grid': ['learning_rte=1']}, 'learning_rate'),
  'type': ({'grid': ['td_steps=1,x']}, 'int'),
  'range': ({'grid': ['gamma=0.9,1.5']}, 'gamma=1.5'),
  'form': ({'grid': ['gamma']}, 'field=value,value'),
  'twice': ({'grid': ['gamma=0.9', 'agent.gamma=0.8']}, 'gamma'),
  'set and swept': ({'grid': ['gamma=0.9'], 'fixed': ['gamma=1']}, 'twice'),
  'same value': ({'grid': ['gamma=0.9,0.90']}, 'same setting'),
  'derived': ({'grid': ['total_updates=5,6']}, 'same setting'),
  'samples': ({'random': ['gamma=uniform:0:1']}, 'samples=0'),
  'no random': ({'samples': 3}, 'samples=3'),
  'kind': ({'random': ['gamma=normal:0:1'], 'samples': 1}, 'uniform'),
  'bounds': ({'random': ['gamma=uniform:1:0'], 'samples': 1}, 'below'),
  'number': ({'random': ['gamma=uniform:a:1'], 'samples': 1}, 'LOW:HIGH'),
  'log': ({'random': ['gamma=log:0:1'], 'samples': 1}, 'above 0'),
  'int': ({'random': ['td_steps=int:1:2.5'], 'samples': 1}, 'whole'),
  'drawn range': ({'random': ['gamma=uniform:2:3'], 'samples': 1}, 'gamma='),
}


@pytest.mark.parametrize('what', MISTAKES)
def test_mistakes_are_one_line_that_says_what_is_right(what):
  changes, hint = MISTAKES[what]
  with pytest.raises(ValueError) as caught:
    make(**changes)
  assert hint in str(caught.value) and '\n' not in str(caught.value)


def test_a_value_is_put_where_it_belongs_past_the_checks():
  experiment = make().describe(Row(0, 0))
  path = sweep_plan.find_path(experiment, 'pb_c_base')
  assert path == 'agent.search.pb_c_base'
  changed = sweep_plan.put(experiment, path, -1.0)
  assert sweep_plan.get(changed, path) == -1.0
  assert sweep_plan.put(changed, path, 19652.0) == experiment


def result(value, curve=()):
  return Result('done', list(curve), {'eval_return': value})


def test_settings_are_ranked_by_iqm_and_lost_seeds(tmp_path):
  plan = make(grid=['learning_rate=1e-3,1e-2,1e-1'])
  values = {0: [0.0, 1.0, 2.0, 9.0], 1: [3.0, 3.0, 4.0, 4.0], 2: [9.0] * 3}
  results = {
    Row(setting, seed): result(value, [{'step': 1.0, 'eval_return': value}])
    for setting, column in values.items()
    for seed, value in enumerate(column)
  }
  results[Row(2, 3)] = Result('nan', [{'step': 1.0}], {})
  best, second, third = sweep_results.write(
    plan, results, 'eval_return', tmp_path
  )
  assert (best.setting, best.iqm, best.seeds, best.lost) == (1, 3.5, 4, 0)
  assert (second.setting, second.iqm, second.mean) == (0, 1.5, 3.0)
  low, high = statistics.bootstrap_interval(
    [values[0]], lambda s: statistics.iqm(s[0])
  )
  assert (second.low, second.high) == (low, high)
  # Diverged with one seed in four: behind those that never do.
  assert (third.setting, third.iqm, third.lost) == (2, 9.0, 1)
  table = read_csv(tmp_path / 'sweep.csv')
  assert len(table) == 12 and table[-1]['status'] == 'nan'
  assert math.isnan(float(table[-1]['eval_return']))
  assert table[3]['learning_rate'] == '1e-3' and table[3]['seed'] == '3'
  assert float(table[3]['eval_return_mean']) == 9.0
  for name in ('curves.csv', 'summary.csv'):
    assert (tmp_path / name).stat().st_size > 0
  assert (tmp_path / 'sweep.png').read_bytes().startswith(b'\x89PNG')


def test_an_unknown_metric_is_refused_with_those_that_are_there(tmp_path):
  with pytest.raises(configs.UserError, match=r'metric=x.*eval_return'):
    sweep_results.write(make(), {Row(0, 0): result(1.0)}, 'x', tmp_path)


def test_the_command_of_a_row_trains_it_alone():
  plan = make(grid=['learning_rate=1e-3'], fixed=['gamma=0.9'], steps=900)
  assert sweep_results.command(plan, Row(0, 2)) == (
    'python -m experiments.train --preset=muzero_catch --env=jax:catch '
    '--steps=900 --set=gamma=0.9 --set=learning_rate=1e-3 --seed=2'
  )


@pytest.mark.parametrize('choices', ['none', 'none,torso'])
def test_a_setting_that_some_rows_read_is_not_refused(choices):
  plan = sweep_plan.make_plan(
    'efficientzero_catch',
    fixed=['network.moe.num_experts=4'],
    grid=[f'network.mixture={choices}'],
  )
  numbers = range(len(plan.settings))
  configs = [plan.describe(Row(i, 0)).config for i in numbers]
  refuse = functools.partial(refuse_unused, plan.fixed, configs, on_data=False)
  if 'torso' in choices:
    refuse()
  else:
    with pytest.raises(ValueError, match='there is no mixture of experts; set'):
      refuse()


def test_a_critics_mixture_can_be_switched_off():
  configs = [atac.Config()]
  refuse_unused(['critic_moe.num_experts=0'], configs, on_data=True)
  with pytest.raises(ValueError, match='set critic_moe'):
    refuse_unused(['critic_moe.hidden=8'], configs, on_data=True)
