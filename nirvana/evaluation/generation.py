"""Greedy text, to see with one's own eyes what a number means."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPT = "The most important thing about science is"


@torch.inference_mode()
def continue_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str = PROMPT, new_tokens: int = 24
) -> str:
    """The prompt and the model's greedy continuation of `new_tokens` tokens."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    inputs.pop("token_type_ids", None)
    # The checkpoint's own sampling defaults (temperature, top-p) are switched off: greedy is reproducible.
    output = model.generate(
        **inputs,
        max_new_tokens=new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=model.generation_config.pad_token_id or 0,
    )
    text = tokenizer.decode(output[0], skip_special_tokens=True)
    return f"{prompt} => {text}" if model.config.is_encoder_decoder else text
