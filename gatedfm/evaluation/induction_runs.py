"""Induction scores of a saved language model: one workdir with numbers and maps."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gatedfm import atomic, provenance
from gatedfm.analysis import importance_plots, induction, plots
from gatedfm.analysis.head_scorer import HeadScorer
from gatedfm.analysis.induction import MEASURES, Induction
from gatedfm.data import progress
from gatedfm.data.types import DataError
from gatedfm.execution import lm_workdir
from gatedfm.models.lm_config import LmConfig
from gatedfm.pruning import score_files
from gatedfm.pruning.calibration import HEADS
from gatedfm.trainers import workdirs

RESULT = 'induction.json'
FRACTIONS = tuple(i / 20 for i in range(21))
TOLD = 0.1, 0.3, 0.5, 0.7
LEAST = 0.01  # maps are logarithmic: what scores less looks alike


def run(
  checkpoint: Path,
  workdir: Path,
  how: Induction,
  importance: Path | None = None,
  say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
  """Scores all heads, also of a pruned model, in which heads that are gone score 0.

  Args:
    checkpoint: of a language model.
    workdir: to write `induction.json` and a map of each measure into; it must be empty or new.
    how: see `Induction`.
    importance: a scores.npz of `gatedfm.prune`: with it the result tells how much of each measure
      is left when the least important heads are closed.
    say: is told what was found; progress goes to stderr.

  Returns: what `induction.json` holds.

  Raises:
    ConfigError, DataError, WorkdirError, CheckpointError: before anything is written.
  """
  how.validate()
  with workdirs.new(workdir) as folder:
    return _run(checkpoint, folder, how, importance, say)


def _run(
  checkpoint: Path,
  workdir: Path,
  how: Induction,
  importance: Path | None,
  say: Callable[[str], None],
) -> dict[str, Any]:
  model = lm_workdir.load(checkpoint)
  ranking = None if importance is None else read_importance(importance, model.cfg)
  order = None if model.tokenizer is None else model.tokenizer.merge_order()
  scorer, start = HeadScorer(model.cfg, how, order), time.perf_counter()
  scored = scorer.scores(model.params, model.fixed())
  each = list(progress.track(scored, how.sequences, 'induction scores', 'sequences'))
  result = {
    'checkpoint': str(checkpoint),
    'induction': dataclasses.asdict(how) | {'inputs': how.fed},
    'order': 'number' if order is None else 'merges',
    'seconds': time.perf_counter() - start,
  } | provenance.collect('gatedfm.induction')
  for measure in MEASURES:
    each_ZxNxH = np.stack([scores[measure] for scores in each])
    mean_NxH, variance_NxH = each_ZxNxH.mean(0), each_ZxNxH.var(0)
    result[measure] = {'mean': mean_NxH.tolist(), 'variance': variance_NxH.tolist()}
    told = f'{measure}: {_highest(mean_NxH)}'
    if ranking is not None and mean_NxH.any():
      left = induction.retained(mean_NxH, ranking, FRACTIONS)
      result[measure]['retained'] = {'closed': list(FRACTIONS), 'share': left.tolist()}
      some = ', '.join(f'{left[FRACTIONS.index(at)]:.2f} at {at:.0%}' for at in TOLD)
      told += f'; left with the least important heads closed: {some}'
    plots.save(importance_plots.importance(np.maximum(mean_NxH, LEAST)), workdir / f'{measure}.png')
    say(told)
  if ranking is not None:
    result['importance'] = str(importance)
  atomic.write_text(workdir / RESULT, json.dumps(result) + '\n')
  return result


def _highest(scores_NxH: np.ndarray, number: int = 5) -> str:
  """Mean, and the heads that score most."""
  best = np.argsort(-scores_NxH, axis=None, kind='stable')[:number]
  heads = (np.unravel_index(i, scores_NxH.shape) for i in best)
  named = ', '.join(f'layer {n} head {h} {scores_NxH[n, h]:.3f}' for n, h in heads)
  return f'mean {scores_NxH.mean():.3f}; highest: {named}'


def read_importance(path: Path, cfg: LmConfig) -> np.ndarray:
  """The heads' scores `[N, H]` that `gatedfm.prune` wrote.

  Raises:
    DataError: no such file, or none of heads, or of another model.
  """
  found = score_files.load(path).get(HEADS)
  if found is None:
    raise DataError(f'{path} holds no scores of heads: prune with a scorer of heads')
  if found.shape != (cfg.layers, cfg.heads):
    raise DataError(
      f'{path} scores {found.shape} heads; this model has {(cfg.layers, cfg.heads)}: give scores '
      'that were taken on it'
    )
  return found
