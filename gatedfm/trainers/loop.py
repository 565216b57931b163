"""The training loop: restore, step, log, evaluate, save; the same for every device count."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.experimental import multihost_utils

from gatedfm import atomic, compiling, partitioning
from gatedfm.data import corpus, pipeline, sources
from gatedfm.data.types import DataError
from gatedfm.factorization import svd
from gatedfm.models.gate_predictor import GATE_MODULES
from gatedfm.nn import low_rank
from gatedfm.nn.layers import Factorized
from gatedfm.trainers import checkpoints, log, optimizer, step, throughput, workdirs
from gatedfm.trainers import config as config_lib
from gatedfm.trainers.config import ConfigError, TrainConfig
from gatedfm.trainers.log import say
from gatedfm.trainers.workdirs import WorkdirError

DATA = 'data.json'  # what a workdir was trained on


class Stopped(SystemExit):
  """SIGTERM came: everything is saved, the same command goes on."""


@contextlib.contextmanager
def _naming(fields: str) -> Iterator[None]:
  """Makes what lower layers say of impossible values a ConfigError that names the fields."""
  try:
    yield
  except (DataError, ConfigError):
    raise
  except ValueError as e:
    raise ConfigError(f'{fields}: {e}') from e


def resolve_dtype(name: str) -> str:
  """`auto` -> bfloat16 where the hardware multiplies it, else float32."""
  if name != 'auto':
    return name
  if jax.default_backend() != 'cpu':
    return 'bfloat16'
  cpuinfo = Path('/proc/cpuinfo')
  return 'bfloat16' if cpuinfo.exists() and 'amx_bf16' in cpuinfo.read_text() else 'float32'


def _settle_sources(cfg: TrainConfig, workdir: Path, data_dir: Path) -> None:
  """Writes into `cfg` what `auto` means: what it meant when the workdir began, else by machine.

  So a workdir that goes to another machine trains and is scored on the same data, or on none.
  """
  begun = (workdir / checkpoints.CONFIG).exists()
  saved = checkpoints.load_config(workdir)['data'] if begun else {}
  for name in ('sources', 'extra'):
    specs = getattr(cfg.data, name)
    before = saved.get(name, ())
    if len(before) != len(specs):  # refused later on, for what it is
      before = [sources.resolve(spec, data_dir) for spec in specs]
    settled = (b if spec == 'auto' else spec for spec, b in zip(specs, before))
    setattr(cfg.data, name, tuple(settled))


def _fingerprints(workdir: Path, train: corpus.Split, resuming: bool) -> str:
  """Content of `DATA`; raises WorkdirError where a run to be resumed saw other data."""
  mine = [[source.name, source.fingerprint] for source in train.sources]
  path = workdir / DATA
  if resuming and path.exists():
    changed = [a[0] for a, b in zip(mine, json.loads(path.read_text())) if a != b]
    if changed:
      raise WorkdirError(
        f'the data of {", ".join(changed)} has changed since {workdir} began to train on it. To '
        f'go on with the new data: --config.continue_from={workdir} and another --workdir.'
      )
  return json.dumps(mine) + '\n'


def _assets(cfg: TrainConfig, workdir: Path, data_dir: Path) -> corpus.Assets:
  """Tokenizer and feature statistics: this run's, its parent's, or made now."""
  folder = workdir / corpus.ASSETS
  parent = cfg.init_from or cfg.continue_from
  # Without a configuration beside them they are another's, whose run was refused.
  if not (workdir / checkpoints.CONFIG).exists():
    if parent:
      corpus.Assets.load(Path(parent) / corpus.ASSETS).save(folder)
    else:
      corpus.make_assets(cfg.data, cfg.vocab, data_dir, cfg.skip_bad).save(folder)
  return corpus.Assets.load(folder)


def complete(cfg: TrainConfig, assets: corpus.Assets) -> TrainConfig:
  """Fills in what follows from tokenizer and hardware."""
  for name, size in assets.sizes.items():
    setattr(cfg.model, name, size)
  cfg.model.dtype = resolve_dtype(cfg.model.dtype)
  return cfg


def _abstract(init: Any, shardings: Any) -> Any:
  plain = jax.eval_shape(step.unboxed(init), jax.random.key(0))
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), plain, shardings
  )


def _restore(
  cfg: TrainConfig, ckpt: checkpoints.Checkpoints, init: Any, shardings: Any
) -> tuple[step.TrainState, dict[str, float]]:
  """The state to start from. The order is important:

  1. resume this workdir's own checkpoint;
  2. continue from another run, optimizer, step and all;
  3. initialise the parameters from another run (a gate predictor starts fresh);
  4. start from scratch.
  """
  abstract = _abstract(init, shardings)
  if ckpt.latest is not None:
    state, progress = ckpt.load(abstract)
    say(f'restore: resuming at step {ckpt.latest}')
    return state, progress
  nothing = {'next_batch': 0, 'seconds': 0.0}
  if cfg.continue_from:
    with checkpoints.Checkpoints(Path(cfg.continue_from), mine=False) as other:
      if other.latest is None:
        raise checkpoints.CheckpointError(f'{cfg.continue_from} holds no checkpoint to continue')
      state, progress = other.load(abstract)
    say(f'restore: continuing from {cfg.continue_from}')
    return state, progress
  if cfg.init_from:  # refused, if it must be, before anything is compiled
    loaded = _parent(cfg, abstract.params)
  state = jax.jit(step.unboxed(init), out_shardings=shardings)(jax.random.key(cfg.seed))
  if cfg.init_from:
    made = traverse_util.flatten_dict(state.params)
    taken = traverse_util.flatten_dict(loaded)
    fresh = sorted(
      {name for path in set(made) - set(taken) for name in path if name in GATE_MODULES}
    )
    state = state.replace(params=traverse_util.unflatten_dict(made | taken))
    say(f'restore: parameters of {cfg.init_from}' + (f', fresh {fresh}' if fresh else ''))
  else:
    say('restore: nothing to restore, starting from scratch')
  return state, nothing


def _parent(cfg: TrainConfig, abstract: Any) -> Any:
  """Parameters of `init_from` as this model has them: matrices by SVD, where it has factors."""
  folder = Path(cfg.init_from)
  before = checkpoints.load_config(folder)['model'].get('factors', ())
  mine, theirs = cfg.model.ranks, low_rank.ranks(before)
  new = {path: rank for path, rank in mine.items() if path not in theirs}
  flat = traverse_util.flatten_dict(abstract, sep='/')

  def whole(x: Factorized) -> jax.ShapeDtypeStruct:
    everywhere = jax.NamedSharding(x.first.sharding.mesh, jax.P())
    return jax.ShapeDtypeStruct(x.shape, x.first.dtype, sharding=everywhere)

  wanted = flat | {path: whole(flat[path]) for path in new}
  nested = traverse_util.unflatten_dict(wanted, sep='/')
  loaded = checkpoints.load_params(folder, nested, ' '.join(GATE_MODULES))
  found = traverse_util.flatten_dict(loaded, sep='/')
  for path, rank in new.items():
    factors = svd.factorize(np.asarray(found[path].addressable_data(0)), rank, split='balanced')
    place = lambda x, like: jax.device_put(x, like.sharding)
    pair = place(factors.first, flat[path].first), place(factors.second, flat[path].second)
    found[path] = Factorized(*pair)
    say(f'restore: {path} by rank {rank}, {100 * factors.energy:.1f}% of its energy')
  return traverse_util.unflatten_dict(found, sep='/')


@contextlib.contextmanager
def _sigterm() -> Iterator[Callable[[int], bool]]:
  """Yields what tells at a step whether SIGTERM has come, to all processes the same."""
  if jax.process_count() > 1:  # they agree on a step to stop at
    yield multihost_utils.reached_preemption_sync_point
    return
  seen: list[int] = []
  before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
  try:
    yield lambda step: bool(seen)
  finally:
    signal.signal(signal.SIGTERM, before)


class Evaluator:
  """Validation losses, teacher-forced, averaged over utterances, accuracy over tokens."""

  def __init__(self, cfg: TrainConfig, assets: corpus.Assets, split: corpus.Split, mesh: Any):
    self._split, self._mesh = split, mesh
    self._step = step.EvalStep(cfg, assets.stats)

  def prepare(self, params: Any, gating_now: dict[str, Any]) -> None:
    """Starts compiling for every batch shape."""
    for shape in self._split.shapes:
      self._step.prepare(params, _abstract_batch(shape, self._mesh), gating_now)

  def __call__(self, params: Any, gating_now: dict[str, Any]) -> dict[str, float]:
    means = []
    for batch in pipeline.eval_batches(
      self._split.examples, self._split.caches, self._split.shapes,
      jax.process_index(), jax.process_count(),
    ):  # fmt: skip
      means.append(self._step(params, _on_device(batch, self._mesh), gating_now))
    return {f'validation/{k}': v for k, v in self._step.total(means, gating_now).items()}


def _abstract_batch(shape: pipeline.Shape, mesh: Any) -> dict[str, jax.ShapeDtypeStruct]:
  return partitioning.abstract_batch(pipeline.batch_arrays(shape), mesh)


def _on_device(batch: dict[str, np.ndarray], mesh: Any) -> dict[str, jax.Array]:
  return partitioning.global_batch({k: v for k, v in batch.items() if k != 'index'}, mesh)


def _check_finite(values: dict[str, float], at: int, ids: list[str]) -> None:
  bad = [k for k, v in values.items() if not np.isfinite(v)]
  if bad:
    raise FloatingPointError(
      f'step {at}: {", ".join(bad)} is not finite. Batch: {" ".join(ids)}. The last checkpoint '
      'is sound; lower optimizer.peak_lr or leave these utterances out.'
    )


def _prepare(
  train_step: step.TrainStep,
  state: step.TrainState,
  gating_now: dict[str, Any],
  shapes: Sequence[pipeline.Shape],
  mesh: Any,
) -> dict[tuple[int, int], list[futures.Future]]:
  """Starts compiling for batches of these shapes; returns what one of `[B, T]` waits for."""
  return {
    (shape.batch // jax.process_count(), shape.frames): train_step.prepare(
      state, _abstract_batch(shape, mesh), gating_now
    )
    for shape in shapes
  }


def train(cfg: TrainConfig, workdir: Path | str) -> None:
  """Trains to `cfg.steps`, from wherever the workdir stands.

  Args:
    cfg: the whole configuration; checked before anything is compiled or written.
    workdir: gets `config.json`, `assets/`, `checkpoints/`, `metrics.jsonl`, `events/`.

  Raises:
    ValueError: an impossible configuration (WorkdirError: a workdir of another one, or in use).
    DataError: bad data, with a report.
    FloatingPointError: a loss that is not finite, naming step and utterances.
    Stopped: SIGTERM, after saving.
  """
  if not isinstance(cfg, TrainConfig):
    raise ConfigError(f'the configuration is a {type(cfg).__name__}, not a TrainConfig: run '
                      'several points with python -m gatedfm.sweep')  # fmt: skip
  cfg.validate()
  workdir = Path(workdir)
  workdirs.refuse_several(workdir)
  cfg.init_from, cfg.continue_from = map(os.path.expanduser, (cfg.init_from, cfg.continue_from))
  for parent in filter(None, (cfg.init_from, cfg.continue_from)):
    checkpoints.load_config(Path(parent))
  data_dir = sources.data_folder(cfg.data_dir)
  with _naming('mesh'):
    mesh = partitioning.make_mesh(cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.model)
  with contextlib.ExitStack() as stack:
    stack.enter_context(workdirs.alone(workdir))
    _settle_sources(cfg, workdir, data_dir)
    cfg = complete(cfg, _assets(cfg, workdir, data_dir))
    workdirs.check_owner(cfg, workdir)
    stack.enter_context(partitioning.activate(mesh))
    ckpt = stack.enter_context(checkpoints.Checkpoints(workdir, cfg.keep))
    if ckpt.latest is not None and ckpt.latest >= cfg.steps:
      say(f'{workdir}: already trained to step {ckpt.latest}')
      return
    _run(cfg, workdir, data_dir, mesh, ckpt)


def _run(
  cfg: TrainConfig, workdir: Path, data_dir: Path, mesh: Any, ckpt: checkpoints.Checkpoints
) -> None:
  assets = corpus.Assets.load(workdir / corpus.ASSETS)
  replicas = mesh.shape['data'] * mesh.shape['fsdp']
  opened = lambda split: corpus.open_split(
    cfg.data, assets, split, data_dir, replicas, cfg.skip_bad, say
  )
  with _naming('data'):
    train_split, validation_split = opened('train'), opened('validation')
    batches = pipeline.train_iterator(
      train_split.examples, train_split.caches, cfg.data, train_split.shapes,
      jax.process_index(), jax.process_count(),
    )  # fmt: skip
  fingerprints = _fingerprints(workdir, train_split, ckpt.latest is not None)
  evaluate = Evaluator(cfg, assets, validation_split, mesh)

  init = step.make_init(cfg)
  with _naming('model'):
    shardings = partitioning.shardings(init, mesh, jax.random.key(0))
  state, progress = _restore(cfg, ckpt, init, shardings)
  first = int(state.step)
  if first >= cfg.steps:
    raise ConfigError(f'steps is {cfg.steps}, but {cfg.continue_from} stands at {first}: raise it')
  # Nothing was refused: from here on the workdir is this configuration's.
  atomic.write_text(workdir / DATA, fingerprints)
  atomic.write_text(
    workdir / checkpoints.CONFIG, json.dumps(config_lib.to_dict(cfg), indent=1) + '\n'
  )
  batches.set_state({'next_batch': int(progress['next_batch'])})
  train_step = step.TrainStep(cfg, assets.stats, shardings)

  count = sum(a.size for a in jax.tree.leaves(state.params))
  say(
    f'train: {cfg.name or workdir.name}: {count / 1e6:.2f} M parameters, {cfg.model.dtype}, '
    f'{jax.devices()[0].platform} mesh {dict(mesh.shape)}, steps {first} to {cfg.steps} '
    f'({cfg.steps / batches.batches_per_epoch:.1f} epochs of {batches.batches_per_epoch})'
  )
  main = jax.process_index() == 0
  logger = log.Log(workdir, first, cfg.tensorboard) if main else None
  clock = log.Clock(cfg.steps, progress['seconds'])
  programs: dict[tuple[int, ...], list[futures.Future]] = {}
  pending: tuple[int, Any, np.ndarray] | None = None
  window = throughput.Window(cfg)

  def settle() -> None:
    """Fetches the previous step's metrics, so that the device never waits for the host."""
    nonlocal pending
    if pending is not None:
      at, metrics, rows = pending
      values = {k: float(v) for k, v in jax.device_get(metrics).items()}
      _check_finite(values, at, [train_split.utterance_id(i) for i in rows])
      window.add(values)
      pending = None

  def pause(seconds: float) -> None:
    clock.pause(seconds)
    window.pause(seconds)

  def save(at: int) -> None:
    settle()
    ckpt.save(at, state, batches.get_state() | {'seconds': clock.seconds})

  with _sigterm() as terminated, contextlib.closing(batches):
    for at in range(first + 1, cfg.steps + 1):
      batch = next(batches)
      shape = batch['features'].shape[:2]
      gating_now = optimizer.sparsity_schedule(cfg.sparsity, cfg.steps, at - 1)
      began = time.perf_counter()
      if not programs:  # a first step soon, the other programs beside those that follow
        shapes = [s for s in train_split.shapes if s.frames == shape[1]]
        # A gradient for each shape, and one update; validation has programs of its own.
        more = len(train_split.shapes) - len(shapes) + len(validation_split.shapes)
        say(f'compiling: programs for the first batch: {len(shapes) + 1}; later ones: {more}')
        programs = _prepare(train_step, state, gating_now, shapes, mesh)
      elif at == first + 2:
        programs |= _prepare(train_step, state, gating_now, train_split.shapes, mesh)
        evaluate.prepare(state.params, gating_now)
      if programs[shape]:
        compiling.wait(programs[shape], say, 'programs for this batch')
        programs[shape] = []
        pause(time.perf_counter() - began)
      state, metrics = train_step(state, _on_device(batch, mesh), gating_now)
      settle()
      pending = (at, metrics, batch['index'])
      window.count(batch)
      if at == first + 1:  # it waits for the first batch and much else: no pace to go by
        settle()
        clock.begin(at)
        window.begin()
      if at % cfg.log_every == 0 or at in (1, cfg.steps):
        settle()
        values = window.close()
        if logger:
          logger.write(at, values)
          say(throughput.line(cfg, at, values, clock))
      if at % cfg.eval_every == 0 or at == cfg.steps:
        began = time.perf_counter()
        values = evaluate(state.params, gating_now)
        pause(time.perf_counter() - began)
        if logger:
          logger.write(at, values)
          say('  ' + throughput.brief('validation', values))
      if at % cfg.checkpoint_every == 0 or at == cfg.steps:
        save(at)
      if terminated(at):
        save(at)
        ckpt.wait()
        say(f'SIGTERM: saved step {at}; the same command goes on from there')
        raise Stopped(143)
  if logger:
    logger.close()
