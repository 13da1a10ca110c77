"""What the real CuPy must be for this project, checked without a GPU: `python tests/real_cupy.py` beside a CuPy.

Every name of CuPy that the package uses exists and takes the arguments that it is given; an array behaves as that of
the stand-in (fake_cupy) wherever no device is needed; without a driver everything fails in the way on which the trial
of a GPU (`backprop_gpu.backend`) relies. One line a check; exit code 1 if one fails.
"""

import ast
import contextlib
import importlib
import inspect
import os
import re
import subprocess
import sys
import tempfile
import types
import warnings
from pathlib import Path

import numpy as np

FOLDER = tempfile.TemporaryDirectory()
os.environ["CUPY_CACHE_DIR"] = FOLDER.name  # read when cupy is imported; nothing shall be written to it
for variable in ("CUPY_CACHE_IN_MEMORY", "BACKPROP_GPU_BACKEND", "BACKPROP_GPU_DEVICE"):
    os.environ.pop(variable, None)

import cupy  # noqa: E402

import backprop_gpu as bp  # noqa: E402
from backprop_gpu import backend, report  # noqa: E402

PACKAGE = Path(bp.__file__).parent

# Parameters where neither `inspect` nor CuPy's docstring tells them, or tells them wrongly.
WRITTEN = {
    "RawModule": "*, code=None, path=None, options=(), backend='nvrtc', translate_cucomplex=False, "
    "enable_cooperative_groups=False, name_expressions=None, jitify=None",
    "ndarray": "shape, dtype=float, memptr=None, strides=None, order='C'",
}
LAUNCH = "grid, block, args, *, shared_mem=0"  # of what RawKernel(...) and RawModule.get_function(...) give

checks, failed = 0, 0


def check(what, right, why=""):
    """One line for one check."""
    global checks, failed
    checks += 1
    failed += not right
    print(f"{'ok  ' if right else 'FAIL'} {what}{'' if right or not why else f': {why}'}")


# ------------------------------------------------------------------------------------------ names and arguments


def resolve(dotted):
    """What CuPy has under a name; AttributeError where it has nothing."""
    thing = cupy
    for part in filter(None, dotted.split(".")):
        thing = getattr(thing, part)
    return thing


def signature_of(dotted):
    """The signature of a CuPy function, or None where nobody tells."""
    thing = resolve(dotted)
    if dotted in WRITTEN:
        return parsed(WRITTEN[dotted])
    if isinstance(thing, cupy.ufunc):
        inputs = ", ".join(f"x{i}" for i in range(thing.nin))
        return parsed(f"{inputs}, /, out=None, *, casting='same_kind', dtype=None")
    with contextlib.suppress(ValueError, TypeError):
        return inspect.signature(thing)
    return documented(thing)


def parsed(parameters):
    return inspect.signature(eval(f"lambda {parameters}: 0"))


def documented(thing):
    """The signature in the first line of a compiled function's docstring: `name(str code, int n=3, *, order='C')`."""
    first = (thing.__doc__ or "").strip().partition("\n")[0].replace("\\*", "*")
    if not (found := re.match(r"[\w.]+\((.*)\)", first)):
        return None
    names = []
    for parameter in re.split(r",\s*(?![^(\[{]*[)\]}])", found[1]):
        name, has_default, _ = parameter.partition("=")
        name = name.split()[-1] if name.split() else ""
        if name and name != "self":
            names.append(f"{name}=None" if has_default else name)
    with contextlib.suppress(SyntaxError):
        return parsed(", ".join(names))
    return None


class Uses(ast.NodeVisitor):
    """Collects what one module asks of CuPy: dotted names, calls of them, launches, methods of arrays.

    The array module goes by the names `xp`, `cupy` and what `import cupy` binds, as a variable, an attribute
    (`backend.xp`, `machine.cupy`) or what `array_module(a)` returns; a part of it may get a name of its own.
    """

    def __init__(self, path):
        self.path = path
        tree = ast.parse(path.read_text(encoding="utf-8"))
        bound = {}  # what imports bind: the full name of each
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                above = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
                bound |= {a.asname or a.name.partition(".")[0]: above + a.name for a in node.names}
        mine = {name: full[5:] for name, full in bound.items() if full == "cupy" or full.startswith("cupy.")}
        self.modules = set(bound)
        self.holds_arrays = bool(mine)  # what imports cupy at its head works on its arrays alone
        self.imported = [full for full in mine.values() if full]
        self.known = [{name: "" for name in ("xp", "cupy") if name not in bound} | mine]
        self.names, self.calls, self.launches, self.attributes = [], [], [], []
        self.called = {}  # what is called, by its node: the call
        self.visit(tree)

    def dotted(self, node):
        """The name below `cupy` that an expression stands for: "" for cupy itself, None for anything else."""
        if isinstance(node, ast.Name):
            return next((names[node.id] for names in reversed(self.known) if node.id in names), None)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "array_module":
            return ""
        if isinstance(node, ast.Attribute):
            above = self.dotted(node.value)
            if above is not None:
                return f"{above}.{node.attr}".lstrip(".")
            return "" if node.attr in ("xp", "cupy") else None
        return None

    def visit_FunctionDef(self, node):
        self.known.append({})
        self.generic_visit(node)
        self.known.pop()

    visit_Lambda = visit_FunctionDef

    def visit_Assign(self, node):
        self.generic_visit(node)
        for target in node.targets:
            if isinstance(target, ast.Name) and self.dotted(node.value):
                self.known[-1][target.id] = self.dotted(node.value)

    def visit_Attribute(self, node):
        if name := self.dotted(node):
            self.names.append((name, node.lineno))
            return
        root = node
        while isinstance(root, ast.Attribute):
            root = root.value
        if not (isinstance(root, ast.Name) and root.id in self.modules):
            self.attributes.append((node.attr, node.lineno, self.called.get(node)))
        self.generic_visit(node)

    def visit_Call(self, node):
        self.called[node.func] = node
        self.generic_visit(node)
        if name := self.dotted(node.func):
            self.calls.append((name, node.lineno, node))
        elif getattr(node.func, "attr", "") == "get_function":
            self.calls.append(("RawModule.get_function", node.lineno, node))
        elif isinstance(node.func, ast.Call):
            made = node.func.func
            if self.dotted(made) == "RawKernel" or getattr(made, "attr", "") == "get_function":
                self.launches.append((node.lineno, node))


def misfit(signature, node):
    """Why a call does not fit a signature, or "". What hides behind * and ** is not seen."""
    keywords = {k.arg: None for k in node.keywords if k.arg}
    hidden = any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords)
    try:
        if hidden:
            signature.bind_partial(**keywords)
        else:
            signature.bind(*[None] * len(node.args), **keywords)
    except TypeError as e:
        return str(e)
    return ""


def check_uses():
    """Every name of CuPy in the package's source, and every call of one."""
    lines, wrong = {}, {}
    for path in sorted(PACKAGE.rglob("*.py")):
        uses = Uses(path)

        def note(what, line, why, where=path.name):
            lines.setdefault(what, []).append(f"{where}:{line}")
            if why:
                wrong.setdefault(what, []).append(f"{where}:{line} {why}")

        for name, line in [*((name, "import") for name in uses.imported), *uses.names]:
            try:
                resolve(name)
                note(f"cupy.{name}", line, "")
            except AttributeError:
                note(f"cupy.{name}", line, "CuPy has no such name")
        for name, line, node in uses.calls:
            try:
                signature = signature_of(name)
            except AttributeError:
                continue  # told above
            what = f"the call of cupy.{name}"
            note(what, line, misfit(signature, node) if signature else "nobody tells its parameters: add it to WRITTEN")
        for line, node in uses.launches:
            note(f"a launch takes ({LAUNCH})", line, misfit(parsed(LAUNCH), node))
        for name, line, call in uses.attributes if uses.holds_arrays else ():
            if hasattr(np.ndarray, name) and not name.startswith("__"):
                note(f"cupy.ndarray's {name}", line, misfit_of_attribute(name, call))
    for what, where in sorted(lines.items()):
        why = "; ".join(wrong.get(what, ()))
        check(f"{what} ({len(where)}: {where[0]}{', ...' if len(where) > 1 else ''})", not why, why)
    check("the package uses CuPy", len(lines) > 20, lines)


def misfit_of_attribute(name, call):
    """Why an attribute of NumPy's arrays, perhaps called, is none of CuPy's arrays, or ""."""
    if not hasattr(cupy.ndarray, name):
        return "CuPy's arrays have no such attribute"
    signature = documented(getattr(cupy.ndarray, name)) if call else None
    unknown = {k.arg for k in call.keywords if k.arg} - set(signature.parameters) if signature else set()
    return f"no parameter {', '.join(sorted(unknown))}" if unknown else ""


def check_written():
    """What is written above is what CuPy's own words say, and what it does."""
    for name, parameters in WRITTEN.items():
        told = set(re.findall(r"\w+", (resolve(name).__doc__ or "").partition("Args:")[0]))
        check(f"written parameters of cupy.{name}", set(parsed(parameters).parameters) <= told)
    told = cupy.RawKernel.__call__.__doc__.replace("\\*", "*")
    check(f"a launch is documented as ({LAUNCH})", f"__call__(self, {LAUNCH})" in told, told)
    check("RawModule takes no positional argument", raised(lambda: cupy.RawModule("x")) is TypeError)
    check("RawModule takes options as a tuple", raised(lambda: cupy.RawModule(code="x", options=["-w"])) is TypeError)
    name = "get_function"
    check("RawModule.get_function takes a name", list(documented(getattr(cupy.RawModule, name)).parameters) == ["name"])


# ------------------------------------------------------------------------------------------ the stand-in


def raised(f):
    """The type of the exception that f() raises, None where it returns."""
    try:
        f()
    except Exception as e:
        return type(e)
    return None


def on_the_host(values):
    """A real cupy.ndarray over host memory: enough for all that starts no kernel and copies nothing."""
    memory = cupy.cuda.UnownedMemory(values.ctypes.data, values.nbytes, values, 0)
    return cupy.ndarray(values.shape, values.dtype, memptr=cupy.cuda.MemoryPointer(memory, 0))


# What both arrays, a real one and the stand-in's, must answer alike: a value, or an exception of the same type.
ALIKE = {
    "len(x)": len,
    "x.shape": lambda x: x.shape,
    "x.size": lambda x: x.size,
    "x.ndim": lambda x: x.ndim,
    "x.dtype": lambda x: x.dtype,
    "x.itemsize": lambda x: x.itemsize,
    "x.nbytes": lambda x: x.nbytes,
    "x.strides": lambda x: x.strides,
    "x is contiguous": lambda x: x.flags.c_contiguous,
    "x.T is contiguous": lambda x: x.T.flags.c_contiguous,
    "a slice of x is contiguous": lambda x: x[1:].flags.c_contiguous,
    "columns of x are contiguous": lambda x: x[:, 1:].flags.c_contiguous,
    "x[0].shape": lambda x: x[0].shape,
    "x[0, 0].shape": lambda x: x[0, 0].shape,
    "x.reshape(-1).shape": lambda x: x.reshape(-1).shape,
    "x.reshape(-1, 1).shape": lambda x: x.reshape(-1, 1).shape,
    "x.view(uint32).dtype": lambda x: x.view(np.uint32).dtype,
    "the module of type(x)": lambda x: type(x).__module__.partition(".")[0],
    "np.asarray(x)": np.asarray,
    "x.__array__()": lambda x: x.__array__(),
    "hash(x)": hash,
    "bool(x)": bool,
    "x[7]": lambda x: x[7],
    "x.reshape(4)": lambda x: x.reshape(4),
    "x.nothing": lambda x: x.nothing,
    "x is a cupy array": backend.is_cupy,
}


def check_stand_in():
    """What fake_cupy claims, where no device is needed to see it."""
    sys.modules.setdefault("pytest", types.ModuleType("pytest"))  # which skips tests, where there are tests
    import fake_cupy

    def walk(thing, above=""):
        for name, value in vars(thing).items():
            if not name.startswith("__"):
                yield above + name
                if isinstance(value, (types.SimpleNamespace, types.ModuleType)):
                    yield from walk(value, f"{above}{name}.")

    fake = fake_cupy.module()
    for name in walk(fake):
        check(f"the stand-in's cupy.{name} is real", raised(lambda name=name: resolve(name)) is None)
    for name in vars(fake.ndarray):
        if (name.startswith("_") and not name.endswith("__")) or name in ("__slots__", "__getattr__"):
            continue
        if hasattr(cupy.ndarray, name):
            check(f"the stand-in's ndarray.{name} is real", True)
        else:
            used = [p.name for p in PACKAGE.rglob("*.py") if any(name == a for a, *_ in Uses(p).attributes)]
            check(f"the package leaves the stand-in's own ndarray.{name} alone", not used, used)
    check("the stand-in's version", fake.__version__.partition(".")[0] == cupy.__version__.partition(".")[0])

    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    real, copy = on_the_host(values), fake.asarray(values)
    for what, ask in ALIKE.items():
        outcome = []
        for x in (real, copy):
            try:
                outcome.append(ask(x))
            except Exception as e:
                outcome.append(type(e))
        check(f"{what}, alike on the stand-in", outcome[0] == outcome[1], f"{outcome[0]} is real, {outcome[1]} is not")


# What the stand-in's streams, graphs and copies offer to the package; its methods take what CuPy's take, or less.
CLASSES = ("cuda.Device", "cuda.Event", "cuda.Graph", "cuda.MemoryPointer", "cuda.PinnedMemoryPointer", "cuda.Stream")
FUNCTIONS = (
    "asarray", "asnumpy", "ndarray.get", "ndarray.set", "cuda.alloc_pinned_memory", "cuda.get_current_stream",
    "cuda.using_allocator",
)  # fmt: skip


def check_streams():
    """Streams, events, graphs, pinned memory: names, parameters, defaults, and errors that need no device."""
    import fake_cupy

    fake = fake_cupy.module()

    def same_parameters(what, mine, dotted):
        real = signature_of(dotted)
        if real is None:
            check(f"somebody tells the parameters of cupy.{dotted}", False)
            return
        ours = {n: p for n, p in inspect.signature(mine).parameters.items() if n not in ("self", "cls")}
        theirs = {n: p for n, p in real.parameters.items() if n not in ("self", "cls")}
        right = list(ours) == list(theirs)[: len(ours)] and all(
            (ours[n].default is p.empty) == (theirs[n].default is p.empty) for n, p in ours.items()
        )
        check(f"the stand-in's {what} takes what CuPy's takes", right, f"{list(ours)} is not of {list(theirs)}")

    for name in CLASSES:
        mine, real = getattr(fake.cuda, name.partition(".")[2]), resolve(name)
        if name in ("cuda.Event", "cuda.Stream", "cuda.Device"):
            same_parameters(name, mine, name)
        for method, value in vars(mine).items():
            if method.startswith("_"):
                continue
            check(f"the stand-in's {name}.{method} is real", hasattr(real, method))
            if inspect.isfunction(value) and hasattr(real, method):
                same_parameters(f"{name}.{method}", value, f"{name}.{method}")
    for name in FUNCTIONS:
        mine = fake
        for part in name.split("."):
            mine = getattr(mine, part)
        same_parameters(name, mine, name)

    null = cupy.cuda.Stream.null
    check(
        "Stream.null is one of ptr 0", isinstance(null, cupy.cuda.Stream) and null.ptr == 0 == fake.cuda.Stream.null.ptr
    )
    check("Stream(null=True) equals it", cupy.cuda.Stream(null=True) == null)
    for what, ask in {
        "capturing on the null stream": lambda cp: cp.cuda.Stream.null.begin_capture(),
        "Graph()": lambda cp: cp.cuda.Graph(),
        "an interprocess event with times": lambda cp: cp.cuda.Event(interprocess=True),
    }.items():
        told = []
        for cp in (cupy, fake):
            try:
                ask(cp)
            except Exception as e:
                told.append((type(e), str(e)))
        check(f"{what} raises the same on the stand-in", len(told) == 2 and told[0] == told[1], told)
    runtime = cupy.cuda.runtime
    for status, words in fake_cupy.CUDARuntimeError.WORDS.items():
        check(f"CUDA's error {status} is {words.partition(':')[0]}", str(runtime.CUDARuntimeError(status)) == words)
    for name in ("Global", "Relaxed", "ThreadLocal"):
        name = f"streamCaptureMode{name}"
        check(f"{name}, alike on the stand-in", getattr(runtime, name) == getattr(fake.cuda.runtime, name))
    status = raised(lambda: runtime.streamQuery(0))
    check("asking whether a stream is done raises nothing, whatever is wrong", status is None, status)
    shown = documented(cupy.ndarray.get).parameters
    check("ndarray.get can leave the host waiting for nothing", "blocking" in shown, list(shown))
    for f in (resolve("cuda.MemoryPointer").copy_from_host_async, resolve("cuda.MemoryPointer").copy_to_host_async):
        check(f"{f.__name__} asks for pinned memory", "pinned memory" in f.__doc__)

    for cp in (cupy, fake):
        sizes = []

        def refuse(size, sizes=sizes):
            sizes.append(size)
            raise MemoryError

        with cp.cuda.using_allocator(refuse):
            error = raised(lambda cp=cp: cp.empty((2, 3), dtype=np.float32))
        check(
            "an allocator of one's own is asked for bytes, and may refuse", (error, sizes) == (MemoryError, [24]), sizes
        )


# ------------------------------------------------------------------------------------------ without a driver


def in_new_process(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout.strip(), done.stderr.strip()


CHOOSE = """
import json, logging
from backprop_gpu import backend, report
logging.basicConfig(level=logging.INFO, format="%(message)s")
chosen = backend.choose("auto")
print(json.dumps([chosen.name, chosen.reason, [f["fault"] for f in report.doctor(chosen)["faults"] if f["found"]]]))
"""


def check_no_driver():
    """How CuPy fails without a driver, and what the backend makes of it."""
    runtime = cupy.cuda.runtime
    source = 'extern "C" __global__ void probe(int* x) { nonsense }'
    module = cupy.RawModule(code=source, options=("--std=c++17",))
    cupy.RawKernel(source, "probe")
    cupy.ElementwiseKernel("float32 x", "float32 y", "y = nonsense", "nonsense")
    check("constructing RawModule, RawKernel and ElementwiseKernel compiles nothing", not os.listdir(FOLDER.name))
    for what, ask in {
        "getDeviceCount()": runtime.getDeviceCount,
        "zeros(1)": lambda: cupy.zeros(1),
        "RawModule.compile()": module.compile,
        "RawModule.get_function()": lambda: module.get_function("probe"),
        "entering Device(0)": lambda: cupy.cuda.Device(0).__enter__(),
    }.items():
        error = None
        try:
            ask()
        except Exception as e:
            error = e
        right = isinstance(error, runtime.CUDARuntimeError) and isinstance(error, RuntimeError)
        right = right and error.status == 35 and "cudaErrorInsufficientDriver" in str(error)
        check(f"{what} raises CUDARuntimeError, status 35", right, repr(error))
    check("driverGetVersion() is 0", runtime.driverGetVersion() == 0, runtime.driverGetVersion())
    check("runtimeGetVersion() is told", runtime.runtimeGetVersion() >= 12000, runtime.runtimeGetVersion())
    check("this CuPy is not ROCm's", runtime.is_hip is False)
    check("cudaDevAttrComputeMode is 20", runtime.cudaDevAttrComputeMode == 20)

    libraries = importlib.import_module("cupy_backends.cuda.libs")
    for what, ask, kinds in (
        ("NVRTC", cupy.cuda.nvrtc.getVersion, RuntimeError),
        ("cuBLAS", lambda: libraries.cublas, ImportError),
    ):
        try:
            print(f"skip {what} is here: {ask()}")
        except Exception as e:
            right = isinstance(e, kinds) and backend._why(e, {}).kind == "libraries"
            check(f"{what} is missing, and taken for that", right, repr(e))

    told = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chosen = backend.choose("auto")
        told = [w for w in caught if issubclass(w.category, RuntimeWarning)]
    check('choose("auto") gives NumPy', chosen.name == "numpy", chosen)
    check("and the reason", chosen.reason == "there is no NVIDIA driver", chosen.reason)
    check("and one RuntimeWarning", len(told) == len(caught) == 1, [str(w.message) for w in caught])
    try:
        cause = backend.choose("cupy")
    except bp.BackendError as e:
        cause = e.cause
    check('choose("cupy") raises BackendError', cause == "there is no NVIDIA driver", cause)

    found = report.doctor(chosen)
    faults = {f["fault"] for f in found["faults"] if f["found"]}
    check("doctor names the driver", "driver" in faults <= {"driver", "libraries"}, faults)
    check("doctor tells CuPy's version", cupy.__version__ in found["versions"].values(), found["versions"])


def check_cache():
    """What the backend does about CuPy's folder of compiled kernels."""
    kept = resolve("cuda.compiler._kernel_cache_backend._cache_dir")
    check("CuPy keeps its kernels where CUPY_CACHE_DIR says", kept == backend._cache_folder() == FOLDER.name, kept)
    from cupy.cuda._compiler_cache import _default_cache_dir as default

    place = os.environ.pop("CUPY_CACHE_DIR")
    check("and else where the backend looks", default == backend._cache_folder(), default)
    os.environ["CUPY_CACHE_DIR"] = place
    file = Path(FOLDER.name) / "file"
    file.touch()
    nowhere = str(file / "kernels")
    code, _, error = in_new_process("import cupy", CUPY_CACHE_DIR=nowhere)
    check("without that folder CuPy does not import", code == 1 and "NotADirectoryError" in error, error)
    code, out, error = in_new_process("import cupy", CUPY_CACHE_DIR=nowhere, CUPY_CACHE_IN_MEMORY="1")
    check("not even where it keeps its kernels in memory", code == 1 and "NotADirectoryError" in error, error)
    code, out, error = in_new_process(CHOOSE, CUPY_CACHE_DIR=nowhere)
    right = code == 0 and '"cache"' in out and "does not import" not in out
    check("through the backend it does, and doctor names the folder", right, out + error)
    line = f"CuPy keeps its compiled kernels in memory: the folder {nowhere} cannot be written"
    check("and one line in the log", error.splitlines().count(line) == 1, error)
    file.unlink()


def check_two_packages():
    """What CuPy and the backend say where a second package claims the module, here by its metadata alone."""
    mine, *more = backend.cupy_builds() or [""]
    check("one CuPy is installed", mine and not more, [mine, *more])
    other = "cupy-cuda12x" if mine == "cupy-cuda13x" else "cupy-cuda13x"
    with tempfile.TemporaryDirectory() as folder:
        info = Path(folder) / f"{other.replace('-', '_')}-14.0.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {other}\nVersion: 14.0.0\n")
        _, _, error = in_new_process("import cupy", PYTHONPATH=folder)
        check("two packages are a UserWarning of CuPy", "UserWarning" in error and "multiple CuPy packages" in error)
        code, out, error = in_new_process(CHOOSE, PYTHONPATH=folder)
        check("doctor names them", code == 0 and '"packages"' in out, out + error)
        check("and CuPy's warning does not come through", "multiple CuPy packages" not in error, error)


def main():
    print(f"CuPy {cupy.__version__}, {', '.join(backend.cupy_packages())}, NumPy {np.__version__}")
    check_uses()
    check_written()
    check_stand_in()
    check_streams()
    check_cache()
    check_two_packages()
    if driver := backend.driver_cuda():
        print(f"skip how CuPy fails without a driver: this one runs CUDA up to {backend.cuda_version(driver)}")
    else:
        check_no_driver()
    print(f"{checks} checks, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
