"""Numbers for codes: similar codes get similar numbers."""

import torch

from models.code_order import code_order

SCRAMBLED = torch.tensor([3, 19, 8, 14, 5, 11, 1, 17])  # what each place of a line is called


def places(count: int = 300) -> torch.Tensor:
    """Grids `[N,6,6]` of places 0..7, each next to the same or an adjoining place; place 0 is the most frequent."""
    steps = torch.randint(-1, 2, (2, count, 6), generator=torch.Generator().manual_seed(0)).cumsum(2)
    return (
        (steps[0, :, :, None] + steps[1, :, None]).clamp(-3, 4).add(3).mul(torch.arange(count).view(-1, 1, 1) % 4 > 0)
    )


def test_codes_lie_along_the_line_from_which_they_come():
    order = code_order(SCRAMBLED[places()], 20)
    numbers = [0, 2, 5, 7, 10, 12, 15, 17]  # eight, spread evenly over 20
    assert order[numbers].tolist() == SCRAMBLED.tolist()


def test_every_code_has_a_number():
    """Also one that no image has; and the smallest integer types will do."""
    codes = SCRAMBLED[places()]
    order = code_order(codes.to(torch.int16), 20)
    assert order.sort().values.equal(torch.arange(20)) and order.equal(code_order(codes, 20))


def test_few_codes():
    for used in ([7], [7, 2], [7, 2, 4]):
        codes = torch.tensor(used)[torch.randint(len(used), (9, 4, 4))]
        assert code_order(codes, 10).sort().values.equal(torch.arange(10))


def test_the_most_frequent_code_is_farthest_from_the_mask_token():
    codes = torch.tensor([4, 4, 4, 2, 0, 1])[torch.randint(6, (50, 4, 4), generator=torch.Generator().manual_seed(1))]
    assert code_order(codes, 8)[0] == 4
