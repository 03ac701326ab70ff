"""Data sets of the Hugging Face Hub, streamed through `datasets`. Never data sets that bring a script."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

from nirvana.calibration import streams
from nirvana.calibration.rows import Document, Form, RowError
from nirvana.errors import NirvanaError

if TYPE_CHECKING:
    from datasets import DatasetBuilder, IterableDataset

T = TypeVar("T")

PREFIX = "hub:"
SPELLING = "hub:OWNER/NAME[/CONFIG][@REVISION]:SPLIT[:FIELD]"
_NAME = re.compile(
    r"hub:(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<config>[^/:@]+))?(?:@(?P<revision>[^:]+))?"
    r":(?P<split>[\w.-]+)(?::(?P<field>.+))?"
)

#: Seconds for the one question by which a missing network is noticed.
PATIENCE = 10

LOCAL = "without a network use the built-in novels, or a .txt, .jsonl, .parquet, folder or .npy of your own"


@dataclass(frozen=True)
class HubCorpus:
    """A data set on the Hub, and what of it is text.

    Attributes:
        repo: ``owner/name``.
        split: to calibrate on.
        held_out: the split to evaluate on, where there is another one.
        config: configuration (subset), if it has several.
        revision: branch, tag or commit; None is the newest.
        files: pattern of the files to read, with ``{split}`` in it, for a branch that does not say so itself.
        field, form: what of a row is its text; both None: recognised.
        join: ends each row where consecutive rows (sentences, lines) make one passage; None: each row is a document.
    """

    repo: str
    split: str = "train"
    held_out: str | None = None
    config: str | None = None
    revision: str | None = None
    files: str | None = None
    field: str | None = None
    form: Form | None = None
    join: str | None = None


def parse(name: str) -> HubCorpus:
    """``hub:owner/name[/config][@revision]:split[:field]`` as users write it.

    Raises:
        NirvanaError: misspelt.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise NirvanaError(f"{name!r} is not {SPELLING}; for example hub:allenai/c4/en:train:text")
    return HubCorpus(**match.groupdict())


class HubSource:
    """An opened data set: documents as they come, and where they come from."""

    scope = f" in its first {streams.LIMIT} documents"

    def __init__(self, name: str, corpus: HubCorpus, split: str, dataset: IterableDataset, revision: str | None):
        self.name = name
        self._corpus = corpus
        self._split = split
        self._dataset = dataset
        self._revision = revision
        self._text = {"field": corpus.field, "form": corpus.form, "join": corpus.join}

    def blocks(self, seed: int, at_least: int) -> Iterator[list[tuple[streams.Place, Document]]]:
        """Documents to draw from, `streams.BUFFER` or more at a time; read only as far as they are asked for."""
        documents = streams.shuffled(self._dataset, seed, **self._text)
        while block := self._take(documents, max(streams.BUFFER, at_least)):
            yield block

    def in_order(self) -> list[Document]:
        """The first `streams.BUFFER` documents as they are stored."""
        return self._take(streams.in_order(self._dataset, **self._text), streams.BUFFER)

    def about(self) -> dict[str, Any]:
        """Repository, commit and what of a row is its text, for the manifest."""
        form = self._corpus.form
        about = {
            "hub": self._corpus.repo,
            "config": self._corpus.config,
            "split": self._split,
            "revision": self._revision,
            "shards": self._dataset.num_shards,
            "shards_in_turn": streams.OPEN_SHARDS,
            "buffer": streams.BUFFER,
            "limit": streams.LIMIT,
            "fields": self._corpus.field if form is None else list(form.fields),
        }
        if self._corpus.join is not None:
            about["passage_characters"] = streams.PASSAGE
        return about

    def _take(self, documents: Iterator[T], count: int) -> list[T]:
        try:
            with _short_patience(), _quiet():
                return list(islice(documents, count))
        except RowError as error:
            raise NirvanaError(
                f"a row of {self.name} {error}; name the field to read: {SPELLING}, or choose another data set"
            ) from None
        except Exception as error:  # of httpx, fsspec, pyarrow, the decoders of columns that are no text
            raise NirvanaError(f"{self.name} could not be read from the Hub: {one_line(error)}; {LOCAL}") from None


def open_hub(name: str, corpus: HubCorpus, held_out: bool = False) -> HubSource:
    """Ask the Hub once for the commit, then stream that commit; without a network take what `datasets` has cached.

    Raises:
        NirvanaError: no `datasets`, no network, no such data set, configuration or split, or one that needs a script.
    """
    try:
        import datasets
    except ImportError:
        raise NirvanaError(f"{name} needs the datasets library: pip install 'nirvana[data]'; {LOCAL}") from None
    split = corpus.held_out if held_out and corpus.held_out else corpus.split
    if datasets.config.HF_HUB_OFFLINE:
        return _open_cached(name, corpus, split, "offline mode is on")
    try:
        revision = HfApi().dataset_info(corpus.repo, revision=corpus.revision, timeout=PATIENCE).sha
    except GatedRepoError:
        raise NirvanaError(
            f"{name}: {corpus.repo} is gated; accept its terms on the Hub and run 'hf auth login'"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise NirvanaError(
            f"{name}: no data set {corpus.repo!r} on the Hub (or it is private: hf auth login)"
        ) from None
    except RevisionNotFoundError:
        raise NirvanaError(f"{name}: {corpus.repo} has no revision {corpus.revision!r}") from None
    except Exception as error:  # of httpx or httpx2, which depends on the release of huggingface_hub
        return _open_cached(name, corpus, split, one_line(error))
    files = {"data_files": {split: corpus.files.format(split=split)}} if corpus.files else {}
    try:
        with _short_patience(), _quiet():
            builder = datasets.load_dataset_builder(corpus.repo, corpus.config, revision=revision, **files)
            return _source(name, corpus, split, builder, revision)
    except NirvanaError:
        raise
    except Exception as error:  # a script, an unknown configuration, the network gone in between
        remedy = (
            "; the Hub may keep a conversion of it: OWNER/NAME@refs/convert/parquet" if "script" in str(error) else ""
        )
        raise NirvanaError(f"{name}: {corpus.repo} cannot be opened: {one_line(error)}{remedy}") from None


def one_line(error: BaseException) -> str:
    """An error's message on one line, not longer than a screen is wide a few times over."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 300 else f"{words[:297]}..."


def _open_cached(name: str, corpus: HubCorpus, split: str, why: str) -> HubSource:
    """A data set that `datasets` has prepared on this machine before; its folder is named by the commit."""
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True  # or each of several questions would be asked again, with long patience
    try:
        with _quiet():
            builder = datasets.load_dataset_builder(corpus.repo, corpus.config)
            return _source(name, corpus, split, builder, builder.hash)
    except NirvanaError:
        raise
    except Exception:  # not cached, in whatever words
        raise NirvanaError(f"{name}: the Hub cannot be asked for {corpus.repo} ({why}); {LOCAL}") from None
    finally:
        datasets.config.HF_HUB_OFFLINE = before


def _source(name: str, corpus: HubCorpus, split: str, builder: DatasetBuilder, revision: str | None) -> HubSource:
    splits = builder.info.splits
    if splits and split not in splits:
        raise NirvanaError(f"{name}: {corpus.repo} has no split {split!r}; it has {', '.join(splits)}")
    dataset = builder.as_streaming_dataset(split=split)
    names = dataset.column_names
    wanted = corpus.form.fields if corpus.form else (corpus.field,) if corpus.field else ()
    if names is not None:
        if missing := [field for field in wanted if field not in names]:
            raise NirvanaError(f"{name}: {corpus.repo} has no field {missing[0]!r}; it has {', '.join(names)}")
        if wanted:  # images and sound beside the text need not be decoded
            dataset = dataset.select_columns(list(wanted))
    return HubSource(name, corpus, split, dataset, revision)


@contextmanager
def _short_patience() -> Iterator[None]:
    """`datasets` would try a lost connection 20 times, 5 seconds apart; it reads these two when it opens a file."""
    from datasets import config

    before = config.STREAMING_READ_MAX_RETRIES, config.STREAMING_OPEN_MAX_RETRIES
    config.STREAMING_READ_MAX_RETRIES = config.STREAMING_OPEN_MAX_RETRIES = 2
    try:
        yield
    finally:
        config.STREAMING_READ_MAX_RETRIES, config.STREAMING_OPEN_MAX_RETRIES = before


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars ("Resolving data files") and no notes on stderr: only commands print."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    bars, level = not are_progress_bars_disabled(), logging.get_verbosity()
    disable_progress_bars()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            enable_progress_bars()
