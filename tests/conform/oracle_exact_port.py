"""The operations of chapter 14 of the oracle's port: hexadecimal in, hexadecimal out."""

import struct
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import oracle
import oracle_exact as exact

Values = dict[str, Any]


def words(text: str) -> list[int]:
    return [int(text[i : i + 8], 16) for i in range(0, len(text), 8)]


def spelled(elements: list[int]) -> str:
    return "".join(f"{bits:08x}" for bits in elements)


def joined(rows: list[list[int]]) -> str:
    return "".join(map(spelled, rows))


def spelled_64(x: Fraction) -> str:
    return f"{oracle.rounded(x, 'float64'):016x}"


def rows_of(text: str, columns: int, rows: int | None = None) -> list[list[int]]:
    """The elements as rows of so many columns."""
    elements = words(text)
    if columns < 1 or len(elements) % columns or rows not in (None, len(elements) // columns):
        raise oracle.RefusedError(f"{len(elements)} elements are not {rows} rows of {columns} (NF4-14.1)")
    return [elements[i : i + columns] for i in range(0, len(elements), columns)]


def one_each(*texts: str) -> list[tuple[int, ...]]:
    """The elements of several arrays of one length, side by side."""
    if len({len(text) for text in texts}) > 1:
        raise oracle.RefusedError("arrays differ in length (NF4-14.1)")
    return list(zip(*map(words, texts), strict=True))


def operands(i: Values) -> tuple[exact.Rows, exact.Rows]:
    """The rows of a and the columns of b."""
    if len(i["shape"]) != 3 or min(i["shape"]) < 0:
        raise oracle.RefusedError(f"shape {i['shape']} (NF4-14.1)")
    m, k, n = i["shape"]
    a, b = words(i["a"]), words(i["b"])
    oracle.check_count("a", len(a), m * k)
    oracle.check_count("b", len(b), k * n)
    return [a[r * k : r * k + k] for r in range(m)], [b[c::n] for c in range(n)]


def exact_product(i: Values) -> Values:
    return {"y": joined(exact.product(*operands(i)))}


def exact_product_steps(i: Values) -> Values:
    left, right = map(exact.gridded, operands(i))
    by_row = [[column[k] for column in right] for k in range(i["shape"][1])]
    return {
        "rows": joined([[oracle.rounded(x) for x in row] for row in left]),
        "columns": joined([[oracle.rounded(x) for x in row] for row in by_row]),
    }


def exact_sum(i: Values) -> Values:
    pairs = one_each(i["x"], i.get("y", "3f800000" * (len(i["x"]) // 8)))
    return {"sum": spelled_64(exact.sum_of([x for x, _ in pairs], [y for _, y in pairs]))}


def exact_exp(i: Values) -> Values:
    return {"y": spelled([exact.exp(x) for x in words(i["x"])])}


def exact_log(i: Values) -> Values:
    return {"y": spelled([exact.log(x) for x in words(i["x"])])}


def exact_swiglu(i: Values) -> Values:
    return {"y": spelled([exact.swiglu(g, u) for g, u in one_each(i["gate"], i["up"])])}


def exact_swiglu_backward(i: Values) -> Values:
    both = [exact.swiglu_backward(d, g, u) for d, g, u in one_each(i["dout"], i["gate"], i["up"])]
    return {"dgate": spelled([g for g, _ in both]), "dup": spelled([u for _, u in both])}


def exact_softmax(i: Values) -> Values:
    return {"p": joined([exact.softmax(z) for z in rows_of(i["z"], i["columns"])])}


def exact_softmax_backward(i: Values) -> Values:
    p = rows_of(i["p"], i["columns"])
    dout = rows_of(i["dout"], i["columns"], len(p))
    return {"dz": joined([exact.softmax_backward(d, own) for d, own in zip(dout, p, strict=True)])}


def exact_rms_norm(i: Values) -> Values:
    oracle.check_count("eps", len(i["eps"]), 16)
    weight, eps = words(i["weight"]), struct.unpack(">d", bytes.fromhex(i["eps"]))[0]
    both = [exact.rms_norm(x, weight, eps) for x in rows_of(i["x"], len(weight))]
    return {"y": joined([y for y, _ in both]), "rstd": spelled([r for _, r in both])}


def exact_rms_norm_backward(i: Values) -> Values:
    weight, rstd = words(i["weight"]), words(i["rstd"])
    x, dout = (rows_of(i[name], len(weight), len(rstd)) for name in ("x", "dout"))
    dx = [exact.rms_norm_backward(d, own, weight, r) for d, own, r in zip(dout, x, rstd, strict=True)]
    return {"dx": joined(dx)}


def exact_cross_entropy(i: Values) -> Values:
    logits = rows_of(i["logits"], i["vocabulary"], len(i["targets"]))
    losses, loss, gradient = exact.cross_entropy(logits, i["targets"])
    return {"losses": spelled(losses), "loss": spelled_64(loss), "dlogits": joined(gradient)}


def exact_rotate(i: Values) -> Values:
    wide = i["head_dim"]
    if wide < 2 or wide % 2:
        raise oracle.RefusedError(f"head_dim {wide} is not even (NF4-14.1)")
    cos = rows_of(i["cos"], wide // 2)
    sin = rows_of(i["sin"], wide // 2, len(cos))
    heads = rows_of(i["x"], wide)
    if len(heads) % max(1, len(cos)) or (heads and not cos):
        raise oracle.RefusedError(f"{len(heads)} heads in {len(cos)} rows (NF4-14.1)")
    each = len(heads) // max(1, len(cos))
    turned = [exact.rotate(x, cos[j // each], sin[j // each], i["inverse"]) for j, x in enumerate(heads)]
    return {"y": joined(turned)}


STEPS: dict[str, Callable[[Values], Values]] = {"exact_product": exact_product_steps}

OPERATIONS: dict[str, Callable[[Values], Values]] = {
    function.__name__: function
    for function in (
        *(exact_product, exact_sum, exact_exp, exact_log, exact_swiglu, exact_swiglu_backward),
        *(exact_softmax, exact_softmax_backward, exact_rms_norm, exact_rms_norm_backward),
        *(exact_cross_entropy, exact_rotate),
    )
}
