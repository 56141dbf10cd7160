"""Whole models: plans, scans, tying by patterns, reports and pictures.

Works through `layer` on one tensor at a time; knows nothing of `files` and `cli`.
What is said of a model is data first (`scan_report`, `report`), and shown by `util.table`.
"""
