"""The names of models, and the digests of blobs: the only grammar by which text from outside becomes part of a path."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nybble.core.errors import ConfigError, ModelNotFoundError

MAX_NAME_CHARS = 255
DEFAULT_TAG = "latest"
HUB_HOSTS = ("hf.co", "huggingface.co")

_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_-])?")
BLOB_DIGEST = re.compile(r"(?:sha256|inode):[0-9a-f]{64}")  # inode: see nybble.store.blobs
_DIGEST = re.compile(r"(sha256)[:-]([0-9a-f]{64})")


@dataclass(frozen=True, slots=True, eq=False)
class ModelName:
    """`name:tag`, `namespace/name:tag` or `hf.co/ORG/REPO:FILE_OR_TYPE`. Upper and lower case are the same name."""

    path: str  # what stands before the tag
    tag: str

    @classmethod
    def parse(cls, text: str) -> ModelName:
        """A name as a user wrote it; the tag `latest` if there is none.

        Raises:
            ModelNotFoundError: no model can have this name, because of its characters or its length.
        """
        if len(text) > MAX_NAME_CHARS:
            raise _refused(text, f"it has {len(text)} characters, {MAX_NAME_CHARS} are the most")
        path, colon, tag = text.partition(":")
        head, _, rest = path.partition("/")
        if head.lower() in HUB_HOSTS and rest:
            path = f"{HUB_HOSTS[0]}/{rest}"
        parts = path.split("/")
        on_hub = parts[0] == HUB_HOSTS[0]
        if on_hub and len(parts) != 3:
            raise _refused(text, "a repository is written hf.co/ORGANISATION/REPOSITORY")
        if len(parts) > 3:
            raise _refused(text, "it has more than three parts with a slash between them")
        if colon and not tag:
            raise _refused(text, "nothing follows the colon")
        tag = tag or DEFAULT_TAG
        tags = tag.split("/") if on_hub else [tag]  # a file of a repository may lie in a folder
        for part in [*parts, *tags]:
            if not _PART.fullmatch(part) or ".." in part:
                raise _refused(text, _what_is_wrong(part))
        return cls("/".join(parts), tag)

    @property
    def is_on_hub(self) -> bool:
        """Whether the name says where the model comes from: a repository of the Hugging Face hub."""
        return self.path.startswith(HUB_HOSTS[0] + "/")

    @property
    def repository(self) -> str:
        """ORG/REPO of a name on the hub."""
        return self.path.removeprefix(HUB_HOSTS[0] + "/")

    @property
    def key(self) -> str:
        """What names are compared by."""
        return str(self).lower()

    @property
    def file_name(self) -> str:
        """The name as one part of a path. The two characters that are replaced stand in no name."""
        return str(self).replace("/", ",").replace(":", "@")

    def __str__(self) -> str:
        return f"{self.path}:{self.tag}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelName) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def from_file_name(file_name: str) -> ModelName | None:
    """The reverse of `ModelName.file_name`; None if the file is not one of a model."""
    try:
        name = ModelName.parse(file_name.replace(",", "/").replace("@", ":"))
    except ModelNotFoundError:
        return None
    return name if name.file_name == file_name else None


def parse_digest(text: str) -> str:
    """The 64 digits of `sha256:...` (or `sha256-...`).

    Raises:
        ConfigError: it is not a SHA-256 digest.
    """
    found = _DIGEST.fullmatch(text)
    if found is None:
        raise ConfigError(f"{text!r:.100} is not a digest: write sha256: and 64 lower-case hexadecimal digits")
    return found[2]


def _what_is_wrong(part: str) -> str:
    if not part:
        return "a part of it is empty"
    for character in part:
        if not re.fullmatch(r"[A-Za-z0-9._-]", character):
            return f"{character!r} cannot stand in a name, only letters, digits, '.', '_' and '-' can"
    return f"{part!r:.60} begins or ends with '.', begins with '-', or holds '..'"


def _refused(text: str, why: str) -> ModelNotFoundError:
    return ModelNotFoundError(f"{text!r:.100} is neither a file nor a name that a model can have: {why}")
