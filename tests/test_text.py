"""Text as data: read, packed into blocks, held back in part, and used to compress a small decoder to the end."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import linearize
from linearize.cli import run
from linearize.data import TextBatches, TextQuality, load_text
from linearize.data.documents import Passage, is_text, pieces_of
from linearize.data.tokens import TextEncoder, packed
from linearize.errors import DataError, LinearizeError, UsageError

WORDS = "the cat sat on a mat and the dog ran after a red ball while we read old books in the sun".split()


def letters(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def sentences(count: int, *, seed: int = 0) -> list[str]:
    """Texts that are not all alike, and not without any order either."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        start = int(torch.randint(len(WORDS), (), generator=generator))
        found.append(" ".join(WORDS[(start + step) % len(WORDS)] for step in range(24)))
    return found


class Reader(nn.Module):
    """A model of no library: ids in, scores of the next token out."""

    def __init__(self, known: int = 128, width: int = 16) -> None:
        super().__init__()
        self.table = nn.Embedding(known, width)
        self.up, self.act, self.down = nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width)
        self.head = nn.Linear(width, known)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids)
        return self.head(h + self.down(self.act(self.up(h))))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    texts = sentences(40)
    (tmp_path / "a.txt").write_text("\n".join(texts), encoding="utf-8")
    rows = [json.dumps({"id": str(i), "text": text}) for i, text in enumerate(texts)]
    (tmp_path / "b.jsonl").write_text("\n\n".join(rows) + "\n", encoding="utf-8")
    return tmp_path


def read(data: Any, column: str | None = None) -> list[str]:
    """Whole documents."""
    found, part = [], ""
    for piece in pieces_of(data, column):
        part += piece.text
        if piece.ends:
            found.append(part)
            part = ""
    return found


class Rows:
    """What a data set of the library `datasets` looks like from outside."""

    column_names = ("text", "label")

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"text": self.texts[index], "label": index}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))


def test_every_source_gives_its_texts(files: Path) -> None:
    texts = sentences(40)
    assert read(files / "a.txt") == ["\n".join(texts)]
    assert (
        read(str(files / "b.jsonl")) == texts == read(texts) == read(Rows(texts)) == read([{"text": t} for t in texts])
    )
    assert read(files) == ["\n".join(texts), *texts]
    (files / "strings.jsonl").write_text('"one"\n"two"\n', encoding="utf-8")
    assert read(files / "strings.jsonl") == ["one", "two"]


def test_a_long_file_comes_in_pieces_of_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linearize.data.documents._PIECE", 10)
    text = "one line, and more\nanother line\nö the last\n"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    pieces = list(pieces_of(tmp_path / "a.txt"))
    assert [piece.ends for piece in pieces] == [False, False, True]
    assert "".join(piece.text for piece in pieces) == text
    assert all(piece.text.endswith("\n") for piece in pieces)


def test_parquet_gives_its_texts_or_says_what_is_missing(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = sentences(5)
    parquet.write_table(arrow.table({"text": texts, "number": list(range(5))}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == texts
    parquet.write_table(arrow.table({"title": texts, "body": texts}), tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet", "body") == texts
    with pytest.raises(DataError, match="title, body"):
        read(tmp_path / "b.parquet")
    with pytest.raises(DataError, match="no column 'text'"):
        read(tmp_path / "b.parquet", "text")
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:50])
    with pytest.raises(DataError, match="no parquet file"):
        read(tmp_path / "a.parquet")


def test_parquet_without_its_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match=r"linearize\[text\]"):
        read(tmp_path / "a.parquet")


def test_names_of_files_and_parts_say_what_is_held_back(tmp_path: Path) -> None:
    texts = sentences(8)
    for name, some in {"train.txt": texts[:6], "Validation.txt": texts[6:]}.items():
        (tmp_path / name).write_text("\n".join(some), encoding="utf-8")
    for data in (tmp_path, {"train": texts[:6], "test": Rows(texts[6:])}):
        source = load_text(data, Reader(), tokenizer=letters, context=32)
        said = "".join(map(chr, source.test.blocks.flatten().tolist()))
        assert "\n".join(texts[6:]).startswith(said) or "".join(texts[6:]).startswith(said)
    assert is_text(tmp_path)
    (tmp_path / "picture.png").write_bytes(b"")
    assert not is_text(tmp_path)  # a folder of images with a text about them


def test_blocks_hold_every_token_once_and_documents_are_held_back_whole() -> None:
    texts = [f"{chr(97 + i % 26)}" * 40 for i in range(40)]
    source = load_text(texts, Reader(), tokenizer=letters, context=20)
    train, test = ("".join(map(chr, blocks.flatten().tolist())) for blocks in (source.train.blocks, source.test.blocks))
    assert test == "".join(texts[9::10])
    assert train == "".join(text for i, text in enumerate(texts) if i % 10 != 9)
    again = load_text(texts, Reader(), tokenizer=letters, context=20)
    assert torch.equal(source.train.blocks, again.train.blocks)


def test_of_one_document_the_last_blocks_are_held_back() -> None:
    text = "".join(sentences(30))
    source = load_text([text], Reader(), tokenizer=letters, context=16)
    count = len(text) // 16
    whole = torch.tensor(letters(text)[: count * 16]).view(count, 16)
    assert torch.equal(torch.cat([source.train.blocks, source.test.blocks]).long(), whole)
    assert len(source.test.blocks) == count // 10


def test_a_limit_stops_the_reading() -> None:
    seen = []

    def pieces() -> Iterator[Passage]:
        for text in sentences(1000):
            seen.append(text)
            yield Passage(text)

    found = packed(pieces(), TextEncoder.of(letters), 16, most=9)
    assert (len(found.calibration), len(found.held)) == (9, 1)
    assert len(seen) < 20


class Framed:
    """A tokenizer that puts a token before each text, as those of many decoders do."""

    eos_token_id = 2

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [1, *letters(text)] if add_special_tokens else letters(text)


def test_each_block_begins_as_the_tokenizer_begins_a_text_and_documents_end() -> None:
    source = load_text(["ab" * 20, "cd" * 20], Reader(), tokenizer=Framed(), context=11, hold_back=False)
    assert source.train.blocks[:, 0].tolist() == [1] * 8
    flat = source.train.blocks[:, 1:].flatten().tolist()
    assert flat == [*letters("ab" * 20), 2, *letters("cd" * 20)][:80]


def test_a_tokenizer_that_cuts_texts_off_is_not_believed_and_stays_as_it_is() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(["?", *set(WORDS)])}, "?")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.enable_truncation(4)
    assert len(TextEncoder.of(made).ids(" ".join(WORDS))) == len(WORDS)
    assert len(made.encode(" ".join(WORDS)).ids) == 4


def test_orders_depend_on_seed_and_epoch_alone() -> None:
    batches = TextBatches(torch.arange(64).view(32, 2), 8, shuffle=True)
    first, second = (torch.cat([b["input_ids"] for b in batches]) for _ in range(2))
    assert not torch.equal(first, second)
    batches.set_epoch(0)
    assert torch.equal(first, torch.cat([b["input_ids"] for b in batches]))
    assert sorted(first.flatten().tolist()) == list(range(64))


def test_perplexity_and_agreement_are_what_they_say() -> None:
    torch.manual_seed(0)
    model, other = Reader(), Reader()
    batches = load_text(sentences(40), model, tokenizer=letters, context=16, batch_size=4).test
    quality = TextQuality(model, batches)
    ids = batches.blocks.long()
    with torch.no_grad():
        logs = other(ids).double().log_softmax(-1)
        told = math.exp(-float(logs[:, :-1].gather(-1, ids[:, 1:, None]).mean()))
        same = float((other(ids).argmax(-1) == model(ids).argmax(-1)).double().mean())
    found = quality(other)
    assert found["perplexity"] == pytest.approx(told, rel=1e-5)
    assert found["next_token_agreement"] == pytest.approx(same, rel=1e-12)
    assert quality(model)["next_token_agreement"] == 1.0
    assert found["next_token_agreement"] < 0.9  # so the other is told from the original


def test_calibrating_and_compressing_read_text(files: Path) -> None:
    torch.manual_seed(0)
    model = Reader()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gated = linearize.convert(model, torch.zeros(2, 8, dtype=torch.long))
    found = linearize.calibrate(gated, files / "b.jsonl", tokenizer=letters, context=16, progress=False)
    rows = sum(len(text) for text in sentences(40)) // 16 * 16
    assert [site.count for site in found.sites.values()] == [rows]
    result = linearize.compress(
        model, files, flops=0.8, tokenizer=letters, context=16, rounds=0, search=0, progress=False, cache=False
    )
    assert result.report.outcome is not None
    assert result.report.outcome.met
    assert set(result.report.quality) == {"perplexity", "next_token_agreement"}
    assert result.report.quality["next_token_agreement"]["before"] == 1.0
    assert "perplexity" in str(result.report)
    assert "next token agreement" in str(result.report)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Llama and a tokenizer that was trained on the corpus beside it."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("llama")
    texts = sentences(200)
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=96, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.save_pretrained(folder / "model")
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).eval().save_pretrained(folder / "model")
    return folder


@pytest.mark.slow
def test_a_folder_and_a_corpus_become_a_smaller_model(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small"
    arguments = ["compress", f"hf:{llama / 'model'}", "--data", str(llama / "corpus.jsonl"), "--context", "32"]
    arguments += ["--flops", "0.8", "--search", "0", "--out", str(out), "--limit", "16"]
    assert run(arguments) == 0, capsys.readouterr().err
    assert "perplexity" in capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert report["budget"]["met"] is True
    assert set(report["quality"]) == {"perplexity", "next_token_agreement"}
    assert report["history"] == []  # a budget and text ask for no training
    small: Any = linearize.load(out / "compressed.safetensors")
    ids = torch.tensor([[3, 4, 5, 6]])
    assert small.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 8)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--context", "65"], "--context: found 65, and the model was made for 64"),
        (["--tokenizer", "no-such-folder-anywhere/x"], "--tokenizer: found none"),
        (["--column", "body"], "no column 'body'"),
        (["--size", "8"], "--size"),
    ],
)
def test_what_does_not_fit_is_said_in_a_line(
    options: list[str], expected: str, llama: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = ["compress", f"hf:{llama / 'model'}", "--data", str(llama / "corpus.jsonl"), "--flops", "0.8"]
    assert run([*arguments, "--dry-run", *options]) == 2
    told = capsys.readouterr().err
    assert expected in told


def write(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (write("a.txt", b""), "is empty"),
        (write("a.txt", b"caf\xe9 au lait"), "not UTF-8"),
        (write("a.txt", b"short"), "too few for one block to calibrate on"),
        (write("a.txt", b"twenty letters, more"), "too few for one block to"),
        (write("a.jsonl", b'{"text": "a"}\n{"text": \n'), "line 2: is no JSON"),
        (write("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n'), "line 2: found no column 'text'"),
        (write("a.jsonl", b'{"text": "a"}\n{"text": null}\n'), "line 2: found NoneType"),
        (write("a.jsonl", b'{"title": "a", "body": "b"}\n'), "title, body"),
        (write("a.jsonl", b'{"number": 1}\n'), "no column of text among number"),
        (write("a.jsonl", b"[" * 100_000), "is no JSON"),
        (write("a.csv", b"text\na\n"), "found the suffix '.csv'"),
        (lambda folder: folder, "holds no text"),
        (lambda folder: folder / "missing.txt", "does not exist"),
        (lambda _: ["", ""], "found no text"),
        (lambda _: ["a text", 3], "row 1: found int"),
    ],
)
def test_bad_text_is_told_with_its_place(make: Callable[[Path], Any], found: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=found):
        linearize.compress(Reader(), make(tmp_path), flops=0.8, tokenizer=letters, context=16, progress=False)


@pytest.mark.parametrize(
    ("options", "kind", "found"),
    [
        ({"tokenizer": lambda text: [200] * len(text)}, DataError, "gives the token 200, and the model knows 0 to 95"),
        ({"tokenizer": lambda text: [-1] * len(text)}, DataError, "gives the token -1"),
        ({"tokenizer": lambda text: "no ids"}, DataError, "gave a str"),
        ({"tokenizer": 3}, DataError, "found a int"),
        ({"tokenizer": letters, "context": 65}, UsageError, "the model was made for 64"),
        ({"tokenizer": letters, "context": 1}, UsageError, "context"),
        ({"tokenizer": letters, "column": 1}, UsageError, "column"),
        ({"tokenizer": letters, "limit": 0}, UsageError, "limit"),
    ],
)
def test_bad_options_of_text(options: dict[str, Any], kind: type[LinearizeError], found: str, llama: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(llama / "model")
    with pytest.raises(kind, match=found):
        load_text([text.upper() for text in sentences(40)], model, **options)


def test_a_tokenizer_is_looked_for_in_the_folder_of_the_model(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = transformers.LlamaForCausalLM.from_pretrained(llama / "model")
    source = load_text(llama / "corpus.jsonl", model)
    assert source.context == 64
    assert int(source.train.blocks.max()) < 96
    assert 2 in source.train.blocks  # documents end
    again = load_text(llama / "corpus.jsonl", model, tokenizer=llama / "tokenizer.json")
    assert 2 not in again.train.blocks  # a bare tokenizer knows no such token
    assert next(iter(again.train))["input_ids"].shape == (8, 64)
    with pytest.raises(DataError, match="names no folder"):
        load_text(llama / "corpus.jsonl", transformers.LlamaForCausalLM(model.config.__class__(**SMALL)))


SMALL: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip


def test_a_model_with_an_encoder_and_a_decoder_wants_batches() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(vocab_size=128, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    with pytest.raises(DataError, match="an encoder and a decoder"):
        load_text(sentences(30), transformers.T5ForConditionalGeneration(config), tokenizer=letters, context=16)


@pytest.mark.parametrize("options", [{"tokenizer": letters}, {"context": 8}, {"column": "text"}])
def test_options_of_text_beside_batches_are_refused(options: dict[str, Any]) -> None:
    batches = [torch.zeros(2, 4, dtype=torch.long)]
    with pytest.raises(UsageError, match="which are no text"):
        linearize.compress(Reader(), batches, flops=0.5, **options)
    with pytest.raises(UsageError, match="which are no text"):
        linearize.calibrate(linearize.convert(Reader(), batches[0]), batches, **options)


def test_training_on_text_has_labels(files: Path) -> None:
    torch.manual_seed(0)
    result = linearize.compress(
        Reader(), files / "b.jsonl", flops=0.8, tokenizer=letters, context=16, rounds=0, search=0, finetune=1,
        progress=False, cache=False,
    )  # fmt: skip
    (record,) = result.report.history
    assert record["perplexity"] > 1
