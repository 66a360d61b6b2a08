"""Kernel -> Program: calls inlined, memory laid out, every instruction decoded once into a closure on the
machine's state.
"""

from __future__ import annotations

import numpy as np

from .faults import LaneFault
from .memory import PARAM_WINDOW
from .module import DTYPES, SIZES, Address, Immediate, Not, Pair, Register, Symbol, Vector
from .operations import operation

_NARROWEST = ("ld", "st", "atom", "red", "cp", "ldmatrix", "stmatrix")


class Program:
    def __init__(self, module, kernel, variables):
        """`variables` gives the addresses of the module's const and global variables."""
        self.kernel, self.name = kernel, kernel.name
        self.instructions, self.labels = [], {}
        self.slots, self.types = {}, []  # registers
        self.symbols = dict(variables)
        self.sizes = {"shared": 0, "local": 0}
        for param in kernel.params:
            self.symbols[param.name] = PARAM_WINDOW + param.offset
        self._inline(module, kernel, "", {}, (), None)
        self._place_shared(module)
        self.carry = len(self.types)  # the condition code register
        self.types.append("pred")
        self.shift = self._cell_shift()
        self.steps = []  # the machine's
        self.outcomes = set()  # (place, went ahead) of what has been executed, for coverage.py

    def _inline(self, module, function, prefix, params, stack, end):
        """Appends the instructions of a function, its names prefixed; `params` renames its parameters to the
        caller's.
        """
        if function.name in stack:
            raise ValueError(f"PTX of {self.name}: recursive call of {function.name}")
        stack += (function.name,)
        body = function.parse_body()

        def rename(name):
            if name in params:
                return params[name]
            local = name in body.registers or name in body.variables or name in body.labels
            return prefix + name if local else name

        for name, kind in body.registers.items():
            self.slots[prefix + name] = len(self.types)
            self.types.append(kind)
        for name, variable in body.variables.items():
            self._place("shared" if variable.space == "shared" else "local", prefix + name, variable)
        at = {}
        for name, index in body.labels.items():
            at.setdefault(index, []).append(prefix + name)
        for index, instruction in enumerate(body.instructions):
            self.labels.update((name, len(self.instructions)) for name in at.get(index, ()))
            renamed = _renamed(instruction, rename)
            if renamed.opcode[0] == "call":
                self._call(module, renamed, f"{prefix}{len(self.instructions)}:", stack)
            elif renamed.opcode[0] == "ret" and end:
                self.instructions.append(renamed._replace(opcode=("bra",), operands=(Symbol(end),)))
            else:
                self.instructions.append(renamed)
        self.labels.update((name, len(self.instructions)) for name in at.get(len(body.instructions), ()))

    def _call(self, module, instruction, prefix, stack):
        names = [operand for operand in instruction.operands if isinstance(operand, Symbol)]
        lists = [operand.items for operand in instruction.operands if isinstance(operand, Vector)]
        callee = module.functions.get(names[0].name) if names else None
        if callee is None or instruction.guard:
            self.instructions.append(instruction)  # decoded as unknown, or as a failed assertion
            return
        formal = [param.name for param in callee.results + callee.params]
        actual = [operand.name for items in lists for operand in items]
        end = prefix + "end"
        self._inline(module, callee, prefix, dict(zip(formal, actual, strict=True)), stack, end)
        self.labels[end] = len(self.instructions)

    def _place(self, space, name, variable):
        self.sizes[space] = -(-self.sizes[space] // variable.alignment) * variable.alignment
        self.symbols[name] = self.sizes[space]
        self.sizes[space] += variable.size

    def _place_shared(self, module):
        """Static variables of the module that this kernel names, and behind them the dynamic memory."""
        used = {name for instruction in self.instructions for name in _symbols(instruction.operands)}
        found = [v for v in module.variables.values() if v.space == "shared" and v.name in used]
        for variable in found:
            if variable.size:
                self._place("shared", variable.name, variable)
        dynamic = [variable for variable in found if not variable.size]
        alignment = max([16] + [variable.alignment for variable in dynamic])
        if dynamic:
            self.sizes["shared"] = -(-self.sizes["shared"] // alignment) * alignment
        for variable in dynamic:
            self.symbols[variable.name] = self.sizes["shared"]

    def _cell_shift(self):
        """The race detector's cells are as small as the narrowest access of the kernel."""
        sizes = [8]
        for instruction in self.instructions:
            if instruction.opcode[0] in _NARROWEST and "param" not in instruction.opcode:
                sizes.append(
                    {"ldmatrix": 2, "stmatrix": 2, "cp": 4}.get(instruction.opcode[0])
                    or SIZES.get(instruction.opcode[-1], 1)
                )
        return min(sizes).bit_length() - 1

    # Operands. A reader is a function (state, pick) -> array, `pick` being None for all lanes or the lanes'
    # indices.

    def read(self, operand, kind):
        want = DTYPES[kind]
        if isinstance(operand, Register):
            return self._read_register(operand, want)
        if isinstance(operand, Not):
            inner = self.read(operand.register, kind)
            return lambda state, pick: ~inner(state, pick)
        if isinstance(operand, Immediate):
            value = _immediate(operand.text, want)
        elif isinstance(operand, Symbol) and operand.name in self.symbols:
            value = np.array([self.symbols[operand.name]], np.uint64).astype(f"u{want.itemsize}").view(want)
        elif isinstance(operand, Address) and isinstance(operand.base, Symbol):
            address = self.read_address(operand)
            return lambda state, pick: address(state, pick).astype(want)
        elif isinstance(operand, Symbol) and operand.name.startswith("%"):
            return self._read_special(operand.name, want)
        elif isinstance(operand, Symbol) and operand.name == "WARP_SZ":
            value = np.array([32], want)
        else:
            raise NotImplementedError(f"the operand {operand}")
        return lambda state, pick: value

    def _read_register(self, operand, want):
        slot, stored = self.slots[operand.name], storage(self.types[self.slots[operand.name]])
        if stored == want:

            def read(state, pick):
                value = state.registers[slot]
                return value if pick is None or value.size == 1 else value[pick]

        elif stored.itemsize == want.itemsize:

            def read(state, pick):
                value = state.registers[slot].view(want)
                return value if pick is None or value.size == 1 else value[pick]

        else:
            narrow = np.dtype(f"u{want.itemsize}")

            def read(state, pick):
                value = state.registers[slot]
                value = value if pick is None or value.size == 1 else value[pick]
                return value.astype(narrow).view(want)

        return read

    def _read_special(self, name, want):
        def read(state, pick):
            value = state.special(name).astype(want)
            return value if pick is None or value.size == 1 else value[pick]

        return read

    def read_address(self, operand):
        """Reader of an address, as int64."""
        base, offset = operand.base, operand.offset
        if isinstance(base, Register) and SIZES[self.types[self.slots[base.name]]] == 4:
            read = self._read_register(base, np.dtype(np.uint32))
            return lambda state, pick: read(state, pick).astype(np.int64) + offset
        if isinstance(base, Register):
            read = self._read_register(base, np.dtype(np.int64))
            return (lambda state, pick: read(state, pick) + offset) if offset else read
        if isinstance(base, Immediate):
            value = np.array([int(base.text.rstrip("U"), 0) + offset], np.int64)
        else:
            value = np.array([self.symbols[base.name] + offset], np.int64)
        return lambda state, pick: value

    def write(self, operand, kind):
        """(slot, function to the type that the register is stored in, or None where it is the same); None for
        `_`.
        """
        if isinstance(operand, Symbol) and operand.name == "_":
            return None, None
        slot = self.slots[operand.name]
        have, stored = DTYPES[kind], storage(self.types[slot])
        if have == stored:
            return slot, None
        if have.itemsize == stored.itemsize:
            return slot, lambda value: value.view(stored)
        bits = np.dtype(f"u{have.itemsize}") if have.kind == "f" else have
        return slot, lambda value: value.view(bits).astype(np.dtype(f"u{stored.itemsize}")).view(stored)

    def writers(self, operand, kind):
        return [
            self.write(item, kind) for item in (operand.items if isinstance(operand, Vector) else (operand,))
        ]

    def arithmetic(self, instruction):
        """The step of an instruction that computes one register from others; None for an opcode that is not
        known.
        """
        found = operation(instruction.opcode)
        if found is None:
            return None
        result, kinds, function = found
        slot, convert = self.write(instruction.operands[0], result)
        readers = [
            self.read(operand, kind) for operand, kind in zip(instruction.operands[1:], kinds, strict=True)
        ]
        if convert:
            plain = function
            function = lambda *values: convert(plain(*values))  # noqa: E731
        return _step(slot, function, readers)


def _step(slot, function, readers):
    if len(readers) == 1:
        (a,) = readers

        def step(state):
            state.set(slot, function(a(state, state.pick)))

    elif len(readers) == 2:
        a, b = readers

        def step(state):
            pick = state.pick
            state.set(slot, function(a(state, pick), b(state, pick)))

    else:

        def step(state):
            pick = state.pick
            state.set(slot, function(*[read(state, pick) for read in readers]))

    return step


def storage(kind):
    """The type in which registers of a declared type are kept."""
    return DTYPES["b16"] if kind == "f16" else DTYPES[kind]


def _immediate(text, want):
    if text[:2].lower() in ("0f", "0d"):
        bits = np.dtype(f"u{4 if text[1] in 'fF' else 8}")
        value = np.array([int(text[2:], 16)], bits)
        if want.itemsize == bits.itemsize:
            return value.view(want)
        return value.view(f"f{bits.itemsize}").astype(want)
    number = int(text.rstrip("U"), 0)
    if want == bool:
        return np.array([number != 0])
    return np.array([number % (1 << 8 * want.itemsize)], f"u{want.itemsize}").view(want)


def unknown(instruction):
    def step(state):
        raise LaneFault("unknown instruction", instruction.text)

    return step


def _renamed(instruction, rename):
    def visit(operand):
        if isinstance(operand, (Register, Symbol)):
            return type(operand)(rename(operand.name))
        if isinstance(operand, Address):
            return Address(visit(operand.base), operand.offset)
        if isinstance(operand, Vector):
            return Vector(tuple(visit(item) for item in operand.items))
        if isinstance(operand, Pair):
            return Pair(visit(operand.first), visit(operand.second))
        return Not(visit(operand.register)) if isinstance(operand, Not) else operand

    guard = instruction.guard and visit(instruction.guard)
    return instruction._replace(operands=tuple(map(visit, instruction.operands)), guard=guard)


def _symbols(operands):
    for operand in operands:
        if isinstance(operand, Symbol):
            yield operand.name
        elif isinstance(operand, Address):
            yield from _symbols((operand.base,))
        elif isinstance(operand, Vector):
            yield from _symbols(operand.items)
