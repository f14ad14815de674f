"""One rank of `bucketmoo train`: `python -m bucketmoo_ds.apps.training.worker CONFIG [--resume]`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from bucketmoo_ds.apps.corpus import evaluate
from bucketmoo_ds.apps.corpus.load import DataSpec, load_texts, load_training_data
from bucketmoo_ds.apps.training import folder
from bucketmoo_ds.apps.training.environment import run_rank
from bucketmoo_ds.apps.training.settings import RunSettings, read_settings
from bucketmoo_ds.logs import logger


def main(arguments: list[str] | None = None) -> None:
    """Runs this rank."""
    parser = argparse.ArgumentParser(prog="bucketmoo train")
    parser.add_argument("config", type=Path)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args(arguments)
    settings = read_settings(options.config)
    run_rank(lambda: run(settings, resume=options.resume))


def run(settings: RunSettings, resume: bool) -> None:
    """Trains as the settings say, on the ranks of the default process group."""
    import deepspeed

    from bucketmoo_ds.apps.training.loop import train
    from bucketmoo_ds.apps.training.models import load_model, load_tokenizer

    output = Path(settings.output)
    lock = folder.hold(output)
    languages = settings.moo.languages
    tokenizer = load_tokenizer(settings.model)
    length = settings.training.sequence_length
    say = logger.warning if dist.get_rank() == 0 else logger.debug  # all ranks read the same files
    dataset = load_training_data(DataSpec.from_mapping(settings.data), languages, tokenizer, length, say=say)
    sets = []
    if settings.evaluation is not None:
        held_out = settings.evaluation
        texts = load_texts(DataSpec.from_mapping(held_out.data), held_out.languages or languages, say)
        cap = held_out.max_bytes
        sets = [evaluate.prepare(language, texts[language], tokenizer, length, cap) for language in texts]
    model: Any = load_model(settings.model, settings.training.seed)
    if dist.get_rank() == 0:
        (output / "config.json").write_text(json.dumps(_plain(settings), indent=1), encoding="utf-8")
    train(
        model,
        dataset,
        sets,
        settings.training,
        deepspeed_json=settings.deepspeed,
        output=output,
        evaluation_batch=settings.evaluation.batch_size if settings.evaluation else 1,
        resume=resume,
    )
    with deepspeed.zero.GatheredParameters(list(model.parameters())):  # ZeRO-3 has taken them apart
        if dist.get_rank() == 0:
            temporary = output / ".model"
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            shutil.rmtree(output / "model", ignore_errors=True)
            temporary.rename(output / "model")
    lock.release()


def _plain(settings: RunSettings) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(settings), default=dict))
    return plain


if __name__ == "__main__":
    main()
