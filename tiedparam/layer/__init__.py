"""Tying and untying one tensor of one layer, and the class that a tied layer has.

Uses all that follows a tie (`compute`, `state`, `tie`); knows no models, files or shells.
Everything is checked before a layer is touched, and put back if that fails.
"""
