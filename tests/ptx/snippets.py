"""PTX written by hand, run on arrays; and exact arithmetic to hold it against."""

from __future__ import annotations

import re
import struct
from fractions import Fraction

import numpy as np

from ptx.interpreter import GlobalMemory, launch, parse

TYPES = {
    np.dtype(np.float16): ("b16", "%rs"),
    np.dtype(np.uint16): ("b16", "%rs"),
    np.dtype(np.int16): ("b16", "%rs"),
    np.dtype(np.uint32): ("b32", "%r"),
    np.dtype(np.int32): ("b32", "%r"),
    np.dtype(np.float32): ("f32", "%f"),
    np.dtype(np.uint64): ("b64", "%rd"),
    np.dtype(np.int64): ("b64", "%rd"),
    np.dtype(np.float64): ("f64", "%fd"),
}


def run(code, *inputs, results=(np.float32,), shared=0, threads=32):
    """Each thread executes `code` with its elements of `inputs` in $0, $1, ... and leaves the results in $r0,
    $r1, ...
    """
    count = -(-max((len(a) for a in inputs), default=threads) // threads) * threads
    arrays = [np.resize(a, count) for a in inputs] + [np.zeros(count, kind) for kind in results]
    names = [f"${i}" for i in range(len(inputs))] + [f"$r{i}" for i in range(len(results))]
    declared, before, after = [], [], []
    for i, (name, array) in enumerate(zip(names, arrays)):
        kind, prefix = TYPES[array.dtype]
        register = f"{prefix}_{i}"
        declared.append(f".reg .{kind} {register};")
        code = re.sub(rf"\{name}\b", register, code)
        address = f"ld.param.u64 %address, [p{i}]; mad.wide.u32 %address, %index, {array.itemsize}, %address;"
        if name[1] == "r":
            after.append(f"{address} st.global.{kind} [%address], {register};")
        else:
            before.append(f"{address} ld.global.{kind} {register}, [%address];")
    params = ", ".join(f".param .u64 p{i}" for i in range(len(arrays)))
    text = f""".entry test({params}) {{
        .reg .b64 %address, %x<4>; .reg .b32 %index, %tid, %n, %y<8>; .reg .pred %p<4>;
        {f'.shared .align 16 .b8 memory[{shared}];' if shared else ''}
        {' '.join(declared)}
        mov.u32 %tid, %tid.x; mov.u32 %index, %ctaid.x; mov.u32 %n, %ntid.x;
        mad.lo.s32 %index, %index, %n, %tid;
        {' '.join(before)} {code} {' '.join(after)} ret; }}"""
    memory = GlobalMemory()
    for i, array in enumerate(arrays):
        memory.add(array.ctypes.data, array.nbytes, f"p{i}")
    pointers = [struct.pack("Q", array.ctypes.data) for array in arrays]
    launch(parse(text), "test", (count // threads, 1, 1), (threads, 1, 1), 0, pointers, memory)
    outputs = arrays[len(inputs) :]
    return outputs[0] if len(outputs) == 1 else outputs


def rounded(x, bits, least, largest, mode="rn"):
    """The exact x with a mantissa of `bits` bits, multiples of 2^least at the finest, as float64; beyond
    `largest`, what IEEE says.
    """
    if x == 0:
        return 0.0
    exponent = max(x.numerator.bit_length() - x.denominator.bit_length() - bits - 1, least)
    while abs(x) / Fraction(2) ** exponent >= 2**bits:
        exponent += 1
    scaled = x / Fraction(2) ** exponent
    low = scaled.numerator // scaled.denominator
    if mode == "rn":
        whole = round(scaled)  # half to even
    else:
        up = scaled != low and (mode == "rp" or mode == "rz" and x < 0)
        whole = low + up
    value = whole * Fraction(2) ** exponent
    if abs(value) > largest:
        to_largest = mode == "rz" or mode == "rm" and x > 0 or mode == "rp" and x < 0
        return (1 if x > 0 else -1) * (float(largest) if to_largest else np.inf)
    return float(value)


FORMATS = {
    "f16": (11, -24, Fraction(65504)),
    "bf16": (8, -133, Fraction(2) ** 128 - Fraction(2) ** 120),
    "f32": (24, -149, Fraction(2) ** 128 - Fraction(2) ** 104),
    "f64": (53, -1074, Fraction(2) ** 1024 - Fraction(2) ** 971),
}


def exactly(values, kind, mode="rn"):
    return np.array([rounded(x, *FORMATS[kind], mode) for x in values])


def fractions(*arrays):
    return [[Fraction(float(v)) for v in array] for array in arrays]


def floats32(count, seed=0):
    """Of all sizes, with many that make ties."""
    random = np.random.default_rng(seed)
    wide = random.standard_normal(count) * 2.0 ** random.integers(-60, 60, count)
    short = random.integers(-64, 64, count) * 2.0 ** random.integers(-40, 40, count)
    return np.where(random.random(count) < 0.5, wide, short).astype(np.float32)
