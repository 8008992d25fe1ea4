"""Layouts from the generator against one process, and the generator and the table of results themselves."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from tests.parity.compare import worst
from tests.parity.generate import AXES, Case, alone_and_in_pairs, case_of, draw
from tests.parity.measure import Layout, Outcome, train
from tests.parity.table import FAULT, LAYOUT, record_fault, record_layout, tables

FIXED = alone_and_in_pairs(most_ranks=4)
DRAWN = draw(20, range(2, 5))
ON_EIGHT = [
    case_of(tp="tp8"),
    case_of(tp="tp8", sequence="sequence"),
    case_of(**{"dp": "dp8", "micro-batch": "micro-batch1"}),
    *draw(17, range(8, 9)),
]


@cache
def one_process(model: tuple[tuple[str, Any], ...]) -> Outcome:
    outcome = train(Layout(), dict(model))
    assert outcome is not None
    return outcome


def check(ranks: Any, case: Case, record_property: Any) -> None:
    outcome = ranks.run(train, case.layout.world_size, case.layout, case.settings)[0]
    deviations = worst(one_process(tuple(case.model.items())), outcome)
    record_layout(record_property, str(case), deviations)
    assert max(deviations.values()) <= 1.0, deviations


@pytest.mark.parametrize("case", FIXED, ids=str)
def test_each_axis_alone_and_each_pair(ranks: Any, case: Case, record_property: Any) -> None:
    check(ranks, case, record_property)


@pytest.mark.parametrize("case", DRAWN, ids=str)
def test_drawn(ranks: Any, case: Case, record_property: Any) -> None:
    check(ranks, case, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("case", ON_EIGHT, ids=str)
def test_drawn_on_eight_ranks(ranks: Any, case: Case, record_property: Any) -> None:
    check(ranks, case, record_property)


class TestGenerator:
    def test_the_same_seed_draws_the_same(self) -> None:
        assert draw(20, range(2, 5)) == DRAWN
        assert draw(20, range(2, 5), seed=1) != DRAWN

    def test_every_axis_is_tried_alone_or_with_its_enabler_and_in_pairs(self) -> None:
        pairs = {
            (one, other)
            for case in FIXED
            for one in AXES
            for other in AXES
            if one < other and set(case.labels) - {""} == {*_labels(case, one), *_labels(case, other)} - {""}
            if _labels(case, one) != {""} and _labels(case, other) != {""}
        }
        models = {"embeddings", "heads", "documents", "dropout"}  # these alone are one process
        enabled = {"zero": {"dp", "cp"}, "sequence": {"tp"}}  # no effect without
        for one in AXES:
            for other in AXES:
                if one < other and not {one, other} <= models and not {one, other} & enabled.keys():
                    assert (one, other) in pairs
        assert {("dp", "zero"), ("cp", "zero"), ("sequence", "tp")} <= pairs

    def test_every_label_is_drawn_somewhere(self) -> None:
        tried = {label for case in [*FIXED, *DRAWN, *ON_EIGHT] for label in case.labels}
        assert tried >= {label for values in AXES.values() for label in values}

    def test_cases_differ_have_names_and_keep_to_their_ranks(self) -> None:
        for cases in (FIXED, DRAWN, ON_EIGHT):
            assert len({str(case) for case in cases}) == len(cases)
            assert all(str(case) for case in cases)
        assert all(case.layout.world_size <= 4 for case in FIXED)
        assert all(2 <= case.layout.world_size <= 4 for case in DRAWN)
        assert all(case.layout.world_size == 8 for case in ON_EIGHT)

    def test_a_case_is_a_layout_and_settings(self) -> None:
        case = case_of(tp="tp2", dp="dp2", zero="zero0", heads="mha", documents="packed", recompute="recompute-full")
        assert str(case) == "tp2 dp2 zero0 recompute-full mha packed"
        assert case.layout == Layout(tp=2, dp=2, zero=0)
        assert case.model == {"model.num_query_groups": 8, "packed": True}
        assert case.settings == case.model | {"recompute.recompute_granularity": "full"}

    def test_what_means_nothing_or_cannot_be_is_left_out(self) -> None:
        assert not case_of().says_something()
        assert not case_of(heads="mha").says_something()
        assert not case_of(zero="zero0").says_something()
        assert not case_of(sequence="sequence").says_something()
        assert case_of(sequence="sequence", tp="tp2").says_something()
        assert case_of(tp="tp4").is_possible()
        assert not case_of(**{"dp": "dp4", "micro-batch": "micro-batch4"}).is_possible()  # 16 samples in a batch of 8
        with pytest.raises(AssertionError, match="only 0 of 5 cases found"):
            draw(5, range(3, 4))


def _labels(case: Case, axis: str) -> set[str]:
    return {case.labels[list(AXES).index(axis)]}


SMALL = {"loss": 0.01, "norm": 0.02, "gradient": 0.03, "weight": 0.04}
LARGE = {"loss": 0.5, "norm": 0.0, "gradient": 2.0, "weight": 0.0}


class TestTable:
    def rows(self, fault: dict[str, float]) -> list[tuple[str, Any]]:
        found: list[tuple[str, Any]] = [("other", 1)]
        record = lambda name, value: found.append((name, value))  # noqa: E731
        record_layout(record, "tp2", SMALL)
        record_layout(record, "dp2 a2a", LARGE)
        record_fault(record, "mean_of_means", fault)
        assert [name for name, _ in found] == ["other", LAYOUT, LAYOUT, FAULT]
        return found

    def test_all_of_it(self) -> None:
        assert tables(self.rows(LARGE), everything=True) == [
            "2 layouts against one process in fp32: largest error in loss, gradient norm, gradient (relative)",
            "and weight (absolute)",
            "                          loss       norm   gradient     weight",
            "tp2                    1.0e-07    2.0e-06    3.0e-06    8.0e-07",
            "dp2 a2a                5.0e-06    0.0e+00    2.0e-04    0.0e+00",
            "largest of them all    5.0e-06    2.0e-06    2.0e-04    8.0e-07",
            "tolerance              1.0e-05    1.0e-04    1.0e-04    2.0e-05",
            "1 faults made on purpose: 1 seen",
            "  mean_of_means  gradient off by 2.0e-04, tolerance 0.0001",
        ]

    def test_in_short_the_worst_come_first(self) -> None:
        lines = tables(self.rows(LARGE), everything=False)
        assert lines[1] == "and weight (absolute); the 2 worst, all with -v"
        assert [line.split("  ")[0] for line in lines[3:5]] == ["dp2 a2a", "tp2"]
        assert lines[-1] == "1 faults made on purpose: 1 seen"

    def test_a_fault_that_nothing_sees_is_shown_always(self) -> None:
        assert tables(self.rows(SMALL), everything=False)[-2:] == [
            "1 faults made on purpose: 0 seen",
            "  mean_of_means  weight off by 8.0e-07, tolerance 2e-05",
        ]

    def test_without_rows_there_is_no_table(self) -> None:
        assert tables([("other", 1)], everything=True) == []
