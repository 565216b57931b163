"""Train state, loss, and the compiled train and evaluation steps.

Letters: B batch, T frames, M mel bands, L tokens, U CTC labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from gatedfm import compiling
from gatedfm import gates as gates_lib
from gatedfm.data.features import FeatureStats
from gatedfm.models import speech_costs
from gatedfm.models.speech import Output, SpeechModel
from gatedfm.models.speech_config import SpeechConfig
from gatedfm.nn import gating, low_rank
from gatedfm.trainers import augment, losses, optimizer
from gatedfm.trainers.config import TrainConfig

Batch = dict[str, jax.Array]
Means = dict[str, tuple[jax.Array, jax.Array]]  # and of how many


@flax.struct.dataclass
class TrainState:
  """All that a step changes: step count, float32 parameters, optimizer state."""

  step: jax.Array
  params: Any
  opt_state: Any


def init_params(cfg: SpeechConfig, key: jax.Array) -> Any:
  """Boxed parameters (with logical axis names) of `SpeechModel(cfg)`."""
  context = gating.Context(jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32))
  features = jnp.zeros((1, 32, cfg.mels))
  tokens = jnp.zeros((1, 2), jnp.int32)
  made = SpeechModel(cfg).init(key, features, jnp.array([32]), tokens, context)['params']
  return low_rank.with_factors(made, cfg.ranks, key)


def make_init(cfg: TrainConfig) -> Callable[[jax.Array], TrainState]:
  """`key -> TrainState` with boxed parameters, for shardings and jit."""
  tx = optimizer.make(cfg.optimizer, cfg.steps, cfg.model.dtype)

  def init(key: jax.Array) -> TrainState:
    params = init_params(cfg.model, key)
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))

  return init


class Objective:
  """The loss of a configuration: features in, scalar and metrics out.

  Args:
    cfg: loss, augmentation, sparsity, model.
    stats: normalisation of the features (global MVN).
  """

  def __init__(self, cfg: TrainConfig, stats: FeatureStats):
    self.cfg = cfg
    self.model = SpeechModel(cfg.model)
    self.mean, self.std = jnp.asarray(stats.mean), jnp.asarray(stats.std)
    # Two seconds of speech stand for the relative MACs of modules in the penalty.
    self.costs = speech_costs.site_costs(cfg.model, frames=200, tokens=12)

  def __call__(
    self, params: Any, batch: Batch, gating_now: dict[str, jax.Array], key: jax.Array | None
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss per utterance and its parts: arguments of `means`; scalar loss, metrics (scalars)."""
    means = self.means(params, batch, gating_now, key)
    metrics = self.metrics({name: mean for name, (mean, _) in means.items()}, gating_now)
    return metrics['loss'], metrics

  def means(
    self, params: Any, batch: Batch, gating_now: dict[str, jax.Array], key: jax.Array | None
  ) -> Means:
    """What a batch says of the metrics, so that batches can be taken together.

    Args:
      params: model parameters.
      batch: as `gatedfm.data.pipeline` makes it.
      gating_now: `optimizer.sparsity_schedule` of this step.
      key: PRNG key; None evaluates: no dropout, no augmentation, gates by threshold.

    Returns: {name: (mean, number of utterances or tokens that it is the mean of)}, scalars.
    """
    cfg = self.cfg
    x_BxTxM = (batch['features'] - self.mean) / self.std
    frames_B, rngs = batch['frames'], None
    if key is not None:
      noise, dropout, gumbel = jax.random.split(key, 3)
      x_BxTxM, frames_B = augment.augment(noise, x_BxTxM, frames_B, cfg.augment)
      rngs = {'dropout': dropout, 'gates': gumbel}
    context = gating.Context(
      batch['language'],
      batch['task'],
      gating_now['temperature'],
      gating_now['search'],
      sample=key is not None,
    )
    out: Output = self.model.apply(
      {'params': params},
      x_BxTxM,
      frames_B,
      batch['decoder_input'],
      context,
      deterministic=key is None,
      rngs=rngs,
    )

    valid_B = batch['valid'].astype(jnp.float32)
    count = jnp.sum(valid_B)
    lengths_B = jnp.sum(out.encoded.mask, 1)
    ctc_B = losses.ctc_loss(out.ctc_logits, lengths_B, batch['ctc_labels'], batch['ctc_length'])
    attention_B = losses.attention_loss(out.logits, batch['decoder_target'], cfg.smoothing)
    # As ESPnet: CTC over the utterances that have a transcript, attention over all.
    transcribed = jnp.sum(valid_B * (batch['ctc_length'] > 0))
    targets = jnp.where(batch['valid'][:, None], batch['decoder_target'], losses.IGNORED)
    right, tokens = losses.token_accuracy(out.logits, targets)
    weight_B = valid_B * batch['weight']
    mean = lambda total, number: (total / jnp.maximum(number, 1), number)
    means = {
      'ctc_loss': mean(jnp.sum(ctc_B * valid_B), transcribed),
      'attention_loss': mean(jnp.sum(attention_B * valid_B), count),
      'token_accuracy': mean(right, tokens),
      'weighted_ctc_loss': mean(jnp.sum(ctc_B * weight_B), transcribed),
      'weighted_attention_loss': mean(jnp.sum(attention_B * weight_B), count),
    }
    if cfg.model.gates.enabled:
      sparsities = self._sparsities(out.encoded.gates, valid_B)
      means |= {name: (sparsity, count) for name, sparsity in sparsities.items()}
    return means

  def metrics(
    self, means: dict[str, jax.Array], gating_now: dict[str, jax.Array]
  ) -> dict[str, jax.Array]:
    """The loss and its parts from the means over a batch, or over many."""
    cfg = self.cfg
    loss = cfg.ctc_weight * means['weighted_ctc_loss']
    loss += (1 - cfg.ctc_weight) * means['weighted_attention_loss']
    metrics = {name: means[name] for name in ('ctc_loss', 'attention_loss', 'token_accuracy')}
    if cfg.model.gates.enabled:
      held = [means[name] for name in self._held()]
      target, kind = gating_now['target'], cfg.sparsity.penalty
      penalty = sum(losses.sparsity_penalty(s, target, kind) for s in held) / len(held)
      modules = sum(site.layers for site in cfg.model.sites())
      loss += gating_now['weight'] * modules * penalty
      metrics |= {'sparsity': means['sparsity'], 'sparsity_target': target, 'penalty': penalty}
    return metrics | {'loss': loss}

  def _held(self) -> dict[str, Sequence[gates_lib.Site]]:
    """The sites whose sparsities are held to the target, by the name of their mean."""
    cfg, sites = self.cfg, self.cfg.model.sites()
    if not cfg.sparsity.per_stack:
      return {'sparsity': sites}
    of_stack = lambda stack: tuple(s for s in sites if s.stack == stack)
    return {f'{stack}_sparsity': of_stack(stack) for stack in cfg.model.gates.stacks}

  def _sparsities(self, gates: gates_lib.Gates, valid_B: jax.Array) -> dict[str, jax.Array]:
    """Sparsity of gates `[N]` or `[N, B]`, of all and of what is held to the target.

    Padding rows count nothing.
    """
    count = jnp.maximum(jnp.sum(valid_B), 1.0)
    mean = lambda g: jnp.sum(g * valid_B, 1) / count if g.ndim > 1 else g
    gates = jax.tree.map(mean, gates)
    costs = self.costs if self.cfg.sparsity.count == 'macs' else None
    groups = {'sparsity': self.cfg.model.sites()} | self._held()
    return {name: gates_lib.sparsity(gates, group, costs) for name, group in groups.items()}


class TrainStep:
  """The step `(state, batch, gating_now) -> (state, metrics)`; donates the state.

  Two programs, the gradient and the update, so that another batch shape compiles the first
  alone.
  """

  def __init__(self, cfg: TrainConfig, stats: FeatureStats, shardings: Any):
    objective = Objective(cfg, stats)
    tx = optimizer.make(cfg.optimizer, cfg.steps, cfg.model.dtype)

    def gradient(params: Any, at: jax.Array, batch: Batch, gating_now: dict[str, jax.Array]):
      # rbg draws dropout bits about as fast as threefry on CPU and far faster on TPU.
      key = jax.random.fold_in(jax.random.key(cfg.seed + 1, impl='rbg'), at)
      grad_fn = jax.value_and_grad(objective, has_aux=True)
      (_, metrics), grads = grad_fn(params, batch, gating_now, key)
      return jax.lax.with_sharding_constraint(grads, shardings.params), metrics

    def update(state: TrainState, grads: Any, gating_now: dict[str, jax.Array]):
      updates, opt_state = tx.update(grads, state.opt_state, state.params)
      if cfg.model.gates.enabled:
        rest = lambda u: jnp.where(gating_now['search'], u, 0)
        updates = jax.tree_util.tree_map_with_path(
          lambda path, u: rest(u) if optimizer.is_gate(path) else u, updates
        )
      params = optax.apply_updates(state.params, updates)
      state = TrainState(state.step + 1, params, opt_state)
      return jax.lax.with_sharding_constraint(state, shardings), optax.tree.norm(grads)

    self._gradient = compiling.Programs(jax.jit(gradient))
    self._update = compiling.Programs(jax.jit(update, donate_argnames='state'))

  def prepare(
    self, state: TrainState, batch: Batch, gating_now: dict[str, jax.Array]
  ) -> list[futures.Future]:
    """Starts compiling for a batch of this shape; the batch may be abstract."""
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    return [
      self._gradient.prepare(_shape(batch), state.params, state.step, batch, gating_now),
      self._update.prepare((), state, jax.tree.map(like, state.params), gating_now),
    ]

  def __call__(
    self, state: TrainState, batch: Batch, gating_now: dict[str, jax.Array]
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    grads, metrics = self._gradient(_shape(batch), state.params, state.step, batch, gating_now)
    state, norm = self._update((), state, grads, gating_now)
    return state, metrics | {'grad_norm': norm}


class EvalStep:
  """The step `(params, batch, gating_now) -> means`: thresholded gates, no dropout.

  Means come with their numbers, for `total`.
  """

  def __init__(self, cfg: TrainConfig, stats: FeatureStats):
    self._objective = objective = Objective(cfg, stats)

    def eval_step(params: Any, batch: Batch, gating_now: dict[str, jax.Array]):
      return objective.means(params, batch, gating_now, None)

    self._programs = compiling.Programs(jax.jit(eval_step))

  def prepare(
    self, params: Any, batch: Batch, gating_now: dict[str, jax.Array]
  ) -> list[futures.Future]:
    """Starts compiling for a batch of this shape; the batch may be abstract."""
    return [self._programs.prepare(_shape(batch), params, batch, gating_now)]

  def __call__(self, params: Any, batch: Batch, gating_now: dict[str, jax.Array]) -> Means:
    return self._programs(_shape(batch), params, batch, gating_now)

  def total(self, batches: Sequence[Means], gating_now: dict[str, jax.Array]) -> dict[str, float]:
    """Metrics over the utterances and tokens of all batches, however they were batched."""
    means = {}
    for name in batches[0]:
      of_batches = np.array(jax.device_get([b[name] for b in batches]), np.float64)
      mean, number = of_batches.T
      means[name] = np.sum(mean * number) / max(np.sum(number), 1)
    return {name: float(v) for name, v in self._objective.metrics(means, gating_now).items()}


def _shape(batch: Batch) -> tuple[int, ...]:
  """What tells batches of one bucket from another's."""
  return (*batch['features'].shape[:2], batch['decoder_input'].shape[1])


def unboxed(init: Callable[[jax.Array], TrainState]) -> Callable[[jax.Array], TrainState]:
  """`init` without the boxes that carry logical names."""
  return lambda key: nn.unbox(init(key))
