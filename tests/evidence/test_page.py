"""The page of `nf4 explore` in a real browser: what it shows is what the reference computes."""

import re
from collections.abc import Iterator
from pathlib import Path

import browser as headless
import numpy as np
import pytest
from browser import Browser
from nf4.codebooks import CODEBOOKS
from nf4.evidence import page
from nf4.nested import encode_nested
from nf4.tensor import dequantize, quantize

TENSORS = {
    "a.weight": np.random.default_rng(5).standard_normal((3, 100)).astype(np.float32),
    "zeros </script> & co": np.zeros(64, np.float32),
    "tiny.weight": (np.random.default_rng(6).standard_normal(64) * 1e-41).astype(np.float32),
}


@pytest.fixture(scope="module")
def shared() -> Iterator[Browser]:
    reason = headless.missing()
    if reason:
        pytest.skip(reason)
    with headless.browser() as opened:
        yield opened


@pytest.fixture
def window(shared: Browser, tmp_path: Path) -> Browser:
    page.write(tmp_path / "page.html", TENSORS)
    shared.open(tmp_path / "page.html")
    return shared


def weights(window: Browser) -> np.ndarray:
    """The weights on the page, to the bit."""
    bits = window.run("return Array.from(new Uint32Array(window.explore.weights.buffer))")
    return np.array(bits, np.uint32).view(np.float32)


def number(window: Browser, selector: str) -> float:
    return float(window.text(selector).split()[0].replace(",", "").rstrip("%"))


def check(window: Browser, grid: str, block_size: int, block: int, weight: int, double: bool = False) -> None:
    """Everything that is shown of one weight and of all is what the reference computes of the same bits."""
    x = weights(window)
    q = quantize(x, block_size, grid, double_quant=double)
    decoded = dequantize(q)
    codes = np.stack([q.codes >> 4, q.codes & 15], 1).reshape(-1)
    i = block * block_size + weight
    absmax = np.abs(x[block * block_size :][:block_size]).max()
    six = {"rel": 2e-5, "abs": 1e-44}
    assert number(window, "#x") == pytest.approx(x[i], **six)
    assert number(window, "#scaled") == pytest.approx(x[i] / absmax if absmax else 0, **six)
    assert window.text("#code") == f"{codes[i]} ({codes[i]:04b})"
    assert number(window, "#grid-value") == pytest.approx(CODEBOOKS[grid].values[codes[i]], **six)
    assert number(window, "#decoded") == pytest.approx(decoded[i], **six)
    error = float(decoded[i]) - float(x[i])
    assert number(window, "#error") == pytest.approx(error, rel=2e-5, abs=1e-44)
    wide = x.astype(np.float64)
    row = f'#totals tr[data-grid="{grid}"] td'
    assert number(window, f"{row}:nth-child(2)") == pytest.approx(q.bits_per_weight, abs=5e-5)
    mse = np.mean((decoded - wide) ** 2)
    assert number(window, f"{row}:nth-child(3)") == pytest.approx(mse, rel=2e-5, abs=1e-300)
    shown = window.run(
        "return [...document.querySelectorAll('#bins rect')].map((b) => [+b.dataset.code, +b.dataset.share])"
    )
    assert dict(map(tuple, shown)) == {
        int(code): np.count_nonzero(codes[: x.size] == code) / x.size for code in CODEBOOKS[grid].codes
    }


def test_it_opens_on_normal_data_in_nf4(window: Browser) -> None:
    assert window.text("h1") == "NF4, to try"
    x = weights(window)
    assert x.size == 16384
    assert abs(x.mean()) < 0.03
    assert x.std() == pytest.approx(1, abs=0.03)
    check(window, "nf4", 64, 0, 0)
    least, most = re.findall(r"[\d.]+", window.text("#masses"))[:2]
    assert float(least) < 2.5  # not a sixteenth
    assert float(most) > 8.5


def test_dragging_a_weight_changes_it_and_nothing_else(window: Browser) -> None:
    before = weights(window)
    window.drag(".handle", -180)
    after = weights(window)
    assert list(np.flatnonzero(before != after)) == [0]
    width = window.run("return document.querySelector('#line').getBoundingClientRect().width")
    reach = 1.2 * np.abs(before[:64]).max()
    moved = 180 / width * 940 / 440 * reach  # pixels, units of the drawing, units of weight
    assert before[0] - after[0] == pytest.approx(moved, rel=0.02)
    check(window, "nf4", 64, 0, 0)
    # Far out it becomes its block's largest, and the whole grid with it.
    room = window.run(
        "const at = (s) => document.querySelector(s).getBoundingClientRect();"
        "return Math.floor(at('#line').right - at('.handle').right)"
    )
    window.drag(".handle", room)
    largest = weights(window)[0]
    assert largest == np.abs(weights(window)[:64]).max()
    assert number(window, "#error") == 0
    assert number(window, "#absmax") == pytest.approx(largest, rel=1e-5)
    check(window, "nf4", 64, 0, 0)


def test_the_keyboard_moves_and_chooses_weights(window: Browser) -> None:
    window.run("document.querySelector('.handle').focus()")
    before = weights(window)
    window.press("ArrowRight", "ArrowRight", "ArrowRight")
    step = 1.2 * np.abs(before[:64]).max() / 200
    assert weights(window)[0] - before[0] == pytest.approx(3 * step, rel=1e-3)
    window.press("ArrowLeft", "ArrowUp", "ArrowUp", "ArrowRight")
    after = weights(window)
    assert list(np.flatnonzero(before != after)) == [0, 2]
    assert after[0] - before[0] == pytest.approx(2 * step, rel=1e-3)
    assert window.run("return document.querySelector('#weight').value") == "2"
    assert window.run("return document.activeElement.getAttribute('role')") == "slider"
    check(window, "nf4", 64, 0, 2)


def test_clicking_a_dot_chooses_its_weight(window: Browser) -> None:
    window.run("document.querySelectorAll('.dot')[41].dispatchEvent(new PointerEvent('pointerdown'))")
    check(window, "nf4", 64, 0, 42)  # weight 0 is no dot while it is chosen


def test_grids_block_sizes_and_data_are_chosen(window: Browser) -> None:
    window.click("#switch")
    check(window, "int4", 64, 0, 0)
    nf4, uniform = (number(window, f'#totals tr[data-grid="{g}"] td:nth-child(3)') for g in ("nf4", "int4"))
    assert nf4 < uniform
    window.click("#switch")
    window.choose("#block-size", "4096")
    check(window, "nf4", 4096, 0, 0)
    for grid in ("fp4", "fp4-e2m1"):
        window.choose("#grid", grid)
        check(window, grid, 4096, 0, 0)
    window.choose("#block-size", "32")
    window.choose("#source", "uniform")
    check(window, "fp4-e2m1", 32, 0, 0)
    before = weights(window)
    window.click("#draw")
    assert not np.array_equal(before, weights(window))


@pytest.mark.parametrize("name", TENSORS)
def test_the_tensors_of_a_model_come_through_to_the_bit(window: Browser, name: str) -> None:
    window.run(
        "const s = document.querySelector('#source'); s.value = arguments[0];"
        "s.dispatchEvent(new Event('change'))",
        name,
    )
    assert weights(window).tobytes() == TENSORS[name].tobytes()
    check(window, "nf4", 64, 0, 0)


def test_a_short_last_block(window: Browser) -> None:
    window.choose("#source", "a.weight")  # 300 weights: 4 blocks of 64 and one of 44
    window.run(
        "const b = document.querySelector('#block'); b.value = 4; b.dispatchEvent(new Event('change'))"
    )
    assert window.run("return document.querySelector('#weight').max") == "43"
    check(window, "nf4", 64, 4, 0)


def test_double_quantization_step_by_step(window: Browser) -> None:
    plain = quantize(weights(window), 64)
    assert isinstance(plain.absmax, np.ndarray)
    nested = encode_nested(plain.absmax)
    assert number(window, "#dq-absmax") == pytest.approx(plain.absmax[0], rel=1e-5)
    assert number(window, "#dq-offset") == pytest.approx(nested.offset, rel=1e-5)
    assert number(window, "#dq-nested") == pytest.approx(nested.absmax[0], rel=1e-5)
    assert int(window.text("#dq-code")) == nested.codes[0]
    assert number(window, "#dq-bits") == pytest.approx(4.1289, abs=1e-4)
    window.click("#double")
    check(window, "nf4", 64, 0, 0, double=True)
    decoded = number(window, "#dq-decoded")
    assert number(window, "#absmax") == pytest.approx(decoded, rel=1e-5)
    assert number(window, "#dq-error") == pytest.approx(decoded - float(plain.absmax[0]), abs=2e-5)


def test_what_must_be_refused_is_refused_with_words(window: Browser) -> None:
    script = (
        "const v = document.querySelector('#value'); v.value = arguments[0];"
        "v.dispatchEvent(new Event('change'))"
    )
    window.run(script, "1e39")  # infinite in float32
    assert window.text("#problem") == "refused: element 0 is Infinity"
    window.run(script, "0.25")
    assert window.text("#problem") == ""
    assert weights(window)[0] == 0.25
    check(window, "nf4", 64, 0, 0)


def test_nothing_is_loaded_and_nothing_fails(window: Browser) -> None:
    window.complaints()
    window.click("#draw")
    window.click("#double")
    window.drag(".handle", 40)
    assert window.run("return performance.getEntriesByType('resource').length") == 0
    assert window.complaints() == []
    window.run("setTimeout(() => { throw new Error('seen') })")
    window.drag(".handle", 40)
    assert "seen" in str(window.complaints())  # they would be


def test_the_page_holds_the_port_and_no_address() -> None:
    built = page.build(TENSORS)
    assert page.PORT.read_text("utf-8") in built
    addresses = set(re.findall(r"\w+://[^'\"\s<]+", built))
    assert addresses == {"http://www.w3.org/2000/svg"}  # the name of a namespace
    assert not re.search(r"<(link|img|iframe)\b|<script[^>]*\ssrc=|@import|fetch\(|import\(", built)
    assert built.count("</script>") == 2
