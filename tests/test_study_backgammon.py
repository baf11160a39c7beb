"""The study of backgammon: its rows, what it refuses, what it draws."""

import importlib.util

import jax
import numpy as np
import pytest

from experiments import build
from experiments.files import tables
from experiments.files.errors import UserError
from experiments.playing import gnubg, match, planners, players
from experiments.runtime import checkpoint, run_config
from experiments.studies import backgammon_players, equity


def _row(**changes):
  row = backgammon_players.Points(40, 0, 'lookahead=1', 'pubeval', 8, 0.5, 0.1)
  return row._replace(**changes)


def _plan(**changes):
  players = ('lookahead=1', 'lookahead=2')
  plan = backgammon_players.Plan(players, ('judge', 'pubeval'), 8, 20, 1)
  return plan._replace(**changes)


def test_rows_are_read_as_written(tmp_path):
  rows = [
    _row(score=0.5, evaluations=512, ms_per_decision=0.25),
    _row(hidden=None, seed=None, opponent='judge', gain=0.0, gain_se=0.0),
  ]
  path = tmp_path / 'rows.csv'
  tables.write_records(path, rows, digits=5)
  assert tables.read_records(path, backgammon_players.Points) == rows


@pytest.mark.parametrize(
  'plan, row, message',
  [
    ({'games': 7}, {}, 'games=7: must be even'),
    ({'games': 10}, {}, 'games=10: the results hold rows with games=8; set'),
    (
      {},
      {'opponent': 'judge', 'games': 30, 'plies': 1},
      'positions=20: the results hold rows with positions=30; set',
    ),
    (
      {'plies': 2},
      {'opponent': 'judge', 'games': 20, 'plies': 1},
      'plies=2: the results hold rows with plies=1; set plies=1',
    ),
  ],
)
def test_what_was_played_otherwise_is_refused(plan, row, message):
  with pytest.raises(UserError, match=message):
    backgammon_players._check([_row(**row)], _plan(**plan))
  backgammon_players._check([_row(opponent='else', games=3)], _plan())


def test_runs_are_found_by_size_and_seed(tmp_path):
  for name in ('hidden_80_s0', 'hidden_40_s1', 'hidden_40_s0', 'other_s0'):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'evaluation.csv').touch()
  (tmp_path / 'hidden_40_s2' / 'final').mkdir(parents=True)
  found = backgammon_players.finished(tmp_path)
  assert list(found) == [(40, 0), (40, 1), (80, 0)]
  assert found[80, 0].endswith('hidden_80_s0')


def test_losses_are_compared_in_the_same_turns():
  first = gnubg.Loss(np.array([0.3, 0.0, 0.6]))
  row = equity.compare('x', gnubg.Loss(np.array([0.1, 0.0, 0.2])), first)
  assert (row.player, row.positions) == ('x', 3)
  np.testing.assert_allclose([row.loss, row.less], [0.1, 0.2])
  np.testing.assert_allclose([row.loss_se, row.less_se], [0.0577, 0.1155], 1e-3)


def test_means_are_over_seeds_and_drawn(tmp_path):
  rows = [
    *(_row(seed=seed, points=float(seed)) for seed in range(3)),
    *(_row(hidden=80, opponent=name) for name in ('judge', 'pubeval')),
    _row(hidden=None, seed=None, player='pubeval', opponent='judge'),
  ]
  first, *_, last = backgammon_players.means(rows)
  assert (first.points, first.seeds) == (1.0, 3)
  np.testing.assert_allclose(first.points_se, 1 / 3**0.5)
  # One seed has the error of its games.
  assert (last.hidden, last.points_se, last.seeds) == (None, 0.1, 1)
  out = tmp_path / 'figure.png'
  backgammon_players.draw(rows, out)
  assert out.read_bytes().startswith(b'\x89PNG')


def _saved(folder, hidden):
  experiment = build.describe('td_gammon', settings=[f'hidden={hidden}'])
  workdir = folder / f'hidden_{hidden}_s0'
  run_config.write_run_config(workdir, experiment.as_dict(), 'cpu')
  env = build.make_env(experiment, training=False, num_envs=1)
  agent = build.make_agent(experiment, env.spec)
  keeper = checkpoint.open(workdir / 'final', keep=1)
  keeper.save(0, jax.jit(agent.init)(jax.random.key(hidden)).params)
  keeper.close()
  (workdir / 'evaluation.csv').touch()
  return env.spec.game


def _judged_turns(game, number):
  """By a judge whose favourite is the last of a turn's boards."""
  starts = match.openings(game, number, 4)
  boards = np.asarray(jax.jit(jax.vmap(game.candidates))(starts))
  judged = []
  for row in range(number):
    after = np.unique(boards[row], axis=0)
    equity_of = np.linspace(-1, 0, len(after))
    state = starts.board[row], starts.dice[row]
    judged.append(gnubg.Judged(*map(np.asarray, state), after, equity_of))
  return judged


def test_a_study_goes_on_where_it_was(tmp_path, monkeypatch):
  """Networks of two sizes, a judge and an opponent that need no library."""
  games = [_saved(tmp_path, hidden) for hidden in (2, 3)]
  game = games[0]
  judged = _judged_turns(game, 12)
  stranger = players.make('x', planners.parse('random'), None, None, game)
  monkeypatch.setattr(
    backgammon_players.equity, 'judged_turns', lambda positions, plies: judged
  )
  known = {n: stranger._replace(name=n) for n in backgammon_players.OUTSIDERS}
  monkeypatch.setattr(
    backgammon_players.arena, 'other_players', lambda game: known.get
  )
  workdirs = backgammon_players.finished(tmp_path)
  plan = _plan(players=('lookahead=1',), games=4, positions=12)
  out = tmp_path / 'rows.csv'
  first = backgammon_players.run(
    workdirs, plan._replace(opponents=('judge',)), out
  )
  assert [(r.hidden, r.player) for r in first] == [
    *((None, name) for name in backgammon_players.OUTSIDERS),
    (2, 'lookahead=1'),
    (3, 'lookahead=1'),
  ]
  assert all(r.games == 12 and r.points > 0 and r.plies == 1 for r in first)
  # What is compared with itself gains nothing.
  assert [r.gain for r in first] == [None, None, 0.0, 0.0]
  assert first[2].points != first[3].points
  monkeypatch.setattr(backgammon_players, '_losses', None)  # nothing is judged
  rows = backgammon_players.run(workdirs, plan, out)
  read = lambda: tables.read_records(out, backgammon_players.Points)
  assert rows[:4] == read()[:4]
  assert [(r.hidden, r.opponent, r.games) for r in rows[4:]] == [
    (2, 'pubeval', 4),
    (3, 'pubeval', 4),
  ]
  assert all(abs(r.points) <= 3 and r.points_se >= 0 for r in rows[4:])
  assert backgammon_players.run(workdirs, plan, out) == read()


@pytest.mark.skipif(
  importlib.util.find_spec('gnubg_nn') is None, reason='needs gnubg-nn'
)
def test_a_player_without_a_network_is_judged():
  judged = equity.judged_turns(6, 0)
  row = backgammon_players.outsider(gnubg.player('gnubg=0'), judged)
  # Its own choices are what the judge, as deep as it, likes best.
  assert (row.player, row.opponent, row.games) == ('gnubg=0', 'judge', 6)
  assert row.points < 1e-5
  row = backgammon_players.outsider(gnubg.player('pubeval'), judged)
  assert row.points >= 0 and row.hidden is None
