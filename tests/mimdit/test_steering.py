import pytest
import torch

from mimdit.mim import Routing
from mimdit.steering import check_experts, steer

GROUPS = ("spatial", "channel", "swin", "se")


def routing(*inter: float) -> Routing:
    blank = torch.zeros(1, 1, len(inter), 2)
    return Routing(torch.tensor(inter).view(1, 1, -1), blank, blank.long(), torch.zeros(1, 1, 4))


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, [0.1, 0.2, 0.3, 0.4]),
        ({"spatial": 0.5}, [0.5, 0.5 * 2 / 9, 0.5 * 3 / 9, 0.5 * 4 / 9]),
        ({"se": 1.0}, [0, 0, 0, 1]),
        ({"channel": 0.0}, [0.125, 0, 0.375, 0.5]),
        ({"spatial": 0.4, "channel": 0.3, "swin": 0.2, "se": 0.1}, [0.4, 0.3, 0.2, 0.1]),
    ],
    ids=str,
)
def test_others_share_what_is_left(given: dict[str, float], wanted: list[float]) -> None:
    out = steer(routing(0.1, 0.2, 0.3, 0.4), GROUPS, given)
    torch.testing.assert_close(out.inter[0, 0], torch.tensor(wanted, dtype=torch.float32))


def test_groups_without_weight_share_equally() -> None:
    """Sparse inter routing gives all but one group nothing."""
    out = steer(routing(0, 0.6, 0, 0), GROUPS, {"channel": 0.4})
    torch.testing.assert_close(out.inter[0, 0], torch.tensor([0.2, 0.4, 0.2, 0.2]))


def test_groups_of_one_name_share_its_weight() -> None:
    out = steer(routing(0.1, 0.3, 0.2, 0.4), ("se", "se", "swin", "swin"), {"se": 0.8})
    wanted = [0.2, 0.6, 0.2 / 3, 0.4 / 3]
    torch.testing.assert_close(out.inter[0, 0], torch.tensor(wanted))


def test_all_named_must_make_one() -> None:
    with pytest.raises(ValueError, match=r"as every group is named; got 0\.4"):
        check_experts(GROUPS, dict.fromkeys(GROUPS, 0.1))
