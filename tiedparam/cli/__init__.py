"""The shell: `python -m tiedparam`, the demo, and a checkpoint file as a model.

May use every other room; nothing uses it.
What the library says for Python is reworded in here, and nowhere else (`wording`).
"""
