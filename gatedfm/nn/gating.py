"""Running a module under its gate, and predicting gates from the context.

Letters: B batch, N layers, M modules of a stack, E context width, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from gatedfm.nn import branching, layers

EXECUTIONS = ('mask', 'skip', 'bucketed')
# Steps in which `bucketed` rounds up the examples of a batch that open a module.
CAPACITIES = 4


@flax.struct.dataclass
class Context:
  """What a gate predictor may read beside speech, and how it decides.

  Attributes:
    language: `[B]` ids, 0 = unknown.
    task: `[B]` ids.
    temperature: tau of the Gumbel-Softmax.
    sample: True samples gates straight-through (needs the `gates` PRNG); False thresholds.
    search: under `sample`, a bool scalar that can still choose the threshold, without
      another compilation.
  """

  language: jax.Array
  task: jax.Array
  temperature: jax.Array | float = 1.0
  search: jax.Array | bool = True
  sample: bool = flax.struct.field(pytree_node=False, default=False)


@jax.custom_batching.custom_vmap
def _is_open(gate: jax.Array) -> jax.Array:
  return gate > 0


@_is_open.def_vmap
def _refuse(axis_size: int, batched: list[bool], gate: jax.Array) -> tuple[jax.Array, bool]:
  if batched[0]:
    raise ValueError(
      'vmap over gates would run both branches of every module, with its parameters copied for '
      "each example: group examples by gate pattern, use jax.lax.map, or execution='mask'"
    )
  return gate > 0, False


def unit_gates(gates: Mapping[str, jax.Array], name: str) -> jax.Array | None:
  """Gates of a layer's heads or channels, `[1 or B, U]`; None where the site is not gated."""
  return jnp.atleast_2d(gates[name]) if name in gates else None


def under_gate(
  execution: str,
  gate: jax.Array | bool | None,
  module: nn.Module,
  run: Callable[..., Any],
  skip: Callable[..., Any],
  *operands: Any,
) -> Any:
  """`run(module, *operands)`, or with a closed gate `skip(module, *operands)`.

  Args:
    execution: `mask` always runs; `skip` branches with `lax.cond`, so that a closed gate
      costs nothing; any gate above 0 counts as open. `bucketed` runs where any example's gate
      is open, and what it runs must be multiplied by the gates (`scale`).
    gate: None (no gate), a scalar, or one value per example (several examples: not `skip`). A
      Python bool is decided while tracing, whatever the execution: what is closed is not even
      in the program.
    module: the module whose parameters the branches may use, and no other's.
    run, skip: branches of equal output shapes and types. What they read beside the module
      stands among the operands.

  Raises:
    ValueError: an unknown execution, or gates that differ by example under `skip`, whether as
      an array or through `vmap`.
  """
  if execution not in EXECUTIONS:
    raise ValueError(f'execution {execution!r} is not one of {EXECUTIONS}')
  if isinstance(gate, bool):
    return run(module, *operands) if gate else skip(module, *operands)
  if gate is None or execution == 'mask' or module.is_initializing():
    return run(module, *operands)
  if execution == 'skip' and gate.size > 1:
    raise ValueError(
      f'skip needs one gate for the whole batch, got one of shape {gate.shape}; '
      "run one utterance (or one gate pattern) at a time, or use execution='bucketed'"
    )
  # Only this module's parameters go into the branches, so only they are operands.
  pure, variables = module.clone(parent=None), module.variables
  rngs = {name: module.make_rng(name) for name in ('dropout',) if module.has_rng(name)}
  call = lambda branch: (
    lambda variables, rngs, *operands: nn.apply(branch, pure)(variables, *operands, rngs=rngs)
  )
  largest = jnp.max(gate) if gate.size > 1 else gate.reshape(())
  is_open = _is_open(lax.stop_gradient(largest))
  return branching.cond(is_open, call(run), call(skip), variables, rngs, *operands)


def scale(execution: str, gate: jax.Array | bool | None, y: jax.Array) -> jax.Array:
  """`gate * y` with the gate over leading axes; under `skip` y, which an open gate let run.

  To multiply by an open gate would cost `skip` an operation or two per module.
  """
  if gate is None or isinstance(gate, bool) or execution == 'skip':
    return y
  return gate.astype(y.dtype).reshape(gate.shape + (1,) * (y.ndim - gate.ndim)) * y


def add_gated(
  execution: str,
  gate: jax.Array | bool | None,
  module: nn.Module,
  total: jax.Array,
  x: jax.Array,
  *args: Any,
) -> jax.Array:
  """`total + gate * module(x, *args)`, all of one shape.

  The sum belongs to the branch: a closed gate hands `total` on and costs no addition either.
  Under `bucketed` the module runs for the examples alone whose gates are open; it must treat
  examples apart, and arrays of `args` whose leading axis is the batch's are theirs. Examples are
  picked from the whole batch: where devices share it, they exchange them, unless each runs its
  own part (`jax.shard_map`).
  """
  close = lambda m, total, *rest: total
  if _gathers(execution, gate, x) and not module.is_initializing():
    level, branches = _by_capacity(gate, args)
    return nn.switch(level, [close, *branches], module, total, x)
  run = lambda m, total, gate, x, *args: total + scale(execution, gate, m(x, *args))
  return under_gate(execution, gate, module, run, close, total, gate, x, *args)


def _gathers(execution: str, gate: jax.Array | bool | None, x: jax.Array) -> bool:
  """Whether to pick examples: a product of single rows would read its matrix all the same."""
  apart = not isinstance(gate, bool) and gate is not None and gate.size > 1
  return execution == 'bucketed' and apart and x.shape[1] > 1


def _by_capacity(gate_B: jax.Array, args: tuple) -> tuple[jax.Array, list[Callable[..., Any]]]:
  """Which branch fits the open examples, 0 where there are none, and the branches from 1 on."""
  batch = gate_B.size
  capacities = sorted({-(-batch * i // CAPACITIES) for i in range(1, CAPACITIES + 1)})
  is_open_B = _is_open(lax.stop_gradient(gate_B))
  open_first_B = jnp.argsort(~is_open_B, stable=True)
  level = jnp.searchsorted(jnp.array([0, *capacities]), jnp.sum(is_open_B))

  def branch(rows: int) -> Callable[..., jax.Array]:
    at = open_first_B[:rows]
    pick = lambda a: a[at] if getattr(a, 'shape', ())[:1] == (batch,) else a

    def run(m: nn.Module, total: jax.Array, x: jax.Array) -> jax.Array:
      if rows == batch:
        return total + scale('bucketed', gate_B, m(x, *args))
      y = scale('bucketed', gate_B[at], m(x[at], *map(pick, args)))
      return total.at[at].add(y, unique_indices=True)

    return run

  return level, [branch(rows) for rows in capacities]


def straight_through_gumbel(
  logits: jax.Array, temperature: jax.Array | float, key: jax.Array
) -> jax.Array:
  """Hard keep/drop samples with the soft sample's gradient.

  `y = softmax((logits + Gumbel) / tau); g = onehot(argmax y) + (y - stop_gradient(y))`.

  Args:
    logits: `[..., 2]`, (drop, keep).
    temperature: tau.
    key: PRNG key.

  Returns: `[...]`, the keep column, 0 or 1 going forward.
  """
  noise = jax.random.gumbel(key, logits.shape, logits.dtype)
  soft = jax.nn.softmax((logits + noise) / temperature)
  hard = jax.nn.one_hot(jnp.argmax(soft, -1), 2, dtype=soft.dtype)
  # The difference first, which is exactly 0: `hard + soft` would round, and 1 become 0.99999994.
  return (hard + (soft - jax.lax.stop_gradient(soft)))[..., 1]


class ContextEmbedding(nn.Module):
  """Embeds language and task and joins them with pooled speech: `[B, E]`.

  Algorithm 1 concatenates; the author's page says "added to the input": `combine` offers
  both. With an empty context the output is a constant, which makes the predictor a learned
  static mask.

  Attributes:
    context: any subset of speech, language, task.
    combine: `concat` or `add`.
    languages, tasks: vocabulary sizes (language 0 is "unknown").
    features: width of each embedding; under `add`, the pooled speech's width is used.
  """

  context: tuple[str, ...]
  combine: str
  languages: int
  tasks: int
  features: int

  @nn.compact
  def __call__(self, pooled_BxD: jax.Array, context: Context) -> jax.Array:
    width = pooled_BxD.shape[-1] if self.combine == 'add' else self.features
    init = nn.initializers.normal(1.0 if self.combine == 'concat' else 0.02)
    parts = []
    for name, size, ids in (
      ('language', self.languages, context.language),
      ('task', self.tasks, context.task),
    ):
      if name in self.context:
        table = layers.param(self, name, init, ('small', 'small'), (size, width))
        parts.append(table[ids])
    if 'speech' in self.context:
      # Unit scale, so that neither half drowns the other.
      parts.append(layers.LayerNorm(name='norm')(pooled_BxD))
    if not parts:
      return jnp.ones((pooled_BxD.shape[0], 1))
    return sum(parts) if self.combine == 'add' else jnp.concatenate(parts, -1)


class GateMlp(nn.Module):
  """The predictor's network G: `[B, E] -> [B, gates, 2]` logits (drop, keep).

  Attributes:
    gates: how many decisions.
    hidden: widths of the hidden layers (I3D: one of 32).
    open_bias: initial keep-minus-drop logit, so that training starts from the dense model.
  """

  gates: int
  hidden: Sequence[int]
  open_bias: float

  @nn.compact
  def __call__(self, x_BxE: jax.Array) -> jax.Array:
    x = x_BxE
    for i, width in enumerate(self.hidden):
      x = jax.nn.relu(layers.Linear(width, ('small', 'small'), name=f'hidden_{i}')(x))
    init = nn.initializers.normal(0.01)
    kernel = layers.param(self, 'kernel', init, ('small', 'small'), (x.shape[-1], self.gates * 2))
    start = lambda key, shape: jnp.tile(jnp.array([0.0, self.open_bias]), shape[0] // 2)
    bias = layers.param(self, 'bias', start, ('small',), (self.gates * 2,))
    return (x @ kernel + bias).reshape(-1, self.gates, 2)


def decide(
  logits: jax.Array, threshold: float, context: Context, key: jax.Array | None
) -> jax.Array:
  """Gates from logits `[..., 2]`, (drop, keep): sampled with a key, else by threshold.

  By threshold a module runs if its keep probability exceeds `threshold`; 0.5 is the argmax.
  """
  # `softmax(logits)[1] > threshold` in one comparison.
  log_odds = logits[..., 1] - logits[..., 0]
  fixed = (log_odds > jnp.log(threshold) - jnp.log1p(-threshold)).astype(logits.dtype)
  if key is None:
    return fixed
  sampled = straight_through_gumbel(logits, context.temperature, key)
  return jnp.where(context.search, sampled, fixed)


def masked_mean(x_BxTxD: jax.Array, mask_BxT: jax.Array) -> jax.Array:
  """Mean over the frames that `mask` keeps, `[B, D]` float32; zeros where it keeps none."""
  weight = mask_BxT[..., None].astype(jnp.float32)
  total = jnp.sum(x_BxTxD.astype(jnp.float32) * weight, 1)
  return total / jnp.maximum(jnp.sum(weight, 1), 1.0)
