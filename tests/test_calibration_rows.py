"""Rows of the user's files -> documents: recognised forms, a chosen field, chats through the tokenizer's template."""

from __future__ import annotations

import json

import pyarrow
import pyarrow.parquet
import pytest
from texts import document, shared_file, word_tokenizer, write_parquet, write_rows, write_texts

from nirvana import NirvanaError
from nirvana.calibration import draw_batches, load_batch, read_documents, token_ids

TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }} </{{ m.role }}> {% endfor %}"
CHAT = [{"role": "user", "content": "d1w0 d1w1"}, {"role": "assistant", "content": "d2w0"}]
SHAREGPT = [{"from": "human", "value": "d1w0 d1w1"}, {"from": "gpt", "value": "d2w0"}]

ROWS = {
    "text": ({"text": "a", "id": 1}, "a"),
    "text first": ({"text": "a", "question": "q", "answer": "b", "messages": CHAT}, "a"),
    "gsm8k": ({"question": "1 + 1?", "answer": "#### 2"}, "1 + 1?\n#### 2"),
    "alpaca": ({"instruction": "Add.", "input": "1, 1", "output": "2"}, "Add.\n\n1, 1\n\n2"),
    "alpaca without input": ({"instruction": "Hi.", "input": "", "output": "Ho."}, "Hi.\n\nHo."),
    "alpaca lacking input": ({"instruction": "Hi.", "output": "Ho."}, "Hi.\n\nHo."),
    "mbpp": ({"text": "Add.", "code": "a + b", "test_list": ["assert x"]}, "Add.\na + b"),
    "text beside code": ({"text": "Add.", "code": "a + b"}, "Add."),
    "mbpp sanitized": ({"prompt": "Add.", "code": "a + b", "test_list": []}, "Add.\na + b"),
    "lambada": ({"context": "the last", "target": " word"}, "the last word"),
    "messages": ({"id": 1, "messages": CHAT}, CHAT),
    "conversations": ({"conversations": CHAT}, CHAT),
    "sharegpt": ({"conversations": SHAREGPT}, CHAT),
}


@pytest.mark.parametrize(("row", "expected"), ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_forms_are_recognised(tmp_path, kind, row, expected):
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        write_rows(path, [row, row])
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row, row]), path)
    assert read_documents(path) == [expected, expected]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_one_field_can_be_chosen(tmp_path, kind):
    rows = [{"text": "a", "summary": "b", "dialogue": CHAT}]
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        write_rows(path, rows)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert read_documents(f"{path}#summary") == ["b"]
    assert read_documents(f"{path}#dialogue") == [CHAT]
    with pytest.raises(NirvanaError, match=r'has no (field|column) "body" \(it has: text, summary, dialogue\)'):
        read_documents(f"{path}#body")
    with pytest.raises(NirvanaError, match="no corpus or file"):
        read_documents(f"{tmp_path / 'none.jsonl'}#summary")


def test_a_name_with_a_hash_or_a_plus_is_a_file_where_there_is_one(tmp_path):
    write_texts(tmp_path / "a#b.jsonl", ["x"])
    write_texts(tmp_path / "c+d.jsonl", ["y"])
    assert read_documents(str(tmp_path / "a#b.jsonl")) == ["x"]
    assert read_documents(str(tmp_path / "c+d.jsonl")) == ["y"]
    assert read_documents(f"{tmp_path / 'c+d.jsonl'}#url") == ["x"]


def test_plain_text_has_no_fields(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(NirvanaError, match=r"is plain text and has no field 'body'; leave '#body' out"):
        read_documents(f"{tmp_path / 'a.txt'}#body")


def test_a_folder_is_read_in_order_of_name_whatever_the_types(tmp_path):
    (tmp_path / "c.txt").write_text("third")
    write_parquet(tmp_path / "b.parquet", text=["second"])
    write_rows(tmp_path / "a.jsonl", [{"question": "first", "answer": "!"}])
    (tmp_path / "d.md").write_text("not read")
    assert read_documents(tmp_path) == ["first\n!", "second", "third"]


# ---- chats ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chatter():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_chats_go_through_the_template(tmp_path, chatter):
    path = write_rows(tmp_path / "chat.jsonl", [{"messages": CHAT}] * 3)
    expected = [1000, 100, 101, 1000, 1000, 200, 1000]  # a tag is no known word: 1000
    assert token_ids(chatter, CHAT) == expected
    [batch] = draw_batches(path, chatter, num_examples=2, seq_len=7)
    assert batch.tokens.tolist() == [expected] * 2
    assert len(batch.manifest["chat_template_sha256"]) == 64
    assert "chat_template_sha256" not in draw_batches("novels", chatter, num_examples=1)[0].manifest


def test_a_tokenizer_without_a_template_says_so(tmp_path):
    path = write_rows(tmp_path / "chat.jsonl", [{"messages": CHAT}] * 3)
    with pytest.raises(NirvanaError, match="the tokenizer has no chat template; use the instruction-tuned model's"):
        load_batch(path, word_tokenizer(), num_examples=2, seq_len=2)


def test_a_template_that_refuses_a_chat_says_why(tmp_path):
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must\nalternate') }}"
    path = write_rows(tmp_path / "chat.jsonl", [{"messages": CHAT}])
    with pytest.raises(
        NirvanaError, match=r"refuses a chat \(user, assistant, \.\.\.\): roles must alternate"
    ) as caught:
        load_batch(path, tokenizer, num_examples=1, seq_len=2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], 'line 2 has no messages in its field "messages"'),
        (["hello"], 'line 2 has no strings "role" and "content" in message 1 of its field "messages"'),
        ([CHAT[0], {"role": "assistant"}], 'line 2 has no strings "role" and "content" in message 2'),
        ([{"role": "user", "content": None}], "in message 1"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "in message 1"),
        ([{"role": 3, "content": "x"}], "in message 1"),
        ([{"role": "user", "content": "\ud83d"}], "line 2 holds half a surrogate pair"),
        ("hello", "line 2 has no messages|no string field"),
        (None, "line 2 has no"),
    ],
)
def test_malformed_chats_are_refused(tmp_path, messages, message):
    path = write_rows(tmp_path / "chat.jsonl", [{"messages": CHAT}, {"messages": messages}])
    if messages == "hello":  # a field named messages that is text is text
        assert read_documents(path) == [CHAT, "hello"]
        return
    with pytest.raises(NirvanaError, match=message) as caught:
        read_documents(path)
    assert "\n" not in str(caught.value)


def test_malformed_chats_in_parquet_are_refused(tmp_path):
    path = tmp_path / "chat.parquet"
    rows = [{"messages": CHAT}, {"messages": None}, {"messages": [{"role": "user", "content": None}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    with pytest.raises(NirvanaError, match=r'chat\.parquet, row 2 has no strings "role" and "content" in message 1'):
        read_documents(path)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q"}, r'no string field "text" \(it has: question\); write \'rows.jsonl#FIELD\' to read another'),
        ({"question": "q", "answer": {"value": "a"}}, 'no string field "answer"'),
        ({"instruction": "i", "input": 3, "output": "o"}, 'no string field "input"'),
        ({}, 'no string field "text"'),
        (3, r'no string field "text" \(it has: int\)'),
    ],
)
def test_rows_without_text_are_refused(tmp_path, row, message):
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "good"}, row])
    with pytest.raises(NirvanaError, match=f"line 2 has {message}"):
        read_documents(path)


def test_parquet_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "latin1.parquet"
    data = pyarrow.py_buffer("café".encode("latin-1"))
    offsets = pyarrow.py_buffer(b"\0\0\0\0\4\0\0\0")
    column = pyarrow.StringArray.from_buffers(1, offsets, data)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    with pytest.raises(NirvanaError, match=r"cannot read .*latin1\.parquet as UTF-8 text"):
        read_documents(path)


def test_a_folder_without_text_is_refused(tmp_path):
    (tmp_path / "a.md").write_text("text")
    with pytest.raises(NirvanaError, match=r"holds no text: it has no \.txt, \.jsonl, \.parquet file"):
        read_documents(tmp_path)


# ---- real files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rows", "start", "end"),
    [
        ("gsm8k/train.jsonl", 7473, "Natalia sold clips to 48 of her friends", "#### 72"),
        ("mbpp/mbpp.jsonl", 974, "Write a function to find the minimum cost path", "return tc[m][n]"),
        ("alpaca/alpaca_en_demo.jsonl", 999, "Describe a process of making crepes.\n\n", None),
        ("lambada/lambada_openai_test.jsonl", 5153, "In my palm is a clear stone", "I don't care about signs"),
        ("c4/c4_a_sample1000.jsonl", 1000, "Beginners BBQ Class Taking Place in Missoula!", None),
        ("wikitext2/wiki.test.raw.txt", 1, " \n = Robert Boulter = \n", None),
    ],
)
def test_files_of_the_named_corpora_are_understood(name, rows, start, end):
    documents = read_documents(shared_file(name))
    assert len(documents) == rows
    assert documents[0].startswith(start)
    if end:
        assert documents[0].endswith(end)


def test_the_same_rows_as_parquet_give_the_same_documents(tmp_path):
    path = shared_file("mbpp/mbpp.jsonl")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "mbpp.parquet")
    assert read_documents(tmp_path / "mbpp.parquet") == read_documents(path)


def test_documents_can_be_mixed_for_evaluation(tmp_path):
    a, b = (write_texts(tmp_path / f"{d}.jsonl", [document(d, 3)]) for d in (1, 2))
    assert read_documents(f"{a}+{b}") == [document(1, 3), document(2, 3)]
