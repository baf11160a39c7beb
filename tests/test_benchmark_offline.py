"""The offline benchmark: operations by hand, data not copied, one small run."""

import math

import pytest

from experiments.benchmarks import cases, offline, roofline

WIDTH, BATCH, CASE = 8, 16, cases.find('offline', quick=True)


@pytest.fixture(scope='module')
def program():
  hidden, data = (WIDTH,) * 3, offline._made_up(CASE.rows)
  return offline._program('atac', hidden, BATCH, CASE, data)


def test_operations_of_atac_by_hand(program):
  behind = 2 * WIDTH**2
  policy, critic = 11 * WIDTH + behind + 6 * WIDTH, 14 * WIDTH + behind + WIDTH
  # Of the weights' gradients as many, of the inputs' without the first layer's.
  both = 2 * policy + policy + behind + 6 * WIDTH
  targets, actor = 2 * critic, 2 * critic
  critics = 2 * 3 * (2 * critic + behind + WIDTH)
  total = 2 * BATCH * (both + targets + critics + actor)
  assert program.flops == total


def test_the_data_set_is_no_part_of_the_program(program):
  more = offline._made_up(10 * CASE.rows)
  case = CASE._replace(rows=10 * CASE.rows)
  other = offline._program('atac', (WIDTH,) * 3, BATCH, case, more)
  assert other.temporaries == program.temporaries > 0
  assert other.state == program.state


@pytest.mark.slow
def test_rows():
  assert cases.find('offline', quick=True, repeats=9) == CASE
  rows = [row for some in offline.rows_here(CASE) for row in some]
  found = {(row.what, row.name, row.unit): row for row in rows}
  assert len(found) == len(rows)
  speed = found['offline', 'atac', 'updates/s']
  share = found['offline', 'atac', 'GFLOP/s']
  limit = found['offline', 'matrix product 48 x 8 x 8', 'GFLOP/s']
  assert share.setting == speed.setting == '3x8 batch=16'
  # The share is that of the medians of rates.
  assert share.ratio == pytest.approx(share.median / limit.median)
  assert share.median / speed.median == pytest.approx(
    found['offline', 'atac', 'GFLOP/s'].low / speed.low
  )
  small = {'atac, one seed', 'atac, 2 seeds', 'td3_bc'}
  assert small < {name for _, name, _ in found}
  data = found['memory', 'atac, data set', 'MB']
  assert data.median == 4 * CASE.rows * (2 * 11 + 3 + 2) / 1e6
  if not math.isnan(roofline.memory_in_use()[0]):
    growth = found['memory', 'atac, growth while training', 'MB']
    assert 0 <= growth.median < 100
