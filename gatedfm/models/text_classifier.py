"""Text classifiers whose parameters are almost all in their embedding table: LSTM and DAN.

Source: Acharya et al., "Online Embedding Compression for Text Classification using Low Rank Matrix
Factorization", AAAI 2019, and its released code; DAN is Iyyer et al., "Deep Unordered Composition
Rivals Syntactic Methods for Text Classification", 2015.
Letters: B batch, L tokens, V rows, D features of a table's row, H units, C classes.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from gatedfm.models import tables
from gatedfm.models.speech_config import ConfigError, choice
from gatedfm.models.tables import TableConfig

KINDS = ('lstm', 'dan')


@dataclasses.dataclass(slots=True)
class TextConfig:
  """Sizes and kind of a text classifier.

  Attributes:
    kind: `lstm`, whose outputs are averaged, or `dan`, whose word vectors are.
    vocab_size, features, classes: V, D, C; 0 follows from the data.
    units: H of the LSTM.
    peepholes: whether its gates see its cell (diagonally), as in the published code.
    hidden: widths of DAN's layers.
    dropout: of the LSTM's outputs.
    table: what stands for the embedding table.
    reference_compat: as released: averages over padding too, one class more than there are, dropout
      also when evaluating, wide initial weights of all but the LSTM's own.
  """

  kind: str = 'lstm'
  vocab_size: int = 0
  features: int = 0
  classes: int = 0
  units: int = 150
  peepholes: bool = True
  hidden: tuple[int, ...] = (30, 25)
  dropout: float = 0.5
  table: TableConfig = dataclasses.field(default_factory=TableConfig)
  reference_compat: bool = False

  def validate(self) -> None:
    """Raises ConfigError, naming the field and the mend."""
    choice('model.kind', self.kind, KINDS)
    if self.units < 1 or not self.hidden or min(self.hidden) < 1:
      raise ConfigError('model.units and the widths of model.hidden must be at least 1')
    if not 0 <= self.dropout < 1:
      raise ConfigError(f'model.dropout is {self.dropout}; it is a share, 0 to below 1')
    if min(self.vocab_size, self.features, self.classes) < 0:
      raise ConfigError('model.vocab_size, features and classes are not negative; 0: of the data')
    self.table.validate()
    if self.table.project_relu and self.kind != 'dan':
      raise ConfigError('model.table.project_relu is of a dan, as in the published code')

  @property
  def outputs(self) -> int:
    """Classes, and in the released code one for labels that were not seen."""
    return self.classes + self.reference_compat


class Lstm(nn.Module):
  """One LSTM over a text: `[B, L, D] -> [B, L, H]`, as TensorFlow 1's `LSTMCell`.

  Its kernel reads the words alone, so that a projection in front can be folded into it.

  Attributes:
    units: H.
    peepholes: whether input and forget gate see the last cell, the output gate the new one.
  """

  units: int
  peepholes: bool

  @nn.compact
  def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
    h, init = self.units, nn.initializers.glorot_uniform()
    kernel = self.param('kernel', init, (x_BxLxD.shape[-1], 4 * h))
    recurrent = self.param('recurrent_kernel', init, (h, 4 * h))
    bias = self.param('bias', nn.initializers.zeros, (4 * h,))
    peep = self.param('peepholes', init, (3, h)) if self.peepholes else jnp.zeros((3, h))
    # A product for all words at once; in the loop only what must be.
    inputs_LxBx4H = jnp.swapaxes(x_BxLxD @ kernel + bias, 0, 1)

    def step(carry: tuple[jax.Array, jax.Array], input_Bx4H: jax.Array):
      cell, out = carry
      i, new, forget, o = jnp.split(input_Bx4H + out @ recurrent, 4, -1)
      keep = nn.sigmoid(forget + 1 + peep[1] * cell)  # 1: a new network forgets little
      cell = keep * cell + nn.sigmoid(i + peep[0] * cell) * jnp.tanh(new)
      out = nn.sigmoid(o + peep[2] * cell) * jnp.tanh(cell)
      return (cell, out), out

    zeros = jnp.zeros((x_BxLxD.shape[0], h), inputs_LxBx4H.dtype)
    _, out_LxBxH = lax.scan(step, (zeros, zeros), inputs_LxBx4H)
    return jnp.swapaxes(out_LxBxH, 0, 1)


class TextClassifier(nn.Module):
  """Logits `[B, C]` of texts."""

  cfg: TextConfig

  @nn.compact
  def __call__(
    self, ids_BxL: jax.Array, lengths_B: jax.Array, deterministic: bool = True
  ) -> jax.Array:
    """Logits `[B, C]`.

    Args:
      ids_BxL: rows of the vocabulary, padded.
      lengths_B: words of each text; of none the average is zero.
      deterministic: False turns dropout on.
    """
    cfg = self.cfg
    compat = cfg.reference_compat
    zeros, wide = nn.initializers.zeros, nn.initializers.normal(0.5)
    init = wide if compat else nn.initializers.glorot_uniform()
    x_BxLxD = tables.make(cfg.table, cfg.vocab_size, cfg.features, name='table')(ids_BxL)
    mask_BxL = jnp.arange(ids_BxL.shape[1]) < lengths_B[:, None]

    def average(x_BxLxK: jax.Array) -> jax.Array:
      if compat:
        return jnp.mean(x_BxLxK, 1)
      total = jnp.sum(x_BxLxK * mask_BxL[..., None], 1)
      return total / jnp.maximum(lengths_B, 1)[:, None]

    if cfg.kind == 'lstm':
      x_BxLxH = Lstm(cfg.units, cfg.peepholes, name='lstm')(x_BxLxD)
      x_BxLxH = nn.Dropout(cfg.dropout)(x_BxLxH, deterministic and not compat)
      x = average(x_BxLxH)
      bias = wide if compat else zeros
    else:
      bias = nn.initializers.normal(1.0) if compat else zeros
      x = average(x_BxLxD)
      if cfg.table.project_relu:
        x = nn.relu(x)
      for i, width in enumerate(cfg.hidden):
        x = nn.relu(nn.Dense(width, kernel_init=init, bias_init=bias, name=f'hidden_{i}')(x))
    return nn.Dense(cfg.outputs, kernel_init=init, bias_init=bias, name='out')(x)


def fold(cfg: TextConfig, params: Any) -> tuple[TextConfig, Any]:
  """The same classifier with the second factor in what reads the words: lookups stay R wide.

  Args:
    cfg: of one with a `factorized` table, resolved.
    params: its parameters.

  Returns: configuration, of a plain table of R features, and parameters.

  Raises:
    ConfigError: a table without factors, or a ReLU behind them.
  """
  if cfg.table.kind != 'factorized' or cfg.table.project_relu:
    raise ConfigError('only a factorized table without a ReLU behind it folds into what follows')
  reader = 'lstm' if cfg.kind == 'lstm' else 'hidden_0'
  first, second = params['table']['embedding'], params['table']['projection']
  read = params[reader] | {'kernel': second @ params[reader]['kernel']}
  cfg = dataclasses.replace(cfg, features=cfg.table.rank, table=TableConfig())
  return cfg, params | {'table': {'embedding': first}, reader: read}
