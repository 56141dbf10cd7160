"""The shell: `python -m tiedparam`, the demo, and a checkpoint file as a model.

May use every other room; nothing uses it.
Words of the shell stay in here: what it says of options and files, and how.
"""
