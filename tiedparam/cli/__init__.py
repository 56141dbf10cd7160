"""The shell: `python -m tiedparam`, the demo, and a checkpoint file as a model.

May use every other room; nothing uses it.
The shell's own words for options and files stay in here.
"""
