"""csrc/philox.h against Random123's known answers, and every lane type against them and the scalar one."""

from __future__ import annotations

import numpy as np
import pytest

# philox4x32 10 in Random123's tests/kat_vectors: counter, key, words
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, words", KNOWN)
def test_known_answers(headers, counter, key, words):
    for lane in headers.lanes():
        got = headers.philox(lane, np.array([counter] * 33, dtype=np.uint32).T, *key)
        assert (got == np.array(words, dtype=np.uint32)[:, None]).all(), lane


def test_lanes_do_not_mix(headers, float_lanes):
    counters = np.random.default_rng(1).integers(0, 2**32, (4, 10007), dtype=np.uint32)
    expected = headers.philox("scalar_float", counters, 0x12345678, 0x9ABCDEF0)
    assert np.unique(expected).size > 0.999 * expected.size
    for lane in float_lanes:
        assert np.array_equal(headers.philox(lane, counters, 0x12345678, 0x9ABCDEF0), expected), lane
