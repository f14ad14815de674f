"""Trains a small language model on several languages, under the wrapper of your choice. Made to be copied from.

    torchrun --nproc-per-node 2 examples/train_wrapped.py --wrapper fsdp2       # or fsdp1, ddp, deepspeed
    torchrun --nproc-per-node 1 examples/train_wrapped.py --wrapper single --micro-steps 4

The model has random weights. `--text FOLDER` has a file of text for each language, `de.txt`, `fr.txt`, ...; without it
text is made up. With `--save FOLDER` the run is saved at its end, and goes on from what the folder holds already.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import bucketmoo_ds as bm

WRAPPERS = ("fsdp2", "fsdp1", "ddp", "deepspeed", "single")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MICRO_BATCH, LENGTH = 4, 64  # sequences, and bytes of a sequence


def main() -> None:
    options = parse()
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    torch.manual_seed(options.seed)
    config = bm.BucketMOOConfig(
        languages=options.languages, aggregator=options.aggregator, granularity=options.granularity, seed=options.seed
    )
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4)
    ).to("cuda" if cuda else "cpu")
    data = [row for name in options.languages for row in sequences(name, options.text)]
    sampler = bm.LanguageBatchSampler(
        data, config, micro_batch_size=MICRO_BATCH, micro_steps=options.micro_steps, rank=dist.get_rank()
    )
    train = train_with_deepspeed if options.wrapper == "deepspeed" else train_with_torch
    train(options, config, model, sampler, DataLoader(data, batch_sampler=sampler))
    dist.destroy_process_group()


def train_with_torch(
    options: argparse.Namespace,
    config: bm.BucketMOOConfig,
    model: nn.Module,
    sampler: bm.LanguageBatchSampler,
    loader: DataLoader[Any],
) -> None:
    """The loop of FSDP2, FSDP1, DDP and one process."""
    dtype = DTYPES[options.dtype]
    device = next(model.parameters()).device
    model, session = wrap(
        options.wrapper, model, model.model.layers, config, micro_steps=options.micro_steps, dtype=dtype
    )
    fsdp = options.wrapper.startswith("fsdp")  # which computes in `dtype` by itself
    autocast = torch.autocast(device.type, dtype, enabled=not fsdp and dtype != torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if options.save:
        load(options.save, model, optimizer, session)
    done = session.moo.windows
    for step, window in zip(range(done, options.steps), windows(sampler, loader, done), strict=False):
        for batch in window:
            ids = batch["ids"].to(device)
            with autocast:
                loss = model(input_ids=ids, labels=ids, language=batch["language"]).loss
            (loss / options.micro_steps).backward()
        if options.wrapper == "fsdp1":
            model.clip_grad_norm_(1.0)
        else:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tell(step, loss, batch, session.last, config)
    if options.save:
        save(options.save / f"step{session.moo.windows}", model, optimizer, session)


def wrap(
    name: str,
    model: nn.Module,
    layers: Sequence[nn.Module],
    config: bm.BucketMOOConfig,
    *,
    micro_steps: int,
    dtype: torch.dtype,
) -> tuple[Any, Any]:
    """Returns the wrapped model, and the session that resolves its languages' conflicts.

    Args:
        layers: the repeated layers of the model, each of which FSDP shards, and reduces, by itself.
        dtype: in which FSDP computes and reduces.
    """
    if name == "fsdp2":
        policy = MixedPrecisionPolicy(param_dtype=dtype)
        for layer in layers:
            fully_shard(layer, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        return model, bm.fsdp2.register(model, config, micro_steps=micro_steps)
    if name == "fsdp1":
        fsdp = FullyShardedDataParallel(
            model,
            auto_wrap_policy=ModuleWrapPolicy({type(layers[0])}),
            mixed_precision=MixedPrecision(param_dtype=dtype),
            device_id=next(model.parameters()).device,
            use_orig_params=True,
        )
        return fsdp, bm.fsdp1.register(fsdp, config, micro_steps=micro_steps)
    if name == "ddp":
        ddp = DistributedDataParallel(model)
        return ddp, bm.ddp.register(ddp, config, micro_steps=micro_steps)
    return model, bm.single.register(model, config, micro_steps=micro_steps)


def train_with_deepspeed(
    options: argparse.Namespace,
    config: bm.BucketMOOConfig,
    model: nn.Module,
    sampler: bm.LanguageBatchSampler,
    loader: DataLoader[Any],
) -> None:
    """The same under DeepSpeed, which clips, steps and saves by itself."""
    engine, *_ = bm.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3),
        config={
            "train_micro_batch_size_per_gpu": MICRO_BATCH,
            "gradient_accumulation_steps": options.micro_steps,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 2},
            "bf16": {"enabled": options.dtype == "bf16"},
            "bucket_moo": config.to_json(),
        },
    )
    if options.save and options.save.exists():
        engine.load_checkpoint(str(options.save))
    done = engine.moo.windows
    for step, window in zip(range(done, options.steps), windows(sampler, loader, done), strict=False):
        for batch in window:
            ids = batch["ids"].to(engine.device)
            loss = engine(input_ids=ids, labels=ids, language=batch["language"]).loss
            engine.backward(loss)
            engine.step()
        tell(step, loss, batch, engine.moo.last, config)
    if options.save:
        engine.save_checkpoint(str(options.save))


def windows(sampler: bm.LanguageBatchSampler, loader: DataLoader[Any], done: int) -> Iterator[list[Any]]:
    """Yields the micro-batches of this rank, window by window and epoch by epoch, after `done` windows."""
    sampler.seek(*divmod(done, sampler.windows_per_epoch))
    while True:
        batches = iter(loader)
        while window := list(itertools.islice(batches, sampler.schedule.micro_steps)):
            yield window


def tell(step: int, loss: torch.Tensor, batch: Any, last: Any, config: bm.BucketMOOConfig) -> None:
    """Prints what rank 0 saw: the loss of its latest micro-batch, and the mean over the blocks of the weights."""
    if dist.get_rank() == 0:
        weights = zip(config.languages, last.weights.mean(0).tolist(), strict=True)
        decided = ", ".join(f"{name} {weight:.3f}" for name, weight in weights)
        print(f"step {step}: loss {loss.item():.4f} ({batch['language'][0]}), weights {decided}", flush=True)


def save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, session: Any) -> None:
    """Saves the model, its optimizer and, last, the session: a few numbers, alike on all ranks."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    if dist.get_rank() == 0:
        (folder / "bucket_moo.json").write_text(json.dumps(session.state_dict()))


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, session: Any) -> None:
    """Goes on from the latest that `save` has finished."""
    saved = [path.parent for path in folder.glob("step*/bucket_moo.json")]
    if not saved:
        return
    folder = max(saved, key=lambda path: int(path.name.removeprefix("step")))
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    session.load_state_dict(json.loads((folder / "bucket_moo.json").read_text()))


def sequences(language: str, folder: Path | None) -> list[dict[str, Any]]:
    """The rows of a language: bytes of its file or, made up, of an alphabet and habits of its own."""
    if folder is not None:
        text = (folder / f"{language}.txt").read_bytes()
    else:
        draw = random.Random(language)
        words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 8))) for _ in range(200)]
        text = " ".join(draw.choices(words, k=4000)).encode()
    starts = range(0, len(text) - LENGTH + 1, LENGTH)
    return [{"language": language, "ids": torch.tensor(list(text[at : at + LENGTH]))} for at in starts]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wrapper", choices=WRAPPERS, default="fsdp2")
    parser.add_argument("--languages", nargs="+", default=["de", "fr"], metavar="NAME")
    parser.add_argument("--aggregator", default="upgrad")
    parser.add_argument("--granularity", default="layer")
    parser.add_argument("--micro-steps", type=int, default=2, help="backward passes between two optimizer steps")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps in all, those of a saved run included")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=Path, metavar="FOLDER")
    parser.add_argument("--save", type=Path, metavar="FOLDER")
    return parser.parse_args()


if __name__ == "__main__":
    main()
