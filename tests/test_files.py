"""Names that stay inside a folder."""

import numpy as np
import pytest

from vsod_models.data.records import Record
from vsod_models.errors import InputError
from vsod_models.files import inside

LEAD_OUTSIDE = ["", ".", "..", "../x", "/etc", "a/b", "a/../b", "a\\b", "a\0b", "a\nb"]


@pytest.mark.parametrize("name", LEAD_OUTSIDE)
def test_a_name_that_leads_outside_is_refused_before_a_path_is_made_of_it(tmp_path, name):
    with pytest.raises(InputError, match="is not the name of a file or folder in it"):
        inside(tmp_path, "bear", name)


@pytest.mark.parametrize("name", ["bear", "..bear", "bear..", "a b", "clip.v1", "\u732b"])
def test_any_other_name_is_taken_as_it_is(tmp_path, name):
    assert inside(tmp_path, name, "00000.png") == tmp_path / name / "00000.png"


@pytest.mark.parametrize("name", LEAD_OUTSIDE)
def test_no_record_has_a_name_that_leads_outside(name):
    def picture():
        return np.zeros((2, 2, 3), np.uint8)

    with pytest.raises(InputError, match="plain names"):
        Record(name, 0, "00000", picture, None, "val")
    with pytest.raises(InputError, match="plain names"):
        Record("bear", 0, name, picture, None, "val")
