"""gatedfm: prune foundation models by context, by importance and by rank, in JAX and Flax."""

__version__ = '0.1.0'
