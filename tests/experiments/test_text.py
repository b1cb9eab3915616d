"""Text: what is read and held out, tokens and their bytes, and a stream that resumes anywhere."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experiments.data import tokens
from experiments.data.corpus import Document, documents, split
from experiments.data.text import StepSampler, TextData, TokenBlocks
from experiments.data.tokens import BytePairs, Bytes

WORDS = ["balance", "spectrum", "tail", "größer", "layer\n", "→", "of", "the\n"]


def words(count: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(count))


def folder(root: Path, files: int, length: int = 200) -> Path:
    for number in range(files):
        place = root / f"part{number % 30}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.txt").write_text(words(length, seed=number))
    return root


def test_a_folder_is_read_once_a_content_without_what_is_no_text(tmp_path: Path) -> None:
    root = folder(tmp_path / "text", 3)
    (root / "copy.txt").write_text((root / "part0" / "0.txt").read_text())
    (root / "image.bin").write_bytes(b"\x89PNG\xff\xfe")
    (root / "zero.txt").write_bytes(b"a\0b")
    (root / ".git").mkdir()
    (root / ".git" / "config").write_text("hidden")
    (root / "tests").mkdir()
    (root / "tests" / "t.txt").write_text("left out")
    found = documents(root, exclude=["tests"])
    # Of equal files the first by name.
    assert [document.name for document in found] == ["copy.txt", "part1/1.txt", "part2/2.txt"]
    assert [d.name for d in documents(root, "2.*")] == ["part2/2.txt"]
    with pytest.raises(FileNotFoundError, match=r"no UTF-8 text in files '\*\.md'"):
        documents(root, "*.md")
    with pytest.raises(ValueError, match=r"image\.bin is no UTF-8 text"):
        documents(root / "image.bin")
    with pytest.raises(FileNotFoundError, match=r"data\.path=.*no such file or folder"):
        documents(root / "nowhere")


def test_the_standard_library_is_there_without_its_tests() -> None:
    found = documents("stdlib", "*.py", ["site-packages", "test", "tests", "encodings"])
    names = {document.name for document in found}
    assert {"json/decoder.py", "argparse.py"} <= names
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "site-packages", "encodings"}


def test_whole_files_are_held_out_of_many_and_neighbours_go_together(tmp_path: Path) -> None:
    found = documents(folder(tmp_path, 90))
    parts = split(found, 0.1, 0.2)
    names = {part: {d.name for d in getattr(parts, part)} for part in ("train", "val", "test")}
    assert set.union(*names.values()) == {d.name for d in found}
    groups = [{name.split("/")[0] for name in part} for part in names.values()]
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]
    total = sum(parts.size(name) for name in names)
    assert parts.size("val") / total == pytest.approx(0.1, abs=0.05)
    assert parts.size("test") / total == pytest.approx(0.2, abs=0.05)
    # What is tested on does not depend on what is validated on.
    assert {d.name for d in split(found, 0.3, 0.2).test} == names["test"]


def test_a_folder_larger_than_a_part_stays_in_training() -> None:
    small = [Document(f"{i}.txt", b"x" * 100) for i in range(40)]
    large = [Document("large/a.txt", b"y" * 2000)]
    for seed in range(3):  # whatever its place in the order of hashes
        parts = split([*small, Document(f"large{seed}/a.txt", large[0].text)], 0.05, 0.05)
        assert any(d.name.startswith("large") for d in parts.train)


@given(st.integers(1, 4), st.floats(0.02, 0.3), st.floats(0.02, 0.3))
def test_the_end_of_each_of_few_files_is_held_out(count: int, val: float, test: float) -> None:
    found = [Document(f"{i}.txt", words(900, seed=i).encode()) for i in range(count)]
    parts = split(found, val, test)
    for document in found:
        pieces = [
            piece.text
            for part in (parts.train, parts.val, parts.test)
            for piece in part
            if piece.name == document.name
        ]
        assert b"".join(pieces) == document.text
        assert all(piece.endswith(b"\n") for piece in pieces[:-1])


def test_a_long_line_is_cut_between_characters() -> None:
    text = ("é" * 20_000).encode()
    parts = split([Document("a", text)], 0.33331, 0.1)
    for part in (parts.train, parts.val, parts.test):
        part[0].text.decode()


def test_shares_that_leave_nothing_are_refused() -> None:
    found = [Document("a.txt", b"one line\n")]
    with pytest.raises(ValueError, match="leave nothing to train on"):
        split(found, 0.5, 0.5)
    with pytest.raises(ValueError, match="give no text for"):
        split(found, 0.1, 0.1)


def test_bytes_are_tokens() -> None:
    coder = Bytes()
    assert coder.encode("aé".encode()).tolist() == [97, 0xC3, 0xA9]
    assert coder.byte_counts().sum() == 256 and coder.byte_counts()[coder.end] == 0


def test_a_learned_encoding_gives_the_text_back_and_counts_its_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tokenizers")
    monkeypatch.setattr(tokens, "_CHUNK", 1000)  # so that documents are encoded in pieces
    texts = [words(2000).encode()]
    coder = BytePairs.learned(texts, 300, tmp_path)
    assert 257 < coder.vocab_size <= 300
    unseen = (words(700, seed=5) + " 中文 \t\r\n" + "é" * 3000).encode()
    ids = coder.encode(unseen)
    assert coder.decode(ids) == unseen.decode()
    assert int(coder.byte_counts()[torch.from_numpy(ids).long()].sum()) == len(unseen)
    assert len(ids) < len(unseen) and coder.byte_counts()[coder.end] == 0
    again = BytePairs.learned(texts, 300, tmp_path)  # read
    assert len(list(tmp_path.glob("bpe-*.json"))) == 1
    assert np.array_equal(again.encode(unseen), ids)
    with pytest.raises(ValueError, match="bpe=100: at least 257"):
        BytePairs.learned(texts, 100, tmp_path)


def test_every_token_but_the_first_is_predicted_once() -> None:
    blocks = TokenBlocks(torch.arange(23, dtype=torch.int32), 5)
    x, y = blocks.__getitems__([0, 1, 2, 3])
    assert torch.equal(y, x + 1) and x.dtype == torch.int64
    assert y.flatten().tolist() == list(range(1, 21))
    with pytest.raises(ValueError, match=r"5 tokens do not fill a block of 5.*data\.context"):
        TokenBlocks(torch.arange(5), 5)


@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 9), st.integers(1, 3))
def test_epochs_cut_an_endless_stream_of_permutations(
    size: int, batch: int, steps: int, ranks: int
) -> None:
    samplers = [StepSampler(size, batch, steps, 3, (ranks, rank)) for rank in range(ranks)]
    stream: list[int] = []
    for epoch in range(4):
        found = []
        for sampler in samplers:
            sampler.set_epoch(epoch)
            found.append(np.array(list(sampler)).reshape(steps, batch))
            assert len(sampler) == steps * batch
        stream += np.stack(found, axis=1).ravel().tolist()  # (steps, ranks, batch)
    for begin in range(0, len(stream) - size + 1, size):
        assert sorted(stream[begin : begin + size]) == list(range(size))
    assert len({tuple(stream[i : i + size]) for i in (0, size)}) == 2 or size < 8


def test_the_data_module_holds_out_thins_and_caches(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    root = folder(tmp_path / "text", 40)
    options = {"context": 16, "batch_size": 4, "steps": 3, "cache_dir": str(tmp_path / "cache")}
    data = TextData(str(root), bpe=280, val_tokens=64, **options)
    data.setup()
    assert data.size_of("val") == 4 < data.size_of("test") < data.size_of("train")
    x, y = next(iter(data.train_dataloader()))
    assert x.shape == y.shape == (4, 16) and int(x.max()) < len(data.byte_counts) <= 280
    assert len(list(data.train_dataloader())) == 3
    assert len(list((tmp_path / "cache").glob("tokens-*.pt"))) == 1
    again = TextData(str(root), bpe=280, val_tokens=64, **options)
    again.setup()
    assert torch.equal(x, next(iter(again.train_dataloader()))[0])
    small = TextData(str(root), share=0.25, **options)
    small.setup()
    whole = TextData(str(root), **options)
    whole.setup()
    assert small.size_of("train") == round(0.25 * whole.size_of("train"))
    assert small.size_of("test") == whole.size_of("test")
    with pytest.raises(ValueError, match="context must be at least 1"):
        TextData(str(root), context=0)
