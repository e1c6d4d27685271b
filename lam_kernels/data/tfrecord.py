"""TFRecord files: length u64, masked CRC-32C of it u32, payload, masked CRC-32C of it u32."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lam_kernels.training.atomic_write import atomic_write

from .crc32c import masked_crc32c

_HEADER, _FOOTER = struct.Struct("<QI"), struct.Struct("<I")
MAX_RECORD_BYTES = 2**28  # a longer one is taken for a broken length


class CorruptRecord(Exception):
    """A record that cannot be used; the text names file, record number and what is wrong."""

    def __init__(self, path: Path | str, number: int, why: str):
        super().__init__(f"{path}: record {number}: {why}")
        self.path, self.number, self.why = str(path), number, why

    def __reduce__(self):  # it travels between worker processes
        return CorruptRecord, (self.path, self.number, self.why)


@dataclass(frozen=True)
class Record:
    """Where a payload lies."""

    path: Path
    number: int  # in its file, from 0
    offset: int  # of the payload
    length: int


def index_records(path: Path | str) -> tuple[list[Record], CorruptRecord | None]:
    """The records of a file by their headers alone; and what cuts the list short, if anything does.

    A broken length leaves no way to find the next record, so the rest of the file is lost with it.
    """
    path = Path(path)
    found: list[Record] = []
    size = path.stat().st_size
    with open(path, "rb") as file:
        at = 0
        while at < size:
            number = len(found)
            header = file.read(_HEADER.size)
            if len(header) < _HEADER.size:
                return found, CorruptRecord(path, number, "the file ends within its header")
            length, crc = _HEADER.unpack(header)
            if masked_crc32c(header[:8]) != crc:
                return found, CorruptRecord(path, number, "the checksum of its length is wrong")
            if length > MAX_RECORD_BYTES:
                why = f"its length of {length} bytes is above the limit of {MAX_RECORD_BYTES}"
                return found, CorruptRecord(path, number, why)
            end = at + _HEADER.size + length + _FOOTER.size
            if end > size:
                return found, CorruptRecord(path, number, "the file ends within it")
            found.append(Record(path, number, at + _HEADER.size, length))
            file.seek(end)
            at = end
    return found, None


def read_record(record: Record) -> bytes:
    """The payload, its checksum verified. Opens the file each time: safe in forked workers."""
    with open(record.path, "rb") as file:
        file.seek(record.offset)
        payload = file.read(record.length + _FOOTER.size)
    if len(payload) < record.length + _FOOTER.size:
        raise CorruptRecord(record.path, record.number, "the file ends within it")
    payload, footer = payload[: record.length], payload[record.length :]
    if masked_crc32c(payload) != _FOOTER.unpack(footer)[0]:
        raise CorruptRecord(record.path, record.number, "the checksum of its content is wrong")
    return payload


def write_records(path: Path | str, payloads: Iterable[bytes]) -> None:
    """A whole file or none."""
    parts = []
    for payload in payloads:
        length = struct.pack("<Q", len(payload))
        parts += [length, _FOOTER.pack(masked_crc32c(length)), payload]
        parts.append(_FOOTER.pack(masked_crc32c(payload)))
    os.makedirs(Path(path).parent, exist_ok=True)
    atomic_write(Path(path), b"".join(parts))
