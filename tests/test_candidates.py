"""Candidate batches and the probe: sources in turn, mixtures, disjoint by construction, clear refusals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from nirvana import NirvanaError
from nirvana.calibration import load_batch
from nirvana.selection import draw_candidates

SIZES = {"num_examples": 4, "seq_len": 8}


@pytest.fixture(scope="module")
def corpora(tmp_path_factory, tokenizer):
    """Three texts whose words tell where they come from."""
    folder = tmp_path_factory.mktemp("corpora")
    files = []
    for name in ("sea", "hill", "moon"):
        file = folder / f"{name}.txt"
        file.write_text(" ".join(f"{name} {number}" for number in range(700)))
        files.append(str(file))
    return files


def rows(batch):
    return [tuple(row) for row in batch.tokens.tolist()]


def assert_disjoint(drawn):
    every = [row for batch in (*drawn.batches, drawn.probe) for row in rows(batch)]
    assert len(every) == len(set(every))


def test_one_corpus(tokenizer, corpora):
    drawn = draw_candidates(corpora[0], tokenizer, count=5, seed=3, **SIZES)
    assert [batch.tokens.shape for batch in drawn.batches] == [(4, 8)] * 5
    assert drawn.probe.tokens.shape == (4, 8)
    assert {batch.manifest["source"] for batch in (*drawn.batches, drawn.probe)} == {corpora[0]}
    assert_disjoint(drawn)
    # The first candidate is what a run without selection calibrates on.
    assert drawn.batches[0].tokens.equal(load_batch(corpora[0], tokenizer, seed=3, **SIZES))
    again = draw_candidates(corpora[0], tokenizer, count=5, seed=3, **SIZES)
    assert all(a.tokens.equal(b.tokens) for a, b in zip(drawn.batches, again.batches, strict=True))
    other = draw_candidates(corpora[0], tokenizer, count=5, seed=4, **SIZES)
    assert not drawn.probe.tokens.equal(other.probe.tokens)


@pytest.mark.parametrize("form", [",".join, list], ids=["text", "list"])
def test_corpora_in_turn_and_every_fourth_is_the_mixture(tokenizer, corpora, form):
    drawn = draw_candidates(form(corpora), tokenizer, count=9, **SIZES)
    mixture = "+".join(corpora)
    turn = [*corpora, mixture]
    assert [batch.manifest["source"] for batch in drawn.batches] == [*turn, *turn, corpora[0]]
    assert drawn.probe.manifest["source"] == mixture
    assert_disjoint(drawn)

    def origin(row):
        text = tokenizer.decode(row)
        return "".join(name[0] for name in ("sea", "hill", "moon") if name[1:] in text)

    # Four examples of three corpora, in turn: the first gives two.
    for batch in (drawn.batches[3], drawn.batches[7], drawn.probe):
        assert [origin(row) for row in rows(batch)] == ["s", "h", "m", "s"]
    for batch, expected in zip(drawn.batches[:3], "shm", strict=True):
        assert {origin(row) for row in rows(batch)} == {expected}


def test_mixtures_and_single_corpora_of_one_text_are_disjoint(tokenizer, corpora):
    sea, hill, _ = corpora
    drawn = draw_candidates([f"{sea}+{hill}", sea], tokenizer, count=6, **SIZES)
    turn = [f"{sea}+{hill}", sea, f"{sea}+{hill}"]
    assert [batch.manifest["source"] for batch in drawn.batches] == turn * 2
    assert_disjoint(drawn)


def test_probe_of_its_own(tokenizer, corpora):
    drawn = draw_candidates(corpora[:2], tokenizer, count=2, probe=corpora[2], probe_examples=7, **SIZES)
    assert drawn.probe.tokens.shape == (7, 8)
    assert drawn.probe.manifest["source"] == corpora[2]
    same = draw_candidates(corpora[0], tokenizer, count=2, probe=corpora[0], **SIZES)
    assert_disjoint(same)


def test_manifests_lead_back_to_the_draw(tokenizer, corpora):
    drawn = draw_candidates(corpora[:2], tokenizer, count=1, **SIZES)
    parts = drawn.probe.manifest["parts"]
    assert [part["source"] for part in parts] == corpora[:2]
    assert [part["parts"][0]["rows"] for part in parts] == [[0, 1], [0, 1]]


def test_token_files(tmp_path, tokenizer):
    values = np.random.default_rng(0).integers(0, 400, (11, 8))
    np.save(tmp_path / "a.npy", values)
    np.save(tmp_path / "b.npy", values[:, ::-1])
    # Asked for once: as it is. Else dealt out in order.
    once = draw_candidates(tmp_path / "a.npy", None, count=1, probe=tmp_path / "b.npy", **SIZES)
    assert once.batches[0].tokens.tolist() == values.tolist()
    assert once.probe.tokens.tolist() == values[:, ::-1].tolist()
    dealt = draw_candidates(tmp_path / "a.npy", None, count=2, probe_examples=3, **SIZES)
    assert list(itertools.chain(*map(rows, [*dealt.batches, dealt.probe]))) == [tuple(row) for row in values]
    with pytest.raises(NirvanaError, match=r"a\.npy has 3 examples left where 4 more are needed; lower --candidates"):
        draw_candidates(tmp_path / "a.npy", None, count=2, **SIZES)
    np.save(tmp_path / "double.npy", values[::-1])
    with pytest.raises(NirvanaError, match=r"shares an example with candidate 0 .*a\.npy"):
        draw_candidates(tmp_path / "a.npy", None, count=1, probe=tmp_path / "double.npy", **SIZES)
    np.save(tmp_path / "long.npy", np.tile(values, 2))
    with pytest.raises(NirvanaError, match="different lengths cannot be mixed"):
        draw_candidates([tmp_path / "a.npy", tmp_path / "long.npy"], None, count=1, **SIZES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "--candidates 0 must be at least 1"),
        ({"count": -3}, "--candidates -3 must be at least 1"),
        ({"probe_examples": 0}, "the probe is empty"),
        ({"num_examples": 0}, "0 examples of 8 tokens"),
        ({"count": 100_000}, "100000 candidates and the probe take 400004 disjoint examples of it: lower --candidates"),
        ({"probe": "no-such-corpus"}, "no corpus or file 'no-such-corpus'"),
    ],
)
def test_refusals(tokenizer, corpora, options, message):
    with pytest.raises(NirvanaError, match=message):
        draw_candidates(corpora[0], tokenizer, **{**SIZES, **options})


def test_an_empty_probe_file(tokenizer, corpora, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(NirvanaError, match=r"empty\.txt holds no text"):
        draw_candidates(corpora[0], tokenizer, count=1, probe=tmp_path / "empty.txt", **SIZES)
