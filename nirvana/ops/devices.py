"""What differs between devices besides kernels: what a question costs, what memory is free, what fills a pass."""

from __future__ import annotations

import torch


def answers_at_once(device: torch.device) -> bool:
    """Whether results exist when a call returns. A GPU runs behind: to ask it for one number is to wait for all."""
    return device.type == "cpu"


def free_bytes(device: torch.device) -> int | None:
    """Memory that tensors on `device` can still get, with what the allocator holds and does not use.

    None where it is not worth a question: a CPU has no fixed room, and fresh pages cost it what recomputation does.
    """
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def tokens_per_pass(device: torch.device) -> int:
    """Tokens that fill the device in one forward pass of a model.

    On two CPU cores 512 are as fast as any number. A GPU reads all weights for each pass: of Llama-3.1-8B 16 GB, which
    takes an H100 5 ms; the products take 12 ms for 512 tokens and 94 ms for 4096 (computed, 3 TB/s and 700 TFLOP/s).
    """
    return 4096 if device.type == "cuda" else 512
