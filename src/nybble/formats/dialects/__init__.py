"""How quantised Hugging Face folders write their weights: GPTQ, AWQ, bitsandbytes and compressed-tensors."""
