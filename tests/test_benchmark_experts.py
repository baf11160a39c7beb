"""The experts' benchmark: its rows, and what it compares."""

import jax
import numpy as np
import pytest

from experiments.benchmarks import cases, experts

CASE = cases.find('experts', quick=True, repeats=9)


def test_rows():
  rows = [row for some in experts.rows_here(CASE) for row in some]
  backends, seeds = rows[:4], rows[4:]
  assert [row.name for row in backends[1:]] == ['loop', 'capacity', 'ragged']
  assert [row.name for row in seeds] == ['one after the other', 'vmapped']
  for group in (backends, seeds):
    assert group[0].ratio == 1
    for row in group:
      assert row.ratio == pytest.approx(row.median / group[0].median)


def test_backends_do_the_same_work():
  inputs = experts.inputs(4, CASE)
  loop, ragged = (
    jax.jit(experts.gradient(backend))(*inputs)
    for backend in ('loop', 'ragged')
  )
  for a, b in zip(jax.tree.leaves(loop), jax.tree.leaves(ragged)):
    assert np.abs(a).max() > 0
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
