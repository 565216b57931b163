"""Trained text classifiers on texts: labels, and how sure they are of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from gatedfm.data import texts as texts_lib
from gatedfm.data.batching import chunks
from gatedfm.data.texts import Vocabulary
from gatedfm.data.word_vectors import WordVectors
from gatedfm.models import tables, text_classifier
from gatedfm.models.speech_config import ConfigError
from gatedfm.models.text_classifier import TextClassifier
from gatedfm.trainers import checkpoints, text_loop
from gatedfm.trainers.checkpoints import CheckpointError
from gatedfm.trainers.text_config import TextTrainConfig
from gatedfm.trainers.text_step import Variables


class Labeller:
  """One classifier.

  Args:
    cfg: of its training, complete.
    variables: its own, of one seed.
    vocabulary: rows of its table.
    labels: names of its classes.
  """

  def __init__(
    self, cfg: TextTrainConfig, variables: Variables, vocabulary: Vocabulary, labels: Sequence[str]
  ):
    self.labels = tuple(labels)
    self._compat, self._longest = cfg.classifier.reference_compat, cfg.data.longest
    classifier, table = cfg.classifier, cfg.classifier.table
    if table.kind == 'factorized' and not table.project_relu:
      # Lookups are as narrow as the rank then.
      classifier, params = text_classifier.fold(classifier, variables['params'])
      variables = variables | {'params': params}
    self._vocabulary, self._variables = vocabulary, variables
    model = TextClassifier(classifier)

    def probabilities(variables: Variables, ids: jax.Array, lengths: jax.Array) -> jax.Array:
      # Dropout, should the model have it here too.
      logits = model.apply(variables, ids, lengths, rngs={'dropout': jax.random.key(0)})
      # Without the class of labels that were not seen, should there be one.
      return jax.nn.softmax(logits[:, : len(self.labels)].astype(jnp.float32), -1)

    self._probabilities = jax.jit(probabilities)

  @classmethod
  def load(cls, workdir: Path | str, seed: int | None = None) -> Labeller:
    """Reads a classifier that `gatedfm.train` or a sweep has trained.

    Args:
      workdir: of the training.
      seed: which of those trained side by side; None takes the one that is best on validation.

    Raises:
      CheckpointError: no classifier there, or one that is not trained to its end.
      ConfigError: a seed that was not trained.
    """
    return cls(*_trained(Path(workdir), seed))

  def __call__(self, texts: Sequence[str]) -> np.ndarray:
    """Probabilities `[N, C]` of the labels, for N texts."""
    split = [texts_lib.words(text) for text in texts]
    ids, lengths = self._vocabulary.encode(split, self._longest, self._longest)
    out = np.zeros((len(texts), len(self.labels)), np.float32)
    for chunk in chunks(lengths, self._longest, self._compat):
      some = ids[chunk.filled, : chunk.length], lengths[chunk.filled]
      found = np.asarray(self._probabilities(self._variables, *some))
      out[chunk.rows] = found[: len(chunk.rows)]
    return out


def trained_vectors(workdir: Path | str, seed: int | None = None) -> WordVectors:
  """The rows of a classifier's table, whatever stands for it, of all words that have one.

  Args:
    workdir, seed: as of `Labeller.load`, which raises the same.
  """
  cfg, variables, vocabulary, _ = _trained(Path(workdir), seed)
  classifier = cfg.classifier
  own = {name: found['table'] for name, found in variables.items() if 'table' in found}
  table = tables.to_dense(classifier.table, own, classifier.vocab_size, classifier.features)
  first = texts_lib.UNKNOWN + vocabulary.unknown  # what stands for no word comes before
  return WordVectors(vocabulary.words[first:], table[first:])


def _trained(
  workdir: Path, seed: int | None
) -> tuple[TextTrainConfig, Variables, Vocabulary, list[str]]:
  """What `Labeller` is made of."""
  cfg = text_loop.load_config(workdir)
  result, names = workdir / text_loop.RESULT, workdir / text_loop.CORPUS
  if not result.exists():
    raise CheckpointError(f'{workdir} is not trained to its end: give its command once more')
  if not names.exists():
    raise CheckpointError(f'{names} is missing: train anew, in another workdir')
  accuracy, about = json.loads(result.read_text())['accuracy'], json.loads(names.read_text())
  seeds = list(cfg.seeds)
  if seed is None:
    seed = seeds[int(np.argmax(accuracy['validation']))]
  if seed not in seeds:
    raise ConfigError(f'seed {seed} was not trained in {workdir}: take one of {seeds}')
  at, held = seeds.index(seed), checkpoints.load_params(workdir)
  own = jax.tree.map(lambda x: jnp.asarray(x[at]), held)
  words = tuple(about['words'])
  return cfg, own, Vocabulary(words, np.zeros(len(words), np.int64)), about['labels']
