"""Greedy text from the ONNX model in this folder. Needs onnxruntime, numpy and tokenizers, nothing else.

python generate.py "The capital of France is" [--tokens 32] [--threads 4]
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime


class Decoder:
    """A model with its past (exported with cache), or one that reads the whole text for each token (without)."""

    def __init__(self, folder, threads=0, providers=("CPUExecutionProvider",)):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = (
            3  # it would warn that num_logits_to_keep is no constant, which it is meant not to be
        )
        self.session = onnxruntime.InferenceSession(Path(folder) / "model.onnx", options, providers=list(providers))
        # Shapes come from the model, not from config.json: each layer of a pruned model has its own number of heads.
        self._past = [value for value in self.session.get_inputs() if value.name.startswith("past_key_values.")]

    def empty_past(self, batch):
        """What goes before the first token: no tokens, in each layer's own shape."""
        dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        return {v.name: np.zeros((batch, v.shape[1], 0, v.shape[3]), dtypes[v.type]) for v in self._past}

    def forward(self, tokens, mask, past=None, num_logits=0):
        """Logits of the last `num_logits` tokens (0: of all), ``[batch, tokens, vocabulary]``, and the grown past.

        Args:
            tokens: int64 [batch, new tokens], padded on the left.
            mask: int64 [batch, past + new tokens], 0 for padding.
            past: what the call before returned.
        """
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -tokens.shape[1] :]
        inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
        inputs |= past or self.empty_past(len(tokens))
        logits, *present = self.session.run(None, inputs | {"num_logits_to_keep": np.array(num_logits)})
        return logits, {value.name: tensor for value, tensor in zip(self._past, present, strict=True)}

    def generate(self, tokens, mask, new_tokens, end=()):
        """Up to `new_tokens` greedy tokens, int64 [batch, tokens]; stops when each text has met one of `end`."""
        past, step, made = None, tokens, []
        done = np.zeros(len(tokens), bool)
        while len(made) < new_tokens and not done.all():
            logits, past = self.forward(step, mask, past, num_logits=1)
            made.append(logits[:, -1:].argmax(axis=-1))
            done |= np.isin(made[-1][:, 0], end)
            mask = np.concatenate([mask, np.ones_like(mask[:, :1])], axis=1)
            # Without a past the next call reads everything again.
            step = made[-1] if self._past else np.concatenate([tokens, *made], axis=1)
        return np.concatenate(made, axis=1)


def main():
    from tokenizers import Tokenizer

    folder = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--tokens", type=int, default=32, help="how many to add (default: 32)")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU (default: all cores)")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    configs = [folder / name for name in ("generation_config.json", "config.json")]
    ends = [json.loads(file.read_text()).get("eos_token_id") for file in configs if file.exists()]
    end = next((token for token in ends if token is not None), ())  # one token or a list
    tokens = np.array([tokenizer.encode(args.prompt).ids])
    made = Decoder(folder, args.threads).generate(tokens, np.ones_like(tokens), args.tokens, end)
    print(args.prompt + tokenizer.decode(made[0].tolist()))


if __name__ == "__main__":
    main()
