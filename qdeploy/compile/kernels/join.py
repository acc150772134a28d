"""`join`: one part of a tensor's bit planes (qdeploy/bundle/FORMAT.md, Weight tensors) refines its container codes.

    join(raw, codes, bits, layout, held, shift, bias_before, bias)

    raw          uint8 [r], the part's bytes: `bits` planes of n symbols, as inflated
    codes        uint8 [n], in and out: container codes, int8 ones as their bytes; zeros before the first part
    bits         planes of this part, 1 .. 8
    layout       place of its layout's name in LAYOUTS
    held         planes that `codes` holds already: as (prefix << (shift + bits)) + bias_before, mod 256
    shift        at most 8 - held - bits
    bias_before  0 before the first part
    bias         `codes` then holds (prefix << shift) + bias, prefix of held + bits planes

All but the two tensors are int32. For a level [b, shift, offset], bias = offset - (2^(b-1) << shift) gives the codes
of bundle/planes.py's `container` of `join`, without caps. Parts are joined one after another; the first k of them may
stop at a lower level whose shift is larger by the planes that it lacks, and go on from there. It raises where `raw` has
another length than its layout says, or an unused bit is set.

Tight and spaced parts are read 8 symbols at a time as one number of 64 bits, whose fields are then spread to bytes.
For a sorted part, each context has a position in the bits; of 32 weights those of one context get their bits from one
word at once (pdep), on processors that can.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from qdeploy.compile.kernels.emit import Buffer, Expr, cast, const, load, local, loop, splat, splat_const, store, typed

LAYOUTS = ("tight", "spaced", "sorted")
ARGUMENTS = ("bits", "layout", "held", "shift", "bias_before", "bias")
CONTEXTS = 8
WORD = 8  # symbols, and the bytes that are read for them
DEALT = 32  # weights of a sorted part that get their bits at once
LENGTH = "a part of a weight tensor has another length than its layout says: fetch the bundle again"
UNUSED = "an unused bit of a plane is set: fetch the bundle again"


def join_kernel(name: str, features: Collection[str]) -> tirx.PrimFunc:
    """See above; `features` are LLVM's names of the target's instruction sets."""
    lanes = 64 if "avx512bw" in features else 32 if "avx2" in features else 16
    with IRBuilder() as builder, T.prim_func():
        T.func_name(name)
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        size, count = tirx.Var("size", "int32"), tirx.Var("count", "int32")
        raw = T.arg("raw", T.Buffer((size,), "uint8"))
        codes = T.arg("codes", T.Buffer((count,), "uint8"))
        Joiner(raw, size, codes, count, {label: T.arg(label, T.int32()) for label in ARGUMENTS}).body(
            lanes, {"avx2", "bmi2"} <= set(features)
        )
    return builder.get()


def word_const(value: int) -> Expr:
    """A 64-bit number."""
    return const(value, "uint64")


def vector_of(values: list[Expr]) -> Expr:
    """The scalars `values` as one vector."""
    return T.Shuffle(values, [const(i) for i in range(len(values))])


def big_endian(raw: Buffer, at: Expr) -> Expr:
    """Bytes at .. at + 7 as one number, the first one on top."""
    return T.call_llvm_pure_intrin("uint64", "llvm.bswap.i64", T.reinterpret("uint64", load(raw, at, WORD)))


class Joiner:
    """Writes the body of `join_kernel`."""

    def __init__(self, raw: Buffer, size: Expr, codes: Buffer, count: Expr, given: dict[str, Expr]) -> None:
        self.raw, self.size, self.codes, self.count, self.given = raw, size, codes, count, given
        self.bits, self.held = given["bits"], given["held"]

    def body(self, lanes: int, deals: bool) -> None:
        """Check the part, then one of three ways; the rest of each goes symbol by symbol."""
        layout = self.given["layout"]
        spaced, is_sorted = (layout == const(LAYOUTS.index(name)) for name in ("spaced", "sorted"))
        per = T.Bind(T.Select(spaced, T.truncdiv(const(8), self.bits), const(1)))  # symbols of a spaced byte
        self.check(spaced, per)
        with T.If(is_sorted):
            with T.Then():
                self.sorted(deals)
            with T.Else():
                # bits that a symbol takes: a spaced byte holds two symbols of 3 bits, or one
                unit = T.Bind(T.Select(spaced, T.truncdiv(const(8), per), self.bits))
                with T.If(spaced):
                    with T.Then():
                        self.fields(lanes, unit, self.squeezed)
                    with T.Else():
                        self.fields(lanes, unit, lambda word, lanes: word)
                with T.serial(self.whole(lanes, unit), self.count) as i:
                    self.put(i, self.shifted(self.field(i, spaced, per), 1), 1)

    def check(self, spaced: Expr, per: Expr) -> None:
        """Raise for a wrong length or an unused bit that is set."""
        total = T.Bind(self.count * T.Select(spaced, const(1), self.bits))  # bits, or symbols of a spaced part
        unit = T.Select(spaced, per, const(8))
        with T.Assert(self.size == T.truncdiv(total + unit - 1, unit), LENGTH):
            pass
        found = local(1, "int32")
        store(found, const(0), 0)
        with T.If(spaced), T.Then():
            unused = T.Bind(T.shift_left(const(1), 8 - per * self.bits) - 1)
            with T.serial(0, self.size) as i:
                byte = T.bitwise_and(cast("int32", load(self.raw, i), 1), unused)
                store(found, T.bitwise_or(load(found, 0), byte), 0)
        with T.If(self.size > const(0)), T.Then():
            free = (self.size * unit - total) * T.Select(spaced, self.bits, const(1))
            low = T.Select(spaced, 8 - per * self.bits, const(0))
            last = cast("int32", load(self.raw, self.size - 1), 1)
            byte = T.bitwise_and(last, T.shift_left(const(1), free + low) - 1)
            store(found, T.bitwise_or(load(found, 0), byte), 0)
        with T.Assert(load(found, 0) == const(0), UNUSED):
            pass

    # codes

    def prefix(self, at: Expr, lanes: int) -> Expr:
        """uint8: what `codes` hold from `at` on."""
        code = load(self.codes, at, lanes) - splat(cast("uint8", self.given["bias_before"], 1), lanes)
        return T.Bind(T.shift_right(code, splat(cast("uint8", self.given["shift"] + self.bits, 1), lanes)))

    def put(self, at: Expr, shifted: Expr, lanes: int) -> None:
        """Add symbols << shift, uint8, to the codes."""
        more = cast("uint8", self.given["bias"] - self.given["bias_before"], 1)
        store(self.codes, load(self.codes, at, lanes) + (shifted + splat(more, lanes)), at, lanes)

    def shifted(self, symbols: Expr, lanes: int, dtype: str = "uint8") -> Expr:
        """symbols << shift; in numbers of 64 bits no byte reaches into the next one."""
        return T.shift_left(symbols, splat(T.Bind(cast(dtype, self.given["shift"], 1)), lanes))

    # tight and spaced

    def whole(self, lanes: int, unit: Expr) -> Expr:
        """Symbols that `fields` reads: whole vectors whose words end within the part."""
        words = T.truncdiv(self.size - WORD, unit) + 1  # word k is read from byte k * unit on
        vectors = T.truncdiv(T.Min(T.truncdiv(self.count, const(WORD)), words), const(lanes // WORD))
        return T.Max(vectors, const(0)) * lanes

    def fields(self, lanes: int, unit: Expr, prepare: Callable[[Expr, int], Expr]) -> None:
        """All whole vectors of symbols that stand every `unit` bits once `prepare` has seen their words."""
        words = lanes // WORD

        def wide(value: Expr) -> Expr:
            return splat(T.Bind(cast("uint64", value, 1)), words)

        def masks(bits: Expr, ones: int) -> Expr:
            low = T.shift_left(word_const(1), cast("uint64", bits, 1)) - word_const(1)
            return splat(T.Bind(low * word_const(ones)), words)

        steps = [
            (wide(unit * 4), masks(unit * 4, 1), 32),
            (wide(unit * 2), masks(unit * 2, 0x100000001), 16),
            (wide(unit), masks(unit, 0x1000100010001), 8),
        ]
        top = wide(64 - unit * 8)
        with T.serial(0, T.truncdiv(self.whole(lanes, unit), const(lanes))) as i:
            start = i * words
            word = vector_of([T.Bind(big_endian(self.raw, (start + k) * unit)) for k in range(words)])
            word = T.Bind(prepare(T.shift_right(word, top), words))
            for down, mask, up in steps:
                high, low = T.bitwise_and(T.shift_right(word, down), mask), T.bitwise_and(word, mask)
                word = T.Bind(T.bitwise_or(high, T.shift_left(low, splat(word_const(up), words))))
            word = self.shifted(word, words, "uint64")
            self.put(i * lanes, T.reinterpret(typed("uint8", lanes), word), lanes)

    def squeezed(self, word: Expr, lanes: int) -> Expr:
        """Words of spaced bytes -> two fields of 4 bits in a byte (symbols of 3 bits), or one of 8."""

        def moved(by: Expr, kept: Expr) -> Expr:
            by, kept = (splat(T.Bind(cast("uint64", value, 1)), lanes) for value in (by, kept))
            return T.bitwise_and(T.shift_right(word, by), kept)

        pair = self.bits == const(3)
        every = word_const(0x0101010101010101)
        single = every * (T.shift_left(word_const(1), cast("uint64", self.bits, 1)) - word_const(1))
        upper = T.Select(pair, word_const(0x70707070), word_const(0))
        lower = T.Select(pair, word_const(0x07070707), single)
        return T.bitwise_or(moved(const(1), upper), moved(8 - T.Select(pair, const(6), self.bits), lower))

    def field(self, i: Expr, spaced: Expr, per: Expr) -> Expr:
        """Symbol `i`, uint8."""
        start = T.Bind(T.Select(spaced, T.truncdiv(i, per) * 8 + T.truncmod(i, per) * self.bits, i * self.bits))
        at = T.Bind(T.shift_right(start, const(3)))
        two = [cast("int32", load(self.raw, place), 1) for place in (at, T.Min(at + 1, self.size - 1))]
        both = T.bitwise_or(T.shift_left(two[0], const(8)), two[1])
        value = T.shift_right(both, 16 - self.bits - T.bitwise_and(start, const(7)))
        return cast("uint8", T.bitwise_and(value, T.shift_left(const(1), self.bits) - 1), 1)

    # sorted

    def fold(self, prefix: Expr, lanes: int) -> tuple[Expr, Expr]:
        """Prefixes -> context, and 1 where the next bit is stored inverted; uint8."""
        below = splat(cast("uint8", self.held - 1, 1), lanes)
        one = splat_const(1, "uint8", lanes)
        inverted = T.Bind(T.bitwise_xor(T.shift_right(prefix, below), one))
        cells = splat(cast("uint8", T.shift_left(const(1), self.held - 1) - 1, 1), lanes)
        cell = T.bitwise_and(T.bitwise_xor(prefix, splat_const(0, "uint8", lanes) - inverted), cells)
        return T.Bind(T.Min(cell, splat_const(CONTEXTS - 1, "uint8", lanes))), inverted

    def sorted(self, deals: bool) -> None:
        """One plane whose bits stand context by context: count, then deal them out."""
        contexts = T.Bind(T.Min(const(CONTEXTS), T.shift_left(const(1), self.held - 1)))
        places = local(CONTEXTS, "int32")  # of the next bit of each context
        loop(CONTEXTS, lambda c: store(places, const(0), c))
        whole = const(0)
        if deals:
            enough = T.Select(self.size >= const(WORD), self.count, const(0))
            whole = T.Bind(T.truncdiv(enough, const(DEALT)))
            with T.serial(0, whole) as i:
                context, _ = self.fold(self.prefix(i * DEALT, DEALT), DEALT)
                with T.serial(0, contexts) as c:
                    store(places, load(places, c) + T.popcount(members(context, c)), c)
        with T.serial(whole * DEALT, self.count) as i:
            context, _ = self.fold(self.prefix(i, 1), 1)
            at = T.Bind(cast("int32", context, 1))
            store(places, load(places, at) + 1, at)
        start = local(1, "int32")
        store(start, const(0), 0)
        with T.serial(0, CONTEXTS) as c:
            size = T.Bind(load(places, c))
            store(places, load(start, 0), c)
            store(start, load(start, 0) + size, 0)
        if deals:
            with T.serial(0, whole) as i:
                self.deal(i * DEALT, places, contexts)
        with T.serial(whole * DEALT, self.count) as i:
            self.pick(i, places)

    def pick(self, i: Expr, places: Buffer) -> None:
        """The bit of weight `i`."""
        context, inverted = self.fold(self.prefix(i, 1), 1)
        at = T.Bind(cast("int32", context, 1))
        place = T.Bind(load(places, at))
        store(places, place + 1, at)
        byte = cast("int32", load(self.raw, T.shift_right(place, const(3))), 1)
        bit = T.bitwise_and(T.shift_right(byte, 7 - T.bitwise_and(place, const(7))), const(1))
        self.put(i, self.shifted(T.bitwise_xor(cast("uint8", bit, 1), inverted), 1), 1)

    def deal(self, i: Expr, places: Buffer, contexts: Expr) -> None:
        """The bits of weights i .. i + 31; in masks and words of bits the first weight is the highest bit."""
        context, inverted = self.fold(self.prefix(i, DEALT), DEALT)
        backwards = T.Bind(T.Shuffle([context], [const(DEALT - 1 - k) for k in range(DEALT)]))
        dealt = local(1, "uint32")
        store(dealt, const(0, "uint32"), 0)
        with T.serial(0, contexts) as c:
            mask = T.Bind(members(backwards, c))
            count, place = T.Bind(T.popcount(mask)), T.Bind(load(places, c))
            store(places, place + count, c)
            byte = T.Bind(T.Min(T.shift_right(place, const(3)), self.size - WORD))
            word = T.shift_left(big_endian(self.raw, byte), cast("uint64", place - byte * 8, 1))
            low = T.shift_right(T.shift_right(word, word_const(1)), cast("uint64", 63 - count, 1))
            spread = T.call_llvm_pure_intrin("uint32", "llvm.x86.bmi.pdep.32", cast("uint32", low, 1), mask)
            store(dealt, T.bitwise_or(load(dealt, 0), spread), 0)
        swapped = T.call_llvm_pure_intrin("uint32", "llvm.bswap.i32", load(dealt, 0))
        copies = T.Bind(T.reinterpret(typed("uint8", DEALT), splat(swapped, DEALT // 4)))
        each = T.Shuffle([copies], [const(k // 16 * 16 + k // 8) for k in range(DEALT)])
        bit = T.reinterpret(typed("uint8", DEALT), splat(word_const(0x0102040810204080), DEALT // 8))
        symbols = T.Min(T.bitwise_and(each, bit), splat_const(1, "uint8", DEALT))
        self.put(i, self.shifted(T.bitwise_xor(symbols, inverted), DEALT), DEALT)


def members(context: Expr, c: Expr) -> Expr:
    """Which of 32 weights are of context `c`: uint32, the first one in the lowest bit."""
    same = context == splat(cast("uint8", c, 1), DEALT)
    full = T.Select(same, splat_const(-1, "int8", DEALT), splat_const(0, "int8", DEALT))
    return T.reinterpret("uint32", T.call_llvm_pure_intrin("int32", "llvm.x86.avx2.pmovmskb", full))
