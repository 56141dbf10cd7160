"""How a tied layer computes: its cheaper forms, and weights that are kept for inference.

Reads ties and laws; never changes what is stored.
Every form equals the dense layer up to rounding, or gives way to it.
"""
