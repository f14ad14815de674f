"""Worker: a small GPT-2 as peft tunes it, and one whose layers are frozen and unfrozen as it trains, in a wrapper or
under DeepSpeed, against the reference.

Placed, a micro-batch is of one language; mixed, of all. The reference is what `mixed_wrappers.py` takes: one process in
float64, fed with each language's gradient, and weights by hand.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import peft
import torch
import worker
from mixed_wrappers import LANGUAGES, SEQUENCES, VOCABULARY, Case, K, Run, compare
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.gpt2.configuration_gpt2 import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel

import bucketmoo_ds
from bucketmoo_ds import reference
from bucketmoo_ds.errors import BucketMOOError
from bucketmoo_ds.plan.blocks import plain_name

LENGTH, VIRTUAL = 7, 3
LAYERS = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
LORA = {"r": 3, "lora_alpha": 4, **LAYERS}
PROMPT = {"num_virtual_tokens": VIRTUAL, "task_type": "CAUSAL_LM"}
METHODS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(**LORA),
    "rslora": lambda: peft.LoraConfig(**LORA, use_rslora=True),
    "dora": lambda: peft.LoraConfig(**LORA, use_dora=True),
    "modules_to_save": lambda: peft.LoraConfig(**LORA, modules_to_save=["lm_head", "ln_f"]),
    "ia3": lambda: peft.IA3Config(**LAYERS, feedforward_modules=["c_fc"]),
    "prompt": lambda: peft.PromptTuningConfig(**PROMPT),
    "p-tuning": lambda: peft.PromptEncoderConfig(**PROMPT, encoder_hidden_size=5),
    "prefix": lambda: peft.PrefixTuningConfig(**PROMPT),
    "prefix_projection": lambda: peft.PrefixTuningConfig(**PROMPT, prefix_projection=True, encoder_hidden_size=5),
}
# The layers that are frozen in a window: none, one, the other, both but what is outside of layers, none again.
FROZEN: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (0, 1), ())


def loss_of(logits: Tensor, labels: Tensor, vocab_size: int, **more: Any) -> Tensor:
    """transformers' own, in the dtype of the logits."""
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


class Tuned(Run):
    """Args: method: of peft, or how parameters are trained; the base class has the rest."""

    def __init__(self, method: str, case: Case) -> None:
        self.method = method
        super().__init__(case)

    def make(self) -> nn.Module:
        torch.manual_seed(self.case.seed)
        sizes = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": LENGTH + VIRTUAL}
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        tokens = {"bos_token_id": 0, "eos_token_id": 0}
        model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes, **dropout, **tokens))
        model.loss_function = loss_of
        if self.method in METHODS:
            model = peft.get_peft_model(model, METHODS[self.method]())
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.3)
        if self.method == "unfrozen":
            model.transformer.h[0].requires_grad_(False)
        return model

    def layers(self) -> nn.ModuleList:
        base = self.module.get_base_model() if self.method in METHODS else self.module
        return base.transformer.h

    @property
    def placed(self) -> bool:
        return self.case.settings["mode"] != "mixed"

    def register(self, model: nn.Module) -> Any:
        if not self.placed:
            return super().register(model)
        adapter = getattr(bucketmoo_ds, self.case.wrapper)
        return adapter.register(model, self.case.config, micro_steps=self.case.micro_steps).moo

    def loss(self, batch: dict[str, Any]) -> torch.Tensor:
        return self.model(**batch).loss

    def languages(self, window: int, step: int) -> list[int]:
        """Of the sequences of this rank's micro-batch."""
        slot = window + step * worker.WORLD_SIZE + worker.RANK
        return [(slot + (0 if self.placed else number)) % K for number in range(SEQUENCES)]

    def own_gradients(self, batch: dict[str, Any], languages: list[int]) -> list[reference.MicroGradient]:
        """Of each language of a micro-batch."""
        found = []
        first = 0 if self.method in ("prompt", "p-tuning") else 1  # that is predicted
        for language in sorted(set(languages)):
            own = [index for index, each in enumerate(languages) if each == language]
            ids, labels = batch["input_ids"][own], batch["labels"][own]
            self.twin.zero_grad()
            (self.twin(input_ids=ids, labels=labels).loss / self.case.micro_steps).backward()
            gradient = {
                plain_name(name): torch.zeros_like(each) if each.grad is None else each.grad.clone()
                for name, each in self.twin.named_parameters()
                if each.grad is not None or plain_name(name) in self.planned
            }
            found.append(reference.MicroGradient(language, int((labels[:, first:] != -100).sum()), gradient))
        return found

    @property
    def planned(self) -> set[str]:
        return {each.name for each in self.session.plan.parameters}

    def window(self, window: int) -> dict[str, float]:
        """Trains one; returns the largest errors, and how far parameters went that are frozen."""
        generator = torch.Generator().manual_seed(100 * self.case.seed + 10 * window + worker.RANK)
        before = self.parameters()
        for name, each in self.twin.named_parameters():
            each.data.copy_(before[plain_name(name)])
        mine = []
        for step in range(self.case.micro_steps):
            languages = self.languages(window, step)
            ids = torch.randint(VOCABULARY, (SEQUENCES, LENGTH), generator=generator)
            labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.3, -100, ids)
            labels[:, -1] = ids[:, -1]
            batch = {"input_ids": ids, "labels": labels}
            mine += self.own_gradients(batch, languages)
            told: Any = LANGUAGES[languages[0]] if self.placed else [LANGUAGES[each] for each in languages]
            self.micro_step({**batch, "language": told}, last=step == self.case.micro_steps - 1)
        found = {name: torch.zeros_like(before[name]) for name in self.planned} | (self.gradients() or {})
        held = [each.grad for each in self.module.parameters() if not each.requires_grad]
        self.step()
        after = self.parameters()
        frozen = [plain_name(name) for name, each in self.module.named_parameters() if not each.requires_grad]
        errors = compare(self, window or int(self.placed), mine, found)  # placed, the first window has weights too
        moved = sum(float((after[name] - before[name]).abs().sum()) for name in frozen)
        return errors | {"moved": moved, "held": float(sum(each is not None for each in held))}


def run(*, method: str, wrapper: str, mode: str, seed: int, **how: Any) -> dict[str, Any]:
    """Returns the largest errors of a method; or the error with which it was refused, and when."""
    zero = wrapper.startswith("zero")
    case = Case(
        seed=seed,
        wrapper="zero" if zero else wrapper,
        stage=int(wrapper[-1]) if zero else 0,
        dtype="float32" if zero else "float64",
        micro_steps=1 if mode == "mixed" else -(-K // worker.WORLD_SIZE),
        moo={"mode": "mixed" if mode == "mixed" else "auto"},
        how=how,
    )
    when = "at start-up"
    try:
        tuned = Tuned(method, case)
        when = "in training"
        errors = WAYS.get(method, train)(tuned)
    except Exception as error:
        traceback.print_exc()
        return {"refused": str(error), "when": when, "ours": isinstance(error, BucketMOOError)}
    return {name: max(each[name] for each in errors) for name in errors[0]}


def train(tuned: Tuned) -> list[dict[str, float]]:
    return [tuned.window(window) for window in range(2)]


def layers_in_turn(tuned: Tuned) -> list[dict[str, float]]:
    """As LISA and half fine-tuning do it: other layers in every window."""
    found = []
    for window, frozen in enumerate(FROZEN):
        for model in (tuned.module, tuned.twin):
            for index, layer in enumerate(model.transformer.h):
                layer.requires_grad_(index not in frozen)
        found.append(tuned.window(window))
    return found


def parts_in_turn(tuned: Tuned) -> list[dict[str, float]]:
    """Other parameters of each layer in every window."""
    found = []
    for window in range(3):
        for model in (tuned.module, tuned.twin):
            for index, each in enumerate(model.parameters()):
                each.requires_grad_((index + window) % 3 > 0)
        found.append(tuned.window(window))
    return found


def masked(tuned: Tuned) -> list[dict[str, float]]:
    """A gradient hook zeroes a part of every gradient."""
    for model in (tuned.module, tuned.twin):
        for each in model.transformer.h.parameters():
            each.register_hook(lambda gradient: gradient * (torch.arange(gradient.numel()).view_as(gradient) % 2))
    return train(tuned)


def unfrozen(tuned: Tuned) -> list[dict[str, float]]:
    """What was frozen when the model was registered."""
    tuned.module.transformer.h[0].requires_grad_(True)
    return train(tuned)


WAYS: dict[str, Callable[[Tuned], list[dict[str, float]]]] = {
    each.__name__: each for each in (layers_in_turn, parts_in_turn, masked, unfrozen)
}

if __name__ == "__main__":
    worker.serve(run)
