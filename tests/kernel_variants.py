"""Which CUDA texts there are: each file of kernels/ with the legal choices of the macros that it uses.

The functions, costs and rules are those that the headers define; which cost goes with which output function is asked of
the package's own table.
"""

import itertools
import re
from pathlib import Path

from backprop_gpu import costs, cuda_source
from backprop_gpu import plan as plans
from backprop_gpu import tiles as of_tiles

KERNELS = Path(__file__).resolve().parent.parent / "kernels"
FILES = sorted(path.name for path in KERNELS.glob("*.cu"))
OF_A_STEP = ("advance.cu", "delta.cu", "forward.cu", "gradients.cu", "head.cu", "step_gather.cu")  # as plans do
ALONE = [file for file in FILES if file not in OF_A_STEP]
# Macro: the header whose structs it may name, and how their names begin.
TABLES = {
    "ACTIVATION": ("activations.cuh", "f_"),
    "COST": ("costs.cuh", "cost_"),
    "RULE": ("rules.cuh", "rule_"),
}
ROW_FUNCTIONS = {"f_softmax"}  # only where whole rows are at hand, which is where there is a cost


def structs(macro):
    """What a macro may stand for, in the order of its header: f_identity, f_sigmoid, ...."""
    header, prefix = TABLES[macro]
    return re.findall(rf"\bstruct ({prefix}\w+)", code((KERNELS / header).read_text(encoding="utf-8")))


def code(text):
    """The text without comments and without lines for the preprocessor."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.DOTALL)
    return re.sub(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", "", text, flags=re.MULTILINE)


def macros(file):
    """The macros of the host that a file and its headers use."""
    words = set(re.findall(r"\w+", code(cuda_source.text(file))))
    return [macro for macro in ("REAL", *TABLES) if macro in words]


def legal(choice):
    """Whether the package would ever ask for that choice of macros."""
    f, cost = choice.get("ACTIVATION"), choice.get("COST")
    if cost is None:
        return f not in ROW_FUNCTIONS
    outputs = costs.COSTS[cost.removeprefix("cost_")].outputs
    return outputs is None or f is None or f.removeprefix("f_") in outputs


def tiled(file):
    """The choices of REAL, ARITHMETIC and TILE of a product."""
    tiles = of_tiles._FLOAT_GRADIENTS if file == "gradients.cu" else of_tiles._FLOAT
    chosen = [("float", a, tile) for a in ("ffma", "tf32x2", "tf32", "bf16") for tile in tiles]
    chosen += [("double", "ffma", tile) for tile in of_tiles._DOUBLE]
    return [
        {"REAL": real, "ARITHMETIC": arithmetic, "TILE": str(tile)}
        for real, arithmetic, tile in chosen
        if (arithmetic != "bf16" or tile.depth // tile.deep % 16 == 0)
        and (arithmetic != "tf32" or tile is tiles[-1])  # it does less than tf32x2
    ]


def of_a_step(file):
    """Choices for a kernel of a step: each value of each macro, not each with each other."""
    if file == "advance.cu":
        return [{"REAL": "float"}]
    if file == "step_gather.cu":
        chosen = itertools.product(("unsigned char", "real"), ("real", "unsigned short"))
        every = [{"REAL": "float", "SOURCE": source, "TARGET": target} for source, target in chosen]
        return [*every, *({**of, "REAL": "double"} for of in every if of["TARGET"] == "real")]
    hidden = [f for f in structs("ACTIVATION") if f not in ROW_FUNCTIONS]
    if file == "head.cu":
        pairs = [
            (cost, f)
            for cost in structs("COST")
            for f in structs("ACTIVATION")
            if legal({"COST": cost, "ACTIVATION": f})
        ]
        usual = ("cost_cross_entropy", "f_softmax")
        chosen = [(real, str(plans.HEAD_WARPS), *usual, "f_gelu") for real in ("float", "double")]
        chosen += [("float", "1", *pair, "f_tanh") for pair in pairs[:: len(pairs) // 6]]
        chosen += [("double", "1", *usual, "f_gelu")]
        return [dict(zip(("REAL", "ROWS", "COST", "ACTIVATION", "BELOW"), of, strict=True)) for of in chosen]
    every = tiled(file)
    small, small_double = ({**of, "SOURCE": "real"} for of in (every[3 if file != "gradients.cu" else 2], every[-1]))
    sources = itertools.cycle(("unsigned char", "real"))
    if file == "gradients.cu":
        rules = structs("RULE")
        chosen = [
            {**of, "SOURCE": next(sources), "RULE": rule}
            for of, rule in zip(every, itertools.cycle(rules), strict=False)
        ]
        return [*chosen, small, small_double, *({**small, "RULE": rule} for rule in rules)]
    chosen = [{**of, "SOURCE": next(sources), "ACTIVATION": "f_tanh"} for of in every]
    chosen += [{**small, "ACTIVATION": f} for f in hidden if f != "f_tanh"] + [{**small_double, "ACTIVATION": "f_gelu"}]
    return chosen if file == "forward.cu" else [{k: v for k, v in of.items() if k != "SOURCE"} for of in chosen]


def variants(file):
    """The choices, {macro: what it stands for}, of the macros that the file uses; [{}] where it uses none.

    All legal ones of a kernel that is an operation alone; a covering part of them of a kernel of a step.
    """
    if file in OF_A_STEP:
        return of_a_step(file)
    used = macros(file)
    values = [("float", "double") if macro == "REAL" else structs(macro) for macro in used]
    choices = (dict(zip(used, chosen, strict=True)) for chosen in itertools.product(*values))
    return [choice for choice in choices if legal(choice)]


def texts(file, **fixed):
    """The texts of a file's variants, each as CuPy gets it; of those alone that agree with what is `fixed`."""
    return [
        cuda_source.text(file, **choice)
        for choice in variants(file)
        if all(choice.get(macro, value) == value for macro, value in fixed.items())
    ]


def runs_on(choice, arch):
    """Whether the package would ask for that choice there: tensor cores of these kinds came with sm_80."""
    return arch >= 80 or choice.get("ARITHMETIC", "ffma") == "ffma"


def joined(parts):
    """One translation unit of several texts: kernel k of text i is called k__i there, and no two names meet."""
    unit = []
    for i, text in enumerate(parts):
        kernels = list(cuda_source.signatures(text))
        defined = re.findall(r"^[ \t]*#[ \t]*define[ \t]+(\w+)", text, re.MULTILINE)
        unit += [f"#define {kernel} {kernel}__{i}" for kernel in kernels]
        unit += [f"namespace text_{i} {{", text, "}", *(f"#undef {name}" for name in (*kernels, *defined))]
    return "\n".join(unit) + "\n"
