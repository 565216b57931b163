"""The training configuration: mutable dataclasses, overridable by `--config.a.b=value`."""

import dataclasses
import json
import math
import typing
from typing import Any

from gatedfm.data.data_config import DataConfig
from gatedfm.data.features import N_MELS
from gatedfm.models.speech_config import ConfigError, GateConfig, SpeechConfig, choice
from gatedfm.trainers.augment import AugmentConfig

SCHEDULES = (
  'cosine', 'rsqrt', 'constant', 'calr', 'released_calr', 'clr', 'triangular2', 'exp_range', 'sgdr'
)  # fmt: skip


@dataclasses.dataclass(slots=True)
class OptimizerConfig:
  """The optimizer; weight decay is decoupled and on kernels and embeddings alone.

  Attributes:
    name: `muon` (orthogonalised momentum for matrices, Adam for the rest; Jordan et al. 2024)
      `adamw`, or `tf1_adam`, whose eps is that of TensorFlow 1.
    peak_lr, warmup, schedule: learning rate, its linear warm-up in steps, then `cosine` to
      `final_fraction` of the peak, `rsqrt` (Noam) or `constant`. Without a warm-up go up and down
      between the peak and `final_fraction` of it: `calr`, whose maximum falls and comes back,
      `released_calr`, `clr` (triangular), `triangular2`, `exp_range` and `sgdr`; see
      `schedules.py`.
    half_cycle: steps from minimum to maximum of these; below 1 a share of the training.
    decay, decay_every: of CALR's maximum, and in how many steps (below 1 a share of the training);
      0 is a cycle, of `released_calr` they are an epoch's.
    gate_lr: peak of the gate predictor's own learning rate, same schedule.
    clip: global gradient norm.
  """

  name: str = 'muon'
  peak_lr: float = 1e-3
  gate_lr: float = 3e-3
  warmup: int = 500
  schedule: str = 'cosine'
  final_fraction: float = 0.02
  half_cycle: float = 1000
  decay: float = 0.1
  decay_every: float = 0
  b1: float = 0.9
  b2: float = 0.98
  eps: float = 1e-8
  weight_decay: float = 1e-2
  clip: float = 5.0

  def validate(self) -> None:
    choice('optimizer.name', self.name, ('muon', 'adamw', 'tf1_adam'))
    if self.name == 'tf1_adam' and self.weight_decay:
      raise ConfigError('optimizer.name is tf1_adam, which decays no weights: set weight_decay=0')
    choice('optimizer.schedule', self.schedule, SCHEDULES)
    if self.half_cycle <= 0 or self.decay_every < 0 or not 0 < self.decay <= 1:
      raise ConfigError(
        'optimizer.half_cycle is above 0, decay_every not negative, decay above 0 and at most 1'
      )
    for name in ('half_cycle', 'decay_every'):
      if getattr(self, name) > 1 and getattr(self, name) % 1:
        raise ConfigError(
          f'optimizer.{name} is {getattr(self, name)}; it is whole steps, or a share below 1'
        )
    if not 0 <= self.final_fraction <= 1 or (self.schedule == 'calr' and not self.final_fraction):
      raise ConfigError(
        f'optimizer.final_fraction is {self.final_fraction}; it is a share of the peak, which '
        'calr must be able to come down to: above 0'
      )
    if self.schedule == 'released_calr':
      if not self.decay_every or self.decay == 1:
        raise ConfigError(
          'optimizer.schedule is released_calr: set decay_every to the steps of an epoch or, as a '
          'share of the training, to 1 / epochs, and a decay below 1'
        )
      power = math.log(self.final_fraction or 2, self.decay)
      if power < 0.99 or abs(power - round(power)) > 0.01:
        raise ConfigError(
          f'optimizer.final_fraction is {self.final_fraction}; of released_calr it is a power of '
          f'the decay, such as {self.decay**3:.6g}'
        )
    if self.peak_lr <= 0 or self.gate_lr <= 0 or self.clip <= 0 or self.warmup < 1:
      raise ConfigError('optimizer.peak_lr, gate_lr and clip must be positive, warmup at least 1')


@dataclasses.dataclass(slots=True)
class SparsityConfig:
  """How gates are driven to a sparsity target; used where `model.gates.enabled`.

  Attributes:
    target: closed fraction to reach, 0 to 1.
    ramp: fraction of the training over which the target rises linearly from 0.
    weight: alpha of the penalty, in nats per utterance and module, so that the price of one
      module (with the square, 2 alpha d at a distance d from the target) is the same in a
      model of 15 and of 126 modules.
    penalty: `squared`, `abs_squared`, `abs` or `hinge`; see `losses.sparsity_penalty`.
    count: `modules` counts gates alike, `macs` weighs them by their cost.
    per_stack: True holds encoder and decoder each to the target, False their sum.
    tau_start, tau_end: temperature of the Gumbel-Softmax, geometric in between.
    freeze: last fraction of the training in which gates are decided by threshold instead of
      sampled and the predictor rests, so that the weights settle on the gates used.
  """

  target: float = 0.5
  ramp: float = 0.5
  weight: float = 30.0
  penalty: str = 'squared'
  count: str = 'modules'
  per_stack: bool = False
  tau_start: float = 1.0
  tau_end: float = 1.0
  freeze: float = 0.3

  def validate(self) -> None:
    choice('sparsity.penalty', self.penalty, ('abs_squared', 'abs', 'squared', 'hinge'))
    choice('sparsity.count', self.count, ('modules', 'macs'))
    if not 0 <= self.target < 1:
      raise ConfigError(f'sparsity.target is {self.target}; it is the closed fraction, in [0, 1)')
    if self.weight < 0:
      raise ConfigError(f'sparsity.weight is {self.weight}; it must be at least 0')
    if not 0 <= self.ramp <= 1 or not 0 <= self.freeze < 1:
      raise ConfigError('sparsity.ramp and sparsity.freeze are fractions of the training')
    if self.tau_start <= 0 or self.tau_end <= 0:
      raise ConfigError('sparsity.tau_start and tau_end must be positive')


@dataclasses.dataclass(slots=True)
class MeshConfig:
  """Sizes of the mesh axes; -1 takes the devices that are left."""

  data: int = -1
  fsdp: int = 1
  model: int = 1


@dataclasses.dataclass(slots=True)
class TrainConfig:
  """Everything that a training run depends on.

  Attributes:
    name: shown in logs and reports.
    seed: of parameters, augmentation, dropout and gates; that of the order is `data.seed`.
    steps: optimizer steps.
    vocab: SentencePiece vocabulary, symbols included.
    ctc_weight, smoothing: of the hybrid loss.
    init_from: a workdir whose parameters start this run (a dense model to be gated).
    continue_from: a workdir whose whole state, optimizer included, is taken over.
    log_every, eval_every, checkpoint_every: in steps; keep: checkpoints kept.
    data_dir: where data is prepared; '' is `$GATEDFM_DATA` or the user's cache.
    skip_bad: leave bad manifest lines out instead of stopping.
    tensorboard: whether to write events beside `metrics.jsonl`.
  """

  name: str = ''
  seed: int = 0
  steps: int = 1000
  vocab: int = 300
  ctc_weight: float = 0.3
  smoothing: float = 0.1
  init_from: str = ''
  continue_from: str = ''
  log_every: int = 50
  eval_every: int = 500
  checkpoint_every: int = 500
  keep: int = 2
  data_dir: str = ''
  skip_bad: bool = False
  tensorboard: bool = True
  model: SpeechConfig = dataclasses.field(default_factory=SpeechConfig)
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
  optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
  sparsity: SparsityConfig = dataclasses.field(default_factory=SparsityConfig)
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

  def validate(self) -> None:
    """Before anything is prepared or compiled.

    Raises:
      ConfigError: an impossible value; the message names the field and the mend.
      DataError: one of `data`.
    """
    self.model.validate()
    if self.model.mels != N_MELS:
      raise ConfigError(f'model.mels is {self.model.mels}, but features have {N_MELS}')
    if self.model.gates.enabled and self.model.execution != 'mask':
      raise ConfigError(
        f'model.execution is {self.model.execution}, but gates are trained by utterance: leave mask'
      )
    self.data.validate()
    self.optimizer.validate()
    self.sparsity.validate()
    for name in ('steps', 'log_every', 'eval_every', 'checkpoint_every', 'keep'):
      if getattr(self, name) < 1:
        raise ConfigError(f'{name} is {getattr(self, name)}; it must be at least 1')
    if not 0 <= self.ctc_weight <= 1 or not 0 <= self.smoothing < 1:
      raise ConfigError('ctc_weight lies in [0, 1] and smoothing in [0, 1)')
    if not 0 <= self.augment.tempo < 1 or not 0 <= self.augment.formant < 1:
      raise ConfigError('augment.tempo and augment.formant lie in [0, 1)')
    if self.init_from and self.continue_from:
      raise ConfigError('init_from and continue_from exclude each other; drop one')


# What may change between two calls on one workdir: nothing that the result depends on.
OPERATIONAL = ('log_every', 'eval_every', 'checkpoint_every', 'keep', 'data_dir', 'tensorboard',
               'data.workers', 'mesh.data', 'mesh.fsdp', 'mesh.model')  # fmt: skip


def to_dict(config: Any) -> dict[str, Any]:
  """A configuration as plain JSON-ready data."""
  return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type, values: dict[str, Any]) -> Any:
  """Inverse of `to_dict`; raises ConfigError, naming them, on unknown keys."""
  fields = {f.name: f for f in dataclasses.fields(cls)}
  if unknown := sorted(set(values) - set(fields)):
    raise ConfigError(f'{cls.__name__} has no {", ".join(unknown)}; it has {", ".join(fields)}')
  hints = typing.get_type_hints(cls)
  out = {}
  for name, value in values.items():
    if dataclasses.is_dataclass(hints[name]):
      value = from_dict(hints[name], value)
    elif isinstance(value, list):
      value = tuple(value)
    out[name] = value
  return cls(**out)


def flatten(values: dict[str, Any], prefix: str = '') -> dict[str, Any]:
  """Nested dictionaries -> `{'model.d': 128, ...}`."""
  out = {}
  for key, value in values.items():
    if isinstance(value, dict):
      out |= flatten(value, f'{prefix}{key}.')
    else:
      out[prefix + key] = value
  return out


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
  """What differs between two configurations beyond `OPERATIONAL`, as `field: old -> new`."""
  a, b = flatten(old), flatten(new)
  keys = sorted((set(a) | set(b)) - set(OPERATIONAL))
  return [f'{k}: {a.get(k)!r} -> {b.get(k)!r}' for k in keys if a.get(k) != b.get(k)]


__all__ = [
  'AugmentConfig',
  'ConfigError',
  'DataConfig',
  'GateConfig',
  'MeshConfig',
  'OptimizerConfig',
  'SparsityConfig',
  'SpeechConfig',
  'TrainConfig',
  'differences',
  'from_dict',
  'to_dict',
]
