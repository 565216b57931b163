"""Trains text classifiers, several seeds side by side, from vectors or from other classifiers."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gatedfm import atomic, provenance
from gatedfm.models import tables
from gatedfm.models.speech_config import ConfigError
from gatedfm.models.text_classifier import TextClassifier
from gatedfm.trainers import checkpoints, log, text_corpus, workdirs
from gatedfm.trainers import config as config_lib
from gatedfm.trainers.log import say
from gatedfm.trainers.text_config import TextTrainConfig
from gatedfm.trainers.text_corpus import TextCorpus
from gatedfm.trainers.text_step import Steps, TextState, Variables, keys
from gatedfm.trainers.workdirs import WorkdirError

RESULT = 'result.json'
RIGHT = 'right.npz'  # of each split, which texts each seed has right, `[Z, N]`
CORPUS = 'corpus.json'  # names of rows and classes, hashes of what the training began with
KIND = 'text'


def load_config(workdir: Path) -> TextTrainConfig:
  """The configuration that classifiers of a workdir were trained with."""
  return config_lib.from_dict(TextTrainConfig, checkpoints.load_config(workdir, KIND))


def load_corpus(cfg: TextTrainConfig) -> TextCorpus:
  """The texts of a configuration; raises DataError."""
  return text_corpus.load(cfg.data, cfg.classifier.reference_compat, cfg.data_dir)


def complete(cfg: TextTrainConfig, corpus: TextCorpus) -> TextTrainConfig:
  """The configuration with what follows from the data: sizes, ranks.

  Raises:
    ConfigError: sizes that do not go together, a table that cannot be so small.
  """
  model = cfg.classifier
  features = model.features if corpus.table is None else corpus.table.shape[1]
  if not features:
    raise ConfigError('classifier.features is 0, and there are no data.vectors to take it from')
  have = {
    'vocab_size': len(corpus.vocabulary.words),
    'features': features,
    'classes': len(corpus.labels),
  }
  for name, value in have.items():
    if getattr(model, name) not in (0, value):
      raise ConfigError(
        f'classifier.{name} is {getattr(model, name)}, of the data {value}: leave 0'
      )
  table = model.table
  if corpus.table is None and not cfg.init_from and table.kind in tables.CODED:
    raise ConfigError(
      f'a {table.kind} table is made of another and keeps its codes: give data.vectors or init_from'
    )
  if table.kind == 'quantized_factors' and not (table.rank or table.compression) and cfg.init_from:
    # Of the factors that it is made of.
    table = dataclasses.replace(table, rank=load_config(Path(cfg.init_from)).classifier.table.rank)
  table = tables.resolved(table, have['vocab_size'], features)
  return dataclasses.replace(cfg, classifier=dataclasses.replace(model, table=table, **have))


def _fresh(cfg: TextTrainConfig, corpus: TextCorpus) -> Variables:
  """New variables `[Z, ...]`, tables of the vectors."""
  model = TextClassifier(cfg.classifier)

  def one(key: jax.Array) -> Variables:
    rngs = {'params': key, 'dropout': key}
    return nn.unbox(model.init(rngs, jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32)))

  made = jax.jit(jax.vmap(one))(keys(cfg.seeds, 0))
  if corpus.table is None:
    return made
  held = [
    tables.from_dense(cfg.classifier.table, corpus.table, corpus.vocabulary.counts, seed)
    for seed in cfg.seeds
  ]
  return _with_tables(made, held)


def _with_tables(variables: Variables, held: list[Variables]) -> Variables:
  """Variables `[Z, ...]` whose tables are these, one for each seed."""
  stacked = jax.tree.map(lambda *x: jnp.stack([jnp.asarray(y) for y in x]), *held)
  rest = {k: v for k, v in variables.get('params', {}).items() if k != 'table'}
  own = {'table': stacked['params']} if stacked.get('params') else {}
  out = {'params': rest | own}
  out |= {k: {'table': v} for k, v in stacked.items() if k != 'params'}
  return out


def _inherited(cfg: TextTrainConfig, corpus: TextCorpus) -> Variables:
  """Variables `[Z, ...]` of `init_from`, tables of another kind made of its own."""
  folder = Path(cfg.init_from)
  parent, counts = load_config(folder), corpus.vocabulary.counts
  mine, theirs = cfg.classifier, parent.classifier
  if parent.seeds != cfg.seeds:
    raise ConfigError(f'seeds are {cfg.seeds}, those of {folder} {parent.seeds}: take the same')
  if not (folder / RESULT).exists():
    raise ConfigError(f'{folder} has no {RESULT}: let its training end first')
  if json.loads((folder / RESULT).read_text())['data'] != corpus.fingerprint:
    raise ConfigError(f'{folder} was trained on other texts or another vocabulary: take its data')
  plain = dataclasses.replace(mine, table=theirs.table, dropout=theirs.dropout)
  if plain != theirs:
    wrong = config_lib.differences(config_lib.to_dict(theirs), config_lib.to_dict(plain))
    raise ConfigError(f'init_from={folder} has another classifier:\n  ' + '\n  '.join(wrong))
  held = checkpoints.load_params(folder)
  if mine.table != theirs.table and _built(mine.table) != _built(theirs.table):
    split = lambda i: jax.tree.map(
      lambda x: np.asarray(x[i]), {k: v['table'] for k, v in held.items() if 'table' in v}
    )
    shape = mine.vocab_size, mine.features
    made = []
    for i, seed in enumerate(cfg.seeds):
      if (mine.table.kind, theirs.table.kind) == ('quantized_factors', 'factorized'):
        if mine.table.rank != theirs.table.rank:
          raise ConfigError(
            f'table.rank is {mine.table.rank}, that of {folder} {theirs.table.rank}: take the same'
          )
        made.append(tables.quantize_factors(mine.table, split(i)['params']))
      else:
        dense = tables.to_dense(theirs.table, split(i), *shape)
        made.append(tables.from_dense(mine.table, dense, counts, seed))
    held = _with_tables(held, made)
  if cfg.fresh_lstm:
    held['params']['lstm'] = _fresh(cfg, corpus)['params']['lstm']
  return jax.tree.map(jnp.asarray, held)


def _built(cfg: tables.TableConfig) -> tables.TableConfig:
  """What decides on a table's arrays, without how they were come by."""
  return dataclasses.replace(
    cfg, compression=0.0, init='svd', split='reference', project_relu=False
  )


def train(
  cfg: TextTrainConfig, workdir: Path | str, corpus: TextCorpus | None = None
) -> dict[str, Any]:
  """Trains to `cfg.epochs`, from wherever the workdir stands; reports on test once, at the end.

  Args:
    cfg: the whole configuration; checked before anything is compiled or written.
    workdir: gets `config.json`, `corpus.json`, `checkpoints/`, `metrics.jsonl`, `right.npz` and,
      last of all, `result.json`.
    corpus: what `load_corpus` gives, should it be at hand.

  Returns: the result: accuracies by split and seed, of what validation chose; what the table takes.

  Raises:
    ConfigError, WorkdirError, DataError, CheckpointError: what cannot be, before training.
    FloatingPointError: a loss that is not finite.
  """
  if not isinstance(cfg, TextTrainConfig):
    raise ConfigError(f'the configuration is a {type(cfg).__name__}, not a TextTrainConfig')
  cfg.validate()
  workdir = Path(workdir)
  workdirs.refuse_several(workdir)
  cfg = dataclasses.replace(
    cfg, init_from=os.path.expanduser(cfg.init_from), seeds=tuple(cfg.seeds)
  )
  if cfg.init_from:
    load_config(Path(cfg.init_from))
  corpus = corpus or load_corpus(cfg)
  cfg = complete(cfg, corpus)
  with workdirs.alone(workdir):
    workdirs.check_owner(cfg, workdir, KIND)
    origin = {'data': corpus.fingerprint, 'parent': _digest(cfg.init_from)}
    _check_origin(workdir, origin, cfg.init_from)
    if (workdir / RESULT).exists():
      say(f'{workdir}: already trained')
      return json.loads((workdir / RESULT).read_text())
    return _run(cfg, corpus, origin, workdir)


def _digest(folder: str) -> str:
  """Hash of what a training has ended with; '' of no training, or of one that is gone."""
  path = Path(folder) / RESULT
  return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if folder and path.exists() else ''


def _check_origin(workdir: Path, origin: Mapping[str, str], parent: str) -> None:
  """Raises WorkdirError for texts, or a parent, that are not those the training began with."""
  if not (workdir / CORPUS).exists():
    return
  before = json.loads((workdir / CORPUS).read_text())
  if before['data'] != origin['data']:
    raise WorkdirError(
      f'texts or vectors have changed since the training of {workdir} began: take another workdir'
    )
  if origin['parent'] and before['parent'] != origin['parent']:
    raise WorkdirError(
      f'{workdir} began with an earlier training of {parent}: remove it, and it is made anew'
    )


def _run(
  cfg: TextTrainConfig, corpus: TextCorpus, origin: Mapping[str, str], workdir: Path
) -> dict[str, Any]:
  batches = text_corpus.Batches(
    corpus.splits['train'],
    cfg.data.batch,
    cfg.data.buckets,
    cfg.seeds,
    cfg.classifier.reference_compat,
  )
  total = cfg.epochs * len(batches)
  steps = Steps(cfg.classifier, cfg.optimizer, total, corpus.splits['train'], cfg.seeds)
  progress = {'seconds': 0.0}
  if begun := _begun(workdir):
    state = jax.eval_shape(lambda: steps.start(_fresh_shape(cfg)))
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device)
    state = jax.tree.map(like, state)
  elif cfg.init_from:
    state = steps.start(_inherited(cfg, corpus))
    say(f'restore: classifiers of {cfg.init_from}')
  else:
    state = steps.start(_fresh(cfg, corpus))
  # Nothing was refused: from here on the workdir is this configuration's.
  with checkpoints.Checkpoints(workdir, keep=1) as ckpt:
    if begun:
      state, progress = ckpt.load(state)
      say(f'restore: epoch {ckpt.latest} of this workdir')
    atomic.write_text(
      workdir / checkpoints.CONFIG, json.dumps(config_lib.to_dict(cfg), indent=1) + '\n'
    )
    names = {'labels': corpus.labels, 'words': corpus.vocabulary.words}
    atomic.write_text(workdir / CORPUS, json.dumps({**origin, **names}) + '\n')
    shape = cfg.classifier.vocab_size, cfg.classifier.features
    small = tables.size(cfg.classifier.table, *shape)
    say(
      f'train: {cfg.name or workdir.name}: {cfg.data.texts}, {cfg.classifier.kind}, '
      f'{cfg.classifier.table.kind} table of {shape[0]} x {shape[1]} ({small.bytes / 1e6:.3f} MB), '
      f'{len(cfg.seeds)} seeds, {cfg.epochs} epochs of {len(batches)} steps'
    )
    done = int(state.step) // max(len(batches), 1)
    if cfg.init_from and cfg.epochs and not begun:
      # What it starts from is a choice like that after each epoch.
      right = steps.right(state.params, corpus.splits['validation'])
      state = steps.choose(state, jnp.asarray(right.mean(1), jnp.float32))
    logger = log.Log(workdir, done, cfg.tensorboard)
    clock = log.Clock(cfg.epochs, progress['seconds'])
    clock.begin(done)
    for epoch in range(done + 1, cfg.epochs + 1):
      losses = []
      for batch in batches.epoch(epoch):
        state, losses_Z = steps(state, batch)
        losses.append(losses_Z)
      means_Z = np.asarray(jnp.stack(losses)).mean(0)
      if not np.isfinite(means_Z).all():
        raise FloatingPointError(
          f'epoch {epoch}: the loss of seeds {np.array(cfg.seeds)[~np.isfinite(means_Z)].tolist()} '
          'is not finite; lower optimizer.peak_lr'
        )
      right = steps.right({**state.params, 'params': state.current}, corpus.splits['validation'])
      accuracy_Z = right.mean(1)
      state = steps.choose(state, jnp.asarray(accuracy_Z, jnp.float32))
      values = {
        'train/loss': float(means_Z.mean()),
        'validation/accuracy': float(accuracy_Z.mean()),
      }
      logger.write(epoch, values)
      say(
        f'  epoch {epoch}/{cfg.epochs}: loss {values["train/loss"]:.4f}, validation accuracy '
        f'{100 * values["validation/accuracy"]:.2f}%, {log.duration(clock.eta(epoch))} left'
      )
      if epoch % cfg.checkpoint_every == 0 or epoch == cfg.epochs:
        ckpt.save(epoch, state, {'next_batch': 0, 'seconds': clock.seconds})
    if not cfg.epochs:
      ckpt.save(0, state, {'next_batch': 0, 'seconds': clock.seconds})
    logger.close()
  return _report(cfg, corpus, steps, state, clock.seconds, workdir)


def _begun(workdir: Path) -> bool:
  """Whether there is a checkpoint to go on from."""
  try:
    return checkpoints.latest_step(workdir) >= 0
  except checkpoints.CheckpointError:
    return False


def _fresh_shape(cfg: TextTrainConfig) -> Variables:
  """Variables `[Z, ...]` of the configuration's shapes."""
  model = TextClassifier(cfg.classifier)
  rngs = {'params': jax.random.key(0), 'dropout': jax.random.key(0)}
  one = nn.unbox(model.init(rngs, jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32)))
  return jax.tree.map(lambda x: jnp.stack([x] * len(cfg.seeds)), one)


def _report(
  cfg: TextTrainConfig,
  corpus: TextCorpus,
  steps: Steps,
  state: TextState,
  seconds: float,
  workdir: Path,
) -> dict[str, Any]:
  """Writes and returns `result.json`."""
  shape = cfg.classifier.vocab_size, cfg.classifier.features
  small = tables.size(cfg.classifier.table, *shape)
  full = corpus.full_features or cfg.classifier.features
  right = {
    split: steps.right(state.params, corpus.splits[split])
    for split in ('validation', *(['test'] if cfg.final else []))
  }
  accuracy = {split: each.mean(1).tolist() for split, each in right.items()}
  buffer = io.BytesIO()
  np.savez_compressed(buffer, **right)
  atomic.write_bytes(workdir / RIGHT, buffer.getvalue())
  result = {
    **provenance.collect('gatedfm.train'),
    'name': cfg.name or workdir.name,
    'data': corpus.fingerprint,
    'seeds': list(cfg.seeds),
    'texts': {split: len(arrays) for split, arrays in corpus.splits.items()},
    'accuracy': accuracy,
    'table': {
      'kind': cfg.classifier.table.kind,
      'parameters': small.parameters,
      'bytes': small.bytes,
      'parameters_removed': 1 - small.parameters / (shape[0] * full),
      'bytes_removed': 1 - small.bytes / (4 * shape[0] * full),
    },
    'parameters': sum(x.size for x in jax.tree.leaves(state.params)) // len(cfg.seeds),
    'seconds': seconds,
  }
  atomic.write_text(workdir / RESULT, json.dumps(result, indent=1) + '\n')
  means = ', '.join(f'{split} {100 * np.mean(values):.2f}%' for split, values in accuracy.items())
  say(
    f'  {result["name"]}: {means}, table '
    f'{100 * result["table"]["bytes_removed"]:.1f}% smaller; {log.duration(seconds)}'
  )
  return result
