"""Coded bytes of a piece <-> raw bytes: raw DEFLATE and its bounded inverse (FORMAT.md, Pieces)."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from itertools import accumulate

from qdeploy.errors import BundleError

WINDOW = -15  # raw DEFLATE, 32 KiB window
# (level, strategy, memory level): Huffman alone suits coded bits, matching suits structured bytes; the memory
# level sets how many symbols share a block: 2^(6 + memory level)
HUFFMAN = tuple((1, zlib.Z_HUFFMAN_ONLY, memory) for memory in (9, 8, 7))
MATCHING = (9, zlib.Z_DEFAULT_STRATEGY, 9)


def _deflate(data: bytes, setting: tuple[int, int, int], cuts: Sequence[int]) -> bytes:
    """One DEFLATE stream that ends a block at every cut."""
    level, strategy, memory = setting
    coder = zlib.compressobj(level, zlib.DEFLATED, WINDOW, memory, strategy)
    out, start = [], 0
    for cut in cuts:
        out += [coder.compress(data[start:cut]), coder.flush(zlib.Z_BLOCK)]
        start = cut
    return b"".join([*out, coder.compress(data[start:]), coder.flush()])


def encode(data: bytes) -> tuple[str, bytes]:
    """(codec, coded bytes) of bytes with structure; raw where DEFLATE saves nothing."""
    return _smaller(data, [_deflate(data, MATCHING, ())])


def encode_bits(segments: Sequence[bytes]) -> tuple[str, bytes]:
    """(codec, coded bytes) of the concatenation of `segments`, packed bits with statistics of their own each.

    A DEFLATE block (its own Huffman code) ends where that pays; the decoder does not notice.
    """
    data = b"".join(segments)
    tries = [_deflate(data, setting, ()) for setting in (*HUFFMAN, MATCHING)]
    tries.append(_deflate(data, HUFFMAN[0], _cuts(segments)))
    return _smaller(data, tries)


def cost_of_bits(segments: Sequence[bytes]) -> int:
    """About how many bytes `encode_bits` would need: a Huffman code for each segment, or raw."""
    return sum(min(len(segment), len(_deflate(segment, HUFFMAN[0], ()))) for segment in segments)


def _smaller(data: bytes, tries: Sequence[bytes]) -> tuple[str, bytes]:
    best = min(tries, key=len)
    return ("deflate", best) if len(best) < len(data) or not data else ("raw", data)


def _cuts(segments: Sequence[bytes]) -> list[int]:
    """Where blocks should end: neighbours are merged, left to right, as long as one Huffman code serves both better."""
    blocks: list[tuple[bytes, int]] = []
    for segment in filter(None, segments):
        blocks.append((segment, len(_deflate(segment, HUFFMAN[0], ()))))
        while len(blocks) > 1:
            both = blocks[-2][0] + blocks[-1][0]
            cost = len(_deflate(both, HUFFMAN[0], ()))
            if cost > blocks[-2][1] + blocks[-1][1]:
                break
            blocks[-2:] = [(both, cost)]
    return list(accumulate(len(block) for block, _ in blocks))[:-1]


def decode(codec: str, coded: bytes, raw: int, what: str) -> bytes:
    """Inverse of `encode`: exactly `raw` bytes, or BundleError. Never makes more than raw + 1 bytes."""
    if codec == "raw":
        data = coded
    else:
        decoder = zlib.decompressobj(WINDOW)
        try:
            data = decoder.decompress(coded, raw + 1)
        except zlib.error as e:
            raise BundleError(f"{what} is damaged ({e}): fetch it again") from e
        if not decoder.eof or decoder.unused_data or decoder.unconsumed_tail:
            raise BundleError(f"{what} is damaged: its stream does not end where it should; fetch it again")
    if len(data) != raw:
        raise BundleError(f"{what} is damaged: it decodes to another size than {raw} bytes; fetch it again")
    return data
