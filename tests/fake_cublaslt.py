"""A stand-in for the cuBLASLt library without a GPU: its C functions, called through ctypes, computed with NumPy.

The functions are C function pointers with the signatures of cublasLt.h, written down here once more, so that a binding
that declares others passes rubbish. Descriptors live by handle; what they say is what is computed: type, order, shape,
leading dimension, transposes, compute type, epilogue. What the documentation refuses is refused, with the reason in
`refusals`, and so is memory that nobody lent: `own` the arrays first.
"""

import ctypes
import zlib
from ctypes import c_float, c_int, c_int64, c_size_t, c_uint64, c_void_p

import numpy as np

INVALID_VALUE, EXECUTION_FAILED, INTERNAL_ERROR, NOT_SUPPORTED = 7, 13, 14, 15
DTYPES = {0: np.float32, 1: np.float64, 14: np.uint16}  # cudaDataType: R_32F, R_64F, R_16BF
# (A, B, D, compute type, type of alpha) that can be multiplied
TYPES = {(0, 0, 0, 68, 0), (0, 0, 0, 77, 0), (14, 14, 0, 68, 0), (1, 1, 1, 70, 1)}
RELU, BIAS, DRELU, BGRAD, AUX, BGRADA, BGRADB = 2, 4, 8, 16, 128, 256, 512
EPILOGUES = {1, 2, 2 | 128, 4, 2 | 4, 2 | 128 | 4, 8 | 128, 8 | 128 | 16, 256, 512}
# Bytes of each attribute, as the library itself tells them (cublasLt...GetAttribute with no room).
DESC = {
    0: 4, 1: 4, 2: 4, 3: 4, 4: 4, 5: 4, 6: 4, 7: 4, 8: 8, 10: 8, 11: 8, 12: 8, 13: 8, 14: 8, 15: 4, 17: 8, 18: 8,
    19: 8, 20: 8, 21: 8, 22: 4, 23: 8, 24: 8, 25: 1, 26: 4,
}  # fmt: skip
LAYOUT = {0: 4, 1: 4, 2: 8, 3: 8, 4: 8, 5: 4, 6: 8, 7: 8}
PREFERENCE = {0: 4, 1: 8, 3: 4, 5: 4, 6: 4, 7: 4, 8: 4, 9: 4, 12: 8}
CONFIG = {0: 4, 1: 4, 2: 4, 3: 4, 4: 4, 5: 4, 6: 4, 7: 2, 8: 2}
KINDS = {
    "cublasLt": {},
    "cublasLtMatmulDesc": DESC,
    "cublasLtMatrixLayout": LAYOUT,
    "cublasLtMatmulPreference": PREFERENCE,
}
MAGIC = 0x0A16_0B17_0C18_0D19

_set = (c_int, c_void_p, c_int, c_void_p, c_size_t)
PROTOTYPES = {  # the result first
    "cublasLtGetVersion": (c_size_t,),
    "cublasLtCreate": (c_int, c_void_p),
    "cublasLtDestroy": (c_int, c_void_p),
    "cublasLtMatmulDescCreate": (c_int, c_void_p, c_int, c_int),
    "cublasLtMatmulDescDestroy": (c_int, c_void_p),
    "cublasLtMatmulDescSetAttribute": _set,
    "cublasLtMatrixLayoutCreate": (c_int, c_void_p, c_int, c_uint64, c_uint64, c_int64),
    "cublasLtMatrixLayoutDestroy": (c_int, c_void_p),
    "cublasLtMatrixLayoutSetAttribute": _set,
    "cublasLtMatmulPreferenceCreate": (c_int, c_void_p),
    "cublasLtMatmulPreferenceDestroy": (c_int, c_void_p),
    "cublasLtMatmulPreferenceSetAttribute": _set,
    "cublasLtMatmulAlgoGetHeuristic": (c_int, *[c_void_p] * 7, c_int, c_void_p, c_void_p),
    "cublasLtMatmulAlgoConfigGetAttribute": (c_int, c_void_p, c_int, c_void_p, c_size_t, c_void_p),
    "cublasLtMatmul": (
        c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p,
        c_void_p, c_void_p, c_void_p, c_void_p, c_size_t, c_void_p,
    ),
}  # fmt: skip


class Result(ctypes.Structure):  # cublasLtMatmulHeuristicResult_t, 96 bytes
    _fields_ = (
        ("data", c_uint64 * 8), ("workspaceSize", c_size_t), ("state", c_int), ("wavesCount", c_float),
        ("reserved", c_int * 4),
    )  # fmt: skip


class Refused(Exception):  # noqa: N818 - it is an answer
    def __init__(self, status, why):
        super().__init__(why)
        self.status = status


class Descriptor:
    """One that is alive: its kind and its attributes."""

    def __init__(self, kind, **attributes):
        self.kind = kind
        self.values = attributes  # number (as text) -> int

    def __getitem__(self, number):
        return self.values.get(str(number), 0)


def tf32(a):
    """float32 numbers rounded to the 10 bits of TF32, halves away from zero."""
    return ((np.asarray(a, np.float32).view(np.uint32) + 0x1000) & 0xFFFF_E000).astype(np.uint32).view(np.float32)


def from_bf16(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(a):
    """The upper halves of float32 numbers, rounded to the nearest, ties to even, as uint16."""
    bits = np.ascontiguousarray(a, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


class Library:
    """The stand-in; its attributes named cublasLt... are C functions.

    `algorithms`: (workspace, alignment) that each needs, fastest first. `fail`: function -> (which call, from 0;
    status). `capturing`: what a capturing stream would refuse is. `issue(stream, run)`: what does the arithmetic, at
    once if it is None. `unknown`: the products, (epilogue, m, n, k) of column-major matrices, that it has nothing for.
    """

    def __init__(self, algorithms=((0, 4), (1 << 20, 4), (0, 16), (4 << 20, 16)), version=120903):
        self.algorithms, self.version = algorithms, version
        self.live, self.used = {}, 0x1000
        self.refusals, self.crashes, self.calls = [], [], []
        self.ran = []  # (index of the algorithm, stream) of each product
        self.asked = []  # the alignments of A, B, C, D and the workspace that each question named
        self.capturing, self.fail = False, {}
        self.issue, self.unknown = None, lambda epilogue, m, n, k: False
        self.memory = {}
        self._counts = {}
        for name, (result, *arguments) in PROTOTYPES.items():
            setattr(self, name, ctypes.CFUNCTYPE(result, *arguments)(self._answer(name)))

    def own(self, *arrays):
        """Lend the memory of NumPy arrays; the first of them."""
        for a in arrays:
            low, high = np.lib.array_utils.byte_bounds(a)
            if high > self.memory.get(low, (0, None))[0]:  # of two views that begin alike, the longer one
                self.memory[low] = (high, a)
        return arrays[0] if arrays else None

    def count(self, kind):
        return sum(d.kind == kind for d in self.live.values())

    def _answer(self, name):
        kind = next((k for k in sorted(KINDS, key=len, reverse=True) if name.startswith(k)), "cublasLt")
        rest = name[len(kind) :]
        if rest in ("Create", "Destroy", "SetAttribute"):
            method = getattr(self, f"_{rest}")
        else:
            method, kind = getattr(self, f"_{name}"), None

        def answer(*arguments):
            self.calls.append(name)
            nth = self._counts[name] = self._counts.get(name, -1) + 1
            try:
                if name in self.fail and self.fail[name][0] == nth:
                    raise Refused(self.fail[name][1], f"{name} was told to fail")
                with np.errstate(all="ignore"):  # rubbish in, rubbish out, as on a GPU
                    result = method(*arguments) if kind is None else method(kind, *arguments)
                return 0 if result is None else result
            except Refused as e:
                self.refusals.append(f"{name}: {e}")
                return e.status
            except Exception as e:  # or ctypes would swallow it
                self.crashes.append(e)
                return INTERNAL_ERROR

        return answer

    def _alive(self, handle, kind):
        found = self.live.get(handle)
        if found is None:
            raise Refused(INVALID_VALUE, f"{handle} is no living {kind}: never made, or destroyed")
        if found.kind != kind:
            raise Refused(INVALID_VALUE, f"{handle} is a {found.kind}, not a {kind}")
        return found

    # ------------------------------------------------------------------------------------------- handles, descriptors

    def _cublasLtGetVersion(self):
        return self.version

    def _Create(self, kind, out, *arguments):
        names = {"cublasLtMatmulDesc": "01", "cublasLtMatrixLayout": "0234", "cublasLtMatmulPreference": ""}
        made = Descriptor(kind, **dict(zip(names.get(kind, ""), arguments, strict=True)))
        if kind == "cublasLtMatmulDesc":
            made.values["7"] = 1
        if kind == "cublasLtMatmulPreference":
            made.values.update({str(i): 256 for i in (5, 6, 7, 8)})
        self.used += 0x10  # no handle comes twice, so that one that was destroyed is known
        self.live[self.used] = made
        c_void_p.from_address(out).value = self.used

    def _Destroy(self, kind, handle):
        self._alive(handle, kind)
        if kind == "cublasLt" and self.capturing:
            raise Refused(EXECUTION_FAILED, "destroying the handle waits for the device, which a capture forbids")
        del self.live[handle]

    def _SetAttribute(self, kind, handle, number, value, size):
        descriptor = self._alive(handle, kind)
        if KINDS[kind].get(number) != size or not value:
            raise Refused(
                INVALID_VALUE, f"attribute {number} of {kind} has {KINDS[kind].get(number)} bytes, not {size}"
            )
        descriptor.values[str(number)] = int.from_bytes(ctypes.string_at(value, size), "little", signed=True)

    # ------------------------------------------------------------------------------------------------- what is refused

    def _problem(self, desc, A, B, C, D):
        """What the descriptors say, once it is sound."""
        desc = self._alive(desc, "cublasLtMatmulDesc")
        A, B, C, D = (self._alive(handle, "cublasLtMatrixLayout") for handle in (A, B, C, D))
        types = (A[0], B[0], D[0], desc[0], desc[1])
        if types not in TYPES or C[0] != D[0]:
            raise Refused(NOT_SUPPORTED, f"types {types}")
        for M in (A, B, C, D):
            least = M[2] if M[1] == 0 else M[3]
            if M[1] not in (0, 1) or M[2] <= 0 or M[3] <= 0 or M[4] < least:
                raise Refused(INVALID_VALUE, f"a {M[2]} x {M[3]} matrix of order {M[1]} with leading dimension {M[4]}")
        if desc[3] not in (0, 1) or desc[4] not in (0, 1):
            raise Refused(INVALID_VALUE, f"transposes {desc[3]}, {desc[4]}")
        (m, k), (k2, n) = ((M[3], M[2]) if t else (M[2], M[3]) for M, t in ((A, desc[3]), (B, desc[4])))
        if k != k2 or (D[2], D[3]) != (m, n) or (C[2], C[3]) != (m, n):
            raise Refused(INVALID_VALUE, f"({m} x {k}) times ({k2} x {n}) into {D[2]} x {D[3]}")
        e = desc[7]
        if e not in EPILOGUES:
            raise Refused(INVALID_VALUE, f"epilogue {e}")
        if e != 1 and D[1] == 1:
            raise Refused(NOT_SUPPORTED, "an epilogue on a row-major D")
        if e & (BIAS | BGRAD | BGRADA | BGRADB) and not desc[8]:
            raise Refused(INVALID_VALUE, f"epilogue {e} without a bias pointer")
        if e & AUX and (not desc[11] or desc[12] % 128 or desc[12] < m):
            raise Refused(INVALID_VALUE, f"epilogue {e} with mask {desc[11]:#x}, leading dimension {desc[12]} bits")
        if (e & DRELU and k == 1) or (e & BGRADB and n == 1) or (e & BGRADA and m == 1):
            raise Refused(NOT_SUPPORTED, f"epilogue {e} on m={m}, n={n}, k={k}")
        return desc, A, B, C, D, (m, n, k)

    @staticmethod
    def _mark(desc, *layouts):
        """A number for the problem: an algorithm found for one is not for another."""
        told = [desc[i] for i in (0, 1, 3, 4, 7, 12)], [[M[i] for i in (0, 1, 2, 3, 4)] for M in layouts]
        return zlib.crc32(repr(told).encode())

    def _cublasLtMatmulAlgoGetHeuristic(self, handle, desc, A, B, C, D, preference, most, results, count):
        self._alive(handle, "cublasLt")
        preference = self._alive(preference, "cublasLtMatmulPreference")
        c_int.from_address(count).value = 0
        desc, *layouts, sides = self._problem(desc, A, B, C, D)
        if most <= 0:
            raise Refused(INVALID_VALUE, "no room for results")
        alignments = [preference[i] for i in (5, 6, 7, 8)]
        self.asked.append((*alignments, preference[1]))
        found = 0
        if self.unknown(desc[7], *sides):
            return
        for index, (workspace, alignment) in enumerate(self.algorithms):
            if workspace > preference[1] or alignment > min(alignments) or found == most:
                continue
            result = Result.from_address(results + found * ctypes.sizeof(Result))
            result.data[:] = [MAGIC, index, self._mark(desc, *layouts), alignment, workspace, 0, 0, 0]
            result.workspaceSize, result.state, result.wavesCount = workspace, 0, 0.5 + index
            found += 1
        c_int.from_address(count).value = found

    def _cublasLtMatmulAlgoConfigGetAttribute(self, algo, number, value, size, written):
        data = (c_uint64 * 8).from_address(algo)
        if data[0] != MAGIC or CONFIG.get(number) != size:
            raise Refused(
                INVALID_VALUE, f"attribute {number} of an algorithm has {CONFIG.get(number)} bytes, not {size}"
            )
        ctypes.memmove(value, int(10 * number + data[1]).to_bytes(size, "little"), size)
        c_size_t.from_address(written).value = size

    # ------------------------------------------------------------------------------------------------ what is computed

    def _bytes(self, address, size, what):
        """Lent memory as bytes."""
        if not address or not any(low <= address and address + size <= high for low, (high, _) in self.memory.items()):
            raise Refused(EXECUTION_FAILED, f"{what}: {size} bytes at {address or 0:#x} are nobody's")
        return np.frombuffer((ctypes.c_ubyte * size).from_address(address), np.uint8)

    def _matrix(self, layout, address, what):
        """The matrix (rows, columns) as a view of the memory."""
        dtype, (rows, columns, ld) = np.dtype(DTYPES[layout[0]]), (layout[i] for i in (2, 3, 4))
        if address and address % dtype.itemsize:
            raise Refused(EXECUTION_FAILED, f"{what} is misaligned for {dtype}")
        lines, width = (columns, rows) if layout[1] == 0 else (rows, columns)
        flat = self._bytes(address, ((lines - 1) * ld + width) * dtype.itemsize, what).view(dtype)
        strides = (ld * dtype.itemsize, dtype.itemsize)
        M = np.lib.stride_tricks.as_strided(flat, (lines, width), strides, writeable=True)
        return M.T if layout[1] == 0 else M

    def _operand(self, layout, address, transposed, compute, what):
        M = self._matrix(layout, address, what)
        M = from_bf16(M) if layout[0] == 14 else tf32(M) if compute == 77 else M
        return np.asarray(M.T if transposed else M, np.float64)

    def _cublasLtMatmul(self, handle, desc, alpha, A, Ad, B, Bd, beta, C, Cd, D, Dd, algo, workspace, size, stream):
        self._alive(handle, "cublasLt")
        desc, Al, Bl, Cl, Dl, (m, n, _) = self._problem(desc, Ad, Bd, Cd, Dd)
        if algo:
            data = (c_uint64 * 8).from_address(algo)
            if data[0] != MAGIC or data[2] != self._mark(desc, Al, Bl, Cl, Dl):
                raise Refused(INVALID_VALUE, "an algorithm that was not found for this product")
            if data[4] > size or (data[4] and (not workspace or workspace % 256)):
                raise Refused(INVALID_VALUE, f"a workspace of {size} bytes at {workspace}, of {data[4]} needed")
            if data[4]:
                self._bytes(workspace, size, "workspace")[:] = 0xA5
            if any(p % data[3] for p in (A, B, D)):
                raise Refused(EXECUTION_FAILED, f"an address is not aligned to {data[3]} bytes")
        elif self.capturing:
            raise Refused(NOT_SUPPORTED, "an algorithm must be chosen before the capture")
        if not alpha or not beta:
            raise Refused(INVALID_VALUE, "no alpha or beta")
        real = np.dtype(DTYPES[desc[1]])
        alpha, beta = (np.frombuffer(ctypes.string_at(p, real.itemsize), real)[0] for p in (alpha, beta))

        def run():
            opA, opB = self._operand(Al, A, desc[3], desc[0], "A"), self._operand(Bl, B, desc[4], desc[0], "B")
            R = alpha * (opA @ opB)
            if beta:
                R = R + beta * self._matrix(Cl, C, "C")
            out = self._matrix(Dl, D, "D")
            out[...] = self._finish(desc, R.astype(out.dtype), opA, opB, m, n)

        if self.issue is None:
            run()
        else:
            for layout, address, what in ((Al, A, "A"), (Bl, B, "B"), (Dl, D, "D")):
                self._matrix(layout, address, what)
            desc = Descriptor(desc.kind, **desc.values)  # as it is now: the work may come later
            needed = data[4] if algo else 0

            def later():
                if needed:
                    self._bytes(workspace, size, "workspace")[:] = 0xA5
                with np.errstate(all="ignore"):
                    run()

            self.issue(stream or 0, later)
        self.ran.append((int(data[1]) if algo else None, stream or 0))

    def _finish(self, desc, R, opA, opB, m, n):
        """The epilogue."""
        e, dtype = desc[7], R.dtype
        length = n if e & BGRADB else m
        if e & (BIAS | BGRAD | BGRADA | BGRADB):
            vector = self._bytes(desc[8], length * dtype.itemsize, "bias").view(dtype)
        if e & BIAS:
            R = R + vector[:, None]
        positive = R > 0
        if e & RELU:
            R = np.fmax(R, dtype.type(0))  # of NaN the library makes 0, too
        if e & AUX:
            line = desc[12] // 8  # bytes a column
            width = -(-m // 8)
            span = self._bytes(desc[11], (n - 1) * line + width, "mask")
            mask = np.lib.stride_tricks.as_strided(span, (n, width), (line, 1), writeable=True)
            if e & RELU:
                bits = np.ones((n, 8 * width), np.uint8)  # what lies behind the last row may be anything
                bits[:, :m] = positive.T
                mask[...] = np.packbits(bits, axis=1, bitorder="little")
            else:
                bits = np.unpackbits(mask, axis=1, bitorder="little")[:, :m].T
                R = np.where(bits, R, dtype.type(0))
        if e & BGRAD:
            vector[...] = R.sum(axis=1, dtype=np.float64)
        if e & BGRADA:
            vector[...] = opA.sum(axis=1)
        if e & BGRADB:
            vector[...] = opB.sum(axis=0)
        return R
