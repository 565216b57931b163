"""Texts that a tiny classifier learns within a second, and vectors of their words."""

import json

import numpy as np

from gatedfm.data.types import SPLITS
from gatedfm.models.tables import TableConfig
from gatedfm.trainers.text_config import TextTrainConfig

RNG = np.random.default_rng(0)
FRUIT, TOOLS = ['apple', 'pear', 'plum', 'fig'], ['saw', 'drill', 'hammer', 'pliers']
OTHER = ['the', 'a', 'is', 'this', 'my', 'on', 'here', 'very']


def write_data(folder):
  """Texts that name a fruit or a tool among other words, and vectors of all but one word."""
  lines = []
  for i in range(240):
    kind = (FRUIT, TOOLS)[i % 2]
    words = [*RNG.choice(OTHER, RNG.integers(1, 12)), RNG.choice(kind), f'n{i}']
    split = SPLITS[0] if i < 160 else SPLITS[1 + i % 4 // 2]
    label = ('fruit', 'tool')[i % 2]
    lines.append({'text': ' '.join(words), 'label': label, 'split': split})
  (folder / 'own.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  vectors = {word: RNG.normal(size=6) for word in FRUIT + TOOLS[1:] + OTHER}
  rows = (' '.join([word, *map(str, row)]) for word, row in vectors.items())
  (folder / 'v.txt').write_text('\n'.join(rows))


def config(folder, kind='dan', table=None, **options):
  """Of classifiers of the texts in `folder`, two seeds."""
  cfg = TextTrainConfig(seeds=(0, 3), **({'epochs': 6} | options))
  cfg.classifier.kind, cfg.classifier.units, cfg.classifier.hidden = kind, 8, (8, 8)
  cfg.classifier.table = table or TableConfig()
  cfg.data.texts, cfg.data.vectors = str(folder / 'own.jsonl'), str(folder / 'v.txt')
  cfg.data.batch, cfg.data.buckets = 16, 1
  cfg.optimizer.schedule, cfg.optimizer.half_cycle, cfg.optimizer.peak_lr = 'clr', 11, 0.05
  return cfg
