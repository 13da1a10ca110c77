"""kernels/arch.cuh: it compiles where it should, and its second body, for the CPU, does what PTX says."""

import kernels_on_cpu
import numpy as np
import nvrtc
import pytest
from cuda_on_cpu import KernelError, Module, Uninitialised
from test_cuda_on_cpu import MODES, Case
from test_nvrtc import known, library  # noqa: F401

from backprop_gpu import cuda_source

F32, U32 = np.float32, np.uint32
ARCH = cuda_source.read("arch.cuh").replace("#pragma once\n", "")
WARPS = 4  # in two blocks


@pytest.fixture(scope="module", autouse=True)
def _available():
    kernels_on_cpu.require()


# ---- compiled -------------------------------------------------------------------------------------------------------

ALL_OF_IT = (
    ARCH
    + """
extern "C" __global__ void tensor_cores(const float* x, float* y) {
    __shared__ alignas(16) float s[128];
    pdl_wait();
    copy_async16(s + 4 * threadIdx.x, x + 4 * threadIdx.x);
    copy_async_commit();
    copy_async_wait<1>();
    copy_async_wait<0>();
    __syncthreads();
    pdl_launch();
    float d[4] = {};
    const unsigned a[4] = {to_tf32(s[0]), to_tf32(s[1]), to_tf32(s[threadIdx.x]), to_tf32(s[3])};
    const unsigned b[2] = {pack_bf16(s[4], s[5]), pack_bf16(s[6], s[threadIdx.x])};
    mma_tf32_16x8x8(d, a, b);
    mma_bf16_16x8x16(d, a, b);
    for (int i = 0; i < 4; ++i) y[4 * threadIdx.x + i] = d[i];
}
"""
)
PDL = ARCH + 'extern "C" __global__ void k(float* x) { pdl_wait(); *x += 1; pdl_launch(); }'
ONLY_FROM_80 = {
    "to_tf32": "*x = to_tf32(1.f);",
    "pack_bf16": "*x = pack_bf16(1.f, 2.f);",
    "mma_tf32_16x8x8": "float d[4]; unsigned a[4], b[2]; mma_tf32_16x8x8(d, a, b);",
    "mma_bf16_16x8x16": "float d[4]; unsigned a[4], b[2]; mma_bf16_16x8x16(d, a, b);",
}


def compiled(library, text, arch):  # noqa: F811
    if arch not in known(library):
        pytest.skip(f"this NVRTC does not know sm_{arch}")
    return nvrtc.compile_for(library, text, "arch.cu", arch)


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_every_function_compiles(library, arch):  # noqa: F811
    done, log = compiled(library, ALL_OF_IT, arch)
    assert done, log
    assert "warning" not in log
    assert nvrtc.usage(log)["tensor_cores"].stack == 0


@pytest.mark.parametrize("arch", [70, 80, 90])
def test_programmatic_launch_compiles_where_it_does_nothing(library, arch):  # noqa: F811
    done, log = compiled(library, PDL, arch)
    assert done, log
    assert "arch.cu(" not in log  # a warning of a line


@pytest.mark.parametrize("name", ONLY_FROM_80)
def test_what_an_architecture_lacks_does_not_compile(library, name):  # noqa: F811
    text = ARCH + f'extern "C" __global__ void k(unsigned* x) {{ {ONLY_FROM_80[name]} }}'
    assert compiled(library, text, 80)[0]
    done, log = compiled(library, text, 70)
    assert not done
    assert f'"{name}" is undefined' in log


# ---- rounding -------------------------------------------------------------------------------------------------------

PRODUCT = """
extern "C" __global__ void call_NAME(const unsigned* all_a, const unsigned* all_b, float* all_d) {
    const int thread = blockIdx.x * blockDim.x + threadIdx.x;
    unsigned a[4], b[2];
    float d[4];
    for (int i = 0; i < 4; ++i) a[i] = all_a[4 * thread + i], d[i] = all_d[4 * thread + i];
    for (int i = 0; i < 2; ++i) b[i] = all_b[2 * thread + i];
    NAME(d, a, b);
    for (int i = 0; i < 4; ++i) all_d[4 * thread + i] = d[i];
}
"""
FUNCTIONS = (
    ARCH
    + """
extern "C" __global__ void round_tf32(const unsigned* x, unsigned* y) {
    y[threadIdx.x] = to_tf32(__uint_as_float(x[threadIdx.x]));
}
extern "C" __global__ void round_bf16(const unsigned* x, unsigned* y) {
    const int i = threadIdx.x;
    y[i] = pack_bf16(__uint_as_float(x[i]), __uint_as_float(x[(i + 1) % blockDim.x]));
}
"""
    + PRODUCT.replace("NAME", "mma_tf32_16x8x8")
    + PRODUCT.replace("NAME", "mma_bf16_16x8x16")
)


@pytest.fixture(scope="module")
def functions():
    modules = {}

    def get(name, check=False):
        if check not in modules:
            modules[check] = Module(FUNCTIONS, check=check)
        return modules[check].function(name)

    return get


def to_nearest(x, mantissa, away):
    """float32 numbers with so many bits of mantissa; of the two nearest the one farther from zero, or the even one."""
    x = x.astype(np.float64)
    unit = np.exp2(np.maximum(np.frexp(x)[1] - 1, -126) - mantissa)
    steps = np.abs(x) / unit
    with np.errstate(over="ignore"):
        return np.copysign((np.floor(steps + 0.5) if away else np.rint(steps)) * unit, x).astype(F32)


def tf32(x):
    return to_nearest(x, 10, away=True)


def bf16(x):
    return to_nearest(x, 7, away=False)


def hard_to_round():
    """1024 float32, finite and not: halfway and beside it for both formats, denormals, the largest, random ones."""
    halfway = [
        exponent | upper << bit | below
        for exponent in (0, 0x00800000, 0x3F800000, 0x7F000000)
        for upper in (0, 1, 2, 3)
        for bit in (13, 16)
        for below in ((1 << bit - 1) - 1, 1 << bit - 1, (1 << bit - 1) + 1)
    ]
    others = [0, 1, 0xFFF, 0x1000, 0x7FFF, 0x8000, 0x8001, 0x7FFFFF, 0x7F7FEFFF, 0x7F7FF000, 0x7F7F7FFF, 0x7F7F8000]
    others += [0x7F7FFFFF, 0x7F800000]
    words = np.array([*halfway, *others], U32)
    words = np.concatenate([words, words | U32(1 << 31)])
    random = np.random.default_rng(1).integers(0, 1 << 32, 1024 - len(words), U32)
    random[(random & 0x7F800000) == 0x7F800000] &= U32(0xFF7FFFFF)  # no NaN among them
    return np.concatenate([words, random]).view(F32)


NANS = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFF800001, 0x7FFFFFFF, 0x7F801000], U32).view(F32)


@pytest.mark.parametrize("check", [False, True])
def test_rounding_to_tf32(functions, check):
    x = hard_to_round()
    y = np.zeros(len(x), U32)
    functions("round_tf32", check)((1,), (len(x),), [x.view(U32), y])
    finite = np.isfinite(x)
    np.testing.assert_array_equal(y[finite], tf32(x[finite]).view(U32))
    np.testing.assert_array_equal(y[~finite], x[~finite].view(U32))
    assert not (y & 0x1FFF).any()


@pytest.mark.parametrize("check", [False, True])
def test_rounding_to_pairs_of_bf16(functions, check):
    x = hard_to_round()
    y = np.zeros(len(x), U32)
    functions("round_bf16", check)((1,), (len(x),), [x.view(U32), y])
    half = x.copy()
    half[np.isfinite(x)] = bf16(x[np.isfinite(x)])
    half = half.view(U32) >> 16
    np.testing.assert_array_equal(y, half | np.roll(half, -1) << 16)


def test_a_nan_stays_one_in_the_bits_that_are_read(functions):
    y = np.zeros(len(NANS), U32)
    functions("round_tf32")((1,), (len(NANS),), [NANS.view(U32), y])
    assert np.isnan((y & ~U32(0x1FFF)).view(F32)).all()
    functions("round_bf16")((1,), (len(NANS),), [NANS.view(U32), y])
    assert np.isnan((y << 16).view(F32)).all()
    assert np.isnan((y & ~U32(0xFFFF)).view(F32)).all()


# ---- products -------------------------------------------------------------------------------------------------------
# The tables of the PTX ISA for mma.m16n8k8 with .tf32 and mma.m16n8k16 with .bf16: row and column of each element that
# a lane holds. A register holds one tf32, or the bf16 of two elements that follow each other.

LANE = np.arange(32)[:, None]
GROUP, MEMBER = LANE // 4, LANE % 4


def place_in_d():
    i = np.arange(4)
    return GROUP + 8 * (i >= 2), 2 * MEMBER + i % 2


def place_in_a(name):
    if name == "mma_tf32_16x8x8":
        i = np.arange(4)
        return GROUP + 8 * (i % 2), MEMBER + 4 * (i >= 2)
    i = np.arange(8)
    return GROUP + 8 * np.isin(i, (2, 3, 6, 7)), 2 * MEMBER + i % 2 + 8 * (i >= 4)


def place_in_b(name):
    if name == "mma_tf32_16x8x8":
        return MEMBER + 4 * np.arange(2), GROUP + 0 * np.arange(2)
    i = np.arange(4)
    return 2 * MEMBER + i % 2 + 8 * (i >= 2), GROUP + 0 * i


def registers(name, matrices, place):
    """The words that the lanes hold of each matrix."""
    words = np.ascontiguousarray(matrices[:, *place]).view(U32)
    return words.reshape(-1) if name == "mma_tf32_16x8x8" else (words[..., ::2] >> 16 | words[..., 1::2]).reshape(-1)


def product(function, name, a, b, c):
    d = np.ascontiguousarray(c[:, *place_in_d()])
    fragments = registers(name, a, place_in_a(name)), registers(name, b, place_in_b(name)), d.reshape(-1)
    function((len(a) // 2,), (64,), fragments)
    result = np.full_like(c, np.nan)
    result[:, *place_in_d()] = d
    return result


PRODUCTS = {"mma_tf32_16x8x8": (8, tf32), "mma_bf16_16x8x16": (16, bf16)}


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_fragments(functions, name, check):
    depth, rounded = PRODUCTS[name]
    rng = np.random.default_rng(2)
    a = rounded(rng.normal(size=(WARPS, 16, depth)).astype(F32))
    b = rounded(rng.normal(size=(WARPS, depth, 8)).astype(F32))
    c = rng.normal(size=(WARPS, 16, 8)).astype(F32)
    d = product(functions(f"call_{name}", check), name, a, b, c)
    exact = a.astype(np.float64) @ b + c
    size = np.abs(a.astype(np.float64)) @ np.abs(b) + np.abs(c)
    assert (np.abs(d - exact) <= 1e-6 * size).all()
    in_order = c.copy()  # a GPU has an order of its own
    for k in range(depth):  # these products are exact in float32
        in_order += a[:, :, k, None] * b[:, None, k]
    np.testing.assert_array_equal(d, in_order)


def test_tf32_operands_are_read_without_their_lowest_bits(functions):
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(WARPS, 16, 8)).astype(F32), rng.normal(size=(WARPS, 8, 8)).astype(F32)
    cut_a, cut_b = ((x.view(U32) & ~U32(0x1FFF)).view(F32) for x in (a, b))
    assert (cut_a != tf32(a)).any()
    c = np.zeros((WARPS, 16, 8), F32)
    function = functions("call_mma_tf32_16x8x8")
    args = function, "mma_tf32_16x8x8"
    np.testing.assert_array_equal(product(*args, a, b, c), product(*args, cut_a, cut_b, c))


@pytest.mark.parametrize("threads", [16, 48])
@pytest.mark.parametrize("check", [False, True])
def test_a_warp_that_is_not_whole(functions, check, threads):
    a, b, d = np.zeros(4 * threads, U32), np.zeros(2 * threads, U32), np.zeros(4 * threads, F32)
    with pytest.raises(KernelError, match="mma without lanes 0xffff0000, which have ended or never were"):
        functions("call_mma_tf32_16x8x8", check)((1,), (threads,), [a, b, d])


# ---- planted bugs ---------------------------------------------------------------------------------------------------


def tiles(n=64):
    return lambda: [np.arange(1, n + 1).astype(F32), np.zeros(64, F32)]


def matrices():
    rng = np.random.default_rng(4)
    a, b = rng.integers(-8, 8, (16, 8)), rng.integers(-8, 8, (8, 8))
    return [a.astype(F32), b.astype(F32), np.zeros((16, 8), F32)]


MULTIPLY = """
__device__ void store(float* y, const float (&d)[4]) {
    float* at = y + threadIdx.x / 4 * 8 + threadIdx.x % 4 * 2;
    at[0] = d[0], at[1] = d[1], at[64] = d[2], at[65] = d[3];
}
extern "C" __global__ void k(const float* x, const float* w, float* y) {
    const int i = threadIdx.x / 4, j = threadIdx.x % 4;
    const unsigned a[4] = {to_tf32(x[8 * i + j]), to_tf32(x[8 * (i + EITHER(8, 0)) + j + EITHER(0, 4)]),
                           to_tf32(x[8 * (i + EITHER(0, 8)) + j + EITHER(4, 0)]), to_tf32(x[8 * (i + 8) + j + 4])};
    const unsigned b[2] = {to_tf32(w[8 * j + i]), to_tf32(w[8 * (j + 4) + i])};
    float d[4] = {};
    mma_tf32_16x8x8(d, a, b);
    store(y, d);
}"""
# Copies 64 numbers by 16 threads and turns them round.
TURN = """
extern "C" __global__ void k(const float* x, float* y) {
    __shared__ alignas(16) float s[64];
    const int t = threadIdx.x;
    BEFORE
    if (t < 16) copy_async16(s + 4 * t, x + 4 * t);
    copy_async_commit();
    BETWEEN
    copy_async_wait<0>();
    __syncthreads();
    y[t] = RESULT;
}"""


def turn(line="", by="", before="", between="", result="s[63 - t]"):
    """TURN with one line changed and others put in."""
    assert line in TURN
    text = TURN.replace(line, by) if line else TURN
    return text.replace("BEFORE", before).replace("BETWEEN", between).replace("RESULT", result)


def turned(text, plain, check, at="EITHER", arguments=None, expected=lambda x, y: x[::-1]):
    return Case(text, arguments or tiles(), expected, plain, check, at)


BEGIN, COMMIT, WAIT, SYNC = (
    "if (t < 16) copy_async16(s + 4 * t, x + 4 * t);",
    "copy_async_commit();",
    "copy_async_wait<0>();",
    "__syncthreads();",
)
OLD = "s[t] = 0; __syncthreads();"
UNDER_WAY = "after a copy_async16 begun by thread"

CASES = {
    "fragment registers swapped": Case(
        MULTIPLY, matrices, lambda x, w, y: x @ w, plain="wrong", check="wrong", block=(32,)
    ),
    "one lane without the others' mma": Case(
        MULTIPLY.replace("EITHER(8, 0)", "8")
        .replace("EITHER(0, 4)", "0")
        .replace("EITHER(0, 8)", "0")
        .replace("EITHER(4, 0)", "4")
        .replace("    mma_", "    if (EITHER(true, threadIdx.x != 3)) mma_"),
        matrices,
        lambda x, w, y: x @ w,
        plain="error",
        check="mma without lanes 0x8, which have ended",
        block=(32,),
    ),
    "mma in two branches": Case(
        """
extern "C" __global__ void k(const float* x, float* y) {
    const unsigned a[4] = {to_tf32(*x), to_tf32(*x), to_tf32(*x), to_tf32(*x)}, b[2] = {to_tf32(1.f), to_tf32(1.f)};
    float d[4] = {};
    if (EITHER(true, threadIdx.x < 16)) mma_tf32_16x8x8(d, a, b);
    else mma_tf32_16x8x8(d, a, b);
    y[threadIdx.x] = d[0];
}""",
        lambda: [np.ones(1, F32), np.zeros(32, F32)],
        lambda x, y: np.full(32, 8),
        plain="error",
        check="warp collective while lanes 0xffff wait in another",
        at="else",
        block=(32,),
    ),
    "no wait": turned(turn(WAIT, f"EITHER({WAIT},)"), "wrong", f"race: a read, {UNDER_WAY}", "y[t] = s"),
    "no wait, old contents": turned(
        turn(WAIT, f"EITHER({WAIT},)", before=OLD),
        "wrong",
        rf"race: a read, {UNDER_WAY} \(15,0,0\).* with no copy_async_wait and barrier.*'s', index 63 of 64",
        "y[t] = s",
    ),
    "no commit": turned(turn(COMMIT, f"EITHER({COMMIT},)"), "wrong", f"race: a read, {UNDER_WAY}", "y[t] = s"),
    "a wait that leaves the group": turned(
        turn(WAIT, "copy_async_wait<EITHER(0, 1)>();"), "wrong", f"race: a read, {UNDER_WAY}", "y[t] = s"
    ),
    "a wait that leaves the second group": turned(
        turn(
            BEGIN,
            "if (t < 8) copy_async16(s + 4 * t, x + 4 * t);\ncopy_async_commit();\n"
            "if (t < 8) copy_async16(s + 32 + 4 * t, x + 32 + 4 * t);",
        ).replace("wait<0>", "wait<EITHER(0, 1)>"),
        "wrong",
        f"race: a read, {UNDER_WAY}",
        "y[t] = s",
    ),
    "no __syncthreads behind the wait": turned(
        turn(SYNC, f"EITHER({SYNC},)"), "wrong", "read of memory never written: shared memory 's', index 63", "y[t] = s"
    ),
    "no __syncthreads behind the wait, old contents": turned(
        turn(SYNC, f"EITHER({SYNC},)", before=OLD),
        "wrong",
        r"race: a write, after a read by thread \(63,0,0\)",
        "copy_async16",
    ),
    "no __syncthreads behind the wait, in an order that hides it": turned(
        turn(SYNC, f"EITHER({SYNC},)", result="s[t / 8]"),
        "unseen",
        r"race: a read, after a write by thread \(0,0,0\)",
        "y[t] = s",
        expected=lambda x, y: np.repeat(x[:8], 8),
    ),
    "a __syncwarp for a __syncthreads": turned(
        turn(SYNC, "EITHER(__syncthreads(), __syncwarp());", result="s[t / 8]"),
        "unseen",
        r"thread \(32, 0, 0\): race: a read, after a write by thread \(1,0,0\)",
        "y[t] = s",
        expected=lambda x, y: np.repeat(x[:8], 8),
    ),
    "a copy into what others still read": turned(
        turn(
            before="s[t] = x[63 - t]; __syncthreads(); float v = s[63 - t]; EITHER(__syncthreads();,)",
            result="v + s[63 - t]",
        ),
        "wrong",
        r"race: a write, after a read by thread \(\d+,0,0\)",
        "copy_async16",
        expected=lambda x, y: x + x[::-1],
    ),
    "a copy that begins beside a read, and lands behind a barrier": turned(
        turn(
            before=f"{OLD} float v = 0; if (t == 0) v = s[63]; EITHER(__syncthreads();,)",
            between="__syncthreads();",
            result="v + s[63 - t]",
        ),
        "unseen",
        r"thread \(15, 0, 0\): race: a write, after a read by thread \(0,0,0\)",
        "copy_async16",
    ),
    "a read of the old contents, between barriers but too late": turned(
        turn(
            before=f"{OLD} float v = 0; EITHER(v = s[63 - t]; __syncthreads();,)",
            between="EITHER(, __syncthreads(); v = s[63 - t]; __syncthreads();)",
            result="v + s[63 - t]",
        ),
        "unseen",
        f"race: a read, {UNDER_WAY}",
        "EITHER(,",
    ),
    "a write before the wait": turned(
        turn(between="EITHER(, if (t == 0) s[0] = 5;)"), "unseen", f"race: a write, {UNDER_WAY}", "s[0] = 5"
    ),
    "two copies to one place": turned(
        turn(BEGIN, "if (t < 16) copy_async16(s + 4 * EITHER(t, (t % 8)), x + 4 * (t % 8));", result="s[t % 32]"),
        "unseen",
        r"race: a write, after a write by thread \(0,0,0\)",
        expected=lambda x, y: np.tile(x[:32], 2),
    ),
    "two copies to one place by one thread": turned(
        turn(between="EITHER(, if (t == 3) copy_async16(s + 12, x + 12);)"),
        "unseen",
        r"thread \(3, 0, 0\): race: a copy_async16, after another begun by thread \(3,0,0\)",
    ),
    "the source written by others": Case(
        """
extern "C" __global__ void k(const float* x, float* y) {
    __shared__ alignas(16) float s[64];
    const int t = threadIdx.x;
    y[t] = x[t];
    EITHER(__syncthreads();,)
    if (t < 16) copy_async16(s + 4 * t, y + 4 * t);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    y[t] = s[t] + 1;
}""",
        tiles(),
        lambda x, y: x + 1,
        plain="wrong",
        check="race: a write, after a read by thread",
        at="y[t] = x[t]",
    ),
    "a misaligned source": turned(
        turn("x + 4 * t", "x + EITHER(4, 3) * t"),
        "error",
        "copy_async16 from a misaligned address, it needs a multiple of 16: argument 0 'x', index 3 of 64",
    ),
    "a misaligned destination": turned(
        turn("s + 4 * t", "s + EITHER(4, 2) * t"),
        "error",
        "copy_async16 to a misaligned address, it needs a multiple of 16: shared memory 's', index 2 of 64",
    ),
    "a source out of bounds": turned(
        turn("x + 4 * t", "x + 4 * t + EITHER(0, 4)"),
        "error",
        "out-of-bounds read of 16 bytes: argument 0 'x', index 64 of 64",
    ),
    "a source that ends within the 16 bytes": turned(
        turn("x + 4 * t", "x + 4 * EITHER((t % 15), t)", result="s[59 - t % 60]"),
        "error",
        "out-of-bounds read of 16 bytes: argument 0 'x', index 62 of 62",
        arguments=tiles(62),
        expected=lambda x, y: x[:60][::-1][np.arange(64) % 60],
    ),
    "a destination out of bounds": turned(
        turn("s + 4 * t", "s + 4 * t + EITHER(0, 4)"),
        "error",
        "out-of-bounds write of 16 bytes: shared memory 's', index 64 of 64",
    ),
    "source and destination exchanged": turned(
        turn(BEGIN, "if (t < 16) copy_async16(EITHER(s, y) + 4 * t, EITHER(x, s) + 4 * t);"),
        "error",
        "copy_async16 to what is not shared memory: argument 1 'y'",
    ),
    "a source in shared memory": turned(
        turn(BEGIN, "if (t < 16) copy_async16(s + 4 * t, EITHER(x, s) + 4 * t);"),
        "error",
        "copy_async16 from what is not global memory: shared memory 's'",
    ),
}
NAMES = list(CASES)


def planted(wrong):
    choice = "#define EITHER(right, wrong) " + ("wrong" if wrong else "right")
    return [f"{choice}\n{ARCH}{case.text}" for case in CASES.values()]


@pytest.fixture(scope="module")
def module():
    """The cases with or without their bugs, all of them in one unit, built once."""
    built = {}

    def get(wrong, check):
        if (wrong, check) not in built:
            built[wrong, check] = Module(planted(wrong), check=check)
        return built[wrong, check]

    return get


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_without_the_bug_it_is_right_in_every_mode(name, mode, module):
    check, seed = MODES[mode]
    assert CASES[name].run(module(False, check).function("k", NAMES.index(name)), seed=seed)


@pytest.mark.parametrize("name", NAMES)
def test_check_catches_the_bug(name, module):
    case, code = CASES[name], NAMES.index(name)
    function = module(True, True).function("k", code)
    if case.check == "wrong":
        assert not case.run(function)
        return
    with pytest.raises(KernelError, match=case.check) as told:
        case.run(function)
    assert case.at in planted(True)[code].split("\n")[told.value.line - 1]


@pytest.mark.parametrize("name", [name for name in NAMES if CASES[name].plain != "unseen"])
def test_a_plain_run_catches_the_bug(name, module):
    case, code = CASES[name], NAMES.index(name)
    function = module(True, False).function("k", code)
    if case.plain == "error":
        with pytest.raises(KernelError, match=case.check) as told:
            case.run(function)
        assert case.at in planted(True)[code].split("\n")[told.value.line - 1]
        return

    def is_right(seed):
        try:
            return case.run(function, seed=seed)
        except KernelError:
            return False

    assert not all(is_right(seed) for seed in range(3))


def test_a_source_never_written(module):
    function = module(False, True).function("k", NAMES.index("no wait"))
    with pytest.raises(KernelError, match="read of memory never written: argument 0 'x', index 0 of 64"):
        function((1,), (64,), [Uninitialised(np.ones(64, F32)), np.zeros(64, F32)])


def test_a_failed_launch_leaves_no_copy_behind(module):
    code = NAMES.index("no wait")
    function = module(True, True).function("k", code)
    for _ in range(2):
        with pytest.raises(KernelError, match=rf"{UNDER_WAY} \(7,0,0\)"):
            function((1,), (64,), tiles()())
    assert CASES["no wait"].run(module(False, True).function("k", code))


def test_memory_that_was_copied_into_serves_others():
    """The copy is under way when the launch ends; later launches have their arrays where it was."""
    function = Module(
        """
        extern "C" __global__ void k(const float* x, float* y) {
            extern __shared__ float s[];
            copy_async16(s, x);
            y[threadIdx.x] = x[threadIdx.x] + 1;
        }""",
        check=True,
    ).function("k")
    x, y = np.arange(4, dtype=F32), np.zeros(4, F32)
    for _ in range(100):
        function((1,), (1,), [x, y], shared_mem=16)
    np.testing.assert_array_equal(y, [1, 0, 0, 0])


# ---- all of it together ---------------------------------------------------------------------------------------------

# y = x w, x (32, n), w (n, 16), by 4 warps: three tiles of 8 columns of x and rows of w, two of them on their way.
PIPELINE = """
constexpr int STAGES = 3;
struct Tile { float x[32 * 8], w[8 * 16]; };
extern "C" __global__ void k(const float* x, const float* w, float* y, int n) {
    __shared__ alignas(16) Tile tiles[STAGES];
    const int t = threadIdx.x, row = t / 64 * 16 + t % 32 / 4, column = t / 32 % 2 * 8, i = t % 32 / 4, j = t % 4;
    auto fetch = [&](int tile) {
        if (8 * tile < n) {
            Tile& to = tiles[tile % STAGES];
            if (t < 64) copy_async16(to.x + 4 * t, x + t / 2 * n + 8 * tile + t % 2 * 4);
            else if (t < 96) copy_async16(to.w + 4 * (t - 64), w + 128 * tile + 4 * (t - 64));
        }
        copy_async_commit();
    };
    pdl_wait();
    for (int tile = 0; tile < STAGES - 1; ++tile) fetch(tile);
    float d[4] = {};
    for (int tile = 0; 8 * tile < n; ++tile) {
        copy_async_wait<STAGES - 2>();
        __syncthreads();
        fetch(tile + STAGES - 1);
        const float *a = tiles[tile % STAGES].x, *b = tiles[tile % STAGES].w;
        const unsigned fragment_a[4] = {to_tf32(a[8 * row + j]), to_tf32(a[8 * (row + 8) + j]),
                                        to_tf32(a[8 * row + j + 4]), to_tf32(a[8 * (row + 8) + j + 4])};
        const unsigned fragment_b[2] = {to_tf32(b[16 * j + column + i]), to_tf32(b[16 * (j + 4) + column + i])};
        mma_tf32_16x8x8(d, fragment_a, fragment_b);
    }
    pdl_launch();
    for (int r = 0; r < 4; ++r) y[16 * (row + r / 2 * 8) + column + 2 * j + r % 2] = d[r];
}"""


@pytest.mark.parametrize("n", [8, 16, 24, 80])
@pytest.mark.parametrize("mode", MODES)
def test_a_product_of_tiles_in_a_pipeline(mode, n):
    check, seed = MODES[mode]
    rng = np.random.default_rng(n)
    x, w = rng.integers(-8, 8, (32, n)).astype(F32), rng.integers(-8, 8, (n, 16)).astype(F32)
    y = np.full((32, 16), np.nan, F32)
    kernels_on_cpu.function(ARCH + PIPELINE, "k", check)((1,), (128,), [x, w, y, np.int32(n)], seed=seed)
    np.testing.assert_array_equal(y, x @ w)


def test_a_pipeline_without_its_barrier():
    text = ARCH + PIPELINE.replace("__syncthreads();", "")
    x, w, y = np.ones((32, 80), F32), np.ones((80, 16), F32), np.zeros((32, 16), F32)
    with pytest.raises(KernelError, match=r"read of memory never written|race"):
        Module(text, check=True).function("k")((1,), (128,), [x, w, y, np.int32(80)])
