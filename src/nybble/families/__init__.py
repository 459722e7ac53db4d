"""One small file per family of models: names and configs become a `ModelSpec`. No computing code is here."""
