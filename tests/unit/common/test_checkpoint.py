"""An edit applied to the files of a model gives what the edit in memory gives, and touches nothing else.

Run: make setup && .venv/bin/python -m pytest tests/unit/common/test_checkpoint.py
"""

import dataclasses
import errno
import fcntl
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from common import checkpoint as streaming
from common.architecture import DiskTensor, find_writers
from common.checkpoint import SIDECAR, apply_to_checkpoint
from common.edits import (
    Addition,
    Removal,
    apply_to_weights,
    component_along,
    edited_bias,
    load_edit,
)
from common.errors import InputError, StageError
from common.shards import read_shards
from common.slices import edit_in_place
from common.stored_writers import open_checkpoint, placed_writers
from tests.conftest import FAMILIES
from tests.editing import mixed_edit


def _save(model, folder, shard_size="20KB"):
    model.save_pretrained(folder, max_shard_size=shard_size)
    return folder


def _edit_in_memory(model, edit):
    """The same edit by the same arithmetic, on the weights as they lie in memory."""
    with torch.no_grad():
        for writer in find_writers(model):
            if writer.name not in edit.removals:
                continue
            basis, strengths = edit.basis(writer.name), edit.strengths(writer.name)
            keep_norm = edit.removals[writer.name].keep_norm
            edit_in_place(writer.weight, basis, strengths, keep_norm, writer.layout)
            if writer.bias is not None:
                writer.bias.copy_(edited_bias(writer.bias, basis, strengths))


def _tensors(folder):
    return {name: t for shard in read_shards(folder) for name, t in load_file(shard.path).items()}


def _bytes(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def source(build_model, tmp_path):
    """A sharded Llama in float32, with other files."""
    model = build_model("llama", dtype=torch.float32)
    folder = _save(model, tmp_path / "source")
    (folder / "LICENSE").write_text("free", encoding="utf-8")
    return folder, model


@pytest.mark.parametrize("keep_norm", ["none", "column", "row"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_edited_files_hold_what_the_edit_in_memory_gives_bit_for_bit(
    family, keep_norm, build_model, tmp_path
):
    model = build_model(family, dtype=torch.float32)
    edit = mixed_edit(model, keep_norm)
    apply_to_checkpoint(_save(model, tmp_path / "source"), edit, tmp_path / "output")
    original = {name: p.clone() for name, p in model.named_parameters()}
    loaded = type(model).from_pretrained(tmp_path / "output", dtype=torch.float32)
    _edit_in_memory(model, edit)
    after = dict(loaded.named_parameters())
    assert all(torch.equal(p, after[name]) for name, p in model.named_parameters())
    changed = {name for name in original if not torch.equal(original[name], after[name])}
    weights = {f"{w.name}.{w.parameter}" for w in find_writers(model) if w.name in edit.removals}
    assert weights <= changed
    assert all(name.endswith("bias") for name in changed - weights)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_in_float64_files_and_memory_agree_within_rounding(family, build_model, tmp_path):
    model = build_model(family)
    edit = mixed_edit(model)
    written = apply_to_checkpoint(_save(model, tmp_path / "source"), edit, tmp_path / "output")
    loaded = type(model).from_pretrained(tmp_path / "output", dtype=torch.float64)
    before = {
        w.name: component_along(w.weight, edit.basis(w.name), w.layout).norm().item()
        for w in find_writers(model)
        if w.name in edit.removals
    }
    apply_to_weights(model, edit)
    after = dict(loaded.named_parameters())
    for name, parameter in model.named_parameters():
        # transformers loads the routers of some families in float32, whatever is asked for; they are no writers.
        assert after[name].dtype == torch.float64 or ".mlp.gate." in name, name
        expected = parameter.to(after[name].dtype)
        torch.testing.assert_close(after[name], expected, rtol=0, atol=1e-13)
    assert set(written) == set(edit.removals)
    for writer in find_writers(model):
        if writer.name in edit.removals:
            left = component_along(writer.weight, edit.basis(writer.name), writer.layout).norm()
            assert written[writer.name].before == pytest.approx(before[writer.name], rel=1e-10)
            assert written[writer.name].after == pytest.approx(left.item(), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_files_keep_their_type_and_lose_the_direction_up_to_rounding(
    dtype, build_model, tmp_path
):
    model = build_model("qwen3_moe", dtype=dtype)
    edit = mixed_edit(model)
    written = apply_to_checkpoint(_save(model, tmp_path / "source"), edit, tmp_path / "output")
    loaded = type(model).from_pretrained(tmp_path / "output", dtype=dtype)
    _edit_in_memory(model, edit)
    assert all(
        torch.equal(p, dict(loaded.named_parameters())[n]) for n, p in model.named_parameters()
    )
    alone = [w for name, w in written.items() if len(edit.removals[name].vectors) == 1]
    assert max(each.after / each.before for each in alone) < 5e-3


@pytest.mark.parametrize("shard_size", ["20KB", "1GB"])
def test_what_the_edit_does_not_name_stays_as_it_is_byte_for_byte(
    shard_size, build_model, tmp_path
):
    model = build_model("llama", dtype=torch.bfloat16)
    source, output = _save(model, tmp_path / "source", shard_size), tmp_path / "output"
    (source / "LICENSE").write_text("free", encoding="utf-8")
    shutil.copy(source / "LICENSE", source / "pytorch_model.bin")
    (source / "extra").mkdir()
    (source / "extra" / "template.jinja").write_text("{{ x }}", encoding="utf-8")
    before = _bytes(source)
    edit = mixed_edit(model)
    apply_to_checkpoint(source, edit, output)
    after = _bytes(output)
    assert _bytes(source) == before
    assert set(before) - set(after) == {"pytorch_model.bin"}  # it would hold unedited weights
    assert len(read_shards(source)) == (1 if shard_size == "1GB" else len(read_shards(output)))
    changed = {f"{name}.weight" for name in edit.removals}
    for shard in read_shards(source):
        old, new = before.pop(shard.name), after.pop(shard.name)
        head = shard.tensors[0].begin
        assert old[:head] == new[:head], "the header"
        for tensor in shard.tensors:
            same = old[tensor.begin : tensor.end] == new[tensor.begin : tensor.end]
            assert same == (tensor.name not in changed), tensor.name
    assert all(after[name] == before[name] for name in after)


def test_layer_1_is_not_taken_for_layer_10(build_model, tmp_path):
    model = build_model("llama", dtype=torch.float32, num_hidden_layers=11)
    edit = mixed_edit(model)
    strengths = {name: (0.0,) if ".layers.1." in name else (1.0,) for name in edit.removals}
    removals = {name: Removal(("direction",), strengths[name]) for name in edit.removals}
    edit = dataclasses.replace(edit, removals=removals)
    apply_to_checkpoint(_save(model, tmp_path / "source"), edit, tmp_path / "output")
    old, new = _tensors(tmp_path / "source"), _tensors(tmp_path / "output")
    name = "model.layers.{}.mlp.down_proj.weight"
    assert torch.equal(old[name.format(1)], new[name.format(1)])
    assert not torch.equal(old[name.format(10)], new[name.format(10)])


def test_a_file_without_edited_tensors_is_linked_and_an_edited_one_never(source, tmp_path):
    folder, model = source
    edit = mixed_edit(model)
    apply_to_checkpoint(folder, edit, tmp_path / "output")
    names = {f"{name}.weight" for name in edit.removals}
    shared = 0
    for shard in read_shards(folder):
        is_edited = any(tensor.name in names for tensor in shard.tensors)
        is_linked = shard.path.samefile(tmp_path / "output" / shard.name)
        assert is_linked == (not is_edited)
        shared += is_linked
    assert shared > 0


def test_links_of_the_hubs_cache_are_followed(source, tmp_path):
    folder, model = source
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in folder.iterdir():
        (snapshot / path.name).symlink_to(path)
    apply_to_checkpoint(folder, mixed_edit(model), tmp_path / "one")
    apply_to_checkpoint(snapshot, mixed_edit(model), tmp_path / "other")
    assert _bytes(tmp_path / "one") == _bytes(tmp_path / "other")
    assert not any(path.is_symlink() for path in (tmp_path / "other").iterdir())


def test_a_clone_patched_in_place_gives_the_same_bytes_as_a_copy(source, tmp_path, monkeypatch):
    """Stands in for a file system that shares blocks: the clone is there whole before anything is edited."""
    folder, model = source
    apply_to_checkpoint(folder, mixed_edit(model), tmp_path / "copied")

    def clone(file, request, descriptor):
        if request != streaming.FICLONE:
            raise OSError(errno.ENOTTY, "not this one")
        os.pwrite(file.fileno(), os.pread(descriptor, 1 << 30, 0), 0)

    monkeypatch.setattr(streaming.fcntl, "ioctl", clone)
    apply_to_checkpoint(folder, mixed_edit(model), tmp_path / "cloned")
    assert _bytes(tmp_path / "copied") == _bytes(tmp_path / "cloned")


@pytest.mark.parametrize("stop_after", [0, 1, 3, 6])
@pytest.mark.parametrize("shard_size", ["20KB", "1GB"])
def test_a_stopped_run_is_gone_on_with_and_does_nothing_twice(
    stop_after, shard_size, build_model, tmp_path, monkeypatch
):
    model = build_model("llama", dtype=torch.float32)
    source, output, edit = (
        _save(model, tmp_path / "source", shard_size),
        tmp_path / "o",
        mixed_edit(model),
    )
    apply_to_checkpoint(source, edit, tmp_path / "whole")
    edited: list[str] = []
    own = streaming._edit_tensor

    def count(tensor, placed, edit):
        if len(edited) == stop_after:
            edited.append("stopped")
            raise KeyboardInterrupt
        edited.append(placed.stored.name)
        return own(tensor, placed, edit)

    monkeypatch.setattr(streaming, "_edit_tensor", count)
    with pytest.raises(KeyboardInterrupt):
        apply_to_checkpoint(source, edit, output)
    assert not output.exists()
    first, edited[:] = edited[:-1], []
    stop_after = -1
    written = apply_to_checkpoint(source, edit, output)
    assert not set(first) & set(edited)
    assert len(first) + len(edited) == len(edit.removals)
    assert _bytes(output) == _bytes(tmp_path / "whole")
    assert written == apply_to_checkpoint(source, edit, tmp_path / "again")
    assert not list(tmp_path.glob(".*.partial"))


def test_a_partial_folder_of_another_edit_is_not_gone_on_with(source, tmp_path, monkeypatch):
    folder, model = source
    other = mixed_edit(model, "column")

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(streaming, "_require_change", stop)
        with pytest.raises(KeyboardInterrupt):
            apply_to_checkpoint(folder, other, tmp_path / "output")
    apply_to_checkpoint(folder, mixed_edit(model), tmp_path / "output")
    apply_to_checkpoint(folder, mixed_edit(model), tmp_path / "fresh")
    assert _bytes(tmp_path / "output") == _bytes(tmp_path / "fresh")


def test_after_a_crash_of_the_machine_only_finished_files_are_believed(
    source, tmp_path, monkeypatch
):
    folder, model = source
    edit = mixed_edit(model)
    apply_to_checkpoint(folder, edit, tmp_path / "fresh")
    own, seen = streaming._edit_tensor, []

    def stop(tensor, placed, edit):
        seen.append(placed.shard.name)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return own(tensor, placed, edit)

    with monkeypatch.context() as patch:
        patch.setattr(streaming, "_edit_tensor", stop)
        with pytest.raises(KeyboardInterrupt):
            apply_to_checkpoint(folder, edit, tmp_path / "output")
    partial = tmp_path / ".output.partial"
    lines = [json.loads(line) for line in (partial / "journal.jsonl").read_text().splitlines()]
    finished = {line["part"] for line in lines[1:] if "finished" in line}
    for line in lines[1:]:
        line["boot"] = "an earlier one"
    (partial / "journal.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"pa'
    )
    # What was not synced can be anything now; a link is the source itself.
    for path in (partial / "model").iterdir():
        if path.name not in finished and path.stat().st_nlink == 1:
            path.write_bytes(b"\0" * path.stat().st_size)
    apply_to_checkpoint(folder, edit, tmp_path / "output")
    assert _bytes(tmp_path / "output") == _bytes(tmp_path / "fresh")


def test_two_processes_do_not_work_in_one_folder(source, tmp_path):
    folder, model = source
    partial = tmp_path / ".output.partial"
    partial.mkdir()
    with (partial / "journal.jsonl").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another process is at work"):
            apply_to_checkpoint(folder, mixed_edit(model), tmp_path / "output")


def test_tied_embeddings_are_left_alone_and_an_edit_of_them_is_refused(build_model, tmp_path):
    model = build_model("llama", dtype=torch.float32, tie_word_embeddings=True)
    source, edit = _save(model, tmp_path / "source"), mixed_edit(model)
    apply_to_checkpoint(source, edit, tmp_path / "output")
    name = "model.embed_tokens.weight"
    assert torch.equal(_tensors(source)[name], _tensors(tmp_path / "output")[name])
    wrong = mixed_edit(build_model("llama"))
    with pytest.raises(InputError, match="also uses as its unembedding"):
        apply_to_checkpoint(source, wrong, tmp_path / "other")


def test_an_addition_goes_into_the_bias_where_there_is_one_and_beside_the_weights_where_not(
    build_model, tmp_path
):
    model = build_model("llama", dtype=torch.float32, attention_bias=True)
    o_proj, down_proj = "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"
    additions = {o_proj: Addition("second", 2.5), down_proj: Addition("second", -1.0)}
    edit = mixed_edit(model, additions=additions)
    apply_to_checkpoint(_save(model, tmp_path / "source"), edit, tmp_path / "output")
    basis, strengths = edit.basis(o_proj), edit.strengths(o_proj)
    bias = edited_bias(model.get_submodule(o_proj).bias, basis, strengths).double()
    expected = (bias + 2.5 * edit.vectors["second"]).float()
    assert torch.equal(_tensors(tmp_path / "output")[f"{o_proj}.bias"], expected)
    beside = load_edit(tmp_path / "output" / SIDECAR)
    assert dict(beside.additions) == {down_proj: additions[down_proj]}
    assert not beside.removals
    with pytest.raises(InputError, match="additions of an earlier edit"):
        apply_to_checkpoint(tmp_path / "output", edit, tmp_path / "twice")


@pytest.mark.parametrize(
    ("family", "options"), [("gemma2", {"attention_bias": True}), ("gpt_oss", {})]
)
def test_behind_a_norm_or_a_router_a_bias_holds_no_addition(family, options, build_model, tmp_path):
    model = build_model(family, dtype=torch.float32, **options)
    writer = next(
        w
        for w in find_writers(model)
        if w.bias is not None and (w.post_norm is not None or w.layout == "experts_transposed")
    )
    edit = mixed_edit(model, removals={}, additions={writer.name: Addition("direction", 1.0)})
    apply_to_checkpoint(_save(model, tmp_path / "source"), edit, tmp_path / "output")
    old, new = _tensors(tmp_path / "source"), _tensors(tmp_path / "output")
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert set(load_edit(tmp_path / "output" / SIDECAR).additions) == {writer.name}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_writers_read_off_the_files_are_those_of_the_model(family, build_model, tmp_path):
    model = build_model(family)
    found = placed_writers(open_checkpoint(_save(model, tmp_path / "source")))
    for one, other in zip(found, find_writers(model), strict=True):
        for field in ("name", "parameter", "layout", "component", "block", "tied"):
            assert getattr(one, field) == getattr(other, field)
        if other.post_norm_gain is not None:
            assert torch.equal(one.post_norm_gain, other.post_norm_gain)
        else:
            assert one.post_norm_gain is None


# Mutations: a mistake that keeps all shapes must not go unseen.


def test_the_wrong_side_of_a_square_weight_gives_other_files(source, tmp_path, monkeypatch):
    folder, model = source
    edit = mixed_edit(model)
    right = apply_to_checkpoint(folder, edit, tmp_path / "right")
    own = streaming._edit_tensor

    def on_the_wrong_side(tensor, placed, edit):
        if tensor.shape[0] == tensor.shape[1]:
            wrong = DiskTensor(placed.place.writer, "weight", "conv1d")
            placed = dataclasses.replace(placed, place=wrong)
        return own(tensor, placed, edit)

    monkeypatch.setattr(streaming, "_edit_tensor", on_the_wrong_side)
    apply_to_checkpoint(folder, edit, tmp_path / "wrong")
    name = "model.layers.0.self_attn.o_proj"
    wrong = _tensors(tmp_path / "wrong")[f"{name}.weight"]
    left = component_along(wrong, edit.basis(name), "linear").norm()
    assert left > 0.5 * right[name].before


def test_a_skipped_expert_shows_in_what_is_left(build_model, tmp_path, monkeypatch):
    model = build_model("mixtral", dtype=torch.float32)
    edit = mixed_edit(model)
    edit = dataclasses.replace(
        edit, removals=dict.fromkeys(edit.removals, Removal(("direction",), (1.0,)))
    )
    source = _save(model, tmp_path / "source")
    own = streaming._edit_tensor

    def skip(tensor, placed, edit):
        kept = tensor.clone()
        result = own(tensor, placed, edit)
        if placed.place.expert == 1:
            tensor.copy_(kept)
            return result[0], result[0]
        return result

    monkeypatch.setattr(streaming, "_edit_tensor", skip)
    written = apply_to_checkpoint(source, edit, tmp_path / "output")
    for name, each in written.items():
        share = each.after / each.before
        assert (share > 0.2) if name.endswith("experts") else (share < 1e-5)


def test_a_weight_that_does_not_change_is_reported_and_nothing_appears(build_model, tmp_path):
    model = build_model("llama", dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    source = _save(model, tmp_path / "source")
    with pytest.raises(StageError, match=r"model\.layers\.1\.mlp\.down_proj did not change"):
        apply_to_checkpoint(source, mixed_edit(model), tmp_path / "output")
    assert not (tmp_path / "output").exists()


# What does not fit is refused before anything is written.


def _refused(source, edit, output, match):
    with pytest.raises(InputError, match=match):
        apply_to_checkpoint(source, edit, output)
    assert not output.exists()
    assert not list(output.parent.glob(".*.partial"))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_hidden_layers": 2}, "made for 2 layers, this model has 3"),
        ({"hidden_size": 64}, "have 32 numbers, but .* has d_model 32|d_model"),
    ],
)
def test_an_edit_of_another_depth_or_width_is_refused(
    options, match, source, build_model, tmp_path
):
    folder, _ = source
    edit = mixed_edit(build_model("llama", **options))
    if "hidden_size" in options:
        edit = dataclasses.replace(edit, vectors={n: torch.ones(64).double() for n in edit.vectors})
    _refused(folder, edit, tmp_path / "output", match)


def test_an_edit_of_another_family_is_refused(source, build_model, tmp_path):
    folder, model = source
    _refused(folder, mixed_edit(build_model("mixtral")), tmp_path / "output", "do not hold")
    named = mixed_edit(model, about={"model_type": "mistral"})
    _refused(folder, named, tmp_path / "output", "for the architecture 'mistral', this is 'llama'")


def test_a_writer_that_the_edit_does_not_know_is_refused(source, tmp_path):
    folder, model = source
    edit = mixed_edit(model)
    removals = dict(edit.removals)
    removals.pop("model.layers.1.mlp.down_proj")
    edit = dataclasses.replace(edit, removals=removals)
    _refused(
        folder, edit, tmp_path / "output", r"layers\.1\.mlp\.down_proj, which the edit does not"
    )


@pytest.mark.parametrize("name", ["experts.1.w2", "o_proj"])
def test_a_checkpoint_that_lacks_a_writers_tensor_is_refused(name, build_model, tmp_path):
    model = build_model("mixtral", dtype=torch.float32)
    source = _save(model, tmp_path / "source", "1GB")
    tensors = load_file(source / "model.safetensors")
    gone = next(each for each in tensors if "layers.1." in each and name in each)
    del tensors[gone]
    save_file(tensors, source / "model.safetensors")
    _refused(source, mixed_edit(model), tmp_path / "output", "incomplete")


def test_a_quantized_checkpoint_is_refused(source, tmp_path):
    folder, model = source
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(settings))
    _refused(folder, mixed_edit(model), tmp_path / "output", "is quantized")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
def test_a_packed_tensor_is_refused(dtype, build_model, tmp_path):
    model = build_model("llama", dtype=torch.float32)
    source = _save(model, tmp_path / "source", "1GB")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.2.mlp.down_proj.weight"
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, source / "model.safetensors")
    _refused(source, mixed_edit(model), tmp_path / "output", "packed or quantized")


def test_damaged_and_missing_files_are_refused(source, tmp_path):
    folder, model = source
    shard = read_shards(folder)[0].path
    content = shard.read_bytes()
    for damaged, match in (
        (content[:-3], "truncated"),
        (b"x" * 40, "truncated or no"),
        (None, "lacks"),
    ):
        shard.unlink()
        if damaged is not None:
            shard.write_bytes(damaged)
        _refused(folder, mixed_edit(model), tmp_path / "output", match)
        shard.write_bytes(content)
    (folder / "model.safetensors.index.json").unlink()
    _refused(folder, mixed_edit(model), tmp_path / "output", "neither")


def test_an_output_that_is_in_use_is_refused_and_stays(source, tmp_path):
    folder, model = source
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "notes").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="exists already"):
        apply_to_checkpoint(folder, mixed_edit(model), tmp_path / "output")
    with pytest.raises(InputError, match="own folder"):
        apply_to_checkpoint(folder, mixed_edit(model), folder / "output")
    assert (tmp_path / "output" / "notes").read_text(encoding="utf-8") == "mine"
