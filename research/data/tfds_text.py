"""TensorFlow Datasets without TensorFlow: a builder over local text files, and reading what TFDS
has prepared.

Everything is read by random access (`tfds.data_source`, ArrayRecord), which needs no TensorFlow.
TFDS takes a while to import, so only the code that meets a `tfds` source imports this module.
"""

import codecs
import contextlib
import io
import pathlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import tensorflow_datasets as tfds

from research.core.errors import UserError, listed

Named = tuple[str, str | bytes]


class TesseraText(tfds.core.GeneratorBasedBuilder):
    """Text files as a TFDS dataset: one example per file, with its `name` and `text`, in one split
    `train`.
    """

    VERSION = tfds.core.Version("1.0.0")
    # TFDS would look beside the code for the checksums of downloads; there are none.
    code_path = None

    def __init__(self, *, files: Mapping[str, str], **options: Any):
        """Args: files: path of each file by the name that its example gets. options: those of
        TFDS.
        """
        self._files = dict(files)
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {"name": tfds.features.Text(), "text": tfds.features.Text()}
        )
        return tfds.core.DatasetInfo(
            builder=self, description="Local text files.", features=features
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, path in sorted(self._files.items()):
            # Bytes, so that bad UTF-8 reaches the reader of the source, which counts it.
            data = pathlib.Path(path).read_bytes()
            text = data.removeprefix(codecs.BOM_UTF8)
            yield name, {"name": name, "text": text}


def prepare(
    files: Mapping[str, pathlib.Path], data_dir: str | pathlib.Path
) -> Sequence[dict[str, Any]]:
    """Prepares text files under `data_dir`, if that has not been done, and returns the examples for
    random access.
    """
    tfds.disable_progress_bar()
    options = {
        "file_format": "array_record",
        "files": {name: str(path) for name, path in files.items()},
    }
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints what it does
        return tfds.data_source(
            TesseraText.name,
            split="train",
            data_dir=str(data_dir),
            download=True,
            builder_kwargs=options,
        )


def texts(path: str, split: str, field: str, files: Mapping[str, pathlib.Path]) -> Iterator[Named]:
    """Yields (name, text) of the examples of a dataset.

    Args:
      path: the `path` of the source, for messages.
      split: the TFDS split; only read where `path` is a prepared dataset.
      field: the feature with the text.
      files: the files that `path` matches: a prepared dataset (with `dataset_info.json`),
        ArrayRecord files beside their `features.json`, or text files, which are prepared first.

    Raises:
      UserError: a dataset of another file format, or without that split or feature.
    """
    with contextlib.ExitStack() as stack:
        with _readable(path):
            examples = _open(path, split, files, stack)
        for number in range(len(examples)):
            with _readable(path):
                example = examples[number]
            if field not in example:
                raise UserError(
                    "field", field, f"is not a feature of {path}. Features: {listed(example)}."
                )
            name = example["name"].decode() if "name" in example else str(number)
            yield name, example[field]


@contextlib.contextmanager
def _readable(path: str) -> Iterator[None]:
    """Raises a UserError of one line for any error of TFDS: a damaged dataset raises many types."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        one_line = " ".join(message.split())
        raise UserError("path", path, f"cannot be read: {one_line[:300]}.") from error


def _open(
    path: str, split: str, files: Mapping[str, pathlib.Path], stack: contextlib.ExitStack
) -> Sequence[dict[str, Any]]:
    """Returns the examples of files as `texts` describes them; what is prepared first is removed
    when `stack` closes.
    """
    folders = {file.parent for name, file in files.items() if file.name == "dataset_info.json"}
    if len(folders) > 1:
        raise UserError("path", path, f"holds {len(folders)} prepared datasets; name one of them.")
    if folders:
        return _open_prepared(folders.pop(), split)
    if any(".array_record" in file.name for file in files.values()):
        return _open_records(path, sorted(files.values()))
    temporary = tempfile.TemporaryDirectory(prefix="tessera-tfds-")
    return prepare(files, stack.enter_context(temporary))


def _open_prepared(folder: pathlib.Path, split: str) -> Sequence[dict[str, Any]]:
    builder = tfds.builder_from_directory(folder)
    if split not in builder.info.splits:
        raise UserError(
            "tfds_split", split, f"is not a split of {folder}: {listed(builder.info.splits)}."
        )
    try:
        return builder.as_data_source(split=split)
    except NotImplementedError as error:
        raise UserError(
            f"{folder} is prepared as {builder.info.file_format.value}, which has no random access."
            " Prepare it with file_format = 'array_record', or let path name its ArrayRecord "
            "files if it has any."
        ) from error


class _Records(Sequence[dict[str, Any]]):
    """Examples of bare ArrayRecord files, decoded by the `features.json` beside them."""

    def __init__(self, files: Sequence[pathlib.Path], features: tfds.features.FeatureConnector):
        self._records = grain.sources.ArrayRecordDataSource(files)
        self._features = features

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._features.deserialize_example_np(self._records[index])


def _open_records(path: str, files: Sequence[pathlib.Path]) -> _Records:
    try:
        features = tfds.features.FeatureConnector.from_config(str(files[0].parent))
    except (OSError, ValueError) as error:
        raise UserError("path", path, ": no features.json beside the ArrayRecord files.") from error
    return _Records(files, features)
