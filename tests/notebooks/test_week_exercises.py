"""Exercises of every week: stubs fail, solutions pass, and every wrong answer is caught."""

import pytest

from shared.curriculum import exercises, weeks

WEEKS = [
    week.slug
    for week in weeks.discover()
    if week.status == weeks.READY or (week.folder / exercises.STUBS).exists()
]


@pytest.fixture(scope="module")
def outcome():
    """What every answer of a week gave, run once a week."""
    known = {}

    def run(slug):
        if slug not in known:
            known[slug] = exercises.run_tests(slug, ["exercises", "solutions", "wrong"])
        return known[slug]

    return run


def by_exercise(cards, results, answers):
    return {
        card.name: [r for r in results if r.exercise == card.name and r.answers == answers] for card in cards
    }


@pytest.mark.parametrize("slug", WEEKS)
def test_a_week_has_at_least_five_exercises_and_each_is_tested(outcome, slug):
    cards, results = outcome(slug)
    assert len(cards) >= 5
    for name, found in by_exercise(cards, results, "solutions").items():
        assert found, f"{name} has no test"


@pytest.mark.parametrize("slug", WEEKS)
def test_every_stub_is_not_started(outcome, slug):
    cards, results = outcome(slug)
    for name, found in by_exercise(cards, results, "exercises").items():
        assert {result.error for result in found} == {"NotImplementedError"}, f"{name}: {found}"


@pytest.mark.parametrize("slug", WEEKS)
def test_every_solution_passes(outcome, slug):
    cards, results = outcome(slug)
    for name, found in by_exercise(cards, results, "solutions").items():
        assert {result.error for result in found} == {None}, f"{name}: {found}"


@pytest.mark.parametrize("slug", WEEKS)
def test_every_exercise_has_two_wrong_answers_and_a_check_catches_each(outcome, slug):
    cards, results = outcome(slug)
    for card in cards:
        wrong = {}
        for result in results:
            if result.exercise == card.name and result.answers.startswith("wrong"):
                wrong.setdefault(result.answers, []).append(result)
        assert len(wrong) >= 2, f"{card.name} has {len(wrong)} wrong answers"
        for answers, found in wrong.items():
            caught = [result for result in found if result.error == "assertion"]
            assert caught, f"{card.name}, {answers}: {[result.error for result in found]}"
            told = [
                r for r in caught if r.message and not r.message.startswith(("assert ", "A check failed"))
            ]
            assert told, f"{card.name}, {answers}: no check says what is wrong: {caught[0].message}"
