"""Prune a language model: more from layers with a large alpha, less from those with a small one.

    python examples/prune_llm.py [--model FOLDER --text FILE] [--total 0.6]

What to see: perplexity dense, with uniform sparsity, and with sparsity by alpha. Without a FOLDER
that save_pretrained wrote a tiny LLaMA is trained for seconds: it shows how, not that it helps.
"""

import argparse
import copy
import inspect
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tempbalance.pruning import Wanda, prune, sparsities, uniform


def tiny(windows: torch.Tensor, steps: int) -> torch.nn.Module:
    config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
                         num_attention_heads=4, bos_token_id=None, eos_token_id=None)  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for batch in windows[torch.randint(len(windows), (steps, 8))]:
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def perplexity(model: torch.nn.Module, windows: torch.Tensor) -> float:
    return math.exp(float(model(input_ids=windows, labels=windows).loss))


def main(model: Path | None, text: Path | None, total: float, steps: int) -> None:
    torch.manual_seed(0)
    words = text.read_text() if text else inspect.getsource(argparse)
    ids = AutoTokenizer.from_pretrained(model)(words)["input_ids"] if model else words.encode()
    windows = torch.tensor(list(ids))[: len(ids) // 64 * 64].view(-1, 64)
    seen, held = windows[:-32], windows[-32:]
    llm = AutoModelForCausalLM.from_pretrained(model) if model else tiny(seen, steps)
    print(f"dense: perplexity {perplexity(llm.eval(), held):.2f}")
    for name, how in {"uniform": uniform, "by alpha": sparsities}.items():
        pruned, ratios = copy.deepcopy(llm), how(llm, total)
        prune(pruned, ratios, Wanda(), [{"input_ids": batch} for batch in seen.split(8)[:8]])
        removed = f"{min(ratios.values()):.2f} to {max(ratios.values()):.2f} of a layer"
        print(f"{name}: {removed}, perplexity {perplexity(pruned, held):.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--text", type=Path, help="default: a file of Python's standard library")
    parser.add_argument("--total", type=float, default=0.6)
    parser.add_argument("--steps", type=int, default=150)
    main(**vars(parser.parse_args()))
