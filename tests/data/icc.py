"""Colour profiles and PNG files built byte by byte, and the equations of CIE XYZ, Lab and sRGB."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

D50 = (0.9642, 1.0, 0.8249)
ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
"""Columns of Adobe RGB (1998): XYZ of red, green and blue, adapted to D50."""
ADOBE_GAMMA = 563 / 256
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))
"""The same of sRGB (IEC 61966-2-1)."""


def matrix_profile(columns: tuple[tuple[float, ...], ...], gamma: float) -> bytes:
    """A profile of an RGB space: three primaries and one gamma."""
    tags = {f"{channel}XYZ": _xyz(column) for channel, column in zip("rgb", columns, strict=True)}
    return _profile("RGB ", "XYZ ", tags | {f"{channel}TRC": _curve(gamma) for channel in "rgb"})


def grey_profile(gamma: float) -> bytes:
    """A profile of a grey scale."""
    return _profile("GRAY", "XYZ ", {"kTRC": _curve(gamma)})


def cmyk_profile(corners: Mapping[tuple[int, ...], tuple[int, int, int]]) -> bytes:
    """A profile of inks by the Lab colours, in 8 bits, of corners (c, m, y, k in {0, 1}); else white."""
    ramp = bytes(range(256))
    points = [tuple(int(bit) for bit in f"{number:04b}") for number in range(16)]
    table = b"".join(bytes(corners.get(point, (255, 128, 128))) for point in points)
    matrix = struct.pack(">9i", *(65536 if i % 4 == 0 else 0 for i in range(9)))
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + ramp * 4 + table + ramp * 3
    return _profile("CMYK", "Lab ", {"A2B0": lut}, kind="prtr")


def to_srgb(xyz: NDArray[np.float64]) -> NDArray[np.float64]:
    """XYZ (D50, (..., 3)) to sRGB levels, 0 to 255."""
    linear = (xyz @ np.linalg.inv(np.array(SRGB))).clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def xyz_of_lab(lab: tuple[float, float, float]) -> NDArray[np.float64]:
    """CIE 1976 L*a*b* to XYZ, both under D50."""
    y = (lab[0] + 16) / 116
    f = np.array([y + lab[1] / 500, y, y - lab[2] / 200])
    return np.array(D50) * np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))


def write_png(file: Path, bits: int, colour: int, rows: list[bytes], **chunks: bytes) -> None:
    """A PNG of so many bits a channel, grey (colour 0) or RGB (2), with further chunks before its pixels."""
    samples = {0: 1, 2: 3}[colour]
    width = len(rows[0]) * 8 // (bits * samples)
    header = struct.pack(">2I5B", width, len(rows), bits, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = {"IHDR": header, **chunks, "IDAT": pixels, "IEND": b""}
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(map(_chunk, parts, parts.values())))


def _chunk(name: str, data: bytes) -> bytes:
    content = name.encode() + data
    return struct.pack(">I", len(data)) + content + struct.pack(">I", zlib.crc32(content))


def _fixed(*values: float) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def _xyz(values: tuple[float, ...]) -> bytes:
    return b"XYZ " + bytes(4) + _fixed(*values)


def _curve(gamma: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH2x", 1, round(gamma * 256))


def _profile(space: str, connection: str, tags: Mapping[str, bytes], kind: str = "mntr") -> bytes:
    tags = {"wtpt": _xyz(D50), **tags}
    start = 128 + 4 + 12 * len(tags)
    table, content = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name.encode() + struct.pack(">2I", start + len(content), len(data))
        content += data + bytes(-len(data) % 4)
    facts = f"{kind}{space}{connection}".encode()
    header = (
        struct.pack(">2I4x", start + len(content), 0)[:4] + bytes(4) + struct.pack(">I", 0x02400000) + facts
    )
    header += bytes(12) + b"acsp" + bytes(28) + _fixed(*D50)
    return header.ljust(128, b"\0") + table + content
