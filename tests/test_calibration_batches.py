"""Several batches with no text in common, contiguous packing, mixtures, and the manifest of each batch."""

from __future__ import annotations

import hashlib
import json
import re

import numpy as np
import pytest
import torch
from texts import (
    EOS,
    byte_tokenizer,
    document,
    remade,
    shared_file,
    word_tokenizer,
    write_parquet,
    write_rows,
    write_texts,
)

import nirvana
from nirvana import NirvanaError
from nirvana.calibration import draw_batches, load_batch, read_documents, token_ids
from nirvana.calibration.manifest import tokenizer_sha256

C4, GSM8K = "c4/c4_a_sample1000.jsonl", "gsm8k/train.jsonl"


@pytest.fixture(scope="module")
def words():
    return word_tokenizer()


@pytest.fixture
def ten(tmp_path):
    """Ten documents of 20 words."""
    return write_texts(tmp_path / "ten.jsonl", [document(d, 20) for d in range(10)])


@pytest.fixture
def book(tmp_path):
    """One document of 95 words, which has 13 windows of 7."""
    path = tmp_path / "book.txt"
    path.write_text(document(3, 95))
    return path


def rows(batches) -> list[list[int]]:
    return [row for batch in batches for row in batch.tokens.tolist()]


# ---- disjoint batches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_no_document_is_in_two_batches(ten, words, seed):
    batches = draw_batches(ten, words, count=5, num_examples=2, seq_len=4, seed=seed)
    assert [batch.tokens.shape for batch in batches] == [(2, 4)] * 5
    assert sorted(row[0] // 100 for row in rows(batches)) == list(range(10))
    assert sorted(d for batch in batches for d in batch.manifest["sources"][0]["documents"]) == list(range(10))


@pytest.mark.parametrize("seed", range(5))
def test_no_window_of_a_book_is_in_two_batches(book, words, seed):
    batches = draw_batches(book, words, count=6, num_examples=2, seq_len=7, seed=seed)
    starts = [row[0] - 300 for row in rows(batches)]
    assert len(set(starts)) == 12
    assert all(start % 7 == 0 for start in starts)


@pytest.mark.parametrize("packing", ["random", "contiguous"])
@pytest.mark.parametrize("name", ["ten", "book"])
def test_the_first_batches_are_the_same_for_every_count(request, words, packing, name):
    source = request.getfixturevalue(name)
    options = {"num_examples": 2, "seq_len": 7, "seed": 3, "packing": packing}
    every = draw_batches(source, words, count=5, **options)
    assert len({batch.manifest["tokens_sha256"] for batch in every}) == 5
    for count in (1, 2, 4):
        fewer = draw_batches(source, words, count=count, **options)
        assert [batch.manifest for batch in fewer] == [batch.manifest for batch in every[:count]]
        assert rows(fewer) == rows(every[:count])
    assert torch.equal(load_batch(source, words, **options), every[0].tokens)


def test_more_batches_than_there_are(ten, book, words):
    held = r"ten\.jsonl holds only 10 documents of at least 4 tokens, which is 3 disjoint batches of 3 examples of 4"
    with pytest.raises(NirvanaError, match=f"{held} tokens, 4 were asked for; ask for fewer, lower --num-examples"):
        draw_batches(ten, words, count=4, num_examples=3, seq_len=4)
    held = r"book\.txt holds only 95 tokens, which is 6 disjoint batches of 2 examples of 7 tokens, 7 were asked for"
    with pytest.raises(NirvanaError, match=held):
        draw_batches(book, words, count=7, num_examples=2, seq_len=7)
    with pytest.raises(NirvanaError, match=r"holds only 210 tokens, which is 2 disjoint batches"):
        draw_batches(ten, words, count=3, num_examples=5, seq_len=20, packing="contiguous")


def test_one_short_document(tmp_path, words):
    path = write_texts(tmp_path / "short.jsonl", ["d1w0 d1w1"])
    for packing, tokens in (("random", 2), ("contiguous", 3)):
        with pytest.raises(NirvanaError, match=f"holds only {tokens} tokens, 2 examples of 8 were asked for; lower"):
            load_batch(path, words, num_examples=2, seq_len=8, packing=packing)
    with pytest.raises(NirvanaError, match="holds only 0 documents of at least 8 tokens, 1 examples of 8"):
        load_batch(path, words, num_examples=1, seq_len=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "0 calibration batches were asked for; at least 1"),
        ({"count": -1}, "-1 calibration batches"),
        ({"num_examples": 0}, "0 examples of 4 tokens: at least 1 example of 2 tokens"),
        ({"seq_len": 1}, "2 examples of 1 tokens: at least 1 example of 2 tokens"),
        ({"packing": "dense"}, "--packing 'dense' must be one of random, contiguous"),
    ],
)
def test_requests_out_of_range(ten, words, options, message):
    with pytest.raises(NirvanaError, match=message):
        draw_batches(ten, words, **{"num_examples": 2, "seq_len": 4, **options})


# ---- contiguous -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_contiguous_batches_are_runs_of_the_joined_text(ten, words, seed):
    """Ten times 20 words and the end: 210 tokens, 26 windows of 8, five runs of five."""
    ids = [token for d in range(10) for token in [*range(100 * d, 100 * d + 20), EOS]]
    batches = draw_batches(ten, words, count=5, num_examples=5, seq_len=8, seed=seed, packing="contiguous")
    runs = [ids[start : start + 40] for start in range(0, 200, 40)]
    assert sorted(batch.tokens.flatten().tolist() for batch in batches) == sorted(runs)


def test_the_seed_chooses_the_run(ten, words):
    options = {"num_examples": 5, "seq_len": 8, "packing": "contiguous"}
    firsts = [load_batch(ten, words, seed=seed, **options)[0, 0].item() for seed in range(40)]
    assert len(set(firsts)) == 5
    assert firsts == [load_batch(ten, words, seed=seed, **options)[0, 0].item() for seed in range(40)]


def test_large_files_are_joined_a_chunk_at_a_time(ten, words, monkeypatch):
    """Chunks of three documents have 63 tokens, three runs of two windows of ten; the last document alone has one."""
    monkeypatch.setattr("nirvana.calibration.packing.CHUNK", 3)
    batches = draw_batches(ten, words, count=10, num_examples=2, seq_len=10, packing="contiguous")
    places = {
        (d, o)
        for batch in batches
        for d, o in zip(*(batch.manifest["sources"][0][key] for key in ("documents", "offsets")), strict=True)
    }
    assert len(places) == 20
    assert all(remade(batch.manifest, words) == batch.tokens.tolist() for batch in batches)


def test_contiguous_needs_an_end_of_sequence_token(ten):
    tokenizer = word_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(NirvanaError, match="end-of-sequence token, and the tokenizer has none; use --packing random"):
        draw_batches(ten, tokenizer, num_examples=2, seq_len=4, packing="contiguous")


# ---- mixtures -------------------------------------------------------------------------------------------------------


def test_a_mixture_takes_examples_in_turn(tmp_path, ten, words):
    other = write_rows(tmp_path / "other.jsonl", [{"question": document(d, 9), "answer": ""} for d in range(4)])
    batches = draw_batches(f"{ten}+{other}", words, count=2, num_examples=3, seq_len=9, seed=1)
    alone = draw_batches(ten, words, count=2, num_examples=2, seq_len=9, seed=1)
    for batch, part in zip(batches, alone, strict=True):
        assert batch.tokens.shape == (3, 9)
        assert batch.tokens[[0, 2]].tolist() == part.tokens.tolist()
        assert batch.tokens[1].tolist() in [list(range(100 * d, 100 * d + 9)) for d in range(4)]
        assert [entry["name"] for entry in batch.manifest["sources"]] == [str(ten), str(other)]
        assert remade(batch.manifest, words) == batch.tokens.tolist()
    assert batches[0].tokens[1].tolist() != batches[1].tokens[1].tolist()


def test_mixtures_that_are_refused(tmp_path, ten, words):
    np.save(tmp_path / "t.npy", np.zeros((2, 4), np.int64))
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(ten.read_bytes())
    for source, message in (
        (f"{ten}+{ten}", "hold the same text; name it once"),
        (f"{ten}+{copy}", r"ten\.jsonl and .*copy\.jsonl hold the same text"),
        (f"{ten}+{tmp_path / 't.npy'}", r"\.npy is a whole batch and cannot be mixed"),
        (f"{ten}+", "no corpus is named"),
        (f"{ten}+nothing", "no corpus or file 'nothing'"),
        (f"{ten}+{copy}+novels", "2 examples cannot come from 3 sources; raise --num-examples"),
    ):
        with pytest.raises(NirvanaError, match=message):
            draw_batches(source, words, num_examples=2, seq_len=4)


# ---- manifests ------------------------------------------------------------------------------------------------------


def test_a_manifest_says_everything(ten, words):
    [batch] = draw_batches(ten, words, num_examples=3, seq_len=4, seed=5)
    manifest = batch.manifest
    assert json.loads(json.dumps(manifest)) == manifest
    assert manifest["source"] == str(ten)
    assert {key: manifest[key] for key in ("packing", "seed", "num_examples", "seq_len", "batch")} == {
        "packing": "random",
        "seed": 5,
        "num_examples": 3,
        "seq_len": 4,
        "batch": 0,
    }
    assert manifest["tokens_sha256"] == hashlib.sha256(batch.tokens.numpy().astype("<i8").tobytes()).hexdigest()
    assert manifest["tokenizer_sha256"] == tokenizer_sha256(words)
    assert list(manifest["packages"]) == ["transformers", "tokenizers"]
    [source] = manifest["sources"]
    assert source["files"] == {"ten.jsonl": hashlib.sha256(ten.read_bytes()).hexdigest()}
    assert source["joined"] is False
    assert remade(manifest, words) == batch.tokens.tolist()


@pytest.mark.parametrize("packing", ["random", "contiguous"])
@pytest.mark.parametrize("name", ["ten", "book"])
@pytest.mark.parametrize("seed", range(3))
def test_a_batch_can_be_made_again_from_its_manifest(request, words, packing, name, seed):
    source = request.getfixturevalue(name)
    for batch in draw_batches(source, words, count=3, num_examples=3, seq_len=6, seed=seed, packing=packing):
        assert remade(batch.manifest, words) == batch.tokens.tolist()


def test_a_batch_of_a_folder_can_be_made_again(tmp_path, words):
    folder = tmp_path / "folder"
    folder.mkdir()
    write_parquet(folder / "b.parquet", text=["", document(4, 12), None, document(5, 12)])
    (folder / "a.txt").write_text(document(6, 12))
    for num_examples in (3, 6):  # by documents, and joined
        [batch] = draw_batches(folder, words, num_examples=num_examples, seq_len=5, seed=2)
        assert remade(batch.manifest, words) == batch.tokens.tolist()
        assert list(batch.manifest["sources"][0]["files"]) == ["a.txt", "b.parquet"]
        assert list(batch.manifest["packages"]) == ["transformers", "tokenizers", "pyarrow"]


def test_the_tokenizer_hash_is_of_what_it_does(words, tokenizer):
    before = tokenizer_sha256(words)
    words("d1w1 d1w2", truncation=True, max_length=1)
    assert tokenizer_sha256(words) == before == tokenizer_sha256(word_tokenizer())
    other = word_tokenizer()
    other.add_tokens(["d1w1 d1w2"])
    assert len({before, tokenizer_sha256(other), tokenizer_sha256(tokenizer)}) == 3


def test_a_token_file_has_a_manifest_too(tmp_path):
    path = tmp_path / "t.npy"
    np.save(path, np.arange(6, dtype=np.int32).reshape(2, 3))
    [batch] = draw_batches(path, None)
    assert batch.tokens.tolist() == [[0, 1, 2], [3, 4, 5]]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert batch.manifest["sources"] == [{"name": str(path), "files": {"t.npy": digest}}]
    assert batch.manifest["tokens_sha256"] == hashlib.sha256(np.arange(6, dtype="<i8").tobytes()).hexdigest()
    with pytest.raises(NirvanaError, match=re.escape(f"{path} is one batch of token ids, 2 were asked for; give text")):
        draw_batches(path, None, count=2)


# ---- the same on every platform -------------------------------------------------------------------------------------


def test_the_draw_is_pinned(ten, book, words):
    """Documents and offsets that this seed has always given: another platform or release must not change them."""

    def places(source, **options):
        drawn = draw_batches(source, words, count=2, num_examples=3, seq_len=6, seed=11, **options)
        return [(batch.manifest["sources"][0]["documents"], batch.manifest["sources"][0]["offsets"]) for batch in drawn]

    assert places(ten) == PINNED["ten"]
    assert places(book) == PINNED["book"]
    assert places(ten, packing="contiguous") == PINNED["contiguous"]


PINNED = {
    "ten": [([7, 8, 9], [1, 7, 4]), ([3, 4, 5], [2, 1, 8])],
    "book": [([0, 0, 0], [42, 78, 48]), ([0, 0, 0], [54, 84, 60])],
    "contiguous": [([6, 7, 7], [18, 3, 9]), ([6, 6, 6], [0, 6, 12])],
}


@pytest.mark.parametrize("name", ["novels", C4, GSM8K, f"{C4}+{GSM8K}"])
@pytest.mark.parametrize("packing", ["random", "contiguous"])
def test_real_batches_are_pinned(name, packing):
    """Hashes of the token ids of real text, one token a byte."""
    source = "+".join(part if part == "novels" else str(shared_file(part)) for part in name.split("+"))
    batches = draw_batches(source, byte_tokenizer(), count=2, num_examples=16, seq_len=64, packing=packing)
    assert [batch.manifest["tokens_sha256"][:16] for batch in batches] == REAL[name, packing]


REAL = {
    ("novels", "random"): ["7aed29733546e796", "ad719c804114b38c"],
    ("novels", "contiguous"): ["4376004442c1b55b", "680113c07732cf65"],
    (C4, "random"): ["118f244543493a71", "7cfe34a943d1de52"],
    (C4, "contiguous"): ["2461c3dbb7d7a77a", "30df206f003f421b"],
    (GSM8K, "random"): ["82290bc2e5c62da1", "f4d206d28373358d"],
    (GSM8K, "contiguous"): ["47fc3c419f771f1a", "182052d19758e7ca"],
    (f"{C4}+{GSM8K}", "random"): ["c8aa0f4ceff2b91f", "4a1fce0d6a779bdc"],
    (f"{C4}+{GSM8K}", "contiguous"): ["96f99c5ed6a4f930", "2962a1ee87897f86"],
}


def test_real_batches_have_no_document_in_common(tokenizer):
    source = shared_file(C4)
    batches = draw_batches(source, tokenizer, count=8, num_examples=32, seq_len=128, seed=1)
    used = [d for batch in batches for d in batch.manifest["sources"][0]["documents"]]
    assert len(set(used)) == len(used) == 256
    documents = read_documents(source)
    for batch in batches[::4]:
        entry = batch.manifest["sources"][0]
        for row, number, offset in zip(batch.tokens.tolist(), entry["documents"], entry["offsets"], strict=True):
            assert token_ids(tokenizer, documents[number])[offset : offset + 128] == row
    with pytest.raises(
        NirvanaError, match=r"which is \d+ disjoint batches of 32 examples of 128 tokens, 99 were asked"
    ):
        draw_batches(source, tokenizer, count=99)


# ---- the command line -----------------------------------------------------------------------------------------------


def test_score_writes_the_manifest(cli_here, tmp_path, llama_folder, tokenizer):
    source, out = tmp_path / "texts.jsonl", tmp_path / "saliency.safetensors"
    write_texts(source, ["The sea was calm. " * 9] * 4)
    options = ("--calibration", source, "--num-examples", 2, "--seq-len", 16, "--packing", "contiguous", "--seed", 4)
    assert cli_here("score", llama_folder, *options, "--out", out).code == 0
    settings = nirvana.Saliency.load(out).settings
    [batch] = draw_batches(str(source), tokenizer, num_examples=2, seq_len=16, packing="contiguous", seed=4)
    assert settings["calibration_manifest"] == batch.manifest
    assert settings["calibration_sha256"] == batch.manifest["tokens_sha256"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--packing", "dense"), "--packing 'dense' must be one of random, contiguous"),
        (("--calibration", "hub:c4"), "'hub:c4' is not hub:OWNER/NAME"),
        (("--calibration", "novels+novels"), "hold the same text; name it once"),
        (("--calibration", "wikipedia"), "no corpus or file 'wikipedia'; built in is novels"),
    ],
)
def test_score_refuses_on_one_line(cli_here, tmp_path, llama_folder, options, says):
    outcome = cli_here("score", llama_folder, *options, "--out", tmp_path / "s.safetensors")
    assert (outcome.code, outcome.stdout, outcome.stderr.count("\n")) == (2, "", 1)
    assert says in outcome.stderr
    assert not (tmp_path / "s.safetensors").exists()
