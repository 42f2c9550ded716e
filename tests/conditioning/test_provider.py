"""Where the negative condition comes from, and what the cache may be trusted with."""

from __future__ import annotations

import logging
import pickle

import pytest
import torch
from distill_conditioning import CachedConditioning, ConditioningConfig, DataConfig, LatentDataset
from distill_protocols import ConditioningError


def _text(condition) -> torch.Tensor:
    return condition.tensors["text"]


@pytest.fixture
def provide(tmp_path, encoder, make_folder):
    """Return ``provide(stored=..., prompt=...)``: a provider over a data set with that prompt."""

    def build(stored: str | None = None, prompt: str | None = None, by=encoder, cache=None):
        folder = tmp_path / f"data {stored}"
        if not folder.exists():
            make_folder(folder, 3, negative=stored)
        return CachedConditioning(
            ConditioningConfig(negative_prompt=prompt, cache=cache),
            encoder=by,
            dataset=LatentDataset(DataConfig(path=str(folder))),
            output_dir=tmp_path / "run",
        )

    return build


@pytest.mark.parametrize("prompt", [None, "ugly"])
def test_constants_come_first_and_the_encoder_is_left_alone(provide, encoder, prompt):
    expected = _text(encoder.encode_neg_condition("ugly"))
    encoder.calls.clear()
    provider = provide(stored="ugly", prompt=prompt)
    assert torch.equal(_text(provider.negative()), expected)
    assert encoder.calls == []


def test_another_prompt_than_the_constants_is_encoded_once(provide, encoder):
    provider = provide(stored="ugly", prompt="blurred")
    expected = _text(encoder.encode_neg_condition("blurred"))
    encoder.calls.clear()
    for _ in range(3):
        assert torch.equal(_text(provider.negative()), expected)
    assert encoder.calls == ["blurred"]


def test_the_empty_prompt_is_a_prompt(provide, encoder):
    assert len(provide(prompt="").negative()) == 1
    assert encoder.calls == [""]


def test_several_negatives_are_one_row_each_the_samplers_own_first(encoder, tmp_path, make_folder):
    folder = make_folder(tmp_path / "data", 3, negative="ugly")
    texts = ["blurred", "ugly", ""]
    expected = [_text(encoder.encode_neg_condition(text)) for text in texts]
    encoder.calls.clear()
    provider = CachedConditioning(
        ConditioningConfig(negative_prompt="blurred", more_negative_prompts=("ugly", "")),
        encoder=encoder,
        dataset=LatentDataset(DataConfig(path=str(folder))),
        output_dir=tmp_path / "run",
    )
    for _ in range(2):
        assert torch.equal(_text(provider.negatives()), torch.cat(expected))
    assert torch.equal(_text(provider.negative()), expected[0])
    assert encoder.calls == ["blurred", ""]  # the data set holds the other


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"more_negative_prompts": ("ugly",)}, "beside no negative_prompt"),
        ({"negative_prompt": "a", "more_negative_prompts": ("b", "a")}, "'a': stands there twice"),
    ],
)
def test_further_negatives_that_make_no_sense_are_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        ConditioningConfig(**options)


def test_no_negative_is_refused_with_both_ways_out(provide, encoder):
    with pytest.raises(ConditioningError, match=r"negative_prompt.*preprocess"):
        provide().negative()
    assert encoder.calls == []


def test_a_data_set_of_another_encoder_is_refused_with_both(provide, make_encoder):
    with pytest.raises(ConditioningError, match=r"encoder-a.*encoder-b"):
        provide(stored="", by=make_encoder("encoder-b"))


def test_accepted_entries_may_differ(tmp_path, make_folder, make_encoder):
    folder = make_folder(tmp_path / "data", 3, negative="")

    def build(*accept: str) -> CachedConditioning:
        return CachedConditioning(
            ConditioningConfig(),
            encoder=make_encoder("encoder-b"),
            dataset=LatentDataset(DataConfig(path=str(folder), accept=accept)),
            output_dir=tmp_path,
        )

    with pytest.raises(ConditioningError, match=r"text_encoder\.weights is encoder-a"):
        build("tokenizer")
    assert len(build("text_encoder").negative()) == 1


def test_an_encoder_without_fingerprint_is_trusted(provide, make_encoder):
    assert len(provide(stored="", by=make_encoder(None)).negative()) == 1


def test_the_cache_survives_the_run(provide, encoder, make_encoder):
    first = provide(prompt="ugly")
    negative, prompts = first.negative(), first.encode(["a", "b", "a"])
    assert encoder.calls == ["ugly", "a", "b"]
    later = make_encoder()
    second = provide(prompt="ugly", by=later)
    assert torch.equal(_text(second.negative()), _text(negative))
    assert torch.equal(_text(second.encode(["a", "b", "a"])), _text(prompts))
    assert later.calls == []
    assert torch.equal(_text(prompts)[0], _text(prompts)[2])


def test_a_prompt_and_its_negative_are_not_mixed_up(provide):
    provider = provide(prompt="same")
    assert not torch.equal(_text(provider.negative()), _text(provider.encode(["same"])))


def test_another_encoder_finds_nothing_in_the_cache(provide, make_encoder, tmp_path):
    def build(encoder):
        return CachedConditioning(ConditioningConfig(), encoder=encoder, output_dir=tmp_path)

    build(make_encoder("one")).encode(["a"])
    other = make_encoder("two")
    build(other).encode(["a"])
    assert other.calls == ["a"]


def test_without_a_fingerprint_nothing_is_kept_on_disk(make_encoder, tmp_path):
    nameless = make_encoder(None)
    provider = CachedConditioning(ConditioningConfig(), encoder=nameless, output_dir=tmp_path)
    provider.encode(["a"])
    provider.encode(["a"])
    assert nameless.calls == ["a"]
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_cache_is_in_the_configured_folder(provide, tmp_path):
    provide(cache=str(tmp_path / "elsewhere")).encode(["a", "b"])
    assert len(list((tmp_path / "elsewhere").glob("*.safetensors"))) == 2


@pytest.mark.parametrize("damage", ["other prompt", "flipped", "truncated", "pickle"])
def test_a_wrong_cache_file_is_encoded_again_and_logged(
    provide, make_encoder, tmp_path, caplog, damage
):
    good = _text(provide().encode(["a"]))
    folder = tmp_path / "run" / "cache"
    [file] = folder.glob("*.safetensors")
    content = file.read_bytes()
    if damage == "other prompt":
        provide().encode(["b"])
        [other] = set(folder.glob("*.safetensors")) - {file}
        file.write_bytes(other.read_bytes())
    else:
        flipped = content[:-1] + bytes([content[-1] ^ 64])
        file.write_bytes(
            {"flipped": flipped, "truncated": content[:-5], "pickle": pickle.dumps(content)}[damage]
        )
    later = make_encoder()
    with caplog.at_level(logging.WARNING):
        assert torch.equal(_text(provide(by=later).encode(["a"])), good)
    assert later.calls == ["a"]
    assert file.name in caplog.text
    assert file.read_bytes() == content


def test_the_fingerprint_is_asked_once(make_encoder, tmp_path):
    """An encoder that is downloaded at the first prompt has one only from then on."""
    late = make_encoder(None)
    provider = CachedConditioning(ConditioningConfig(), encoder=late, output_dir=tmp_path)
    provider.encode(["a"])
    late.fingerprint = "encoder-a"
    provider.encode(["a"])
    assert late.calls == ["a"]


def test_stored_embeddings_are_trusted_and_logged(provide, make_encoder, caplog):
    with caplog.at_level(logging.INFO):
        provider = provide(stored="", by=make_encoder(None))
        provider.negative()
    assert caplog.text.count("no text encoder on this machine") == 1
