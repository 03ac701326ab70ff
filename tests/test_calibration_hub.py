"""Data sets of the Hub: streamed by the real `datasets` library, from local files, from its cache, and from a small
server that answers as the Hub does; and one line where there is no network."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from hub_server import serve_hub
from texts import document, shared_file, word_tokenizer, write_parquet, write_rows

import nirvana
from nirvana import NirvanaError
from nirvana.calibration import streams
from nirvana.calibration.corpora import CORPORA
from nirvana.calibration.draw import CalibrationBatch, draw_batches
from nirvana.calibration.hub import HubCorpus, HubSource, parse
from nirvana.calibration.rows import QUESTION, RowError


def stream(*files: Path) -> datasets.IterableDataset:
    kind = {".jsonl": "json", ".parquet": "parquet"}[files[0].suffix]
    return datasets.load_dataset(kind, data_files=[str(file) for file in files], split="train", streaming=True)


@pytest.fixture
def shards(tmp_path):
    """Six files of 5 documents; document d of file f is "dfwd"."""
    return [
        write_parquet(tmp_path / f"{f}.parquet", text=[f"d{f}w{d}" for d in range(5)], other=list(range(5)))
        for f in range(6)
    ]


# ---- streams --------------------------------------------------------------------------------------------------------


def test_shards_are_read_in_turn_and_the_seed_orders_them(shards):
    dataset = stream(*shards)
    assert dataset.num_shards == 6
    orders = [[place for place, _ in streams.shuffled(dataset, seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    for order in orders:
        assert sorted(order) == [(f, d) for f in range(6) for d in range(5)]
        first = [shard for shard, _ in order[:4]]
        assert len(set(first)) == 4
        assert [shard for shard, _ in order[4:8]] == first
    # Pinned: the order must not change with a platform or a release.
    first = "d3w0 d5w0 d0w0 d1w0 d3w1 d5w1 d0w1 d1w1 d3w2"
    assert " ".join(text for _, text in streams.shuffled(dataset, 0)).startswith(first)
    assert all(text == f"d{f}w{d}" for (f, d), text in streams.shuffled(dataset, 2))
    assert list(streams.in_order(dataset)) == [f"d{f}w{d}" for f in range(6) for d in range(5)]


def test_a_stream_is_read_only_as_far_as_it_is_needed():
    """A data set without an end."""

    def rows():
        number = 0
        while True:
            yield {"text": document(number % 10, 12)}
            number += 1

    source = HubSource("x", HubCorpus("o/x"), "train", datasets.IterableDataset.from_generator(rows), None)
    first = next(source.blocks(0, 5))
    assert len(first) == streams.BUFFER
    assert len(next(source.blocks(0, streams.BUFFER + 1))) == streams.BUFFER + 1
    assert len(source.in_order()) == streams.BUFFER


def test_no_more_than_the_limit_is_read(shards, monkeypatch):
    monkeypatch.setattr(streams, "LIMIT", 7)
    assert len(list(streams.shuffled(stream(*shards), 0))) == 7


def test_short_rows_are_joined_to_passages(tmp_path, monkeypatch):
    path = write_rows(
        tmp_path / "lines.jsonl", [{"text": text} for text in ("a" * 6, "", " \n", "b" * 6, "c" * 20, "d")]
    )
    monkeypatch.setattr(streams, "PASSAGE", 12)
    documents = list(streams.in_order(stream(path), join=" "))
    assert documents == ["aaaaaa bbbbbb ", "c" * 20 + " ", "d "]
    assert [place for place, _ in streams.shuffled(stream(path), 0, join=" ")] == [(0, 0), (0, 1), (0, 2)]


def test_rows_of_a_stream_take_the_forms_of_files(tmp_path):
    path = write_rows(tmp_path / "q.jsonl", [{"question": "q", "answer": "a"}])
    for options in ({}, {"form": QUESTION}):
        assert list(streams.in_order(stream(path), **options)) == ["q\na"]
    assert list(streams.in_order(stream(path), field="answer")) == ["a"]
    with pytest.raises(RowError, match=r'has no field "text" \(it has: question, answer\)'):
        list(streams.in_order(stream(path), field="text"))
    chats = [{"messages": [{"role": "user", "content": "x"}]}]
    assert list(streams.in_order(stream(write_rows(tmp_path / "c.jsonl", chats)))) == [chats[0]["messages"]]


@pytest.mark.parametrize("name", ["c4/c4_a_sample1000.jsonl", "gsm8k/train.jsonl", "lambada/lambada_openai_test.jsonl"])
def test_streamed_files_give_the_documents_of_the_files(name):
    path = shared_file(name)
    assert list(streams.in_order(stream(path))) == nirvana.calibration.read_documents(path)[: streams.BUFFER]


# ---- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("hub:allenai/c4/en:train:text", {"config": "en", "field": "text"}),
        ("hub:o/n:test", {"repo": "o/n", "split": "test"}),
        ("hub:o/n.x-1:train:a b", {"repo": "o/n.x-1", "field": "a b"}),
        ("hub:o/n@refs/convert/parquet:train", {"repo": "o/n", "revision": "refs/convert/parquet"}),
        ("hub:o/n/c@abc:train:f", {"config": "c", "revision": "abc", "field": "f"}),
    ],
)
def test_hub_names(name, parts):
    corpus = parse(name)
    assert {key: getattr(corpus, key) for key in parts} == parts
    assert corpus.form is corpus.join is corpus.files is None


@pytest.mark.parametrize(
    "name",
    [
        "hub:",
        "hub:c4:train",
        "hub:o/n",
        "hub:o/n:",
        "hub:o/n::text",
        "hub:o/n:train:",
        "hub:o/n/a/b:train",
        "hub:o n/x:t",
    ],
)
def test_misspelt_hub_names(name):
    with pytest.raises(
        NirvanaError, match=r"is not hub:OWNER/NAME\[/CONFIG\]\[@REVISION\]:SPLIT\[:FIELD\]; for example"
    ):
        nirvana.calibration.read_documents(name)


def test_every_named_corpus_is_a_valid_hub_name():
    for corpus in CORPORA.values():
        assert parse(f"hub:{corpus.repo}/{corpus.config or 'x'}:{corpus.split}").repo == corpus.repo
        assert (corpus.field is None) != (corpus.form is None)


def test_unknown_names_list_the_corpora():
    with pytest.raises(
        NirvanaError, match="built in is novels, on the Hub are c4, wikitext2, bookcorpus, ptb, lambada"
    ):
        nirvana.calibration.read_documents("wikipedia")


# ---- a process of its own: with a server, a cache, or nothing -------------------------------------------------------

DRAW = """
import json, sys
import nirvana
from nirvana.calibration import draw_batches, read_documents
from texts import word_tokenizer
assert "datasets" not in sys.modules, "importing nirvana must not import datasets"
for source, options in json.loads(sys.argv[1]):
    try:
        if options is None:
            print(json.dumps(read_documents(source, held_out=True)))
        else:
            batches = draw_batches(source, word_tokenizer(), **options)
            print(json.dumps([[batch.manifest, batch.tokens.tolist()] for batch in batches]))
    except nirvana.NirvanaError as error:
        print(json.dumps(str(error)))
"""


def in_process(folder: Path, requests: list, **environment: str) -> list:
    """What these requests give where `datasets` and the Hub's client start afresh."""
    home = {"HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, "-c", DRAW, json.dumps(requests)],
        env={**os.environ, **home, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    assert run.stderr == "", "only commands print"
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_without_a_network_one_line_says_so(tmp_path):
    """Port 9 of this machine refuses connections; nothing is asked of the outside."""
    names = ["c4", "hub:o/n:train", "wikitext2"]
    lines = in_process(tmp_path, [[name, {}] for name in names], HF_ENDPOINT="http://127.0.0.1:9")
    for name, line in zip(names, lines, strict=True):
        assert line.startswith(f"{name}: the Hub cannot be asked for ")
        assert line.endswith(
            "without a network use the built-in novels, or a .txt, .jsonl, .parquet, folder or .npy of your own"
        )
        assert "\n" not in line
    [line] = in_process(tmp_path, [["ptb", {}]], HF_HUB_OFFLINE="1")
    assert "ptb-text-only/ptb_text_only (offline mode is on)" in line


def test_a_network_that_swallows_everything_is_given_up(monkeypatch):
    """A server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr("nirvana.calibration.hub.PATIENCE", 0.5)
        with pytest.raises(NirvanaError, match=r"^gsm8k: the Hub cannot be asked for openai/gsm8k \(.*timed out.*\)"):
            nirvana.calibration.read_documents("gsm8k")


def test_data_sets_of_a_hub(tmp_path):
    hub, commit = tmp_path / "hub", "0123456789abcdef0123456789abcdef01234567"
    (hub / "o/plain").mkdir(parents=True)
    for f in range(2):
        write_rows(hub / f"o/plain/train-{f}.jsonl", [{"text": document(5 * f + d, 20)} for d in range(5)])
    write_rows(hub / "o/plain/test.jsonl", [{"text": "held out"}])
    (hub / "o/script").mkdir()
    (hub / "o/script/script.py").write_text("raise SystemExit('it ran')")
    table = hub / "ptb-text-only/ptb_text_only/penn_treebank/train"
    table.mkdir(parents=True)
    write_parquet(table / "0000.parquet", sentence=[document(d % 10, 90) for d in range(20)])
    options = {"num_examples": 2, "seq_len": 6, "seed": 3}
    with serve_hub(hub, commit) as endpoint:
        two, one, held_out, ptb, split, field, script, missing, few = in_process(
            tmp_path,
            [
                ["hub:o/plain:train:text", {**options, "count": 2}],
                ["hub:o/plain:train", options],
                ["hub:o/plain:test", None],
                ["ptb", {**options, "seq_len": 500}],
                ["hub:o/plain:valid", options],
                ["hub:o/plain:train:body", options],
                ["hub:o/script:train", options],
                ["hub:o/none:train", options],
                ["hub:o/plain:train", {**options, "count": 6}],
            ],
            HF_ENDPOINT=endpoint,
        )
    assert one[0][1] == two[0][1]
    places = set()
    for manifest, tokens in two:
        [source] = manifest["sources"]
        assert source["hub"] == "o/plain"
        assert source["revision"] == commit
        assert list(manifest["packages"]) == ["transformers", "tokenizers", "datasets", "pyarrow"]
        for row, shard, number, offset in zip(
            tokens, source["from_shards"], source["documents"], source["offsets"], strict=True
        ):
            first = 100 * (5 * shard + number) + offset
            assert row == list(range(first, first + 6))
            places.add((shard, number))
    assert len(places) == 4
    assert held_out == ["held out"]
    assert ptb[0][0]["sources"][0]["hub"] == "ptb-text-only/ptb_text_only"
    assert len(ptb[0][1][0]) == 500, "sentences are joined"
    assert "Bad split: valid. Available splits: ['train', 'test']" in split
    assert "body" in field
    assert script.endswith("found script.py; the Hub may keep a conversion of it: OWNER/NAME@refs/convert/parquet")
    assert "it ran" not in script
    assert "no data set 'o/none' on the Hub" in missing
    assert "holds only 10 documents of at least 6 tokens in its first 65536 documents, which is 5 disjoint" in few


def test_a_data_set_in_the_cache_needs_no_network(tmp_path):
    hub, commit = tmp_path / "hub", "0123456789abcdef0123456789abcdef01234567"
    (hub / "o/plain").mkdir(parents=True)
    write_rows(hub / "o/plain/train.jsonl", [{"text": document(d, 20)} for d in range(10)])
    request = ["hub:o/plain:train:text", {"num_examples": 4, "seq_len": 6}]
    with serve_hub(hub, commit) as endpoint:
        prepare = "import datasets; datasets.load_dataset('o/plain')"
        environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": endpoint}
        subprocess.run([sys.executable, "-c", prepare], env=environment, check=True, capture_output=True, timeout=240)
        [online] = in_process(tmp_path, [request], HF_ENDPOINT=endpoint)
    for environment in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        [offline] = in_process(tmp_path, [request], **environment)
        assert offline[0][1] == online[0][1]
        assert offline[0][0]["sources"][0]["revision"] == commit


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(NirvanaError, match=r"c4 needs the datasets library: pip install 'nirvana\[data\]'"):
        nirvana.calibration.read_documents("c4")
    assert isinstance(draw_batches("novels", word_tokenizer(), num_examples=2)[0], CalibrationBatch)
