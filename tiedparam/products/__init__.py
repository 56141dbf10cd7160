"""Products with structured weights: what computes a layer without its whole weight.

Functions of tensors; knows no law and no layer. Laws offer them as forms.
"""
