"""`nf4 bench --device cuda`: what it reports, on a small scale."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from nf4.cli import main
from nf4_gpu import bench


@pytest.mark.usefixtures("gpu")
def test_the_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "SHAPES", ((1024, 4096),))
    options = ["bench", "--device", "cuda", "--rounds", "2", "--json", str(tmp_path / "report.json")]
    result = CliRunner().invoke(main, options)
    assert result.exit_code == 0, result.output
    assert "x W^T, 64 rows, double" in result.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["benchmark"] == "cuda"
    (shape,) = report["shapes"]
    assert shape["shape"] == [1024, 4096]
    assert len(shape["results"]) == len(report["calls"]) == 4 + len(bench.ROWS)
    for row in shape["results"]:
        seconds, moved = row["seconds"], row["bytes"]
        assert 0 < row["of_copy"] < 1.5
        assert row["of_copy"] == pytest.approx(moved / seconds["nf4"] / (4 * 1024 * 4096 / seconds["copy"]))
    for row in report["calls"]:
        assert 1e-7 < row["seconds"]["nf4"] < 1e-2
