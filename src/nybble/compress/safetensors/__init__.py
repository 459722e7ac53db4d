"""What every pass that writes a Hugging Face folder shares: names, config.json, the tokenizer's files, resuming."""
