"""Configuration of the gated speech model: mutable dataclasses, so that flags can override.

No postponed annotations here: config flags read the fields' types to parse overrides.
"""

import dataclasses

from gatedfm import gates as gates_lib
from gatedfm.nn import gating, low_rank

CONTEXTS = ('speech', 'language', 'task')
ENCODER_MODULES = {
  'e_branchformer': ('ffn1', 'attention', 'cgmlp', 'ffn2'),
  'transformer': ('attention', 'ffn'),
}
DECODER_MODULES = ('self_attention', 'cross_attention', 'ffn')


class ConfigError(ValueError):
  """An impossible configuration; the message names the field and the mend."""


def choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
  """Raises ConfigError, naming the field and the choices, unless `value` is allowed."""
  if value not in allowed:
    raise ConfigError(f'{name} is {value!r}; choose one of {", ".join(allowed)}')


@dataclasses.dataclass(slots=True)
class GateConfig:
  """The gate predictor (Algorithm 1) and the gaps that the publication leaves open.

  Attributes:
    enabled: whether the model has a predictor; without one it is dense.
    stacks: which stacks are gated.
    context: what the predictor reads; empty gives a learned static mask.
    combine: `concat` (Algorithm 1) or `add` (the author's page).
    scope: `global` decides once before the stack; `layer` in each layer, from its input.
    decoder_reads: speech that the decoder's predictor pools: encoder output (`memory`) or
      the encoder's own input (`subsampled`).
    hidden: widths of G's hidden layers.
    features: width of the language and task embeddings.
    open_bias: initial keep-minus-drop logit.
    threshold: keep probability above which a module runs at inference.
  """

  enabled: bool = False
  stacks: tuple[str, ...] = ('encoder', 'decoder')
  context: tuple[str, ...] = CONTEXTS
  combine: str = 'concat'
  scope: str = 'global'
  decoder_reads: str = 'memory'
  hidden: tuple[int, ...] = (32,)
  features: int = 16
  open_bias: float = 2.0
  threshold: float = 0.5

  def validate(self) -> None:
    """Raises ConfigError, naming the field and the mend, for anything that cannot be built."""
    for name in ('context', 'stacks', 'hidden'):
      value = getattr(self, name)
      if not isinstance(value, tuple | list):
        raise ConfigError(f'model.gates.{name} is {value!r}; write a tuple: ({value!r},)')
    for name in self.context:
      choice('model.gates.context', name, CONTEXTS)
    for name in self.stacks:
      choice('model.gates.stacks', name, ('encoder', 'decoder'))
    if self.enabled and not self.stacks:
      raise ConfigError('model.gates.stacks is empty; name encoder, decoder or both')
    choice('model.gates.combine', self.combine, ('concat', 'add'))
    choice('model.gates.scope', self.scope, ('global', 'layer'))
    choice('model.gates.decoder_reads', self.decoder_reads, ('memory', 'subsampled'))
    if self.features < 1 or min(self.hidden, default=1) < 1:
      raise ConfigError('model.gates.features and widths of model.gates.hidden must be positive')
    if not 0 < self.threshold < 1:
      raise ConfigError(f'model.gates.threshold is {self.threshold}; it is a probability in (0, 1)')


@dataclasses.dataclass(slots=True)
class SpeechConfig:
  """Sizes of the encoder-decoder; the defaults are OWSM v3.1 base's shape.

  Attributes:
    vocab_size, languages, tasks: filled from the tokenizer (languages counts "unknown").
    encoder: `e_branchformer` or `transformer`.
    d, heads, encoder_layers, decoder_layers: widths and depths.
    encoder_ffn, decoder_ffn, cgmlp: hidden widths (cgMLP: before its split).
    kernel: taps of the cgMLP's and the merge's depthwise convolution.
    subsampling_channels: 0 means d, as in ESPnet.
    conv_sees_padding: True as in ESPnet, where the depthwise convolutions see no mask;
      False makes an utterance's output independent of the padding beside it.
    dropout: on every branch's output and inside; attention_dropout: on attention weights.
    max_tokens: longest decoder sequence, primer included.
    dtype: operands of matrix products, accumulated in float32; `auto` is bfloat16 where the
      hardware has it (accelerators, CPUs with AMX) and float32 elsewhere.
    activation_dtype: everything between products. CPUs emulate bfloat16 arithmetic, so
      float32 is faster there; bfloat16 saves memory on accelerators. Parameters: float32.
    scan_layers: layers stacked and scanned (training); False unrolls them (inference).
    unroll_decoder: the decoder's layers unrolled all the same, as cached decoding needs them.
    merge_folded: an E-Branchformer's merge constants stand in `merge_bias` (inference).
    remat: `none`, `full` (recompute each layer) or `dots` (keep matrix products).
    execution: how gates are executed: `mask`, `skip` or `bucketed`.
    factors: matrices that are products of two (`layers.Factorized`), as `PATH:RANK`, such as
      decoder/embedding, decoder/output/kernel, ctc/kernel; made by SVD of those of `init_from`.
  """

  vocab_size: int = 0
  languages: int = 1
  tasks: int = 1
  mels: int = 80
  encoder: str = 'e_branchformer'
  d: int = 384
  heads: int = 6
  encoder_layers: int = 6
  decoder_layers: int = 6
  encoder_ffn: int = 1536
  decoder_ffn: int = 1536
  cgmlp: int = 1536
  kernel: int = 31
  subsampling_channels: int = 0
  conv_sees_padding: bool = True
  dropout: float = 0.1
  attention_dropout: float = 0.1
  max_tokens: int = 448
  dtype: str = 'float32'
  activation_dtype: str = 'float32'
  scan_layers: bool = True
  unroll_decoder: bool = False
  merge_folded: bool = False
  remat: str = 'none'
  execution: str = 'mask'
  factors: tuple[str, ...] = ()
  gates: GateConfig = dataclasses.field(default_factory=GateConfig)

  def validate(self) -> None:
    """Raises ConfigError, naming the field and the mend, for anything that cannot be built."""
    choice('model.encoder', self.encoder, tuple(ENCODER_MODULES))
    choice('model.dtype', self.dtype, ('auto', 'float32', 'bfloat16'))
    choice('model.activation_dtype', self.activation_dtype, ('float32', 'bfloat16'))
    choice('model.remat', self.remat, ('none', 'full', 'dots'))
    choice('model.execution', self.execution, gating.EXECUTIONS)
    for name in (
      'd',
      'heads',
      'encoder_layers',
      'decoder_layers',
      'encoder_ffn',
      'decoder_ffn',
      'cgmlp',
      'kernel',
      'max_tokens',
    ):
      if getattr(self, name) < 1:
        raise ConfigError(f'model.{name} is {getattr(self, name)}; it must be positive')
    if self.subsampling_channels < 0:
      raise ConfigError(
        f'model.subsampling_channels is {self.subsampling_channels}; it must be positive, or 0: d'
      )
    if self.d % self.heads or self.d % 2:
      raise ConfigError(f'model.d={self.d} must be even and divisible by model.heads={self.heads}')
    if self.cgmlp % 2:
      raise ConfigError(f'model.cgmlp={self.cgmlp} must be even: half of it gates the other half')
    if not 0 <= self.dropout < 1 or not 0 <= self.attention_dropout < 1:
      raise ConfigError('model.dropout and model.attention_dropout lie in [0, 1)')
    if not isinstance(self.factors, tuple | list):
      raise ConfigError(f'model.factors is {self.factors!r}; write a tuple: ({self.factors!r},)')
    try:
      low_rank.ranks(self.factors)
    except ValueError as e:
      raise ConfigError(f'model.{e}') from None
    self.gates.validate()

  @property
  def ranks(self) -> dict[str, int]:
    """Of `factors`, by path."""
    return low_rank.ranks(self.factors)

  def all_sites(self) -> tuple[gates_lib.Site, ...]:
    """Every gateable site of the model, gated or not."""
    return tuple(
      [gates_lib.Site(f'encoder/{m}', self.encoder_layers) for m in ENCODER_MODULES[self.encoder]]
      + [gates_lib.Site(f'decoder/{m}', self.decoder_layers) for m in DECODER_MODULES]
    )

  def unit_sites(self) -> tuple[gates_lib.Site, ...]:
    """What inside the modules may be gated by the caller: attention heads, hidden channels."""
    hidden = {'encoder': self.encoder_ffn, 'decoder': self.decoder_ffn}
    out = []
    for site in self.all_sites():
      if site.module.endswith('attention'):
        out.append(gates_lib.Site(f'{site.name}_heads', site.layers, 'head', self.heads))
      elif site.module.startswith('ffn'):
        width = hidden[site.stack]
        out.append(gates_lib.Site(f'{site.name}_channels', site.layers, 'channel', width))
    return tuple(out)

  def predicts(self, stack: str) -> bool:
    """Whether a predictor decides this stack's gates."""
    return self.gates.enabled and stack in self.gates.stacks

  def sites(self) -> tuple[gates_lib.Site, ...]:
    """The sites that `gates.stacks` gates."""
    return tuple(s for s in self.all_sites() if s.stack in self.gates.stacks)


def owsm(size: str) -> SpeechConfig:
  """OWSM v3.1's shapes, `base`, `small` or `medium`, with its 50,002 tokens."""
  shapes = {'base': (384, 6, 6), 'small': (768, 12, 9), 'medium': (1024, 16, 18)}
  choice('owsm size', size, tuple(shapes))
  d, heads, layers = shapes[size]
  return SpeechConfig(
    vocab_size=50_002,
    d=d,
    heads=heads,
    encoder_layers=layers,
    decoder_layers=layers,
    encoder_ffn=4 * d,
    decoder_ffn=4 * d,
    cgmlp=4 * d,
  )
