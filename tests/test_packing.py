"""How groups are shared out to passes. (What a pass computes is in test_model.py.)"""

from plumbing.models.packing import batches_within


def test_batches_are_within_the_budget_and_as_many_as_asked_for():
    lengths = [50, 10, 40, 30, 20, 60]
    for budget in (1, 60, 100, 1000):
        for least in (1, 3, 6):
            batches = batches_within(lengths, budget, least)
            assert sorted(i for b in batches for i in b) == list(range(6))
            assert len(batches) >= least and all(batches)
            assert all(
                len(b) == 1 or len(b) * max(lengths[i] for i in b) <= budget for b in batches
            )
    assert len(batches_within(lengths, 1000)) == 1 and len(batches_within(lengths, 1)) == 6
