"""Document -> token ids."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from nirvana.calibration.rows import Chat, Document
from nirvana.errors import NirvanaError


def token_ids(tokenizer: PreTrainedTokenizerBase, document: Document) -> list[int]:
    """Ids of a running text, without the special tokens that would mark its ends; a chat goes through the tokenizer's
    template first, which writes the special tokens that the chat has.

    Raises:
        NirvanaError: a chat, and the tokenizer has no template or refuses it.
    """
    text = document if isinstance(document, str) else chat_text(tokenizer, document)
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def chat_text(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> str:
    """A chat as the model was trained to read it."""
    if not tokenizer.chat_template:
        raise NirvanaError(
            "the text is chats (rows with messages), and the tokenizer has no chat template; "
            "use the instruction-tuned model's tokenizer, or rows with plain text"
        )
    try:
        return tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception as error:  # templates raise Jinja's errors, and whatever their expressions run into
        reason = " ".join(str(error).split()) or type(error).__name__
        roles = ", ".join(message["role"] for message in chat[:4])
        raise NirvanaError(f"the chat template of the tokenizer refuses a chat ({roles}, ...): {reason}") from None
