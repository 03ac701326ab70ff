"""lm-eval's wrapper of a transformers model, quicker on questions with several answers.

Stock, it runs the question anew for each answer, and makes logits of every position. Here the question runs once, its
keys and values serve all its answers, and only positions that predict a token of an answer get logits. On one CPU core
SmolLM2-135M answers questions of ARC-easy (4 answers) 1.7x faster, of PIQA (2 long ones) 1.1x.

This module needs lm-eval; `nirvana.evaluation.zero_shot` imports it late.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from nirvana.patching import head_hands_on

#: Positions whose log-probabilities exist at once: 256 x 49 152 fp32 values are 50 MB.
POSITIONS = 256

#: ((context, answer), tokens of the context, tokens of the answer)
Request = tuple[tuple[str, str], list[int], list[int]]


class SharedPrompts(HFLM):
    """As its base class; encoder-decoders and texts that are too long for the model go the stock way.

    Attributes:
        advance: called with the number of answers after each batch.
        questions: that one forward pass takes.
    """

    advance: Callable[[int], None] = staticmethod(lambda count: None)
    questions: int = 1

    def loglikelihood(self, requests: list, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        longest = max((len(context) + len(answer) for _, context, answer in requests), default=0)
        if self.backend != "causal" or longest > self.max_length:
            found = super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
            self.advance(len(requests))
            return found
        answers_of: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, _) in enumerate(requests):
            answers_of.setdefault(tuple(context), []).append(index)
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for batch in _batches(answers_of, requests, self.questions):
            owners = [row for row, context in enumerate(batch) for _ in answers_of[context]]
            indices = [index for context in batch for index in answers_of[context]]
            answers = [requests[index][2] for index in indices]
            for index, result in zip(indices, self._score(batch, owners, answers), strict=True):
                results[index] = result
            self.advance(len(indices))
        return results

    @torch.no_grad()
    def _score(
        self, contexts: Sequence[Sequence[int]], owners: Sequence[int], answers: Sequence[Sequence[int]]
    ) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of each answer after the context that owns it; whether greedy decoding gives it."""
        place = self.device
        tokens, seen = _padded(contexts, left=True)
        lengths, owner = seen.sum(1), torch.tensor(owners)
        targets, counted = _padded(answers, left=False)
        with head_hands_on(self.model):
            first = self.model(
                input_ids=tokens.to(place),
                attention_mask=seen.to(place),
                position_ids=(seen.cumsum(1) - 1).clamp(min=0).to(place),
                use_cache=True,
            )
            hidden = first.logits[owner.to(place), -1:]
            if targets.shape[1] > 1:
                cache = first.past_key_values
                cache.batch_select_indices(owner.to(place))
                rest = self.model(
                    input_ids=targets[:, :-1].to(place),
                    attention_mask=torch.cat([seen[owner], counted[:, :-1]], 1).to(place),
                    position_ids=(lengths[owner, None] + torch.arange(targets.shape[1] - 1)).to(place),
                    past_key_values=cache,
                    use_cache=True,
                )
                hidden = torch.cat([hidden, rest.logits], 1)
        chosen, greedy = self._of_tokens(hidden[counted.bool().to(place)], targets[counted.bool()])
        row = torch.arange(len(answers)).repeat_interleave(counted.sum(1))
        sums = torch.zeros(len(answers), dtype=torch.float64).index_add_(0, row, chosen)
        missed = torch.zeros(len(answers), dtype=torch.int64).index_add_(0, row, (~greedy).long())
        return [(total, not misses) for total, misses in zip(sums.tolist(), missed.tolist(), strict=True)]

    def _of_tokens(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability (fp64) of each position's target, and whether it is the most probable token; on the CPU."""
        head = self.model.get_output_embeddings()
        chosen, greedy = [], []
        for part, wanted in zip(hidden.split(POSITIONS), targets.split(POSITIONS), strict=True):
            logits = head(part).float()
            logit = logits.gather(1, wanted.to(logits.device)[:, None])[:, 0]
            chosen.append((logit.double() - logits.logsumexp(1).double()).cpu())
            greedy.append(logits.argmax(1).cpu() == wanted)
        return torch.cat(chosen), torch.cat(greedy)


def _batches(
    answers_of: dict[tuple[int, ...], list[int]], requests: Sequence[Request], size: int
) -> list[list[tuple[int, ...]]]:
    """Questions by size, in the order that pads less: by the lengths of contexts, or of the longest answers."""
    longest = {context: max(len(requests[i][2]) for i in indices) for context, indices in answers_of.items()}

    def padded(batch: list[tuple[int, ...]]) -> int:
        answers = sum(len(answers_of[context]) for context in batch)
        return len(batch) * max(map(len, batch)) + answers * max(longest[context] for context in batch)

    orders = []
    for key in (lambda context: (len(context), longest[context]), lambda context: (longest[context], len(context))):
        ordered = sorted(answers_of, key=key, reverse=True)
        orders.append([ordered[start : start + size] for start in range(0, len(ordered), size)])
    return min(orders, key=lambda order: sum(map(padded, order)))


def _padded(rows: Sequence[Sequence[int]], left: bool) -> tuple[Tensor, Tensor]:
    """Token ids padded with 0, and 1 where there is a token: int64 ``[rows, longest]`` both."""
    width = max(map(len, rows))
    tokens = torch.zeros(len(rows), width, dtype=torch.int64)
    seen = torch.zeros_like(tokens)
    for index, row in enumerate(rows):
        part = slice(width - len(row), None) if left else slice(0, len(row))
        tokens[index, part], seen[index, part] = torch.tensor(row), 1
    return tokens, seen
