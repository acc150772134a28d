from __future__ import annotations

from qdeploy.report.front import agreement_plot


def test_the_agreement_of_nothing_measured_says_so() -> None:
    empty, full = (
        agreement_plot({"accuracy": []}).axes[0],
        agreement_plot({"accuracy": [(1.0, 2.0, (None, None))]}).axes[0],
    )
    assert [text.get_text() for text in empty.texts] == ["no subnet of a front was measured"]
    assert not empty.get_xticks().size
    assert not full.texts and full.lines[-1].get_xdata().tolist() == [1.0, 2.0]
