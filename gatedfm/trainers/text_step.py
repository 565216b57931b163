"""Steps of text classifiers, for several seeds at once: an axis Z in front of all that differs.

Letters: Z seeds, B batch, N texts, L tokens, C classes.
"""

from __future__ import annotations

import functools
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from gatedfm.data.batching import CHUNK, chunks
from gatedfm.models.text_classifier import TextClassifier, TextConfig
from gatedfm.trainers import optimizer
from gatedfm.trainers.config import OptimizerConfig
from gatedfm.trainers.text_corpus import Arrays, Batch

Variables = dict[str, Any]


@flax.struct.dataclass
class TextState:
  """All that a training changes; every array has Z in front but `step`.

  Attributes:
    step: of all seeds.
    params: variables (`params`, and `quantized` where tables have codes) chosen on validation.
    current: `params` that are being trained.
    opt_state: of the optimizer.
    best: validation accuracy of what is chosen; below 0 while nothing is.
  """

  step: jax.Array
  params: Variables
  current: Any
  opt_state: Any
  best: jax.Array


def keys(seeds: tuple[int, ...], salt: int) -> jax.Array:
  """A key for each seed, `[Z]`."""
  return jnp.stack([jax.random.fold_in(jax.random.key(seed), salt) for seed in seeds])


class Steps:
  """Compiled steps of a classifier, one program for each length.

  Learning rates are an argument of theirs: trainings that differ in them alone share programs.

  Args:
    cfg: of the classifier, complete.
    optimizer_cfg: of its training.
    steps: of the whole training, for schedules.
    train: texts; they stay on the device.
    seeds: of dropout.
  """

  def __init__(
    self,
    cfg: TextConfig,
    optimizer_cfg: OptimizerConfig,
    steps: int,
    train: Arrays,
    seeds: tuple[int, ...],
  ):
    self._model, self._seeds = TextClassifier(cfg), seeds
    self._tx = optimizer.make(optimizer_cfg, max(steps, 1), rate=1.0)
    rate = optimizer.learning_rate(optimizer_cfg, optimizer_cfg.peak_lr, steps)
    self._rates = jax.vmap(rate)(jnp.arange(max(steps, 1))).astype(jnp.float32)
    self._train = jax.device_put((train.ids, train.lengths, train.labels))
    self._dropout = keys(seeds, 1)
    self._step = jax.jit(self._update, static_argnames='length', donate_argnames='state')
    self._right = jax.jit(self._count, static_argnames='length')

  def start(self, variables: Variables) -> TextState:
    """The state before the first step of variables `[Z, ...]`."""
    current = jax.tree.map(jnp.array, variables['params'])
    opt_state = jax.vmap(self._tx.init)(current)
    best = jnp.full(len(self._seeds), -1.0)
    return TextState(jnp.zeros((), jnp.int32), variables, current, opt_state, best)

  def __call__(self, state: TextState, batch: Batch) -> tuple[TextState, jax.Array]:
    """A step of all seeds; losses `[Z]`."""
    args = self._train, self._rates, batch.index, batch.weights
    return self._step(state, *args, length=batch.length)

  def _update(
    self,
    state: TextState,
    train: tuple[jax.Array, ...],
    rates: jax.Array,
    index_ZxB: jax.Array,
    weights_ZxB: jax.Array,
    length: int,
  ) -> tuple[TextState, jax.Array]:
    fixed = {k: v for k, v in state.params.items() if k != 'params'}

    def one(
      current: Any, opt_state: Any, fixed: Any, index_B: jax.Array, weights_B: jax.Array, key
    ):
      ids_BxL, lengths_B, labels_B = (
        train[0][index_B, :length],
        train[1][index_B],
        train[2][index_B],
      )

      def loss(current: Any) -> jax.Array:
        logits_BxC = self._model.apply(
          {'params': current, **fixed},
          ids_BxL[:, :length],
          lengths_B,
          False,
          rngs={'dropout': jax.random.fold_in(key, state.step)},
        )
        losses_B = optax.softmax_cross_entropy_with_integer_labels(logits_BxC, labels_B)
        return jnp.sum(losses_B * weights_B) / jnp.sum(weights_B)

      value, grads = jax.value_and_grad(loss)(current)
      updates, opt_state = self._tx.update(grads, opt_state, current)
      updates = jax.tree.map(lambda u: rates[state.step] * u, updates)
      return optax.apply_updates(current, updates), opt_state, value

    current, opt_state, losses_Z = jax.vmap(one)(
      state.current, state.opt_state, fixed, index_ZxB, weights_ZxB, self._dropout
    )
    state = state.replace(step=state.step + 1, current=current, opt_state=opt_state)
    return state, losses_Z

  def _count(
    self, variables: Variables, ids: jax.Array, lengths: jax.Array, labels: jax.Array, length: int
  ) -> jax.Array:
    """Whether each is right, `[Z, N]`, of variables `[Z, ...]`."""

    def one(variables: Variables, key: jax.Array) -> jax.Array:
      # Dropout, should the model have it here too.
      rngs = {'dropout': key}
      logits = self._model.apply(variables, ids[:, :length], lengths, rngs=rngs)
      return jnp.argmax(logits, -1) == labels

    return jax.vmap(one)(variables, self._dropout)

  def right(self, variables: Variables, split: Arrays) -> np.ndarray:
    """Which texts of a split are classified rightly, `[Z, N]` bool, by variables `[Z, ...]`."""
    out = np.zeros((len(self._seeds), len(split)), bool)
    padded = self._model.cfg.reference_compat
    # Of one size, so that all splits share their programs.
    for chunk in chunks(split.lengths, split.ids.shape[1], padded, CHUNK):
      arrays = (x[chunk.filled] for x in (split.ids, split.lengths, split.labels))
      found = np.asarray(self._right(variables, *arrays, length=chunk.length))
      out[:, chunk.rows] = found[:, : len(chunk.rows)]
    return out

  @functools.partial(jax.jit, static_argnums=0)
  def choose(self, state: TextState, accuracy_Z: jax.Array) -> TextState:
    """Takes what is being trained for chosen where it is no worse on validation."""
    better_Z = accuracy_Z >= state.best

    def pick(new: jax.Array, old: jax.Array) -> jax.Array:
      return jnp.where(better_Z.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    params = jax.tree.map(pick, state.current, state.params['params'])
    best = jnp.maximum(accuracy_Z, state.best)
    return state.replace(params=state.params | {'params': params}, best=best)
