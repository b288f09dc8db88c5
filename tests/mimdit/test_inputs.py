import numpy as np
import pytest
import torch
from PIL import Image

from mimdit.inputs import to_tensor

RNG = np.random.default_rng(0)


def test_sixteen_bits_of_arrays_and_pictures() -> None:
    deep = RNG.integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    wanted = torch.from_numpy(deep.astype(np.float32) / np.float32(65535)).permute(2, 0, 1)[None]
    assert torch.equal(to_tensor(deep), wanted)
    gray = Image.fromarray(deep[..., 0])
    assert gray.mode == "I;16"
    assert torch.equal(to_tensor(gray), wanted[:, :1].expand(-1, 3, -1, -1))
    with pytest.raises(ValueError, match="whole numbers from 0 to 65535, got -3 to 4"):
        to_tensor(Image.fromarray(np.array([[-3, 4]], np.int32)))


def test_float_arrays_are_neither_copied_nor_changed() -> None:
    array = RNG.random((5, 7, 3), dtype=np.float32)
    assert to_tensor(array).data_ptr() == array.ctypes.data
    array[0, 0, 0] = 1.0005
    assert to_tensor(array).max() == 1
    assert array.max() > 1


def test_arrays_that_torch_cannot_share() -> None:
    array = RNG.random((5, 7, 3), dtype=np.float32)
    fixed = array[::-1].copy()
    fixed.flags.writeable = False
    for other in (array[::-1], fixed, array[::-1].astype(np.float64)):
        assert torch.equal(to_tensor(other), to_tensor(array[::-1].copy()))


def test_whole_numbers_of_other_types_are_refused_by_name() -> None:
    deep = RNG.integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    assert torch.equal(to_tensor(deep.astype(">u2")), to_tensor(deep))
    with pytest.raises(ValueError, match=r"expected uint8, uint16 or floats .* got int64"):
        to_tensor(deep.astype(np.int64))
