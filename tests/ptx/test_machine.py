"""The interpreter's control flow, memory and warp instructions, on PTX written by hand: no nvcc, no GPU."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from ptx.interpreter import GlobalMemory, PtxFault, launch, parse
from ptx.snippets import run

RANDOM = np.random.default_rng(11)
LANE = np.arange(32)


@pytest.mark.parametrize("width", [8, 32])
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffle(mode, width):
    value = RANDOM.integers(0, 2**32, 32, dtype=np.uint32)
    segment = (32 - width) << 8
    for by in (1, 3, 9):
        clamp = segment if mode == "up" else segment | 31
        code = f"shfl.sync.{mode}.b32 $r0|%p0, $0, {by}, {clamp}, -1; selp.u32 $r1, 1, 0, %p0;"
        result, inside = run(code, value, results=[np.uint32] * 2)
        base = LANE & -width
        source = {"up": LANE - by, "down": LANE + by, "bfly": LANE ^ by, "idx": base + by % width}[mode]
        expected = source >= base if mode == "up" else source < base + width
        np.testing.assert_array_equal(inside, expected)
        np.testing.assert_array_equal(result, value[np.where(expected, source, LANE)])


def test_shuffle_by_a_different_lane_each():
    value, source = RANDOM.integers(0, 2**32, 96, dtype=np.uint32), RANDOM.integers(
        0, 32, 96, dtype=np.uint32
    )
    result = run("shfl.sync.idx.b32 $r0, $0, $1, 31, 0xffffffff;", value, source, results=[np.uint32])
    np.testing.assert_array_equal(result, value[np.arange(96) // 32 * 32 + source])


def test_a_shuffle_waits_for_lanes_that_come_from_further_down():
    code = """setp.lt.u32 %p0, %tid, 16; mov.b32 $r0, 1; @%p0 bra below;
        above: shfl.sync.bfly.b32 $r0, $r0, 16, 31, -1; bra.uni end;
        below: mov.b32 $r0, 7; bra.uni above;
        end:"""
    np.testing.assert_array_equal(run(code, results=[np.uint32]), np.where(LANE < 16, 1, 7))


def test_votes_and_reductions():
    value = RANDOM.integers(0, 5, 64, dtype=np.uint32)
    value[32:] = 3
    warps = value.reshape(2, 32)
    vote = """
        setp.eq.u32 %p0, $0, 3; vote.sync.ballot.b32 $r0, %p0, -1;
        vote.sync.any.pred %p1, %p0, -1; selp.u32 $r1, 1, 0, %p1;
        vote.sync.all.pred %p1, %p0, -1; selp.u32 $r2, 1, 0, %p1;"""
    bits, some, every = run(vote, value, results=[np.uint32] * 3)
    expected = [sum(1 << i for i in range(32) if warp[i] == 3) for warp in warps]
    assert bits.reshape(2, 32)[:, 7].tolist() == expected
    np.testing.assert_array_equal(some.reshape(2, 32)[:, 0], (warps == 3).any(1))
    np.testing.assert_array_equal(every.reshape(2, 32)[:, 0], (warps == 3).all(1))
    for name, function in (
        ("add", np.add),
        ("min", np.minimum),
        ("max", np.maximum),
        ("xor", np.bitwise_xor),
    ):
        kind = "b32" if name == "xor" else "u32"
        result = run(f"redux.sync.{name}.{kind} $r0, $0, -1;", value, results=[np.uint32])
        np.testing.assert_array_equal(result.reshape(2, 32)[:, 5], function.reduce(warps, axis=1))
    result = run("match.any.sync.b32 $r0, $0, -1;", value, results=[np.uint32])
    assert [int(r) for r in result[:32]] == [
        sum(1 << j for j in range(32) if warps[0, j] == v) for v in warps[0]
    ]
    half = "setp.lt.u32 %p0, %tid, 16; mov.u32 $r0, 0; @!%p0 bra END; activemask.b32 $r0; END:"
    assert run(half, results=[np.uint32]).tolist() == [0xFFFF] * 16 + [0] * 16


STORE_TILE = """mov.u32 %y0, memory; shl.b32 %y1, %tid, 2; add.u32 %y1, %y1, %y0;
    st.shared.b32 [%y1], $0; st.shared.b32 [%y1+128], $1; st.shared.b32 [%y1+256], $2;
    st.shared.b32 [%y1+384], $3; bar.warp.sync -1;
    shl.b32 %y2, %tid, 4; add.u32 %y2, %y2, %y0;"""  # four 8x8 matrices of 16 bits, row after row


@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrix_loads(count):
    words = [RANDOM.integers(0, 2**32, 32, dtype=np.uint32) for _ in range(4)]
    matrices = np.stack(words).view(np.uint16).reshape(4, 8, 8)
    registers = ", ".join(f"$r{i}" for i in range(count))
    for suffix in ("", ".trans"):
        code = f"{STORE_TILE} ldmatrix.sync.aligned.m8n8.x{count}{suffix}.shared.b16 {{{registers}}}, [%y2];"
        results = run(code, *words, results=[np.uint32] * count, shared=512)
        for i, result in enumerate([results] if count == 1 else results):
            expected = matrices[i].T if suffix else matrices[i]
            np.testing.assert_array_equal(result.view(np.uint16).reshape(8, 8), expected)
    result = run("movmatrix.sync.aligned.m8n8.trans.b16 $r0, $0;", words[0], results=[np.uint32])
    np.testing.assert_array_equal(result.view(np.uint16).reshape(8, 8), matrices[0].T)


def as_words(values, kind):
    """[..., elements in a word] float64 -> words."""
    if kind == "tf32":
        return values.astype(np.float32).view(np.uint32)[..., 0]
    bits = (
        values.astype(np.float16).view(np.uint16)
        if kind == "f16"
        else (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    )
    return bits[..., 0].astype(np.uint32) | bits[..., 1].astype(np.uint32) << 16


@pytest.mark.parametrize(
    "kind, depth", [("f16", 16), ("bf16", 16), ("f16", 8), ("bf16", 8), ("tf32", 8), ("tf32", 4)]
)
def test_matrix_multiplication(kind, depth):
    a, b, c = (RANDOM.integers(-8, 9, shape).astype(float) for shape in ((16, depth), (depth, 8), (16, 8)))
    per, group, within = (1 if kind == "tf32" else 2), LANE >> 2, LANE & 3
    inside = [per * within + e for e in range(per)]  # along the depth, in the first register
    parts = range(depth // (4 * per))
    fragments = [
        np.stack([a[group + 8 * half, k + 4 * per * part] for k in inside], -1)
        for part in parts
        for half in (0, 1)
    ]
    words = [as_words(f, kind) for f in fragments]
    words += [as_words(np.stack([b[k + 4 * per * part, group] for k in inside], -1), kind) for part in parts]
    words += [c[group + 8 * (i >> 1), 2 * within + (i & 1)].astype(np.float32) for i in range(4)]
    names, sizes = iter(range(20)), (2 * len(parts), len(parts), 4)
    operands = ", ".join("{" + ", ".join(f"${next(names)}" for _ in range(size)) + "}" for size in sizes)
    code = f"mma.sync.aligned.m16n8k{depth}.row.col.f32.{kind}.{kind}.f32 {{$r0, $r1, $r2, $r3}}, {operands};"
    results = run(code, *words, results=[np.float32] * 4)
    expected = a @ b + c
    for i, result in enumerate(results):
        np.testing.assert_array_equal(result, expected[group + 8 * (i >> 1), 2 * within + (i & 1)])


@pytest.mark.parametrize(
    "name, kind, expected",
    [
        ("add", "u32", lambda v: np.r_[0, np.cumsum(v)]),
        ("max", "u32", lambda v: np.r_[0, np.maximum.accumulate(v)]),
        ("exch", "b32", lambda v: np.r_[0, v]),
        ("or", "b32", lambda v: np.r_[0, np.bitwise_or.accumulate(v)]),
    ],
)
def test_atomics_follow_one_another(name, kind, expected):
    value = RANDOM.integers(0, 1000, 32, dtype=np.uint32)
    code = (
        f"mov.u32 %y0, memory; setp.eq.u32 %p0, %tid, 0; @%p0 st.shared.u32 [%y0], 0; bar.sync 0; "
        f"atom.shared.{name}.{kind} $r0, [%y0], $0; bar.sync 0; ld.shared.u32 $r1, [%y0];"
    )
    before, after = run(code, value, results=[np.uint32] * 2, shared=4)
    np.testing.assert_array_equal(before, expected(value)[:-1])
    np.testing.assert_array_equal(after, expected(value)[-1])


def test_atomic_increment_and_compare():
    start = "mov.u32 %y0, memory; setp.eq.u32 %p0, %tid, 0; @%p0 st.shared.u32 [%y0], 0; bar.sync 0;"
    assert (
        run(start + "atom.shared.inc.u32 $r0, [%y0], 9;", results=[np.uint32], shared=4).tolist()
        == (LANE % 10).tolist()
    )
    code = start + "add.u32 %y1, %tid, 1; atom.shared.cas.b32 $r0, [%y0], %tid, %y1;"
    assert run(code, results=[np.uint32], shared=4).tolist() == LANE.tolist()
    code = start + "red.shared.add.f32 [%y0], 0f3F000000; bar.sync 0; ld.shared.f32 $r0, [%y0];"
    assert run(code, shared=4).tolist() == [16.0] * 32


def test_async_copy_fills_with_zeros():
    source = RANDOM.integers(1, 2**32, 128, dtype=np.uint32)
    length = np.resize(np.uint32([16, 12, 4, 0, 8, 7]), 32)
    code = """ld.param.u64 %x0, [p0]; mul.wide.u32 %x1, %tid, 16; add.u64 %x0, %x0, %x1; mov.u32 %y0, memory;
        shl.b32 %y1, %tid, 4; add.u32 %y0, %y0, %y1; cp.async.cg.shared.global.L2::128B [%y0], [%x0], 16, $1;
        cp.async.commit_group; cp.async.wait_group 0; ld.shared.v4.b32 {$r0, $r1, $r2, $r3}, [%y0];"""
    results = run(code, source, np.resize(length, 128), results=[np.uint32] * 4, shared=512)
    copied = np.stack([r[:32] for r in results], 1).copy().view(np.uint8)
    expected = source.view(np.uint8).reshape(32, 16) * (np.arange(16) < length[:, None])
    np.testing.assert_array_equal(copied, expected)


def test_vectors_generic_addresses_and_widths():
    code = """
        mov.u32 %y0, memory; shl.b32 %y1, %tid, 4; add.u32 %y0, %y0, %y1;
        cvt.u64.u32 %x0, %y0; cvta.shared.u64 %x0, %x0;
        st.v2.b32 [%x0], {$0, $1}; st.b8 [%x0+8], $0; st.b16 [%x0+10], $0;
        ld.shared.s8 $r0, [%y0+8]; ld.u8 $r1, [%x0+8];
        ld.shared.s16 $r2, [%y0+10]; ld.shared.v2.b32 {_, $r3}, [%y0];"""
    a, b = (RANDOM.integers(0, 2**32, 32, dtype=np.uint32) for _ in range(2))
    signed, unsigned, half, second = run(
        code, a, b, results=[np.int32, np.uint32, np.int32, np.uint32], shared=512
    )
    np.testing.assert_array_equal(signed, a.astype(np.int8))
    np.testing.assert_array_equal(unsigned, a & 255)
    np.testing.assert_array_equal(half, a.astype(np.int16))
    np.testing.assert_array_equal(second, b)


MODULE = """
.const .align 4 .f32 table[4] = {0f3F800000, 0f40000000, 0f40400000, 0f40800000};
.global .align 4 .u32 calls = 5;
.func (.param .b32 result) twice(.param .b32 value) {
    .reg .f32 %f<3>; .reg .pred %p1; .local .align 4 .b8 depot[4];
    ld.param.f32 %f1, [value]; setp.lt.f32 %p1, %f1, 0f40400000; mov.f32 %f2, 0fBF800000;
    @%p1 bra SMALL; st.param.f32 [result], %f2; ret;
    SMALL: st.local.f32 [depot], %f1; ld.local.f32 %f2, [depot]; add.f32 %f2, %f2, %f1;
    st.param.f32 [result], %f2; ret;
}
.entry test(.param .u64 out) {
    .reg .b32 %r<4>; .reg .b64 %rd<6>; .reg .f32 %f<3>;
    mov.u32 %r0, %tid.x; and.b32 %r1, %r0, 3;
    mul.wide.u32 %rd0, %r1, 4; mov.u64 %rd1, table; add.s64 %rd1, %rd1, %rd0; ld.const.f32 %f0, [%rd1];
    ld.param.u64 %rd2, [out]; mad.wide.u32 %rd2, %r0, 4, %rd2; mov.f32 %f1, 0f00000000;
    TARGETS: .branchtargets FIRST, CALL, CALL, CALL;
    brx.idx %r1, TARGETS;
    CALL: { .param .b32 one; .param .b32 back;
    st.param.f32 [one], %f0; call.uni (back), twice, (one); ld.param.f32 %f1, [back]; }
    FIRST: { .param .b32 one; .param .b32 back;
    st.param.f32 [one], %f1; call.uni (back), twice, (one); ld.param.f32 %f2, [back]; }
    add.f32 %f2, %f2, %f0; mov.u64 %rd3, calls; atom.global.add.u32 %r2, [%rd3], 1;
    st.global.f32 [%rd2], %f2; ret;
}
"""


def test_calls_tables_and_variables():
    out, memory = np.zeros(64, np.float32), GlobalMemory()
    memory.add(out.ctypes.data, out.nbytes)
    launch(parse(MODULE), "test", (1, 1, 1), (64, 1, 1), 0, [struct.pack("Q", out.ctypes.data)], memory)
    # table[0]: twice(0) + 1; the others: twice(twice(x)) + x, where twice gives -1 from 3 on
    assert out.reshape(-1, 4)[5].tolist() == [1.0, -1.0 + 2.0, -2.0 + 3.0, -2.0 + 4.0]


def test_loops_of_different_length_and_scopes():
    code = """
        mov.u32 $r0, 0; mov.u32 %y0, %tid;
        LOOP: { .reg .pred %p0; setp.eq.u32 %p0, %y0, 0; @%p0 bra END; }
        add.u32 $r0, $r0, %y0; sub.u32 %y0, %y0, 1; bra LOOP;
        END: @%p0 mov.u32 $r0, 7;"""
    assert run(code, results=[np.uint32]).tolist() == [i * (i + 1) // 2 for i in range(32)]


def test_threads_and_blocks_have_their_places():
    text = """.entry test(.param .u64 out) { .reg .b32 %r<12>; .reg .b64 %rd<2>;
        mov.u32 %r0, %tid.x; mov.u32 %r1, %tid.y; mov.u32 %r2, %tid.z;
        mov.u32 %r3, %ctaid.x; mov.u32 %r4, %ctaid.y; mov.u32 %r5, %ctaid.z;
        mad.lo.u32 %r6, %r5, 2, %r4; mad.lo.u32 %r6, %r6, 3, %r3; mad.lo.u32 %r6, %r6, 2, %r2;
        mad.lo.u32 %r6, %r6, 3, %r1; mad.lo.u32 %r6, %r6, 7, %r0;
        ld.param.u64 %rd0, [out]; mad.wide.u32 %rd0, %r6, 4, %rd0;
        mov.u32 %r7, %laneid; mov.u32 %r8, %warpid; mad.lo.u32 %r7, %r8, 32, %r7;
        st.global.u32 [%rd0], %r7; ret; }"""
    out, memory = np.zeros(3 * 2 * 2 * 42, np.uint32), GlobalMemory()
    memory.add(out.ctypes.data, out.nbytes, initialised=False)
    launch(parse(text), "test", (3, 2, 2), (7, 3, 2), 0, [struct.pack("Q", out.ctypes.data)], memory)
    assert out.tolist() == list(range(42)) * 12


def test_many_blocks_in_several_chunks():
    code = """setp.lt.u32 %p0, %tid, 1; mov.u32 %y0, memory; @%p0 st.shared.b32 [%y0], $0; bar.sync 0;
        ld.shared.b32 %y1, [%y0];
        add.u32 $r0, %y1, %tid;"""
    value = RANDOM.integers(0, 2**31, 1024 * 40, dtype=np.uint32)
    result = run(code, value, results=[np.uint32], shared=4, threads=1024)
    np.testing.assert_array_equal(
        result.reshape(40, 1024), value[::1024, None] + np.arange(1024, dtype=np.uint32)
    )


@pytest.mark.parametrize(
    "code, named",
    [
        ("dp4a.u32.u32 $r0, $0, $0, $0;", "dp4a.u32.u32"),
        ("add.f31 $r0, $0, $0;", "add.f31"),
        ("mov.u32 $r0, %clock;", "%clock"),
        (
            "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {$r0}, {$0}, {$0}, {$0};",
            "mma.sync.aligned.m16n8k32",
        ),
    ],
)
def test_unknown_instructions_are_named(code, named):
    with pytest.raises(PtxFault, match=f"unknown.*{named}"):
        run(code, np.uint32([1]), results=[np.uint32])


def test_memory_that_overlaps_or_is_unknown_is_refused():
    memory, buffer = GlobalMemory(), np.zeros(16, np.uint8)
    memory.add(buffer.ctypes.data, 16, "buffer")
    with pytest.raises(ValueError, match="overlap buffer"):
        memory.add(buffer.ctypes.data + 8, 4)
    with pytest.raises(KeyError):
        memory.remove(buffer.ctypes.data + 8)
    with pytest.raises(ValueError, match="params are of"):
        launch(parse(MODULE), "test", (1, 1, 1), (32, 1, 1), 0, [b"1234"], memory)
    memory.remove(buffer.ctypes.data)
    with pytest.raises(PtxFault, match="out-of-bounds"):
        launch(
            parse(MODULE), "test", (1, 1, 1), (32, 1, 1), 0, [struct.pack("Q", buffer.ctypes.data)], memory
        )
