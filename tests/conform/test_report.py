"""What a report says: the beginning of a rule, the hint at steps, what a port may be called."""

from dataclasses import replace

import pytest
from nf4.conform import reference
from nf4.conform.bugs import BUGS
from nf4.conform.clauses import clauses
from nf4.conform.compare import compare
from nf4.conform.operations import OPERATIONS
from nf4.conform.port import Answer
from nf4.conform.python_port import PythonPort
from nf4.conform.report import Claim, claim, details, run_json
from nf4.conform.run import Run, execute, judge
from nf4.conform.vectors import load

VECTORS = load()
CODEC = ("quantize", "dequantize", "encode_absmax", "decode_absmax")


class Port(PythonPort):
    """The reference with some operations, which skips vectors and fails others."""

    def __init__(
        self,
        operations: tuple[str, ...],
        skipped: dict[str, str] | None = None,
        failing: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(reference, "it")
        self.operations = frozenset(operations)
        self._skipped, self._failing = skipped or {}, failing

    def run(self, id: str, operation: str, input: dict[str, object]) -> Answer:  # type: ignore[override]
        if operation != "echo" and any(input.get(name) == value for name, value in self._skipped.items()):
            return Answer("skipped", message="not here")
        return Answer("refused") if id in self._failing else super().run(id, operation, input)


def run_of(port: PythonPort, only: tuple[str, ...] = tuple(OPERATIONS), known: str = "") -> Run:
    run = Run("it", ("--python", "it"), whole=frozenset(only))
    vectors = [vector for vector in VECTORS if vector.operation in port.operations]
    execute(run, port, vectors, {known: {known}} if known else {})
    return run


def test_rules_are_whole_sentences_up_to_a_length() -> None:
    found = clauses()
    assert found["NF4-2.3"].rule.startswith("By NF4-2.2, t(0) to t(14) are bf591cd8 bf1c5270")
    assert found["NF4-2.3"].rule.endswith("3f5c89da")
    assert found["NF4-3.5"].rule.count(". ") >= 1, "a vector may be about the second sentence"
    assert "+0 and -0 get the same code." in found["NF4-3.5"].rule
    for one in found.values():
        assert one.rule[-1] in ".:)" or one.rule.endswith("...") or one.id == "NF4-2.3", one
        assert 10 < len(one.rule) <= 310, one
        assert "*Reason:*" not in one.rule
        assert "```" not in one.rule
        assert "|---" not in one.rule


def test_a_port_that_sends_no_steps_is_told_that_it_may() -> None:
    vector = next(v for v in VECTORS if v.id == "nf4-thresholds")
    wrong = PythonPort(BUGS["TieRule"], "it").run(vector.id, vector.operation, vector.input)
    run = Run("it", ("--python", "it"))
    hint = "a port that answers `steps` is told the first that differs"
    assert hint in dict(details(run, judge(vector, wrong), {}))["on the way"]
    told = replace(wrong, steps={"s": vector.steps["s"]})
    rows = dict(details(run, judge(vector, told), {}))
    assert rows["agree"] == "the steps s"
    assert hint not in rows["on the way"]


def test_the_first_value_of_a_whole_step_that_differs_is_told() -> None:
    vector = next(v for v in VECTORS if v.id == "exact-step-llama")
    assert vector.output is not None
    wrong = PythonPort(BUGS["ScaleIntoQuery"], "it").run(vector.id, vector.operation, vector.input)
    result, run = judge(vector, wrong), Run("it", ("--python", "it"))

    def told(values: dict[str, object]) -> dict[str, str]:
        expected = Answer("output", vector.output or {}, vector.steps)
        answer = replace(wrong, steps={"values": values})
        difference = compare(vector.operation, vector.input, expected, answer)
        return dict(details(run, replace(result, answer=answer, difference=difference), {}))

    values = dict(vector.steps["values"])
    values["0.mixed"] = {**values["0.mixed"], "data": f"7fc00000{values['0.mixed']['data'][8:]}"}
    assert told(values)["agree"] == "the 9 steps from cos to 0.k_turned"
    assert told(values)["step"].startswith("the first that differs is 0.mixed[0]: expected ")
    some = {name: values[name] for name in ("cos", "0.middle")}
    some["1.act"] = {"dtype": "float64", "shape": [0], "data": ""}
    assert told(some)["agree"] == "the steps cos, 0.middle"
    assert "1.act[0]" in told(some)["step"]
    assert "on the way" not in dict(details(run, result, {}))


def test_who_may_be_called_an_exact_trainer() -> None:
    trainer = ("init_adapter", "adamw", "example_order", "exact_learning_rate", "exact_step")
    assert claim(run_of(Port(trainer))).called == "an exact QLoRA trainer"
    assert claim(run_of(Port(trainer[:4]))).called == ""
    both = claim(run_of(Port((*CODEC, *trainer)))).called
    assert both == "an NF4 codec with double quantization and an exact QLoRA trainer"


class NoHalves(Port):
    """Skips the steps of models that have a tensor in float16."""

    def run(self, id: str, operation: str, input: dict[str, object]) -> Answer:  # type: ignore[override]
        if operation == "exact_step" and "'float16'" in str(input["tensors"]):
            return Answer("skipped", message="no float16")
        return super().run(id, operation, input)


def test_a_dtype_of_arrays_may_be_skipped() -> None:
    found = claim(run_of(NoHalves(("exact_step",))))
    assert (found.operations, found.skipped) == (("exact_step",), ("float16", "fp4"))


def test_what_a_port_may_be_called() -> None:
    assert claim(run_of(Port(CODEC))) == Claim("an NF4 codec with double quantization", CODEC, ())
    assert claim(run_of(Port(CODEC[:3]))) == Claim("an NF4 codec", CODEC[:3], ())
    some = claim(run_of(Port(CODEC[1:])))
    assert (some.called, some.operations) == ("", CODEC[1:])
    assert str(some) == ("it conforms to NF4 2.0 in dequantize, encode_absmax, decode_absmax (NF4-13.7)")
    assert str(claim(run_of(Port(CODEC)))) == (
        "it may be called an NF4 codec with double quantization: it conforms to NF4 2.0 in "
        "quantize, dequantize, encode_absmax, decode_absmax (NF4-13.7)"
    )
    assert f"in all {len(OPERATIONS)} operations" in str(Claim("", tuple(OPERATIONS), ()))


def test_a_claim_is_about_operations_asked_in_whole() -> None:
    assert claim(run_of(Port(CODEC), only=("dequantize",))).operations == ("dequantize",)
    nothing = claim(run_of(Port(CODEC), only=()))
    assert nothing == Claim("", (), ())
    assert str(nothing) == ""


@pytest.mark.parametrize(
    ("skipped", "said"), [({"codebook": "fp4"}, "fp4"), ({"dtype": "float16"}, "float16")]
)
def test_what_may_be_skipped_is_said(skipped: dict[str, str], said: str) -> None:
    found = claim(run_of(Port(CODEC, skipped)))
    assert found.called == "an NF4 codec with double quantization"
    assert said in found.skipped
    assert f"{said} skipped" in str(found)


def test_what_may_not_be_skipped_is_no_conformance() -> None:
    """A block size that a port lacks, and nf4 itself."""
    assert claim(run_of(Port(CODEC, {"block_size": 4096}))).operations == CODEC[2:]  # type: ignore[dict-item]
    assert claim(run_of(Port(CODEC, {"codebook": "nf4"}))).operations == CODEC[2:]


def test_a_known_failure_is_no_conformance() -> None:
    run = run_of(Port(CODEC, failing=frozenset({"nf4-thresholds"})), known="nf4-thresholds")
    assert run.exit_code == 0
    assert claim(run).operations == CODEC[1:]
    assert claim(run_of(Port(CODEC, failing=frozenset({"nf4-thresholds"})))).operations == ()


def test_the_claim_is_in_the_json() -> None:
    answer = run_json(run_of(Port(CODEC[:2])))
    assert answer["claim"] == {"called": "an NF4 codec", "operations": list(CODEC[:2]), "skipped": []}
