"""What a law is, and the kinds of law to derive from.

Knows tensors and layouts; no layers, ties, files or optimizers.
Public: `Rule`, `Broadcast`, `Linked`, `Layout`, `Example` and `register_rule`.
"""
