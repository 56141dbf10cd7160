"""Ties in files: save, load, export, and whether a file fits a model.

Works on `formats`, which knows no ties, and on `layer`; knows nothing of `model` and `cli`.
A file holds names and options, never code.
"""
