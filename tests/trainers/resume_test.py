"""Real trainings, killed and continued: nothing of the result may show it."""

import json
import random
import shutil
import signal

import jax
import numpy as np
import tiny_run

from gatedfm.data import corpus, pipeline
from gatedfm.trainers import checkpoints


def read_until(process, text):
  """Reads output lines up to one that starts with `text`."""
  lines = []
  for line in process.stdout:
    lines.append(line)
    if line.startswith(text):
      return lines
  raise AssertionError(f'no {text!r} in:\n{"".join(lines)}\n{process.stderr.read()}')


def stop(process, step, number):
  read_until(process, f'step {step}/')
  process.send_signal(number)
  out, err = process.communicate(timeout=60)
  return process.returncode, out, err


def steps_saved(workdir):
  names = [p.name for p in (workdir / 'checkpoints').iterdir()]
  return sorted(int(name) for name in names if name.isdigit())


def values(workdir):
  """Training and validation values of a run: what must not depend on interruptions."""
  rows = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  kept = lambda row: {k: v for k, v in row.items() if k.startswith(('train', 'validation'))}
  return [(row['step'], kept(row)) for row in rows]


def test_killed_and_stopped_runs_end_like_an_uninterrupted_one(tone_data, dense_run, tmp_path):
  workdir = tmp_path / 'run'
  begin = lambda: tiny_run.train(tone_data, workdir)
  # The save of step 8 is complete where that of step 16 has begun.
  killed_at = random.SystemRandom().randrange(17, 23)
  note = f'killed after step {killed_at}'
  process = begin()
  code, _, err = stop(process, killed_at, signal.SIGKILL)
  assert code == -signal.SIGKILL, f'{note}\n{err}'
  first = steps_saved(workdir)
  assert first, note
  assert first[-1] < tiny_run.STEPS, note

  process = begin()
  stopped_at = killed_at + 5
  code, out, err = stop(process, stopped_at, signal.SIGTERM)
  assert code == 143, f'{note}\n{out}\n{err}'
  saved = steps_saved(workdir)[-1]
  assert f'SIGTERM: saved step {saved}' in out, note
  assert stopped_at <= saved < tiny_run.STEPS, note

  out, _ = tiny_run.finish(begin())
  assert f'restore: resuming at step {saved}' in out, note
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a, b, err_msg=note),
    checkpoints.load_params(workdir),
    checkpoints.load_params(dense_run),
  )
  assert values(workdir) == values(dense_run), note
  logged = [step for step, row in values(workdir) if 'train/loss' in row]
  assert logged == list(range(1, tiny_run.STEPS + 1)), note


def test_a_loss_that_is_not_finite_stops_and_names_the_batch(tone_data, dense_run, tmp_path):
  """Features of one utterance turn into NaN on disk, after the statistics were taken."""
  cfg = tiny_run.complete(tiny_run.dense(tone_data), corpus.Assets.load(dense_run / 'assets'))
  assets = corpus.Assets.load(dense_run / 'assets')
  split = corpus.open_split(cfg.data, assets, 'train', tone_data / 'cache')
  batches = pipeline.train_iterator(split.examples, split.caches, cfg.data, split.shapes)
  first_seen = {}
  for step in range(1, 13):
    for example in next(batches)['index']:
      first_seen.setdefault(int(split.examples.utterance[example]), step)
  batches.close()
  utterance, step = max(first_seen.items(), key=lambda item: item[1])
  assert step > 1

  data_dir, workdir = tmp_path / 'cache', tmp_path / 'run'
  shutil.copytree(tone_data / 'cache', data_dir)
  shutil.copytree(dense_run / 'assets', workdir / 'assets')
  shutil.copy(dense_run / 'config.json', workdir)
  cache = split.caches[0]
  path = data_dir / 'features' / cache.path.name / 'features.f32'
  poisoned = np.memmap(path, np.float32, 'r+').reshape(-1, 80)
  poisoned[cache.lengths[:utterance].sum()] = np.nan
  poisoned.flush()
  flags = (f'--config.data_dir={data_dir}', '--config.checkpoint_every=1')
  _, err = tiny_run.finish(tiny_run.train(tone_data, workdir, *flags), code=1)
  assert f'error: step {step}: ' in err
  assert 'loss' in err
  assert f'train/{utterance}' in err.replace('. ', ' ').split()
  assert 'Traceback' not in err
  assert steps_saved(workdir)[-1] == step - 1
  for leaf in jax.tree.leaves(checkpoints.load_params(workdir)):
    assert np.isfinite(leaf).all()
