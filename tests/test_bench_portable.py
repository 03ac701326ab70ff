"""A model in pieces: what comes out of them is what went in, within a rounding; what is not whole is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from nirvana.benchmarks import portable, real
from nirvana.benchmarks.harness import Settings, SkipError
from nirvana.errors import NirvanaError

#: Bytes of a piece of the tiny checkpoint: the largest tensor just fits.
PIECE = 18_000


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread):
    """Shapes this small gain nothing from two."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "model"
    portable.pack(str(llama_folder), folder, PIECE)
    return folder


@pytest.fixture
def packed(tmp_path: Path, whole: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def test_every_weight_comes_back_within_half_a_level_and_a_rounding(whole, llama_folder):
    before = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    after, tokens = portable.load(whole)
    assert after.dtype == torch.bfloat16
    assert not after.training
    assert (tokens.dtype, tuple(tokens.shape)) == (torch.int64, (32, 128))
    assert 0 <= int(tokens.min()) < int(tokens.max()) < before.config.vocab_size
    restored = dict(after.named_parameters())
    for name, weight in before.named_parameters():
        allowed = weight.abs() * 2**-8
        if weight.dim() == 2:
            allowed = allowed + weight.abs().amax(1, keepdim=True) / (2 * portable.LEVELS) * 1.01
        assert ((restored.pop(name).float() - weight).abs() <= allowed).all(), name
    assert restored == {}
    assert torch.isfinite(after(input_ids=tokens[:2]).logits).all()


def test_pieces_are_below_their_limit_and_hold_no_pickles(whole):
    pieces = sorted(whole.glob("model-*.npz"))
    assert len(pieces) > 2
    assert all(piece.stat().st_size <= PIECE for piece in pieces)
    for piece in pieces:
        with np.load(piece, allow_pickle=False) as arrays:
            assert {arrays[name].dtype for name in arrays.files} <= {np.dtype("int8"), np.dtype("float32")}
    index = json.loads((whole / portable.INDEX).read_text())
    assert set(index["files"]) == {portable.TOKENS, *(piece.name for piece in pieces)}


def test_a_row_of_zeros_stays_one():
    levels, scales = portable.quantise(torch.tensor([[0.0, 0.0], [-2.0, 1.0]]))
    assert levels.tolist() == [[0, 0], [-127, 64]]
    assert scales.tolist() == pytest.approx([1, 2 / 127])


def test_packing_again_replaces_the_old_pieces_and_nothing_else(packed, llama_folder, tmp_path):
    portable.pack(str(llama_folder), packed)
    assert sorted(file.name for file in packed.iterdir()) == ["index.json", "model-1.npz", "tokens.npy"]
    portable.load(packed)
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(NirvanaError, match="something other than a packed model"):
        portable.pack(str(llama_folder), tmp_path)
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_tensor_larger_than_a_piece_is_named(llama_folder, tmp_path):
    with pytest.raises(NirvanaError, match=r"model\.embed_tokens\.weight takes .* bytes, a piece 9,000 at most"):
        portable.pack(str(llama_folder), tmp_path / "model", 9000)


def missing(folder: Path) -> None:
    (folder / "model-2.npz").unlink()


def short(folder: Path) -> None:
    with open(folder / "model-2.npz", "r+b") as file:
        file.truncate(1000)


def damaged(folder: Path) -> None:
    with open(folder / "model-2.npz", "r+b") as file:
        file.seek(500)
        byte = file.read(1)
        file.seek(500)
        file.write(bytes([byte[0] ^ 1]))


def foreign_tokens(folder: Path) -> None:
    np.save(folder / portable.TOKENS, np.zeros((32, 128), np.int64))


def no_index(folder: Path) -> None:
    (folder / portable.INDEX).unlink()


def not_json(folder: Path) -> None:
    (folder / portable.INDEX).write_text("{")


def edit(folder: Path, **changes: object) -> None:
    file = folder / portable.INDEX
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def other_version(folder: Path) -> None:
    edit(folder, version=2)


def other_config(folder: Path) -> None:
    config = json.loads((folder / portable.INDEX).read_text())["config"]
    edit(folder, config=config | {"intermediate_size": 40})


def fewer_layers(folder: Path) -> None:
    config = json.loads((folder / portable.INDEX).read_text())["config"]
    edit(folder, config=config | {"num_hidden_layers": 1})


def more_layers(folder: Path) -> None:
    config = json.loads((folder / portable.INDEX).read_text())["config"]
    edit(folder, config=config | {"num_hidden_layers": 3})


def unknown_type(folder: Path) -> None:
    config = json.loads((folder / portable.INDEX).read_text())["config"]
    edit(folder, config=config | {"model_type": "of-tomorrow"})


def no_type(folder: Path) -> None:
    config = json.loads((folder / portable.INDEX).read_text())["config"]
    edit(folder, config={key: value for key, value in config.items() if key != "model_type"})


def impossible_config(folder: Path) -> None:
    config = json.loads((folder / portable.INDEX).read_text())["config"]
    edit(folder, config=config | {"hidden_size": 33})


def no_sum(folder: Path) -> None:
    files = json.loads((folder / portable.INDEX).read_text())["files"]
    edit(folder, files=files | {"model-1.npz": {"bytes": 1}})


def unlisted_tokens(folder: Path) -> None:
    files = json.loads((folder / portable.INDEX).read_text())["files"]
    edit(folder, files={name: about for name, about in files.items() if name != portable.TOKENS})


def list_of_files(folder: Path) -> None:
    edit(folder, files=["model-1.npz"])


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (missing, "model-2.npz is missing; send it again"),
        (short, "model-2.npz has 1,000 bytes instead of"),
        (damaged, "model-2.npz is damaged or of another model"),
        (foreign_tokens, "tokens.npy is damaged or of another model"),
        (no_index, "no packed model in"),
        *(
            (spoil, "index.json cannot be read")
            for spoil in (not_json, no_type, no_sum, unlisted_tokens, list_of_files)
        ),
        *((spoil, "cannot make the model of") for spoil in (unknown_type, impossible_config)),
        (other_version, "is nirvana-portable version 2, not nirvana-portable version 1"),
        (other_config, "has shape [48, 32], the model [40, 32]"),
        (fewer_layers, "which the model does not have"),
        (more_layers, "holds no tensor model.layers.2."),
    ],
)
def test_what_is_not_whole_is_refused_in_one_line(packed, monkeypatch, capsys, spoil, says):
    spoil(packed)
    monkeypatch.setattr("sys.argv", ["portable", "unpack", str(packed)])
    assert portable.main() == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err
    assert len(err.splitlines()) == 1


def test_the_command_line_packs_and_tells(llama_folder, tmp_path, monkeypatch, capsys):
    folder = str(tmp_path / "model")
    monkeypatch.setattr("sys.argv", ["portable", "pack", str(llama_folder), folder])
    assert portable.main() == 0
    monkeypatch.setattr("sys.argv", ["portable", "unpack", folder])
    assert portable.main() == 0
    assert "LlamaForCausalLM, " in capsys.readouterr().out


def test_backends_on_a_packed_model(whole):
    *_, document = real.grow(Settings("cpu", quick=True), str(whole))
    assert document["failures"] == []
    assert [record["dtype"] for record in document["records"]["pairs"]] == ["float32", "bfloat16"]
    for record in document["records"]["pairs"]:
        assert record["largest_relative_difference"] < 1e-5
        assert record["differing_at_50%"] == 0 < record["kept_at_50%"]
    assert "plans equal at 20%, plans equal at 50%" in document["headlines"][0]


def test_scores_that_are_apart_are_a_failure(whole, monkeypatch):
    right = real.nirvana.score
    calls = []

    def score(*arguments):
        saliency = right(*arguments)
        calls.append(saliency)
        if len(calls) == 2:
            next(iter(saliency.values()))[0] *= 1.05
        return saliency

    monkeypatch.setattr(real.nirvana, "score", score)
    *_, document = real.grow(Settings("cpu", quick=True), str(whole))
    (failure,) = document["failures"]
    assert "scores within 4.8e-02" in failure or "scores within 5.0e-02" in failure


def test_no_model_is_a_reason(tmp_path):
    with pytest.raises(SkipError, match="portable pack demo"):
        next(real.grow(Settings("cpu", quick=True), str(tmp_path / "nowhere")))
