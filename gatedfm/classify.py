"""Says which label a trained text classifier gives to texts.

Example:
  python -m gatedfm.classify --checkpoint=runs/trec 'Who wrote Hamlet?' 'How far is the moon?'
  python -m gatedfm.classify --checkpoint=runs/trec --texts=mine.csv
  python -m gatedfm.classify --checkpoint=runs/trec --write_vectors=trec.txt

Prints label, probability and text, separated by tabs. A file is .txt, a text a line, or .jsonl or
.csv with text; where all lines of it have a label too, the accuracy follows on stderr. The last
writes the vectors of its words as text, as GloVe's are published, for use elsewhere.
"""

import sys

from absl import flags

from gatedfm import mains

_CHECKPOINT = flags.DEFINE_string('checkpoint', None, 'Workdir of the training of classifiers.')
_TEXTS = flags.DEFINE_string('texts', '', 'File of texts.')
_SEED = flags.DEFINE_integer(
  'seed', None, 'Of those trained side by side; by default the best on validation.'
)
_WRITE = flags.DEFINE_string('write_vectors', '', 'File that gets the vectors of its words.')
flags.mark_flag_as_required('checkpoint')


def main(argv: list[str]) -> None:
  if sum(map(bool, (argv[1:], _TEXTS.value, _WRITE.value))) != 1:
    raise SystemExit('error: give texts, a file of them as --texts, or --write_vectors; see --help')
  mains.set_up()
  from gatedfm.data import texts, word_vectors
  from gatedfm.execution.labeller import Labeller, trained_vectors

  with mains.clear_errors():
    if _WRITE.value:
      path = mains.folder(_WRITE.value)
      word_vectors.check(path)
      found = trained_vectors(mains.folder(_CHECKPOINT.value), _SEED.value)
      word_vectors.write(path, found)
      print(f'{path}: {len(found.words)} words of {found.table.shape[1]} numbers')
      return
    given = texts.given(mains.folder(_TEXTS.value)) if _TEXTS.value else [(t, '') for t in argv[1:]]
    labeller = Labeller.load(mains.folder(_CHECKPOINT.value), _SEED.value)
    found = labeller([text for text, _ in given])
    answers = [labeller.labels[i] for i in found.argmax(1)]
    for (text, _), answer, sure in zip(given, answers, found.max(1)):
      print(f'{answer}\t{sure:.3f}\t{" ".join(text.split())}')
    if all(label for _, label in given):
      right = sum(label == answer for (_, label), answer in zip(given, answers))
      print(f'accuracy {right / len(given):.2%} of {len(given)} texts', file=sys.stderr)
      if unknown := sorted({label for _, label in given} - set(labeller.labels)):
        print(f'labels that it does not know: {", ".join(unknown)}', file=sys.stderr)


if __name__ == '__main__':
  mains.run(main)
