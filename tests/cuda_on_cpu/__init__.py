"""Runs CUDA texts on the CPU, built by g++, with the checks that compute-sanitizer makes on a GPU.

    module = cuda_on_cpu.Module(text, check=True)
    module.function("scale")((1,), (32,), (array, np.float32(2)))

emulator.h is what a text sees, arch.h its part for the functions of kernels/arch.cuh; runtime.cpp runs the kernels.
Not seen: weak memory order, streams, inline PTX, limits of a launch beyond threads and dynamic shared memory, speed,
threads that come to one barrier by different calls of the function that it is in. Told as errors, though a GPU allows
them: memory that atomics and fences alone keep in order, or a __syncwarp of a part of a warp.
"""

import ctypes
import functools
import hashlib
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
HEADERS = ("emulator.h", "arch.h")
TIME_LIMIT = 60.0  # seconds of CPU time that a launch may take
MAX_SHARED = 227 * 1024  # as sm_90; older ones have 96 KiB at least

# -O1: twice the build time for no gain above it. -fexpensive-optimizations: fuses multiply-adds, as NVRTC does.
# -fno-threadsafe-statics, -fno-gnu-unique: each unit has its own static variables, and one thread.
# -fstack-clash-protection: a large frame cannot step over the guard page below the stack.
FLAGS = """-std=c++17 -O1 -fexpensive-optimizations -ffp-contract=fast -mfma -fno-math-errno -fPIC -shared
    -fvisibility=hidden -fno-exceptions -fno-rtti -fno-threadsafe-statics -fno-gnu-unique
    -U_FORTIFY_SOURCE -fstack-clash-protection -fmax-errors=5
    -Wall -Werror -Wno-unknown-pragmas -Wno-sign-compare -Wno-maybe-uninitialized -Wno-array-bounds
    -Wno-unused-variable -Wno-unused-but-set-variable -Wno-unused-function -Wno-unused-local-typedefs""".split()
LINE_FLAGS = ["-g1", "-gdwarf-4"]  # they change no instruction, and take a fifth of a build
CHECKS = "thread,shift,integer-divide-by-zero,unreachable,return,signed-integer-overflow,bounds,alignment,bool"
CHECK_FLAGS = [f"-fsanitize={CHECKS}", "--param=tsan-instrument-func-entry-exit=0"]
# -nodefaultlibs leaves out the sanitizers' own libraries; the runtime takes their place.
LINK_FLAGS = ["-nodefaultlibs", "-lm", "-lc", "-lgcc", "-Wl,-z,defs"]


class KernelError(RuntimeError):
    """A launch that was refused or stopped, or a text that does not compile.

    kernel, block, thread, argument (its number), index and line are None where they are not known.
    """

    def __init__(self, message, kernel=None, block=None, thread=None, argument=None, index=None, line=None):
        super().__init__(message)
        self.kernel, self.block, self.thread = kernel, block, thread
        self.argument, self.index, self.line = argument, index, line


class Uninitialised:
    """An argument whose elements the kernel shall write before anyone reads them."""

    def __init__(self, array):
        self.array = array


def compiler():
    """The path of g++, or None."""
    return shutil.which(os.environ.get("CXX", "g++"))


@functools.cache
def unavailable():
    """Why kernels cannot run on this CPU, or None."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"CUDA on the CPU needs x86-64 Linux, this is {platform.machine()} {sys.platform}"
    if compiler() is None:
        return "CUDA on the CPU needs g++"
    if "fma" not in Path("/proc/cpuinfo").read_text().split():
        return "CUDA on the CPU needs a CPU with FMA"
    return None


# ---- texts ----------------------------------------------------------------------------------------------------------

_COMMENT = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])+\'', re.DOTALL)
_BOUNDS = r"(?:__launch_bounds__\s*\([^)]*\)\s*)?"
_KERNEL = re.compile(rf'extern\s+"C"\s+__global__\s+{_BOUNDS}void\s+{_BOUNDS}(\w+)\s*\(([^)]*)\)')
_MACRO = re.compile(r"^[ \t]*#[ \t]*define[ \t]+(\w+)", re.MULTILINE)
_ALIGN = r"(?:(?:alignas|__align__)\s*\([^)]*\)\s*)?"
_TYPE = r"((?:[\w:]+(?:<[^;]*?>)?\s+)+?)"
_DYNAMIC = re.compile(rf"\bextern\s+__shared__\s+{_ALIGN}{_TYPE}(\w+)\s*\[\s*\]\s*;")
_SHARED = re.compile(rf"\b__shared__\s+{_ALIGN}{_TYPE}(\w+)((?:\s*\[[^\]]*\])*)\s*;")


def _without_comments(text):
    """The text with its lines where they were; g++ would warn of #pragma once in what is no header."""
    text = _COMMENT.sub(lambda m: re.sub(r"[^\n]", " ", m[0]) if m[0][0] == "/" else m[0], text)
    return re.sub(r"^[ \t]*#[ \t]*pragma[ \t]+once[ \t]*$", "", text, flags=re.MULTILINE)


def _with_shared_variables(text):
    """Each declaration of a shared variable as a reference to memory that the runtime guards."""
    text = _DYNAMIC.sub(r'\1* \2 = ::cuda_on_cpu::dynamic_shared<\1>("\2");', text)
    text = _SHARED.sub(r'auto& \2 = ::cuda_on_cpu::shared<\1\3>("\2", [] {});', text)
    if "__shared__" in text:
        line = text[: text.index("__shared__")].count("\n") + 1
        raise KernelError(f"line {line}: declare one __shared__ variable at a time, as in `__shared__ float x[8];`")
    return text


def _unit(texts):
    """One translation unit: each text in a namespace, its kernels renamed, its macros put back behind it."""
    lines = ['#include "emulator.h"']
    for code, text in enumerate(texts):
        kernels = _KERNEL.findall(text)
        names = [name for name, _ in kernels]
        macros = sorted({*_MACRO.findall(text), *names})
        lines += [f'#pragma push_macro("{m}")\n#undef {m}' for m in macros]
        lines += [f"#define {name} {name}__{code}" for name in names]
        lines += [f'namespace text_{code} {{\n#include "text_{code}.cu"']
        # By its signature, for a kernel may share its name with a template.
        lines += [
            f'extern "C" __attribute__((visibility("default"))) const cuda_on_cpu::Kernel kernel_{code}_{name};\n'
            f"const cuda_on_cpu::Kernel kernel_{code}_{name} =\n"
            f"    cuda_on_cpu::Entry<void({' '.join(parameters.split())}), {name}>::description;"
            for name, parameters in kernels
        ]
        lines += ["}", *(f'#undef {m}\n#pragma pop_macro("{m}")' for m in macros)]
    return "\n".join(lines) + "\n"


# ---- builds ---------------------------------------------------------------------------------------------------------


def cache_folder():
    """The user's own folder of built units."""
    default = Path(tempfile.gettempdir()) / f"backprop-gpu-cuda-on-cpu-{os.getuid()}"
    folder = Path(os.environ.get("BACKPROP_GPU_CUDA_ON_CPU_CACHE", default))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise KernelError(
            f"{folder} belongs to another user\nset BACKPROP_GPU_CUDA_ON_CPU_CACHE to a folder of your own"
        )
    return folder


def _built(stem, key, write, command):
    """The library that the command makes of the files that write() returns, or from the cache, by the key."""
    stat = os.stat(command[0])
    key = hashlib.sha256(repr((key, command, stat.st_mtime_ns, stat.st_size)).encode()).hexdigest()[:24]
    library = cache_folder() / f"{stem}-{key}.so"
    if library.exists():
        return library
    # Built elsewhere and renamed, for another process may build the same unit now.
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        for name, text in write().items():
            (Path(folder) / name).write_text(text)
        done = subprocess.run([*command, "-o", library.name], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise KernelError(f"g++ does not compile the {stem}\n{done.stderr.strip()}")
        os.replace(Path(folder) / library.name, library)
    return library


@functools.cache
def _sources():
    return {name: (HERE / name).read_text() for name in (*HEADERS, "runtime.cpp", "__init__.py")}


@functools.cache
def _runtime():
    """The path of runtime.cpp's library, and the library."""
    command = [compiler(), *"-std=c++17 -O2 -fPIC -shared -Wall -Werror -fno-exceptions -U_FORTIFY_SOURCE".split()]
    command += ["-Wl,-soname,cuda_on_cpu.so", "runtime.cpp", "-ldl", "-lrt"]
    path = _built("runtime", _sources(), _sources, command)
    library = ctypes.PyDLL(str(path))  # PyDLL: the interpreter's lock also keeps launches apart
    library.cuda_on_cpu_launch.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
    return path, library.cuda_on_cpu_launch


# ---- what runtime.cpp and emulator.h declare ------------------------------------------------------------------------


class _Report(ctypes.Structure):
    _fields_ = [
        ("message", ctypes.c_char * 512),
        ("in_thread", ctypes.c_int),
        ("block", ctypes.c_uint * 3),
        ("thread", ctypes.c_uint * 3),
        ("argument", ctypes.c_int),
        ("index", ctypes.c_longlong),
        ("file", ctypes.c_char_p),
        ("line", ctypes.c_int),
        ("pc", ctypes.c_size_t),
        ("other_pc", ctypes.c_size_t),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("check", ctypes.c_int),
        ("seed", ctypes.c_uint64),
        ("seconds", ctypes.c_double),
        ("report", _Report),
    ]


class _Argument(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_size_t),
        ("item", ctypes.c_uint),
        ("kind", ctypes.c_int),
        ("name", ctypes.c_char_p),
    ]


_ARRAY, _WRITES, _UNINITIALISED = 1, 2, 4


class _Parameter(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_char), ("size", ctypes.c_uint), ("pointer", ctypes.c_bool), ("writes", ctypes.c_bool)]


class _Kernel(ctypes.Structure):
    _fields_ = [("call", ctypes.c_void_p), ("count", ctypes.c_int), ("parameters", ctypes.POINTER(_Parameter))]


# ---- modules and kernels --------------------------------------------------------------------------------------------


class Module:
    """CUDA texts, built into one library: what cupy.RawModule is on a GPU.

    check: look at every load and store, for bounds, races, uninitialised memory, alignment and undefined behaviour.
    lines: build it so that an error can name its line; without, that is built once more when there is an error to tell.
    """

    def __init__(self, codes, check=False, options=(), lines=True):
        if reason := unavailable():
            raise KernelError(reason)
        self.texts = [codes] if isinstance(codes, str) else list(codes)
        self.check = check
        runtime, self._run = _runtime()
        self._command = [compiler(), *FLAGS, *(CHECK_FLAGS if check else ()), *options]
        self._command += ["unit.cpp", str(runtime), *LINK_FLAGS]
        self.path = self._build(lines)
        self._library = ctypes.PyDLL(str(self.path))

    def _build(self, lines):
        command = [*self._command, *LINE_FLAGS] if lines else self._command
        return _built("unit", (self.texts, _sources()), self._files, command)

    def _files(self):
        texts = [_without_comments(text) for text in self.texts]
        files = {f"text_{code}.cu": _with_shared_variables(text) for code, text in enumerate(texts)}
        return {**files, "unit.cpp": _unit(texts), **{name: _sources()[name] for name in HEADERS}}

    def _kernels(self, code):
        return dict(_KERNEL.findall(_without_comments(self.texts[code])))

    def names(self, code=0):
        """The names of a text's kernels."""
        return list(self._kernels(code))

    def function(self, name, code=0):
        """A kernel, to be launched as by CuPy: function(grid, block, args, shared_mem=0, seed=0)."""
        kernels = self._kernels(code)
        if name not in kernels:
            raise KernelError(f"no kernel '{name}' in this text\nit has {', '.join(kernels) or 'none'}")
        description = _Kernel.in_dll(self._library, f"kernel_{code}_{name}")
        return Function(self, name, description, kernels[name])

    def _places(self, addresses):
        """For each address in the library: (file, line) in the texts, or None."""
        command = ["addr2line", "-a", "-i", "-e", str(self._build(lines=True)), *map(hex, addresses)]
        output = subprocess.run(command, capture_output=True, text=True).stdout if shutil.which("addr2line") else ""
        frames = []  # of each address, from the inmost inlined function out
        for row in output.splitlines():
            if row.startswith("0x"):
                frames.append([])
            elif match := re.match(r"(?:.*/)?([^/?]+):(\d+)", row):
                frames[-1].append((match[1], int(match[2])))
        return [next((f for f in fs if f[0] not in (*HEADERS, "unit.cpp")), None) for fs in frames]

    def _quote(self, file, line):
        """`line 3: x[i] = 0;`, with the line of the text as it was given."""
        match = re.fullmatch(r"text_(\d+)\.cu", file)
        if not match:
            return f"{file}, line {line}"  # the text has a #line of its own
        rows = self.texts[int(match[1])].split("\n")
        which = f" of text {match[1]}" if len(self.texts) > 1 else ""
        return f"line {line}{which}: {rows[line - 1].strip() if line <= len(rows) else ''}"


class Parameter:
    """What a kernel takes in one place: a pointer or a scalar, and the dtypes that fit."""

    def __init__(self, declared, described):
        words = re.findall(r"\w+", declared)
        self.name = words[-1] if words else "?"
        self.is_array, self.writes = described.pointer, described.writes
        kind, size = described.kind.decode(), described.size
        if kind == "V":  # an array of structs is an array of their members
            self.type, fitting = f"structs of {size} bytes", "?bBhHiIqQfd" if self.is_array else ""
        else:
            self.type = str(np.dtype(f"{kind}{size}".replace("b1", "?")))
            fitting = [self.type, "bool"] if self.type == "uint8" else [self.type]
        self.dtypes = frozenset(map(np.dtype, fitting))


class Function:
    """A kernel of a module."""

    def __init__(self, module, name, description, declared):
        self.module, self.name, self._description = module, name, description
        parts, n = declared.split(","), description.count
        if len(parts) != n:  # none, or a macro stands for several
            parts = [""] * n
        self.parameters = [Parameter(parts[i], description.parameters[i]) for i in range(n)]
        self._shape = None
        self._launch, self._arguments, self._scalars = _Launch(), (_Argument * n)(), (ctypes.c_uint64 * n)()
        for i, (argument, parameter) in enumerate(zip(self._arguments, self.parameters, strict=True)):
            argument.name, argument.data = parameter.name.encode(), ctypes.addressof(self._scalars) + 8 * i
        self._addresses = [ctypes.addressof(x) for x in (description, self._launch, self._arguments)]

    def __call__(self, grid, block, args, shared_mem=0, seed=0):
        """Launch the kernel and wait for it. seed 0 runs in order; others shuffle lanes, warps and blocks."""
        launch = self._launch
        if (grid, block) != self._shape:
            self._set_shape(grid, block)
        if not 0 <= shared_mem <= MAX_SHARED:
            self._refuse(f"{shared_mem} bytes of dynamic shared memory, at most {MAX_SHARED}")
        if len(args) != len(self.parameters):
            self._refuse(f"{len(args)} arguments given, the kernel takes {len(self.parameters)}")
        launch.shared_bytes, launch.check, launch.seed, launch.seconds = shared_mem, self.module.check, seed, TIME_LIMIT
        for i, parameter in enumerate(self.parameters):
            (self._set_array if parameter.is_array else self._set_scalar)(i, parameter, args[i])
        if self.module._run(*self._addresses, len(args)):
            raise self._error(launch.report)

    def _refuse(self, message, argument=None):
        if argument is not None:
            message = f"argument {argument} '{self.parameters[argument].name}': {message}"
        raise KernelError(f"{self.name}: {message}", kernel=self.name, argument=argument)

    def _set_shape(self, grid, block):
        for name, shape, limits in (("grid", grid, (2**31 - 1, 65535, 65535)), ("block", block, (1024, 1024, 64))):
            if not 1 <= len(shape) <= 3 or not all(1 <= n <= limit for n, limit in zip(shape, limits, strict=False)):
                self._refuse(f"{name} {shape}: one to three numbers from 1 to {limits}")
            getattr(self._launch, name)[:] = [*map(int, shape), 1, 1][:3]
        if math.prod(block) > 1024:
            self._refuse(f"block {block}: {math.prod(block)} threads, at most 1024")
        if math.prod(grid) >= 2**31:
            self._refuse(f"grid {grid}: {math.prod(grid)} blocks, too many for a CPU")
        self._shape = (grid, block)

    def _set_array(self, i, parameter, value):
        argument, kind = self._arguments[i], _ARRAY
        if isinstance(value, np.uintp) and value == 0:
            argument.kind, argument.data, argument.bytes = kind, None, 0
            return
        if isinstance(value, Uninitialised):
            kind |= _UNINITIALISED
            value = value.array
        if not isinstance(value, np.ndarray) or value.dtype not in parameter.dtypes:
            self._refuse(f"the kernel wants an array of {parameter.type}, given {_told(value)}", i)
        flags = value.flags
        if not flags.c_contiguous:
            self._refuse("the array is not C-contiguous", i)
        if parameter.writes:
            kind |= _WRITES
            if not flags.writeable:
                self._refuse("the kernel may write the array, which is read-only", i)
        argument.kind, argument.data, argument.bytes, argument.item = (
            kind,
            value.ctypes.data,
            value.nbytes,
            value.itemsize,
        )

    def _set_scalar(self, i, parameter, value):
        if not isinstance(value, np.generic) or value.dtype not in parameter.dtypes:
            self._refuse(f"the kernel wants a scalar {parameter.type}, given {_told(value)}", i)
        self._scalars[i] = int.from_bytes(value.tobytes(), "little")

    def _error(self, report):
        addresses = [a for a in (report.pc, report.other_pc) if a]
        places = self.module._places(addresses) if addresses else []
        if not report.pc:
            places.insert(0, (report.file.decode(), report.line) if report.file else None)
        message, block, thread = report.message.decode(), None, None
        if report.in_thread:
            block, thread = tuple(report.block), tuple(report.thread)
            message = f"block {block} thread {thread}: {message}"
        for label, place in zip(("", "the other: "), places, strict=False):
            if place:
                message += f"\n    {label}{self.module._quote(*place)}"
        has_argument = report.argument >= 0
        return KernelError(
            f"{self.name}: {message}",
            kernel=self.name,
            block=block,
            thread=thread,
            argument=report.argument if has_argument else None,
            index=report.index if has_argument else None,
            line=places[0][1] if places and places[0] else None,
        )


def _told(value):
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype}"
    return f"a scalar {value.dtype}" if isinstance(value, np.generic) else f"a Python {type(value).__name__}"
