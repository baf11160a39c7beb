# For the type checker alone. chex's own `Array` is a union with numpy scalars,
# which cannot be indexed, and what `chex.dataclass` makes has no constructor
# that a checker sees: without this, right code is reported, mctx's included.
from typing import Any

Array = Any
ArrayTree = Any
Numeric = Any
PRNGKey = Any

def __getattr__(name: str) -> Any: ...
