"""Breaks the CUDA kernels one at a time (an operator, an index, a barrier, a guard) and shows which test turns red.

    python tests/mutate_kernels.py                      200 mutants, drawn with seed 0 from all files
    python tests/mutate_kernels.py --seed 1 --count 40 --jobs 2
    python tests/mutate_kernels.py --all --file softmax.cu
    python tests/mutate_kernels.py --list               all mutants there are, without a run
    python tests/mutate_kernels.py --equivalent         those of EQUIVALENT: each should survive

The sites are found in the tokens of kernels/*.cu and *.cuh. Each mutant meets the tests of its file, those of a header
the tests of every file that includes it, in copies of the repository, one for each job; a test that hangs or crashes
has noticed it too. A mutant that the compiler refuses does not count. The exit status is 1 where a mutant survives that
EQUIVALENT does not name.

64-bit sizes are not broken to 32 bits: it would take arrays of more than 2^31 elements to notice.
"""

from __future__ import annotations

import argparse
import bisect
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cuda_on_cpu
import kernel_variants
from mutate import draw

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels"
COPIED = ("backprop_gpu", "kernels", "tests", "pyproject.toml")
TESTS = "tests/test_kernels.py"  # each test there has the stem of the kernel's file in its name, or is one
OF_ALL = ("ones_own", "any_order")  # of these
OF_A_STEP = "tests/test_step_kernels.py"  # all of it is for these kernels, and for the headers that they include
IN_A_STEP = {"advance", "delta", "dropout", "forward", "gradients", "head", "share"}
LEFT_OUT = {"arch.cuh"}  # whose other body the tests run, for the CPU: see test_arch.py
HANGS = 300  # seconds that one test may take, builds included
LAUNCH_HANGS = 5.0  # seconds that one launch may take

SWAPPED = {  # operators that stand between two operands, with a space on either side
    "+": "-", "-": "+", "*": "/", "/": "*", "%": "/", "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=",
    "!=": "==", "&&": "||", "||": "&&", "+=": "-=", "-=": "+=", "*=": "/=", "/=": "*=", "&=": "|=", "|=": "&=",
    "&": "|", "|": "&", "^": "|", "<<": ">>", ">>": "<<",
}  # fmt: skip
TURNED = {"++": "--", "--": "++"}
RENAMED = {
    "min": "max", "max": "min", "fmin": "fmax", "fmax": "fmin", "exp": "expm1", "expm1": "exp", "log": "log1p",
    "log1p": "log", "fabs": "real", "sqrt": "real", "true": "false", "false": "true", "double": "float",
    "__all_sync": "__any_sync", "__any_sync": "__all_sync",
}  # fmt: skip
INDICES = {"threadIdx": "threadIdx", "blockIdx": "blockIdx", "blockDim": "gridDim", "gridDim": "blockDim"}
ASSIGNMENTS = {"=", "+=", "-=", "*=", "/=", "%=", "&=", "|=", "^=", "<<=", ">>=", "++", "--"}
NO_OPERAND = {"return", "case", "else", "do"}  # words behind which a minus has no left side
NO_STATEMENT = {
    "if", "for", "while", "do", "else", "return", "break", "continue", "const", "static", "struct", "template", "using",
    "enum", "extern", "constexpr", "static_assert", "auto", "switch", "case", "default",
}  # fmt: skip

# Mutants that change no behaviour, and why: (file, line as it is, line with the mutant in it), both without a comment.
# A dropped statement reads ";  // the statement". Of lines that are the same, "line (2)" is the second alone.
_ROOM = "one more element than is used"
_AT_ZERO = "differs at 0 alone, where both sides are 0"
_FINITE = "of that sum, it counts only whether it is finite"
_LANES = "how many threads share a row, for speed"
_HEED = "decides only whose outcome is computed, far from where it is needed"
_WIDE = "whether 16 bytes are moved at a time, for speed"
EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "costs.cuh",
        "return e > delta ? delta : e < -delta ? -delta : e;",
        "return e >= delta ? delta : e < -delta ? -delta : e;",
    ): "both sides are the same there",
    (
        "activations.cuh",
        "static __device__ real value(real z) { return z < 0 ? real(0) : z; }",
        "static __device__ real value(real z) { return z <= 0 ? real(0) : z; }",
    ): _AT_ZERO,
    (
        "common.cuh",
        "constexpr int WIDE = 16 / sizeof(real);",
        "constexpr int WIDE = 17 / sizeof(real);",
    ): "the quotient is the same",
    ("rules.cuh", "v = v < 0 ? real(0) : v;", "v = v <= 0 ? real(0) : v;"): _AT_ZERO,
    (
        "rules.cuh",
        "if (momentum != 0) {",
        "if (momentum != 1) {",
    ): "without momentum the step is 0 v + g, and v is not kept",
    (
        "update.cu",
        "const double lr = row[1], decay = row[2], step = lr > 1 ? lr : 1;",
        "const float lr = row[1], decay = row[2], step = lr > 1 ? lr : 1;",
    ): _HEED,
    (
        "update.cu",
        "const double reach = 1 + fabs(double(gj)) + (decay != 0 ? decay * fabs(double(theta[e])) : 0.0);",
        "const double reach = 1 + fabs(double(gj)) + (true ? decay * fabs(double(theta[e])) : 0.0);",
    ): _HEED,
    (
        "update.cu",
        "const double reach = 1 + fabs(double(gj)) + (decay != 0 ? decay * fabs(double(theta[e])) : 0.0);",
        "const double reach = 1 + fabs(double(gj)) + (decay != 0 ? decay * fabs(double(theta[e])) : 1.0);",
    ): _HEED,
    (
        "update.cu",
        "const double reach = 1 + fabs(double(gj)) + (decay != 0 ? decay * fabs(double(theta[e])) : 0.0);",
        "const double reach = 2 + fabs(double(gj)) + (decay != 0 ? decay * fabs(double(theta[e])) : 0.0);",
    ): _HEED,
    ("update.cu", "real sum_here = 0;", "real sum_here = 1;"): _FINITE,
    ("update.cu", "sum += sum_here;", "sum -= sum_here;"): _FINITE,
    (
        "update.cu",
        "real s[3] = {s0 ? s0[e] : real(0), s1 ? s1[e] : real(0), s2 ? s2[e] : real(0)};",
        "real s[3] = {s0 ? s0[e] : real(1), s1 ? s1[e] : real(0), s2 ? s2[e] : real(0)};",
    ): "a slot that a rule does without",
    (
        "update.cu",
        "real s[3] = {s0 ? s0[e] : real(0), s1 ? s1[e] : real(0), s2 ? s2[e] : real(0)};",
        "real s[3] = {s0 ? s0[e] : real(0), s1 ? s1[e] : real(0), s2 ? s2[e] : real(1)};",
    ): "a slot that a rule does without",
    ("update.cu", "real* const slots[3] = {s0, s1, s2};", "real* const slots[4] = {s0, s1, s2};"): _ROOM,
    (
        "update.cu",
        "if (blockIdx.x == 0 && threadIdx.x == 0) {",
        "if (blockIdx.x == 0 && threadIdx.x == 1) {",
    ): "any thread of the block may say it",
    (
        "activate.cu",
        "if (n % WIDE == 0 && aligned<WIDE>(b) && aligned<WIDE>(Z) && aligned<WIDE>(A))",
        "if (false)",
    ): _WIDE,
    ("gather.cu", "if (n % WIDE == 0 && aligned<WIDE>(data) && aligned<WIDE>(out))", "if (false)"): _WIDE,
    ("dropout.cu", "if (wide && i * 4 + 4 <= n) {", "if (wide && i * 4 + 5 <= n) {"): _WIDE,
    (
        "regularize.cu",
        "if (clip_value >= 0) x.v[j] = y > clip_value ? clip_value : y < -clip_value ? -clip_value : y;",
        "if (clip_value >= 0) x.v[j] = y > clip_value ? clip_value : y <= -clip_value ? -clip_value : y;",
    ): "both sides are the same there",
    (
        "sums.cuh",
        "for (int strip = blockIdx.x * WARP; strip < columns; strip += gridDim.x * WARP) {",
        "for (int strip = blockIdx.x * WARP; strip <= columns; strip += gridDim.x * WARP) {",
    ): "the guards inside turn away what is too much",
    (
        "sums.cuh",
        "for (long long row = first + threadIdx.y; row < last; row += DEEP * AHEAD) {",
        "for (long long row = first + threadIdx.y; row <= last; row += DEEP * AHEAD) {",
    ): "the guards inside turn away what is too much",
    (
        "activations.cuh",
        "static __device__ real value(real z) { return z < 0 ? z * real(0.01) : z; }",
        "static __device__ real value(real z) { return z <= 0 ? z * real(0.01) : z; }",
    ): _AT_ZERO,
    (
        "activations.cuh",
        "static __device__ real value(real z) { return z < 0 ? expm1(z) : z; }",
        "static __device__ real value(real z) { return z <= 0 ? expm1(z) : z; }",
    ): _AT_ZERO,
    ("column_sums.cu", "if (wide && aligned<WIDE>(M))", "if (false)"): _WIDE,
    ("dropout.cu", "struct Words { unsigned w[4]; };", "struct Words { unsigned w[5]; };"): _ROOM,
    (
        "dropout.cu",
        "for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i * 4 < n; i += stride) {",
        "for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i / 4 < n; i += stride) {",
    ): "the guards inside turn away what is too much",
    (
        "measure.cu",
        "const long long first = blockIdx.x * chunk_rows, last = first + chunk_rows < m ? first + chunk_rows : m;",
        "const long long first = blockIdx.x * chunk_rows, last = first + chunk_rows <= m ? first + chunk_rows : m;",
    ): "both sides are the same then",
    (
        "regularize.cu",
        "double sum_before = 0, sum_after = 0;",
        "double sum_before = 1, sum_after = 0;",
    ): _FINITE,
    ("regularize.cu", "if (l1 != 0 || l2 != 0) {", "if (true) {"): "adds 0 to each, for theta is finite",
    (
        "regularize.cu",
        "for (int i = threadIdx.x; i < blocks; i += blockDim.x) {",
        "for (int i = threadIdx.x; i < blocks; i += gridDim.x) {",
    ): "goes round once: there are as many parts as blocks, and no more than threads",
    (
        "sums.cuh",
        "for (int a = 0; a < AHEAD; ++a) (1)",
        "for (int a = 0; a <= AHEAD; ++a)",
    ): "writes behind an array of the thread's own, which the compilers leave out and no sanitizer sees",
    (
        "update.cu",
        "constexpr double HUGE = 1e12;",
        "constexpr float HUGE = 1e12;",
    ): _HEED,
    (
        "update.cu",
        "real s[3] = {s0 ? s0[e] : real(0), s1 ? s1[e] : real(0), s2 ? s2[e] : real(0)};",
        "real s[4] = {s0 ? s0[e] : real(0), s1 ? s1[e] : real(0), s2 ? s2[e] : real(0)};",
    ): _ROOM,
    (
        "activations.cuh",
        "static __device__ real value(real z) { return (z < 0 ? real(0) : z) + log1p(exp(-fabs(z))); }",
        "static __device__ real value(real z) { return (z <= 0 ? real(0) : z) + log1p(exp(-fabs(z))); }",
    ): _AT_ZERO,
    (
        "activations.cuh",
        "static __device__ real derivative(real a) { return a < 0 ? a + 1 : real(1); }",
        "static __device__ real derivative(real a) { return a <= 0 ? a + 1 : real(1); }",
    ): "differs at 0 alone, where both sides are 1",
    (
        "common.cuh",
        "__device__ __forceinline__ real not_a_number() { return real(__int_as_float(0x7fc00000)); }",
        "__device__ __forceinline__ real not_a_number() { return real(__int_as_float(0x7fc00001)); }",
    ): "another NaN",
    (
        "costs.cuh",
        "const real e = fabs(y - t), c = e > delta ? delta : e;",
        "const real e = fabs(y - t), c = e >= delta ? delta : e;",
    ): "both sides are the same then",
    (
        "dropout.cu",
        "for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i * 4 < n; i += stride) {",
        "for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i * 4 <= n; i += stride) {",
    ): "the guards inside turn away what is too much",
    (
        "measure.cu",
        "right = K <= NARROW ? count_right<1>(scores, labels, T, task, first, last, K)",
        "right = true ? count_right<1>(scores, labels, T, task, first, last, K)",
    ): _LANES,
    (
        "measure.cu",
        "right = K <= NARROW ? count_right<1>(scores, labels, T, task, first, last, K)",
        "right = false ? count_right<1>(scores, labels, T, task, first, last, K)",
    ): _LANES,
    (
        "outputs.cuh",
        "sum += (real(z[k] > 0) - t(k)) * z[k] + log1p(exp(-fabs(z[k])));",
        "sum += (real(z[k] >= 0) - t(k)) * z[k] + log1p(exp(-fabs(z[k])));",
    ): "differs where z = 0 alone, and is multiplied by z",
    (
        "output_delta.cu",
        "if (threadIdx.x == 0) C[i] = cost;",
        "if (threadIdx.x == 1) C[i] = cost;",
    ): "every thread of the row has the same cost",
    ("regularize.cu", "before_here += y * y;", "before_here -= y * y;"): _FINITE,
    ("regularize.cu", "sum_before += before[i];", "sum_before -= before[i];"): _FINITE,
    ("regularize.cu", "sum_before += before_here;", "sum_before -= before_here;"): _FINITE,
    (
        "regularize.cu",
        "sum_before = join_row(sum_before, Sum(), 0.0);",
        "sum_before = join_row(sum_before, Sum(), 1.0);",
    ): _FINITE,
    ("update.cu", "double sum = 0;", "double sum = 1;"): _FINITE,
    ("update.cu", "sum_here += gj * gj;", "sum_here -= gj * gj;"): _FINITE,
    ("update.cu", "sum += norm2[i];", "sum -= norm2[i];"): _FINITE,
    ("update.cu", "sum = join_row(sum, Sum(), 0.0);", "sum = join_row(sum, Sum(), 1.0);"): _FINITE,
    (
        "update.cu",
        "if (__syncthreads_or(bad) || !is_finite(real(sum)) || !(fabs(measured[0]) < double(infinity()))) {",
        "if (__syncthreads_or(bad) || !is_finite(real(sum)) || !(fabs(measured[0]) < float(infinity()))) {",
    ): "infinity of either type",
    (
        "rules.cuh",
        "if (momentum != 0) step = s[2] = momentum * s[2] + step;",
        "if (true) step = s[2] = momentum * s[2] + step;",
    ): "without momentum adds 0",
    (
        "rules.cuh",
        "if (amsgrad) v = s[2] = s[1] > s[2] ? s[1] : s[2];",
        "if (amsgrad) v = s[2] = s[1] >= s[2] ? s[1] : s[2];",
    ): "both sides are the same then",
    (
        "rules.cuh",
        "if (amsgrad) v = s[2] = s[1] > s[2] ? s[1] : s[2];",
        "if (true) v = s[2] = s[1] > s[2] ? s[1] : s[2];",
    ): "without amsgrad s[2] is 0, and s[1] not less",
    (
        "share.cu",
        "sum = join_row(sum, Sum(), real(0));",
        "sum = join_row(sum, Sum(), real(1));",
    ): "a block of 1024 threads, 32 warps, leaves no lane without a part",
    (
        "update.cu",
        "constexpr double HUGE = 1e12;",
        "constexpr double HUGE = 2000000000000.0;",
    ): _HEED,
}


class Mutant(NamedTuple):
    """`before`, at characters start..end of the file, becomes `after`."""

    file: str
    line: int
    start: int
    end: int
    before: str
    after: str
    where: str  # the function
    was: str  # the line where it begins
    now: str  # the same line with the mutant
    nth: int  # of the lines that are the same

    def __str__(self) -> str:
        before, after = (" ".join(s.split()) for s in (self.before, self.after))
        return f"{self.file}:{self.line} {self.where}: {before} -> {after} | {self.now}"

    @property
    def reason(self) -> str | None:
        """Why it is equivalent, where EQUIVALENT says so."""
        return next((EQUIVALENT[key] for key in self.keys if key in EQUIVALENT), None)

    @property
    def keys(self) -> tuple[tuple[str, str, str], ...]:
        """What it may be called there."""
        return (self.file, self.was, self.now), (self.file, f"{self.was} ({self.nth})", self.now)


# ---------------------------------------------------------------------------------------------------- the sites

_TOKEN = re.compile(
    r"""(?P<skip>//[^\n]*|/\*.*?\*/|^[ \t]*\#(?:[^\n]*\\\n)*[^\n]*|\s+)
      | (?P<string>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')
      | (?P<number>0[xX][0-9a-fA-F]+[uUlL]*|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?[fFuUlL]*)
      | (?P<word>[A-Za-z_]\w*)
      | (?P<operator><<=|>>=|->|::|\+\+|--|<<|>>|<=|>=|==|!=|&&|\|\||[-+*/%&|^]=|.)""",
    re.VERBOSE | re.MULTILINE | re.DOTALL,
)


class Token(NamedTuple):
    """A token that is neither a comment nor for the preprocessor."""

    kind: str
    text: str
    start: int
    end: int


class _Sites:
    """Collects the mutants of one file."""

    def __init__(self, file: str, source: str) -> None:
        self.file, self.source = file, source
        self.tokens = [
            Token(str(match.lastgroup), match[0], *match.span())
            for match in _TOKEN.finditer(source)
            if match.lastgroup != "skip"
        ]
        self.lines = source.split("\n")
        self.offsets = [0]
        for line in self.lines:
            self.offsets.append(self.offsets[-1] + len(line) + 1)
        self.partner, self.inside = self._brackets()
        self.scopes = self._scopes()
        self.found: list[Mutant] = []
        for i, token in enumerate(self.tokens):
            if token.kind == "operator":
                self.operator(i, token)
            elif token.kind == "number":
                self.number(token)
            elif token.kind == "word":
                self.word(i, token)
            self.statement(i)

    def text(self, i: int) -> str:
        """The text of token i, nothing where there is none."""
        return self.tokens[i].text if 0 <= i < len(self.tokens) else ""

    # -- what surrounds a token

    def _brackets(self) -> tuple[dict[int, int], list[int]]:
        """The other bracket of each bracket, and for each token the innermost bracket that is open there (-1: none)."""
        partner: dict[int, int] = {}
        inside, opened = [], [-1]
        for i, token in enumerate(self.tokens):
            if token.kind == "operator" and token.text in ")]}":
                partner[i] = opened.pop()
                partner[partner[i]] = i
            inside.append(opened[-1])
            if token.kind == "operator" and token.text in "([{":
                opened.append(i)
        return partner, inside

    def _scopes(self) -> list[tuple[int, int, str]]:
        """(start, end, name) of each function's and struct's body, outer before inner."""
        found = []
        for i, token in enumerate(self.tokens):
            if token.text == "{" and (name := self._name_of(i)):
                found.append((token.start, self.tokens[self.partner[i]].end, name))
        return found

    def _name_of(self, brace: int) -> str:
        start = brace
        while start > 0 and self.text(start - 1) not in (";", "}", "{"):
            start -= 1
        words = [self.text(k) for k in range(start, brace)]
        if "struct" in words:
            return words[words.index("struct") + 1] if words[-1:] != ["struct"] else ""
        opens = [k for k in range(start, brace) if self.text(k) == "(" and self.tokens[k - 1].kind == "word"]
        if self.inside[brace] != -1 and self.text(self.inside[brace]) != "{":
            return ""
        names = [self.text(k - 1) for k in opens if self.inside[k] == self.inside[brace]]
        return names[0] if names and ("__device__" in words or "__global__" in words) else ""

    def where(self, at: int) -> str:
        """The names of the struct and function around a character."""
        return "::".join(name for start, end, name in self.scopes if start <= at < end) or "(file)"

    def spaced(self, i: int) -> bool:
        """Whether an operator has white space on either side, as those between two operands do."""
        token = self.tokens[i]
        return self.source[token.start - 1].isspace() and self.source[token.end].isspace()

    # -- the kinds of mutants

    def add(self, start: int, end: int, after: str, note: str = "") -> None:
        line = bisect.bisect_right(self.offsets, start) - 1
        first, behind = self.offsets[line], self.offsets[line + 1] - 1
        was = self.lines[line]
        now = was[: start - first] + after + (note or (self.source[end:behind] if end <= behind else ""))
        was, now = (_without_comment(text).strip() for text in (was, now))
        if note:
            now += note
        nth = sum(_without_comment(text).strip() == was for text in self.lines[: line + 1])
        before, where = self.source[start:end], self.where(start)
        self.found.append(Mutant(self.file, line + 1, start, end, before, after, where, was, now, nth))

    def replace(self, first: int, last: int, after: str) -> None:
        """Replace the tokens first..last."""
        self.add(self.tokens[first].start, self.tokens[last].end, after)

    def operator(self, i: int, token: Token) -> None:
        if token.text in SWAPPED and self.spaced(i) and self.text(i - 1) != "template":
            self.replace(i, i, SWAPPED[token.text])
        elif token.text in TURNED:
            self.replace(i, i, TURNED[token.text])
        elif token.text == "!" or (token.text == "-" and not self.source[token.end].isspace() and self.unary(i)):
            self.replace(i, i, "")
        elif token.text == "?":
            first = i
            while self.text(first - 1) not in (*ASSIGNMENTS, "(", "[", "{", ",", ";", ":", "?", "return"):
                first = self.partner.get(first - 1, first - 1)
            self.condition(first, i - 1)

    def unary(self, i: int) -> bool:
        before = self.tokens[i - 1]
        return before.text in NO_OPERAND or (before.kind == "operator" and before.text not in (")", "]"))

    def number(self, token: Token) -> None:
        digits = token.text.rstrip("uUlL") if token.text[:2] in ("0x", "0X") else token.text.rstrip("uUlLfF")
        suffix = token.text[len(digits) :]
        if token.text[:2] in ("0x", "0X"):
            value = int(digits, 16)
            after = hex(value - 1 if value == 0xFFFFFFFF else value + 1)
        elif digits.isdigit():
            after = str(int(digits) + 1)
        else:
            after = repr(2 * float(digits) or 1.0)
        self.add(token.start, token.end, after + suffix)

    def word(self, i: int, token: Token) -> None:
        if token.text in RENAMED and self.text(i - 1) not in (".", "->", "::"):
            self.replace(i, i, RENAMED[token.text])
        elif token.text in INDICES and self.text(i + 1) == ".":
            axis = self.text(i + 2)
            other = axis if INDICES[token.text] != token.text else {"x": "y"}.get(axis, "x")
            self.replace(i, i + 2, f"{INDICES[token.text]}.{other}")
        elif token.text.startswith("__shfl_xor"):
            first, last = self.parts(i + 1, ",")[2]
            said = self.source[self.tokens[first].start : self.tokens[last].end]
            self.replace(first, last, f"({said} ^ 1)")
        elif token.text in ("if", "while"):
            opens = i + 1 + (self.text(i + 1) == "constexpr")
            self.condition(*self.parts(opens, ";")[-1])
        elif token.text == "for":
            header = self.parts(i + 1, ";")
            if len(header) == 3:
                self.condition(*header[1])

    def condition(self, first: int, last: int) -> None:
        """Always true, always false; the opposite where it asks whether a pointer or a flag is set."""
        self.replace(first, last, "true")
        self.replace(first, last, "false")
        if first == last:
            self.replace(first, last, f"!{self.text(first)}")

    def parts(self, opens: int, at: str) -> list[tuple[int, int]]:
        """First and last token of each of the parts, parted by `at`, of what stands in brackets."""
        closes = self.partner[opens]
        cuts = [k for k in range(opens + 1, closes) if self.text(k) == at and self.inside[k] == opens]
        return [(a + 1, b - 1) for a, b in zip([opens, *cuts], [*cuts, closes], strict=True)]

    def statement(self, i: int) -> None:
        """Drop the statement that begins with token i, if it is an assignment, a call, a barrier or a bare return."""
        around = self.inside[i]
        if around == -1 or self.text(around) != "{" or self.text(i - 1) not in (";", "{", "}", ")", "else", "do"):
            return
        if self.text(i - 1) == ")":
            word = self.partner[i - 1] - 1
            word -= self.text(word) == "constexpr"
            if self.text(word) not in ("if", "for", "while"):
                return
        last = i
        while last < len(self.tokens) and not (self.text(last) == ";" and self.inside[last] == around):
            if last in self.partner and self.partner[last] < last and self.partner[last] <= i:
                return  # the bracket around it closes first: no statement
            last += 1
        if last >= len(self.tokens):
            return
        said = [self.text(k) for k in range(i, last)]
        if said == ["return"] or self.acts(i, last):
            note = f"  // {' '.join(self.source[self.tokens[i].start : self.tokens[last].end].splitlines()[0].split())}"
            self.add(self.tokens[i].start, self.tokens[last].end, ";", note)

    def acts(self, first: int, last: int) -> bool:
        """Whether tokens first..last - 1 are an expression that is no declaration."""
        text = self.text(first)
        if text in ("++", "--", "*"):
            return True
        if self.tokens[first].kind != "word" or text in NO_STATEMENT:
            return False
        at = first + 1
        if self.text(at) == "<":  # the arguments of a template: what is called, or a type
            depth = 0
            while at < last:
                depth += {"<": 1, ">": -1, ">>": -2}.get(self.text(at), 0)
                at += 1
                if depth <= 0:
                    break
            return self.text(at) == "("
        return self.text(at) in (".", "->", "[", "(", *ASSIGNMENTS)


def _without_comment(line: str) -> str:
    return line.split("  //")[0]


def sites(file: str, kernels: Path = KERNELS) -> list[Mutant]:
    """All mutants of a file, in the order of its lines."""
    return sorted(set(_Sites(file, (kernels / file).read_text(encoding="utf-8")).found), key=lambda m: m[1:])


def broken(source: str, mutant: Mutant) -> str:
    """The file with the mutant in it."""
    return source[: mutant.start] + mutant.after + source[mutant.end :]


# ------------------------------------------------------------------------------------------------------ the runs

REFUSED = "g++ refuses the text"  # as tests/cuda_on_cpu says it
TOLERANT = '#!/bin/sh\nexec "{}" "$@" -Wno-error\n'  # a compiler to which a warning is none, as NVRTC


def included(file: str, kernels: Path) -> set[str]:
    """The headers that a file of kernels/ includes, and those that they include."""
    found: set[str] = set()
    for header in re.findall(r'^#include "(\S+)"', (kernels / file).read_text(encoding="utf-8"), re.MULTILINE):
        found |= {header} | included(header, kernels)
    return found


def met_by(file: str, kernels: Path = KERNELS) -> list[str]:
    """The kernels whose tests a mutant of the file meets, the smallest first."""
    kernel_files = [file] if file.endswith(".cu") else [p.name for p in kernels.glob("*.cu")]
    those = [name for name in kernel_files if name == file or file in included(name, kernels)]
    return [Path(name).stem for name in sorted(those, key=lambda name: ((kernels / name).stat().st_size, name))]


def asked(stems: list[str]) -> list[str]:
    """What pytest is told to run for these kernels."""
    wanted: list[str] = []
    words: list[str] = []
    if set(stems) & IN_A_STEP:
        wanted, words = [OF_A_STEP], [Path(OF_A_STEP).stem]
    if alone := [stem for stem in stems if f"{stem}.cu" not in kernel_variants.OF_A_STEP]:
        wanted, words = [*wanted, TESTS], [*words, *alone, *OF_ALL]
    return [*wanted, "-k", " or ".join(words)]


class Worker:
    """A copy of the repository, and a folder for the binaries that its tests build."""

    def __init__(self, folder: Path, compiler: Path) -> None:
        self.copy, self.cache = folder / "copy", folder / "cache"
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, self.copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(ROOT / name, self.copy / name)
        self.cache.mkdir()
        self.environment = {
            **os.environ,
            "BACKPROP_GPU_CUDA_ON_CPU_CACHE": str(self.cache),
            "CXX": str(compiler),
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": os.pathsep.join((str(self.copy), str(self.copy / "tests"))),
        }
        self.environment.pop("PYTEST_ADDOPTS", None)
        self.process: subprocess.Popen[str] | None = None
        self.kept: set[Path] = set()  # binaries of the texts without a mutant
        self.red_before: list[str] = []  # tests that are red without any mutant
        ask = "from backprop_gpu import cuda_source; print(cuda_source.__file__)"
        package = subprocess.run(
            [sys.executable, "-c", ask], cwd=self.copy, env=self.environment, capture_output=True, text=True, check=True
        ).stdout
        if not package.startswith(str(self.copy)):
            raise SystemExit(f"the package came from {package.strip()}, not from the copy {self.copy}")

    def without_mutant(self, stems: list[str], seconds: float) -> None:
        """Build the binaries of these kernels once, and learn which of their tests are red already."""
        status, output = self.run(stems, seconds, ())
        if status not in (0, 1):
            raise SystemExit(f"the tests do not run without a mutant (status {status}):\n{output}")
        self.red_before = red(output)
        self.kept = set(self.cache.iterdir())

    def as_good_as(self, other: Worker) -> None:
        """Know and have built what the other one has."""
        shutil.copytree(other.cache, self.cache, dirs_exist_ok=True)
        self.red_before, self.kept = other.red_before, set(self.cache.iterdir())

    def run(
        self, stems: list[str], seconds: float, more: tuple[str, ...] = ("-x",), first: str = ""
    ) -> tuple[int | None, str]:
        """pytest's exit status, negative where a signal ended it, None where time did, and what it wrote."""
        command = [sys.executable, "-m", "pytest", "-q", "-p", "mutate_kernels", "-p", "no:cacheprovider"]
        command += ["-m", "not gpu and not slow", "--hypothesis-seed=0", "--tb=short", *more]
        command += [*(f"--deselect={test}" for test in self.red_before), *asked(stems)]
        shutil.rmtree(self.copy / ".hypothesis", ignore_errors=True)
        with subprocess.Popen(
            command,
            cwd=self.copy,
            env={**self.environment, "MUTANT_MEETS": " ".join(stems), "MUTANT_MEETS_FIRST": first},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        ) as self.process:
            try:
                output, _ = self.process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                self.stop()
                return None, self.process.communicate()[0]
            except BaseException:
                self.stop()
                raise
            return self.process.returncode, output

    def stop(self) -> None:
        """End the tests that run now, and what they started."""
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def meet(self, mutant: Mutant, seconds: float) -> str:
        """The test that turns red with the mutant, SURVIVED or REFUSES where there is none."""
        path = self.copy / "kernels" / mutant.file
        source = path.read_text(encoding="utf-8")
        if source[mutant.start : mutant.end] != mutant.before:
            raise SystemExit(f"{mutant.file} has changed since the sites were found")
        path.write_text(broken(source, mutant), encoding="utf-8")
        table = re.match(
            r"(?:f|cost|rule)_(\w+)", mutant.where
        )  # the function, cost or rule that it is in, if it is in one
        try:
            stems = met_by(mutant.file, self.copy / "kernels")
            status, output = self.run(stems, seconds, first=table[1] if table else "")
        finally:
            path.write_text(source, encoding="utf-8")
            for binary in set(self.cache.iterdir()) - self.kept:
                shutil.rmtree(binary) if binary.is_dir() else binary.unlink(missing_ok=True)
        if status == 0:
            return SURVIVED
        if REFUSED in output:
            return REFUSES
        if status is None or status == -signal.SIGALRM:
            return "hangs"
        return red(output)[0] if red(output) else f"pytest ends with status {status}"


SURVIVED, REFUSES = "SURVIVED", "does not compile"


def red(output: str) -> list[str]:
    """The red tests that pytest's summary names."""
    return re.findall(r"^(?:FAILED|ERROR) (\S+?\.py(?:::.*?)?)(?: - .*)?$", output, re.MULTILINE)


# In the tests' process this file is a plugin of pytest; the functions with these names are its hooks.


def pytest_sessionstart() -> None:
    """Build what a test needs when it does, for most mutants see one test; give a launch that hangs up soon.

    Any example that fails will do, so Hypothesis need not look for a small one.
    """
    import kernels_on_cpu
    from hypothesis import Phase, settings

    kernels_on_cpu.build_ahead = lambda *parts: None
    cuda_on_cpu.TIME_LIMIT = LAUNCH_HANGS

    settings.register_profile(
        "mutants", settings(settings.default, phases=[Phase.explicit, Phase.generate], database=None)
    )
    settings.load_profile("mutants")


def pytest_collection_modifyitems(items: list) -> None:
    """Take a test of each kernel in turn, so that the mutant of a header soon meets all of them.

    First those that name the function, cost or rule that is broken.
    """
    stems, first = os.environ.get("MUTANT_MEETS", "").split(), os.environ.get("MUTANT_MEETS_FIRST", "")
    met: Counter[str] = Counter()

    def place(item) -> tuple[bool, int, int]:
        stem = next((stem for stem in stems if stem in item.name), "")
        met[stem] += 1
        return first not in item.name.lower(), met[stem], stems.index(stem) if stem else len(stems)

    items.sort(key=place)


def pytest_runtest_logstart() -> None:
    """The signal that nothing catches ends a test that takes too long, wherever it is."""
    signal.alarm(HANGS)


# ------------------------------------------------------------------------------------------------ the command line


def stale(mutants: dict[str, list[Mutant]]) -> Iterator[str]:
    for key in EQUIVALENT:
        if key[0] in mutants and not any(key in m.keys for m in mutants[key[0]]):
            yield f"EQUIVALENT names what is not there: {': '.join(key)}"


def main() -> int:
    """Run the command line; the exit status."""
    files = sorted({path.name for path in KERNELS.glob("*.cu*")} - LEFT_OUT)
    parser = argparse.ArgumentParser(description="Break the kernels one at a time; see which test turns red.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=1, help="how many are tested at a time")
    parser.add_argument("--all", action="store_true", help="every mutant, not a sample")
    parser.add_argument("--file", action="append", choices=files, help="of this file alone; may be repeated")
    parser.add_argument("--match", action="append", help="all mutants whose line of --list holds this; may be repeated")
    parser.add_argument("--equivalent", action="store_true", help="those that EQUIVALENT names, which should survive")
    parser.add_argument("--list", action="store_true", help="list them, run nothing")
    parser.add_argument("--limit", type=float, default=900, help="seconds that all tests of a mutant may take")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the copies are removed then too

    everything = {file: sites(file) for file in given.file or files}
    outdated = list(stale(everything))
    wanted = {
        file: [
            m
            for m in those
            if any(words in str(m) for words in given.match or [""])
            and ((given.list and not given.equivalent) or (m.reason is not None) == given.equivalent)
        ]
        for file, those in everything.items()
    }
    if given.all or given.list or given.equivalent or given.match:
        chosen = [m for those in wanted.values() for m in those]
    else:
        chosen = draw(wanted, given.count, given.seed)
    if given.list:
        print(*chosen, *outdated, sep="\n")
        print(f"{len(chosen)} mutants, {sum(m.reason is not None for m in chosen)} of them equivalent")
        return bool(outdated)
    return run(chosen, given.jobs, given.limit, given.equivalent, outdated)


def run(chosen: list[Mutant], jobs: int, seconds: float, equivalent: bool, outdated: list[str]) -> int:
    """Test the mutants, print what became of each, and of all; the exit status."""
    began = time.monotonic()
    told = threading.Lock()
    results: dict[Mutant, str] = {}
    with tempfile.TemporaryDirectory(prefix="mutants") as directory:
        compiler = Path(directory) / "g++"
        compiler.write_text(TOLERANT.format(cuda_on_cpu.compiler()))
        compiler.chmod(0o755)
        workers = [Worker(Path(directory) / str(i), compiler) for i in range(jobs)]
        stems = sorted({stem for mutant in chosen for stem in met_by(mutant.file, KERNELS)})
        workers[0].without_mutant(stems, 4 * seconds)
        for worker in workers[1:]:
            worker.as_good_as(workers[0])
        for test in workers[0].red_before:
            print(f"red without a mutant, does not count: {test}")
        free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in workers:
            free.put(worker)

        def test(mutant: Mutant) -> None:
            worker, start = free.get(), time.monotonic()
            try:
                end = worker.meet(mutant, seconds)
            finally:
                free.put(worker)
            with told:
                results[mutant] = end
                took = time.monotonic() - start
                print(f"{len(results):4}/{len(chosen)} {mutant}   {end}   ({took:.1f} s)", flush=True)

        with ThreadPoolExecutor(jobs) as threads:
            try:
                list(threads.map(test, chosen))
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                for worker in workers:
                    worker.stop()
                raise
    counted = [m for m in chosen if results[m] != REFUSES]
    survivors = [m for m in counted if results[m] == SURVIVED]
    refused = len(chosen) - len(counted)
    print(f"\n{len(counted)} mutants in {time.monotonic() - began:.0f} s, {len(counted) - len(survivors)} killed")
    print(f"{refused} more do not compile, and do not count")
    for killer, n in Counter(results[m].split("[")[0] for m in counted).most_common():
        print(f"{n:5}  {killer}")
    for mutant in survivors:
        print(f"SURVIVED {mutant}")
    print(*outdated, sep="\n", end="\n" if outdated else "")
    return bool(len(survivors) != (len(counted) if equivalent else 0) or outdated)


if __name__ == "__main__":
    sys.exit(main())
