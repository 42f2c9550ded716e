"""Names of models that mean the same on other machines."""

import pytest
from distill_diffusers.folders import portable_name


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/home/me/models/wan", "wan"),
        ("/home/me/models/wan/", "wan"),
        ("./wan", "wan"),
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
        ("/home/me/hub/models--Wan-AI--Wan2.1-T2V/snapshots/0a1b2c", "Wan-AI/Wan2.1-T2V"),
        ("/data/models--of-mine/wan", "wan"),
    ],
)
def test_a_portable_name_holds_no_folder_of_this_machine(path: str, name: str) -> None:
    assert portable_name(path) == name
