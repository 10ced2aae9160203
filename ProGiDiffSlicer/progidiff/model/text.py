"""Prompts as the networks read them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextModel


def tokenize(tokenizer: Any, texts: Sequence[str], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, int64 (B, L), padded to the tokenizer's maximum length."""
    length = tokenizer.model_max_length
    out = tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return out.input_ids.to(device), out.attention_mask.to(device)


def encode_text(text_encoder: CLIPTextModel, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states (B, L, D) of prompts, and their mean over real tokens (B, D)."""
    states = text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    weight = mask[:, :, None].to(states.dtype)
    return states, (states * weight).sum(1) / weight.sum(1).clamp_min(1)
