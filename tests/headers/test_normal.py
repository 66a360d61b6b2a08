"""The normals of csrc/normal.h against long double, every lane type against the scalar, the reference too."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from headers.ulp import awkward_words, normals, radius_and_angle, ulps

from bnn_fast.operators.noise import normal4, standard_normal

# largest error in ulp, a little above what was measured
BOUNDS = {
    "scalar_float": {"radius": 2.4, "sine": 2.8, "cosine": 2.8, "normal": 5.0},
    "scalar_double": {"radius": 1.8, "sine": 2.3, "cosine": 2.3, "normal": 4.0},
}


@pytest.mark.parametrize("lane", BOUNDS)
def test_accuracy(headers, lane):
    words = awkward_words(4_000_000 if lane == "scalar_float" else 1_000_000)
    for function, truth in zip(("radius", "sine", "cosine"), radius_and_angle(words, words)):
        errors = ulps(headers.on_word(lane, function, words), truth)
        print(f"{lane} {function}: at most {errors.max():.3f} ulp over {words.size} words")
        assert errors.max() <= BOUNDS[lane][function]
    words = np.stack([awkward_words(1_000_000, seed) for seed in range(4)])
    words = np.random.default_rng(5).permuted(words, axis=1)
    errors = ulps(headers.normal4(lane, words), normals(words))
    print(f"{lane} normal: at most {errors.max():.3f} ulp over {words.size} normals")
    assert errors.max() <= BOUNDS[lane]["normal"]


def test_every_lane_type_gives_the_scalars_bits(headers, float_lanes):
    words = awkward_words(1_000_003)
    expected = {
        f: headers.on_word("scalar_float", f, words).view(np.uint32) for f in ("radius", "sine", "cosine")
    }
    for lane in float_lanes:
        for function, bits in expected.items():
            assert np.array_equal(headers.on_word(lane, function, words).view(np.uint32), bits), (
                lane,
                function,
            )


@pytest.mark.parametrize(
    "seed, stream, sample, row",
    [(0, 0, 0, 0), (2**64 - 1, 1, 2**32 - 1, 2**32 - 1), (0x0123456789ABCDEF, 3, 17, 123456)],
)
def test_a_row_of_noise_is_the_same_on_every_lane_type_and_in_the_reference(
    headers, seed, stream, sample, row
):
    n = 64 * 1024
    key = torch.tensor([seed - (seed >> 63 << 64), sample])
    for scalar, dtype in (("scalar_float", torch.float32), ("scalar_double", torch.float64)):
        expected = headers.draw(scalar, seed, stream, sample, row, n)
        assert abs(expected.mean()) < 0.02 and abs(expected.std() - 1) < 0.02
        noise = standard_normal(key, 1, 1, n, stream=stream, row_offset=row, dtype=dtype)[
            0, 0
        ].numpy()
        if dtype == torch.float64:
            assert ulps(noise, expected.astype(np.longdouble)).max() <= 4
            continue
        assert np.array_equal(noise.view(np.uint32), expected.view(np.uint32))
        for lane, (_, lane_dtype) in headers.lanes().items():
            if lane_dtype == "float32":
                assert np.array_equal(
                    headers.draw(lane, seed, stream, sample, row, n).view(np.uint32), expected.view(np.uint32)
                ), lane


def test_the_references_normals_have_the_headers_bits_on_awkward_words(headers):
    words = np.stack([awkward_words(1_000_000, seed) for seed in range(4)])
    expected = headers.normal4("scalar_float", words)
    got = normal4(*(torch.from_numpy(w.astype(np.int64)) for w in words), torch.float32)
    assert np.array_equal(torch.stack(got).numpy().view(np.uint32), expected.view(np.uint32))


def test_the_largest_and_smallest_radius(headers):
    """Word 0 stands for u = 2^-33 and the last one for 1 - 2^-33, whose radius must not round to 0."""
    words = np.array([0, 2**32 - 1], dtype=np.uint32)
    expected = [math.sqrt(66 * math.log(2)), 2.0**-16]
    for lane in headers.lanes():
        assert headers.on_word(lane, "radius", words) == pytest.approx(expected, rel=1e-6)
