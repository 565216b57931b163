"""Models at rest, dense and pruned, are asked as an evaluator asks them."""

from pathlib import Path

import numpy as np
import pytest

from gatedfm.data import questions
from gatedfm.data.types import DataError
from gatedfm.evaluation import lm_quality
from gatedfm.evaluation.few_shot import Evaluator
from gatedfm.evaluation.lm_quality import Questions
from gatedfm.execution import lm_workdir
from gatedfm.gates import Gates
from gatedfm.models.speech_config import ConfigError


def test_scores(checkpoint, own, tmp_path, fast_compilation):
  model = lm_workdir.load(checkpoint)
  gates = Gates({'decoder/attention': np.array([0.0, 1.0], np.float32)})
  lm_workdir.save(tmp_path / 'small', lm_workdir.compacted(model, gates, {}))
  evaluator = Evaluator(model.cfg, model.params, model.tokenizer)
  for folder, closed in ((checkpoint, None), (tmp_path / 'small', gates)):
    lines = []
    out = lm_quality.evaluate(folder, Questions((own[1],), (0, 2), 2, 4, text=own[0]), lines.append)
    task = questions.load(own[1])
    for shots in (0, 2):
      right = [
        evaluator.ask(task, 'test', 4, shots, seed, closed, shared=True).correct for seed in (0, 1)
      ]
      assert out[f'plain_{shots}']['accuracy']['mean'] == np.mean(right)
      low, high = out[f'plain_{shots}']['interval']
      assert low <= np.mean(right) <= high
    text = Path(own[0]).read_text()
    assert out['perplexity'] == pytest.approx(evaluator.perplexity(text, gates=closed), rel=1e-4)
    assert any(line.startswith('2 shots, plain') for line in lines)


def test_refusals(checkpoint, own):
  for asked, error, message in (
    (Questions(()), ConfigError, 'nothing to evaluate on'),
    (Questions(('sst9',)), DataError, "no task 'sst9'"),
    (Questions((own[1],), seeds=0), ConfigError, 'must be positive'),
    (Questions((), text='none.txt'), DataError, 'none.txt cannot be read'),
    (Questions((own[1],), split='dev'), ConfigError, 'split is'),
  ):
    with pytest.raises(error, match=message):
      lm_quality.evaluate(checkpoint, asked)
