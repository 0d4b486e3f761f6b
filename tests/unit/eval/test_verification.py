"""A release is what it says it is, and one that is not is told from it, whatever was changed.

Run: python -m pytest tests/unit/eval/test_verification.py
"""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import InputError
from eval.__main__ import main
from eval.release import folder as release_folder
from eval.release import reproduction, verification
from eval.release.hashes import differing, digest_of, hash_tensor, hash_tensors
from eval.release.verification import verify
from tests.releasing import make_upstream, read, write_release


def flip(path: Path, index: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[index] ^= 1 << bit
    path.write_bytes(data)


def resummed(folder: Path) -> Path:
    """As someone would leave it who covers up a change."""
    release_folder.write_checksums(folder)
    return folder


def test_an_untouched_release_is_rebuilt_from_base_edit_and_adapter(made, release) -> None:
    findings = verify(release, made[0] / "base")
    assert findings.problems == []
    assert any("make the same 21 tensors" in line for line in findings.held)


def test_one_flipped_bit_in_any_file_is_caught_and_named(made, release) -> None:
    names = [*release_folder.released_files(release), "SHA256SUMS"]
    assert len(names) > 20
    for name in names:
        path = release / name
        before = path.read_bytes()
        for index in {0, len(before) // 2, len(before) - 1}:
            flip(path, index)
            problems = list(verification._file_problems(release))
            named = name in problems[0] or name == "SHA256SUMS"
            assert problems, name
            assert named, problems
            path.write_bytes(before)
    assert list(verification._file_problems(release)) == []


@pytest.mark.parametrize("bit", [0, 4])
def test_a_bit_of_a_weight_is_caught_even_where_the_sums_were_made_anew(made, release, bit) -> None:
    flip(release / "model.safetensors", -7, bit)
    findings = verify(resummed(release), made[0] / "base")
    assert "1 of 21 tensors are not those of reproduce/tensors.json" in findings.problems[0]


def test_a_bit_of_a_weight_is_caught_where_sums_and_hashes_were_made_anew(made, release) -> None:
    flip(release / "model.safetensors", -7)
    path = release / "reproduce" / "tensors.json"
    record = read(release, "reproduce/tensors.json")
    record["weights"]["tensors"] = hash_tensors(release)
    record["weights"]["digest"] = digest_of(record["weights"]["tensors"])
    release_folder.artifacts.write_json(path, record)
    (problem,) = verify(resummed(release), made[0] / "base").problems
    assert "base, edit and adapter do not make these weights: 1 of 21 tensors differ" in problem


def test_a_swapped_adapter_is_caught(made, release) -> None:
    path = release / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(5)
    other = {n: torch.randn(t.shape, generator=generator) for n, t in tensors.items()}
    save_file(other, path, metadata={"format": "pt"})
    assert (
        "adapter/adapter_model.safetensors is not the file"
        in verify(release, made[0] / "base").problems[0]
    )
    (problem,) = verify(resummed(release), made[0] / "base").problems
    assert "do not make these weights: 4 of 21 tensors differ" in problem
    assert "up_proj" in problem or "down_proj" in problem


def test_another_base_is_caught_and_what_differs_is_named(
    made, release, make_model, tmp_path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(made[0] / "base", other)
    make_model(9).save_pretrained(other)
    problems = verify(release, other).problems
    assert any(f"{other} is not the base of this release: " in problem for problem in problems)
    shutil.copyfile(made[0] / "base" / "model.safetensors", other / "model.safetensors")
    (other / "chat_template.jinja").write_text("{{ messages }}")
    (problem,) = verify(release, other).problems
    assert (
        problem == f"{other / 'chat_template.jinja'} is not the file that the release was made from"
    )


def test_a_direction_that_is_not_the_edits_is_caught(made, release) -> None:
    torch.save(torch.ones(32), release / "refusal_dir.pth")
    (problem,) = verify(resummed(release), made[0] / "base").problems
    assert problem == "refusal_dir.pth is not the direction of edit.safetensors"


def test_missing_and_added_files_are_named_but_not_the_stores_and_the_hubs_own(
    made, release
) -> None:
    (release / "manifest.json").write_text("{}")
    (release / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (release / ".cache").mkdir()
    (release / ".cache" / "x").write_text("")
    assert verify(release, made[0] / "base").problems == []
    (release / "NOTICE").unlink()
    (release / "extra.bin").write_text("")
    problems = verify(release, made[0] / "base").problems
    assert problems == ["NOTICE is missing", "extra.bin is not in SHA256SUMS"]


def test_the_last_digits_may_differ_where_another_processor_computes(
    made, release, monkeypatch
) -> None:
    own = verification.rebuild

    def rounded_otherwise(*arguments):
        for name, tensor in own(*arguments):
            yield name, tensor * (1 + 2**-23) if "up_proj" in name else tensor

    monkeypatch.setattr(verification, "rebuild", rounded_otherwise)
    (problem,) = verify(release, made[0] / "base").problems
    assert "2 of 21 tensors differ" in problem
    monkeypatch.setattr(verification, "arithmetic", lambda: {"kind": "another"})
    findings = verify(release, made[0] / "base")
    assert findings.problems == []
    assert "2 differ in their last digits alone" in findings.held[-1]

    def far_off(*arguments):
        return ((name, tensor * 1.001) for name, tensor in own(*arguments))

    monkeypatch.setattr(verification, "rebuild", far_off)
    assert "do not make these weights" in verify(release, made[0] / "base").problems[0]


WHOLE = {"use_dora": True}


@pytest.mark.parametrize(
    ("lora", "is_streamed"),
    [({"rank_pattern": {"down_proj": 3}, "alpha_pattern": {"up_proj": 5}}, True), (WHOLE, False)],
)
def test_what_cannot_be_made_tensor_by_tensor_is_made_whole(
    make_model, byte_tokenizer, tmp_path, lora, is_streamed, monkeypatch
) -> None:
    upstream = make_upstream(tmp_path, make_model(0), byte_tokenizer, **lora)
    release = write_release(tmp_path, upstream)
    made_whole = []
    own = verification.rebuild.__globals__["_whole"]
    monkeypatch.setitem(
        verification.rebuild.__globals__, "_whole", lambda parts: made_whole.append(1) or own(parts)
    )
    findings = verify(release, tmp_path / "base")
    assert findings.problems == []
    assert bool(made_whole) != is_streamed


@pytest.mark.parametrize("family", ["qwen3_moe", "gemma3", "gpt2"])
def test_families_that_store_weights_in_their_own_way_are_rebuilt_too(
    build_model, tokenizer, tmp_path, family
) -> None:
    model = build_model(family, dtype=torch.float32)
    target = "c_attn" if family == "gpt2" else "q_proj"
    upstream = make_upstream(tmp_path, model, tokenizer, target_modules=[target])
    release = write_release(tmp_path, upstream)
    findings = verify(release, tmp_path / "base")
    assert findings.problems == []
    assert "base, edit and adapter make the same" in findings.held[-1]


def test_weights_in_bfloat16_and_in_shards_are_rebuilt_to_the_bit(
    make_model, byte_tokenizer, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(release_folder, "SHARD_SIZE", "40KB")
    model = make_model(0).to(torch.bfloat16)
    upstream = make_upstream(tmp_path, model, byte_tokenizer, "column_norm")
    release = write_release(tmp_path, upstream)
    assert len(list(release.glob("model-*.safetensors"))) > 1
    findings = verify(release, tmp_path / "base")
    assert findings.problems == []
    assert "make the same 21 tensors" in findings.held[-1]


def test_a_model_that_was_trained_whole_is_held_against_its_hashes_alone(made, tmp_path) -> None:
    folder, upstream = made
    upstream = dict(upstream) | {"train": tmp_path / "train"}
    shutil.copytree(upstream["abliteration"] / "model", tmp_path / "train" / "model")
    shutil.copyfile(folder / "train" / "summary.json", tmp_path / "train" / "summary.json")
    release = write_release(folder, upstream, "whole")
    findings = verify(release, folder / "base")
    assert findings.problems == []
    assert findings.held[-1].startswith("not rebuilt: all weights were trained")


def test_hashes_do_not_depend_on_how_a_model_is_cut_into_files(made, make_model, tmp_path) -> None:
    model = make_model(0)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    one = hash_tensors(tmp_path / "one")
    assert one == hash_tensors(tmp_path / "many")
    assert list(one) == sorted(one)
    name = "model.norm.weight"
    weight = model.state_dict()[name]
    assert one[name] == hash_tensor(name, weight)
    assert hash_tensor(name, weight.reshape(1, -1)) != one[name]
    assert hash_tensor(name, weight.bfloat16()) != one[name]
    assert differing(one, {**one, name: "x", "more": "y"}) == ["model.norm.weight", "more"]


def test_the_command_ends_with_a_code_that_says_what_happened(
    made, release, tmp_path, capsys
) -> None:
    base = str(made[0] / "base")
    assert main(["verify", str(release), "--base", base]) == 0
    assert "verified" in capsys.readouterr().out
    assert main(["verify", str(release)]) == 2
    assert "name its folder with --base" in capsys.readouterr().err
    assert main(["verify", str(tmp_path / "nowhere")]) == 2
    assert main(["verify", str(tmp_path)]) == 2
    assert "no release of this program" in capsys.readouterr().err
    flip(release / "results.json", 5)
    assert main(["verify", str(release), "--base", base]) == 1
    assert "DIFFERS  results.json is not the file that was published" in capsys.readouterr().err


def test_a_release_whose_record_is_no_record_is_told_without_a_traceback(made, release) -> None:
    (release / "reproduce" / "tensors.json").write_text("[]")
    with pytest.raises(InputError, match="is damaged, or of another version"):
        verify(resummed(release), made[0] / "base")
    (release / "edit.safetensors").write_bytes(b"no edit")
    problems = verify(release, made[0] / "base").problems
    assert problems[0] == "edit.safetensors is not the file that was published"
    assert "could not be looked at any further" in problems[-1]


def test_what_rounds_is_recorded(made) -> None:
    environment = read(made[0] / "release", "reproduce/environment.json")
    assert environment["arithmetic"] == reproduction.arithmetic()
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["data"].keys() == {"prompts.txt", "other.txt"}
