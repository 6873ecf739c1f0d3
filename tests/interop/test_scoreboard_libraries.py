"""What bitsandbytes, torchao and ONNX Runtime conform to, clause by clause, in the versions of setup.cfg."""

from functools import cache

import bitsandbytes as bnb
import torch
from nf4.conform import scoreboard
from nf4.conform.scoreboard import Score, verdict
from nf4.conform.vectors import load

CODEC = ("quantize", "dequantize")
avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
flushes = bool(bnb.functional.has_avx512bf16())  # its instructions for bfloat16 take subnormals as zeros


@cache
def score(name: str) -> Score:
    """The run of one library on the vectors of the operations that libraries have."""
    entry = next(entry for entry in scoreboard.entries() if entry.name == name)
    assert entry.versions is not None, f"{name} is not installed; {entry.install}"
    vectors = [vector for vector in load() if vector.operation in {*CODEC, "encode_absmax", "decode_absmax"}]
    [result] = scoreboard.run([entry], vectors)
    assert result.run is not None
    assert result.run.broken is None
    return result


def wrong(name: str, *operations: str) -> dict[str, str]:
    """Verdict by id of the vectors of these operations that it answers, and not as it should."""
    run = score(name).run
    assert run is not None
    return {
        result.vector.id: verdict(result)
        for result in run.results
        if result.vector.operation in operations and verdict(result) not in {"conforms", "not offered"}
    }


def clauses(name: str) -> dict[str, bool]:
    """Whether it conforms to each clause of which it was asked something."""
    return {
        id: verdicts["conforms"] == verdicts.total() - verdicts["not offered"]
        for id, verdicts in scoreboard.by_clause(score(name)).items()
        if verdicts.total() > verdicts["not offered"]
    }


def test_bitsandbytes_clause_by_clause() -> None:
    found = clauses("bitsandbytes")
    same = {id for id, conforms in found.items() if conforms}
    assert {"NF4-1.5", "NF4-2.3", "NF4-5.1", "NF4-12.2", "NF4-12.3"} <= same
    other = {"NF4-2.2", "NF4-3.2", "NF4-3.3", "NF4-3.4", "NF4-6.1", "NF4-6.3", "NF4-6.6", "NF4-12.1"}
    assert not other & same
    assert ("NF4-4.1" in same) == (not avx512)
    assert ("NF4-4.2" in same) == (not flushes)


def test_bitsandbytes_differs_where_the_specification_says_so() -> None:
    """A clamped absmax, a divided short block, a second zero in fp4; rows, bfloat16 by the CPU; no scalar."""
    differs = {
        *("fp4-thresholds", "fp4-reciprocal", "fp4-zeros", "nf4-zeros", "nf4-reciprocal-short-block"),
        *("nf4-absmax-smallest", "nf4-absmax-2-128", "nf4-absmax-1e-38", "nf4-absmax-tiny-short-block"),
        "nf4-bfloat16-extremes",
        *(["nf4-decode-rows-4-48"] if avx512 else []),
        *(["nf4-bfloat16-subnormal-results"] if flushes else []),
    }
    found = wrong("bitsandbytes", *CODEC)
    assert {id for id, what in found.items() if what == "differs"} == differs
    assert {id for id, what in found.items() if what == "refused"} == {"nf4-decode-scalar"}
    assert "refuse-nan" in {id for id, what in found.items() if what == "accepted"}
    assert "no answer" not in found.values()
    bugs = scoreboard.looks_like(score("bitsandbytes"))
    assert bugs["AbsmaxClamped"] == bugs["TailDivision"] == 1
    assert bugs["BlocksRestartAtRows"] == avx512


def test_bitsandbytes_decodes_what_was_double_quantized() -> None:
    assert set(wrong("bitsandbytes", "decode_absmax").values()) == {"accepted"}


def test_torchao_rounds_the_table_and_takes_whole_blocks() -> None:
    found = clauses("torchao")
    assert not {"NF4-2.1", "NF4-2.3", "NF4-3.3", "NF4-4.1", "NF4-4.2", "NF4-12.1"} & {
        id for id, conforms in found.items() if conforms
    }
    verdicts = wrong("torchao", *CODEC)
    assert verdicts["nf4-thresholds"] == "differs"
    assert verdicts["nf4-odd"] == "refused"
    assert "nf4-whole-blocks" not in verdicts
    bugs = scoreboard.looks_like(score("torchao"))
    assert bugs["CodebookRounded"] > 10
    assert bugs["ZeroBlock"] == 1


def test_onnx_runtime_has_other_thresholds_and_decodes_alike() -> None:
    """Four thresholds of nf4 are one ulp off, so only values within an ulp of those get another code."""
    found = clauses("onnxruntime")
    same = {id for id, conforms in found.items() if conforms}
    assert {"NF4-3.2", "NF4-3.4", "NF4-4.1", "NF4-5.1", "NF4-5.2"} <= same
    assert not {"NF4-2.2", "NF4-2.3", "NF4-3.3", "NF4-12.1"} & same
    verdicts = wrong("onnxruntime", *CODEC)
    assert verdicts["nf4-thresholds"] == verdicts["fp4-thresholds"] == "differs"
    assert not any(id.startswith(("nf4-all-bytes", "nf4-subnormal")) for id in verdicts)
