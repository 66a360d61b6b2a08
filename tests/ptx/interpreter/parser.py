"""PTX text -> Module."""

from __future__ import annotations

import functools
import re

from .module import (
    SIZES,
    Address,
    Body,
    Function,
    Immediate,
    Instruction,
    Module,
    Not,
    Pair,
    Param,
    Register,
    Symbol,
    Variable,
    Vector,
)

_COMMENT = re.compile(r'("[^"\n]*")|//[^\n]*|/\*.*?\*/', re.S)
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"[^\n]*', re.M)
_SECTION = re.compile(r"^\s*\.section\s+[^{]*\{.*?^\s*\}", re.M | re.S)
_FUNCTION = re.compile(
    r"(?:\.(?:visible|weak|extern|common)\s+)*\.(entry|func)\b\s*(?:\(([^)]*)\)\s*)?([\w$]+)\s*"
    r"(?:\(([^)]*)\))?([^{;]*)([{;])"
)
_VARIABLE = re.compile(
    r"(?:\.(?:visible|weak|extern|common)\s+)*\.(const|global|shared|local|param)\b([^;{=]*?)"
    r"\.(v[24]\s+\.)?(\w+)\s+([\w$%]+)\s*((?:\[\s*\d*\s*\]\s*)*)(?:=\s*([^;]*))?;"
)
_TOKEN = re.compile(r"\s*(?:(\.loc\s[^\n]*)|(\{)|(\})|([\w$%]+)\s*:(?!:)|([^;{}]*(?:\{[^}]*\}[^;{}]*)*);)")
_LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+(\d+)(?:.*inlined_at\s+(\d+)\s+(\d+)\s+(\d+))?")
_PARAM = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.(?:global|shared|const|local)\s+)?"
    r"(?:\.align\s+\d+\s+)?)?([\w$%]+)\s*(?:\[(\d+)\])?"
)
_NUMBER = re.compile(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|-?\d\w*")


def parse(text: str) -> Module:
    """The module that `text`, nvcc's output, describes. Raises ValueError where it is not understood."""
    text = _COMMENT.sub(lambda match: match[1] or " ", text)
    files = {match[1]: match[2].rsplit("/", 1)[-1] for match in _FILE.finditer(text)}
    text = _SECTION.sub("", _FILE.sub("", text))
    module, position = Module(), 0
    outside = []
    for match in iter(lambda: _FUNCTION.search(text, position), None):
        outside.append(text[position : match.start()])
        position = match.end()
        kind, results, name, params, _, opening = match.groups()
        if opening == ";":
            continue  # a declaration
        end = _closing_brace(text, position)
        parse_body = functools.cache(functools.partial(_parse_body, name, text[position:end], files))
        function = Function(name, _params(params), _params(results), parse_body)
        (module.kernels if kind == "entry" else module.functions)[name] = function
        position = end + 1
    outside.append(text[position:])
    for match in _VARIABLE.finditer("".join(outside)):
        variable = _variable(match)
        module.variables[variable.name] = variable
    return module


def _closing_brace(text, position):
    depth = 1
    for match in re.compile(r"[{}]").finditer(text, position):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return match.start()
    raise ValueError("PTX: a function without a closing brace")


def _params(text):
    params, offset = [], 0
    for match in _PARAM.finditer(text or ""):
        size = SIZES[match[2]] * int(match[4] or 1)
        alignment = int(match[1] or SIZES[match[2]])
        offset = -(-offset // alignment) * alignment
        params.append(Param(match[3], offset, size, alignment))
        offset += size
    return params


def _variable(match, name=None):
    space, attributes, vector, kind, own_name, dimensions, initial = match.groups()
    element = SIZES[kind]
    count = int(vector[1]) if vector else 1
    for dimension in re.findall(r"\[\s*(\d*)\s*\]", dimensions):
        count *= int(dimension or 0)
    alignment = re.search(r"\.align\s+(\d+)", attributes)
    data = None
    if space in ("const", "global"):
        numbers = [_constant(number, element) for number in re.findall(r"[\w.+-]+", initial or "")]
        data = b"".join(numbers).ljust(element * count, b"\0")
    return Variable(
        name or own_name, space, int(alignment[1]) if alignment else element, element * count, data
    )


def _constant(text, size):
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"PTX: the initial value {text!r} is not a number")
    value = int(text[2:], 16) if text[:2].lower() in ("0f", "0d") else int(text.rstrip("U"), 0)
    return (value % (1 << 8 * size)).to_bytes(size, "little")


class _Scopes:
    """Names declared so far, by nesting; a name seen before in the function gets a number."""

    def __init__(self):
        self.stack, self.used = [{}], {}
        self.opening = []  # the scopes inside, with their labels, as they open
        self.tables = {}  # of branch targets

    def declare(self, name):
        count = self.used[name] = self.used.get(name, 0) + 1
        unique = name if count == 1 else f"{name}#{count}"
        self.stack[-1][name] = unique
        return unique

    def find(self, name):
        for scope in reversed(self.stack):
            if name in scope:
                return scope[name]
        return None


def _parse_body(name, text, files):
    body, scopes = Body(), _Scopes()
    _declare_labels(text, scopes)
    position, lines, inlined = 0, (), {}
    label_scopes = iter(scopes.opening)
    while match := _TOKEN.match(text, position):
        position = match.end()
        loc, opening, closing, label, statement = match.groups()
        if loc:
            lines = _lines(loc, files, inlined) or lines
        elif opening:
            scopes.stack.append(dict(next(label_scopes)))
        elif closing:
            scopes.stack.pop()
        elif label:
            last_label = scopes.find(label)
            body.labels[last_label] = len(body.instructions)
        elif match := re.match(r"\s*\.branchtargets\s+(.*)", statement, re.S):
            scopes.tables[last_label] = Vector(tuple(Symbol(scopes.find(name)) for name in _split(match[1])))
        elif statement.strip():
            _parse_statement(body, " ".join(statement.split()), scopes, lines)
    if text[position:].strip():
        raise ValueError(f"PTX of {name}: not understood: {text[position:].strip()[:80]!r}")
    return body


def _declare_labels(text, scopes):
    """A label may be used before it appears: collect those of every scope first, in the order of the scopes'
    openings.
    """
    open_scopes, position = [scopes.stack[0]], 0
    while match := _TOKEN.match(text, position):
        position = match.end()
        if match[2]:
            open_scopes.append({})
            scopes.opening.append(open_scopes[-1])
        elif match[3]:
            open_scopes.pop()
        elif match[4]:
            scopes.stack.append(open_scopes[-1])
            scopes.declare(match[4])
            scopes.stack.pop()


def _lines(loc, files, inlined):
    """ "file:line" of a .loc, innermost first. Each names only where its function was inlined: the chain is
    followed by position.
    """
    file, line, column, *call = _LOC.match(loc).groups()
    if line == "0":
        return None
    inlined[file, line, column] = tuple(call) if call[0] else None
    chain, place = [], (file, line, column)
    while place and len(chain) < 20:
        chain.append(f"{files.get(place[0], place[0])}:{place[1]}")
        place = inlined.get(place)
    return tuple(chain)


def _parse_statement(body, statement, scopes, lines):
    if statement.startswith(".reg"):
        kind, names = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", statement).groups()
        for name in names.replace(" ", "").split(","):
            ranged = re.fullmatch(r"(.*)<(\d+)>", name)
            for one in [f"{ranged[1]}{i}" for i in range(int(ranged[2]))] if ranged else [name]:
                body.registers[scopes.declare(one)] = kind
        return
    if match := _VARIABLE.fullmatch(statement + ";"):
        variable = _variable(match, scopes.declare(match[5]))
        body.variables[variable.name] = variable
        return
    if statement.startswith("."):
        return  # .pragma and the like
    guard = None
    if match := re.match(r"@(!?)\s*([\w$%]+)\s+", statement):
        register = Register(scopes.find(match[2]))
        guard, statement = (Not(register) if match[1] else register), statement[match.end() :]
    opcode, _, rest = statement.partition(" ")
    operands = tuple(_operand(part, scopes, body) for part in _split(rest))
    body.instructions.append(
        Instruction(tuple(opcode.replace("::", "_").split(".")), operands, guard, lines, statement)
    )


def _split(text):
    """Parts between commas that are in no brackets."""
    if not text.count("{") + text.count("("):
        return [part.strip() for part in text.split(",")] if text else []
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return parts + [text[start:].strip()] if text.strip() else []


def _operand(text, scopes, body):
    name = scopes.find(text)
    if name in body.registers:
        return Register(name)
    if text[0] in "{(":
        return Vector(tuple(_operand(part, scopes, body) for part in _split(text[1:-1])))
    if text[0] == "[":
        base, sign, offset = re.fullmatch(r"\[\s*([^+\-\s]+)\s*(?:([+-])\s*(-?\w+))?\s*\]", text).groups()
        offset = int(offset, 0) if offset else 0
        return Address(_operand(base, scopes, body), -offset if sign == "-" else offset)
    if "|" in text:
        return Pair(*(_operand(part.strip(), scopes, body) for part in text.split("|")))
    if text[0] == "!":
        return Not(_operand(text[1:].strip(), scopes, body))
    if _NUMBER.fullmatch(text):
        return Immediate(text)
    if match := re.fullmatch(r"([\w$%]+)\s*\+\s*(\d+)", text):
        return Address(_operand(match[1], scopes, body), int(match[2]))
    return scopes.tables.get(name) or Symbol(name or text)
