"""Models from which closed modules are gone: smaller arrays on disk and in memory."""

from __future__ import annotations

from typing import Any

from gatedfm.gates import Pattern
from gatedfm.models import stack


def compact(params: dict[str, Any], pattern: Pattern) -> dict[str, Any]:
  """The parameters without those of closed modules.

  What is left runs with `pattern.fixed()` as gates, in the unrolled layout; biases that a
  closed module would have added with it are gone too, the merge's constant, which is added
  whatever the gates say, stays.

  Args:
    params: unrolled, with the merge's constants folded (`for_inference`).
    pattern: which modules are open.

  Raises:
    ValueError: stacked parameters, or a module that they do not have.
  """
  out = dict(params)
  for name, bits in pattern.sites:
    stack_name, module = name.split('/', 1)
    layers = dict(out[stack_name]['layers'])
    if len(layers) != len(bits) or f'{stack.PREFIX}0' not in layers:
      raise ValueError(f'{name} has {len(bits)} layers; the unrolled parameters hold {len(layers)}')
    for i, is_open in enumerate(bits):
      layer = layers[f'{stack.PREFIX}{i}']
      if module not in layer:
        raise ValueError(f'layer {i} of the {stack_name} has no {module}; it has {sorted(layer)}')
      if not is_open:
        layers[f'{stack.PREFIX}{i}'] = {k: v for k, v in layer.items() if k != module}
    out[stack_name] = out[stack_name] | {'layers': layers}
  return out
