"""Quality of a model on a split: recognition, translation, language identification, gates."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gatedfm import metrics
from gatedfm.data import pipeline, text
from gatedfm.data.corpus import Split
from gatedfm.execution.decoding import Decoded
from gatedfm.execution.recognizer import Recognizer


def decode_split(
  recognizer: Recognizer, split: Split, task: str, gates: Any = None
) -> Iterator[tuple[Decoded, np.ndarray, list[str]]]:
  """Decodes every example of `task`: yields (decoded, example numbers, languages) by batch.

  Example numbers count within the split; padding rows have -1.
  """
  examples = split.examples
  rows = np.flatnonzero(examples.task == examples.tasks.index(task))
  if not len(rows):
    return
  for batch in pipeline.eval_batches(examples.select(rows), split.caches, split.shapes):
    numbers = np.where(batch['valid'], rows[batch['index']], -1)
    languages = [record(split, rows[i]).language for i in batch['index']]
    yield (
      recognizer(batch['features'], batch['frames'], task, languages, gates),
      numbers,
      languages,
    )


def record(split: Split, example: int) -> Any:
  """The data record that an example was made of."""
  source = split.sources[split.examples.source[example]]
  return source.records[split.examples.utterance[example]]


class GateMap:
  """Fractions of utterances whose modules were open, per language and task."""

  def __init__(self):
    self._open: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    self._count: dict[tuple[str, str], int] = collections.Counter()

  def add(self, decoded: Decoded, numbers: np.ndarray, languages: Sequence[str], task: str):
    """Counts the gates of a batch (`[N, B]`, or `[N]` for gates that never change)."""
    values = {k: np.asarray(v) for k, v in decoded.gates.values.items()}
    for b in np.flatnonzero(numbers >= 0):
      key = (languages[b], task)
      self._count[key] += 1
      into = self._open.setdefault(key, {k: np.zeros(len(v)) for k, v in values.items()})
      for k, v in values.items():
        into[k] += v[:, b] if v.ndim == 2 else v

  def contexts(self) -> list[dict[str, Any]]:
    """One entry per context, as reports read it."""
    return [
      {
        'language': language,
        'task': task,
        'utterances': self._count[language, task],
        'open': {k: (v / self._count[language, task]).tolist() for k, v in sites.items()},
      }
      for (language, task), sites in sorted(self._open.items(), key=lambda x: x[0][::-1])
    ]

  def mean(self) -> dict[str, np.ndarray]:
    """Open fraction of each site's layers, `[N]`, over all utterances."""
    total = sum(self._count.values())
    out: dict[str, Any] = collections.defaultdict(float)
    for sites in self._open.values():
      for k, v in sites.items():
        out[k] = out[k] + v / total
    return dict(out)


def decode_all(
  recognizer: Recognizer, split: Split, gates: Any = None
) -> tuple[GateMap, list[dict[str, str]]]:
  """Decodes a split for each of its tasks and keeps what it wrote.

  Args:
    recognizer: the model; `mask` execution, since examples of a batch differ in gates.
    split: with the tasks to score among its examples.
    gates: overrides the predictor.

  Returns: the gate map, and every output: id, language, task, reference, hypothesis (and
    `ctc`, the best CTC path). `counts` makes metrics of outputs.
  """
  gate_map, outputs = GateMap(), []
  tasks = [t for i, t in enumerate(split.examples.tasks) if (split.examples.task == i).any()]
  for task in tasks:
    for decoded, numbers, languages in decode_split(recognizer, split, task, gates):
      gate_map.add(decoded, numbers, languages, task)
      texts, ctc = recognizer.texts(decoded), recognizer.ctc_texts(decoded)
      found = recognizer.languages(decoded)
      for b in np.flatnonzero(numbers >= 0):
        item = record(split, numbers[b])
        row = {'id': item.id, 'language': item.language, 'task': task}
        if task == 'lid':
          row |= {'reference': item.language, 'hypothesis': found[b]}
        else:
          source = item.text if task == 'asr' else item.translations[task[3:]]
          row |= {
            'reference': text.normalize(source),
            'hypothesis': texts[b],
            'ctc': ctc[b],
          }
        outputs.append(row)
  return gate_map, outputs


def counts(outputs: Sequence[dict[str, str]]) -> dict[str, metrics.Counts]:
  """What each output contributes to each metric: `cer`, `wer`, `ctc_cer`, `bleu`, `chrf`, `lid`."""
  of = lambda *tasks: [r for r in outputs if r['task'] in tasks]
  column = lambda rows, name: [r[name] for r in rows]
  out: dict[str, metrics.Counts] = {}
  if asr := of('asr'):
    said, languages = column(asr, 'reference'), column(asr, 'language')
    out['cer'] = metrics.character_errors(said, column(asr, 'hypothesis'), languages)
    out['wer'] = metrics.word_errors(said, column(asr, 'hypothesis'), languages)
    out['ctc_cer'] = metrics.character_errors(said, column(asr, 'ctc'), languages)
  if translated := [r for r in outputs if r['task'].startswith('st_')]:
    directions = [f'{r["language"]}-{r["task"][3:]}' for r in translated]
    said, written = column(translated, 'reference'), column(translated, 'hypothesis')
    out['bleu'] = metrics.bleu(said, written, directions)
    out['chrf'] = metrics.chrf(said, written, directions)
  if lid := of('lid'):
    out['lid'] = metrics.identification(column(lid, 'reference'), column(lid, 'hypothesis'))
  return out
