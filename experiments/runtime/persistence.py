"""How a source or a replay is saved in a checkpoint and restored."""

from collections.abc import Callable
from typing import Any, NamedTuple

from experiments.files.arrays import Stored


class Held(NamedTuple):
  """What this process alone saves, in place of a source's arrays.

  `parts` maps folders' names to `(arrays, facts)`.
  """

  parts: dict[str, tuple[Any, dict[str, Any]]]

  def rows(self) -> dict[str, Stored]:
    """The files of rows of all parts."""
    return {
      f'{name}/{file}': Stored(*must_be)
      for name, (_, facts) in self.parts.items()
      for file, must_be in facts.get('rows', {}).items()
    }


class Persistence(NamedTuple):
  """How a state is saved that is not saved as it is.

  Attributes:
    save: `(state, directory, step) -> (arrays, facts)`: a pytree of arrays, or
      `Held`; a dict of JSON types. Large data is appended to files in the
      directory, named by the facts' `rows`.
    load: `(arrays, facts, directory, key) -> state`, the inverse; raises
      `Damaged` if rows are not as they were written.
    template: `() -> arrays`, of the shapes that `save` returns.
    prune: `(directory, list of rows)`: deletes files that none of them names;
      None if there are no files.
    restart: `(state, step) -> state`: host simulators start afresh from a seed
      derived from the step; None if all state is in the pytree.
    close: `(state) -> None`, stops threads and simulators; None if there are
      none.
  """

  save: Callable[..., Any]
  load: Callable[..., Any]
  template: Callable[[], Any]
  prune: Callable[..., None] | None = None
  restart: Callable[..., Any] | None = None
  close: Callable[[Any], None] | None = None
