"""A conditional whose gradient costs nothing where it is closed.

Left to automatic differentiation, `lax.cond` hands whatever going backward needs out of its
branches: also copies of the parameters, which the closed branch writes as zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def cond(
  is_open: jax.Array, run: Callable[..., Any], skip: Callable[..., Any], *operands: Any
) -> Any:
  """`run(*operands)` where `is_open`, else `skip(*operands)`, as `lax.cond`.

  Derivatives are of reverse mode alone (`jax.grad`, `jax.vjp`), as of any `custom_vjp`.

  Going backward the open branch reads what it kept going forward, and its operands where they
  are. Whatever the branches differentiate must be an operand.

  Args:
    is_open: bool scalar.
    run, skip: branches of equal output shapes and types.
    operands: trees of arrays, and of Python values which stay as they are.
  """
  leaves, tree = jax.tree.flatten(operands)
  # Derivatives go to floats; keys, masks and positions have none.
  real = [isinstance(v, jax.Array | np.ndarray) for v in leaves]
  float_ = [r and jnp.issubdtype(v.dtype, jnp.inexact) for r, v in zip(real, leaves)]
  floats = [v for v, f in zip(leaves, float_) if f]
  others = [v for v, r, f in zip(leaves, real, float_) if r and not f]

  def whole(others: list, floats: tuple) -> Any:
    own, rest = iter(floats), iter(others)
    each = (next(own) if f else next(rest) if r else v for v, r, f in zip(leaves, real, float_))
    return jax.tree.unflatten(tree, each)

  on = lambda f: lambda others, *floats: f(*whole(others, floats))
  return _cond(on(run), on(skip))(is_open, others, *floats)


def _cond(run: Callable[..., Any], skip: Callable[..., Any]) -> Callable[..., Any]:
  """`cond` of branches `(others, *floats)`, with its derivative by `floats`."""

  @jax.custom_vjp
  def branch(is_open: jax.Array, others: list, *floats: jax.Array) -> Any:
    return lax.cond(is_open, run, skip, others, *floats)

  # How `run`'s pullback is put together again; of one tracing, and the same in all.
  made: dict[str, Any] = {}

  def opened(others: list, *floats: jax.Array) -> tuple[Any, list[jax.Array]]:
    y, pullback = jax.vjp(lambda *floats: run(others, *floats), *floats)
    parts, made['tree'] = jax.tree.flatten(pullback)
    inputs = [*others, *floats]
    place = lambda part: next((i for i, v in enumerate(inputs) if v is part), None)
    places = [place(part) for part in parts]
    assert made.setdefault('places', places) == places, 'one function, traced in two ways'
    return y, [part for part, i in zip(parts, made['places']) if i is None]

  def forward(is_open: jax.Array, others: list, *floats: jax.Array) -> tuple[Any, tuple]:
    kept = jax.eval_shape(opened, others, *floats)[1]
    nothing = lambda: [jnp.zeros(k.shape, k.dtype) for k in kept]
    closed = lambda others, *floats: (skip(others, *floats), nothing())
    y, kept = lax.cond(is_open, opened, closed, others, *floats)
    return y, (is_open, others, floats, kept)

  def backward(saved: tuple, dy: Any) -> tuple:
    def pull_open(others: list, floats: tuple, kept: list, dy: Any) -> tuple:
      inputs, own = [*others, *floats], iter(kept)
      parts = [next(own) if i is None else inputs[i] for i in made['places']]
      return jax.tree.unflatten(made['tree'], parts)(dy)

    def pull_closed(others: list, floats: tuple, kept: list, dy: Any) -> tuple:
      return jax.vjp(lambda *floats: skip(others, *floats), *floats)[1](dy)

    is_open, *rest = saved
    return None, None, *lax.cond(is_open, pull_open, pull_closed, *rest, dy)

  branch.defvjp(forward, backward)
  return branch
