"""A loop of Accelerate's that resolves the conflicts of its languages; the wrapper is whatever Accelerate is told.

    accelerate launch --num_processes 2 examples/train_accelerate.py            # without a GPU: --cpu
    accelerate launch --num_processes 2 --use_deepspeed --zero_stage 2 examples/train_accelerate.py

With `--save FOLDER` the run is saved at its end, and goes on from what the folder holds already.
"""

import argparse
import random
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import bucketmoo_ds as bm

LANGUAGES = ["de", "fr", "ko"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--micro-steps", type=int, default=2)
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    backend = InitProcessGroupKwargs(backend="nccl" if torch.cuda.is_available() else "gloo")
    accelerator = Accelerator(gradient_accumulation_steps=options.micro_steps, kwargs_handlers=[backend])
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = bm.BucketMOOConfig(languages=LANGUAGES, aggregator="upgrad", granularity="layer")
    draw = random.Random(0)
    rows = [
        {"ids": torch.tensor(draw.choices(range(80 * k, 80 * k + 60), k=32)), "language": LANGUAGES[k]}
        for k in (0, 1, 2)
        for _ in range(16)
    ]
    sampler = bm.LanguageBatchSampler(rows, config, micro_batch_size=2, micro_steps=options.micro_steps)
    loader = DataLoader(rows, batch_sampler=sampler)
    model, optimizer, loader, moo = bm.prepare(accelerator, model, optimizer, loader, config=config)
    if options.save and options.save.exists():
        accelerator.load_state(options.save)
    while moo.windows < options.windows:
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(input_ids=batch["ids"], labels=batch["ids"], language=batch["language"]).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                accelerator.print(f"step {moo.windows}: loss {loss:.6f}, weights {moo.last.weights.mean(0).tolist()}")
                if moo.windows == options.windows:
                    break
    if options.save:
        accelerator.save_state(options.save)
    accelerator.end_training()


if __name__ == "__main__":
    main()
