"""A row of a data set -> one document: running text, or a chat that the tokenizer's template turns into text."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

#: Messages ``{"role": ..., "content": ...}`` in order.
Chat: TypeAlias = "list[dict[str, str]]"
Document: TypeAlias = "str | Chat"

#: Fields that hold a chat, where a row has no text of another form.
CHAT_FIELDS = ("messages", "conversations")

#: Speakers of the ShareGPT spelling ``{"from": ..., "value": ...}`` -> roles that templates know.
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


class RowError(ValueError):
    """What is wrong with a row; whoever knows file and line says so in a NirvanaError."""


@dataclass(frozen=True)
class Form:
    """Which fields of a row make its text.

    Attributes:
        fields: in the order of the text; an only field may hold a chat.
        separator: between them.
        optional: fields that may be missing, None or empty; then they leave no separator either.
        marks: fields without text that a row of this form has as well.
    """

    fields: tuple[str, ...]
    separator: str = "\n"
    optional: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()

    @property
    def required(self) -> list[str]:
        return [field for field in self.fields if field not in self.optional]

    def fits(self, names: Collection[str]) -> bool:
        return all(name in names for name in (*self.required, *self.marks))

    def document(self, row: Mapping[str, Any]) -> Document:
        """The document of one row.

        Raises:
            RowError: a field is missing or holds something else.
        """
        if len(self.fields) == 1 and isinstance(row.get(self.fields[0]), list):
            return to_chat(row[self.fields[0]], self.fields[0])
        parts = []
        for field in self.fields:
            value = row.get(field)
            if field in self.optional and (value is None or value == ""):
                continue
            if not isinstance(value, str):
                raise RowError(f'has no string field "{field}" (it has: {", ".join(map(str, row))})')
            _check_unicode(value)
            parts.append(value)
        return self.separator.join(parts)


TEXT = Form(("text",))
MBPP = Form(("text", "code"), marks=("test_list",))
QUESTION = Form(("question", "answer"))
INSTRUCTION = Form(("instruction", "input", "output"), separator="\n\n", optional=("input",))
#: LAMBADA: the target is the last word of the passage and carries the space before it.
TARGET = Form(("context", "target"), separator="")

#: The forms that are recognised, most telling first.
FORMS = (MBPP, TEXT, QUESTION, INSTRUCTION, Form(("prompt", "code")), TARGET, *(Form((name,)) for name in CHAT_FIELDS))


def form_of(names: Collection[str], field: str | None = None) -> Form:
    """The form of rows with these fields: the one field that was asked for, or the first of `FORMS` that fits.

    Raises:
        RowError: no such field, or no form that is known.
    """
    if field is not None:
        if field not in names:
            raise RowError(f'has no field "{field}" (it has: {", ".join(map(str, names))})')
        return Form((field,))
    for form in FORMS:
        if form.fits(names):
            return form
    raise RowError(f'has no string field "{TEXT.fields[0]}" (it has: {", ".join(map(str, names))})')


def row_document(row: Any, field: str | None = None) -> Document:
    """The document of one row of unknown form.

    Raises:
        RowError: not a row, or without text.
    """
    if not isinstance(row, Mapping):
        raise RowError(f'has no string field "{field or TEXT.fields[0]}" (it has: {type(row).__name__})')
    return form_of(row, field).document(row)


def to_chat(messages: Any, field: str = CHAT_FIELDS[0]) -> Chat:
    """Check a list of messages, ``{"role", "content"}`` or ShareGPT's ``{"from", "value"}``.

    Raises:
        RowError: empty, or a message without these two strings.
    """
    if not isinstance(messages, list) or not messages:
        raise RowError(f'has no messages in its field "{field}"')
    chat = []
    for number, message in enumerate(messages, start=1):
        keys = message if isinstance(message, Mapping) else {}
        role, content = keys.get("role", keys.get("from")), keys.get("content", keys.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise RowError(f'has no strings "role" and "content" in message {number} of its field "{field}"')
        _check_unicode(content)
        chat.append({"role": SHAREGPT_ROLES.get(role, role), "content": content})
    return chat


def is_blank(document: Document) -> bool:
    return isinstance(document, str) and not document.strip()


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowError("holds half a surrogate pair, which is no text") from None
