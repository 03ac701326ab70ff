"""Text on disk -> calibration batch: which windows of which documents, and what is refused."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from texts import SHARED, document, word_tokenizer, write_parquet, write_texts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from nirvana import NirvanaError
from nirvana.calibration import load_batch, read_documents, token_ids
from nirvana.calibration.corpora import BUILT_IN, EVALUATION

C4 = SHARED / "c4" / "c4_a_sample1000.jsonl"


@pytest.fixture(scope="module")
def words():
    return word_tokenizer()


@pytest.fixture(scope="module")
def subwords():
    """A byte-level BPE tokenizer, trained here on one built-in novel, that marks the ends of a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = sorted(BUILT_IN["novels"].glob("*.txt"))[0].read_text(encoding="utf-8")
    tokenizer.train_from_iterator(text[:200_000].splitlines(keepends=True), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def six(tmp_path):
    """Documents of 9, 4, 6, 3, 12 and 5 words."""
    lengths = (9, 4, 6, 3, 12, 5)
    return write_texts(tmp_path / "six.jsonl", [document(d, n) for d, n in enumerate(lengths)])


# ---- many documents -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "starts"),
    [
        (0, [501, 3, 100]),
        (1, [100, 407, 5]),
        (7, [202, 100, 501]),
    ],
)
def test_these_windows_of_these_documents_are_drawn(six, words, seed, starts):
    """Pinned, because a plan names its calibration by source and seed: the draw must never change."""
    batch = load_batch(six, words, num_examples=3, seq_len=4, seed=seed)
    assert batch.dtype == torch.int64
    assert batch.tolist() == [[start + place for place in range(4)] for start in starts]


def test_the_same_seed_gives_the_same_batch_and_another_one_does_not(six, words):
    batches = [load_batch(six, words, num_examples=4, seq_len=3, seed=seed) for seed in (5, 5, 6)]
    assert torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])
    torch.manual_seed(1)
    np.random.seed(1)
    assert torch.equal(load_batch(six, words, num_examples=4, seq_len=3, seed=5), batches[0])


def test_the_defaults_are_32_examples_of_128_tokens_with_seed_0(subwords):
    batch = load_batch("novels", subwords)
    assert batch.shape == (32, 128)
    assert torch.equal(batch, load_batch("novels", subwords, num_examples=32, seq_len=128, seed=0))


@pytest.mark.parametrize("seed", range(20))
def test_no_document_is_drawn_twice_and_short_ones_never(six, words, seed):
    batch = load_batch(six, words, num_examples=4, seq_len=5, seed=seed)
    assert sorted(row[0] // 100 for row in batch.tolist()) == [0, 2, 4, 5]
    lengths = {0: 9, 2: 6, 4: 12, 5: 5}
    for row in batch.tolist():
        assert row == list(range(row[0], row[0] + 5))
        assert row[-1] % 100 < lengths[row[0] // 100]


def test_every_window_of_a_document_can_be_drawn(tmp_path, words):
    """First and last included: 12 words have nine windows of four."""
    path = write_texts(tmp_path / "one.jsonl", [document(4, 12)])
    firsts = {load_batch(path, words, num_examples=1, seq_len=4, seed=seed)[0, 0].item() - 400 for seed in range(200)}
    assert firsts == set(range(9))


def test_a_document_of_exactly_one_example_is_long_enough(tmp_path, words):
    path = write_texts(tmp_path / "exact.jsonl", [document(1, 4), document(2, 3)])
    assert load_batch(path, words, num_examples=1, seq_len=4, seed=0).tolist() == [[100, 101, 102, 103]]
    with pytest.raises(NirvanaError, match="holds only 0 documents of at least 5 tokens, 2 examples of 5"):
        load_batch(path, words, num_examples=2, seq_len=5)


def test_too_few_long_documents_are_counted(six, words):
    with pytest.raises(NirvanaError, match=r"holds only 2 documents of at least 7 tokens, 3 examples of 7 were asked"):
        load_batch(six, words, num_examples=3, seq_len=7)


# ---- one running text -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_windows_of_one_text_do_not_overlap(tmp_path, words, seed):
    """95 words hold 13 windows of 7: all of them, each once, and nothing of the remainder."""
    path = tmp_path / "book.txt"
    path.write_text(document(3, 95))
    batch = load_batch(path, words, num_examples=13, seq_len=7, seed=seed)
    assert sorted(batch.flatten().tolist()) == list(range(300, 391))
    for row in batch.tolist():
        assert row == list(range(row[0], row[0] + 7))
    with pytest.raises(NirvanaError, match="holds only 95 tokens, 14 examples of 7"):
        load_batch(path, words, num_examples=14, seq_len=7)


def test_these_windows_of_one_text_are_drawn(tmp_path, words):
    path = tmp_path / "book.txt"
    path.write_text(document(3, 95))
    starts = load_batch(path, words, num_examples=5, seq_len=7, seed=0)[:, 0] - 300
    assert starts.tolist() == [42, 84, 0, 28, 56]


def test_few_documents_are_joined(tmp_path, words):
    """Fewer documents than examples: one text, in the order of the file."""
    path = write_texts(tmp_path / "two.jsonl", [document(1, 5), document(2, 7)])
    batch = load_batch(path, words, num_examples=3, seq_len=4, seed=0)
    assert sorted(batch.tolist()) == [[100, 101, 102, 103], [104, 200, 201, 202], [203, 204, 205, 206]]


def test_a_folder_of_texts_is_read_in_order_of_name(tmp_path, words):
    for name, d in (("b.txt", 2), ("a.txt", 1), ("c.md", 3)):
        (tmp_path / name).write_text(document(d, 4))
    assert read_documents(tmp_path) == [document(1, 4), document(2, 4)]
    batch = load_batch(tmp_path, words, num_examples=4, seq_len=2, seed=0)
    assert sorted(batch.tolist()) == [[100, 101], [102, 103], [200, 201], [202, 203]]


# ---- real text ------------------------------------------------------------------------------------------------------


def joined(ids: list[int]) -> str:
    """Ids as text, so that `in` finds a window in a document."""
    return "," + ",".join(map(str, ids)) + ","


def test_built_in_novels_give_windows_of_their_text(subwords):
    batch = load_batch("novels", subwords, num_examples=40, seq_len=96, seed=3)
    ids = [
        token for text in read_documents("novels") for token in subwords(text, add_special_tokens=False)["input_ids"]
    ]
    assert batch.shape == (40, 96)
    text = joined(ids)
    assert all(joined(row) in text for row in batch.tolist())
    # The tokenizer marks the ends of a text; windows lie inside of one.
    assert batch.min() > 1
    assert len({tuple(row) for row in batch.tolist()}) == 40


def test_calibration_and_evaluation_books_differ():
    calibration, evaluation = read_documents("novels"), read_documents(EVALUATION)
    assert len(calibration) >= 2
    assert len(evaluation) >= 2
    lines = {line for book in calibration for line in book.splitlines() if len(line) > 40}
    assert not any(line in lines for book in evaluation for line in book.splitlines())
    assert len(lines) > 2000


@pytest.mark.skipif(not C4.is_file(), reason="the C4 sample is not beside the repository (../shared/data)")
def test_c4_documents_give_one_window_each(subwords):
    batch = load_batch(C4, subwords, num_examples=24, seq_len=128, seed=0)
    assert batch.shape == (24, 128)
    assert torch.equal(batch, load_batch(C4, subwords, num_examples=24, seq_len=128, seed=0))
    texts = [json.loads(line)["text"] for line in C4.read_text(encoding="utf-8").split("\n") if line]
    assert len(texts) == 1000
    documents = [joined(ids) for ids in subwords(texts, add_special_tokens=False)["input_ids"]]
    sources = [[index for index, ids in enumerate(documents) if joined(row) in ids] for row in batch.tolist()]
    assert all(len(found) == 1 for found in sources)
    assert len({found[0] for found in sources}) == 24


def test_running_text_gets_no_special_tokens(subwords):
    text = "It was the best of times. " * 2000
    ids = token_ids(subwords, text)
    assert subwords.decode(ids) == text
    assert 0 not in ids
    assert 1 not in ids
    assert subwords("x")["input_ids"][0] == 0, "the tokenizer must mark ends when it is asked to"


# ---- files ----------------------------------------------------------------------------------------------------------


def test_parquet_gives_the_batch_of_the_same_jsonl(tmp_path, six, words):
    texts = read_documents(six)
    path = write_parquet(tmp_path / "six.parquet", url=["x"] * 6, text=texts)
    assert read_documents(path) == texts
    options = {"num_examples": 3, "seq_len": 4, "seed": 1}
    assert torch.equal(load_batch(path, words, **options), load_batch(six, words, **options))


def test_jsonl_lines_end_at_newlines_alone(tmp_path):
    """Not at the line separators that Unicode has and JSON leaves as they are; empty lines and texts are left out."""
    path = tmp_path / "x.jsonl"
    texts = ["a\u2028b", "c\x85d", "", "  \n ", "é"]
    path.write_text("\n\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts), encoding="utf-8")
    assert read_documents(path) == ["a\u2028b", "c\x85d", "é"]
    path.write_bytes(b'{"text": "a"}\r\n{"text": "b"}\r\n')
    assert read_documents(path) == ["a", "b"]


def test_parquet_rows_without_text_are_left_out(tmp_path):
    path = write_parquet(tmp_path / "x.parquet", text=["a", None, "", "b"])
    assert read_documents(path) == ["a", "b"]


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint16, np.dtype(">i4")])
def test_npy_is_used_as_it_is(tmp_path, dtype):
    array = np.arange(15).reshape(3, 5).astype(dtype)
    np.save(tmp_path / "t.npy", array)
    batch = load_batch(str(tmp_path / "t.npy"), None, num_examples=99, seq_len=99, seed=99)
    assert batch.dtype == torch.int64
    assert batch.tolist() == array.tolist()


def test_npy_in_fortran_order_is_read_by_rows(tmp_path):
    array = np.asfortranarray(np.arange(6, dtype=np.int64).reshape(2, 3))
    np.save(tmp_path / "t.npy", array)
    assert load_batch(tmp_path / "t.npy", None).tolist() == [[0, 1, 2], [3, 4, 5]]


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 3), np.float32), r"holds float32 of shape \[2, 3\]; give integers \[examples, tokens\]"),
        (np.zeros((2, 3), bool), r"holds bool of shape \[2, 3\]"),
        (np.zeros((2, 3), complex), "holds complex128"),
        (np.zeros(6, np.int64), r"holds int64 of shape \[6\]"),
        (np.zeros((1, 2, 3), np.int64), r"holds int64 of shape \[1, 2, 3\]"),
        (np.array(3), r"holds int64 of shape \[\]"),
        (np.array([["a"]]), "holds <U1"),
        (np.zeros((2, 3), "datetime64[s]"), "holds datetime64"),
        (np.zeros(2, [("a", int)]), "holds "),
    ],
)
def test_npy_of_another_kind_is_refused(tmp_path, array, message):
    np.save(tmp_path / "t.npy", array)
    with pytest.raises(NirvanaError, match=message):
        load_batch(tmp_path / "t.npy", None)


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_a_pickled_npy_is_refused_and_never_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("object.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    Path("raw.npy").write_bytes(pickle.dumps(Bomb()))
    for name in ("object.npy", "raw.npy"):
        with pytest.raises(NirvanaError, match=f"{name} is not a plain .npy array") as caught:
            load_batch(name, None)
        assert "\n" not in str(caught.value)
    assert not Path("exploded").exists()
    pickle.loads(Path("raw.npy").read_bytes())
    assert Path("exploded").exists(), "the bomb must be live, or this test proves nothing"


def test_a_damaged_npy_is_refused(tmp_path):
    np.save(tmp_path / "t.npy", np.zeros((4, 4), np.int64))
    content = (tmp_path / "t.npy").read_bytes()
    for damaged in (b"", content[:5], content[:60], content[:-1], b"text"):
        (tmp_path / "t.npy").write_bytes(damaged)
        with pytest.raises(NirvanaError, match=r"t\.npy is not a plain \.npy array"):
            load_batch(tmp_path / "t.npy", None)
    np.savez(tmp_path / "a.npz", x=np.zeros((4, 4), np.int64))
    (tmp_path / "a.npz").rename(tmp_path / "t.npy")
    with pytest.raises(NirvanaError, match="holds an archive"):
        load_batch(tmp_path / "t.npy", None)
    with pytest.raises(NirvanaError, match="no calibration file at"):
        load_batch(tmp_path / "none.npy", None)
    (tmp_path / "folder.npy").mkdir()
    with pytest.raises(NirvanaError, match=r"folder\.npy is not a plain"):
        load_batch(tmp_path / "folder.npy", None)


def write(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\t\n", "holds no text"),
        ("a.txt", b"\xff\xfe\x00", "as UTF-8 text"),
        ("a.jsonl", b"", "holds no text"),
        ("a.jsonl", b'{"text": ""}\n', "holds no text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "a.jsonl, line 2 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n\n{"content": "b", "id": 1}\n', 'line 3 has no string field "text" .*content, id'),
        ("a.jsonl", b'{"text": 5}\n', 'line 1 has no string field "text"'),
        ("a.jsonl", b'{"text": null}\n', 'line 1 has no string field "text"'),
        ("a.jsonl", b'["a"]\n', 'line 1 has no string field "text" .*list'),
        ("a.jsonl", b"\xff\n", "as UTF-8 text"),
        ("a.parquet", b"PAR1 not at all PAR1", "as Parquet"),
        ("a.parquet", b"", "as Parquet"),
        ("a.csv", b"text\na\n", r"files of type '\.csv' are not read; use \.txt, \.jsonl, \.parquet or \.npy"),
        ("a", b"text", "files of type '' are not read"),
    ],
)
def test_files_without_text_are_refused(tmp_path, name, content, message):
    with pytest.raises(NirvanaError, match=f"(?s){message}") as caught:
        read_documents(write(tmp_path, name, content))
    assert "\n" not in str(caught.value)


def test_parquet_without_a_text_column_is_refused(tmp_path):
    with pytest.raises(NirvanaError, match='no column "text"'):
        read_documents(write_parquet(tmp_path / "a.parquet", content=["a"]))
    with pytest.raises(NirvanaError, match="holds no text"):
        read_documents(write_parquet(tmp_path / "b.parquet", text=[1, 2]))


def test_unknown_sources_are_refused(tmp_path):
    with pytest.raises(NirvanaError, match="no corpus or file 'wikipedia'; built in is novels"):
        read_documents("wikipedia")
    with pytest.raises(NirvanaError, match="no corpus or file"):
        read_documents(tmp_path / "none.txt")
    with pytest.raises(NirvanaError, match="holds no text"):
        read_documents(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_examples": 0}, "0 examples of 4 tokens: at least 1 example of 2 tokens is needed"),
        ({"num_examples": -1}, "at least 1 example"),
        ({"seq_len": 1}, "of 1 tokens: at least 1 example of 2 tokens"),
        ({"seq_len": 0}, "at least 1 example"),
    ],
)
def test_sizes_out_of_range_are_refused(six, words, options, message):
    with pytest.raises(NirvanaError, match=message):
        load_batch(six, words, **{"num_examples": 2, "seq_len": 4, **options})


def test_text_without_a_tokenizer_is_refused(six):
    with pytest.raises(NirvanaError, match=re.escape(f"so {six} cannot be tokenised")):
        load_batch(six, None)
