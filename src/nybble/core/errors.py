"""Errors that a user can act on. The message is one sentence: what is wrong, where, and what to do."""


class NybbleError(Exception):
    """Base of all errors raised on purpose. `exit_code` is what the command line leaves with."""

    exit_code = 2


class CheckpointError(NybbleError):
    """A model file is missing, damaged, hostile or not supported."""


class TokenizerError(NybbleError):
    """A tokenizer or chat template is damaged, unsupported, or does not fit the model."""


class PromptError(NybbleError):
    """A prompt cannot be served, for example because it is longer than the context."""


class ConfigError(NybbleError):
    """An option, a parameter or an environment variable has a value that cannot be used."""


class ModelNotFoundError(NybbleError):
    """No file, folder or catalog entry has this name."""


class StoreError(NybbleError):
    """A model could not be fetched from its packages or written to the local store."""


class OutputError(NybbleError):
    """A result cannot be written: it exists already, or the disk is full, read-only or gone."""


class TrainingError(NybbleError):
    """A training run cannot go on: its loss is not a number any more."""


class BackendError(NybbleError):
    """A device, or a process that computes for the model, has failed while it ran."""
