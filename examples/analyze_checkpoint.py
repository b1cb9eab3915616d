"""Look into a checkpoint: alpha of every layer from nothing but the file.

    python examples/analyze_checkpoint.py [FILE]

What to see: a table (alpha, fit, norms) and report.html. Without a FILE a small network is trained
on digits and saved before and after, and what training has moved is told in units of noise.
"""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import tempbalance as tb


def train_and_save(folder: Path) -> list[Path]:
    """A network on digits; the files of its weights before and after."""
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32) / 16
    y = torch.tensor(digits.target)
    model = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    files = [folder / "before.pt", folder / "after.pt"]
    torch.save(model.state_dict(), files[0])
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    torch.save(model.state_dict(), files[1])
    return files


def main(file: Path | None, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    files = train_and_save(out) if file is None else [file]
    reports = [tb.analyze(path) for path in files]  # no code in the file is run
    print(reports[-1])
    reports[-1].to_html(out / "report.html", title=files[-1].name)
    print(f"\nwritten: {out / 'report.html'}")
    if len(reports) == 2:
        print("\nFrom before to after training:", *tb.compare(*reports).summary(), sep="\n  ")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, help="state dict, safetensors, GGUF, folder")
    parser.add_argument("--out", type=Path, default=Path("outputs/checkpoint"))
    chosen = parser.parse_args()
    main(chosen.file, chosen.out)
