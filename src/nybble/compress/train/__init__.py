"""The training loop that distillation, training with quantisation in the loop and LoRA share."""
