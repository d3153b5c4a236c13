"""JSON files as others may have made them."""

import os

import pytest

from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import read_json


@pytest.mark.parametrize(
    "make",
    [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/null")],
    ids=["a pipe, which would be waited for", "a directory", "a device, which may never end"],
)
def test_what_is_no_file_is_not_read(tmp_path, make):
    path = tmp_path / "config.json"
    make(path)
    with pytest.raises(InputError, match=r"config\.json is no file"):
        read_json(path)
