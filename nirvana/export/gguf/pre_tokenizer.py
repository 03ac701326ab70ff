"""How a byte-level tokenizer cuts text into words before it merges, under llama.cpp's names.

llama.cpp holds a list of patterns under each name of `tokenizer.ggml.pre`. Here the patterns of a tokenizer are looked
up; a tokenizer whose patterns llama.cpp does not hold would give other token ids, silently, and is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nirvana.errors import NirvanaError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _TAIL
_QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _TAIL
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

#: (patterns in their order, words that are tokens are taken whole without merging) -> name in llama.cpp.
NAMES: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((r"\p{N}", _GPT2), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_QWEN2,), False): "qwen2",
    ((_TEKKEN,), True): "tekken",
}


def pre_tokenizer_name(pre_tokenizer: dict[str, Any] | None, whole_words: bool) -> str:
    """llama.cpp's name for the `pre_tokenizer` of a tokenizer.json.

    Args:
        whole_words: the model's `ignore_merges`.

    Raises:
        NirvanaError: llama.cpp holds no such patterns.
    """
    patterns = tuple(_patterns(pre_tokenizer or {}))
    try:
        return NAMES[patterns, whole_words]
    except KeyError:
        raise NirvanaError(
            f"llama.cpp has no pre-tokenizer with the patterns {list(patterns)}"
            f"{' and ignore_merges' if whole_words else ''} of this tokenizer and would give other token ids; "
            f"it has {', '.join(NAMES.values())}"
        ) from None


def _patterns(step: dict[str, Any]) -> Iterator[str]:
    kind = step.get("type")
    if kind == "Sequence":
        for part in step["pretokenizers"]:
            yield from _patterns(part)
    elif kind == "Split" and step["behavior"] == "Isolated" and not step["invert"] and "Regex" in step["pattern"]:
        yield step["pattern"]["Regex"]
    elif kind == "Digits":
        yield r"\p{N}" if step["individual_digits"] else r"\p{N}+"
    elif kind == "ByteLevel" and not step["add_prefix_space"]:
        if step.get("use_regex", True):
            yield _GPT2
    else:
        raise NirvanaError(f"llama.cpp has nothing like the pre-tokenizer step {step} of this tokenizer")
