"""How groups are shared out to passes. (What a pass computes is in test_model.py.)"""

from types import SimpleNamespace

from plumbing.models.packing import batches_within, my_batches


def test_batches_are_within_the_budget_and_as_many_as_asked_for():
    lengths = [50, 10, 40, 30, 20, 60]
    for budget in (1, 60, 100, 1000):
        for least in (1, 3, 6):
            batches = batches_within(lengths, budget, least)
            assert sorted(i for b in batches for i in b) == list(range(6))
            assert len(batches) >= least and all(batches)
            sizes = [len(b) * max(lengths[i] for i in b) for b in batches if len(b) > 1]
            assert all(size <= budget for size in sizes)
    assert len(batches_within(lengths, 1000)) == 1 and len(batches_within(lengths, 1)) == 6


def test_flat_passes_are_filled_by_what_they_hold():
    """Padded to 60, two of these take 120 of 130 tokens; flat, four do."""
    lengths = [60, 40, 20, 10, 10]
    assert batches_within(lengths, 130) == [[0, 1], [2, 3, 4]]
    assert batches_within(lengths, 130, flat=True) == [[0, 1, 2, 3], [4]]


def test_a_process_trains_on_the_prompts_that_it_drew():
    """Prompts are drawn in turn, position by position; their pictures are then there already."""
    for rank in range(2):
        mine = my_batches([5] * 8, SimpleNamespace(rank=rank, world=2), 10)
        assert sorted(i for batch in mine for i in batch) == [*range(rank, 8, 2)]
