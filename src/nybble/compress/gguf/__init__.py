"""The GGUF half: which tensor gets which type, importance matrices, and the pass that writes the file."""
