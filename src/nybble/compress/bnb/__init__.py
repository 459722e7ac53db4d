"""What bitsandbytes makes of weights: NF4, FP4 and LLM.int8, bit for bit."""
