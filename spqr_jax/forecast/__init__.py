"""What a long run will take: seconds and bytes, from the shapes of its model and the settings of the run.

`passes.py` counts the operations of a model, `quantizing.py` and `measuring.py` those of a
command, `memory.py` its bytes. `machine.py` measures how fast this machine multiplies and turns
counts into seconds; `words.py` says the result the way people do.
"""

from spqr_jax.forecast.machine import Machine, measure_machine, seconds
from spqr_jax.forecast.passes import Text, Work
from spqr_jax.forecast.words import about_bytes, about_seconds

__all__ = ["Machine", "Text", "Work", "about_bytes", "about_seconds", "measure_machine", "seconds"]
