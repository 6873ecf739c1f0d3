"""Chapter 15 in integers and fractions, from its text alone: what oracle.py is for the other chapters."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import oracle_exact as exact
from oracle import (
    SCHEDULES,
    SIGN,
    RefusedError,
    Scalars,
    add,
    check_finite,
    drop_threshold,
    multiply,
    rn64,
    root,
    rounded,
    updates,
    value,
)
from oracle_exact import Rows, product
from oracle_reals import cosine_and_sine, ln, nearest, pi, power, real
from oracle_reals import root as real_root

HIDDEN = SIGN | 0x7F800000  # -infinity
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # NF4-9.6
IGNORED = -100
Json = dict[str, Any]


def turned_over(rows: Rows) -> Rows:
    return [list(column) for column in zip(*rows, strict=True)]


def times(factor: int, rows: Rows) -> Rows:
    return [[multiply(factor, x) for x in row] for row in rows]


def plus(a: Rows, b: Rows) -> Rows:
    return [[add(x, y) for x, y in zip(*rows, strict=True)] for rows in zip(a, b, strict=True)]


def cut(rows: Rows, lengths: list[int]) -> list[Rows]:
    """The rows of each sequence."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [rows[start : start + n] for start, n in zip(starts, lengths, strict=True)]


# NF4-15.1


class Adapter(NamedTuple):
    """A and B widened, c, and what D sets to 0 [T][in]."""

    a: Rows
    b: Rows
    c: int
    drops: list[list[bool]]

    def dropped(self, x: Rows) -> Rows:
        return [
            [0 if drop else element for element, drop in zip(row, drops, strict=True)]
            for row, drops in zip(x, self.drops, strict=True)
        ]


class Linear(NamedTuple):
    """W [out][in] and the bias, widened."""

    weight: Rows
    bias: list[int] | None
    adapter: Adapter | None


def factor_of(scale: float, p: float) -> int:
    """c; p is 0 outside training."""
    h = drop_threshold(p)
    return rounded(rn64(Fraction(scale) * rn64(Fraction(65536, 65536 - h))))


def linear(layer: Linear, x: Rows) -> tuple[Rows, Rows]:
    """Y and Z."""
    y, z, lora = product(x, layer.weight), [], layer.adapter
    if layer.bias is not None:
        y = [[add(element, b) for element, b in zip(row, layer.bias, strict=True)] for row in y]
    if lora is not None:
        z = low_rank(lora, x)
        y = plus(y, product(z, lora.b))
    return y, z


def low_rank(lora: Adapter, x: Rows) -> Rows:
    """Z, which is all that backward needs of forward."""
    return times(lora.c, product(lora.dropped(x), lora.a))


class Gradients(NamedTuple):
    """e, and dA and dB of each sequence."""

    e: Rows
    a: list[Rows]
    b: list[Rows]


def adapter_gradients(lora: Adapter, g: Rows, x: Rows, z: Rows, lengths: list[int]) -> Gradients:
    e = times(lora.c, product(g, turned_over(lora.b)))
    kept = lora.dropped(x)

    def each(left: Rows, right: Rows) -> list[Rows]:
        pairs = zip(cut(left, lengths), cut(right, lengths), strict=True)
        # The rows of the left one's transpose, and the columns of the right one.
        return [product(columns(a, len(left[0])), columns(b, len(right[0]))) for a, b in pairs]

    return Gradients(e, each(e, kept), each(g, z))


def columns(rows: Rows, count: int) -> Rows:
    """The columns of a matrix that may have no rows."""
    return [[row[j] for row in rows] for j in range(count)]


def input_gradient(layer: Linear, g: Rows, e: Rows) -> Rows:
    """dX; e is not looked at without an adapter."""
    dx = product(g, turned_over(layer.weight))
    lora = layer.adapter
    return dx if lora is None else plus(dx, lora.dropped(product(e, turned_over(lora.a))))


# NF4-15.2


class Heads(NamedTuple):
    kv: int
    group: int
    dim: int
    window: int | None


def head(rows: Rows, index: int, dim: int) -> Rows:
    return [row[index * dim : index * dim + dim] for row in rows]


def queries_of(rows: Rows, j: int, heads: Heads) -> Rows:
    """The rows of a key-value head's query heads, head after head."""
    own = range(j * heads.group, (j + 1) * heads.group)
    return [row for i in own for row in head(rows, i, heads.dim)]


def scale_of_scores(dim: int) -> int:
    return rounded(rn64(1 / value(root(Fraction(dim), "float64"), "float64")))


def probabilities(q: Rows, k: Rows, heads: Heads) -> Rows:
    n = len(k)
    z = times(scale_of_scores(heads.dim), product(q, k))
    for i, row in enumerate(z):
        for key in range(n):
            behind = i % n - key
            if behind < 0 or (heads.window is not None and behind >= heads.window):
                row[key] = HIDDEN
    return [exact.softmax(row) for row in z]


def beside(parts: list[Rows]) -> Rows:
    """Heads, each [n][d], as rows of heads."""
    return [[x for row in rows for x in row] for rows in zip(*parts, strict=True)]


def attention(q: Rows, k: Rows, v: Rows, lengths: list[int], heads: Heads) -> tuple[Rows, list[int]]:
    """The output, and p of all heads of all sequences."""
    out, seen = [], []
    for sequence in zip(*(cut(rows, lengths) for rows in (q, k, v)), strict=True):
        n, mixed = len(sequence[0]), []
        for j in range(heads.kv):
            p = probabilities(queries_of(sequence[0], j, heads), head(sequence[1], j, heads.dim), heads)
            seen += [x for row in p for x in row]
            rows = product(p, turned_over(head(sequence[2], j, heads.dim)))
            mixed += [rows[i * n : i * n + n] for i in range(heads.group)]
        out += beside(mixed)
    return out, seen


def attention_backward(
    dout: Rows, q: Rows, k: Rows, v: Rows, lengths: list[int], heads: Heads
) -> tuple[Rows, Rows, Rows, list[int]]:
    """dQ, dK, dV, and e of all heads of all sequences."""
    found: tuple[Rows, Rows, Rows, list[int]] = ([], [], [], [])
    for sequence in zip(*(cut(rows, lengths) for rows in (dout, q, k, v)), strict=True):
        n, dq, dk, dv = len(sequence[0]), [], [], []
        for j in range(heads.kv):
            g, own = (queries_of(rows, j, heads) for rows in sequence[:2])
            keys, values = (head(rows, j, heads.dim) for rows in sequence[2:])
            p = probabilities(own, keys, heads)
            dv.append(product(turned_over(p), turned_over(g)))
            f = [exact.softmax_backward(*rows) for rows in zip(product(g, values), p, strict=True)]
            e = times(scale_of_scores(heads.dim), f)
            rows = product(e, turned_over(keys))
            dq += [rows[i * n : i * n + n] for i in range(heads.group)]
            dk.append(product(turned_over(e), turned_over(own)))
            found[3].extend(x for row in e for x in row)
        for total, parts in zip(found[:3], (dq, dk, dv), strict=True):
            total.extend(beside(parts))
    return found


# NF4-15.3


def parameters(config: Json) -> tuple[str, Callable[..., Fraction | None], Json]:
    """The rope type, a reader of positive numbers, and the object they are in."""
    inner = config.get("rope_parameters") or config.get("rope_scaling") or {}
    for part in (inner, config):
        if part.get("partial_rotary_factor") not in (None, 1):
            raise RefusedError("partial_rotary_factor (NF4-15.3)")

    def number(name: str, default: Fraction | float | None = None, source: Json = inner) -> Fraction | None:
        found = source.get(name)
        if found is None:
            return None if default is None else Fraction(default)
        if type(found) not in (int, float) or not 0 < found < math.inf:
            raise RefusedError(f"{name} is {found} (NF4-15.3)")
        return Fraction(float(found))

    return inner.get("rope_type") or inner.get("type") or "default", number, inner


def given(x: Fraction | None) -> Fraction:
    if x is None:
        raise RefusedError("a parameter is missing (NF4-15.3)")
    return x


def limited(x: Fraction) -> Fraction:
    return min(max(x, Fraction(0)), Fraction(1))


def angles(config: Json, d: int, positions: int, n: int) -> tuple[list[Fraction], Fraction]:
    """φ by pair, and m."""
    kind, number, inner = parameters(config)
    theta = given(number("rope_theta", given(number("rope_theta", 10000.0, config))))
    if d < 2 or d % 2 or (kind == "dynamic" and d == 2):
        raise RefusedError(f"a head of {d} (NF4-15.3)")
    m = Fraction(1)
    if kind == "dynamic":
        f = given(number("factor"))
        theta *= power(1 + f * (Fraction(max(n, positions), positions) - 1), Fraction(d, d - 2))
    plain = [power(theta, Fraction(-2 * i, d)) for i in range(d // 2)]
    if kind in ("llama3", "yarn", "longrope"):
        for source in (inner, config):
            whole = source.get("original_max_position_embeddings")
            if whole is not None and (type(whole) is not int or not 0 < whole < 2**31):
                raise RefusedError(f"original_max_position_embeddings is {whole} (NF4-15.3)")
        length = given(
            number("original_max_position_embeddings", None, config)
            or number("original_max_position_embeddings", positions)
        )
    if kind == "linear":
        plain = [angle / given(number("factor")) for angle in plain]
    elif kind == "llama3":
        f, low, high = (given(number(name)) for name in ("factor", "low_freq_factor", "high_freq_factor"))
        if high <= low:
            raise RefusedError("high_freq_factor is not above low_freq_factor (NF4-15.3)")
        shares = [limited((length * angle / (2 * real(pi())) - low) / (high - low)) for angle in plain]
        plain = [angle * (k + (1 - k) / f) for angle, k in zip(plain, shares, strict=True)]
    elif kind == "yarn":
        f = given(number("factor", float(Fraction(positions) / length)))
        plain = ramped(plain, theta, d, length, f, number, inner.get("truncate"))
        m = softening(f, number)
    elif kind == "longrope":
        f = given(number("factor", float(Fraction(positions) / length)))
        lists = [inner.get(name) or [] for name in ("short_factor", "long_factor")]
        if any(len(entries) != d // 2 or not all(0 < x < math.inf for x in entries) for entries in lists):
            raise RefusedError("a list of factors (NF4-15.3)")
        divisors = lists[1] if n > length else lists[0]
        plain = [angle / Fraction(float(x)) for angle, x in zip(plain, divisors, strict=True)]
        stated = number("attention_factor")
        if stated is not None:
            m = stated
        elif f > 1:
            m = real_root(1 + ln(f) / not_zero(ln(length)))
    elif kind not in ("default", "dynamic"):
        raise RefusedError(f"rope type {kind!r} (NF4-15.3)")
    if max(*plain, m) > 2**16:
        raise RefusedError("an angle, or m, is above 2^16 (NF4-15.3)")
    return plain, m


def not_zero(x: Fraction) -> Fraction:
    if not x:
        raise RefusedError("a quotient by 0 (NF4-15.3)")
    return x


def ramped(
    plain: list[Fraction],
    theta: Fraction,
    d: int,
    length: Fraction,
    f: Fraction,
    number: Callable[..., Fraction | None],
    truncate: bool | None,
) -> list[Fraction]:
    """The angles of yarn."""
    if truncate is not None and not isinstance(truncate, bool):
        raise RefusedError(f"truncate is {truncate} (NF4-15.3)")
    a, b = (
        d * ln(length / (2 * real(pi()) * given(number(name, default)))) / not_zero(2 * ln(theta))
        for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0))
    )
    if truncate is not False:
        a, b = Fraction(math.floor(a)), Fraction(math.ceil(b))
    a, b = max(a, Fraction(0)), min(b, Fraction(d - 1))
    if a == b:
        b += Fraction(1, 1000)
    shares = [limited((i - a) / (b - a)) for i in range(d // 2)]
    return [angle * (k / f + 1 - k) for angle, k in zip(plain, shares, strict=True)]


def softening(f: Fraction, number: Callable[..., Fraction | None]) -> Fraction:
    """m of yarn."""

    def big_m(x: Fraction) -> Fraction:
        return x * ln(f) / 10 + 1 if f > 1 else Fraction(1)

    stated = number("attention_factor")
    one, other = number("mscale"), number("mscale_all_dim")
    if stated is not None:
        return stated
    return big_m(Fraction(1)) if one is None or other is None else big_m(one) / big_m(other)


def table(config: Json, d: int, positions: int, n: int) -> tuple[Rows, Rows]:
    """Cosines and sines [n][d / 2]."""
    plain, m = angles(config, d, positions, n)
    cos, sin = [], []
    for t in range(n):
        if t == 0:  # an exact 1, and m may be midway between two float32
            cos.append([rounded(m)] * len(plain))
            sin.append([0] * len(plain))
            continue
        both = [cosine_and_sine(t * angle) for angle in plain]
        cos.append([nearest(m * c, rounded) for c, _ in both])
        sin.append([nearest(m * s, rounded) for _, s in both])
    return cos, sin


# NF4-15.4, NF4-15.5


class Layer(NamedTuple):
    linears: dict[str, Linear]
    norms: dict[str, list[int]]  # input_layernorm, post_attention_layernorm, and q_norm and k_norm if there
    heads: Heads


class Model(NamedTuple):
    embedding: Rows
    layers: list[Layer]
    norm: list[int]
    head: Rows
    eps: float


def normed(x: Rows, weight: list[int], eps: float) -> tuple[Rows, list[int]]:
    both = [exact.rms_norm(row, weight, eps) for row in x]
    return [y for y, _ in both], [r for _, r in both]


def norm_back(d: Rows, x: Rows, weight: list[int], rstd: list[int]) -> Rows:
    return [exact.rms_norm_backward(a, b, weight, r) for a, b, r in zip(d, x, rstd, strict=True)]


def split_heads(x: Rows, dim: int) -> Rows:
    return [row[i : i + dim] for row in x for i in range(0, len(row), dim)]


def joined_heads(heads: Rows, rows: int) -> Rows:
    each = len(heads) // rows
    return [[x for one in heads[i * each : (i + 1) * each] for x in one] for i in range(rows)]


def rotated(x: Rows, cos: Rows, sin: Rows, inverse: bool) -> Rows:
    dim = 2 * len(cos[0])
    each = len(x[0]) // dim
    turned = [
        exact.rotate(one, cos[i // each], sin[i // each], inverse)
        for i, one in enumerate(split_heads(x, dim))
    ]
    return joined_heads(turned, len(x))


class Step:
    """One step's losses, gradients by sequence and values by name."""

    def __init__(self, model: Model, cos: Rows, sin: Rows, lengths: list[int]) -> None:
        self.model, self.cos, self.sin, self.lengths = model, cos, sin, lengths
        self.values: dict[str, Rows] = {"cos": cos, "sin": sin}
        self.kept: list[Json] = []
        self.found: dict[tuple[int, str], Gradients] = {}
        adapted = [i for i, layer in enumerate(model.layers) if self.adapted(layer, *TARGETS)]
        if not adapted:
            raise RefusedError("there is no adapter")
        self.bottom = min(adapted)

    def adapted(self, layer: Layer, *targets: str) -> bool:
        return any(layer.linears[target].adapter is not None for target in targets)

    def show(self, index: int, **values: Rows) -> None:
        self.values |= {f"{index}.{name}": rows for name, rows in values.items()}

    def run(self, ids: list[int], targets: list[int]) -> list[int]:
        """The losses of the rows."""
        x = [self.model.embedding[token] for token in ids]
        self.values["x"] = x
        for index in range(len(self.model.layers)):
            x = self.forward(index, x)
        losses, dy = self.loss(x, targets)
        for index in reversed(range(self.bottom, len(self.model.layers))):
            below = self.backward(index, dy)
            if below is None:
                break
            dy = below
        return losses

    def loss(self, x: Rows, targets: list[int]) -> tuple[list[int], Rows]:
        model = self.model
        rows = [i for i, target in enumerate(targets) if target != IGNORED]
        y, rstd = normed([x[i] for i in rows], model.norm, model.eps)
        logits = product(y, model.head)
        losses, _, dlogits = exact.cross_entropy(logits, [targets[i] for i in rows])
        dnormed = product(dlogits, turned_over(model.head))
        back = norm_back(dnormed, [x[i] for i in rows], model.norm, rstd)
        self.values |= {"normed": y, "logits": logits, "dlogits": dlogits, "dnormed": dnormed}
        of_row, dx_of_row = dict(zip(rows, losses, strict=True)), dict(zip(rows, back, strict=True))
        return (
            [of_row.get(i, 0) for i in range(len(x))],
            [dx_of_row.get(i, [0] * len(x[0])) for i in range(len(x))],
        )

    def forward(self, index: int, x: Rows) -> Rows:
        layer, eps = self.model.layers[index], self.model.eps
        v: Json = {"x": x, "z": {}}

        def through(target: str, rows: Rows) -> Rows:
            y, v["z"][target] = linear(layer.linears[target], rows)
            return y

        v["normed1"], v["rstd1"] = normed(x, layer.norms["input_layernorm"], eps)
        q, k, v["v"] = (through(target, v["normed1"]) for target in TARGETS[:3])
        self.show(index, normed1=v["normed1"], q=q, k=k, v=v["v"])
        if "q_norm" in layer.norms:
            v["raw"] = {}
            found = []
            for name, rows in (("q_norm", q), ("k_norm", k)):
                by_head = split_heads(rows, layer.heads.dim)
                y, rstd = normed(by_head, layer.norms[name], eps)
                v["raw"][name] = by_head, rstd
                found.append(joined_heads(y, len(x)))
            q, k = found
            self.show(index, q_normed=q, k_normed=k)
        v["q"], v["k"] = (rotated(rows, self.cos, self.sin, inverse=False) for rows in (q, k))
        v["mixed"], _ = attention(v["q"], v["k"], v["v"], self.lengths, layer.heads)
        v["middle"] = plus(through("o_proj", v["mixed"]), x)
        self.show(index, q_turned=v["q"], k_turned=v["k"], mixed=v["mixed"], middle=v["middle"])
        v["normed2"], v["rstd2"] = normed(v["middle"], layer.norms["post_attention_layernorm"], eps)
        v["gate"], v["up"] = (through(target, v["normed2"]) for target in ("gate_proj", "up_proj"))
        v["act"] = [
            [exact.swiglu(g, u) for g, u in zip(*rows, strict=True)]
            for rows in zip(v["gate"], v["up"], strict=True)
        ]
        y = plus(through("down_proj", v["act"]), v["middle"])
        self.show(index, normed2=v["normed2"], gate=v["gate"], up=v["up"], act=v["act"], y=y)
        self.kept.append(v)
        return y

    def backward(self, index: int, dy: Rows) -> Rows | None:
        """The dy of the layer below, or None where backward has ended."""
        layer, v, lowest = self.model.layers[index], self.kept[index], index == self.bottom

        def through(targets: dict[str, Rows], x: Rows, needed: bool) -> Rows | None:
            total: Rows | None = None
            for target, g in targets.items():
                own = layer.linears[target]
                e: Rows = []
                if own.adapter is not None:
                    self.found[index, target] = adapter_gradients(
                        own.adapter, g, x, v["z"][target], self.lengths
                    )
                    e = self.found[index, target].e
                if needed:
                    dx = input_gradient(own, g, e)
                    total = dx if total is None else plus(total, dx)
            return total

        self.show(index, dy=dy)
        attends = not lowest or self.adapted(layer, *TARGETS[:4])
        gates = attends or self.adapted(layer, "gate_proj", "up_proj")
        dact = through({"down_proj": dy}, v["act"], gates)
        if dact is None:
            return None
        both = [
            [exact.swiglu_backward(*three) for three in zip(*rows, strict=True)]
            for rows in zip(dact, v["gate"], v["up"], strict=True)
        ]
        dgate, dup = ([[pair[side] for pair in row] for row in both] for side in range(2))
        self.show(index, dact=dact, dgate=dgate, dup=dup)
        dnormed2 = through({"gate_proj": dgate, "up_proj": dup}, v["normed2"], attends)
        if dnormed2 is None:
            return None
        norm = layer.norms["post_attention_layernorm"]
        dmiddle = plus(dy, norm_back(dnormed2, v["middle"], norm, v["rstd2"]))
        self.show(index, dnormed2=dnormed2, dmiddle=dmiddle)
        qkv = not lowest or self.adapted(layer, *TARGETS[:3])
        dmixed = through({"o_proj": dmiddle}, v["mixed"], qkv)
        if dmixed is None:
            return None
        dq, dk, dv, _ = attention_backward(dmixed, v["q"], v["k"], v["v"], self.lengths, layer.heads)
        self.show(index, dmixed=dmixed, dq_turned=dq, dk_turned=dk, dv=dv)
        dq, dk = (rotated(rows, self.cos, self.sin, inverse=True) for rows in (dq, dk))
        if "raw" in v:
            self.show(index, dq_normed=dq, dk_normed=dk)
            dq, dk = (
                joined_heads(
                    norm_back(
                        split_heads(rows, layer.heads.dim),
                        v["raw"][name][0],
                        layer.norms[name],
                        v["raw"][name][1],
                    ),
                    len(rows),
                )
                for name, rows in (("q_norm", dq), ("k_norm", dk))
            )
        self.show(index, dq=dq, dk=dk)
        dnormed1 = through(dict(zip(TARGETS[:3], (dq, dk, dv), strict=True)), v["normed1"], not lowest)
        if dnormed1 is None:
            return None
        self.show(index, dnormed1=dnormed1)
        return plus(dmiddle, norm_back(dnormed1, v["x"], layer.norms["input_layernorm"], v["rstd1"]))


# NF4-15.6 to NF4-15.9


def paired(arrays: list[list[int]]) -> list[int]:
    """The sum of arrays (NF4-15.6)."""
    if len(arrays) == 1:
        return arrays[0]
    h = 1
    while 2 * h < len(arrays):
        h *= 2
    return [add(x, y) for x, y in zip(paired(arrays[:h]), paired(arrays[h:]), strict=True)]


def clip(gradients: dict[str, list[int]], max_norm: float) -> tuple[Fraction, dict[str, list[int]]]:
    """The norm and the clipped gradients (NF4-15.7)."""
    if not max_norm >= 0:
        raise RefusedError(f"max_norm is {max_norm} (NF4-10.7)")
    for name, gradient in gradients.items():
        check_finite(name, gradient)
    squares = [exact.sum_of(gradients[name], gradients[name]) for name in sorted(gradients)]
    norm = value(root(exact.summed(squares), "float64"), "float64")
    if max_norm in (0, math.inf):
        return norm, gradients
    c = rn64(Fraction(max_norm) / rn64(norm + Fraction(1e-6)))
    if c >= 1:
        return norm, gradients
    return norm, {name: [multiply(g, rounded(c)) for g in gradient] for name, gradient in gradients.items()}


def learning_rate(i: int, n: int, w: int, schedule: str, lr: float) -> int:
    """The bits of the rate (NF4-15.8)."""
    if schedule not in SCHEDULES or not 0 <= lr < math.inf or min(i, n, w) < 0:
        raise RefusedError(f"schedule {schedule!r}, step {i} of {n} after {w}, lr {lr} (NF4-15.8)")
    peak = abs(Fraction(lr))

    def rn(x: Fraction) -> int:
        return rounded(x, "float64")

    if i < w:
        return rn(peak * Fraction(i, w))
    if schedule == "constant":
        return rn(peak)
    span = max(1, n - w)
    if schedule == "linear":
        return rn(peak * max(Fraction(0), Fraction(n - i, span)))
    part = Fraction(i - w, span) % 2  # of half a turn
    exactly = {
        0: 1,
        Fraction(1, 3): Fraction(1, 2),
        Fraction(1, 2): 0,
        Fraction(2, 3): Fraction(-1, 2),
        1: -1,
    }
    folded = min(part, 2 - part)
    if folded in exactly:
        return rn(peak * (1 + exactly[folded]) / 2)
    return nearest(peak * (1 + cosine_and_sine(folded * real(pi()))[0]) / 2, rn)


def update(c: Scalars, dtype: str, p: list[int], g: list[int]) -> list[int]:
    """A first update, in float32 (NF4-10.4)."""
    zeros = [0] * len(g)
    return [after.p for after in updates(c, dtype, p, g, zeros, zeros)]
