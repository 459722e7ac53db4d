"""Text to token ids and back, and chat templates."""

from nybble.tokenizer.chat_prompt import render_to_ids
from nybble.tokenizer.chat_template import ChatTemplate
from nybble.tokenizer.detokenizer import Detokenizer
from nybble.tokenizer.load import load_tokenizer
from nybble.tokenizer.tokenizer import Tokenizer, check_vocab

__all__ = ["ChatTemplate", "Detokenizer", "Tokenizer", "check_vocab", "load_tokenizer", "render_to_ids"]
