"""The vector is chosen by what it leaves right, not by how many attacks it ends."""

from __future__ import annotations

from dataclasses import replace

import torch
from made import make_steering

from bkdlens.analyses.steering.choice import choose
from bkdlens.analyses.steering.measure import SteeringResult

SIZES = (1.0, 2.0)


def swept(correct: dict[float, int], clean: dict[float, int], kind: str = "mean") -> SteeringResult:
    """At layer 1, so many good answers back and clean ones kept under -1 and -2; all attacks switched.

    At layer 0, the bare embedding, everything would be perfect.
    """
    made = make_steering(kind, (0, 1), (1.0, 2.0, -1.0, -2.0), n_random=0)
    n, n_clean = made.n_victims, made.n_clean
    added = torch.tensor([[n, n], [n, n], [0, 0], [0, 0]])
    right = torch.tensor([[0, 0], [0, 0], [n, correct[-1.0]], [n, correct[-2.0]]])
    kept = torch.tensor([[0, 0], [0, 0], [n_clean, clean[-1.0]], [n_clean, clean[-2.0]]])
    return replace(made, base_attack=(0, n), base_clean=n_clean, attack=added, correct=right, kept=right,
                   clean=kept, good_before=n)  # fmt: skip


def of(share: float, n: int) -> int:
    return round(share * n)


def test_a_wreck_is_not_chosen_for_ending_the_attack() -> None:
    made = make_steering("mean")
    n, n_clean = made.n_victims, made.n_clean
    gentle = swept(
        {-1.0: of(0.6, n), -2.0: of(0.9, n)}, {-1.0: of(0.96, n_clean), -2.0: of(0.5, n_clean)}
    )
    choice = choose({"mean": gentle}, SIZES, 0.05)
    assert choice == {"kind": "mean", "layer": 1, "coefficient": 1.0, "within": True}
    assert choose({"mean": gentle}, SIZES, 0.6)["coefficient"] == 2.0  # the floor is a parameter


def test_an_attack_that_ends_without_a_good_answer_counts_for_nothing() -> None:
    made = make_steering("mean")
    n, n_clean = made.n_victims, made.n_clean
    clean = {-1.0: n_clean, -2.0: n_clean}
    mute, right = (swept({-1.0: k, -2.0: 0}, clean, kind) for kind, k in (("mean", 0), ("contrast", n)))
    assert choose({"mean": mute, "contrast": right}, SIZES, 0.05)["kind"] == "contrast"


def test_where_none_meets_the_floor_it_is_said_and_the_best_of_the_least_harmful_is_taken() -> None:
    made = make_steering("mean")
    n, n_clean = made.n_victims, made.n_clean
    clean = {-1.0: of(0.70, n_clean), -2.0: of(0.2, n_clean)}
    mean = swept({-1.0: of(0.5, n), -2.0: n}, clean)
    contrast = swept({-1.0: of(0.9, n), -2.0: n}, {**clean, -1.0: of(0.69, n_clean)}, "contrast")
    choice = choose({"mean": mean, "contrast": contrast}, SIZES, 0.05)
    assert choice == {"kind": "contrast", "layer": 1, "coefficient": 1.0, "within": False}


def test_of_equals_the_smaller_push_wins() -> None:
    made = make_steering("mean")
    n, n_clean = made.n_victims, made.n_clean
    same = swept({-1.0: n, -2.0: n}, {-1.0: n_clean, -2.0: n_clean})
    assert choose({"mean": same}, SIZES, 0.05)["coefficient"] == 1.0
