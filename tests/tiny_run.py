"""Runs of a very small model on tones: data, configurations and processes shared by tests.

Also a configuration file: `python -m gatedfm.train --config=tests/tiny_run.py`, where the
environment variable TONES names the folder of the data; `--config=tests/tiny_run.py:sweep` has
the dense and the gated model.
"""

import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from gatedfm.data import corpus
from gatedfm.evaluation.sweep import SweepConfig
from gatedfm.trainers.config import (
  AugmentConfig,
  DataConfig,
  GateConfig,
  OptimizerConfig,
  SparsityConfig,
  SpeechConfig,
  TrainConfig,
)

ROOT = Path(__file__).parent.parent
WORDS = {
  'fra': ['un', 'chat', 'noir', 'dort', 'ici'],
  'rus': ['кот', 'спит', 'здесь', 'летом', 'дома'],
  'eng': ['a', 'cat', 'sleeps', 'here', 'now'],
}
STEPS, GATED_STEPS = 32, 50
TARGET = 0.5
# Half the compilation time, for the same program.
FAST = (
  '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true '
  '--xla_cpu_use_fusion_emitters=false'
)


def write_tones(folder):
  """A manifest of 38 utterances of 0.4 to 0.8 s in two languages, translated to English."""
  import soundfile

  rng = np.random.default_rng(0)
  rows = []
  for split, size in (('train', 24), ('validation', 6), ('test', 8)):
    for i in range(size):
      language = ('fra', 'rus')[i % 2]
      time = np.arange(int(rng.uniform(6_400, 12_700))) / 16_000
      audio = 0.3 * np.sin(2 * np.pi * (200 + 60 * i) * time) + 0.01 * rng.normal(size=len(time))
      soundfile.write(folder / f'{split}{i}.wav', audio, 16_000)
      chosen = rng.integers(0, 5, 2)
      speak = lambda lang, chosen=chosen: ' '.join(WORDS[lang][j] for j in chosen)
      rows.append(
        {
          'id': f'{split}/{i}',
          'audio': f'{split}{i}.wav',
          'language': language,
          'text': speak(language),
          'translation': {'eng': speak('eng')},
          'split': split,
          'group': f'{split}/{i}',
        }
      )
  lines = (json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
  (folder / 'manifest.jsonl').write_text(''.join(lines), encoding='utf-8')


def dense(folder):
  """One encoder and one decoder layer of width 16 on the tones in `folder`."""
  return TrainConfig(
    name='dense',
    steps=STEPS,
    vocab=56,
    log_every=1,
    eval_every=STEPS // 2,
    checkpoint_every=8,
    keep=3,
    tensorboard=False,
    data_dir=f'{folder}/cache',
    model=SpeechConfig(
      encoder='transformer',
      d=16,
      heads=2,
      encoder_layers=1,
      decoder_layers=1,
      encoder_ffn=16,
      decoder_ffn=16,
      subsampling_channels=2,
      conv_sees_padding=False,
      max_tokens=32,
      scan_layers=False,
    ),
    data=DataConfig(sources=(f'manifest:{folder}/manifest.jsonl',), batch_size=8, num_buckets=1),
    augment=AugmentConfig(freq_masks=1, time_masks=1, tempo=0.1),
    optimizer=OptimizerConfig(name='adamw', peak_lr=3e-3, gate_lr=5e-2, warmup=5),
  )


def gated(folder, parent='dense'):
  """The dense model, gated: heavily pulled to its target."""
  cfg = dense(folder)
  cfg.name, cfg.init_from, cfg.steps = 'gated', parent, GATED_STEPS
  cfg.checkpoint_every = cfg.eval_every = GATED_STEPS
  cfg.model.gates = GateConfig(enabled=True)
  cfg.data.loss_weights = (1.0, 2.0, 1.0)
  cfg.sparsity = SparsityConfig(target=TARGET, weight=20.0, penalty='abs_squared', ramp=0.1)
  return cfg


def sweep(folder):
  """Both."""
  points = {'dense': dense(folder), 'gated': gated(folder)}
  return SweepConfig(points=points, timed=2, rounds=2, longest=64, execution='static')


def get_config(kind='dense'):
  return {'dense': dense, 'gated': gated, 'sweep': sweep}[kind](os.environ['TONES'])


def complete(cfg, assets):
  """A copy with the sizes that follow from the tokenizer."""
  from gatedfm.trainers import loop

  return loop.complete(copy.deepcopy(cfg), assets)


def make_assets(cfg):
  return corpus.make_assets(cfg.data, cfg.vocab, Path(cfg.data_dir), False)


def random_model(folder, assets, **gates):
  """Configuration and random parameters of the gated model, whose gates follow their context."""
  import flax.linen as nn
  import jax
  import tiny_speech

  from gatedfm.trainers import step

  cfg = complete(gated(folder), assets).model
  cfg.gates = dataclasses.replace(cfg.gates, **gates)
  shapes = jax.eval_shape(lambda: nn.unbox(step.init_params(cfg, jax.random.key(0))))
  params = tiny_speech.random_tree(shapes, seed=1, scale=0.6)
  for name in set(params) & {'encoder_gates', 'decoder_gates'}:
    mlp = params[name]['mlp']
    mlp['kernel'], mlp['bias'] = 3 * mlp['kernel'], 0 * mlp['bias']
  return cfg, params


def start(folder, main, *arguments, **variables):
  """`python -m gatedfm.MAIN` as a process of its own, with one device, output as text.

  `variables` join the environment.
  """
  environment = (
    os.environ
    | {
      'PYTHONPATH': str(ROOT),
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': FAST,
      'TONES': str(folder),
      'GATEDFM_COMPILED': f'{folder}/compiled',
    }
    | variables
  )
  command = [sys.executable, '-m', f'gatedfm.{main}', *map(str, arguments)]
  pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
  return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def finish(process, code=0):
  """Waits for a process, checks its exit status, returns its outputs."""
  out, err = process.communicate(timeout=240)
  assert process.returncode == code, f'exit status {process.returncode}\n{out}\n{err}'
  return out, err


def train(folder, workdir, *arguments, kind='dense'):
  """Starts the training of `kind`."""
  config = f'--config=tests/tiny_run.py:{kind}'
  return start(folder, 'train', config, f'--workdir={workdir}', *arguments)


def compile_fast(cache):
  """Turns XLA's optimisations off in this process, and keeps what takes long to compile.

  Args:
    cache: folder of compiled programs; None turns everything back.
  """
  import jax
  from jax.experimental.compilation_cache import compilation_cache

  jax.config.update('jax_disable_most_optimizations', cache is not None)
  jax.config.update('jax_compilation_cache_dir', cache and str(cache))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.2 if cache else 1.0)
  compilation_cache.reset_cache()  # it looks at its folder but once
