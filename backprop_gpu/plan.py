"""The plan of a training step on a GPU: its operations, which kernel does each, and where everything lies.

A step is a handful of kernels (`kernels/forward.cu`, `head.cu`, `delta.cu`, `gradients.cu`), in which the elementwise
work follows the matrix product that it belongs to. Products of wide layers may be cuBLASLt's, with kernels for what
goes before and after them; gradients are stored then, and an update follows. Here they are chosen, for shapes,
arithmetic and device; nothing here touches a GPU. `executors.Graph` runs the plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from . import cuda_source, dropout, grids
from .activations import HIDDEN, IDENTITY, Activation
from .costs import Cost
from .network import Views
from .tiles import Device, Tile, Unplanned, choose_tile

NARROW = 64  # outputs up to which the head makes the last product itself, as in head.cu
HEAD_WARPS = 4  # of a block of the head, as there
LONG_ROW = 1024  # outputs up to which a warp works on a row of them; on longer ones a block does
LINE = 64  # elements that a part of the workspace begins at a multiple of
HUGE = 1e12  # a gradient below it leads to no infinity, at these learning rates and below
MOST_LR = 16.0
ORDINARY = 1e4  # |Z| and |A| of hidden layers beyond it are looked at with care
STATE, STEP, UNUSUAL, FIRST, T = 4, 0, 1, 2, 3  # as in step.cuh
COPY_LINE = 8  # numbers: rows of operands in bf16 are padded to a multiple of 16 bytes, as cuBLASLt likes them
WAITING = ("forward", "head", "delta", "gradients")  # kernels that wait by themselves for the one before
LAYER = 10  # numbers a layer in the table of gradients.cu
COPY = 5  # likewise in that of update.cu


class Wide(NamedTuple):
    """From where on products are wide: the layer's smaller side, the samples, and the two multiplied."""

    width: int
    samples: int
    outputs: int = 0


# Where cuBLASLt wins on an H100. In float32 it multiplies and adds; kernels of two-term TF32 are quicker up to there.
# In bf16 it wants operands rounded for it, which takes kernels of its own; from where on that pays is not yet measured.
WIDE: dict[str, Wide] = {
    "float32": Wide(512, 1024, 1 << 20), "tf32": Wide(512, 1024), "bf16": Wide(512, 1024, 1 << 20),
    "float64": Wide(512, 1024),
}  # fmt: skip


SPEED = {"ffma": 1.0, "tf32x2": 2.5, "tf32": 7.5, "bf16": 15.0}  # of dense products, in units of float32's on sm_90


class Place(NamedTuple):
    """`size` elements of a vector of the executor's, from `start` on."""

    vector: str
    start: int
    size: int


AHEAD = "ahead"  # stands for the number of the step in its recording
Argument = Place | float | str | None


@dataclass(frozen=True)
class Operation:
    """One launch: what it computes, the kernel and its macros, grid, block and arguments, its work and its traffic."""

    equation: str
    file: str
    kernel: str
    defines: tuple[tuple[str, str], ...]
    grid: tuple[int, int, int]
    block: tuple[int, int]
    arguments: tuple[Argument, ...]
    flop: float = 0.0
    bytes: float = 0.0
    tile: Tile | None = None
    shared: int = 0  # bytes of dynamic shared memory


class Matrix(NamedTuple):
    """A row-major array, its rows `stride` numbers apart."""

    place: Place
    rows: int
    columns: int
    stride: int


@dataclass(frozen=True)
class LibraryProduct:
    """A product of cuBLASLt: the function of that name in `cublaslt`, on these three arrays and a vector.

    `epilogue`: what it is asked to do besides, as cublasLt.h calls it; `vector` is the bias that it adds or sums.
    `alpha`: a factor of the product.
    """

    equation: str
    name: str  # forward, hidden_delta, weight_gradient
    layer: int  # whose Z, Delta or dW it makes
    arrays: tuple[Matrix, Matrix, Matrix]
    vector: Place | None
    epilogue: str
    precision: str
    flop: float
    bytes: float
    alpha: float = 1.0


@dataclass(frozen=True)
class Shape:
    """What a plan is made for, beside the network's own settings.

    `m`: samples a step; `batch`: those of a full one, which the workspace is laid out for; `n_data`: samples in all.
    `data`: "bytes" or "reals"; `targets`: "labels" or "rows". `weighted`, `mean`: of the costs. `greatest`: of |X|.
    `task`: as in right.cuh. `steps`: of an epoch. `models`: how many train side by side. `ordered`: the data lies in
    the order of the steps, so that there is no other; `n_data` counts what is on the device.
    """

    m: int
    batch: int
    n_data: int
    steps: int
    data: str = "bytes"
    targets: str = "labels"
    weighted: bool = False
    mean: bool = True
    greatest: float = 1.0
    task: int = 1
    models: int = 1
    ordered: bool = False


@dataclass
class Workspace:
    """A vector of the executor's, cut into parts."""

    vector: str
    size: int = 0
    places: dict[tuple[str, int], Place] = field(default_factory=dict)

    def take(self, name: str, l: int, size: int) -> None:
        """A part for array `name` of layer l."""
        self.places[name, l] = Place(self.vector, self.size, size)
        self.size += -(-size // LINE) * LINE


class Plan:
    """The operations of a training step, in order. Raises Unplanned where the kernels cannot do what is asked.

    `rule`: the name of the optimizer's struct in rules.cuh, None where the gradient is to be stored; `slots`: for each
    of the three that a rule may have, whether it has it; `row_size`: numbers in a step's row. `library`, given the plan
    once its workspace is laid out, and a product, says why cuBLASLt does not make it, None if it does; the plan asks
    for wide products. Where it gets one, its `rule` is None whatever was given. `notes`: products that it did not get.
    With all layers `frozen` it is the plan of an evaluation: nothing is trained, and nothing dropped.

    In bf16 the library reads A, W and Delta rounded, from the vector "rounded", laid out by `rounded`. The `prologue`
    rounds W, before the first step of a recording; then each update does, by the table `copies` (update.cu).
    """

    def __init__(
        self,
        net: Any,
        cost: Cost,
        shape: Shape,
        device: Device,
        arithmetic: str,
        rule: str | None,
        slots: Sequence[bool] = (False, False, False),
        row_size: int = 0,
        frozen: int = 0,
        seed: int = 0,
        library: Callable[[Plan, LibraryProduct], str | None] | None = None,
    ) -> None:
        self.net, self.cost, self.shape, self.device, self.arithmetic = net, cost, shape, device, arithmetic
        self.rule, self.slots, self.row_size, self.frozen, self.seed = rule, tuple(slots), row_size, frozen, seed
        self.item = net.dtype.itemsize
        self.real = "float" if net.dtype == np.float32 else "double"
        self.dropped = [rate > 0 and frozen < net.L for rate in net.rates]
        self.strides = [n if d else -(-n // 4) * 4 for n, d in zip(net.layers, [*self.dropped, False], strict=True)]
        self.places, self.parameters = Views.places(net.layers, net.biased, net.dtype)
        self.start = Views.size(net.layers[: frozen + 1], net.biased[:frozen], net.dtype)  # of what is trained
        self.head_makes_product = net.L > 1 and net.layers[-1] <= NARROW
        self._check()
        self.precision = precision_of(arithmetic, self.real)
        self._library, self._refused = library, dict[str, list[str]]()
        self.workspace, self.rounded = self._laid_out(), self._laid_out_rounded()
        self.products = self._asked()
        if self.products:
            self.rule = None
        self.table, self.tiles, self._tile = self._tiled()
        self.copies = self._copies()
        self.prologue = [self._round("W", l) for l in range(1, net.L + 1) if self._operand("W", l)]
        self.operations: list[Operation | LibraryProduct] = list(self._operations())
        # Kernels start before the one before has ended, where that takes no room from it: measured on an H100.
        blocks = [math.prod(o.grid) for o in self.operations if isinstance(o, Operation)]
        self.early = device.arch >= 90 and not self.products and max(blocks) <= 2 * device.processors
        self._library = None  # asked enough; it may hold on to the one who asks

    # ------------------------------------------------------------------------------------------------ what is where

    def _check(self) -> None:
        net = self.net
        for f in (*net.f[1:], net.g):
            if not cuda_source.is_compiled(f):
                raise Unplanned(f"the activation {f.name} has no CUDA expressions")
        if not cuda_source.is_compiled_cost(self.cost):
            raise Unplanned(f"the cost {self.cost.name} has no CUDA expressions")
        if not self.head_makes_product and self._by_output():
            raise Unplanned(f"the output function {net.g.name} is not increasing, and there are many outputs")
        if self.shape.models > 1 and any(self.dropped):
            raise Unplanned("the masks of several models are not drawn in one launch")
        if self.arithmetic not in (("ffma", "tf32x2", "tf32", "bf16") if self.real == "float" else ("ffma",)):
            raise Unplanned(f"there is no arithmetic {self.arithmetic} in {net.dtype}")

    def _by_output(self) -> bool:
        return self.shape.task == 1 and not self.net.g.increasing

    def _laid_out(self) -> Workspace:
        net, work, m = self.net, Workspace("work"), self.shape.batch
        for l in range(1, net.L):
            size = m * self.strides[l]
            work.take("A", l, size)
            if self.dropped[l]:
                work.take("F", l, size)
                work.take("mask", l, size)
            if net.f[l].derivative_from == "Z" and net.f[l].derivative is not None:
                work.take("Z", l, size)
            if l > self.frozen:
                work.take("Delta", l, size)
        work.take("Z", net.L, m * self.strides[-1])
        work.take("Delta", net.L, m * self.strides[-1])
        for name in ("C", "right", "w", "part"):
            work.take(name, net.L, m)
        if self._is_wide(1, m) and self.precision != "bf16":
            work.take("A", 0, m * net.layers[0])
        if wide := [l for l in range(self.frozen + 1, net.L + 1) if self._is_wide(l, m)]:
            most = max(max(net.layers[l], net.layers[l - 1]) for l in wide)
            work.take("sums", 0, grids.chunks(m)[0] * most)
        return work

    def _laid_out_rounded(self) -> Workspace:
        """What products in bf16 read."""
        net, copies, m = self.net, Workspace("rounded"), self.shape.batch
        for l in range(1, net.L + 1):
            if self.precision == "bf16" and self._is_wide(l, m):
                for name, of, rows in (("A", l - 1, m), ("W", l, net.layers[l]), ("Delta", l, m)):
                    if name != "Delta" or l > self.frozen:
                        copies.take(name, of, rows * self._row(name, of)[1])
        return copies

    def _row(self, name: str, l: int) -> tuple[int, int]:
        """The length of a row of A[l], W[l] or Delta[l], and of its copy's."""
        n = self.net.layers[l - 1 if name == "W" else l]
        return n, -(-n // COPY_LINE) * COPY_LINE

    def _operand(self, name: str, l: int) -> Place | None:
        """The copy of A[l], W[l] or Delta[l], where a product reads it."""
        readers = {  # the layer's other products are the library's if these are
            "A": (("forward", l + 1), ("weight_gradient", l + 1)), "W": (("forward", l), ("hidden_delta", l - 1)),
            "Delta": (("weight_gradient", l),),
        }[name]  # fmt: skip
        if self.precision == "bf16" and any(reader in self.products for reader in readers):
            return self.rounded.places[name, l]
        return None

    def _copies(self) -> np.ndarray:
        """The table of update.cu."""
        rows = []
        for l in range(self.frozen + 1, self.net.L + 1):
            if copy := self._operand("W", l):
                W, (k, padded) = self._weight(l)[0], self._row("W", l)
                rows.append((W.start - self.start, W.size, k, copy.start, padded))
        return np.array(rows, np.int64).reshape(-1, COPY)

    def _at(self, name: str, l: int) -> Place:
        """An array of layer l. F is A where there is no dropout, Z is F where it is not needed."""
        for alias in {"Z": ("Z", "F", "A"), "F": ("F", "A")}.get(name, (name,)):
            if (alias, l) in self.workspace.places:
                return self.workspace.places[alias, l]
        raise KeyError((name, l))

    def _kept(self, l: int) -> Place:
        """What f'(Z[l]) is taken from."""
        return self._at("Z" if self.net.f[l].derivative_from == "Z" else "F", l)

    def _weight(self, l: int) -> tuple[Place, Place | None]:
        """W[l] and b[l] in theta."""
        at_W, at_b = self.places[l - 1]
        n_out, n_in = self.net.layers[l], self.net.layers[l - 1]
        return Place("theta", at_W, n_out * n_in), None if at_b is None else Place("theta", at_b, n_out)

    def _tiled(self) -> tuple[np.ndarray, int, Tile]:
        """The table of gradients.cu, how many tiles there are, and the tile."""
        net, m = self.net, self.shape.m
        mine = self._own_gradients()
        products = [(net.layers[l], net.layers[l - 1], m) for l in mine]
        tile = choose_tile("gradients", products, self.arithmetic, self.real, self.device)
        rows, tiles = [], 0
        for l in mine:
            across, down = tile.blocks(net.layers[l], net.layers[l - 1])
            at_W, at_b = self.places[l - 1]
            below = (-1, net.layers[0]) if l == 1 else (self._at("A", l - 1).start, self.strides[l - 1])
            rows.append(
                (tiles, across, net.layers[l], net.layers[l - 1], at_W - self.start,
                 -1 if at_b is None else at_b - self.start, self._at("Delta", l).start, self.strides[l], *below)
            )  # fmt: skip
            tiles += across * down
        return np.array(rows, np.int64).reshape(-1, LAYER), tiles, tile

    def _own_gradients(self) -> list[int]:
        """The layers whose dW is gradients.cu's."""
        return [l for l in range(self.frozen + 1, self.net.L + 1) if ("weight_gradient", l) not in self.products]

    # ---------------------------------------------------------------------------------------- what cuBLASLt is asked

    def _is_wide(self, l: int, m: int) -> bool:
        """Whether the products with W[l] on m samples are cuBLASLt's, if it offers them."""
        limit, n, k = WIDE.get(self.precision), self.net.layers[l], self.net.layers[l - 1]
        dense = self.strides[l] == n and (l == 1 or self.strides[l - 1] == k)  # elementwise kernels know no gaps
        return (
            self._library is not None and self.shape.models == 1 and dense
            and limit is not None and min(n, k) >= limit.width and m >= limit.samples
            and m * min(n, k) >= limit.outputs
        )  # fmt: skip

    def _asked(self) -> dict[tuple[str, int], LibraryProduct]:
        """The products that cuBLASLt makes, by name and layer. In bf16 all of a layer's, or none."""
        products: dict[tuple[str, int], LibraryProduct] = {}
        for l in range(self.net.L, 0, -1):  # whose db comes with Delta[l] is known before dW[l] is asked for
            if self._is_wide(l, self.shape.m):
                offered = [self._first_offered(ways) for ways in self._ways(l, products)]
                if self.precision != "bf16" or None not in offered:
                    products |= {(p.name, p.layer): p for p in offered if p}
        return products

    def _ways(self, l: int, products: Container[tuple[str, int]]) -> Iterator[list[LibraryProduct]]:
        """Of each product of layer l the ways to make it, the one with the most in its epilogue first."""
        if not (l == self.net.L and self.head_makes_product):
            yield self._forwards(l)
        if l - 1 in self._deltas():
            yield [self._product_of("hidden_delta", l - 1, "DEFAULT", None)]
        if l > self.frozen:
            ways: list[tuple[str, Place | None]] = [("DEFAULT", None)]
            b = self.places[l - 1][1]
            if b is not None and ("hidden_delta", l) not in products and self._alpha("weight_gradient", l) == 1:
                ways.insert(0, ("BGRADB", Place("gradient", b - self.start, self.net.layers[l])))
            yield [self._product_of("weight_gradient", l, *way) for way in ways]

    def _first_offered(self, ways: Sequence[LibraryProduct]) -> LibraryProduct | None:
        """The first of several ways to make a product that the library offers, if there is one."""
        assert self._library is not None
        for product in ways:
            if (reason := self._library(self, product)) is None:
                return product
            told = f"{product.name} of layer {product.layer} ({product.epilogue})"
            self._refused.setdefault(reason, []).append(told)
        return None

    def _alpha(self, name: str, l: int) -> float:
        """Bytes are exact in bf16, so it is the product that takes the 255th part."""
        of_bytes = name in ("forward", "weight_gradient") and l == 1 and self.shape.data == "bytes"
        return 1 / 255 if of_bytes and self.precision == "bf16" else 1.0

    def _forwards(self, l: int) -> list[LibraryProduct]:
        """The ways to make Z[l] or A[l]."""
        net, b = self.net, self._weight(l)[1]
        f = IDENTITY if l == net.L else net.f[l]
        in_place = l == net.L or self._at("Z", l) == self._at("F", l)
        epilogues: list[tuple[str, Place | None]] = [("DEFAULT", None)]
        # Of a NaN the library's ReLU may make 0: only where dW tells of the infinity that it came from.
        if f == HIDDEN["relu"] and in_place and l > self.frozen:
            epilogues.insert(0, ("RELU_BIAS" if b else "RELU", b))
        elif b and (f == IDENTITY or not in_place):
            epilogues.insert(0, ("BIAS", b))
        return [self._product_of("forward", l, *way) for way in epilogues]

    def _product_of(self, name: str, l: int, epilogue: str, vector: Place | None) -> LibraryProduct:
        net, m = self.net, self.shape.m
        above = l + 1 if name == "hidden_delta" else l  # whose W it is
        n, k = net.layers[above], net.layers[above - 1]
        in_bf16 = self.precision == "bf16"

        def operand(array: str, of: int, rows: int) -> Matrix:
            width, padded = self._row(array, of)
            if in_bf16:
                copy = self.rounded.places[array, of]
                return Matrix(Place("rounded", copy.start, rows * padded), rows, width, padded)
            return Matrix(self._weight(of)[0], rows, width, width) if array == "W" else result(array, of)

        def result(array: str, of: int) -> Matrix:
            width = net.layers[of]
            return Matrix(Place("work", self._at(array, of).start, m * width), m, width, width)

        if name == "forward":
            what, arrays = f"Z[{l}] = W[{l}] A[{l - 1}]", (operand("W", l, n), operand("A", l - 1, m), result("Z", l))
            if vector:
                what += f" + b[{l}]"
            if "RELU" in epilogue:
                what += f", A[{l}] = relu(Z[{l}])"
        elif name == "hidden_delta":
            what = f"W[{above}]^T Delta[{above}]"
            arrays = operand("W", above, n), operand("Delta", above, m), result("Delta", l)
        else:
            dW = Matrix(Place("gradient", self._weight(l)[0].start - self.start, n * k), n, k, k)
            what, arrays = f"dW[{l}] = Delta[{l}] A[{l - 1}]^T", (operand("Delta", l, m), operand("A", l - 1, m), dW)
            if vector:
                what += f", db[{l}]"
        sizes = [of.rows * of.columns for of in arrays]
        traffic = (2 if in_bf16 else self.item) * sum(sizes[:2]) + self.item * sizes[2]
        return LibraryProduct(
            what, name, l, arrays, vector, epilogue, self.precision, 2.0 * m * n * k, traffic, self._alpha(name, l)
        )

    # ----------------------------------------------------------------------------------------------- the operations

    def _operations(self) -> Iterator[Operation | LibraryProduct]:
        L = self.net.L
        if self.shape.weighted:
            yield self._shares()
        if {("forward", 1), ("weight_gradient", 1)} & set(self.products):
            yield self._gather()
        for l in range(1, L):
            yield from self._layer(l)
            if self.dropped[l]:
                yield self._drop(l)
            if self._operand("A", l):
                yield self._round("A", l)
        if not self.head_makes_product:
            yield from self._layer(L)
        yield self._head()
        for l in range(L, self.frozen, -1):
            if product := self.products.get(("hidden_delta", l)):
                yield product
                yield from self._slope(l)
            else:
                if l in self._deltas():
                    yield self._delta(l)
                if self._operand("Delta", l) and not (l == L - 1 and self._head_rounds()):
                    yield self._round("Delta", l)
            if product := self.products.get(("weight_gradient", l)):
                yield product
            if self._is_summed(l):
                yield from self._sums(l, "column_sums", f"db[{l}]", {})
        yield self._gradients()

    def _is_summed(self, l: int) -> bool:
        """Whether db[l] is made by a kernel of its own."""
        dW = self.products.get(("weight_gradient", l))
        made = dW is None or dW.vector or ("hidden_delta", l) in self.products
        return not made and self.places[l - 1][1] is not None

    def _head_rounds(self) -> bool:
        """Whether Delta[L-1] is there in bf16 alone: the head makes it, and nothing but products reads it."""
        l = self.net.L - 1
        return bool(self._head_below() and self._operand("Delta", l)) and not self._is_summed(l)

    def _round(self, name: str, l: int) -> Operation:
        """The copy of A[l], W[l] or Delta[l] in bf16."""
        n, padded = self._row(name, l)
        copy = self._operand(name, l)
        assert copy is not None
        rows = self.net.layers[l] if name == "W" else self.shape.m
        of = self._weight(l)[0] if name == "W" else Place("work", self._at(name, l).start, rows * n)
        return Operation(
            f"{name}[{l}] rounded to bf16",
            "round.cu", "round_rows", (("REAL", self.real),), self._blocks(rows * n), (grids.THREADS, 1),
            (of, copy, rows, n, padded), bytes=6.0 * rows * n,
        )  # fmt: skip

    def _deltas(self) -> range:
        """The layers whose Delta is made from the one above by a product of its own."""
        return range(self.net.L - 1 - (self._head_below() is not None), self.frozen, -1)

    def _layer(self, l: int) -> Iterator[Operation | LibraryProduct]:
        """Z[l] and A[l], before dropout."""
        product = self.products.get(("forward", l))
        if product is None:
            yield self._forward(l)
            return
        yield product
        net, (m, n) = self.net, product.arrays[2][1:3]
        Z, F = self._at("Z", l), self._at("Z" if l == net.L else "F", l)
        b = None if product.vector else self._weight(l)[1]
        f = IDENTITY if l == net.L or product.epilogue.startswith("RELU") else net.f[l]
        if b is None and f == IDENTITY:
            return
        yield Operation(
            ", ".join([f"Z[{l}] += b[{l}]"] * (b is not None) + [f"A[{l}] = {f.name}(Z[{l}])"] * (l < net.L)),
            "activate.cu", "bias_activate", tuple({"REAL": self.real, **cuda_source.activation(f)}.items()),
            self._blocks(m * n), (grids.THREADS, 1),
            (b, Place("work", Z.start, m * n), Place("work", F.start, m * n), m, n),
            bytes=float((2 + (Z != F)) * m * n * self.item),
        )  # fmt: skip

    def _blocks(self, size: int) -> tuple[int, int, int]:
        """The grid of a walk over `size` reals, 16 bytes a thread and step."""
        return grids.blocks(size, self.item), 1, 1

    def _gather(self) -> Operation:
        """The step's rows of the data, as reals or in bf16."""
        s, as_bytes, copy = self.shape, self.shape.data == "bytes", self._operand("A", 0)
        n, padded = self._row("A", 0)
        whole = copy or Place("work", self._at("A", 0).start, s.m * n)
        defines = {"REAL": self.real, "SOURCE": "unsigned char" if as_bytes else "real"}
        defines["TARGET"] = "unsigned short" if copy else "real"
        return Operation(
            "A[0] = the step's rows of the data" + (" in bf16" if copy else " / 255" if as_bytes else ""),
            "step_gather.cu", "step_gather", tuple(defines.items()), self._blocks(s.m * n), (grids.THREADS, 1),
            (Place("data", 0, s.n_data * n), *self._order(1), whole, padded if copy else n, Place("state", 0, STATE),
             AHEAD, s.m, n),
            bytes=float(s.m * n * ((1 if as_bytes else self.item) + (2 if copy else self.item))),
        )  # fmt: skip

    def _slope(self, l: int) -> Iterator[Operation]:
        """Delta[l] from the product that lies there already, and db[l] if its dW is the library's."""
        net, f = self.net, self.net.f[l]
        mask = self._at("mask", l) if self.dropped[l] else None
        sums = ("weight_gradient", l) in self.products and self.places[l - 1][1] is not None
        copy = self._operand("Delta", l)
        if f.derivative is None and mask is None and copy is None:  # f' = 1
            if sums:
                yield from self._sums(l, "column_sums", f"db[{l}]", {})
            return
        size = self.shape.m * net.layers[l]
        before = [Place("work", at.start, size) if at else None for at in (self._kept(l), mask)]
        what = f"Delta[{l}] = {f.name}'(Z[{l}]) ⊙ that" + (f", db[{l}]" if sums else "")
        after = (copy, self._row("Delta", l)[1] if copy else 0)
        yield from self._sums(l, "hidden_delta", what, cuda_source.activation(f), before, after, sums)

    def _sums(
        self, l: int, kernel: str, what: str, defines: dict[str, str], before: Sequence[Argument] = (),
        after: Sequence[Argument] = (), sums: bool = True,
    ) -> Iterator[Operation]:  # fmt: skip
        """A kernel that sums Delta[l], or what it makes of it, down its columns into db[l], in one launch or two."""
        m, n = self.shape.m, self.net.layers[l]
        cut, at_b = grids.strips(m, n, self.item), self.places[l - 1][1]
        db = Place("gradient", at_b - self.start, n) if sums and at_b is not None else None
        partial = Place("work", self._at("sums", 0).start, cut.chunks * n) if db and cut.chunks > 1 else db
        yield Operation(
            what, f"{kernel}.cu", kernel, tuple({"REAL": self.real, **defines}.items()),
            (cut.across, cut.chunks, 1), grids.STRIP,
            (*before, Place("work", self._at("Delta", l).start, m * n), partial, m, n, cut.chunk_rows, int(cut.wide),
             *after),
            bytes=float((1 + (len(before) > 0) + sum(x is not None for x in before)) * m * n * self.item),
        )  # fmt: skip
        if partial != db:
            yield Operation(
                f"db[{l}], of {cut.chunks} parts", "column_sums.cu", "column_sums", (("REAL", self.real),),
                (cut.across, 1, 1), grids.STRIP, (partial, db, cut.chunks, n, cut.chunks, int(cut.wide)),
                bytes=float((cut.chunks + 1) * n * self.item),
            )  # fmt: skip

    def _order(self, l: int) -> tuple[Argument, ...]:
        """order and batch, of what reads the data in layer 1."""
        if l != 1:
            return None, 0
        return None if self.shape.ordered else Place("order", 0, 2 * self.shape.n_data), self.shape.batch

    @property
    def _work(self) -> int:
        return self.workspace.size

    def _product(self, tile: Tile, f: Activation | None = None, **more: str) -> tuple[tuple[str, str], ...]:
        defines = {"REAL": self.real, "ARITHMETIC": self.arithmetic, "TILE": str(tile)}
        return tuple({**defines, **(cuda_source.activation(f) if f else {}), **more}.items())

    def _forward(self, l: int) -> Operation:
        net, s = self.net, self.shape
        m, n, k = s.m, net.layers[l], net.layers[l - 1]
        last = l == net.L
        f = IDENTITY if last else net.f[l]
        tile = choose_tile("forward", [(m, n, k)], self.arithmetic, self.real, self.device)
        from_data, as_bytes = l == 1, l == 1 and s.data == "bytes"
        A: Place = Place("data", 0, s.n_data * k) if from_data else self._at("A", l - 1)
        W, b = self._weight(l)
        Z, F = self._at("Z", l), self._at("Z", l) if last else self._at("F", l)
        what = f"Z[{l}] = W[{l}] A[{l - 1}]" + (f" + b[{l}]" if b else "")
        return Operation(
            what if last else f"{what}, A[{l}] = {f.name}(Z[{l}])",
            "forward.cu", "forward",
            self._product(tile, f, SOURCE="unsigned char" if as_bytes else "real"),
            (*tile.blocks(m, n), s.models), (tile.threads, 1),
            (A, k if from_data else self.strides[l - 1], *self._order(l), W, b, Z, F, self.strides[l],
             1 / 255 if as_bytes else 1.0, self._bound_Z(l), Place("state", 0, STATE), AHEAD, m, n, k,
             0 if from_data else self._work, self.parameters, self._work, 2 * s.n_data),
            2.0 * m * n * k,
            m * k * (1 if as_bytes else self.item) + (n * k + m * n * (1 + (Z != F))) * self.item,
            tile, tile.shared("forward", self.item, as_bytes),
        )  # fmt: skip

    def _bound_Z(self, l: int) -> float:
        return ORDINARY if l < self.net.L else 1e30

    def _bound_Delta(self, l: int) -> float:
        """Deltas of layer l up to it make a gradient below HUGE."""
        below = self.shape.greatest if l == 1 else ORDINARY
        return HUGE / MOST_LR / self.shape.m / max(below, 1.0)

    def _drop(self, l: int) -> Operation:
        net, s = self.net, self.shape
        size = s.m * net.layers[l]
        F, mask, A = (Place("work", self._at(name, l).start, size) for name in ("F", "mask", "A"))
        blocks = grids.blocks(size, 4)  # four numbers a thread
        return Operation(
            f"A[{l}] = mask[{l}] ⊙ {net.f[l].name}(Z[{l}])",
            "dropout.cu", "drop", (("REAL", self.real),), (blocks, 1, 1), (grids.THREADS, 1),
            (F, mask, A, size, dropout.threshold(net.rates[l]), dropout.scale(net.rates[l]), l, 0, self.seed,
             Place("state", 0, STATE), AHEAD),
            bytes=3.0 * size * self.item,
        )  # fmt: skip

    def _shares(self) -> Operation:
        s, at = self.shape, self.workspace.places
        w, part = at["w", self.net.L], at["part", self.net.L] if self.shape.mean else None
        return Operation(
            "w = weights of the step's samples" + (", part = w / sum w" if s.mean else ""),
            "share.cu", "step_shares", (("REAL", self.real),), (1, 1, s.models), (1024, 1),
            (Place("weights", 0, s.n_data), *self._order(1), w, part, Place("state", 0, STATE), AHEAD, s.m, self._work,
             2 * s.n_data),
            bytes=3.0 * s.m * self.item,
        )  # fmt: skip

    def _head_below(self) -> Place | None:
        """Delta[L-1], where the head makes it."""
        L = self.net.L
        return self._at("Delta", L - 1) if self.head_makes_product and self.frozen < L - 1 else None

    def _head(self) -> Operation:
        net, s, L = self.net, self.shape, self.net.L
        m, K, n = s.m, net.layers[L], net.layers[L - 1]
        makes, below = self.head_makes_product, self._head_below()
        to: tuple[Argument, ...] = (below, None, 0)
        if self._head_rounds():
            to = None, self._operand("Delta", L - 1), self._row("Delta", L - 1)[1]
        W, b = self._weight(L) if makes else (None, None)
        kept = self._kept(L - 1) if below else None
        mask = self._at("mask", L - 1) if below and self.dropped[L - 1] else None
        labels, whole = Place("targets", 0, s.n_data), Place("targets", 0, s.n_data * K)
        targets = (labels, None) if s.targets == "labels" else (None, whole)
        weights: Argument = self._at("part" if s.mean else "w", L) if s.weighted else None
        share = 1 / m if s.mean else 1.0
        block = (32, HEAD_WARPS) if K <= LONG_ROW else (256, 1)
        rows = 1 if m <= 2 * self.device.processors else HEAD_WARPS  # of a block at a time
        each = rows if makes else int(block[1])
        what = f"Z[{L}] = W[{L}] A[{L - 1}]" + (f" + b[{L}]" if b else "") + ", " if makes else ""
        defines = {"REAL": self.real, "ROWS": str(rows), **cuda_source.cost(self.cost), **cuda_source.activation(net.g)}
        defines |= cuda_source.activation(net.f[L - 1] if below else IDENTITY, "BELOW")
        return Operation(
            f"{what}C, Delta[{L}] = dC/dZ[{L}]" + (f", Delta[{L - 1}] = f' ⊙ (W[{L}]^T Delta[{L}])" if below else ""),
            "head.cu", "head", tuple(defines.items()),
            (min(-(-m // each), 1024), 1, s.models), block,
            (self._at("A", L - 1) if makes else None, self.strides[L - 1], W, b, None if makes else self._at("Z", L),
             *self._order(1), *targets, weights, share, self.cost.smoothing, self.cost.parameter, s.task,
             int(self._by_output()), self._at("Delta", L), self.strides[L], self._at("C", L), self._at("right", L),
             kept, mask, *to, self._bound_Delta(L), self._bound_Delta(L - 1) if below else 0.0,
             Place("state", 0, STATE), AHEAD, m, n, K, self.parameters, self._work, 2 * s.n_data),
            2.0 * m * n * K * (makes + (below is not None)),
            ((m * n * (2 if below else 1) + n * K) * makes + 2 * m * K) * self.item,
        )  # fmt: skip

    def _delta(self, l: int) -> Operation:
        net, s = self.net, self.shape
        m, n, k = s.m, net.layers[l], net.layers[l + 1]
        tile = choose_tile("delta", [(m, n, k)], self.arithmetic, self.real, self.device)
        mask = self._at("mask", l) if self.dropped[l] else None
        return Operation(
            f"Delta[{l}] = {net.f[l].name}'(Z[{l}]) ⊙ (W[{l + 1}]^T Delta[{l + 1}])",
            "delta.cu", "delta", self._product(tile, net.f[l]), (*tile.blocks(m, n), s.models), (tile.threads, 1),
            (self._at("Delta", l + 1), self.strides[l + 1], self._weight(l + 1)[0], self._kept(l), mask,
             self._at("Delta", l), self.strides[l], self._bound_Delta(l), Place("state", 0, STATE), AHEAD, m, n, k,
             self.parameters, self._work),
            2.0 * m * n * k, (m * k + n * k + m * n * (2 + (mask is not None))) * self.item, tile,
            tile.shared("delta", self.item),
        )  # fmt: skip

    def _gradients(self) -> Operation:
        net, s, tile = self.net, self.shape, self._tile
        L, size = net.L, self.parameters - self.start
        as_bytes = s.data == "bytes"
        data = Place("data", 0, s.n_data * net.layers[0])
        C, right, w = (self._at(name, L).start for name in ("C", "right", "w"))
        theta, g = Place("trained", 0, size), None if self.rule or not size else Place("gradient", 0, size)
        slots = [Place(f"slot {i}", 0, size) if there and self.rule else None for i, there in enumerate(self.slots)]
        mine = self._own_gradients()
        weights = sum(net.layers[l] * net.layers[l - 1] for l in mine)
        sources = sum(net.layers[l] + net.layers[l - 1] for l in mine)
        of = f"{self.frozen + 1}..{L}" if len(mine) == L - self.frozen else ", ".join(map(str, mine))
        more = {"SOURCE": "unsigned char" if as_bytes else "real", **({"RULE": self.rule} if self.rule else {})}
        traffic = 2 * (1 + sum(x is not None for x in slots)) if self.rule else 1
        return Operation(
            (f"dW[l], db[l] of l = {of}" if mine else "sums of C and of what is right")
            + (f", {self.rule} of theta" if self.rule else ""),
            "gradients.cu", "gradients", self._product(tile, None, **more), (self.tiles + 1, 1, s.models),
            (tile.threads, 1),
            (Place("layers", 0, self.table.size), len(self.table), self.tiles, data,
             net.layers[0], *self._order(1), Place("work", 0, self._work), 1 / 255 if as_bytes else 1.0, theta, g,
             *slots, Place("rows", 0, (s.steps + 1) * self.row_size) if self.rule else None, self.row_size, C, right,
             w if s.weighted else -1, Place("measured", 0, 2 * (s.steps + 1)), Place("state", 0, STATE), AHEAD, s.m,
             self.parameters, self._work, 2 * s.n_data, s.steps + 1),
            2.0 * s.m * weights, (s.m * sources + weights * traffic) * self.item, tile,
            tile.shared("gradients", self.item),
        )  # fmt: skip

    # -------------------------------------------------------------------------------------------------- what it tells

    @property
    def flop(self) -> float:
        """Of a step."""
        return sum(o.flop for o in self.operations)

    @property
    def bytes(self) -> float:
        """What a step reads and writes at least."""
        return sum(o.bytes for o in self.operations)

    def floor(self) -> float | None:
        """Seconds that a step takes at least: each operation at the device's rate or bandwidth, whichever is less."""
        d = self.device
        if not (d.rate and d.bandwidth):
            return None
        return sum(max(o.flop / (d.rate * self._speed(o)), o.bytes / d.bandwidth) for o in self.operations)

    def _speed(self, o: Operation | LibraryProduct) -> float:
        if isinstance(o, LibraryProduct):
            return SPEED.get(o.precision, 1.0)
        return SPEED[self.arithmetic]

    @property
    def notes(self) -> list[str]:
        """What cuBLASLt was asked for in vain, a line a reason."""
        return [f"not cuBLASLt's: {', '.join(names)}: {reason}" for reason, names in self._refused.items()]

    def describe(self) -> str:
        """A line an operation: what it computes, its kernel, tile and grid, FLOP and bytes; then the sums."""
        lines = []
        for o in self.operations:
            if isinstance(o, LibraryProduct):
                how, grid = f"cuBLASLt, {o.precision} {o.epilogue}", ""
            else:
                how = f"{o.kernel}, {self.arithmetic} {o.tile}" if o.tile else o.kernel
                grid = " x ".join(map(str, o.grid))
            lines.append(f"{o.equation:64} {how:44} {grid:>14}  {o.flop / 1e6:10.1f} MFLOP {o.bytes / 1e6:8.2f} MB")
        if self.prologue:
            lines.append(f"before the first of several steps: {', '.join(o.equation for o in self.prologue)}")
        if self.rule is None and self.frozen < self.net.L:
            lines.append("then survey and update: the gradient is stored")
        lines += self.notes
        floor = self.floor()
        lines.append(
            f"{len(self.operations)} nodes a step, {self.flop / 1e6:.1f} MFLOP, {self.bytes / 1e6:.2f} MB, "
            f"workspace {self.workspace.size * self.item / 1e6:.2f} MB"
            + (f", at least {floor * 1e6:.2f} us on {self.device.name}" if floor else "")
        )
        return "\n".join(lines)


def arithmetic_of(precision: str, device: Device) -> str:
    """The arithmetic of product.cuh that a precision is computed in."""
    if precision == "float64" or device.arch < 80:
        return "ffma"
    return {"float32": "tf32x2"}.get(precision, precision)


def precision_of(arithmetic: str, real: str) -> str:
    """The precision of `cublaslt` that stands for an arithmetic."""
    return "float64" if real == "double" else {"ffma": "float32", "tf32x2": "float32"}.get(arithmetic, arithmetic)
