"""The HTTP API of Text Generation Inference (TGI)."""
