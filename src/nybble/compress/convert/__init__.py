"""The same weights in another container, proved value by value: GGUF, plain folders, GPTQ, AWQ, compressed-tensors."""
