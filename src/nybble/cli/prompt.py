"""From what a user wrote to the tokens that a model reads."""

from __future__ import annotations

from nybble.core.errors import TokenizerError
from nybble.engine.load import LoadedModel
from nybble.tokenizer import ChatTemplate

Message = dict[str, str]  # role, content


def raw_prompt(loaded: LoadedModel, text: str) -> list[int]:
    """The text as it is, after whatever token every text of this model begins with."""
    return loaded.tokenizer.encode(text, add_special=True)


def chat_prompt(loaded: LoadedModel, messages: list[Message]) -> list[int]:
    """A conversation in the words of the model's chat template, up to where its answer begins.

    Raises:
        TokenizerError: the model has no chat template, or it cannot be rendered with these messages.
    """
    source = loaded.checkpoint.chat_template
    if source is None:
        raise TokenizerError(
            "this model has no chat template, it was not made for conversations: "
            "give --raw to have it continue the prompt"
        )
    tokenizer = loaded.tokenizer
    template = ChatTemplate(source, bos_token=tokenizer.bos_token or "", eos_token=tokenizer.eos_token or "")
    token_ids = tokenizer.encode(template.render(messages), add_special=False, parse_special=True)
    bos = loaded.checkpoint.bos_token_id
    if loaded.checkpoint.add_bos and bos is not None and token_ids[:1] != [bos]:
        token_ids = [bos, *token_ids]  # templates differ in whether they write it
    return token_ids
