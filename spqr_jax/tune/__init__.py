"""Training what is continuous in a quantized model against the dense one; its codes stay as they are.

`config.py` has the settings, `objectives.py` the two objectives, `form.py` what a block looks like in training.
"""
