"""CRC-32C (Castagnoli), in NumPy: many runs of the data at once, combined by shifts.

A CRC is linear over GF(2): that of a whole is the XOR of the CRCs of its parts, each moved on by
the number of bytes that follow it. Polynomial and reflection as in RFC 3720, appendix B.4.
"""

from __future__ import annotations

from functools import cache

import numpy as np

_POLYNOMIAL = 0x82F63B78
_RUN = 256  # bytes of one run
_SHORT = 64  # up to so many bytes (the length in front of each record), one after another is faster


@cache
def _table() -> np.ndarray:
    """What a byte does to the state."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ _POLYNOMIAL, table >> 1).astype(np.uint32)
    return table


@cache
def _numbers() -> tuple[int, ...]:
    return tuple(_table().tolist())


@cache
def _shift(doublings: int) -> np.ndarray:
    """[4, 256]: where each byte of a state goes when _RUN * 2^doublings zero bytes follow."""
    if doublings == 0:
        state = (np.uint32(1) << np.arange(32, dtype=np.uint32)).astype(np.uint32)
        for _ in range(_RUN):
            state = _table()[state & 0xFF] ^ (state >> np.uint32(8))
    else:
        bits = (np.uint32(1) << np.arange(32, dtype=np.uint32)).astype(np.uint32)
        state = _apply(_shift(doublings - 1), _apply(_shift(doublings - 1), bits))
    tables = np.zeros((4, 256), dtype=np.uint32)
    for byte in range(4):
        for bit in range(8):
            chosen = (np.arange(256) >> bit & 1).astype(bool)
            tables[byte, chosen] ^= state[8 * byte + bit]
    return tables


def _apply(tables: np.ndarray, state: np.ndarray) -> np.ndarray:
    moved = np.zeros_like(state)
    for byte in range(4):
        moved ^= tables[byte][(state >> np.uint32(8 * byte)) & np.uint32(0xFF)]
    return moved


def crc32c(data: bytes) -> int:
    """The CRC-32C of the bytes."""
    if len(data) <= _SHORT:
        table, state = _numbers(), 0xFFFFFFFF
        for byte in data:
            state = table[(state ^ byte) & 0xFF] ^ (state >> 8)
        return state ^ 0xFFFFFFFF
    head = np.frombuffer(data, dtype=np.uint8)
    # The start state of all ones is the same as inverted first bytes; zero bytes in front of that
    # change nothing, so they fill up to whole runs.
    runs = -(-len(head) // _RUN)
    levels = (runs - 1).bit_length()
    padded = np.zeros((1 << levels) * _RUN, dtype=np.uint8)
    start = len(padded) - len(head)
    padded[start:] = head
    padded[start : start + 4] ^= 0xFF
    columns = np.ascontiguousarray(padded.reshape(-1, _RUN).T).astype(np.uint32)
    state = np.zeros(columns.shape[1], dtype=np.uint32)
    for column in columns:
        state = _table()[(state ^ column) & np.uint32(0xFF)] ^ (state >> np.uint32(8))
    for level in range(levels):
        state = _apply(_shift(level), state[0::2]) ^ state[1::2]
    return int(state[0]) ^ 0xFFFFFFFF


def masked_crc32c(data: bytes) -> int:
    """The CRC as TFRecord stores it: rotated by 15 bits and shifted by a constant."""
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
