"""Runs the same scripts under every launcher, on one node and on two, and writes down what came of it.

    python benchmarks/launchers.py [ROW ...]

puts the outcome of each row of `ROWS`, or of those that are named, into `benchmarks/results/launchers.json`; other rows
there stay. `benchmarks/readme.py` makes the table of docs/launchers.md from it. Two processes of the CPU, and two nodes
are two launchers on loopback, each of which has one. All weights of a row have to be the same, to the bit.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bucketmoo_ds.apps.bench.provenance import describe, headline
from bucketmoo_ds.apps.corpus import tokenizer

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "launchers.json"
BIN = Path(sys.executable).parent
SECONDS = 400

LAUNCHERS = ("torchrun", "accelerate launch", "deepspeed")
NODES = (1, 2)
ARGUMENTS = ["--output_dir", "{out}", "--max_steps", "6", "--per_device_train_batch_size", "2"]
ARGUMENTS += ["--gradient_accumulation_steps", "2", "--save_strategy", "no", "--report_to", "none"]
TRAINER = ["examples/train_trainer.py", *ARGUMENTS]
PACKED = ["benchmarks/launchers_sft.py", *ARGUMENTS, "--packing", "true", "--max_length", "32", "--bf16", "false"]
LONGER = ["--max_steps", "30", "--enable_jit_checkpoint"]
WRAPPED = ["examples/train_wrapped.py", "--steps", "4"]
DEEPSPEED = {"ACCELERATE_USE_CPU": "false", "WITHOUT_SHM_COMM": "1"}
ZERO = DEEPSPEED | {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"}
# The trainer and the wrapper: words of the command line, in which {out} is a folder, and further environment.
ROWS: dict[tuple[str, str], tuple[list[str], dict[str, str]]] = {
    ("bm.Trainer", "DDP"): (TRAINER, {}),
    ("bm.Trainer", "ZeRO-2"): ([*TRAINER, "--deepspeed", "configs/trainer_zero2.json"], DEEPSPEED),
    ("bm.Trainer", "ZeRO-3"): ([*TRAINER, "--deepspeed", "configs/trainer_zero3.json"], DEEPSPEED),
    ("SFTTrainer, packed", "DDP"): (PACKED, {}),
    ("SFTTrainer, packed", "ZeRO-2"): ([*PACKED, "--deepspeed", "configs/trainer_zero2.json"], DEEPSPEED),
    ("Accelerate loop", "DDP"): (["examples/train_accelerate.py", "--save", "{out}/saved"], {}),
    ("Accelerate loop", "ZeRO-2"): (
        ["examples/train_accelerate.py", "--save", "{out}/saved"],
        ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    ),
    ("DeepSpeed loop", "ZeRO-2"): ([*WRAPPED, "--save", "{out}/saved", "--wrapper", "deepspeed"], DEEPSPEED),
    **{
        ("PyTorch loop", name): ([*WRAPPED, "--save", "{out}/saved", "--wrapper", name.lower()], {})
        for name in ("DDP", "FSDP1", "FSDP2")
    },
    ("bucketmoo train", "ZeRO-2"): (["-m", "bucketmoo_ds.apps.cli.main", "train", "{out}/train.json"], DEEPSPEED),
}


ENDED = ("DDP", "ZeRO-2")  # of bm.Trainer
UNDISTURBED = "undisturbed"


def main() -> None:
    """Runs the rows, one launcher at a time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = {", ".join(row): row for row in ROWS}
    ended = {f"SIGTERM, {wrapper}": ("bm.Trainer", wrapper) for wrapper in ENDED}
    parser.add_argument("row", nargs="*", help=f"all of them by default: {'; '.join([*names, *ended])}")
    parser.add_argument("--launchers", nargs="+", default=LAUNCHERS, metavar="NAME")
    parser.add_argument("--nodes", type=int, nargs="+", default=NODES)
    options = parser.parse_args()
    head = describe(("torch", "deepspeed", "transformers", "accelerate", "trl"))
    for name in options.row or [*names, *ended]:
        words, environment = ROWS[ended.get(name) or names[name]]
        for launcher, nodes in itertools.product(options.launchers, options.nodes):
            rows = json.loads(RESULT.read_text(encoding="utf-8"))["rows"] if RESULT.exists() else {}
            found = rows.setdefault(name, {})
            if name in ended and UNDISTURBED not in found:
                found[UNDISTURBED] = outcome(launcher, nodes, [*words, *LONGER], environment)
            told = (outcome_of_ended if name in ended else outcome)(launcher, nodes, words, environment)
            print(name, launcher, nodes, told, flush=True)
            found[_column(launcher, nodes)] = told
            rows = {each: rows[each] for each in [*names, *ended] if each in rows}
            RESULT.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


def outcome(launcher: str, nodes: int, words: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """Returns what became of a script: its last step, a digest of its weights and the seconds in all, or its error."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        run = Run(launcher, nodes, words, environment, Path(folder))
        status = run.wait(SECONDS)
        told = {"seconds": round(time.monotonic() - began, 1)}
        if status or not run.last_step():
            return told | {"error": error_of(run.said())}
        return told | {"last_step": run.last_step(), "weights": run.weights()}


def outcome_of_ended(launcher: str, nodes: int, words: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """The same of one that SIGTERM ends after some steps, `saved` being the last of them, and that is run again."""
    words = [*words, *LONGER]
    with tempfile.TemporaryDirectory() as folder:
        run = Run(launcher, nodes, words, environment, Path(folder))
        saved = run.end(SECONDS)
        if saved is None:
            return {"error": error_of(run.said())}
        again = Run(launcher, nodes, words, environment, Path(folder))
        if again.wait(SECONDS):
            return {"saved": saved, "error": error_of(again.said())}
        return {"saved": saved, "last_step": again.last_step(), "weights": again.weights()}


class Run:
    """A script under a launcher, or under one for each node.

    Args:
        words: of the command line, from the script on.
        folder: `{out}` in them is a folder within it, which an earlier run may have left.
    """

    def __init__(self, launcher: str, nodes: int, words: list[str], environment: dict[str, str], folder: Path) -> None:
        self.out = folder / "out"
        self._log = folder / "log"
        hosts, site = folder / "hostfile", folder / "site"
        hosts.write_text("127.0.0.1 slots=1\nlocalhost slots=1\n")
        for each in (self.out, site):
            each.mkdir(exist_ok=True)
        (site / "sitecustomize.py").write_text(SITE)
        if "{out}/train.json" in words:
            _write_settings(self.out)
        module = words[0] == "-m"
        filled = [word.format(out=self.out) for word in words[module:]]
        settings = os.environ | CPU | {"PYTHONPATH": f"{site}:{ROOT}"} | environment
        port = free_port()
        with self._log.open("w") as log:
            self._processes = [
                subprocess.Popen(
                    [*started(launcher, nodes, node, port, hosts, module=module), *filled],
                    cwd=ROOT, env=settings, stdout=log, stderr=log, start_new_session=True,
                )
                for node in range(nodes)
            ]  # fmt: skip

    def said(self) -> str:
        """Returns what all have printed so far."""
        return self._log.read_text(errors="replace")

    def last_step(self) -> int:
        """Returns the last step that the script has named, or 0."""
        found = re.findall(r"^(?:step|training) (\d+)", self.said(), re.MULTILINE)
        return int(found[-1]) if found else 0

    def weights(self) -> str:
        """Returns a digest of the trained weights and, where they were saved at the end, of the optimizer's state."""
        digest = hashlib.sha256()
        for path in sorted(self.out.rglob("*")):
            kept = path.suffix in (".safetensors", ".distcp") or path.name.endswith("optim_states.pt")
            if kept and not any(part.startswith("checkpoint-") for part in path.parts):
                digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest()[:16]

    def wait(self, seconds: float) -> int:
        """Returns the first status that is not 0, or 0; what has not ended by then is ended."""
        deadline = time.monotonic() + seconds
        try:
            statuses = [each.wait(max(deadline - time.monotonic(), 0)) for each in self._processes]
        except subprocess.TimeoutExpired:
            self._kill()
            statuses = [-signal.SIGKILL]
        return next(filter(None, statuses), 0)

    def end(self, seconds: float) -> int | None:
        """Sends SIGTERM to the launcher of the last node, and to what it has started in its process group, as a batch
        system does, once the first step is near. Returns the step that was saved, when all have ended, or `None`."""
        deadline = time.monotonic() + seconds
        while "INFO sampler:" not in self.said():
            if time.monotonic() > deadline or any(each.poll() is not None for each in self._processes):
                self._kill()
                return None
            time.sleep(0.05)
        os.killpg(self._processes[-1].pid, signal.SIGTERM)
        self.wait(deadline - time.monotonic())
        while any(_group_lives(each.pid) for each in self._processes):  # deepspeed's ranks outlive its launcher
            if time.monotonic() > deadline:
                self._kill()
                return None
            time.sleep(0.05)
        found = re.search(r"SIGTERM: saved a checkpoint of step (\d+)", self.said())
        return int(found[1]) if found else None

    def _kill(self) -> None:
        for each in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(each.pid, signal.SIGKILL)


def _group_lives(leader: int) -> bool:
    try:
        os.killpg(leader, 0)
    except ProcessLookupError:
        return False
    return True


def _column(launcher: str, nodes: int) -> str:
    return f"{launcher}, {nodes} nodes" if nodes > 1 else launcher


# Without a GPU: gloo, and no minute in which DeepSpeed compiles a collective of its own.
CPU = {
    "ACCELERATE_USE_CPU": "true",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
SITE = """import os
if "RANK" in os.environ and "WITHOUT_SHM_COMM" in os.environ:
    import deepspeed
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
"""


def started(launcher: str, nodes: int, node: int, port: int, hosts: Path, module: bool = False) -> list[str]:
    """Returns the command of a node, up to the script."""
    each = 2 // nodes
    more = nodes > 1
    if launcher == "torchrun":
        words = ["torchrun", "--nproc-per-node", each, "--master-port", port]
        words += ["--nnodes", nodes, "--node-rank", node, "--master-addr", "127.0.0.1"] * more
    elif launcher == "accelerate launch":
        words = ["accelerate", "launch", "--multi_gpu", "--num_processes", 2, "--main_process_port", port]
        words += ["--num_machines", nodes, "--machine_rank", node, "--main_process_ip", "127.0.0.1"] * more
    else:
        words = ["deepspeed", "--no_local_rank", "--master_port", port]
        alone = ["--hostfile", hosts, "--no_ssh", "--node_rank", node, "--master_addr", "127.0.0.1"]
        words += alone if more else ["--num_gpus", each]
    flag = "--module" if launcher != "torchrun" else "-m"
    return [str(BIN / words[0]), *map(str, words[1:]), *[flag] * module]


def error_of(said: str) -> str:
    """Returns the last line that names an error, and not that of the launcher."""
    named = (line for line in said.splitlines() if re.search(r"(Error|Exception)\b.*: ", line))
    lines = [line for line in named if "ChildFailedError" not in line]
    return lines[-1].strip()[:300] if lines else said.strip()[-300:]


def free_port() -> int:
    """Returns a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _write_settings(out: Path) -> None:
    """What `bucketmoo train` reads: made-up text, a tokenizer of it, and a small model."""
    texts = {}
    for language in ("de", "fr", "ko"):
        draw = random.Random(language)
        words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 8))) for _ in range(100)]
        texts[language] = [" ".join(draw.choices(words, k=3000))]
        (out / "text").mkdir(exist_ok=True)
        (out / "text" / f"{language}.txt").write_text(texts[language][0])
    tokenizer.save(tokenizer.train(texts, 300), out / "tokenizer")
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    settings = {
        "output": str(out / "run"),
        "model": {"config": {"model_type": "llama", **sizes, **layers}, "tokenizer": str(out / "tokenizer")},
        "data": {"path": str(out / "text")},
        "training": {"steps": 4, "sequence_length": 32, "learning_rate": 1e-3},
        "deepspeed": {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "zero_optimization": {"stage": 2},
            "bucket_moo": {"languages": list(texts), "aggregator": "upgrad"},
        },
    }
    (out / "train.json").write_text(json.dumps(settings))


def render(result: dict[str, Any]) -> str:
    """Returns a row for every trainer and wrapper, a column for every launcher and number of nodes."""
    columns = [_column(launcher, nodes) for launcher in LAUNCHERS for nodes in NODES]
    lines = [
        f"{headline(result)}. Two processes over gloo; two nodes are two launchers on loopback. `works`: it ended "
        "well, and the weights are to the bit those of the row's other runs. `step N`: ended by SIGTERM to the "
        "last node, and saved at that step; started again, it has ended with the bits of a run that nothing ended. "
        "Empty: not run.",
        "",
        f"| trainer, wrapper | {' | '.join(columns)} |",
        "| --- |" + " --- |" * len(columns),
    ]
    messages: list[str] = []
    for name, found in result["rows"].items():
        reached = [told["weights"] for told in found.values() if "weights" in told]  # the undisturbed one's first
        cells = []
        for column in columns:
            told = found.get(column)
            if told is None:
                cells.append("")
            elif "error" in told:
                if told["error"] not in messages:
                    messages.append(told["error"])
                cells.append(f"fails ({messages.index(told['error']) + 1})")
            elif told["weights"] != reached[0]:
                cells.append("other weights")
            else:
                cells.append(f"step {told['saved']}" if "saved" in told else "works")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{number}. {text}" for number, text in enumerate(messages, start=1))])


if __name__ == "__main__":
    main()
