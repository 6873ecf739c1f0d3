"""The vectors of chapter 14: exact products and sums, exp and log, and the operations made of them."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4.conform.generate import make
from nf4.conform.generate.exact import numbers
from nf4.conform.generate.inputs import from_bits
from nf4.conform.vectors import Vector
from nf4.exact import grid

Float32 = NDArray[np.float32]

LARGEST = float(np.finfo(np.float32).max)
TINY = 2.0**-149

FLAGS = {
    "exact-product-small": "ProductOrder GridMissing GridShared GridTruncated",
    "exact-product-k-32": "ProductOrder GridMissing GridTies GridTruncated",
    "exact-product-k-33": "ProductOrder GridMissing GridShared GridTruncated GridBits",
    "exact-product-k-200": "ProductOrder GridMissing GridTruncated GridBits",
    "exact-product-ties": "GridMissing GridExponent GridTies GridTruncated",
    "exact-product-powers-of-two": "GridMissing GridShared GridTruncated",
    "exact-product-scales": "ProductOrder GridShared",
    "exact-product-subnormal": "FlushSubnormal GridShared",
    "exact-product-underflow": "FlushSubnormal ProductZeroSign",
    "exact-product-last-finite": "ProductOrder GridTies",
    "exact-product-nine-pieces": "LongPieces LongProductOneGrid PiecesAdded",
    "exact-product-infinity": "NonFiniteAccepted",
    "exact-product-length": "LengthAccepted",
    "exact-sum-products": "GridMissing GridTies GridTruncated SumBits TermsRounded",
    "exact-sum-ties": "GridMissing GridExponent GridTies SumBits",
    "exact-sum-below-two": "GridMissing GridTruncated SumBits",
    "exact-sum-squares": "GridMissing SumBits TermsRounded",
    "exact-sum-two-pieces": "SumInOnePiece",
    "exact-sum-infinite": "NonFiniteAccepted",
    "exact-sum-length": "LengthAccepted",
    "exact-exp-not-nearest": "LibraryExp",
    "exact-exp-ends": "FlushSubnormal",
    "exact-log-not-nearest": "LibraryLog",
    "exact-log-ends": "FlushSubnormal",
    "exact-swiglu-drawn": "SwigluQuotient",
    "exact-swiglu-extreme": "FlushSubnormal SwigluQuotient",
    "exact-swiglu-backward-drawn": "SwigluQuotient",
    "exact-swiglu-length": "LengthAccepted",
    "exact-softmax-drawn": "SoftmaxOverflow SoftmaxReciprocal",
    "exact-softmax-masked": "SoftmaxReciprocal",
    "exact-softmax-far": "FlushSubnormal SoftmaxOverflow",
    "exact-softmax-refused-masked": "NonFiniteAccepted",
    "exact-rms-norm-drawn": "RmsInFloat32 EpsilonOutside",
    "exact-rms-norm-large": "TermsRounded RmsInFloat32",
    "exact-rms-norm-small": "RmsInFloat32 EpsilonOutside",
    "exact-rms-norm-refused-eps-two": "LengthAccepted",
    "exact-rms-norm-backward-drawn": "TermsRounded",
    "exact-cross-entropy-drawn": "SoftmaxOverflow SoftmaxGradientScaled",
    "exact-cross-entropy-ignored": "IgnoredCounted SoftmaxGradientScaled",
    "exact-cross-entropy-sure": "SoftmaxOverflow",
    "exact-cross-entropy-refused-length": "LengthAccepted",
    "exact-cross-entropy-refused-infinity": "NonFiniteAccepted",
    "exact-rotate-forward": "RotationPairs",
    "exact-rotate-inverse": "RotationPairs RotationForward",
}
"""The bugs that a vector is there to catch, by its id."""


def vectors() -> Iterator[Vector]:
    """Yield the vectors of products, sums, functions, and what is made of them."""
    yield from _products()
    yield from _refused_products()
    yield from _sums()
    yield from _functions()
    yield from _swiglu()
    yield from _softmax()
    yield from _rms_norm()
    yield from _cross_entropy()
    yield from _rotate()


def _vector(
    operation: str, slug: str, clauses: str, comment: str, fields: dict[str, Any], **more: Any
) -> Vector:
    return make(operation, slug, clauses, comment, fields, flags=FLAGS.get(slug, ""), **more)


def _floats(*values: float) -> Float32:
    return np.array(values, np.float32)


def _spread(slug: str, *shape: int) -> Float32:
    """Numbers of either sign whose exponents differ by up to 20."""
    exponents = np.floor(numbers(f"{slug}.exponent", *shape) * np.float32(10))
    spread: Float32 = np.ldexp(numbers(slug, *shape), exponents.astype(np.int64)).astype(np.float32)
    return spread


def _product(slug: str, comment: str, a: Float32, b: Float32, steps: bool = True) -> Vector:
    fields = {"a": a, "b": b, "shape": [*a.shape, b.shape[1]]}
    gridded = {
        "rows": grid.rows(a).values.astype(np.float32),
        "columns": grid.columns(b).values.astype(np.float32),
    }
    return _vector(
        "exact_product",
        f"exact-product-{slug}",
        "14.2 14.3",
        comment,
        fields,
        steps=gridded if steps else None,
    )


def _products() -> Iterator[Vector]:
    def drawn(slug: str, m: int, k: int, n: int) -> tuple[Float32, Float32]:
        return _spread(f"product-{slug}.a", m, k), _spread(f"product-{slug}.b", k, n)

    yield _product("small", "Rows and columns of a spread.", *drawn("small", 3, 5, 2))
    yield _product("k-32", "The last K with 24 bits.", *drawn("k-32", 2, 32, 2))
    yield _product("k-33", "The first K with 23 bits.", *drawn("k-33", 2, 33, 2))
    yield _product("k-200", "22 bits.", *drawn("k-200", 1, 200, 2))
    ties = from_bits(0x3F800000, 0x33800000, 0x34400000, 0xB3800000, 0xB4400000, 0x33800001, 0x337FFFFF)
    yield _product(
        "ties",
        "Ties of the grid of 1, up and down, and one ulp beside them; the 1 moves from row to row.",
        np.stack([np.roll(ties, k) for k in range(7)]),
        _floats(0, 1, -1, 1, 0, 0, 1)[:, None],
    )
    yield _product(
        "powers-of-two",
        "Largest magnitudes at a power of two, one ulp below it, and above.",
        from_bits(*(0x3F800000, 0x33C00000), *(0x3F7FFFFF, 0x33400000), *(0x3F800001, 0x33C00000)).reshape(
            3, 2
        ),
        _floats(0, 1)[:, None],
    )
    yield _product(
        "scales",
        "Rows and columns of scales of their own.",
        numbers("product-scales.a", 3, 4) * _floats(1, 2.0**-60, 2.0**40)[:, None],
        numbers("product-scales.b", 4, 3) * _floats(2.0**-30, 2.0**20, 1),
    )
    yield _product(
        "zeros",
        "Rows and columns of zeros of either sign, and a sum that cancels: +0 all.",
        _floats(0, -0.0, 1, 1, -0.0, -0.0).reshape(3, 2),
        _floats(-1, -0.0, 1, 0).reshape(2, 2),
    )
    yield _product(
        "subnormal",
        "Subnormal operands times large ones, and a subnormal result.",
        _floats(TINY, 3 * TINY, 2.0**-130, -(2.0**-127)).reshape(2, 2),
        _floats(2.0**100, 1, -(2.0**127), 0.75).reshape(2, 2),
    )
    yield _product(
        "underflow",
        "Products that round to the smallest subnormal or to zero, which is +0 where it was negative.",
        _floats(2.0**-75, -(2.0**-75), 1.5 * 2.0**-75)[:, None],
        _floats(2.0**-75, 1.25 * 2.0**-75, -(2.0**-75))[None],
    )
    yield _product(
        "overflow",
        "The largest numbers: sums past the largest are infinite, those that come back are not.",
        _floats(LARGEST, LARGEST, LARGEST, -LARGEST, -LARGEST, -LARGEST).reshape(3, 2),
        _floats(1, 0.5, 1, 0.5).reshape(2, 2),
    )
    yield _product(
        "last-finite",
        "A sum at the last number that rounds to a finite one, and the first that does not.",
        _floats(LARGEST, 2.0**102, LARGEST, 2.0**103).reshape(2, 2),
        _floats(1, 1)[:, None],
    )
    a, b = np.zeros((1, 4098), np.float32), np.zeros((4098, 2), np.float32)
    a[0, [0, 512, 513, 1024, 4096, 4097]] = _floats(-(2.0**-20), 1, -1, 2.0**-10, 1, 2.0**-21)
    b[[0, 4096, 4097], 0] = _floats(2.0**-23, 1 + 2.0**-23, 2.0**-3)
    b[[512, 513, 1024], 1] = _floats(1, 1, 2.0**-30)
    yield _product(
        "nine-pieces",
        "4098 terms: the first piece's sum is lost on the grid of the last's, a tie; in the other column the "
        "third has only what is small beside the second.",
        a,
        b,
        steps=False,
    )
    yield _product("k-1", "K is 1: one product, rounded once.", *drawn("k-1", 3, 1, 3))
    empty = np.zeros((0, 2), np.float32)
    yield _product("k-0", "K is 0: zeros.", empty.T, empty)
    yield _product("m-0", "M is 0: nothing.", empty, numbers("m-0", 2, 3))


def _refused_products() -> Iterator[Vector]:
    one = _floats(1, 2)
    for slug, a, b, shape, why in (
        ("nan", _floats(1, np.nan), one, [1, 2, 1], "a has a NaN."),
        ("infinity", one, _floats(np.inf, 1), [1, 2, 1], "b has an infinity."),
        ("length", one, one, [1, 3, 1], "a and b have not the shapes [1, 3] and [3, 1]."),
        ("dimensions", one, one, [2, 1], "The shape has no N."),
    ):
        fields = {"a": a, "b": b, "shape": shape}
        yield _vector("exact_product", f"exact-product-{slug}", "14.1", "Not a product.", fields, refused=why)


def _sums() -> Iterator[Vector]:
    def sum_of(slug: str, comment: str, x: Float32, y: Float32 | None = None, **more: Any) -> Vector:
        fields = {"x": x} if y is None else {"x": x, "y": y}
        return _vector("exact_sum", f"exact-sum-{slug}", "14.4", comment, fields, **more)

    yield sum_of("spread", "Terms of a spread.", _spread("sum-spread", 30))
    yield sum_of(
        "products", "Products, exact before they meet the grid.", *(_spread(f"sum-{k}", 30) for k in "xy")
    )
    bits = [1.0, 2.0**-41, 2.0**-40, 1.5 * 2.0**-40, 2.5 * 2.0**-40, -(1.5 * 2.0**-40)]
    yield sum_of("ties", "Ties of the grid of 1.", _floats(*bits, 2.0**-42, -(2.0**-41)))
    yield sum_of(
        "below-two", "The largest is one ulp below a power of two.", from_bits(0x3F7FFFFF, 0x2A800001)
    )
    yield sum_of("one", "One term is not rounded at all.", _floats(-1 / 3))
    yield sum_of("zeros", "Zeros of either sign sum to +0.", _floats(-0.0, 0, -0.0))
    yield sum_of("cancels", "A sum that cancels is +0.", _floats(-3, 1, 2))
    yield sum_of("none", "No terms.", _floats())
    yield sum_of("subnormal", "Subnormal terms.", _floats(TINY, 5 * TINY, -(2.0**-127)))
    yield sum_of("squares", "Squares beyond the range of float32.", *[_floats(1e30, -1e-30, 3e38, TINY)] * 2)
    # A term of a piece of its own keeps its bits; on the grid of the largest of all it would not.
    x = np.zeros(4098, np.float32)
    x[:3], x[4096:] = _floats(2.0**30, 1, -(2.0**30)), from_bits(0x39800001, 0x39000003)
    yield sum_of("two-pieces", "4098 terms: two pieces, the second with a finer grid.", x)
    for slug, x, y, why in (
        ("nan", _floats(1, np.nan), None, "x has a NaN."),
        ("infinite", _floats(-np.inf), None, "x has an infinity."),
        ("times-infinity", _floats(0, 1), _floats(np.inf, 1), "y has an infinity."),
        ("length", _floats(1, 2), _floats(1), "x and y differ in length."),
    ):
        fields = {"x": x} if y is None else {"x": x, "y": y}
        yield _vector("exact_sum", f"exact-sum-{slug}", "14.1 14.4", "Not a sum.", fields, refused=why)


# Where exp and log are not the nearest float32, by tests/exact/exhaustive.py, and where they are worst.
NOT_NEAREST_EXP = (
    *(0x4097281F, 0xBFC1CEE1, 0x3D41B8BA, 0x425074C0, 0x3E72B54D, 0x3F1C0421, 0x40B5F032, 0x416F5E9C),
    *(0xC0DFB0EE, 0xC0C39F68, 0xC115BB7A, 0xC1CE1509, 0xBDF0C85B, 0xBE315D83),
)
NOT_NEAREST_LOG = (0x3F66F71F, 0x3F40F3AB, 0x3F89E164, 0x3F1C0880, 0x3F1B9C60, 0x401B92EC, 0x3F5517DD)
EXP_ENDS = (
    *(0x42B17217, 0x42B17218, 0x42B20000, 0x42B20001, 0x7F7FFFFF),
    *(0xC2AEAC4F, 0xC2AEAC50, 0xC2CFF1B4, 0xC2CFF1B5, 0xC2D00000, 0xC2D00001, 0xFF7FFFFF),
)


def _functions() -> Iterator[Vector]:
    def function(name: str, slug: str, comment: str, x: Float32) -> Vector:
        clause = {"exp": "14.5", "log": "14.6"}[name]
        return _vector(f"exact_{name}", f"exact-{name}-{slug}", clause, comment, {"x": x})

    yield function("exp", "drawn", "Numbers from -20 to 20.", numbers("exp-drawn", 24, scale=20))
    yield function(
        "exp",
        "near-zero",
        "Numbers near 0, and zeros.",
        np.append(_spread("exp-zero", 12) / 999, _floats(0, -0.0)),
    )
    yield function(
        "exp", "not-nearest", "Results that are not the nearest float32.", from_bits(*NOT_NEAREST_EXP)
    )
    yield function(
        "exp", "ends", "Where results become subnormal, zero and infinite, and beyond.", from_bits(*EXP_ENDS)
    )
    yield function("exp", "special", "Infinities and a NaN.", _floats(np.inf, -np.inf, np.nan))
    yield function("exp", "none", "Nothing.", _floats())
    yield function("log", "drawn", "Numbers of any size.", np.abs(_spread("log-drawn", 20) ** 3))
    near = np.arange(0x3F7FFFFA, 0x3F800006, dtype=np.uint32).view(np.float32)
    yield function("log", "near-one", "1 and its neighbours.", near)
    yield function(
        "log", "not-nearest", "Results that are not the nearest float32.", from_bits(*NOT_NEAREST_LOG)
    )
    ends = (1, 2, 0x007FFFFF, 0x00800000, 0x3F3504F3, 0x3F3504F4, 0x3FB504F3, 0x3FB504F4, 0x7F7FFFFF)
    yield function(
        "log", "ends", "Subnormals, both sides of sqrt(1/2) and sqrt(2), the largest.", from_bits(*ends)
    )
    yield function(
        "log",
        "special",
        "Zeros, infinities, a NaN, and less than 0.",
        _floats(0, -0.0, np.inf, -np.inf, np.nan, -1, -TINY),
    )


def _swiglu() -> Iterator[Vector]:
    extreme = _floats(0, -0.0, 88, -88, 89, -89, 104, -104, 1e30, -1e30, TINY, 1)
    for slug, comment, gate, up in (
        ("drawn", "Numbers from -8 to 8.", numbers("swiglu.gate", 20, scale=8), numbers("swiglu.up", 20)),
        (
            "extreme",
            "Gates whose exponential is zero, subnormal or infinite.",
            extreme,
            _floats(*[-1.5] * 12),
        ),
    ):
        for name, more in (("", {}), ("-backward", {"dout": numbers("swiglu.dout", gate.size)})):
            fields = {"gate": gate, "up": up, **more}
            operation = f"exact_swiglu{name.replace('-', '_')}"
            yield _vector(operation, f"exact-swiglu{name}-{slug}", "14.7", comment, fields)
    fields = {"gate": _floats(1, 2), "up": _floats(1)}
    why = "gate and up differ in length."
    yield _vector("exact_swiglu", "exact-swiglu-length", "14.1", "Not a product.", fields, refused=why)


def _softmax() -> Iterator[Vector]:
    def softmax(slug: str, comment: str, z: Float32, columns: int, **more: Any) -> Vector:
        fields = {"z": z, "columns": columns}
        return _vector("exact_softmax", f"exact-softmax-{slug}", "14.8", comment, fields, **more)

    yield softmax("drawn", "Three rows.", numbers("softmax", 3, 9, scale=6), 9)
    masked = np.where(np.tri(4) > 0, numbers("softmax-masked", 4, 4, scale=3), -np.inf).astype(np.float32)
    yield softmax("masked", "Masked scores have the probability 0.", masked, 4)
    yield softmax("one", "One column: 1, whatever the score.", _floats(-1e30, 0, 3e38), 1)
    yield softmax(
        "far",
        "Scores beyond the range of exp, and a difference that overflows.",
        _floats(1000, 999, 900, 3e38, -3e38, 0),
        3,
    )
    yield softmax(
        "refused-masked",
        "A row that is masked throughout.",
        _floats(1, -np.inf, -np.inf, -np.inf),
        2,
        refused="The second row has no finite score.",
    )
    yield softmax("refused-nan", "A NaN.", _floats(1, np.nan), 2, refused="The greatest is a NaN.")
    yield softmax(
        "refused-columns", "No rows of 4.", _floats(1, 2, 3), 4, refused="3 scores are no rows of 4."
    )
    p = np.full((2, 4), 0.25, np.float32)
    for slug, comment, own, columns in (
        ("drawn", "Two rows.", np.abs(numbers("softmax-p", 2, 7)), 7),
        ("uniform", "Probabilities that are equal.", p, 4),
    ):
        fields = {"dout": numbers(f"softmax-{slug}.dout", own.size), "p": own, "columns": columns}
        yield _vector("exact_softmax_backward", f"exact-softmax-backward-{slug}", "14.8", comment, fields)


def _rms_norm() -> Iterator[Vector]:
    def norm(slug: str, comment: str, x: Float32, weight: Float32, eps: float = 1e-5, **more: Any) -> Vector:
        fields = {"x": x, "weight": weight, "eps": np.array([eps])}
        return _vector("exact_rms_norm", f"exact-rms-norm-{slug}", "14.9", comment, fields, **more)

    weight = numbers("rms-norm.weight", 7) + _floats(1)
    yield norm("drawn", "Four rows.", numbers("rms-norm.x", 4, 7), weight)
    yield norm(
        "large", "Squares beyond the range of float32.", numbers("rms-norm.large", 2, 7, scale=1e30), weight
    )
    yield norm(
        "small",
        "Squares far below eps, and a row of zeros.",
        np.append(numbers("rms-norm.small", 7, scale=1e-6), np.zeros(7, np.float32)),
        weight,
    )
    for slug, eps in (("zero", 0.0), ("negative", -1.0), ("nan", np.nan), ("infinite", np.inf)):
        yield norm(
            f"refused-eps-{slug}", "Not an eps.", _floats(1), _floats(1), eps, refused=f"eps is {eps}."
        )
    for count, given, why in (
        ("two", np.array([1e-5, 1e-6]), "There are two."),
        ("none", np.array([]), "There is none."),
    ):
        fields = {"x": _floats(1), "weight": _floats(1), "eps": given}
        slug = f"exact-rms-norm-refused-eps-{count}"
        yield _vector("exact_rms_norm", slug, "14.1 14.9", "eps is one number.", fields, refused=why)
    yield norm(
        "refused-infinity", "An infinity.", _floats(1, np.inf), _floats(1, 1), refused="x has an infinity."
    )
    x = numbers("rms-norm-backward.x", 3, 7)
    fields = {
        "dout": numbers("rms-norm-backward.dout", 3, 7),
        "x": x,
        "weight": weight,
        "rstd": np.abs(numbers("rms-norm-backward.rstd", 3)) + _floats(1),
    }
    yield _vector("exact_rms_norm_backward", "exact-rms-norm-backward-drawn", "14.9", "Three rows.", fields)


def _cross_entropy() -> Iterator[Vector]:
    def loss(
        slug: str, comment: str, logits: Float32, vocabulary: int, targets: list[int], **more: Any
    ) -> Vector:
        fields = {"logits": logits, "vocabulary": vocabulary, "targets": targets}
        return _vector("exact_cross_entropy", f"exact-cross-entropy-{slug}", "14.10", comment, fields, **more)

    logits = numbers("cross-entropy", 5, 6, scale=5)
    yield loss("drawn", "Five rows.", logits, 6, [0, 5, 2, 2, 1])
    ignored = logits.copy()
    ignored[1] = np.nan
    yield loss("ignored", "Rows without a target, one of them of NaNs.", ignored, 6, [3, -100, -100, 0, 4])
    yield loss(
        "sure",
        "Targets that are all but certain, and all but impossible.",
        _floats(100, 0, 0, 0, 100, 90),
        3,
        [0, 0],
    )
    yield loss("one-word", "A vocabulary of 1: no loss.", _floats(3, -4), 1, [0, 0])
    for slug, targets, why in (
        ("no-target", [-100, -100], "There is no target."),
        ("target-6", [6, 0], "Target 6 is not in the vocabulary."),
        ("target-negative", [0, -1], "Target -1 is not in the vocabulary."),
        ("length", [0], "Two rows have one target."),
    ):
        yield loss(f"refused-{slug}", "Not a loss.", logits[:2], 6, targets, refused=why)
    broken = logits[:1].copy()
    broken[0, 2] = np.inf
    yield loss(
        "refused-infinity", "An infinite logit.", broken, 6, [0], refused="The greatest logit is infinite."
    )


def _rotate() -> Iterator[Vector]:
    angle = numbers("rotate.angle", 3, 2, scale=3)
    for slug, inverse in (("forward", False), ("inverse", True)):
        fields = {
            "x": numbers("rotate.x", 3, 2, 4),
            "cos": (_floats(1) - angle * angle / _floats(9)).astype(np.float32),
            "sin": (angle / _floats(3)).astype(np.float32),
            "head_dim": 4,
            "inverse": inverse,
        }
        yield _vector("exact_rotate", f"exact-rotate-{slug}", "14.11", "Two heads of three rows.", fields)
    for slug, head_dim, why in (("odd", 3, "head_dim is odd."), ("heads", 6, "x has no heads of 6.")):
        fields = {
            "x": numbers("x", 4),
            "cos": numbers("c", 3),
            "sin": numbers("s", 3),
            "head_dim": head_dim,
            "inverse": False,
        }
        yield _vector(
            "exact_rotate", f"exact-rotate-refused-{slug}", "14.1", "Not a rotation.", fields, refused=why
        )
