"""Hugging Face: one callback on a Trainer as it is.

    python examples/huggingface_trainer.py

What to see: a small LLaMA learns the bytes of a Python file. The Trainer reports the schedule's
rate; the multipliers, on only while the optimizer steps, are in the callback.
"""

import argparse
import inspect

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from tempbalance.integrations.huggingface import TempBalanceTrainerCallback


class Windows(Dataset):
    """The bytes of a text in windows, each a sequence of ids to predict."""

    def __init__(self, text: str, length: int = 64) -> None:
        ids = torch.tensor(list(text.encode()))
        self.ids = ids[: len(ids) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def main(steps: int, out: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    args = TrainingArguments(
        output_dir=out, max_steps=steps, per_device_train_batch_size=8, learning_rate=3e-3,
        lr_scheduler_type="cosine", logging_steps=max(1, steps // 4), save_strategy="no",
        use_cpu=True, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    callback = TempBalanceTrainerCallback(every=20)
    data = Windows(inspect.getsource(argparse))
    Trainer(LlamaForCausalLM(config), args, train_dataset=data, callbacks=[callback]).train()
    for name, alpha in callback.alphas.items():
        print(f"{name:<40} alpha {alpha:.2f}  rate x {callback.multipliers[name]:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--out", default="outputs/huggingface")
    chosen = parser.parse_args()
    main(chosen.steps, chosen.out)
