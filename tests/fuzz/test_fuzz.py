"""Random modules in CI: a fixed set of programs, the same every time. ``make fuzz`` runs others, for hours."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from fuzzing import Outcome, Statistics, centering_left_out, check, examine
from hypothesis import HealthCheck, Phase, given, seed, settings
from random_modules import INSTRUCTIONS, Program, programs, random_program
from shrinking import shrink

PARTS, PROGRAMS_PER_PART = 5, 40


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are tiny: several threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check_programs(part: int, look: Callable[[Program], Outcome]) -> Statistics:
    """Look at a fixed set of programs; one that goes wrong is shrunk by hypothesis."""
    outcomes: list[Outcome] = []

    @seed(part)
    @settings(
        max_examples=PROGRAMS_PER_PART,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(programs())
    def run(program: Program) -> None:
        outcomes.append(look(program))

    run()
    statistics = Statistics()
    statistics.add(outcomes)
    return statistics


@pytest.mark.parametrize("part", range(PARTS))
def test_programs_do_what_eager_does(part: int) -> None:
    compiler = "aot" if part == PARTS - 1 else "none"
    statistics = check_programs(part, lambda program: check(program, compiler))
    assert statistics.graphs >= PROGRAMS_PER_PART
    assert statistics.with_a_folded_site >= 0.25 * statistics.graphs
    assert statistics.folded >= 0.15 * statistics.sites
    assert statistics.unsupported <= 0.05 * statistics.graphs


def test_gradients_of_programs_are_eagers() -> None:
    statistics = check_programs(PARTS, lambda program: check(program, training=True))
    assert statistics.with_a_folded_site >= 0.2 * statistics.graphs
    # Autograd refuses programs that write into what the way back needs.
    assert statistics.unsupported <= 0.4 * statistics.graphs


def test_every_instruction_occurs() -> None:
    drawn = [random_program(seed) for seed in range(500)]
    used = {name for program in drawn for name in program.instructions}
    assert {function.__name__ for functions in INSTRUCTIONS.values() for function in functions} == used


def test_control_without_centering_results_change() -> None:
    """Without the centering most programs that fold something differ; a few read nothing but a variance."""
    folding = [program for program in map(random_program, range(16)) if examine(program).folded]
    assert len(folding) >= 5
    with centering_left_out():
        different = [program for program in folding if examine(program).problem]
    assert len(different) >= 0.7 * len(folding)


def test_a_failing_program_is_shrunk() -> None:
    def fails(program: Program) -> bool:
        return bool(examine(program).problem)

    with centering_left_out():
        program = next(program for program in map(random_program, range(20)) if fails(program))
        small = shrink(program, fails)
        assert fails(small)
    assert len(small.statements) <= 4 < len(program.statements)


def test_a_seed_makes_the_same_program() -> None:
    assert random_program(7) == random_program(7) != random_program(8)
