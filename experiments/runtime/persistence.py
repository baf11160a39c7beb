"""What a checkpoint keeps of a source or a replay, and how it comes back."""

from collections.abc import Callable
from typing import Any, NamedTuple

from experiments.files.arrays import Stored


class Held(NamedTuple):
  """What this process alone saves, in the place of a source's arrays.

  Attributes:
    parts: `(arrays, facts)` of each part by the name of its folder.
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
  """How a state is kept that is not saved as it is.

  Attributes:
    save: `(state, directory, step) -> (arrays, facts)`: a pytree of arrays, or
      `Held`; a dict that JSON can hold; and large data appended to files in the
      directory, which `rows` of the facts names.
    load: `(arrays, facts, directory, key) -> state`, the inverse; raises
      `Damaged` where rows are not as they were written.
    template: `() -> arrays`, of the shapes that `save` returns.
    prune: `(directory, list of rows)`: drops files that none of them names;
      None where there are no files.
    restart: `(state, step) -> state`: simulators on the host start afresh from
      a seed derived from the step; None where all state is in the pytree.
    close: `(state) -> None`, stops threads and simulators; None without.
  """

  save: Callable[..., Any]
  load: Callable[..., Any]
  template: Callable[[], Any]
  prune: Callable[..., None] | None = None
  restart: Callable[..., Any] | None = None
  close: Callable[[Any], None] | None = None
