"""Files as such: whole or not at all, strict JSON, safetensors, archives of torch.

Knows bytes and tensors; no ties, layers or laws.
Whatever a file claims is checked before it is believed.
"""
