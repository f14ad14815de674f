"""Language models of libraries, in training, against rows of a plain copy."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from draw import SEED
from torch import Tensor, nn
from unit.mixed import stack
from unit.mixed.stack import IGNORED, LANGUAGES, Rows

WORDS, LENGTH = 31, 9
SMALL: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {**SMALL, "num_experts_per_tok": 2}

# float32, in which these models compute their norms whatever the model's dtype is. The loss of one language alone has
# another scale, so that gradients are rounded otherwise by each of the hundred operations that they pass: 2^-24 each.
TOLERANCE = 4e-6


def plain_loss(model: nn.Module, inputs: dict[str, Tensor], there: Tensor, targets: Tensor) -> Tensor:
    """The loss of the targets that are labelled."""
    return model(**inputs).loss


def check(
    model: nn.Module,
    *,
    loss_of: Callable[[nn.Module, dict[str, Tensor], Tensor, Tensor], Tensor] = plain_loss,
    labels: Callable[[torch.Generator], Tensor] | None = None,
) -> None:
    """Checks gradients and Grams of a micro-batch of two sequences and more of each language.

    Args:
        model: trained in float32.
        loss_of: of a model, inputs with the labels of one language, which sequences are of it, and all labels.
        labels: of the sequences, if not those of a causal model.
    """
    generator = torch.Generator().manual_seed(SEED)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3, generator=generator)
    model.train()
    plain = copy.deepcopy(model)
    session = stack.register(model, shift_labels=None)
    count = len(LANGUAGES)
    of_sequence = torch.cat([torch.arange(count).repeat(2), torch.randint(count, (2,), generator=generator)])
    of_sequence = of_sequence[torch.randperm(len(of_sequence), generator=generator)]
    ordinal = torch.stack([(of_sequence[:each] == of_sequence[each]).sum() for each in range(len(of_sequence))])
    ids = torch.randint(3, WORDS, (len(of_sequence), LENGTH), generator=generator)
    targets = labels(generator) if labels is not None else ids.clone()
    if targets.dim() == 2:
        targets[:, :3][torch.rand(len(ids), 3, generator=generator) < 0.5] = IGNORED
    inputs = {"input_ids": ids, "labels": targets}

    def rows(there: Tensor) -> Rows:
        plain.zero_grad()
        torch.manual_seed(SEED)
        kept = there.view(-1, *(1,) * (targets.dim() - 1)).expand_as(targets)
        loss_of(plain, {**inputs, "labels": torch.where(kept, targets, IGNORED)}, there, targets).backward()
        named = [(name, each) for name, each in plain.named_parameters() if each.requires_grad]
        return {name: torch.zeros_like(each) if each.grad is None else each.grad.double() for name, each in named}

    weights = torch.rand(len(session.plan.blocks), count, generator=generator, dtype=torch.float64)
    stack.hand(session, weights)
    torch.manual_seed(SEED)
    model(**inputs, language=[LANGUAGES[each] for each in of_sequence]).loss.backward()
    session.end_window()
    whole = [rows(of_sequence == each) for each in range(count)]
    halves = [[rows((of_sequence == each) & (ordinal % 2 == half)) for half in (0, 1)] for each in range(count)]
    every = [*whole, *itertools.chain(*halves)]
    found = stack.grams(session)
    blocks = stack.block_of(session)
    floor = 1e-2 * max(each.norm().item() for row in whole for each in row.values())
    for name, block in blocks.items():
        got = model.get_parameter(name).grad
        expected = sum(weights[block, each] * whole[each][name] for each in range(count))
        size = max(floor, *(each[name].norm().item() for each in every))
        assert got is not None
        assert (got.double() - expected).norm() <= count * TOLERANCE * size, name
        for i in range(count):
            for j in range(count):
                left, right = halves[i] if i == j else (whole[i], whole[j])
                gram = (left[name] * right[name]).sum()
                assert abs(found[block, i, j] - gram) <= 4 * TOLERANCE * size**2, (name, i, j)
