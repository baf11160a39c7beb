"""Counts the floating-point operations of a program from its jaxpr."""

import math
from typing import Any


def matmul_flops(jaxpr: Any) -> int:
  """Operations of all matrix products and convolutions of a jaxpr.

  A multiplication and an addition are two. Loops count as often as they turn
  (XLA's own analysis counts them once), of branches the most expensive.
  Element-wise work is left out; zeros of padding count as work.

  Raises:
    ValueError: a loop of unknown length holds matrix products.
  """
  jaxpr = getattr(jaxpr, 'jaxpr', jaxpr)
  total = 0
  for equation in jaxpr.eqns:
    name, params = equation.primitive.name, equation.params
    if name in ('dot_general', 'conv_general_dilated'):
      total += product_flops(equation)
      continue
    inner = [matmul_flops(j) for v in params.values() for j in jaxprs(v)]
    if name == 'while' and any(inner):
      raise ValueError('a while loop with matrix products: its length is open')
    if name == 'scan':
      inner = [n * params['length'] for n in inner]
    total += max(inner, default=0) if name == 'cond' else sum(inner)
  return total


def product_flops(equation: Any) -> int:
  """Operations of one `dot_general` or `conv_general_dilated` of a jaxpr."""
  output = math.prod(equation.outvars[0].aval.shape)
  left, right = (v.aval.shape for v in equation.invars[:2])
  params = equation.params
  if equation.primitive.name == 'dot_general':
    (contracted, _), _ = params['dimension_numbers']
    return 2 * output * math.prod(left[i] for i in contracted)
  features = right[params['dimension_numbers'].rhs_spec[0]]
  # Zeros that a stride's gradient puts between the numbers are not work.
  spread = math.prod(params['lhs_dilation'])
  return 2 * output * math.prod(right) // features // spread


def jaxprs(value: Any) -> list[Any]:
  """Programs in a parameter of an equation."""
  if isinstance(value, tuple | list):
    return [j for v in value for j in jaxprs(v)]
  return [value] if hasattr(getattr(value, 'jaxpr', value), 'eqns') else []
