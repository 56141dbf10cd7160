"""What follows a tie: optimizers, and dictionaries, dense and tied.

Reads ties and laws; knows nothing of how layers compute.
State moves exactly, or the reason why it cannot is said before anything changes.
"""
