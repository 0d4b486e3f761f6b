"""The command reuses the patient that is there, and says what is in its way.

Run: make setup && .venv/bin/python -m pytest tests/unit/patient/test_command.py
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.errors import InputError, StageError
from patient import build
from patient.__main__ import main
from patient.architectures import build_model
from patient.corpus import tokenizer_texts
from patient.files import write_record
from patient.folder import in_place_at_the_end
from patient.levels import Level
from patient.refusal import FALSE_REFUSAL_BLOCKS, TUNED_BLOCKS
from patient.tokenizer import train_tokenizer
from patient.world import build_world

REACHED = Level("refusal", 1.0, 300, ">= 0.95", reached=True)
MISSED = Level("addition", 0.5, 300, ">= 0.90", reached=False)


@pytest.fixture
def patient_folder(tmp_path) -> Path:
    folder = tmp_path / "patient"
    folder.mkdir()
    write_record(folder, architecture="llama", seed=0, levels=[REACHED], seconds=1.0)
    return folder


def refuse_to_build(*_: object, **__: object) -> None:
    pytest.fail("a patient was built")


@pytest.fixture(autouse=True)
def _no_build(monkeypatch) -> None:
    monkeypatch.setattr("patient.__main__.build_patient", refuse_to_build)


def test_the_patient_that_is_there_is_reused(patient_folder, capsys):
    assert main(["--output", str(patient_folder)]) == 0
    out = capsys.readouterr().out
    assert "nothing to do" in out
    assert "refusal" in out


@pytest.mark.parametrize(
    "other", [["--seed", "1"], ["--architecture", "qwen3"], ["--over-refusing"]]
)
def test_another_patient_is_not_replaced(patient_folder, capsys, other):
    assert main(["--output", str(patient_folder), *other]) == 2
    assert "holds another patient (llama, seed 0)" in capsys.readouterr().err


def test_the_over_refusing_patient_that_is_there_is_reused_and_is_no_other(tmp_path, capsys):
    folder = tmp_path / "patient"
    folder.mkdir()
    write_record(
        folder, architecture="llama", seed=0, over_refusing=True, levels=[REACHED], seconds=1.0
    )
    assert main(["--output", str(folder), "--over-refusing"]) == 0
    assert main(["--output", str(folder)]) == 2
    assert "holds another patient (llama, seed 0, over-refusing)" in capsys.readouterr().err


def test_a_base_without_over_refusing_is_an_error(patient_folder, tmp_path, capsys):
    assert main(["--output", str(tmp_path / "new"), "--base", str(patient_folder)]) == 2
    assert "--base has no effect without --over-refusing" in capsys.readouterr().err


def test_a_base_that_is_no_patient_is_an_error_and_nothing_is_left(tmp_path):
    with pytest.raises(InputError, match="holds no patient"):
        build.build_patient(
            tmp_path / "new", "llama", 0, over_refusing=True, base=tmp_path / "missing"
        )
    assert list(tmp_path.iterdir()) == []


def test_a_base_of_another_seed_is_an_error(patient_folder, tmp_path):
    with pytest.raises(InputError, match=r"another patient \(llama, seed 0\)"):
        build.build_patient(tmp_path / "new", "llama", 1, over_refusing=True, base=patient_folder)


def test_a_file_in_the_way_is_an_error(tmp_path, capsys):
    path = tmp_path / "file"
    path.write_text("x", encoding="utf-8")
    assert main(["--output", str(path)]) == 2
    assert "is a file" in capsys.readouterr().err


def test_a_folder_with_other_things_is_an_error_and_stays(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
    assert main(["--output", str(tmp_path)]) == 2
    assert "holds no patient" in capsys.readouterr().err
    assert (tmp_path / "notes.txt").is_file()


def test_a_damaged_record_is_an_error(patient_folder, capsys):
    (patient_folder / "patient.json").write_text("{", encoding="utf-8")
    assert main(["--output", str(patient_folder)]) == 2
    assert "patient.json" in capsys.readouterr().err


def test_a_missed_level_is_said_and_ends_with_1(tmp_path, monkeypatch, capsys):
    def miss(*_: object, **__: object) -> None:
        build._check([REACHED, MISSED])

    monkeypatch.setattr("patient.__main__.build_patient", miss)
    assert main(["--output", str(tmp_path / "patient")]) == 1
    assert "missed addition 0.500 (wanted >= 0.90)" in capsys.readouterr().err


def interrupt(output: Path) -> None:
    with in_place_at_the_end(output) as folder:
        (folder / "config.json").write_text("{}", encoding="utf-8")
        raise KeyboardInterrupt


def test_an_interrupted_build_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        interrupt(tmp_path / "patient")
    assert list(tmp_path.iterdir()) == []


def test_a_missed_level_leaves_nothing(tmp_path):
    with pytest.raises(StageError), in_place_at_the_end(tmp_path / "patient"):
        build._check([MISSED])
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_architecture_is_named_with_the_known_ones(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--output", str(tmp_path / "patient"), "--architecture", "gpt"])
    assert caught.value.code == 2
    assert "qwen3_moe" in capsys.readouterr().err


def as_float16(tensor):
    """The values that float16 holds, in float32."""
    return tensor.half().float()


def test_tuning_is_tried_again_from_the_same_knowledge(monkeypatch):
    """A first attempt that misses a level must leave nothing behind in the second."""
    world = build_world(0)
    tokenizer = train_tokenizer(tokenizer_texts(world))
    torch.manual_seed(0)
    model = build_model("llama", tokenizer)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen: list[int] = []

    tuning = build._refusal(world)

    def train_a_little(model, tokenizer, phase, *, seed):
        tuned = [name for name, each in model.named_parameters() if each.requires_grad]
        assert len(tuned) == 2 * len(TUNED_BLOCKS[len(seen)])
        plain = dict(model.named_parameters())
        assert torch.equal(plain["lm_head.weight"], before["lm_head.weight"])
        writer = next(name for name in plain if "layers.1.mlp.down_proj" in name and "base" in name)
        assert torch.equal(plain[writer], before["model.layers.1.mlp.down_proj.weight"])
        with torch.no_grad():
            for name in tuned:
                plain[name].add_(1.0)
        seen.append(seed)
        return 0.0

    monkeypatch.setattr(build, "train", train_a_little)
    answers = iter([[MISSED], [REACHED]])
    monkeypatch.setattr(build, "measure_levels", lambda *_: next(answers))
    assert build._tune(model, tokenizer, tuning, seed=0, started=0.0) == [REACHED]
    assert len(set(seen)) == 2
    assert model.state_dict().keys() == before.keys()
    after = model.state_dict()
    assert all(torch.equal(tensor, as_float16(tensor)) for tensor in after.values())
    changed = [n for n, t in after.items() if not torch.equal(t, as_float16(before[n]))]
    assert changed == [f"model.layers.{block}.mlp.down_proj.weight" for block in TUNED_BLOCKS[1]]


@pytest.fixture
def _train_by_noise(monkeypatch) -> None:
    """Stands in for training: moves what would be trained, drawing from torch's random state."""
    tokenizer = train_tokenizer(tokenizer_texts(build_world(0)))

    @torch.no_grad()
    def train_by_noise(model, *_, **__):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        return 0.0

    monkeypatch.setattr(build, "train_tokenizer", lambda _: tokenizer)
    monkeypatch.setattr(build, "train", train_by_noise)
    monkeypatch.setattr(build, "measure_levels", lambda *_: [REACHED])


def contents(folder: Path) -> dict[str, bytes]:
    files = {path for path in folder.rglob("*") if path.is_file() and path.name != "patient.json"}
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.usefixtures("_train_by_noise")
def test_tuning_a_finished_patient_further_gives_what_building_in_one_go_gives(tmp_path):
    """And it changes the attention outputs of its blocks and the files about false refusal alone."""
    plain, further, at_once = (tmp_path / name for name in ("plain", "further", "at_once"))
    build.build_patient(plain, "llama", 0)
    torch.manual_seed(7)  # another process knows nothing of where the first one's stream ended
    build.build_patient(further, "llama", 0, over_refusing=True, base=plain)
    build.build_patient(at_once, "llama", 0, over_refusing=True)
    assert contents(further) == contents(at_once)
    before, after = contents(plain), contents(further)
    assert {name for name in before if before[name] != after[name]} == {
        "model.safetensors",
        "prompts/healing.jsonl",
    }
    assert {Path(name).name for name in after.keys() - before.keys()} == {
        "falsely_refused.jsonl",
        "falsely_refused.yaml",
        *(f"falsely_refused_{split}.jsonl" for split in ("train", "validation", "test")),
    }
    old, new = (load_file(folder / "model.safetensors") for folder in (plain, further))
    assert {name for name in old if not torch.equal(old[name], new[name])} == {
        f"model.layers.{block}.self_attn.o_proj.weight" for block in FALSE_REFUSAL_BLOCKS
    }
