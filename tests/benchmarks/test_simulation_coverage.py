"""The table of what seeds of the simulator run."""

from benchmarks.simulation_coverage import HEAD, table


def test_a_room_has_the_shares_of_all_its_modules_and_names_those_that_run_least() -> None:
    def module(covered: int, branches: int) -> dict[str, dict[str, int]]:
        return {
            "summary": {
                "covered_lines": covered,
                "num_statements": 10,
                "covered_branches": branches,
                "num_branches": 4,
            }
        }

    files = {
        "serving/engine/a.py": module(10, 4),
        "serving/engine/b.py": module(5, 0),
        "serving/engine/c.py": module(9, 4),
        "serving/engine/d.py": module(10, 4),
        "serving/other/e.py": module(0, 0),
    }
    assert table(files) == f"{HEAD}\n| `serving/engine` | 85% | 75% | b 50%, c 90%, a 100% |"
