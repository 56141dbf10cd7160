"""What every room uses: errors, tables, progress, and the private parts of torch.

Imports nothing of the library.
What torch does not promise is asked in `torch_private` alone.
"""
