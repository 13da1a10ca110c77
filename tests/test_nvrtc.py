"""Every kernel compiles for every architecture, and takes no more registers and memory than it is meant to."""

import os
import platform
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import kernel_variants
import nvrtc
import pytest

from backprop_gpu import cuda_source

ARCHITECTURES = (70, 80, 90, 100, 120)
ALL = os.environ.get("BACKPROP_GPU_TEST_ALL_VARIANTS") == "1"
AT_A_TIME = 2  # NVRTC compiles in as many threads as call it
FEW = 3  # variants of a file that each architecture compiles in the ordinary run, if that leaves none out

# Registers that a thread may take. A multiprocessor has 65536, so of blocks of 256 threads it holds 4 at 64 registers,
# 3 at 80 and 2 at 128.
BUDGET = {"float": 64, "double": 96}
MORE_REGISTERS = {  # (kernel, REAL): (its budget, why)
    ("column_sums", "float"): (128, "a block of 512 threads fits; each has the numbers of four rows under way"),
    ("column_sums", "double"): (128, "likewise"),
    ("hidden_delta", "float"): (128, "likewise"),
    ("hidden_delta", "double"): (128, "likewise"),
    ("forward", "float"): (208, "the sums of a tile; the largest is one block of 256 threads, of the others two fit"),
    ("forward", "double"): (144, "likewise"),
    ("delta", "float"): (192, "likewise"),
    ("delta", "double"): (144, "likewise"),
    ("gradients", "float"): (255, "likewise, and theta with three slots, two elements each"),
    ("gradients", "double"): (255, "likewise"),
    ("head", "float"): (255, "40 sums, and what they come of; 128 threads, of which few blocks are needed"),
    ("head", "double"): (255, "likewise"),
}
LOCAL_MEMORY: dict[tuple[str, int], tuple[int, str]] = {}  # (kernel, architecture) with a stack frame: (bytes, why)
SHARED = 24 << 10  # bytes: four blocks fit in the 96 KiB of sm_70


@pytest.fixture(scope="module")
def library():
    found = nvrtc.load()
    if found is None:
        if sys.platform == "linux" and platform.machine() == "x86_64" and os.environ.get("CI") == "true":
            pytest.fail("the NVRTC wheel is not installed: pip install the extra test")
        pytest.skip("the NVRTC wheel is not installed")
    return found


def known(library):
    return [arch for arch in ARCHITECTURES if arch in nvrtc.architectures(library)]


def on_threads(work, jobs):
    with ThreadPoolExecutor(AT_A_TIME) as threads:
        return list(threads.map(work, jobs))


def excess(kernel, real, used, arch):
    """What a kernel takes too much of, as text; None where it keeps within its budget."""
    registers = MORE_REGISTERS.get((kernel, real), (BUDGET[real],))[0]
    if used.spills:
        return f"spills {used.spills} bytes"
    if used.stack > LOCAL_MEMORY.get((kernel, arch), (0,))[0]:
        return f"has a stack frame of {used.stack} bytes"
    if used.registers > registers:
        return f"takes {used.registers} registers, more than {registers}"
    if used.shared > SHARED:
        return f"takes {used.shared} bytes of shared memory, more than {SHARED}"
    return None


def faults(library, text, kernels, arch):
    """What is wrong with a text for one architecture; `kernels` is {name in the text: (kernel, REAL, told as)}."""
    compiled, log = nvrtc.compile_for(library, text, "kernels.cu", arch)
    if not compiled:
        return [f"sm_{arch}: {log}"]
    used = nvrtc.usage(log)
    wrong = [f"sm_{arch}: {name} is not in the log" for name in kernels.keys() - used.keys()]
    wrong += [f"sm_{arch}: {name} was not expected" for name in used.keys() - kernels.keys()]
    for name in kernels.keys() & used.keys():
        kernel, real, told = kernels[name]
        too_much = excess(kernel, real, used[name], arch)
        if too_much:
            wrong.append(f"sm_{arch}: {kernel} of {told} {too_much}")
    return wrong


def kernels_of(chosen, text, rename="{}"):
    """The last argument of `faults`, for the text of one variant."""
    names = cuda_source.signatures(text)
    assert names, chosen
    return {rename.format(kernel): (kernel, chosen.get("REAL", "float"), chosen) for kernel in names}


def share(file, arch, archs):
    """The variants of a file that one of the architectures compiles: all of a few, else every so manieth.

    Of a kernel of a step, no more than it must.
    """
    chosen = []
    for everywhere in (True, False):
        those = [of for of in kernel_variants.variants(file) if kernel_variants.runs_on(of, 70) == everywhere]
        able = [a for a in archs if not those or kernel_variants.runs_on(those[0], a)]
        if not those or arch not in able:
            continue
        place, places = able.index(arch), len(able)
        each = max(1 if file in kernel_variants.OF_A_STEP else FEW, -(-len(those) // places))
        few = len(those) <= each
        chosen += those if few else [those[(place + i * places) % len(those)] for i in range(each)]
    return chosen


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile_and_keep_within_their_budget(library, arch):
    archs = known(library)
    if arch not in archs:
        pytest.skip(f"this NVRTC does not know sm_{arch}")

    def check(file):
        chosen = share(file, arch, archs)
        texts = [cuda_source.text(file, **choice) for choice in chosen]
        kernels = {}
        for i, (choice, text) in enumerate(zip(chosen, texts, strict=True)):
            kernels |= kernels_of(choice, text, f"{{}}__{i}")
        return faults(library, kernel_variants.joined(texts), kernels, arch)

    by_size = sorted(kernel_variants.FILES, key=lambda file: -len(share(file, arch, archs)))
    wrong = [fault for those in on_threads(check, by_size) for fault in those]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("file", kernel_variants.FILES)
def test_each_variant_is_compiled_for_some_architecture(file):
    seen = [choice for arch in ARCHITECTURES for choice in share(file, arch, ARCHITECTURES)]
    assert [choice for choice in kernel_variants.variants(file) if choice not in seen] == []


@pytest.mark.slow
@pytest.mark.skipif(not ALL, reason="minutes: BACKPROP_GPU_TEST_ALL_VARIANTS=1 compiles every variant by itself")
@pytest.mark.parametrize("file", kernel_variants.FILES)
def test_every_variant_alone(library, file):
    def check(job):
        choice, arch = job
        text = cuda_source.text(file, **choice)
        return faults(library, text, kernels_of(choice, text), arch)

    archs = known(library)
    jobs = [(of, arch) for of in kernel_variants.variants(file) for arch in archs if kernel_variants.runs_on(of, arch)]
    wrong = [fault for those in on_threads(check, jobs) for fault in those]
    assert not wrong, "\n".join(wrong)


# ------------------------------------------------------------------------------- the texts, and what the tests can see


def test_the_variants_are_the_legal_ones():
    assert kernel_variants.variants("probe.cu") == [{}]
    outputs = kernel_variants.variants("output_delta.cu")
    pairs = {(choice["ACTIVATION"], choice["COST"]) for choice in outputs}
    assert len(outputs) == 2 * len(pairs)  # float and double
    assert [f for f, cost in pairs if cost == "cost_cross_entropy"] == ["f_softmax"]
    assert [f for f, cost in pairs if cost == "cost_binary_cross_entropy"] == ["f_sigmoid"]
    assert ("f_softmax", "cost_norm") in pairs
    assert ("f_relu", "cost_huber") in pairs
    hidden = kernel_variants.variants("hidden_delta.cu")
    assert {"REAL": "double", "ACTIVATION": "f_gelu"} in hidden
    assert not [choice for choice in hidden if choice["ACTIVATION"] == "f_softmax"]


def test_the_headers_have_the_names_of_the_package():
    from backprop_gpu import activations, costs

    assert set(kernel_variants.structs("ACTIVATION")) == {f"f_{name}" for name in activations.OUTPUT}
    assert set(kernel_variants.structs("COST")) == {f"cost_{name}" for name in costs.COSTS}
    assert {"rule_sgd", "rule_adam"} <= set(kernel_variants.structs("RULE"))


def test_macros_in_comments_and_defaults_do_not_count():
    text = "// ACTIVATION\n#ifndef COST\n#define COST \\\n  RULE\n#endif\n/* REAL\n REAL */ int x;\n"
    assert re.findall(r"\w+", kernel_variants.code(text)) == ["int", "x"]


KERNEL = 'extern "C" __global__ void k({parameters}) {{ {body} }}'
GOOD = KERNEL.format(parameters="float* x", body="x[threadIdx.x] *= 2;")


def test_texts_that_are_joined_do_not_meet(library):
    struct = "struct S { REAL x; };\nusing real = REAL;\n"
    kernel = KERNEL.format(parameters="real* x", body="S s = {N}; *x = s.x;")
    texts = [
        f"#define REAL float\n#define N 1\n{struct}{kernel}",
        f"#define REAL double\nenum {{ N }};\n{struct}{kernel}",
    ]
    compiled, log = nvrtc.compile_for(library, kernel_variants.joined(texts), "k.cu", 80)
    assert compiled, log
    assert set(nvrtc.usage(log)) == {"k__0", "k__1"}


ALIVE = """float v[{n}];  // all of them at a time
#pragma unroll
for (int i = 0; i < {n}; ++i) v[i] = x[32 * i];
__syncthreads();
#pragma unroll
for (int i = 0; i < {n}; ++i) x[i] = v[{n} - 1 - i];
"""
BAD = {  # what is told: a text in which that is wrong
    "spills": KERNEL.format(parameters="float* x", body=ALIVE.format(n=90)).replace("k(", "__launch_bounds__(1024) k("),
    "registers, more than 64": KERNEL.format(parameters="float* x", body=ALIVE.format(n=90)),
    "has a stack frame": KERNEL.format(
        parameters="float* x, int n",
        body="float v[100]; for (int i = 0; i < n; ++i) v[i % 100] = x[i]; x[n] = v[n * n % 100];",
    ),
    "bytes of shared memory, more than 24576": KERNEL.format(
        parameters="float* x",
        body="__shared__ float s[6145]; s[threadIdx.x] = *x; __syncthreads(); *x = s[blockDim.x];",
    ),
    "49156 bytes smem": KERNEL.format(  # which NVRTC refuses without a word
        parameters="float* x",
        body="__shared__ float s[12289]; s[threadIdx.x] = *x; __syncthreads(); *x = s[blockDim.x];",
    ),
    '"INFINITY" is undefined': KERNEL.format(parameters="float* x", body="*x = INFINITY;"),
    '"y" is undefined': KERNEL.format(parameters="float* x", body="*x = y;"),
    "k is not in the log": GOOD.replace("k(", "j("),
    "j was not expected": GOOD + GOOD.replace("k(", "j("),
}


@pytest.mark.parametrize("fault", BAD)
def test_what_is_wrong_with_a_kernel_is_seen(library, fault):
    arch = known(library)[0]
    expected = {"k": ("k", "float", "the test")}
    assert faults(library, GOOD, expected, arch) == []
    wrong = "\n".join(faults(library, BAD[fault], expected, arch))
    assert fault in wrong, wrong
