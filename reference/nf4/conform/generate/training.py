"""The vectors of chapter 10: AdamW, and what leads up to an update.

What has a tolerance is worked out by generate.exact, not by the reference.
"""

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nf4.conform.generate import exact, make
from nf4.conform.generate.exact import numbers
from nf4.conform.vectors import Vector
from nf4.random import stream_of, uniform

Array = NDArray[Any]

WIDE_SEED = 0xFEDCBA9876543210


def vectors() -> Iterator[Vector]:
    """Yield the vectors of AdamW and of the step around it."""
    yield from _adamw()
    yield from _learning_rates()
    yield from _clip()
    yield from _example_order()
    yield from _held_out()
    yield from _loss()
    yield from _init_matrix()


def _running_product(beta: float, t: int) -> float:
    product = 1.0
    for _ in range(t):
        product *= beta
    return product


def _adamw_steps(fields: dict[str, Any]) -> dict[str, Array]:
    """The scalars of NF4-10.3 and d and u of NF4-10.4, operation by operation."""
    lr, beta1, beta2, eps, decay = (
        float(fields[name][0]) for name in ("lr", "beta1", "beta2", "eps", "weight_decay")
    )
    t = fields["updates"] + 1
    step = np.float32(lr / (1.0 - _running_product(beta1, t)))
    root = np.float32(math.sqrt(1.0 - _running_product(beta2, t)))
    keep = np.float32(1.0 - lr * decay) if len(fields["shape"]) >= 2 else np.float32(1.0)
    g, m, v = fields["g"], fields["m"], fields["v"]
    with np.errstate(over="ignore", under="ignore"):
        m = m + np.float32(1.0 - beta1) * (g - m)
        v = np.float32(beta2) * v + np.float32(1.0 - beta2) * (g * g)
        d = np.sqrt(v) / root + np.float32(eps)
        u = step * (m / d)
    return {"scalars": np.array([step, root, keep]), "d": d, "u": u}


def _adamw() -> Iterator[Vector]:
    first = "BiasCorrection UpdateOrder EpsilonInside ScalarsInFloat32"
    every = f"{first} MomentForm FmaContraction"

    def update(slug: str, clauses: str, comment: str, flags: str, **change: Any) -> Vector:
        shape = change.pop("shape", [4, 8])
        n, dtype = abs(math.prod(shape)), change.pop("dtype", "float32")
        t, lr = change.get("updates", 0), change.get("lr", 1e-3)
        arrays = {
            # No larger than what an update moves, so that the last bit of u shows in p.
            "p": numbers(f"adamw-{slug}.p", n, scale=2 * lr if lr > 0 else 0.5, dtype=dtype),
            "g": numbers(f"adamw-{slug}.g", n, scale=0.02),
            "m": numbers(f"adamw-{slug}.m", n, scale=0.01 if t else 0.0) + np.float32(0),
            "v": np.abs(numbers(f"adamw-{slug}.v", n, scale=1e-4 if t else 0.0)),
        }
        constants = {"lr": lr, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
        refused = change.pop("refused", None)
        fields: dict[str, Any] = {"dtype": dtype, "shape": shape, "updates": 0} | arrays | constants | change
        fields |= {name: np.array([float(fields[name])]) for name in constants}
        steps = None if refused else _adamw_steps(fields)
        return make(
            "adamw", f"adamw-{slug}", clauses, comment, fields, flags=flags, steps=steps, refused=refused
        )

    decayed = f"{every} CoupledDecay DecayOrder"
    yield update("first", "10.1 10.3 10.4", "The first update: m and v are 0.", first)
    yield update(
        "first-decay",
        "10.2 10.3 10.4",
        "The first update of a matrix, with decay.",
        f"{first} FmaContraction CoupledDecay DecayOrder",
        weight_decay=0.1,
    )
    yield update(
        "later-decay",
        "10.2 10.3 10.4",
        "Update 12 of a matrix, with decay.",
        decayed,
        weight_decay=0.1,
        updates=11,
    )
    yield update(
        "vector",
        "10.2",
        "An array of one dimension does not decay.",
        "DecayOfVectors",
        weight_decay=0.5,
        updates=3,
        shape=[8],
    )
    yield update(
        "scalar",
        "10.2",
        "Nor does one without dimensions.",
        "DecayOfVectors",
        weight_decay=0.5,
        updates=3,
        shape=[],
    )
    yield update(
        "cube",
        "10.2",
        "An array of three dimensions decays.",
        "CoupledDecay",
        weight_decay=0.5,
        updates=3,
        shape=[2, 2, 2],
    )
    yield update("late", "10.3 10.4 1.6", "Update 1001.", every, updates=1000)
    yield update(
        "running-product",
        "10.3",
        "After 1000 updates the running product of beta1 is not the power, and this lr shows it.",
        "PowerFunction",
        updates=999,
        beta1=0.999,
        lr=_telling_rate(0.999, 1000),
        shape=[8],
    )
    yield update(
        "constants", "10.2 10.3", "Other constants.", every, beta1=0.5, beta2=0.9, eps=1e-3, lr=0.1, updates=2
    )
    yield update(
        "betas-zero",
        "10.2 10.3",
        "Betas of 0 keep nothing of m and v.",
        "MomentForm",
        beta1=0.0,
        beta2=0.0,
        updates=2,
        shape=[8],
    )
    yield update(
        "rate-zero",
        "10.2 10.4",
        "lr = 0, as in the first step of a warm-up: p stays, m and v do not.",
        "CoupledDecay",
        lr=0.0,
        weight_decay=0.1,
    )
    yield update(
        "bfloat16",
        "10.1 10.5",
        "A parameter in bfloat16, its states in binary32.",
        "BfloatRoundedTwice StatesRounded TruncatedConversion",
        dtype="bfloat16",
        weight_decay=0.1,
        updates=5,
        lr=0.05,
        shape=[8, 8],
    )
    yield update(
        "bfloat16-stuck",
        "10.5",
        "Updates below half an ulp of a bfloat16 are lost: there is no second copy.",
        "",
        dtype="bfloat16",
        p=numbers("adamw-bfloat16-stuck", 8, dtype="bfloat16"),
        lr=1e-5,
        updates=5,
        shape=[8],
    )
    tiny = np.array([0x00000001, 0x80000001, 0x1E3CE508, 0x1A000000, 0x007FFFFF, 0x20000000], np.uint32).view(
        np.float32
    )
    subnormal = np.array([1, 5, 0x007FFFFF, 0x00800000, 0x00000100, 0x00012345], np.uint32).view(np.float32)
    yield update(
        "tiny",
        "10.4",
        "Squares that are subnormal or 0, v subnormal.",
        "FlushSubnormal",
        g=tiny,
        m=-tiny,
        v=subnormal,
        updates=4,
        shape=[6],
    )
    yield update(
        "tiny-constant",
        "10.3 10.4",
        "With an eps of 1e-20, the smallest gradients move p.",
        "FlushSubnormal EpsilonInside",
        g=tiny,
        v=subnormal,
        eps=1e-20,
        shape=[6],
    )
    zeros = np.array([0.0, -0.0, 0.0, -0.0], np.float32)
    yield update(
        "zero",
        "10.4",
        "A gradient of 0, of either sign, and parameters of 0.",
        "",
        g=zeros,
        m=zeros,
        v=np.zeros(4, np.float32),
        p=np.array([0.0, 0.0, -0.0, -0.0], np.float32),
        shape=[2, 2],
    )
    huge = np.array([1e19, -2e19, 3e38, -1e30], np.float32)
    yield update(
        "huge",
        "10.4",
        "Squares near and beyond the largest binary32: v becomes infinite, and p stays.",
        "",
        g=huge,
        shape=[4],
    )
    refusals: dict[str, dict[str, Any]] = {
        "float16": {"dtype": "float16"},
        "beta1": {"beta1": 1.0},
        "beta2": {"beta2": -0.1},
        "eps": {"eps": -1e-8},
        "decay": {"weight_decay": math.inf},
        "rate": {"lr": math.nan},
    }
    for slug, change in refusals.items():
        why = ", ".join(f"{name} is {value}" for name, value in change.items())
        yield update(
            f"refused-{slug}", "10.1 10.2", "Out of its range.", "", shape=[2], refused=f"{why}.", **change
        )
    negative: dict[str, tuple[str, dict[str, Any]]] = {
        "updates": ("The number of updates is negative.", {"updates": -1}),
        "shape": ("A size is negative.", {"shape": [4, -8]}),
        "sizes": ("Both sizes are negative.", {"shape": [-4, -8]}),
    }
    for slug, (why, change) in negative.items():
        flags = "NegativeAccepted"
        yield update(f"refused-{slug}", "1.4 10.1", "No count is negative.", flags, refused=why, **change)


def _telling_rate(beta: float, t: int) -> float:
    """An lr whose step is rounded another way when beta^t is the power rather than the running product."""
    product, power = _running_product(beta, t), float(Fraction(beta) ** t)
    at = np.float32(1e-3)
    for _ in range(100):
        above = np.nextafter(at, np.float32(1))
        lr = (float(at) + float(above)) / 2 * (1.0 - product)
        for candidate in (lr, math.nextafter(lr, 0), math.nextafter(lr, 1)):
            if np.float32(candidate / (1.0 - product)) != np.float32(candidate / (1.0 - power)):
                return candidate
        at = above
    raise AssertionError("no such lr")


def _learning_rates() -> Iterator[Vector]:
    def rate(
        slug: str, schedule: str, step: int, steps: int, warmup: int, comment: str, flags: str
    ) -> Vector:
        lr = 2e-4
        span = max(1, steps - warmup)
        if step < warmup:
            f = Fraction(step, warmup)
        elif schedule == "linear":
            f = max(Fraction(0), Fraction(steps - step, span))
        else:
            f = exact.half_cosine(step - warmup, span) if schedule == "cosine" else Fraction(1)
        wanted = float(Fraction(lr) * f)
        # The clause bounds the error by lr; a vector's bound is relative to what it wants.
        wider = {"lr": 1e-15 * lr / wanted} if 0 < wanted < lr else None
        fields = {"step": step, "steps": steps, "warmup": warmup, "schedule": schedule, "lr": np.array([lr])}
        return make(
            "learning_rate",
            f"rate-{slug}",
            "10.6",
            comment,
            fields,
            flags=flags,
            output={"lr": np.array([wanted])},
            tolerance=wider,
        )

    for schedule in ("constant", "linear", "cosine"):
        span = "" if schedule == "constant" else "ScheduleSpan"
        zero = "ScheduleZeroSpan" if schedule == "cosine" else ""
        for slug, step, steps, warmup, comment, flags in (
            ("first", 0, 100, 0, "The first step without a warm-up.", ""),
            ("warm-0", 0, 100, 10, "The first step of a warm-up has the rate 0.", "WarmupOffByOne"),
            ("warm-9", 9, 100, 10, "The last step of a warm-up.", "WarmupOffByOne"),
            ("full", 10, 100, 10, "The first step after the warm-up.", span),
            ("middle", 40, 100, 10, "In the middle.", span),
            ("last", 99, 100, 10, "The last step.", span),
            ("only-warm", 2, 3, 5, "A warm-up longer than the run.", "WarmupOffByOne"),
            ("all-warm", 5, 5, 5, "The step after a warm-up as long as the run.", zero),
        ):
            yield rate(f"{schedule}-{slug}", schedule, step, steps, warmup, comment, flags)
    yield rate("linear-past", "linear", 120, 100, 10, "Past the end the rate stays 0.", "ScheduleFloor")
    yield rate("cosine-end", "cosine", 100, 100, 0, "At the end the rate is 0.", "")
    yield rate("cosine-tail", "cosine", 9999, 10000, 100, "Near the end of a long run.", "ScheduleSpan")
    yield make(
        "learning_rate",
        "rate-unknown",
        "10.6",
        "Schedules of other names are refused.",
        {"step": 0, "steps": 10, "warmup": 0, "schedule": "polynomial", "lr": np.array([1e-3])},
        refused="There is no schedule polynomial.",
    )
    for slug, at in (("step", (-1, 10, 0)), ("warmup", (0, 10, -2))):
        step, steps, warmup = at
        yield make(
            "learning_rate",
            f"rate-negative-{slug}",
            "1.4 10.6",
            "No count is negative.",
            {"step": step, "steps": steps, "warmup": warmup, "schedule": "linear", "lr": np.array([1e-3])},
            flags="NegativeAccepted",
            refused=f"The {slug} is negative.",
        )


def _clip() -> Iterator[Vector]:
    a, b = numbers("clip.a", 2, 4), numbers("clip.b", 3, scale=2.0)
    both = {"a": a, "b": b}
    norm = exact.norm([a, b])

    def clip(slug: str, gradients: dict[str, Array], max_norm: float, comment: str, flags: str) -> Vector:
        found = exact.norm(list(gradients.values()))
        c = max_norm / (found + 1e-6)
        clipped = gradients
        if max_norm > 0 and c < 1:
            clipped = {name: g * np.float32(c) for name, g in gradients.items()}
        return make(
            "clip",
            f"clip-{slug}",
            "10.7",
            comment,
            {"gradients": gradients, "max_norm": np.array([max_norm])},
            output={"norm": np.array([found]), "gradients": clipped},
            flags=flags,
        )

    yield clip("above", both, 1.0, "A norm above max_norm.", "ClipPerArray")
    yield clip("below", both, 100.0, "A norm below max_norm changes nothing.", "ClipAlways")
    yield clip("at", both, norm, "A norm of max_norm is clipped, by the 1e-6 in c.", "ClipEpsilon")
    yield clip("within-epsilon", {"a": a * np.float32(1e-6)}, 1e-6, "Norms like 1e-6.", "ClipEpsilon")
    yield clip("zero", both, 0.0, "A max_norm of 0 clips nothing.", "ClipZero")
    yield clip("no-gradient", {"a": np.zeros((2, 2), np.float32)}, 1.0, "A norm of 0.", "")
    yield clip("huge", {"a": a * np.float32(1e30)}, 1.0, "Squares beyond binary32.", "NormInFloat32")
    yield clip("tiny", {"a": a * np.float32(1e-30)}, 1.0, "Squares below binary32.", "NormInFloat32")
    yield clip(
        "names",
        {"b": b, "B": a, "a": a, "é": b},
        0.5,
        "Names of upper and lower case and beyond ASCII.",
        "ClipPerArray",
    )
    for slug, value in (("nan", math.nan), ("infinity", math.inf)):
        broken = a.copy()
        broken[1, 2] = value
        yield make(
            "clip",
            f"clip-{slug}",
            "10.7",
            "A norm that is not finite ends the run.",
            {"gradients": {"a": broken, "b": b}, "max_norm": np.array([1.0])},
            flags="NonFiniteAccepted",
            refused="The norm of the gradients is not finite.",
        )
    yield make(
        "clip",
        "clip-negative",
        "10.7",
        "max_norm is at least 0.",
        {"gradients": both, "max_norm": np.array([-1.0])},
        refused="max_norm is -1.",
    )


def _example_order() -> Iterator[Vector]:
    def order(slug: str, comment: str, flags: str, **fields: Any) -> Vector:
        clauses, refused = fields.pop("clauses", "10.8"), fields.pop("refused", None)
        given = {"seed": np.array([fields.pop("seed", 1)], np.uint64), **fields}
        return make("example_order", f"order-{slug}", clauses, comment, given, flags=flags, refused=refused)

    yield order(
        "epochs",
        "Three epochs of seven examples, each in an order of its own.",
        "EpochIgnored",
        examples=7,
        first=0,
        count=21,
        batch=2,
    )
    yield order(
        "within",
        "From the middle of an epoch on, as a resumed run.",
        "EpochIgnored",
        examples=7,
        first=17,
        count=9,
        batch=2,
    )
    yield order("one", "One example, again and again.", "", examples=1, first=5, count=4, batch=1)
    yield order(
        "late",
        "Sequence 2^31 - 10 of a long run.",
        "EpochIgnored",
        seed=WIDE_SEED,
        examples=1000,
        first=2**31 - 10,
        count=8,
        batch=4,
    )
    lengths = [1 + (7 * i) % 5 for i in range(60)]
    grouped = "LengthAscending UnstableSort"
    yield order(
        "grouped",
        "Grouped by length in runs of 50 entries, with ties.",
        f"{grouped} GroupSpan",
        examples=60,
        first=0,
        count=60,
        batch=1,
        lengths=lengths,
    )
    yield order(
        "grouped-whole",
        "Fewer entries than 50 batches: one run.",
        grouped,
        examples=30,
        first=30,
        count=30,
        batch=2,
        lengths=lengths[:30],
    )
    yield order(
        "grouped-equal",
        "Of equal lengths: the permutation itself.",
        "UnstableSort",
        examples=20,
        first=0,
        count=20,
        batch=1,
        lengths=[9] * 20,
    )
    yield order(
        "refused-first",
        "There is no sequence before the first.",
        "NegativeAccepted",
        examples=7,
        first=-3,
        count=2,
        batch=1,
        clauses="1.4 10.8",
        refused="The number of the first sequence is negative.",
    )


def _held_out() -> Iterator[Vector]:
    for n, comment, flags in (
        (2, "One of two: at least one is held out.", "HeldOutNone"),
        (9, "One of nine.", "HeldOutNone SplitEpoch"),
        (10, "One of ten.", "SplitEpoch"),
        (19, "A tenth is rounded down.", "HeldOutCount SplitEpoch"),
        (105, "Ten of 105.", "HeldOutCount SplitEpoch"),
    ):
        fields = {"seed": np.array([1], np.uint64), "examples": n}
        yield make("held_out", f"held-out-{n}", "10.8", comment, fields, flags=flags)
    yield make(
        "held_out",
        "held-out-1",
        "10.8",
        "One example can't be split.",
        {"seed": np.array([1], np.uint64), "examples": 1},
        refused="There is one example, and at least two are needed.",
    )


def _loss() -> Iterator[Vector]:
    def loss(
        slug: str, comment: str, flags: str, logits: Array, targets: list[int], parts: list[int], **more: Any
    ) -> Vector:
        value, gradient = (0.0, logits) if more else exact.cross_entropy(logits.astype(np.float64), targets)
        return make(
            "loss",
            f"loss-{slug}",
            "10.9",
            comment,
            {"logits": logits, "vocabulary": logits.shape[1], "targets": targets, "parts": parts},
            flags=flags,
            output=None if more else {"loss": np.array([value]), "dlogits": gradient.astype(np.float32)},
            **more,
        )

    logits = numbers("loss.logits", 6, 5, scale=4.0)
    yield loss("whole", "Six tokens in one micro-batch.", "LossIsSum", logits, [0, 4, 2, 1, 3, 0], [6])
    yield loss(
        "parts",
        "Micro-batches of one token and of five: every token weighs the same.",
        "LossPerMicroBatch",
        logits,
        [0, 4, 2, 1, 3, 0],
        [1, 5],
    )
    yield loss(
        "ignored",
        "Rows without a target count nowhere.",
        "IgnoredCounted",
        logits,
        [-100, 4, 2, -100, 3, -100],
        [6],
    )
    yield loss(
        "ignored-parts",
        "Micro-batches of two targets, of one and of none.",
        "LossPerMicroBatch IgnoredCounted",
        logits,
        [-100, 4, 2, 1, -100, -100],
        [3, 2, 1],
    )
    yield loss(
        "large",
        "Logits whose powers overflow.",
        "SoftmaxOverflow",
        logits * np.float32(250),
        [0, 4, 2, 1, 3, 0],
        [3, 3],
    )
    yield loss(
        "certain",
        "A target that is all but certain.",
        "SoftmaxOverflow",
        np.array([[90.0, -90.0, 0.0], [0.0, 0.0, 0.0]], np.float32),
        [0, 2],
        [2],
    )
    yield loss(
        "one-word",
        "A vocabulary of one: the loss is 0.",
        "",
        np.array([[3.0], [-2.0]], np.float32),
        [0, 0],
        [2],
    )
    broken = logits[:2].copy()
    broken[1, 3] = math.nan
    for slug, x, targets in (
        ("nan", broken, [0, 1]),
        ("outside", logits[:2], [0, 5]),
        ("negative", logits[:2], [0, -1]),
        ("no-target", logits[:2], [-100, -100]),
    ):
        flags, why = {
            "nan": ("NonFiniteAccepted", "The loss is NaN."),
            "outside": ("", "A target is not in the vocabulary."),
            "negative": ("", "A target below 0 that is not -100."),
            "no-target": ("IgnoredCounted", "No token is a target: the step has no loss."),
        }[slug]
        yield loss(slug, why, flags, x, targets, [2], refused=why)


def _init_matrix() -> Iterator[Vector]:
    embedding = "model.embed_tokens.weight"
    for slug, seed, name, n, comment in (
        ("one", 0, embedding, 1, "One element, of a pair of uniforms."),
        ("odd", 0, embedding, 7, "An odd number: the last sine is left out."),
        ("even", WIDE_SEED, "lm_head.weight", 32, "The first half are cosines, the second sines."),
    ):
        h = -(-n // 2)
        u = uniform(seed, stream_of(name), 2 * h).tolist()
        pairs = [exact.normal(u[j], u[h + j]) for j in range(h)]
        y = [c for c, _ in pairs] + [s for _, s in pairs]
        yield make(
            "init_matrix",
            f"matrix-{slug}",
            "10.10",
            comment,
            {"seed": np.array([seed], np.uint64), "name": name, "n": n},
            output={"y": np.array(y[:n], np.float32)},
            flags="InterleavedPairs LogOfU" if n > 1 else "LogOfU",
        )
    yield make(
        "init_matrix",
        "matrix-refused-negative",
        "1.4 10.10",
        "No count is negative.",
        {"seed": np.array([0], np.uint64), "name": embedding, "n": -4},
        flags="NegativeAccepted",
        refused="n is negative.",
    )
