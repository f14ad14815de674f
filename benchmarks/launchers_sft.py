"""What benchmarks/launchers.py runs of TRL: examples/train_trainer.py with SFTTrainer in the place of Trainer, which
makes tokens of text and packs each language by itself."""

import random
from pathlib import Path

import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

import bucketmoo_ds as bm

LANGUAGES = ("de", "fr", "ko")


class Trainer(bm.LanguageTrainerMixin, trl.SFTTrainer):
    """What a user writes."""


def main() -> None:
    """Trains, and saves the model."""
    (arguments,) = HfArgumentParser(trl.SFTConfig).parse_args_into_dataclasses()
    set_seed(arguments.seed)
    draw = random.Random(0)
    words = {name: [f"{name}{number}" for number in range(40)] for name in LANGUAGES}
    names = [name for name in LANGUAGES for _ in range(64)]
    texts = [" ".join(draw.choices(words[name], k=draw.randint(5, 30))) for name in names]
    known = ["<unk>", "<pad>", "<eos>", *(word for each in words.values() for word in each)]
    plain = Tokenizer(models.WordLevel({word: number for number, word in enumerate(known)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    sizes = {"vocab_size": len(known), "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    trainer = Trainer(
        model=LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2)),
        args=arguments,
        train_dataset=Dataset.from_dict({"text": texts, "language": names}),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>"),
        moo=bm.BucketMOOConfig(languages=LANGUAGES, aggregator="mgda", granularity="layer"),
    )
    trainer.train()
    if trainer.is_world_process_zero():
        print(f"step {trainer.state.global_step}: {trainer.moo.windows} windows resolved", flush=True)
    trainer.save_model(Path(arguments.output_dir) / "model")


if __name__ == "__main__":
    main()
