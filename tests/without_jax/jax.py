"""Stands in the place of JAX where a launcher must not import it."""

raise ImportError('jax was imported before the flags were parsed')
