"""Writes text behind prompts with a language model, whole or pruned.

Example:
  python -m gatedfm.generate --checkpoint=runs/smollm2 --prompt='Gravity is'

Without --temperature the likeliest token is taken each time. --prompt may be given several times;
prompts are then written side by side. The texts are on stdout, the speed, without compilation,
is on stderr.
"""

import sys
import time

from absl import flags

from gatedfm import mains

_CHECKPOINT = flags.DEFINE_string(
  'checkpoint', None, 'Language model, from import_checkpoint or prune.'
)
_PROMPT = flags.DEFINE_multi_string('prompt', None, 'What to write behind; may be repeated.')
_MAX_TOKENS = flags.DEFINE_integer('max_tokens', 64, 'Tokens written behind each at most.')
_TEMPERATURE = flags.DEFINE_float('temperature', 0.0, 'Of the draws; 0 takes the likeliest token.')
_TOP_P = flags.DEFINE_float('top_p', 1.0, 'Draw among the fewest tokens of this probability.')
_SEED = flags.DEFINE_integer('seed', 0, 'Of the draws.')
_MESH = mains.define_model_parallel()
flags.mark_flags_as_required(['checkpoint', 'prompt'])


def main(argv: list[str]) -> None:
  mains.no_arguments(argv)
  mains.set_up()
  from gatedfm.execution import lm_workdir
  from gatedfm.execution.generation import Generator, Sampling

  with mains.clear_errors():
    sampling = Sampling(_TEMPERATURE.value, _TOP_P.value, _SEED.value)
    sampling.validate()
    generator = Generator(lm_workdir.load(mains.folder(_CHECKPOINT.value), _MESH()))
    prompts = [generator.encode(text) for text in _PROMPT.value]
    generator.prepare(prompts, _MAX_TOKENS.value, sampling)
    start = time.perf_counter()
    written = generator.generate(prompts, _MAX_TOKENS.value, sampling)
    seconds = time.perf_counter() - start
    for prompt, behind in zip(_PROMPT.value, written):
      print(f'{prompt}{behind.text}')
    count = sum(len(behind.tokens) for behind in written)
    print(f'{count} tokens in {seconds:.2f} s, {count / seconds:.1f} a second', file=sys.stderr)


if __name__ == '__main__':
  mains.run(main)
