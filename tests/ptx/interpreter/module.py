"""What a PTX module consists of.

Names that a nested `{ ... }` declares have been made unique within their function, so that the rest knows no
scopes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

SIZES = {
    "pred": 1,
    "b8": 1,
    "u8": 1,
    "s8": 1,
    "b16": 2,
    "u16": 2,
    "s16": 2,
    "f16": 2,
    "bf16": 2,
    "b32": 4,
    "u32": 4,
    "s32": 4,
    "f32": 4,
    "f16x2": 4,
    "bf16x2": 4,
    "tf32": 4,
    "b64": 8,
    "u64": 8,
    "s64": 8,
    "f64": 8,
}

DTYPES = {
    name: np.dtype(("f" if name in ("f16", "f32", "f64") else "i" if name[0] == "s" else "u") + str(size))
    for name, size in SIZES.items()
} | {"pred": np.dtype(bool)}


class Register(NamedTuple):
    name: str


class Immediate(NamedTuple):
    text: str


class Symbol(NamedTuple):
    name: str


class Address(NamedTuple):
    base: object  # Register, Symbol or Immediate
    offset: int


class Vector(NamedTuple):
    items: tuple


class Pair(NamedTuple):  # d|p
    first: object
    second: object


class Not(NamedTuple):  # !p
    register: object


class Instruction(NamedTuple):
    opcode: tuple  # ("add", "rn", "f32")
    operands: tuple
    guard: object  # Register, Not or None
    lines: tuple  # "file:line", innermost first, then where it was inlined
    text: str


class Param(NamedTuple):
    name: str
    offset: int
    size: int
    alignment: int


class Variable(NamedTuple):
    name: str
    space: str  # shared, local, const, global or param
    alignment: int
    size: int  # 0: the dynamic shared memory
    data: object = None  # bytes of const and global variables


@dataclass
class Body:
    registers: dict = field(default_factory=dict)  # name -> type
    variables: dict = field(default_factory=dict)  # name -> Variable
    labels: dict = field(default_factory=dict)  # name -> index of the instruction it precedes
    instructions: list = field(default_factory=list)


@dataclass
class Function:
    name: str
    params: list
    results: list
    parse_body: object  # () -> Body: most kernels of a module are never run


@dataclass
class Module:
    kernels: dict = field(default_factory=dict)
    functions: dict = field(default_factory=dict)  # .func with a body
    variables: dict = field(default_factory=dict)
    loaded: object = None  # the machine's: the variables in memory
    programs: dict = field(default_factory=dict)  # the machine's: name -> Program
