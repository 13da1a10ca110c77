"""Schedules against their formulas at every step of short runs, the plateau rule against its steps one by one."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import backprop_gpu as bp
from backprop_gpu.schedules import (
    SCHEDULES,
    Constant,
    Cosine,
    CosineRestarts,
    Exponential,
    InverseTime,
    OneCycle,
    Polynomial,
    ReduceOnPlateau,
    Step,
    Warmup,
    choose_schedule,
    constant,
    during,
)

TOTALS = [1, 2, 3, 7, 10, 30, 100]


def whole(schedule, total):
    return [schedule(step, total) for step in range(total)]


def cos_between(a, b, p):
    """PyTorch's annealing: b + (a - b) (1 + cos(pi p)) / 2."""
    return b + (a - b) / 2.0 * (1 + math.cos(math.pi * p))


def one_cycle(step, total, peak_at=0.3, start=1 / 25, final=1e-5):
    """PyTorch's two phases; where the first has no room the peak is the first step."""
    end = peak_at * total - 1
    if end <= 0:
        return 1.0 if step == 0 else cos_between(1, final, step / (total - 1))
    return cos_between(start, 1, step / end) if step <= end else cos_between(1, final, (step - end) / (total - 1 - end))


FORMULAS = [
    (Constant(), lambda s, n: 1),
    (Constant(0.3), lambda s, n: 0.3),
    (Step(), lambda s, n: 0.1 ** (s // math.ceil(n / 3))),
    (Step(every=4, factor=0.5), lambda s, n: 0.5 ** (s // 4)),
    (Step(every=1000), lambda s, n: 1),
    (Exponential(), lambda s, n: math.exp(math.log(0.01) * s / n)),
    (Exponential(final=1e4), lambda s, n: math.exp(math.log(1e4) * s / n)),
    (InverseTime(), lambda s, n: 1 / (1 + 9 * s / n)),
    (InverseTime(final=0.25), lambda s, n: 1 / (1 + 3 * s / n)),
    (Polynomial(), lambda s, n: (n - s) / n),
    (Polynomial(power=2, final=0.2), lambda s, n: 0.2 + 0.8 * ((n - s) / n) ** 2),
    (Cosine(), lambda s, n: cos_between(1, 0, s / n)),
    (Cosine(final=0.3), lambda s, n: cos_between(1, 0.3, s / n)),
    (CosineRestarts(period=3), lambda s, n: cos_between(1, 0, s % 3 / 3)),
    (CosineRestarts(period=1000), lambda s, n: cos_between(1, 0, s / 1000)),
    (OneCycle(), one_cycle),
    (OneCycle(0.5, 0.2, 0.1), lambda s, n: one_cycle(s, n, 0.5, 0.2, 0.1)),
    (OneCycle(peak_at=0), lambda s, n: one_cycle(s, n, 0)),
    (OneCycle(peak_at=1), lambda s, n: one_cycle(s, n, 1)),
    (Warmup(4), lambda s, n: min(s / 4, 1)),
    (Warmup(4, "cosine", 0.2), lambda s, n: 0.2 + 0.8 * s / 4 if s < 4 else cos_between(1, 0, (s - 4) / (n - 4))),
    (Warmup(1000, start=0.5), lambda s, n: 0.5 + 0.5 * s / 1000),
    (ReduceOnPlateau(), lambda s, n: 1),
]


@pytest.mark.parametrize("total", TOTALS)
@pytest.mark.parametrize(("schedule", "formula"), FORMULAS, ids=lambda x: repr(x) if not hasattr(x, "__code__") else "")
def test_formula_at_every_step(schedule, formula, total):
    np.testing.assert_allclose(
        whole(schedule, total), [formula(s, total) for s in range(total)], rtol=1e-12, atol=1e-15
    )


def test_cosine_without_a_final_factor_is_the_plain_formula_to_the_bit():
    for total in (*TOTALS, 4690):
        assert whole(Cosine(), total) == [0.5 * (1 + math.cos(math.pi * s / total)) for s in range(total)]


def test_first_and_last_steps():
    for schedule in (Exponential(), InverseTime(), Polynomial(), Cosine(), CosineRestarts(), Step(), ReduceOnPlateau()):
        assert schedule(0, 100) == 1
    for schedule, last in [(Exponential(0.01), 0.01), (InverseTime(0.1), 0.1), (Polynomial(2, 0.3), 0.3)]:
        assert schedule(10**6 - 1, 10**6) == pytest.approx(last, rel=1e-4)
    cycle = whole(OneCycle(peak_at=0.3, start=0.04, final=1e-5), 100)
    assert (cycle[0], cycle[29], max(cycle)) == (0.04, 1, 1)
    assert cycle[99] == pytest.approx(1e-5)
    assert cycle == sorted(cycle[:30]) + sorted(cycle[30:], reverse=True)


def test_a_length_is_in_steps_or_a_fraction_rounded_up():
    assert whole(Step(every=0.25, factor=0.5), 8) == [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125]
    assert whole(Step(every=0.25, factor=0.5), 10) == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125]
    assert whole(Step(every=1.0, factor=0.5), 3) == whole(Step(every=1, factor=0.5), 3) == [1, 0.5, 0.25]
    assert whole(Step(every=1e-9, factor=0.5), 3) == [1, 0.5, 0.25]
    assert type(Step(every=2.0).every) is int


def test_the_rounding_of_a_fraction_costs_no_step():
    """0.07 * 100 is a little above 7, 0.29 * 100 a little below 29."""
    for n in range(1, 100):
        first = whole(Step(every=n / 100, factor=0.5), 100).index(0.5)
        assert first == n
        assert whole(Step(every=float(f"0.{n:02d}"), factor=0.5), 100).index(0.5) == n


def test_restarts_come_when_the_periods_have_passed():
    grown = whole(CosineRestarts(period=2, growth=2), 15)
    assert [s for s, factor in enumerate(grown) if factor == 1] == [0, 2, 6, 14]
    for s in range(6, 14):
        assert grown[s] == pytest.approx(cos_between(1, 0, (s - 6) / 8))
    quarters = whole(CosineRestarts(final=0.5), 20)
    assert [s for s, factor in enumerate(quarters) if factor == 1] == [0, 5, 10, 15]
    assert quarters[4] == pytest.approx(cos_between(1, 0.5, 4 / 5))
    fractions = whole(CosineRestarts(period=4, growth=1.5), 19)  # 4, 6, 9
    assert [s for s, factor in enumerate(fractions) if factor == 1] == [0, 4, 10]


def test_restarts_of_one_step_are_soon_told_in_a_long_run():
    assert CosineRestarts(period=1)(10**15, 10**15 + 1) == 1


def test_warmup_hands_the_rest_of_the_run_on():
    seen = []

    def then(step, total):
        seen.append((step, total))
        return 0.5

    assert whole(Warmup(0.2, then), 10) == [0, 0.5] + 8 * [0.5]
    assert seen == [(step, 8) for step in range(8)]
    assert whole(Warmup(2, Step(every=0.5, factor=0.5)), 10) == [0, 0.5] + 4 * [1] + 4 * [0.5]
    assert whole(Warmup(1, Warmup(2, start=0.5)), 5) == [0, 0.5, 0.75, 1, 1]
    assert whole(Warmup(), 100)[:6] == [0, 0.2, 0.4, 0.6, 0.8, 1]


def plateaus(costs, factor, patience, threshold, cooldown, minimum):
    """PyTorch's scheduler, moved along one cost a time: the learning rate after each, from 1."""

    class Scheduler:
        lr, best, num_bad_epochs, cooldown_counter = 1.0, math.inf, 0, 0

        def step(self, current):
            is_better = current < self.best * (1.0 - threshold)
            if is_better:
                self.best = current
                self.num_bad_epochs = 0
            else:
                self.num_bad_epochs += 1
            in_cooldown = self.cooldown_counter > 0
            if in_cooldown:
                self.cooldown_counter -= 1
                self.num_bad_epochs = 0
            if self.num_bad_epochs > patience:
                new_lr = max(self.lr * factor, minimum)
                if self.lr - new_lr > 0:
                    self.lr = new_lr
                self.cooldown_counter = cooldown
                self.num_bad_epochs = 0

    scheduler, lrs = Scheduler(), [1.0]
    for cost in costs:
        scheduler.step(cost)
        lrs.append(scheduler.lr)
    return lrs


@given(
    costs=st.lists(st.sampled_from([0.1, 0.42, 0.5, 0.7, 0.99, 0.9999, 1.0, 1.5, math.nan, math.inf]), max_size=30),
    factor=st.sampled_from([0.0, 0.1, 0.5, 0.9]),
    patience=st.integers(0, 4),
    threshold=st.sampled_from([0.0, 1e-4, 0.1, 0.6]),
    cooldown=st.integers(0, 3),
    minimum=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
)
def test_plateau_is_pytorchs_rule(costs, factor, patience, threshold, cooldown, minimum):
    schedule = ReduceOnPlateau(factor, patience, threshold, cooldown, minimum)
    wanted = plateaus(costs, factor, patience, threshold, cooldown, minimum)
    assert [during(schedule, costs[:n])(5, 10) for n in range(len(costs) + 1)] == wanted


def test_plateau_by_hand():
    costs = [1.0, 0.5, 0.5, 0.5, 0.6, 0.5, 0.5, 0.49]
    levels = [ReduceOnPlateau(factor=0.5, patience=1).during(costs[:n])(0, 1) for n in range(len(costs) + 1)]
    assert levels == [1, 1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.25]
    cooled = [ReduceOnPlateau(0.5, 1, cooldown=2).during(costs[:n])(0, 1) for n in range(len(costs) + 1)]
    assert cooled == [1, 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.5]
    assert ReduceOnPlateau().during([1.0] * 4)(0, 1) == 1
    assert ReduceOnPlateau().during([1.0] * 5)(0, 1) == 0.1
    assert ReduceOnPlateau(minimum=0.05).during([1.0] * 99)(0, 1) == 0.05
    relative = ReduceOnPlateau(patience=0, threshold=0.5)
    assert [relative.during([4.0, cost])(0, 1) for cost in (1.9, 2.0, 3.0)] == [1, 0.1, 0.1]


def test_warmup_passes_the_costs_on():
    joined = Warmup(2, Warmup(1, ReduceOnPlateau(patience=0)))
    after = during(joined, [1.0, 1.0])
    assert whole(joined, 5) == [0, 0.5, 0, 1, 1]
    assert whole(after, 5) == [0, 0.5, 0, 0.1, 0.1]
    assert whole(during(Warmup(2, "plateau"), [1.0] * 5), 4) == [0, 0.5, 0.1, 0.1]
    assert during(Warmup(2, "cosine"), [1.0] * 9) == Warmup(2, "cosine")


def test_schedules_that_heed_no_costs_stay_themselves():
    def mine(step, total):
        return 0.5

    for schedule in (mine, Cosine(), constant):
        assert during(schedule, [1.0] * 9) is schedule


@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    total=st.integers(1, 60),
    length=st.one_of(st.integers(1, 100), st.floats(1e-6, 0.999)),
    share=st.floats(0.001, 1),
    growth=st.floats(1, 4),
)
def test_factors_are_finite_and_not_negative(name, total, length, share, growth):
    arguments = {
        "constant": {"factor": growth},
        "step": {"every": length, "factor": share},
        "polynomial": {"power": growth, "final": share},
        "cosine_restarts": {"period": length, "growth": growth, "final": share},
        "one_cycle": {"peak_at": share, "start": share, "final": share},
        "warmup": {"steps": length, "then": "one_cycle", "start": share},
        "plateau": {},
    }.get(name, {"final": share})
    for schedule in (SCHEDULES[name](**arguments), SCHEDULES[name]()):
        for step in range(total):
            assert 0 <= schedule(step, total) <= max(growth, 1)
            assert math.isfinite(schedule(step, total))


def test_names_make_schedules():
    assert list(SCHEDULES) == [
        "constant", "step", "exponential", "inverse_time", "polynomial", "cosine", "cosine_restarts", "warmup",
        "one_cycle", "plateau",
    ]  # fmt: skip
    for name, make in SCHEDULES.items():
        assert choose_schedule(name) == make()
    assert choose_schedule(None) is constant
    assert choose_schedule("step:every=10,factor=0.5") == Step(10, 0.5)
    assert choose_schedule("step:every=0.25") == Step(0.25)
    assert choose_schedule("warmup:steps=0.1,then=cosine") == Warmup(0.1, Cosine())
    assert choose_schedule("plateau:patience=2,factor=0.5") == ReduceOnPlateau(0.5, 2)
    assert choose_schedule("cosine_restarts:period=0.1,growth=2,final=0.1") == CosineRestarts(0.1, 2, 0.1)
    assert Warmup(0.1, "cosine:final=0.1") == Warmup(0.1, Cosine(0.1))

    def mine(step, total):
        return 0.25

    assert choose_schedule(mine) is mine


def test_schedules_show_what_they_are():
    assert repr(Warmup(0.1, "cosine")) == "Warmup(steps=0.1, then=Cosine(final=0.0), start=0.0)"
    assert repr(choose_schedule("constant")) == "Constant(factor=1.0)"


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (lambda: choose_schedule("cosin"), "unknown schedule 'cosin'"),
        (lambda: choose_schedule(3), "schedule is 3"),
        (lambda: choose_schedule(Cosine), "the schedule is the class Cosine"),
        (lambda: choose_schedule("cosine:finl=0.1"), "unknown setting of schedule cosine 'finl'"),
        (lambda: choose_schedule("cosine:final=low"), "schedule cosine: final is 'low'"),
        (lambda: choose_schedule("cosine:final=2"), "Cosine: final is 2.0"),
        (lambda: choose_schedule("cosine:final=nan"), "Cosine: final is nan"),
        (lambda: choose_schedule("warmup:then=cosine:final=0.1"), "then has settings of its own"),
        (lambda: choose_schedule("warmup:then=cosin"), "unknown schedule 'cosin'"),
        (lambda: choose_schedule("plateau:patience=2.5"), "schedule plateau: patience is '2.5'"),
        (lambda: Constant(-1), "Constant: factor is -1"),
        (lambda: Step(every=0), "Step: every is 0"),
        (lambda: Step(every=-1), "Step: every is -1"),
        (lambda: Step(every=2.5), "Step: every is 2.5"),
        (lambda: Step(every="3"), "Step: every is '3'"),
        (lambda: Step(every=math.nan), "Step: every is nan"),
        (lambda: Step(factor=0), "Step: factor is 0"),
        (lambda: Step(factor=1.5), "Step: factor is 1.5"),
        (lambda: Exponential(0), "Exponential: final is 0"),
        (lambda: Exponential(math.inf), "Exponential: final is inf"),
        (lambda: InverseTime(0), "InverseTime: final is 0"),
        (lambda: InverseTime(2), "InverseTime: final is 2"),
        (lambda: Polynomial(power=0), "Polynomial: power is 0"),
        (lambda: Polynomial(final=-0.1), "Polynomial: final is -0.1"),
        (lambda: Cosine(1.1), "Cosine: final is 1.1"),
        (lambda: CosineRestarts(period=0), "CosineRestarts: period is 0"),
        (lambda: CosineRestarts(growth=0.5), "CosineRestarts: growth is 0.5"),
        (lambda: CosineRestarts(final=2), "CosineRestarts: final is 2"),
        (lambda: OneCycle(peak_at=100), "OneCycle: peak_at is 100"),
        (lambda: OneCycle(start=-1), "OneCycle: start is -1"),
        (lambda: OneCycle(final=None), "OneCycle: final is None"),
        (lambda: Warmup(0), "Warmup: steps is 0"),
        (lambda: Warmup(start=2), "Warmup: start is 2"),
        (lambda: Warmup(then=7), "schedule is 7"),
        (lambda: Warmup(then=Cosine), "the schedule is the class Cosine"),
        (lambda: ReduceOnPlateau(factor=1), "ReduceOnPlateau: factor is 1"),
        (lambda: ReduceOnPlateau(patience=-1), "ReduceOnPlateau: patience is -1"),
        (lambda: ReduceOnPlateau(patience=1.5), "ReduceOnPlateau: patience is 1.5"),
        (lambda: ReduceOnPlateau(threshold=1), "ReduceOnPlateau: threshold is 1"),
        (lambda: ReduceOnPlateau(cooldown=-1), "ReduceOnPlateau: cooldown is -1"),
        (lambda: ReduceOnPlateau(minimum=2), "ReduceOnPlateau: minimum is 2"),
    ],
)
def test_nonsense_is_refused(make, cause):
    with pytest.raises(bp.ConfigError) as e:
        make()
    assert cause in e.value.cause
    assert e.value.cure


def test_the_default_threshold_of_plateau():
    """A fall of less than one part in ten thousand is none."""
    costs = [1.0, 1 - 0.9e-4, 1 - 0.95e-4]
    assert ReduceOnPlateau(patience=1).during(costs)(0, 1) < 1
    assert ReduceOnPlateau(patience=1).during([1.0, 1 - 1.1e-4, 1 - 2.3e-4])(0, 1) == 1
