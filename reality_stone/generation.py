"""Text from a Hugging Face causal language model, and how fast it comes: batch 1 with KV cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def continue_text(
    model: nn.Module, tokenizer: Any, prompt: str, tokens: int = 60, seed: int = 0
) -> str:
    """What the model writes after `prompt`, sampled at temperature 0.8 from the 40 likeliest."""
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        out = _generate(model, ids, tokens, do_sample=True, temperature=0.8, top_k=40)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def tokens_per_second(
    models: Mapping[str, nn.Module], prompt: Tensor, tokens: int = 64, rounds: int = 5
) -> dict[str, float]:
    """Median speed of greedy generation after `prompt` (1, n), for each model.

    The models take turns, so that a slow spell of the machine falls on all of them alike. Time
    includes reading the prompt.
    """
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        _generate(model, prompt, 4)  # warm up
    for _ in range(rounds):
        for name, model in models.items():
            start = time.perf_counter()
            _generate(model, prompt, tokens)
            seconds[name].append(time.perf_counter() - start)
    return {name: tokens / statistics.median(times) for name, times in seconds.items()}


def _generate(model: nn.Module, ids: Tensor, tokens: int, **settings: Any) -> Tensor:
    # min_new_tokens: an end-of-text sign must not make a model look fast.
    settings = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens} | settings
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        use_cache=True,
        pad_token_id=model.generation_config.eos_token_id,
        **settings,
    )
