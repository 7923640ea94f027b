"""Parquet and ArrayRecord files, read once through grain and kept as a temporary copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import grain
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory, text_format

from training.documents import Document, SpooledDocument, SpooledTokens
from training.file_listing import suffix_of
from training.left_out import LeftOut, shown, shown_error, shown_path
from training.spool import Spool
from training.token_files import check_ids

PARQUET_SUFFIXES = (".parquet", ".pq")
RECORD_SUFFIXES = (*PARQUET_SUFFIXES, ".array_record", ".arrayrecord")
TOKEN_FIELDS = ("tokens", "input_ids")  # looked for where a record has no text field

# tf.train.Example, which ArrayRecord files hold more often than bare text.
_EXAMPLE = """
name: "s2jax_example.proto" package: "s2jax" syntax: "proto3"
message_type { name: "Bytes" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_BYTES } }
message_type { name: "Floats" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_FLOAT } }
message_type { name: "Ints" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_INT64 } }
message_type { name: "Feature"
  field { name: "bytes_list" number: 1 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".s2jax.Bytes" }
  field { name: "float_list" number: 2 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".s2jax.Floats" }
  field { name: "int64_list" number: 3 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".s2jax.Ints" } }
message_type { name: "Entry"
  field { name: "key" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
  field { name: "value" number: 2 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".s2jax.Feature" } }
message_type { name: "Features"
  field { name: "feature" number: 1 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: ".s2jax.Entry" } }
message_type { name: "Example"
  field { name: "features" number: 1 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".s2jax.Features" } }
"""


def _example_type() -> Any:
    pool = descriptor_pool.DescriptorPool()
    pool.Add(text_format.Parse(_EXAMPLE, descriptor_pb2.FileDescriptorProto()))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("s2jax.Example"))


_Example = _example_type()


def record_documents(
    path: Path, name: str, text_field: str, vocab_size: int, spool: Spool, left_out: LeftOut
) -> list[Document]:
    """Reads all records of a file, and keeps their texts or tokens in `spool`.

    A record's document is its text field, in UTF-8; or its token ids, where that field or one of `TOKEN_FIELDS` is a
    list of whole numbers.

    Raises:
        ValueError: the file is damaged, a record has no such field, a text is not UTF-8, or an id is too large.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{shown_path(path)}: expected a name in UTF-8, which its reader needs: rename it") from error
    records = _parquet if suffix_of(path) in PARQUET_SUFFIXES else _array_records
    documents: list[Document] = []
    for index, value in enumerate(records(path, text_field)):
        here, where = f"{name}#{index}", f"{shown_path(path)} record {index}"
        if value is None or not len(value):
            left_out.add("record(s) without text", here)
        elif isinstance(value, np.ndarray):
            if value.dtype.kind not in "iu":
                raise ValueError(f"{where}: expected whole token ids, got {shown(value.dtype, 40)} in the list")
            check_ids(value, vocab_size, where)
            if value.size > 1:
                offset = spool.add(value.astype(np.int32).tobytes())
                documents.append(SpooledTokens(here, spool, offset, value.size))
            else:
                left_out.add("of a single token, which predicts nothing", here)
        else:
            text = _encoded(value, where)
            documents.append(SpooledDocument(here, spool, spool.add(text), len(text)))
    if not documents and not left_out:
        left_out.add("without records", name)
    return documents


def _encoded(value: object, where: str) -> bytes:
    try:
        if isinstance(value, str):
            return value.encode()
        if isinstance(value, bytes):
            value.decode()
            return value
    except UnicodeError as error:
        raise ValueError(f"{where}: expected text in UTF-8, got {shown(error)}") from error
    raise ValueError(f"{where}: expected a text or a list of token ids, got {shown(type(value).__name__)}")


def _parquet(path: Path, text_field: str) -> Iterator[str | bytes | np.ndarray | None]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError as error:
        raise ValueError(f"{shown_path(path)}: Parquet needs pyarrow, which is missing: pip install pyarrow") from error
    try:
        with pq.ParquetFile(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
        column = _column(path, text_field, schema.names)
        kind = schema.field(column).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        listed = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        good = pa.types.is_integer(kind.value_type) if listed else _is_text(pa, kind)
        if not good:
            raise ValueError(
                f"{shown_path(path)}: expected texts or lists of token ids in column {shown(column)!r} (--text-field), "
                f"got {shown(kind)}"
            )
        if rows:
            # The stub calls every dataset's elements unknown.
            for row in cast(Any, grain.experimental.ParquetIterDataset(str(path), page_checksum_verification=True)):
                yield row[column]
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{shown_path(path)}: expected a whole Parquet file, got {shown_error(error)}") from error


def _is_text(pa: Any, kind: Any) -> bool:
    types = pa.types
    return any(
        test(kind)
        for test in (
            types.is_string,
            types.is_large_string,
            types.is_string_view,
            types.is_binary,
            types.is_large_binary,
        )
    )


def _column(path: Path, text_field: str, names: list[str]) -> str:
    for name in (text_field, *TOKEN_FIELDS):
        if name in names:
            return name
    raise ValueError(
        f"{shown_path(path)}: expected a column {shown(text_field)!r} (--text-field), "
        f"got {shown(', '.join(map(repr, names)) or 'none')}"
    )


def _array_records(path: Path, text_field: str) -> Iterator[bytes | np.ndarray | None]:
    try:
        source = cast(Sequence[bytes], grain.sources.ArrayRecordDataSource(str(path)))
        for index in range(len(source)):
            yield _record(source[index], text_field, f"{shown_path(path)} record {index}")
    except (RuntimeError, OSError, IndexError) as error:
        raise ValueError(f"{shown_path(path)}: expected a whole ArrayRecord file, got {shown_error(error)}") from error


def _record(record: bytes, text_field: str, where: str) -> bytes | np.ndarray | None:
    """The text of a record, which is an example's feature or else the record itself; or its token ids."""
    example = _Example()
    try:
        example.ParseFromString(record)
    except message.DecodeError:
        return record
    features = {entry.key: entry.value for entry in example.features.feature}
    if not features or example.ByteSize() != len(record):
        return record
    name = _column(Path(where), text_field, list(features))
    feature = features[name]
    if feature.int64_list.value:
        return np.array(feature.int64_list.value, np.int64)
    values = feature.bytes_list.value
    if len(values) > 1 or feature.float_list.value:
        raise ValueError(f"{where}: expected one text or a list of token ids in {shown(name)!r}, got another list")
    return values[0] if values else None
