"""Plots: statistics against hand numbers and scipy, groups, errors, files."""

import json
import math

import numpy as np
import pytest
from launching import launch, refused
from scipy import stats

from experiments.files import tables
from experiments.files.errors import UserError
from experiments.report import (
  atari_scores,
  curves,
  runs,
  statistics,
  style,
  terminal,
)

EVALUATION = (
  'checkpoint,planner,simulations,episodes,return_mean,return_se,length_mean,'
  'seconds_per_decision\n'
)


def make_run(
  folder,
  *,
  seed=0,
  name='job',
  env='Catch-v0',
  agent='muzero',
  values=(0.0, 1.0),
  steps=(10, 20),
  evaluation=(),
  **settings,
):
  """A finished run as train leaves it; evaluation rows are (which, N, R)."""
  folder.mkdir(parents=True)
  config = {
    'name': name,
    'agent_name': agent,
    'env_name': env,
    'steps': 100,
    'seed': seed,
    'agent': {'learning_rate': 0.1, 'total_updates': seed} | settings,
    'run': {'early_update': 500},
    'made_with': {'device': f'machine {seed}'},
  }
  (folder / 'config.json').write_text(json.dumps(config))
  lines = ['step,decisions,episode_return,eval_return']
  for step, value in zip(steps, values):
    lines.append(f'{step},{4 * step},{value},')
  lines.append(f'{steps[-1] + 1},{4 * steps[-1] + 4},,{2 * values[-1]}')
  (folder / 'metrics.csv').write_text('\n'.join(lines) + '\n')
  if evaluation:
    rows = [
      f'{which},{"puct" if n else "network"},{n},50,{mean},0.05,9.0,0.001\n'
      for which, n, mean in evaluation
    ]
    (folder / 'evaluation.csv').write_text(EVALUATION + ''.join(rows))
  return folder


def test_iqm_drops_a_quarter_at_each_end():
  scores = [100.0, 1.0, 2.0, 3.0, 4.0, -50.0, 5.0, 6.0]
  assert statistics.iqm(scores) == pytest.approx((2 + 3 + 4 + 5) / 4)
  assert statistics.iqm([[1.0, 2.0], [3.0, 10.0]]) == pytest.approx(2.5)


def test_bootstrap_of_two_values_is_known():
  # Means of resamples are 0, 1/2, 1 with chances 1/4, 1/2, 1/4.
  low, high = statistics.bootstrap_interval(
    [[0.0, 1.0]], lambda s: np.mean(s[0]), level=0.8
  )
  assert (low, high) == (0, 1)
  low, high = statistics.bootstrap_interval(
    [[0.0, 1.0]], lambda s: np.mean(s[0]), level=0.4
  )
  assert (low, high) == (0.5, 0.5)


def test_bootstrap_agrees_with_scipy():
  values = np.random.default_rng(1).normal(size=30)
  low, high = statistics.bootstrap_interval(
    [values], lambda s: np.mean(s[0]), resamples=10_000
  )
  theirs = stats.bootstrap(
    (values,), np.mean, method='percentile', n_resamples=10_000, rng=2
  ).confidence_interval
  np.testing.assert_allclose([low, high], theirs, atol=0.02)


def test_bootstrap_is_stratified_and_deterministic():
  # Without strata the two games would mix, and the mean would vary.
  strata = [[0.0, 0.0, 0.0], [1.0]]
  statistic = lambda s: np.mean([np.mean(x) for x in s])
  assert statistics.bootstrap_interval(strata, statistic) == (0.5, 0.5)
  values = [np.random.default_rng(1).normal(size=(5, 3))]
  first, again = (
    statistics.bootstrap_interval(values, lambda s: np.mean(s[0], axis=0))
    for _ in range(2)
  )
  np.testing.assert_array_equal(first, again)
  assert np.shape(first) == (2, 3)
  with pytest.raises(ValueError, match='at least one run'):
    statistics.bootstrap_interval([[1.0], []], statistic)


def test_mean_interval_is_students():
  low, high = statistics.mean_interval([1.0, 2.0, 3.0])
  # t(0.975, 2) = 4.302653, standard error 1 / sqrt(3).
  assert low == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-6)
  assert high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-6)
  assert np.isnan(statistics.mean_interval([1.0])).all()


def test_probability_of_improvement():
  ours = {'a': [1.0, 2.0], 'b': [5.0]}
  theirs = {'a': [1.0, 0.0], 'b': [6.0]}
  # Game a: a tie and three wins of four pairs.
  chance = statistics.probability_of_improvement(ours, theirs)
  assert chance == pytest.approx((3.5 / 4 + 0) / 2)
  with pytest.raises(ValueError, match='must be the same games'):
    statistics.probability_of_improvement(ours, {'a': [1.0]})


def test_performance_profile():
  profile = statistics.performance_profile(
    {'a': [0.0, 1.0], 'b': [2.0]}, [-1.0, 0.5, 1.0, 3.0]
  )
  np.testing.assert_allclose(profile, [1, 0.75, 0.5, 0])


@pytest.mark.parametrize(
  ('agent', 'mean', 'median', 'middle', 'above'),
  [
    ('efficientzero', 1.943, 1.090, 1.047, 14),
    ('muzero', 0.562, 0.227, 0.288, 5),
  ],
)
def test_published_scores_recomputed(agent, mean, median, middle, above):
  normal = [
    atari_scores.human_normalised(game, getattr(scores, agent))
    for game, scores in atari_scores.GAMES.items()
  ]
  assert len(normal) == 26
  assert round(np.mean(normal), 3) == mean
  assert round(np.median(normal), 3) == median
  assert round(statistics.iqm(normal), 3) == middle
  assert sum(score >= 1 for score in normal) == above


def test_games_by_both_spellings():
  names = ['Pong-v5', 'PongNoFrameskip-v4', 'UpNDown-v5', 'Catch-v0', 'Pong']
  games = [atari_scores.game_of(name) for name in names]
  assert games == ['Pong', 'Pong', 'UpNDown', None, 'Pong']


def test_score_table():
  table = atari_scores.score_table({'Pong': [-20.7, 14.6], 'Boxing': [12.1]})
  assert table[1][:4] == ['Boxing', '1', '12.1', '1.000']
  assert table[2][:4] == ['Pong', '2', '-3.0', '0.500']
  assert table[2][4:] == ['0.397', '1.156']
  # Game means 1 and 0.5; Pong's lies between 0 and 1 in resamples.
  assert table[3][0] == 'mean of 2'
  assert table[3][3] == '0.750 [0.500, 1.000]'
  assert table[5][3].startswith('0.667')


def test_groups_pool_seeds_and_show_what_differs(tmp_path):
  for seed in (0, 1):
    make_run(tmp_path / f'full{seed}', seed=seed, consistency=True, k=5)
    make_run(tmp_path / f'less{seed}', seed=seed, consistency=False, k=5)
    make_run(tmp_path / f'deep{seed}', seed=seed, consistency=True, k=9)
  found = runs.find_runs([tmp_path / '*'])
  labels = {run.workdir.name: (run.label, run.seed) for run in found}
  assert labels == {
    'full0': ('job', 0),
    'full1': ('job', 1),
    'less0': ('job, consistency=false', 0),
    'less1': ('job, consistency=false', 1),
    'deep0': ('job, k=9', 0),
    'deep1': ('job, k=9', 1),
  }


def test_two_groups_show_both_settings_and_heads(tmp_path):
  make_run(tmp_path / 'a', consistency=True)
  make_run(tmp_path / 'b', consistency=False)
  make_run(tmp_path / 'c', agent='efficientzero', env='Pong-v5')
  found = runs.find_runs([tmp_path / 'a', tmp_path / 'b', tmp_path / 'c'])
  assert [run.label for run in found] == [
    'job, muzero, Catch-v0, consistency=true',
    'job, muzero, Catch-v0, consistency=false',
    'job, efficientzero, Pong-v5',
  ]
  assert found[2].method == 'job, efficientzero'


def test_the_same_folder_counts_once_and_the_same_run_is_refused(tmp_path):
  make_run(tmp_path / 'a')
  assert len(runs.find_runs([tmp_path / '*', tmp_path / 'a'])) == 1
  make_run(tmp_path / 'b')
  with pytest.raises(UserError, match='same run, seed 0'):
    runs.find_runs([tmp_path / '*'])


def test_curves_are_means_on_a_shared_grid(tmp_path):
  make_run(tmp_path / 'a', values=(0.0, 1.0, 2.0), steps=(10, 20, 30))
  make_run(tmp_path / 'b', seed=1, values=(4.0, 2.0), steps=(15, 25))
  curve = curves.learning_curves([tmp_path / '*'], points=3)['job']
  np.testing.assert_allclose(curve.x, [60, 80, 100])
  np.testing.assert_allclose(curve.mean, [2.25, 2.0, 1.75])
  # Of two runs, 95% of the resamples' means reach both of them.
  np.testing.assert_allclose(curve.low, [0.5, 1.0, 1.5])
  np.testing.assert_allclose(curve.high, [4.0, 3.0, 2.0])
  assert curve.runs == 2


def test_one_seed_is_just_the_line(tmp_path):
  make_run(tmp_path / 'a', values=(0.0, 3.0, 6.0), steps=(1, 2, 3))
  curve = curves.learning_curves([tmp_path / 'a'], x='step', smooth=2, points=3)
  curve = curve['job']
  np.testing.assert_allclose(curve.mean, [0.0, 1.5, 4.5])
  np.testing.assert_array_equal(curve.low, curve.mean)
  np.testing.assert_array_equal(curve.high, curve.mean)


def test_evaluations_are_paired_by_seed(tmp_path):
  scores = {0: (1.0, 2.0), 1: (5.0, 7.0), 2: (9.0, 12.0)}
  for seed, (alone, searched) in scores.items():
    rows = [('final', 0, alone), ('final', 16, searched)]
    make_run(tmp_path / f's{seed}', seed=seed, evaluation=rows)
  alone, searched = curves.aggregate_evaluations([tmp_path / '*'])
  assert alone[:5] == ('job', 'final', 'network', 0, 3)
  assert (alone.gain_mean, alone.gain_low, alone.gain_high) == (0, 0, 0)
  assert searched[:5] == ('job', 'final', 'puct', 16, 3)
  assert searched.return_mean == pytest.approx(7)
  # Gains 1, 2, 3: a narrow interval beside that of the returns.
  assert searched.gain_mean == pytest.approx(2)
  half = 4.302653 / math.sqrt(3)
  assert searched.gain_low == pytest.approx(2 - half, abs=1e-6)
  assert searched.gain_high == pytest.approx(2 + half, abs=1e-6)
  assert searched.return_high == pytest.approx(7 + 5 * half, abs=1e-5)


def test_final_score_is_the_most_searched_or_the_last_evaluation(tmp_path):
  rows = [('early', 64, 9.0), ('final', 0, 1.0), ('final', 16, 3.0)]
  played = make_run(tmp_path / 'a', evaluation=rows, env='Pong-v5')
  training = make_run(tmp_path / 'b', seed=1, env='Pong-v5', values=(0, 4.0))
  other = make_run(tmp_path / 'c', seed=2)
  assert curves.final_score(played) == 3.0
  assert curves.final_score(training) == 8.0
  scores = curves.scores_by_game(runs.find_runs([played, training, other]))
  assert scores == {'job': {'Pong': [3.0, 8.0]}}


@pytest.mark.parametrize(
  ('break_it', 'message'),
  [
    (lambda f: f.rename(f.parent / 'gone'), 'workdirs=.*run: there is none'),
    (lambda f: (f / 'config.json').unlink(), 'holds no run.s config.json'),
    (lambda f: (f / 'config.json').write_text('{}'), "no 'seed'"),
    (
      lambda f: (f / 'metrics.csv').write_text('step,loss\n1,2\n'),
      'no column decisions; there are step, loss',
    ),
    (lambda f: (f / 'metrics.csv').unlink(), 'metrics.csv: is missing'),
    (
      lambda f: (f / 'metrics.csv').write_text(
        'decisions,episode_return\n1,\n'
      ),
      'no row yet',
    ),
  ],
)
def test_errors_say_what_is_wrong(tmp_path, break_it, message):
  folder = make_run(tmp_path / 'run')
  break_it(folder)
  with pytest.raises(UserError, match=message):
    curves.learning_curves([folder])


def test_evaluation_errors(tmp_path):
  folder = make_run(tmp_path / 'run', evaluation=[('final', 4, 1.0)])
  with pytest.raises(UserError, match='final has no row of 0 simulations'):
    curves.aggregate_evaluations([folder])
  (folder / 'evaluation.csv').write_text('checkpoint,planner\nfinal,puct\n')
  with pytest.raises(UserError, match='return_mean'):
    curves.budget_figure(folder / 'evaluation.csv', tmp_path / 'x.png')
  with pytest.raises(UserError, match='no such file'):
    curves.budget_figure(tmp_path / 'none.csv', tmp_path / 'x.png')


def drawn(monkeypatch):
  """The figures that are saved, as matplotlib has them."""
  figures = []
  save = style.save
  monkeypatch.setattr(
    style,
    'save',
    lambda f, path, **kw: (figures.append(f), save(f, path, **kw)),
  )
  return figures


def test_budget_figure_shows_what_search_adds(tmp_path, monkeypatch):
  figures = drawn(monkeypatch)
  rows = [
    (which, n, base + n / 64)
    for which, base in (('early', 0.1), ('final', 0.5))
    for n in (0, 4, 16)
  ]
  folder = make_run(tmp_path / 'run', seed=3, evaluation=rows)
  curves.budget_figure(folder / 'evaluation.csv', tmp_path / 'a.png')
  curves.budget_figure(folder / 'evaluation.csv', tmp_path / 'b.png')
  (axes,) = figures[0].axes
  assert axes.get_title() == 'muzero on Catch-v0, seed 3'
  ticks = [text.get_text() for text in axes.get_xticklabels()]
  assert ticks == ['network\nalone', '4', '16']
  means = [bars[0].get_ydata().tolist() for bars in axes.containers]
  assert means == [[0.1, 0.1625, 0.35], [0.5, 0.5625, 0.75]]
  ends = axes.containers[0].lines[1]
  half = (ends[1].get_ydata() - ends[0].get_ydata()) / 2
  np.testing.assert_allclose(half, 1.96 * 0.05)
  levels = [y[0] for y in (li.get_ydata() for li in axes.lines) if len(y) == 2]
  assert sorted(levels) == [0.1, 0.5]
  legend = [text.get_text() for text in figures[0].legends[0].get_texts()]
  assert 'early network (after 500 updates), puct search' in legend
  assert 'final network without search: 0.5' in legend
  picture = (tmp_path / 'a.png').read_bytes()
  assert picture[:4] == b'\x89PNG' and len(picture) > 10_000
  assert picture == (tmp_path / 'b.png').read_bytes()


def test_budget_figure_of_the_network_alone(tmp_path, monkeypatch):
  figures = drawn(monkeypatch)
  folder = make_run(tmp_path / 'run', evaluation=[('final', 0, 1.0)])
  curves.budget_figure(folder / 'evaluation.csv', tmp_path / 'a.svg')
  (axes,) = figures[0].axes
  assert [t.get_text() for t in axes.get_xticklabels()] == ['network\nalone']
  assert (tmp_path / 'a.svg').stat().st_size > 1000


def test_launcher(tmp_path):
  for seed in (0, 1):
    make_run(
      tmp_path / f'runs/s{seed}',
      seed=seed,
      env='Pong-v5',
      values=(seed, seed + 2.0),
      evaluation=[('final', 0, 14.6), ('final', 8, 14.6 + seed)],
    )
  out = tmp_path / 'figures/curve.png'
  done = launch(
    'plots',
    f'--workdirs={tmp_path}/runs/s*',
    f'--out={out}',
    '--y=episode_return,eval_return',
  )
  assert 'mean of 1' in done.stdout and '1.014' in done.stdout
  for name in ('curve.png', 'curve_search.png'):
    assert (out.parent / name).stat().st_size > 10_000
  lines = out.with_suffix('.csv').read_text().splitlines()
  assert lines[0] == 'y,group,runs,decisions,mean,low,high'
  assert lines[1] == 'episode_return,job,2,40,0.5,0,1'
  assert lines[-1] == 'eval_return,job,2,84,5,4,6'
  searched = (out.parent / 'curve_search.csv').read_text().splitlines()
  assert searched[2].startswith('job,final,puct,8,2,15.1,')
  scores = (out.parent / 'curve_atari.csv').read_text().splitlines()
  assert scores[0] == 'game,runs,score,normalised,MuZero,EfficientZero'
  assert scores[1] == 'Pong,2,15.1,1.014,0.397,1.156'


def test_a_link_is_not_followed(tmp_path):
  (tmp_path / 'target').write_text('as it was')
  for name in ('a.png', 'a.csv'):
    (tmp_path / name).symlink_to(tmp_path / 'target')
  with pytest.raises(UserError, match=r'a\.png: is a link'):
    style.save(style.figure(2, 2), tmp_path / 'a.png')
  with pytest.raises(UserError, match=r'a\.csv: is a link'):
    tables.write_lines(tmp_path / 'a.csv', [('a', 1)])
  assert (tmp_path / 'target').read_text() == 'as it was'


def test_launcher_errors_are_one_line(tmp_path):
  assert refused('plots', f'--workdirs={tmp_path}/no_*') == (
    f'error: workdirs={tmp_path}/no_*: there is none; name folders of '
    'experiments.train\n'
  )


def test_one_seed_has_no_interval_and_counts_have_their_number():
  nan = float('nan')
  assert terminal.interval(0.5, nan, nan) == '0.500'
  assert terminal.interval(-0.5, -1, 0.25, '+.2f') == '-0.50 [-1.00, +0.25]'
  assert terminal.counted(1, 'run') == '1 run'
  assert terminal.counted(1_200, 'group') == '1,200 groups'
