"""Optimizer and schedules as pure functions of the step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gatedfm.models.gate_predictor import GATE_MODULES
from gatedfm.trainers.config import OptimizerConfig, SparsityConfig


def is_gate(path: tuple) -> bool:
  """Whether a parameter path leads into a gate predictor."""
  return any(name in GATE_MODULES for name in _names(path))


def _names(path: tuple) -> list[str]:
  """The dictionary keys of a path; boxed parameters end in an attribute beside them."""
  return [k.key for k in path if hasattr(k, 'key')]


def learning_rate(cfg: OptimizerConfig, peak: float, steps: int) -> optax.Schedule:
  """Linear warm-up, then the configured decay."""
  warmup = min(cfg.warmup, max(steps - 1, 1))
  if cfg.schedule == 'cosine':
    end = max(steps, warmup + 1)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, end, peak * cfg.final_fraction)
  if cfg.schedule == 'rsqrt':
    return lambda step: peak * jnp.minimum((step + 1) / warmup, jnp.sqrt(warmup / (step + 1)))
  return optax.linear_schedule(0.0, peak, warmup)


def make(cfg: OptimizerConfig, steps: int) -> optax.GradientTransformation:
  """The optimizer of the model, and Adam with its own rate and no decay for gate predictors."""

  def decayed(params: Any) -> Any:
    keep = lambda path, _: _names(path)[-1].endswith(('kernel', 'embedding'))
    return jax.tree_util.tree_map_with_path(keep, params)

  rate = learning_rate(cfg, cfg.peak_lr, steps)
  if cfg.name == 'muon':
    model = optax.contrib.muon(
      rate,
      # Turbo-Muon (Boissin et al. 2025): better conditioned, so that fewer iterations will do.
      preconditioning='aol',
      ns_steps=3,
      adam_b1=cfg.b1,
      adam_b2=cfg.b2,
      eps=cfg.eps,
      weight_decay=cfg.weight_decay,
      weight_decay_mask=decayed,
      # Updates as large as Adam's, so that one learning rate suits both.
      consistent_rms=0.2,
      muon_weight_dimension_numbers=_matrices,
    )
  else:
    model = optax.adamw(rate, cfg.b1, cfg.b2, cfg.eps, weight_decay=cfg.weight_decay, mask=decayed)
  gates = optax.adam(learning_rate(cfg, cfg.gate_lr, steps), cfg.b1, cfg.b2, cfg.eps)
  label = lambda params: jax.tree_util.tree_map_with_path(
    lambda path, _: 'gates' if is_gate(path) else 'model', params
  )
  return optax.chain(
    optax.clip_by_global_norm(cfg.clip),
    optax.partition({'model': model, 'gates': gates}, label),
  )


def _matrices(params: Any) -> Any:
  """Which parameters Muon orthogonalises: matrices, one by one where layers are stacked."""

  def axes(path: tuple, leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
    stacked = 'scan' in _names(path)
    if leaf.ndim - stacked != 2:
      return None
    return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)

  return jax.tree_util.tree_map_with_path(axes, params)


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
