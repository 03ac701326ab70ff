"""The special tokens of a tokenizer, and which of them it puts around a text."""

from __future__ import annotations

from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from nirvana.errors import NirvanaError


def special_tokens(
    tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, generation: GenerationConfig | None
) -> dict[str, int]:
    """Ids of "bos", "eos", "eot", "eom", "unk" and "pad", as far as there are such.

    Raises:
        NirvanaError: there is no end token; llama.cpp would take token 11 for it.
    """
    ends = [tokenizer.eos_token_id]
    for source in (generation, config):
        value = getattr(source, "eos_token_id", None)
        ends += value if isinstance(value, list) else [value]
    ends = list(dict.fromkeys(token for token in ends if token is not None and 0 <= token < config.vocab_size))
    if not ends:
        raise NirvanaError("neither tokenizer nor configuration names an end token (eos_token), which llama.cpp needs")
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else getattr(config, "bos_token_id", None)
    # Without one llama.cpp would take token 11; whether it is added to texts is said elsewhere.
    ids = {"bos": begin if begin is not None else ends[0]}
    # A chat model may stop at more than one token; llama.cpp has three places for them.
    ids |= dict(zip(("eos", "eot", "eom"), ends, strict=False))
    ids |= {"unk": tokenizer.unk_token_id, "pad": tokenizer.pad_token_id}
    return {name: token for name, token in ids.items() if token is not None and 0 <= token < config.vocab_size}


def added_around(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """Whether the tokenizer puts its begin ("bos") and end token ("eos") around a text, seen from what it does.

    Raises:
        NirvanaError: it puts other tokens there.
    """
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for begins in (False, True):
        for ends in (False, True):
            if full == [tokenizer.bos_token_id] * begins + bare + [tokenizer.eos_token_id] * ends:
                return {"bos": begins, "eos": ends}
    raise NirvanaError(f"the tokenizer makes {full} of the text 'a', which is {bare}; llama.cpp adds bos and eos only")
