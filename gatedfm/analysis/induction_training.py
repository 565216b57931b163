"""Trains a small attention-only model until induction heads form, and watches them do so.

Olsson et al., "In-context Learning and Induction Heads", 2022: with two layers of attention, loss
on what has occurred before falls suddenly, when a head begins to match prefixes. Letters: B batch,
L tokens, N layers, H heads.

Example:
  python -m gatedfm.analysis.induction_training --json=bump.json --picture=bump.png
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from matplotlib import figure as figures

from gatedfm import atomic, mains, provenance
from gatedfm.analysis import plots
from gatedfm.analysis.head_scorer import HeadScorer
from gatedfm.analysis.induction import MEASURES, Induction
from gatedfm.gates import Gates
from gatedfm.models.lm import LanguageModel
from gatedfm.models.lm_config import LmConfig, llama
from gatedfm.models.speech_config import ConfigError


@dataclasses.dataclass(frozen=True)
class Training:
  """What to train.

  Attributes:
    vocab_size, d, layers, heads: sizes of the model, which has no FFNs.
    tokens: L, of a text. Each repeats a random block, of a quarter to half of it, so that no fixed
      distance leads back to what comes next.
    batch, steps, learning_rate: of Adam, warmed up over a tenth of the steps.
    log_every: steps between two looks at loss and heads.
    seed: of parameters and texts.
  """

  vocab_size: int = 64
  d: int = 64
  layers: int = 2
  heads: int = 4
  tokens: int = 64
  batch: int = 32
  steps: int = 2000
  learning_rate: float = 3e-3
  log_every: int = 50
  seed: int = 0

  def model(self) -> LmConfig:
    """Rotary positions, norms before attention."""
    cfg = llama(
      vocab_size=self.vocab_size, d=self.d, layers=self.layers, heads=self.heads, ffn=1,
      max_tokens=self.tokens, bos=-1, eos=-1, pad=-1, scan_layers=False,
    )  # fmt: skip
    cfg.validate()
    if min(self.steps, self.log_every, self.batch) < 1 or self.seed < 0 or self.tokens < 8:
      raise ConfigError('steps, log_every and batch are 1 at least, tokens 8, seed not negative')
    return cfg


def texts(how: Training, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
  """Tokens `[B, L]`, and which of them, with the token in front, stood a block before, `[B, L]`."""
  shape, least = (how.batch, how.tokens), how.tokens // 4
  block_Bx1 = rng.integers(least, 2 * least + 1, (how.batch, 1))
  at_L = np.arange(how.tokens)
  drawn_BxL = rng.integers(0, how.vocab_size, shape, np.int32)
  return np.take_along_axis(drawn_BxL, at_L % block_Bx1, 1), at_L > block_Bx1


def train(how: Training) -> Iterator[dict[str, Any]]:
  """Trains, and yields now and then where it stands.

  Yields: `step`; `new_loss` and `repeated_loss`, in nats, means since the last look over tokens
    that cannot be told from what stood before, and that can; `prefix_matching` and `copying`,
    `[N][H]`.
  """
  cfg, closed = how.model(), Gates({'decoder/ffn': (False,) * how.layers})
  # Blocks of differing length, twice, as in training.
  looked = Induction(
    sequences=4, shortest=how.tokens // 4, step=how.tokens // 16, copies=2, dropped=0.0,
    multiple=how.tokens,
  )  # fmt: skip
  scorer = HeadScorer(cfg, looked)
  init, step = _programs(LanguageModel(cfg), closed, how)
  params, state = init(jax.random.key(how.seed))
  rng, recent = np.random.default_rng(how.seed), []
  for i in range(1, how.steps + 1):
    params, state, losses = step(params, state, *texts(how, rng))
    recent.append(losses)
    if i == 1 or i % how.log_every == 0:
      scores = list(scorer.scores(params, closed))
      row = {m: np.mean([s[m] for s in scores], 0).round(4).tolist() for m in MEASURES}
      new, repeated = np.mean(recent, 0, np.float64).round(4).tolist()
      yield {'step': i, 'new_loss': new, 'repeated_loss': repeated} | row
      recent = []


def _programs(model: LanguageModel, closed: Gates, how: Training) -> tuple[Callable, Callable]:
  """`init(key)`: parameters and state of the optimizer; `step(both, *texts)`: both, and losses."""
  schedule = optax.linear_schedule(0, how.learning_rate, max(how.steps // 10, 1))
  optimizer = optax.adam(schedule, b2=0.98)

  @jax.jit
  def init(key):
    params = nn.unbox(model.init(key, jnp.zeros((1, 2), jnp.int32), gates=closed))['params']
    return params, optimizer.init(params)

  def losses(params, tokens_BxL, repeated_BxL):
    logits_BxLxV = model.apply({'params': params}, tokens_BxL[:, :-1], gates=closed)
    each_BxL = optax.softmax_cross_entropy_with_integer_labels(logits_BxLxV, tokens_BxL[:, 1:])
    again = repeated_BxL[:, 1:]
    parts = jnp.mean(each_BxL, where=~again), jnp.mean(each_BxL, where=again)
    return each_BxL.mean(), jnp.stack(parts)

  @jax.jit
  def step(params, state, *texts):
    (_, parts), slope = jax.value_and_grad(losses, has_aux=True)(params, *texts)
    change, state = optimizer.update(slope, state)
    return optax.apply_updates(params, change), state, parts

  return init, step


@plots.styled
def picture(curve: Sequence[dict[str, Any]]) -> figures.Figure:
  """Loss of new and repeated tokens, and each head's prefix matching, by step.

  Args:
    curve: what `train` yielded.
  """
  steps = [row['step'] for row in curve]
  figure = figures.Figure(figsize=(7.6, 3.4), layout='constrained')
  loss, heads = figure.subplots(1, 2)
  loss.plot(steps, [row['new_loss'] for row in curve], color=plots.INK, alpha=0.5, label='new')
  loss.plot(steps, [row['repeated_loss'] for row in curve], color=plots.COLORS[1], label='repeated')
  loss.set(title='loss of tokens (nats)', xlabel='step')
  loss.set_ylim(bottom=0)
  scores_SxNxH = np.array([row['prefix_matching'] for row in curve])
  for layer in range(scores_SxNxH.shape[1]):
    for head in range(scores_SxNxH.shape[2]):
      label = f'heads of layer {layer}' if head == 0 else None
      color = plots.COLORS[2 * layer % len(plots.COLORS)]
      heads.plot(steps, scores_SxNxH[:, layer, head], color=color, label=label)
  heads.set(title='prefix matching', xlabel='step', ylim=(0, 1))
  for axes in (loss, heads):
    axes.legend()
  return figure


def main(argv: list[str]) -> None:
  mains.no_arguments(argv)
  mains.set_up()
  with mains.clear_errors():
    path = mains.json_path(_JSON.value)
    how, start, curve = Training(steps=_STEPS.value, seed=_SEED.value), time.perf_counter(), []
    for row in train(how):
      curve.append(row)
      left = (time.perf_counter() - start) * (how.steps / row['step'] - 1)
      losses = f'loss {row["new_loss"]:.3f} new, {row["repeated_loss"]:.3f} repeated'
      best = f'prefix matching up to {np.max(row["prefix_matching"]):.2f}'
      print(f'step {row["step"]}: {losses}, {best}; about {left:.0f} s left', flush=True)
    about = {'training': dataclasses.asdict(how), 'seconds': time.perf_counter() - start}
    about |= provenance.collect('gatedfm.analysis.induction_training')
    text = json.dumps(about | {'curve': curve}) + '\n'
    atomic.write_text(path, text)
    if _PICTURE.value:
      plots.save(picture(curve), mains.folder(_PICTURE.value))


if __name__ == '__main__':
  _JSON = flags.DEFINE_string('json', None, 'File to write the curve into.', required=True)
  _PICTURE = flags.DEFINE_string('picture', None, 'File for the picture, .png or .svg.')
  _STEPS = flags.DEFINE_integer('steps', Training.steps, 'Of training.')
  _SEED = flags.DEFINE_integer('seed', Training.seed, 'Of parameters and texts.')
  mains.run(main)
