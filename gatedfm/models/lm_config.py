"""Configuration of the decoder-only language model, and the shapes of published ones.

No postponed annotations here: config flags read the fields' types to parse overrides.
"""

import dataclasses
from typing import Any

from gatedfm import gates as gates_lib
from gatedfm.models.speech_config import ConfigError, choice
from gatedfm.nn import layers, low_rank

STACK = 'decoder'


@dataclasses.dataclass(slots=True)
class LmConfig:
  """Sizes and kind of a decoder-only transformer; the defaults are OPT's kind.

  Attributes:
    vocab_size, d, layers, heads, ffn: V, D, N, H, F.
    kv_heads: heads of keys and values, each read by several query heads; 0 means as many.
    head_width: K; 0 means D / H.
    activation: `relu`, `swish` or `gelu` (exact); gated_ffn: of SwiGLU's kind.
    norm: `layer` or `rms`; norm_eps: its epsilon.
    pre_norm: norms before each module; False after each sum (OPT-350m).
    final_norm: whether there is one more at the end; pre-norm models alone have one.
    use_bias: of all matrix products but the embeddings'.
    positions: `learned`, added to the embeddings, or `rotary`.
    position_offset: of the learned table's rows; OPT's first two mean padding.
    theta: base of rotary positions.
    max_tokens: positions that there are.
    embed_width: of the embeddings where it is not D (OPT-350m's `word_embed_proj_dim`), else 0.
    tied: whether logits are products with the embeddings.
    bos, eos, pad: tokens; -1 means none.
    add_bos: whether texts begin with `bos`, which some models have for other purposes.
    dropout: on every module's output; 0 for published models at work.
    dtype: operands of matrix products, accumulated in float32; `activation_dtype` as of
      `SpeechConfig`.
    scan_layers, remat, execution: as of `SpeechConfig`.
    factors: matrices that are products of two (`layers.Factorized`), as `PATH:RANK`, paths being
      those of the unrolled parameters.
  """

  vocab_size: int = 50_272
  d: int = 768
  layers: int = 12
  heads: int = 12
  kv_heads: int = 0
  head_width: int = 0
  ffn: int = 3072
  activation: str = 'relu'
  gated_ffn: bool = False
  norm: str = 'layer'
  norm_eps: float = 1e-5
  pre_norm: bool = True
  final_norm: bool = True
  use_bias: bool = True
  positions: str = 'learned'
  position_offset: int = 2
  theta: float = 10_000.0
  max_tokens: int = 2048
  embed_width: int = 0
  tied: bool = True
  bos: int = 2
  eos: int = 2
  pad: int = 1
  add_bos: bool = True
  dropout: float = 0.0
  dtype: str = 'float32'
  activation_dtype: str = 'float32'
  scan_layers: bool = True
  remat: str = 'none'
  execution: str = 'mask'
  factors: tuple[str, ...] = ()

  def validate(self) -> None:
    """Raises ConfigError, naming the field and the mend, for anything that cannot be built."""
    for name in ('vocab_size', 'd', 'layers', 'heads', 'ffn', 'max_tokens'):
      if getattr(self, name) < 1:
        raise ConfigError(f'{name} is {getattr(self, name)}; it must be positive')
    for name in ('kv_heads', 'head_width', 'embed_width', 'position_offset'):
      if getattr(self, name) < 0:
        raise ConfigError(f'{name} is {getattr(self, name)}; it must not be negative')
    if not self.head_width and self.d % self.heads:
      raise ConfigError(f'{self.heads} heads do not divide a width of {self.d}: set head_width')
    if self.kv_heads and self.heads % self.kv_heads:
      raise ConfigError(f'{self.kv_heads} heads of keys and values do not divide {self.heads}')
    choice('activation', self.activation, tuple(layers.ACTIVATIONS))
    choice('norm', self.norm, ('layer', 'rms'))
    choice('positions', self.positions, ('learned', 'rotary'))
    choice('dtype', self.dtype, ('float32', 'bfloat16'))
    choice('activation_dtype', self.activation_dtype, ('float32', 'bfloat16'))
    choice('remat', self.remat, ('none', 'full', 'dots'))
    choice('execution', self.execution, ('mask', 'skip', 'bucketed'))
    if self.positions == 'rotary' and self.width % 2:
      raise ConfigError(f'rotary positions turn pairs of channels: a head has {self.width}')
    if self.final_norm and not self.pre_norm:
      raise ConfigError('norms after each sum leave nothing to norm at the end: no final_norm')

  @property
  def width(self) -> int:
    """K, of a head."""
    return self.head_width or self.d // self.heads

  @property
  def groups(self) -> int:
    """Heads of keys and values."""
    return self.kv_heads or self.heads

  @property
  def start(self) -> tuple[int, ...]:
    """Tokens that a text begins with."""
    return (self.bos,) if self.add_bos and self.bos >= 0 else ()

  @property
  def padding(self) -> int:
    """A token to fill rows with."""
    return max(self.pad, 0)

  @property
  def ranks(self) -> dict[str, int]:
    """Of `factors`, by path."""
    return low_rank.ranks(self.factors)

  def all_sites(self) -> tuple[gates_lib.Site, ...]:
    """Its modules. A layer without both of them is gone."""
    return tuple(gates_lib.Site(f'{STACK}/{m}', self.layers) for m in ('attention', 'ffn'))

  def unit_sites(self) -> tuple[gates_lib.Site, ...]:
    """What is inside: query heads, hidden channels; ranks of embeddings that are factorized."""
    rank = self.ranks.get(f'{STACK}/embedding')
    more = (gates_lib.Site(f'{STACK}/embedding_ranks', 1, 'rank', rank),) if rank else ()
    return (
      gates_lib.Site(f'{STACK}/attention_heads', self.layers, 'head', self.heads),
      gates_lib.Site(f'{STACK}/ffn_channels', self.layers, 'channel', self.ffn),
      *more,
    )


# d, layers, heads; the FFN is four times as wide. 30B and 175B as in Zhang et al., "OPT", 2022.
_OPT = {
  '125m': (768, 12, 12),
  '350m': (1024, 24, 16),
  '1.3b': (2048, 24, 32),
  '2.7b': (2560, 32, 32),
  '6.7b': (4096, 32, 32),
  '13b': (5120, 40, 40),
  '30b': (7168, 48, 56),
  '66b': (9216, 64, 72),
}


def opt(size: str) -> LmConfig:
  """OPT's shapes: `125m`, `350m` (norms after each sum, narrow embeddings), ... `66b`."""
  choice('OPT size', size, tuple(_OPT))
  d, depth, heads = _OPT[size]
  own: dict[str, Any] = {}
  if size == '350m':
    own = {'pre_norm': False, 'final_norm': False, 'embed_width': 512}
  return LmConfig(d=d, layers=depth, heads=heads, ffn=4 * d, **own)


def llama(**sizes: Any) -> LmConfig:
  """The Llama family's kind: RMS norms, rotary positions, SwiGLU, no biases."""
  kind = {
    'activation': 'swish',
    'gated_ffn': True,
    'norm': 'rms',
    'use_bias': False,
    'positions': 'rotary',
    'position_offset': 0,
  }
  return LmConfig(**(kind | sizes))


def smollm2() -> LmConfig:
  """SmolLM2-135M (Allal et al., 2025)."""
  return llama(
    vocab_size=49_152, d=576, layers=30, heads=9, kv_heads=3, ffn=1536, theta=100_000.0,
    max_tokens=8192, bos=1, eos=2, pad=2, add_bos=False,
  )  # fmt: skip
