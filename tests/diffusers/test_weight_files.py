"""What is written tensor by tensor is what safetensors' own reader reads."""

from __future__ import annotations

import json

import pytest
import torch
from distill_diffusers.export.files import write_weights
from distill_diffusers.weights.sources import in_groups
from distill_protocols import ContractError, TensorInfo, WeightsError
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NAMES = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=12
).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def tensors(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    names = draw(st.lists(NAMES, max_size=6, unique=True))
    return {
        name: torch.randn(draw(SHAPES), generator=generator).to(draw(st.sampled_from(DTYPES)))
        for name in names
    }


def facts_of(given_tensors):
    return {n: TensorInfo(tuple(t.shape), t.dtype) for n, t in given_tensors.items()}


def header_of(file):
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), 8 + length


@settings(deadline=None)
@given(tensors(), st.dictionaries(NAMES.filter(lambda n: n != "format"), st.text(max_size=9)))
def test_the_reader_finds_every_tensor_bit_for_bit(tmp_path_factory, given_tensors, metadata):
    file = tmp_path_factory.mktemp("w") / "w.safetensors"
    write_weights(file, facts_of(given_tensors), given_tensors.__getitem__, metadata)
    with safe_open(file, framework="pt") as stream:
        assert stream.metadata() == {"format": "pt", **metadata}
        assert set(stream.keys()) == set(given_tensors)
        for name, tensor in given_tensors.items():
            tensor_read = stream.get_tensor(name)
            assert tensor_read.dtype == tensor.dtype
            assert tensor_read.shape == tensor.shape
            assert (
                tensor_read.numpy(force=True).tobytes() == tensor.numpy().tobytes()
                if (tensor.dtype != torch.bfloat16)
                else torch.equal(tensor_read.view(torch.int16), tensor.view(torch.int16))
            )


@settings(deadline=None)
@given(tensors())
def test_tensors_begin_where_memory_does(tmp_path_factory, given_tensors):
    """At multiples of 64 bytes, as long as the sizes allow, and at whole numbers always."""
    file = tmp_path_factory.mktemp("w") / "w.safetensors"
    write_weights(file, facts_of(given_tensors), given_tensors.__getitem__)
    header, start = header_of(file)
    assert start % 64 == 0
    for name, tensor in given_tensors.items():
        begin, end = header[name]["data_offsets"]
        if (end - begin) % 64 == 0 and end > begin:
            assert begin % 64 == 0
        assert begin % tensor.dtype.itemsize == 0


def test_one_tensor_is_held_at_a_time(tmp_path):
    """The next is asked for only when the last has been written and let go."""
    import weakref

    alive = []
    infos = {f"t{i}": TensorInfo((8, 8), torch.float32) for i in range(5)}

    def read(name):
        assert not any(ref() is not None for ref in alive[:-1])
        tensor = torch.full((8, 8), float(name[1:]))
        alive.append(weakref.ref(tensor))
        return tensor

    write_weights(tmp_path / "w.safetensors", infos, read)
    tensors = load_file(tmp_path / "w.safetensors")
    assert [int(tensors[f"t{i}"][0, 0]) for i in range(5)] == [0, 1, 2, 3, 4]


def test_a_view_is_written_as_it_reads(tmp_path):
    """Transposed, sliced and expanded tensors hold other bytes than they show."""
    full = torch.arange(24.0).reshape(4, 6)
    views = {
        "t": full.T,
        "s": full[:, 1:3],
        "e": full[:1].expand(3, 6),
        "p": full.requires_grad_(),
    }
    write_weights(tmp_path / "w.safetensors", facts_of(views), views.__getitem__)
    tensors = load_file(tmp_path / "w.safetensors")
    assert all(torch.equal(tensors[name], view) for name, view in views.items())


def test_tensors_that_differ_from_the_header_are_refused(tmp_path):
    infos = {"a": TensorInfo((2,), torch.float32)}
    with pytest.raises(ContractError, match=r"a is \[3\] float32"):
        write_weights(tmp_path / "shape", infos, lambda name: torch.zeros(3))
    with pytest.raises(ContractError, match="bfloat16"):
        write_weights(tmp_path / "dtype", infos, lambda name: torch.zeros(2, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn])
def test_numbers_that_no_model_here_has_are_refused(tmp_path, dtype):
    infos = {"a": TensorInfo((2,), dtype)}
    with pytest.raises(WeightsError, match=str(dtype).removeprefix("torch.")):
        write_weights(tmp_path / "w", infos, lambda name: torch.zeros(2, dtype=dtype))
    assert not (tmp_path / "w").exists()


@given(sizes=st.lists(st.integers(0, 12), max_size=20), most=st.integers(1, 12))
def test_groups_of_tensors_are_as_large_as_they_may_be(sizes, most):
    names = [str(number) for number in range(len(sizes))]
    groups = list(in_groups(names, lambda name: sizes[int(name)], most))
    assert [name for group in groups for name in group] == names
    totals = [sum(sizes[int(name)] for name in group) for group in groups]
    assert all(
        total <= most or len(group) == 1 for total, group in zip(totals, groups, strict=True)
    )
    firsts = [sizes[int(group[0])] for group in groups[1:]]
    assert all(total + first > most for total, first in zip(totals, firsts, strict=False))
