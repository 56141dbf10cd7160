"""What a tie is: the record, where its source lies, who reads and writes the tensor.

Knows laws by what they answer, and torch; no optimizers, no files.
No number is made here from a weight that is not there.
"""
