"""Runs the tools of docs/tools.md as that page says, on two processes of this machine, with a tiny model made from a
config and made-up text, and writes down what came of it. No hub is asked.

    bash scripts/integrations.sh [axolotl] [llamafactory] [swift]

makes an environment for each tool and starts this file there. The outcomes go into
`benchmarks/results/integrations.json`, of which `benchmarks/readme.py` makes the page's table; those of others stay.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bucketmoo_ds.apps.bench.provenance import describe, headline

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "integrations.json"
PACKAGES = ("axolotl", "llamafactory", "ms_swift", "torch", "transformers", "accelerate", "trl", "peft", "deepspeed")
LANGUAGES = ("de", "fr")
SECTION = {"languages": list(LANGUAGES), "aggregator": "cagrad", "backend": "reference"}  # nothing is compiled
STEPS = 6
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "ACCELERATE_USE_CPU": "true",
    "DS_ACCELERATOR": "cpu",
    "AXOLOTL_DO_NOT_TRACK": "1",
    "WANDB_DISABLED": "true",
    "DISABLE_VERSION_CHECK": "1",  # LLaMA-Factory's
}

Case = tuple[list[str], dict[str, Any]]  # a command, and the file that it reads

# axolotl 0.19 puts the model of process n on accelerator n wherever there are several processes.
ON_CPU = """from axolotl.integrations.base import BasePlugin


class OnCPU(BasePlugin):
    def load_datasets(self, cfg, preprocess=False):
        cfg.device_map = None
"""

# DeepSpeed would compile an op for CPUs first, which takes minutes.
NOT_COMPILED = """import runpy

import deepspeed

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
runpy.run_module("bucketmoo_ds.integrations.llamafactory", run_name="__main__")
"""


def main() -> None:
    """Runs the cases of one tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=sorted(TOOLS))
    parser.add_argument("case", nargs="*", help="of those of the tool; all of them by default")
    options = parser.parse_args()
    head = describe(PACKAGES)
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder)
        for case, (command, settings) in TOOLS[options.tool](folder).items():
            if case in options.case or not options.case:
                found[case] = outcome(command, settings, folder)
                print(options.tool, case, json.dumps(found[case]), flush=True)
    known = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}
    earlier = known.get(options.tool, {}).get("cases", {}) if options.case else {}
    known[options.tool] = head | {"cases": earlier | found}
    RESULT.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def outcome(command: list[str], settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Returns what a run has logged and saved or, where it has stopped, its error."""
    (folder / "settings.yaml").write_text(json.dumps(settings), encoding="utf-8")  # which is YAML, too
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(folder), "PATH": path}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, errors="replace", check=False)
    said = run.stdout + run.stderr
    if run.returncode:
        errors = re.findall(r"^(?:\[rank\d\]: )?((?:\w+\.)*\w*Error: .+)$", said, re.MULTILINE)
        own = [each for each in errors if "ChildFailedError" not in each and "CalledProcessError" not in each]
        return {"outcome": "stopped", "error": own[-1] if own else said[-1000:]}
    saved = sorted(folder.glob("out/**/checkpoint-*/trainer_state.json"))
    history = json.loads(saved[-1].read_text(encoding="utf-8"))["log_history"]
    state = saved[-1].parent / "bucket_moo.json"
    windows = json.loads(state.read_text(encoding="utf-8"))["states"]["moo"]["windows"] if state.exists() else 0
    training = [each for each in history if "loss" in each]
    evaluation = [each for each in history if "eval_loss" in each]
    subprocess.run(["rm", "-rf", str(folder / "out")], check=True)
    return {
        "outcome": "trained",
        "windows": windows,
        "first": kept(training[0]),
        "last": kept(training[-1]),
        "eval": kept(evaluation[-1]) if evaluation else {},
    }


def kept(log: dict[str, Any]) -> dict[str, float]:
    """Returns the losses of a log and what is ours of it."""
    ours = re.compile(r"loss|step|loss/\w+|tokens/(de|fr)|moo/.+|eval_(\w+_)?loss")
    return {name: value for name, value in log.items() if ours.fullmatch(name)}


def make(folder: Path) -> None:
    """Writes a model with a tokenizer of bytes, and 64 rows of each language in the forms that the tools read."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    names = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    fast.save_pretrained(folder / "model")
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    config = LlamaConfig(vocab_size=len(names), max_position_embeddings=512, **shape, **ids)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    (folder / "on_cpu.py").write_text(ON_CPU, encoding="utf-8")
    (folder / "not_compiled.py").write_text(NOT_COMPILED, encoding="utf-8")
    rows = []
    for language in LANGUAGES:
        draw = random.Random(language)
        words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 8))) for _ in range(200)]
        texts = [(" ".join(draw.choices(words, k=6)), " ".join(draw.choices(words, k=6))) for _ in range(64)]
        own = [
            {
                "text": f"{first} {second}",
                "instruction": first,
                "output": second,
                "language": language,
                "channel": language,
                "messages": [{"role": "user", "content": first}, {"role": "assistant", "content": second}],
            }
            for first, second in texts
        ]
        write(folder / f"{language}.jsonl", own, "text", "instruction", "output")
        rows += own
    write(folder / "all.jsonl", rows, "text", "instruction", "output", "language")
    write(folder / "chat.jsonl", rows, "messages", "channel")
    columns = {"columns": {"prompt": "instruction", "response": "output"}}
    entries: dict[str, Any] = {name: {"file_name": f"{name}.jsonl", "language": name} | columns for name in LANGUAGES}
    entries["all"] = {"file_name": "all.jsonl"} | columns
    (folder / "dataset_info.json").write_text(json.dumps(entries), encoding="utf-8")
    zero2 = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
    }
    (folder / "zero2.json").write_text(json.dumps(zero2), encoding="utf-8")


def write(path: Path, rows: list[dict[str, Any]], *columns: str) -> None:
    """Writes some columns of the rows."""
    told = ({name: row[name] for name in columns} for row in rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in told), encoding="utf-8")


def axolotl(folder: Path) -> dict[str, Case]:
    """The cases of axolotl."""
    command = ["torchrun", "--nproc-per-node", "2", "-m", "axolotl.cli.train", "settings.yaml"]
    entries = [{"path": f"{folder}/{name}.jsonl", "type": "completion", "language": name} for name in LANGUAGES]
    settings: dict[str, Any] = {
        "base_model": f"{folder}/model",
        "plugins": ["on_cpu.OnCPU", "bucketmoo_ds.integrations.axolotl.BucketMOOPlugin"],
        "trainer_cls": "bucketmoo_ds.integrations.axolotl.Trainer",
        "bucket_moo": SECTION,
        "datasets": entries,
        "val_set_size": 0.1,
        "dataset_prepared_path": f"{folder}/prepared",
        "output_dir": f"{folder}/out",
        "sequence_len": 128,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "learning_rate": 0.003,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "bf16": False,
        "tf32": False,
        "logging_steps": 2,
        "eval_steps": STEPS,
        "save_steps": STEPS,
        "ddp": True,
    }
    column = [{"path": f"{folder}/all.jsonl", "type": "completion"}]
    missing = {"plugins": ["on_cpu.OnCPU", "not_installed.BucketMOOPlugin"], "trainer_cls": "not_installed.Trainer"}
    return {
        "language of an entry, DDP": (command, settings),
        'language of a row, mode "mixed", DDP': (
            command, settings | {"datasets": column, "bucket_moo": SECTION | {"mode": "mixed", "gram_every": 2}},
        ),
        "sample_packing": (command, settings | {"sample_packing": True}),
        "no trainer_cls": (command, {name: each for name, each in settings.items() if name != "trainer_cls"}),
        "bucketmoo_ds cannot be imported": (command, settings | missing),
    }  # fmt: skip


def llamafactory(folder: Path) -> dict[str, Case]:
    """The cases of LLaMA-Factory."""
    command = ["torchrun", "--nproc-per-node", "2", "-m", "bucketmoo_ds.integrations.llamafactory", "settings.yaml"]
    settings: dict[str, Any] = {
        "bucket_moo": SECTION,
        "model_name_or_path": f"{folder}/model",
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "dataset": ",".join(LANGUAGES),
        "dataset_dir": str(folder),
        "template": "default",
        "cutoff_len": 128,
        "output_dir": f"{folder}/out",
        "overwrite_output_dir": True,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "learning_rate": 0.003,
        "lr_scheduler_type": "constant",
        "logging_steps": 2,
        "save_steps": STEPS,
        "val_size": 0.1,
        "eval_strategy": "steps",
        "eval_steps": STEPS,
        "report_to": "none",
        "use_cpu": True,
        "overwrite_cache": True,
    }
    return {
        "language of a data set, DDP": (command, settings),
        "language of a row, LoRA, packing, ZeRO-2": (
            [*command[:3], "not_compiled.py", "settings.yaml"],
            settings
            | {"dataset": "all", "finetuning_type": "lora", "packing": True, "deepspeed": f"{folder}/zero2.json"},
        ),
        "stage: dpo": (command, settings | {"stage": "dpo"}),
        "started by llamafactory-cli": (["llamafactory-cli", "train", "settings.yaml"], settings),
    }


def swift(folder: Path) -> dict[str, Case]:
    """The cases of ms-swift."""
    plugin = folder / "languages.py"
    plugin.write_text(f"from bucketmoo_ds.integrations import swift\n\nswift.use({SECTION!r})\n", encoding="utf-8")
    mixed = folder / "mixed.py"
    mixed.write_text(
        f"from bucketmoo_ds.integrations import swift\n\nswift.use({SECTION | {'mode': 'mixed', 'gram_every': 2}!r})\n",
        encoding="utf-8",
    )
    words = {
        "model": f"{folder}/model",
        "model_type": "llama",
        "template": "dummy",
        "tuner_type": "full",
        "dataset": f"{folder}/chat.jsonl",
        "split_dataset_ratio": "0.1",
        "torch_dtype": "float32",
        "max_length": "128",
        "output_dir": f"{folder}/out",
        "per_device_train_batch_size": "2",
        "gradient_accumulation_steps": "2",
        "max_steps": str(STEPS),
        "learning_rate": "0.003",
        "lr_scheduler_type": "constant",
        "logging_steps": "2",
        "eval_steps": str(STEPS),
        "save_steps": str(STEPS),
        "report_to": "none",
        "use_cpu": "true",
        "ddp_backend": "gloo",
        "strict": "true",
        "use_hf": "true",
    }

    def command(**more: str) -> list[str]:
        told = [part for name, value in (words | more).items() for part in (f"--{name}", value)]
        return ["torchrun", "--nproc-per-node", "2", "-m", "swift.cli.sft", *told]

    return {
        "column channel, DDP": (command(external_plugins=str(plugin)), {}),
        'column channel, mode "mixed", DDP': (command(external_plugins=str(mixed)), {}),
        "packing": (command(external_plugins=str(plugin), packing="true", attn_impl="flash_attn"), {}),
    }


TOOLS: dict[str, Callable[[Path], dict[str, Case]]] = {
    "axolotl": axolotl,
    "llamafactory": llamafactory,
    "swift": swift,
}


def render(result: dict[str, Any]) -> str:
    """Returns a row for every case, and what errors said below them."""
    lines = [
        f"Two processes over gloo, {STEPS} windows of 2 micro-steps; losses of the first and the last log.",
        "",
        "| tool | case | outcome | windows | loss de | loss fr | weight de, fr | eval de, fr |",
        "| --- |" + " --- |" * 7,
    ]
    errors: list[str] = []
    for tool, found in sorted(result.items()):
        for case, ended in found["cases"].items():
            if ended["outcome"] == "stopped":
                errors.append(ended["error"])
                lines.append(f"| {tool} | {case} | stops ({len(errors)}) | | | | | |")
                continue
            first, last, evaluation = ended["first"], ended["last"], ended["eval"]
            losses = (f"{first[f'loss/{name}']:.2f} to {last[f'loss/{name}']:.2f}" for name in LANGUAGES)
            weights = ", ".join(f"{last[f'moo/weight/{name}']:.2f}" for name in LANGUAGES)
            held_out = ", ".join(f"{evaluation[f'eval_{name}_loss']:.2f}" for name in LANGUAGES if evaluation)
            lines.append(
                f"| {tool} | {case} | trains | {ended['windows']} | {' | '.join(losses)} | {weights} | {held_out} |"
            )
    lines += ["", *(f"{number}. `{text}`" for number, text in enumerate(errors, start=1)), ""]
    return "\n".join([*lines, *(f"* {tool}: {headline(found)}" for tool, found in sorted(result.items()))])


if __name__ == "__main__":
    main()
