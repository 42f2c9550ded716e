"""What every member has to bring along so that its wheel can be used and published."""

from __future__ import annotations

import shutil
import zipfile
from hashlib import sha256

import pytest
from check_wheels import build_packages, content_problems
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from workspace import ROOT, Member, read_members

MEMBERS = read_members()
APACHE_2 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
CLASSIFIERS = {
    "Intended Audience :: Developers",
    "Intended Audience :: Science/Research",
    "Programming Language :: Python :: 3 :: Only",
    "Programming Language :: Python :: 3.11",
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
    "Typing :: Typed",
}

each_member = pytest.mark.parametrize("member", MEMBERS.values(), ids=lambda m: m.name)


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    build_packages(ROOT, folder)
    return folder


def test_the_licence_is_apache_2():
    digest = sha256((ROOT / "LICENSE").read_bytes()).hexdigest()
    assert digest == APACHE_2, "LICENSE is not the text that apache.org publishes"


@each_member
def test_members_have_the_licence_of_the_repository(member: Member):
    copy = member.folder / "LICENSE"
    assert copy.is_file(), f"copy the LICENSE of the repository to {copy}: a wheel needs its own"
    assert not copy.is_symlink(), "a link ends up in no sdist"
    assert copy.read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert member.project["license"] == "Apache-2.0"
    assert member.project["license-files"] == ["LICENSE"]


@each_member
def test_members_say_what_they_are(member: Member):
    project = member.project
    missing = CLASSIFIERS - set(project["classifiers"])
    assert not missing
    assert sum(c.startswith("Development Status :: ") for c in project["classifiers"]) == 1
    assert not any(c.startswith("License :: ") for c in project["classifiers"])  # PEP 639
    assert SpecifierSet(project["requires-python"]) == SpecifierSet(">=3.11")
    assert {"diffusion", "distillation"} < set(project["keywords"])
    assert project["description"].endswith(".")


@each_member
def test_members_bound_each_other_to_one_major_version(member: Member):
    for name in member.requirements.keys() & MEMBERS.keys():
        bounds, version = member.requirements[name].specifier, Version(MEMBERS[name].version)
        lower, upper = (
            [s.version for s in bounds if s.operator == operator] for operator in (">=", "<")
        )
        assert upper == [str(version.major + 1)], f"{member.name} needs {name}{bounds}"
        assert [Version(v).major for v in lower] == [version.major]
        assert version in bounds


@each_member
def test_wheel_and_sdist_are_complete(member: Member, dist):
    assert list(content_problems(member, dist)) == []


def test_a_wheel_without_licence_and_types_is_found_out(dist, tmp_path):
    member = MEMBERS["distill-protocols"]
    wheel = f"{member.module}-{member.version}-py3-none-any.whl"
    sdist = f"{member.module}-{member.version}.tar.gz"
    with zipfile.ZipFile(dist / wheel) as full, zipfile.ZipFile(tmp_path / wheel, "w") as bare:
        for name in full.namelist():
            if not name.endswith(("LICENSE", "py.typed")):
                text = full.read(name).replace(b"Apache-2.0", b"MIT")
                bare.writestr(name, text)
    shutil.copy(dist / sdist, tmp_path)
    problems = sorted(content_problems(member, tmp_path))
    assert len(problems) == 3
    assert "license_expression = 'MIT' and must have 'Apache-2.0'" in problems[0]
    assert "no distill_protocols-" in problems[1]
    assert "licenses/LICENSE" in problems[1]
    assert "no distill_protocols/py.typed" in problems[2]
