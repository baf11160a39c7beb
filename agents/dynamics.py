"""Dynamics: a probabilistic ensemble that learns how an environment moves.

Members predict a normal of the observation's change, the chance of termination,
and a normal of the reward in either case, and minimise (PETS, Chua et al. 2018;
MOPO, Yu et al. 2020, Appendix D; COMBO, Yu et al. 2021)

  mean_j [(y_j - mu_j)^2 / var_j + log var_j] + CE(termination)
    + weight decay + 0.01 sum (max log var - min log var)

over all members together. The elites, those with the least loss on rows held
out, are those that `rollout.predict`, `rollout.imagine` and planners use.

Departures and choices:

* The split is not stored: a hash of a row decides whether it is held out, and
  how often each member's bootstrap has drawn it (Poisson(1), Oza and Russell
  2001), the same every time that the row is drawn.
* Elites are chosen at every update, by a running mean of held-out losses (the
  loss above and not the squared error), and training has a fixed length: the
  official code stops when the held-out loss stops falling and restores each
  member's best parameters.
* Terminations are learned, and `make_networks(known=...)` takes a rule where
  there is one; MOPO and COMBO are given each task's.
* Termination and reward have networks of their own, and the reward has two
  normals, of a step that goes on and of one that ends (`networks/ensemble.py`).
* Observations and their changes are scaled by the data set's deviations (the
  official code scales inputs only), the bounds of log var are each member's
  own, and one weight decay serves all layers (2.5e-5 to 1e-4 in the paper).

The code is in `agents/core/dynamics.py`, because COMBO trains the ensemble too
and no agent imports another.
"""

from agents.core.dynamics import (
  Config,
  Losses,
  State,
  make,
  make_losses,
  make_networks,
)
from agents.core.rollout import ModelParams as Params

__all__ = [
  'Config',
  'Losses',
  'Params',
  'State',
  'make',
  'make_losses',
  'make_networks',
]
