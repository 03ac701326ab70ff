"""The tokenizer of a checkpoint as `tokenizer.*` fields of a GGUF file.

Everything comes from the tokenizer that transformers opens, so that llama.cpp gives the ids that the model saw:
byte-level BPE (Llama 3, SmolLM, Qwen, Mistral Nemo) and SentencePiece BPE (Llama 2, Mistral).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from nirvana.errors import NirvanaError
from nirvana.export.gguf import sentencepiece
from nirvana.export.gguf.pre_tokenizer import pre_tokenizer_name
from nirvana.export.gguf.special_tokens import added_around, special_tokens


@dataclass(frozen=True)
class Vocabulary:
    """What llama.cpp reads.

    Attributes:
        model: "gpt2" (byte-level BPE) or "llama" (SentencePiece).
        pre: name of the pre-tokenizer.
        tokens: text of every row of the embeddings.
        types: kind of each (normal, control, byte, ...).
        merges: of a "gpt2" tokenizer, "left right" in order of preference.
        scores: of a "llama" tokenizer.
        special: "bos", "eos", "unk", "pad", "eot", "eom" -> id.
        adds: "bos", "eos" -> whether each text gets one.
        space_prefix: whether a space goes before each text.
        chat_template: Jinja, or several with names.
        notes: what llama.cpp does slightly otherwise.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[TokenType]
    special: dict[str, int]
    adds: dict[str, bool]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    space_prefix: bool = False
    chat_template: str | dict[str, str] | None = None
    notes: tuple[str, ...] = ()

    def add_keys(self, writer: GGUFWriter) -> None:
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        if self.scores:
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        for name, token in self.special.items():
            getattr(writer, f"add_{name}_token_id")(token)
        for name, value in self.adds.items():
            getattr(writer, f"add_add_{name}_token")(value)
        writer.add_add_space_prefix(self.space_prefix)
        if isinstance(self.chat_template, dict):
            writer.add_chat_template([{"name": n, "template": text} for n, text in self.chat_template.items()])
        elif self.chat_template:
            writer.add_chat_template(self.chat_template)


def vocabulary_of(
    tokenizer: PreTrainedTokenizerBase | None, config: PreTrainedConfig, generation: GenerationConfig | None
) -> Vocabulary:
    """The fields for a tokenizer.

    Raises:
        NirvanaError: there is none, or llama.cpp would give other token ids; the message says why.
    """
    if tokenizer is None:
        raise NirvanaError("the checkpoint has no tokenizer, which a GGUF file must hold; put tokenizer.json beside it")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise NirvanaError(f"{type(tokenizer).__name__} is a slow tokenizer; save it as a fast one (tokenizer.json)")
    data = json.loads(backend.to_str())
    model = data["model"]
    if model["type"] != "BPE":
        raise NirvanaError(f"the tokenizer is of kind {model['type']}; GGUF is written for BPE tokenizers")
    added = {token["id"]: token for token in data["added_tokens"]}
    notes = tuple(_notes(added, config.vocab_size))
    added = {token: entry for token, entry in added.items() if token < config.vocab_size}
    tokens, types = _tokens(model, added, config.vocab_size)
    common = {
        "tokens": tokens,
        "special": special_tokens(tokenizer, config, generation),
        "adds": added_around(tokenizer),
        "chat_template": tokenizer.chat_template,
        "notes": notes,
    }
    if model["byte_fallback"]:
        return Vocabulary(
            "llama",
            "default",
            types=_piece_types(tokens, types, model),
            scores=_piece_scores(model, added, tokens),
            space_prefix=sentencepiece.adds_space(data),
            **common,
        )
    _refuse_unlike_gpt2(data)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    pre = pre_tokenizer_name(data["pre_tokenizer"], bool(model.get("ignore_merges")))
    return Vocabulary("gpt2", pre, types=types, merges=merges, **common)


def _tokens(model: dict[str, Any], added: dict[int, dict[str, Any]], rows: int) -> tuple[list[str], list[TokenType]]:
    """Text and kind for every row of the embeddings; rows without a token get a name of their own."""
    known = {token: text for text, token in model["vocab"].items()}
    known |= {token: entry["content"] for token, entry in added.items()}
    if max(known) >= rows:
        raise NirvanaError(
            f"the embeddings have no token {max(known)} ({known[max(known)]!r}) of the tokenizer, only {rows} rows; "
            "resize them"
        )
    tokens, types = [], []
    for token in range(rows):
        if token in added:
            types.append(TokenType.CONTROL if added[token]["special"] else TokenType.USER_DEFINED)
        else:
            types.append(TokenType.NORMAL if token in known else TokenType.UNUSED)
        tokens.append(known.get(token, f"[PAD{token}]"))
    if len(set(tokens)) != len(tokens):
        double = next(text for text in tokens if tokens.count(text) > 1)
        raise NirvanaError(f"the tokenizer has the token {double!r} twice, which llama.cpp does not open")
    return tokens, types


def _piece_types(tokens: list[str], types: list[TokenType], model: dict[str, Any]) -> list[TokenType]:
    result = []
    for text, kind in zip(tokens, types, strict=True):
        if text == model["unk_token"]:
            kind = TokenType.UNKNOWN
        elif kind == TokenType.NORMAL and sentencepiece.is_byte(text):
            kind = TokenType.BYTE
        result.append(kind)
    return result


def _piece_scores(model: dict[str, Any], added: dict[int, dict[str, Any]], tokens: list[str]) -> list[float]:
    found = sentencepiece.scores(model, {entry["content"] for entry in added.values()})
    return [found.get(text, 0.0) for text in tokens]


def _refuse_unlike_gpt2(data: dict[str, Any]) -> None:
    model = data["model"]
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model[name]:
            raise NirvanaError(f"the tokenizer has a {name}, which llama.cpp's byte-level BPE has not")
    # llama.cpp takes text as it comes. NFC, which Qwen has, leaves nearly all text as it is.
    if data["normalizer"] is not None and data["normalizer"]["type"] != "NFC":
        raise NirvanaError(f"llama.cpp's byte-level BPE has nothing like the normalizer {data['normalizer']['type']}")
    if (data["decoder"] or {}).get("type") != "ByteLevel":
        raise NirvanaError(
            "the tokenizer is neither byte-level BPE nor of the SentencePiece kind, llama.cpp knows no other"
        )


def _notes(added: dict[int, dict[str, Any]], rows: int) -> Iterator[str]:
    beyond = [entry["content"] for token, entry in added.items() if token >= rows]
    if beyond:
        yield f"left out: {', '.join(map(repr, beyond))}, for which the embeddings have no row"
    odd = [entry["content"] for entry in added.values() if entry["lstrip"] or entry["rstrip"] or entry["single_word"]]
    if odd:
        yield f"llama.cpp keeps the spaces around {', '.join(map(repr, odd))}, the tokenizer drops them"
