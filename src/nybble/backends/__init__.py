"""Where decoders run. Backends differ only behind `execute(step) -> logits`."""
