"""Optimizer and schedules as pure functions of the step."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from gatedfm.models.gate_predictor import GATE_MODULES
from gatedfm.trainers import schedules
from gatedfm.trainers.config import OptimizerConfig, SparsityConfig

_MOMENTUM, _RMS = 0.95, 0.2  # of Muon
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def is_gate(path: tuple) -> bool:
  """Whether a parameter path leads into a gate predictor."""
  return any(name in GATE_MODULES for name in _names(path))


def _names(path: tuple) -> list[str]:
  """The dictionary keys of a path; boxed parameters end in an attribute beside them."""
  return [k.key for k in path if hasattr(k, 'key')]


def learning_rate(cfg: OptimizerConfig, peak: float, steps: int) -> optax.Schedule:
  """Linear warm-up, then the configured decay; or cycles, which warm up themselves."""
  floor = peak * cfg.final_fraction
  in_steps = lambda x: max(round(x if x >= 1 else x * steps), 1)
  half = in_steps(cfg.half_cycle)
  every = in_steps(cfg.decay_every) if cfg.decay_every else None
  match cfg.schedule:
    case 'calr':
      return schedules.calr_schedule(peak, floor, half, cfg.decay, every)
    case 'released_calr':  # its floor is a power of the decay
      power = round(math.log(cfg.final_fraction, cfg.decay))
      return schedules.released_calr_schedule(peak, every, half, cfg.decay, power)
    case 'clr':
      return schedules.clr_schedule(peak, floor, half)
    case 'triangular2' | 'exp_range':
      return schedules.clr_schedule(peak, floor, half, cfg.schedule)
    case 'sgdr':
      return schedules.sgdr_schedule(peak, floor, 2 * half, steps)
  warmup = min(cfg.warmup, max(steps - 1, 1))
  if cfg.schedule == 'cosine':
    end = max(steps, warmup + 1)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, end, floor)
  if cfg.schedule == 'rsqrt':
    return lambda step: peak * jnp.minimum((step + 1) / warmup, jnp.sqrt(warmup / (step + 1)))
  return optax.linear_schedule(0.0, peak, warmup)


def make(
  cfg: OptimizerConfig, steps: int, dtype: str = 'float32', rate: float | None = None
) -> optax.GradientTransformation:
  """The optimizer of the model, and Adam with its own rate and no decay for gate predictors.

  Args:
    cfg: names it and its rates.
    steps: of the whole training, for the schedules.
    dtype: of the products inside Muon.
    rate: instead of the schedule's, for those who multiply by it themselves.
  """

  def decayed(params: Any) -> Any:
    keep = lambda path, _: _names(path)[-1].endswith(('kernel', 'embedding'))
    return jax.tree_util.tree_map_with_path(keep, params)

  rate = learning_rate(cfg, cfg.peak_lr, steps) if rate is None else rate
  adam = lambda **options: optax.adamw(rate, cfg.b1, cfg.b2, cfg.eps, **options)
  if cfg.name == 'muon':
    matrix = optax.chain(
      optax.trace(_MOMENTUM, nesterov=True),
      optax.stateless_with_tree_map(lambda x, _: orthogonalize(x, dtype)),
      optax.add_decayed_weights(cfg.weight_decay, decayed),
      optax.scale_by_learning_rate(rate),
    )
    other = adam(weight_decay=0.0, nesterov=True)
  elif cfg.name == 'tf1_adam':
    scale = scale_by_tf1_adam(cfg.b1, cfg.b2, cfg.eps)
    matrix = other = optax.chain(scale, optax.scale_by_learning_rate(rate))
  else:
    matrix = other = adam(weight_decay=cfg.weight_decay, mask=decayed)
  gates = optax.adam(learning_rate(cfg, cfg.gate_lr, steps), cfg.b1, cfg.b2, cfg.eps)
  parts = {'matrix': matrix, 'other': other, 'gates': gates}
  return optax.chain(optax.clip_by_global_norm(cfg.clip), optax.partition(parts, _kinds))


def _kinds(params: Any) -> Any:
  """`gates`, `matrix` (also where layers are stacked) or `other` of each parameter."""

  def kind(path: tuple, leaf: jax.Array) -> str:
    if is_gate(path):
      return 'gates'
    return 'matrix' if leaf.ndim - ('scan' in _names(path)) == 2 else 'other'

  return jax.tree_util.tree_map_with_path(kind, params)


def scale_by_tf1_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
  """Adam as TensorFlow 1 has it: eps beside the uncorrected root ("epsilon hat", Kingma and Ba).

  `sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps)`: of a large eps, steps are small at first.
  """

  def update(grads: Any, state: optax.ScaleByAdamState, params: Any = None) -> tuple[Any, Any]:
    mu = optax.tree.update_moment(grads, state.mu, b1, 1)
    nu = optax.tree.update_moment(grads, state.nu, b2, 2)
    count = state.count + 1
    scale = jnp.sqrt(1 - b2**count) / (1 - b1**count)
    updates = jax.tree.map(lambda m, v: scale * m / (jnp.sqrt(v) + eps), mu, nu)
    return updates, optax.ScaleByAdamState(count, mu, nu)

  return optax.GradientTransformation(optax.scale_by_adam(b1, b2).init, update)


def orthogonalize(x: jax.Array, dtype: str) -> jax.Array:
  """The matrix `[..., A, B]` with all singular values near 1, scaled to updates like Adam's.

  Newton-Schulz iterations of Muon (Jordan et al. 2024), three suffice after the "almost
  orthogonal" preconditioning of Turbo-Muon (Boissin et al. 2025), scaled to a root mean square
  of 0.2 (Liu et al. 2025), so that one learning rate suits Muon and Adam. `optax.contrib.muon`
  computes the same in float32 and with transposed operands, which costs a CPU four times as
  much.

  Args:
    x: momentum; leading axes hold matrices one by one.
    dtype: of the products' operands; sums are float32.
  """
  if x.ndim > 2:
    return jax.vmap(lambda y: orthogonalize(y, dtype))(x)
  scale = _RMS * max(x.shape) ** 0.5
  if x.shape[0] > x.shape[1]:
    return orthogonalize(x.T, dtype).T
  p, q, r = _NEWTON_SCHULZ

  def dot(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    a, b = a.astype(dtype), b.astype(dtype)
    return lax.dot_general(a, b, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)

  for i in range(3):
    square = dot(x, x, 1)
    if i == 0:
      s = lax.rsqrt(jnp.maximum(jnp.sum(jnp.abs(square), 1, keepdims=True), 1e-8))
      x, square = x * s, square * s * s.T
    x = p * x + dot(q * square + r * dot(square, square, 0), x, 0)
  return scale * x


def sparsity_schedule(cfg: SparsityConfig, steps: int, step: int) -> dict[str, np.ndarray]:
  """What the gate search depends on at `step`, as scalars for the train step.

  Handed over at every step and not compiled in, so that points of a sweep that differ in
  target or weight share one program.

  Returns: `target` (ramped), `temperature`, `weight` of the penalty, and `search`: False in
    the last, frozen part, where gates are decided by threshold and the predictor rests.
  """
  done = step / steps
  target = cfg.target * min(done / max(cfg.ramp, 1e-9), 1.0)
  searched = min(done / (1 - cfg.freeze), 1.0)
  tau = cfg.tau_start * (cfg.tau_end / cfg.tau_start) ** searched
  scalar = lambda x: np.asarray(x, np.float32)
  return {
    'target': scalar(target),
    'temperature': scalar(tau),
    'weight': scalar(cfg.weight),
    'search': np.asarray(done < 1 - cfg.freeze),
  }
