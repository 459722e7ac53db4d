"""Containers of tensors: reading and writing, nothing else."""
