"""These tests reach every place of the CUDA kernels: each line of the sources, in each kernel that it is compiled into and
at each call that it is inlined into, each branch both ways, each loop more than once. What cannot be reached is below.
"""

from __future__ import annotations

import re

import pytest

from ptx import build

# kernel, place (its source lines, the inner one first): why nothing can come there
TYPES = r"Type::k(Float32|BFloat16)|__half|__uint_as_float|low\.x|uint2|load_element<F>\(data"
INNER = r"^(?:(?! <- ).)*"
UNREACHABLE = [
    (r"<\(.*Type\)0, ", TYPES, "with x in float32 the parameters are float32"),
    (r"<\(.*Type\)2, ", INNER + r"(Type::kBFloat16|__half|low\.x|2half2)", "with x in bfloat16 no parameter is float16"),
    (r"<\(.*Type\)3, ", INNER + r"(Type::kBFloat16|<< 16)", "with x in float16 no parameter is bfloat16"),
    (r", 64>", r"members > 1|s < samples|at\.member < problem\.samples|s < problem\.samples", "batches over 16 have one sample"),
    ("", r"grad_kl\.(data|type)|load_element<\w+>\(data, type, 0\)", "the KL's gradient has the type that is computed in"),
    (r"forward_kernel|rows_backward|finish|parts|small|chain|factors|backward_kernel<[(12]", r"if \(!p\.key\)", "layers and look-ups have a key"),
    (r"finish|sample_backward|rows_backward|(small|chain)_gradient", r"^quad\.cuh:\d+ if \(type == Type::kBFloat16\)(?!.* <- )", "so it has"),
    (r"<\(.*Type\)[23], ", INNER + r" : outside;$", "conversions from the other type of 16 bits"),
    (r"backward_kernel<.*(0, 4|, 64)>|kernel<[12], ", r"i \+= kThreads\) \{ <- .*kVector", "a stage has at most one vector a thread"),
    (r"kernel<[12], [14]>", r"i \+= kThreads\) \{ <- .*int, 1>", "nor more than one element"),
    (r"backward_kernel<[12], 1>", r"i \+= kThreads\) \{ <- .*load_inputs", "nor of one row's inputs"),
    ("finish|small_parts", r"p\.row_factors", "a bias has no row's factor, weights have"),
    ("WholeQuad", r"is_vector|inside\(k\) \?.* <- .*column_factors", "aligned weights have aligned factors"),
    ("double", r"double (log_lane|exp_lane|exp_minus)|log\(|exp\(", "CUDA's own functions at the ends of their range"),
    ("finish", r"/ problem\.batch|problem\.samples \* problem\.batch|% quads", "division of numbers above 2^32"),
    ("outputs_kernel|signs_kernel", r"ActivationQuad|quads, counter|% problem\.outputs", "the same"),
    ("outputs_kernel<double>", r"part < problem\.parts", "the fused kernels, whose sums have parts, take no float64"),
    ("chain", r"^quad\.cuh:\d+ for \(unsigned warp", "the compiler takes the few warps of a block at once"),
    ("chain_gradient", r"quad\.inside\(k\)", "a quad of a tensor whose columns are counted from 0 has a first element"),
    (r"chain_parts_kernel<\(.*Type\)0>", r"<- .*g\.fill", "sums of float32 take no padding"),
    (r"chain.*<\(.*Type\)0>", r"^chain\.cuh:\d+ for .*\(end - features\)", "in float32 that is one feature of at most 128 rows"),
    ("sample", r"if \(problem\.weight\)", "a pass that draws has somewhere to draw to"),
]


def described(missed) -> list[str]:
    sources = {path.name: path.read_text().splitlines() for path in build.CSRC.rglob("*") if path.is_file()}

    def line(place):
        name, number = place.rsplit(":", 1)
        return f"{place} {sources[name][int(number) - 1].strip()}"

    names = {one.kernel: build.short_name(one.kernel) for one in missed}
    found = []
    for one in missed:
        kernel, text = names[one.kernel], " <- ".join(map(line, one.place))
        if "taken" in one.what and re.match(r"\S+ for \(", text):
            continue  # whether a loop has a first round; that it has a second is "repeated"
        if not any(re.search(k, kernel) and re.search(t, text) for k, t, _ in UNREACHABLE):
            found.append(f"{kernel}: {one.what}: {text}")
    return sorted(found)


def test_every_place_of_the_kernels_is_reached(interpreted, request):
    if not request.config.whole_of_ptx:
        pytest.skip("needs the whole of tests/ptx in one session")
    missed = described(interpreted.missed())
    assert not missed, f"{len(missed)} places:\n" + "\n".join(missed)
