"""Asks a language model questions with and without answered ones in front; and its perplexity.

Example:
  python -m gatedfm.few_shot --checkpoint=runs/smollm2 --tasks=sst2,trec --shots=0,4 --seeds=3
  python -m gatedfm.few_shot --checkpoint=runs/small --tasks=mine.jsonl --text=page.txt
  python -m gatedfm.few_shot --checkpoint=runs/opt --tasks=sst2 --model_parallel=8

Dense models and pruned ones alike. Tasks are sets of StaICC, or files of one's own: .jsonl or .csv
with context, choices and answer, half of them for training (where shots are from), 20% for
validation and 30% for test unless a line has its split. What counts as answered is the choice that
the model finds likeliest; calibrated, the one to which the question adds most.
"""

import json

from absl import flags

from gatedfm import mains

_CHECKPOINT = flags.DEFINE_string('checkpoint', None, 'Language model, dense or pruned.')
_TASKS = flags.DEFINE_list('tasks', [], 'Sets or files.')
_SHOTS = flags.DEFINE_list('shots', ['0', '4'], 'Answered questions in front of each.')
_SEEDS = flags.DEFINE_integer('seeds', 3, 'Draws of questions and shots.')
_QUESTIONS = flags.DEFINE_integer('questions', 100, 'Per task, number of shots and seed.')
_SPLIT = flags.DEFINE_enum('split', 'test', ['train', 'validation', 'test'], 'Which split.')
_SHARED = flags.DEFINE_bool('shared', True, 'The same shots for all questions of a draw.')
_TEXT = flags.DEFINE_string('text', '', 'File whose perplexity is measured.')
_JSON = flags.DEFINE_string('json', '', 'Where to write the numbers, over what is there.')
_MESH = mains.define_model_parallel()
flags.mark_flag_as_required('checkpoint')


def main(argv: list[str]) -> None:
  mains.no_arguments(argv)
  mains.set_up()
  from gatedfm import atomic, provenance
  from gatedfm.evaluation import lm_quality
  from gatedfm.models.speech_config import ConfigError

  with mains.clear_errors():
    if not all(n.isdecimal() for n in _SHOTS.value):
      raise ConfigError(f'--shots={",".join(_SHOTS.value)}: give numbers, such as 0,4')
    asked = lm_quality.Questions(
      tuple(_TASKS.value),
      tuple(map(int, _SHOTS.value)),
      _SEEDS.value,
      _QUESTIONS.value,
      _SPLIT.value,
      _SHARED.value,
      _TEXT.value,
    )
    path = mains.json_path(_JSON.value)
    folder = mains.folder(_CHECKPOINT.value)
    result = lm_quality.evaluate(folder, asked, lambda line: print(line, flush=True), _MESH())
    if path:
      origin = provenance.collect('gatedfm.few_shot')
      atomic.write_text(path, json.dumps(origin | result, indent=1) + '\n')
      print(path)


if __name__ == '__main__':
  mains.run(main)
