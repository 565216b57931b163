"""The dense model of the quickstart: small enough to train on two CPU cores.

python -m gatedfm.train --config=configs/gated_speech/tiny.py --workdir=runs/tiny
"""

from gatedfm.trainers.config import (
  AugmentConfig,
  DataConfig,
  GateConfig,
  OptimizerConfig,
  SpeechConfig,
  TrainConfig,
)


def get_config() -> TrainConfig:
  """E-Branchformer 3 x 128 with a one-layer decoder, nine languages."""
  return TrainConfig(
    name='tiny',
    steps=2200,
    vocab=170,
    # CTC aligns long before the decoder listens, and joint decoding leans on it.
    ctc_weight=0.6,
    log_every=50,
    eval_every=1100,
    checkpoint_every=550,
    model=SpeechConfig(
      d=128,
      heads=4,
      encoder_layers=3,
      decoder_layers=1,
      encoder_ffn=512,
      decoder_ffn=512,
      cgmlp=512,
      kernel=7,
      subsampling_channels=16,
      conv_sees_padding=False,
      dropout=0.0,
      attention_dropout=0.0,
      max_tokens=256,
      dtype='auto',
      scan_layers=False,
      gates=GateConfig(enabled=False),
    ),
    data=DataConfig(
      tasks=('asr', 'lid', 'st_eng'),
      task_weights=(1.0, 0.1, 0.4),
      batch_frames=3000,
      num_buckets=4,
      max_frames=400,
      max_tokens=96,
    ),
    augment=AugmentConfig(
      freq_width=15,
      time_masks=2,
      time_fraction=0.08,
      tempo=0.1,
      formant=0.08,
      gain=0.1,
      tilt=0.1,
    ),
    optimizer=OptimizerConfig(peak_lr=6e-3, warmup=100),
  )
