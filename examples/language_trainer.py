"""Fine-tune a language model with Hugging Face's Trainer, and keep the posterior that forgetting will need.

    pip install 'distruction[cli,language]' accelerate
    python examples/language_trainer.py --model base --data all.jsonl --out tuned --posterior tuned.safetensors
    distruction forget --model tuned --posterior tuned.safetensors --data forget.jsonl --out unlearned

Each line of ``all.jsonl`` is {"prompt": "...", "answer": "..."} or {"text": "..."}.
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import distruction
from distruction.data.texts import longest_of, padded, read_texts, tokens_of

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "data", "out", "posterior"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model)
    rows = tokens_of(read_texts(options.data), tokenizer, longest_of(model), options.data)
    settings = TrainingArguments(
        output_dir=str(options.out), num_train_epochs=options.epochs, learning_rate=1e-3, save_strategy="no",
        report_to="none", remove_unused_columns=False,
    )  # fmt: skip
    trainer = Trainer(model, settings, data_collator=padded, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    distruction.prepare(model, trainer.get_train_dataloader(), num_examples=len(rows)).save(options.posterior)
