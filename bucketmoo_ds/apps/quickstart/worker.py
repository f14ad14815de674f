"""One rank of the quickstart: `python -m bucketmoo_ds.apps.quickstart.worker FOLDER`.

All runs share one set of processes, since starting them costs more than a run of a few dozen steps.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from bucketmoo_ds import __version__
from bucketmoo_ds.apps.quickstart import prepare
from bucketmoo_ds.apps.quickstart.settings import BASELINE, QuickstartSettings
from bucketmoo_ds.apps.training.environment import run_rank
from bucketmoo_ds.apps.training.loop import RunResult, train
from bucketmoo_ds.apps.training.models import load_model
from bucketmoo_ds.apps.training.settings import ModelSettings, TrainingSettings
from bucketmoo_ds.pipeline import checkpoint


def main() -> None:
    """Trains the base and every run; rank 0 writes `results.json` anew after each."""
    folder = Path(sys.argv[1])
    run_rank(lambda: run(folder), quiet=True)


def run(folder: Path) -> None:
    """See `main`."""
    quickstart = QuickstartSettings.load(folder)
    sets = prepare.load_evaluation(folder, quickstart)
    data = prepare.load_data(folder, "seen")
    base = _train_base(quickstart, sets, folder)
    results = _results(quickstart, folder, base)
    for seed in quickstart.seeds:
        for method in quickstart.methods:
            model = AutoModelForCausalLM.from_pretrained(folder / "base")
            result = train(
                model,
                data,
                sets,
                quickstart.training(seed),
                deepspeed_json=quickstart.deepspeed(method, quickstart.seen, quickstart.micro_steps),
                output=folder / "runs" / f"{method}-seed{seed}",
                title=f"{method}, seed {seed}",
            )
            results["values"].setdefault(method, {})[str(seed)] = result.bits_per_byte
            results["seconds"].setdefault(method, {})[str(seed)] = result.seconds
            if dist.get_rank() == 0:
                checkpoint.write_atomically(folder / "results.json", json.dumps(results, indent=1))


def _train_base(quickstart: QuickstartSettings, sets: list[Any], folder: Path) -> RunResult:
    vocabulary = len(prepare.load_tokenizer(folder))
    model: Any = load_model(ModelSettings(config=quickstart.model_config(vocabulary)), seed=0)
    # One language fills every slot, so that a window half as long as the fine-tuning's will do.
    deepspeed = quickstart.deepspeed(BASELINE, (quickstart.base,), max(quickstart.micro_steps // 2, 1))
    settings: TrainingSettings = quickstart.base_training()
    data = prepare.load_data(folder, "base")
    output = folder / "base-run"
    title = f"base ({quickstart.base})"
    result = train(model, data, sets, settings, deepspeed_json=deepspeed, output=output, title=title)
    if dist.get_rank() == 0:
        model.save_pretrained(folder / "base")
    dist.barrier()
    return result


def _results(quickstart: QuickstartSettings, folder: Path, base: RunResult) -> dict[str, Any]:
    import deepspeed
    import transformers

    return {
        "title": "Quickstart: averaging against bucket MOO",
        "unit": "bits per byte",
        "baseline": BASELINE,
        "methods": list(quickstart.methods),
        "seeds": list(quickstart.seeds),
        "seen": list(quickstart.seen),
        "unseen": list(quickstart.unseen),
        "values": {},
        "seconds": {},
        "base": base.bits_per_byte,
        "provenance": json.loads((folder / "corpus.json").read_text(encoding="utf-8")),
        "command": (folder / "command.txt").read_text(encoding="utf-8").strip(),
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "processes": quickstart.processes,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "date": time.strftime("%Y-%m-%d"),
        },
        "versions": {
            "bucketmoo_ds": __version__,
            "torch": torch.__version__,
            "deepspeed": deepspeed.__version__,
            "transformers": transformers.__version__,
        },
    }


if __name__ == "__main__":
    main()
