"""What must not be published is told, and nothing is uploaded unasked.

Run: python -m pytest tests/unit/eval/test_publication.py
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import yaml
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from pydantic import ValidationError

from common.errors import GateError, InputError, StageError
from eval.__main__ import main
from eval.release import folder as release_folder
from eval.release import publication, stage
from eval.release.claims import claim_problems
from eval.release.lint import lint
from eval.release.publication import plan, publish
from tests.releasing import Tracker, read, recipe_of, write_release


class FakeHub:
    """Remembers what it was asked for, as `HfApi` would be."""

    def __init__(self, private: bool = True, error: Exception | None = None) -> None:
        """Begin with no calls."""
        self.calls: list[tuple[str, dict]] = []
        self.private, self.error = private, error

    def create_repo(self, repo_id: str, **settings) -> None:
        self.calls.append(("create_repo", {"repo_id": repo_id, **settings}))

    def repo_info(self, repo_id: str) -> SimpleNamespace:
        return SimpleNamespace(private=self.private)

    def upload_folder(self, **settings) -> None:
        self.calls.append(("upload_folder", settings))
        if self.error is not None:
            raise self.error


def test_a_release_as_it_is_made_has_no_problems(made) -> None:
    assert lint(made[0] / "release") == []
    assert lint(made[0] / "release", made[0] / "base") == []


def in_card(old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "README.md"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return change


def in_front(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        path = folder / "README.md"
        _, front, body = path.read_text().split("---\n", 2)
        data = yaml.safe_load(front)
        change(data)
        path.write_text(f"---\n{yaml.safe_dump(data, sort_keys=False)}---\n{body}")

    return rewrite


def in_json(name: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        data = read(folder, name)
        change(data)
        (folder / name).write_text(json.dumps(data))

    return rewrite


def written(name: str, text: str) -> Callable[[Path], None]:
    def append(folder: Path) -> None:
        with (folder / name).open("a") as file:
            file.write(text)

    return append


def removed(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def metric(data: dict) -> dict:
    return data["model-index"][0]["results"][0]["metrics"][0]


# Put together here, so that no scanner takes this file for a leak.
TOKEN = "hf_" + "aB3" * 10
KEYS = {
    "a Hugging Face token": TOKEN,
    "an API key": "sk-" + "proj-" + "a1" * 20,
    "an AWS key": "AKIA" + "ABCDEFGH12345678",
    "a private key": "-----BEGIN RSA " + "PRIVATE KEY-----",
}
FAULTS = {
    "no card": (removed("README.md"), "there is no card"),
    "no licence": (in_front(lambda d: d.pop("license")), "license is missing"),
    "an unnamed licence": (
        in_front(lambda d: d.update(license="other")),
        "license is other without license_name",
    ),
    "the licence file lost": (removed("LICENSE"), "LICENSE of the base is missing"),
    "another licence file": (written("LICENSE", "Not this."), "LICENSE is not the licence of"),
    "no notice": (removed("NOTICE"), "NOTICE is missing"),
    "llama without its banner": (
        in_front(lambda d: d.update(license="llama3.1")),
        'asks for "Built with Llama" to be shown',
    ),
    "gemma without its notice": (
        in_front(lambda d: d.update(license="gemma")),
        "NOTICE lacks the words that the licence gemma prescribes",
    ),
    "no base": (in_front(lambda d: d.pop("base_model")), "base_model is missing"),
    "no relation": (in_front(lambda d: d.pop("base_model_relation")), "base_model_relation is"),
    "the template lost": (removed("chat_template.jinja"), "the chat template is lost"),
    "an end token that is not the template's": (
        in_json("generation_config.json", lambda d: d.update(eos_token_id=3)),
        "generation_config.json stops at [3], but the template ends an answer with '<|end|>'",
    ),
    "a tokenizer that is not the base's": (
        in_json("tokenizer_config.json", lambda d: d.update(padding_side="right")),
        "tokenizer_config.json is not the tokenizer of the base",
    ),
    "a template that is not the base's": (
        written("chat_template.jinja", "{# #}"),
        "chat_template.jinja is not the tokenizer of the base",
    ),
    "a path in the card": (
        written("README.md", "\nMade in /home/somebody/runs.\n"),
        "README.md holds a path of a machine (/home/somebody)",
    ),
    "a path in a configuration": (
        in_json("config.json", lambda d: d.update(_name_or_path="/mnt/models/base")),
        "config.json holds a path of a machine (/mnt/models)",
    ),
    "a path of another system": (
        written("recipe.yaml", "# C:\\Users\\somebody\n"),
        "recipe.yaml holds a path of a machine",
    ),
    **{what: (written("recipe.yaml", f"# {key}\n"), f"holds {what}") for what, key in KEYS.items()},
    "a claim in prose without interval": (
        written("README.md", "\nIt scores 71.2 % on MMLU.\n"),
        '"It scores 71.2 % on MMLU." gives a number without its interval',
    ),
    "a share without interval": (
        written("README.md", "\nThe accuracy is 0.71 (n = 300).\n"),
        "gives a number without its interval",
    ),
    "a claim without n": (
        written("README.md", "\nAccuracy: 0.930 [0.900, 0.950].\n"),
        "gives a number without its n",
    ),
    "a table without n": (
        written("README.md", "\n| task | score |\n| --- | --- |\n| mmlu | 0.71 |\n"),
        'the table "task | score" says nowhere how many were measured',
    ),
    "a table without intervals": (
        written("README.md", "\n| task | n | score |\n| --- | --- | --- |\n| mmlu | 9 | 0.71 |\n"),
        "gives numbers without intervals",
    ),
    "metadata without n": (
        in_front(lambda d: metric(d)["args"].pop("n")),
        "model-index: letters has no n, low and high",
    ),
    "metadata without arguments": (
        in_front(lambda d: metric(d).pop("args")),
        "model-index: letters has no n, low and high",
    ),
    "metadata that claims more": (
        in_front(lambda d: metric(d).update(value=0.99)),
        "model-index: letters claims another number than results.json",
    ),
    "metadata of what was not measured": (
        in_front(lambda d: d["model-index"][0]["results"][0]["dataset"].update(name="mmlu")),
        "model-index: mmlu is not in results.json",
    ),
    "no safety section": (in_card("## Safety\n", "## Fun\n"), "the section on safety is missing"),
    "a safety section without a guard": (
        lambda folder: in_card(
            (folder / "README.md").read_text().split("## Safety\n")[1].split("\n## Licence")[0],
            "\nBe good.\n",
        )(folder),
        "the section on safety is missing",
    ),
    "refusals left out": (in_card("## What it still refuses", "## Notes"), "still refuses"),
    "categories left out": (in_card("by category", "in detail"), "measured by category"),
    "no example of a guard": (removed("guarded_chat.py"), "the example of a guard, is missing"),
    "an example that is no program": (written("guarded_chat.py", "def (\n"), "or no Python"),
    "answers as text": (
        written("items.jsonl", '{"details": {"text": "Once upon a time"}}\n'),
        "items.jsonl holds answers as text",
    ),
    "no results": (removed("results.json"), "results.json is missing or damaged"),
    "results without their numbers": (
        in_json("results.json", lambda d: d["refusal"][0]["healed"].pop("value")),
        "results.json is missing or damaged",
    ),
    "metadata in no form": (
        in_front(lambda d: d.update({"model-index": ["mini"]})),
        "model-index is not in the hub's form",
    ),
    "no record": (removed("reproduce/tensors.json"), "reproduce/ is missing or damaged"),
    "a leaderboard without n": (
        lambda folder: (
            (folder / ".eval_results").mkdir(),
            (folder / ".eval_results" / "gsm8k.yaml").write_text(
                "- {dataset: {id: openai/gsm8k, task_id: gsm8k}, value: 71.0}\n"
            ),
        ),
        ".eval_results/gsm8k.yaml: a claim without n and interval",
    ),
    "files changed since": (written("results.json", " "), "SHA256SUMS does not fit the files"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_found_and_keeps_the_release_from_the_hub(release, fault) -> None:
    spoil, words = FAULTS[fault]
    spoil(release)
    if fault != "files changed since":
        release_folder.write_checksums(release)
    problems = lint(release)
    assert [problem for problem in problems if words in problem], problems
    hub = FakeHub()
    with pytest.raises(StageError, match="it is not published"):
        publish(release, "me/mini", hub=hub)
    assert hub.calls == []


def test_a_base_at_hand_is_compared_itself(made, release, tmp_path) -> None:
    base = tmp_path / "base"
    shutil.copytree(made[0] / "base", base)
    (base / "tokenizer.json").write_text("{}")
    (problem,) = lint(release, base)
    assert problem.startswith("tokenizer.json is not the tokenizer of the base")


def test_the_licence_of_the_base_goes_on(made, release, tmp_path) -> None:
    base = tmp_path / "base"
    shutil.copytree(made[0] / "base", base)
    (base / "README.md").write_text("---\nlicense: gemma\n---\n\n# Base\n")
    (problem,) = lint(release, base)
    assert problem.startswith("README.md: license is apache-2.0, the base's is gemma")
    in_json("reproduce/tensors.json", lambda d: d["base"].update(license="mit"))(release)
    release_folder.write_checksums(release)
    (problem,) = lint(release)
    assert "the base's is mit" in problem


@pytest.mark.parametrize("repo", ["mini", "/tmp/mini", "me/mini/x", "me/"])
def test_a_repository_that_is_no_id_is_an_error_of_the_recipe(made, repo) -> None:
    with pytest.raises(ValidationError):
        recipe_of(made[0], push_to_hub=repo)
    assert recipe_of(made[0]).release.push_to_hub is None


def test_words_that_claim_nothing_are_let_pass() -> None:
    harmless = """
## Results

Intervals are 95 % intervals. *Recovered*: not below the original by more than 0.05. A difference is found with 80 %
power. Trained with learning_rate = 0.003 and beta = 0.1, strength 1.5.

- Recovery (addition; n = 900): 0.91 [0.82, 0.97] of -0.097 [-0.119, -0.078].
- restricted, n = 300 prompts: 0.000 [0.000, 0.013] refused.

| gate | value | limit |
| --- | --- | --- |
| pooled.recovery.value | 0.91 | at least 0.8 |

```python
accuracy = 0.71  # 71 %
```
"""
    assert list(claim_problems(harmless)) == []


def test_an_upload_is_private_and_leaves_out_what_is_the_stores_own(release) -> None:
    (release / "manifest.json").write_text("{}")
    hub = FakeHub()
    assert publish(release, "me/mini", hub=hub) == "https://huggingface.co/me/mini"
    (create, made), (upload, sent) = hub.calls
    assert (create, made) == (
        "create_repo",
        {"repo_id": "me/mini", "private": True, "exist_ok": True},
    )
    assert upload == "upload_folder"
    assert sent["folder_path"] == release
    assert "manifest.json" in sent["ignore_patterns"]
    assert "delete_patterns" not in sent
    hub = FakeHub(private=False)
    publish(release, "me/mini", public=True, hub=hub)
    assert hub.calls[0][1]["private"] is False


def test_a_repository_that_is_public_already_gets_nothing_unless_asked(release) -> None:
    hub = FakeHub(private=False)
    with pytest.raises(InputError, match="me/mini is public already"):
        publish(release, "me/mini", hub=hub)
    assert [name for name, _ in hub.calls] == ["create_repo"]


def test_a_failed_upload_ends_in_words(release) -> None:
    response = httpx.Response(403, request=httpx.Request("POST", "https://huggingface.co"))
    for error, kind in (
        (HfHubHTTPError("403 Forbidden", response=response), StageError),
        (httpx.ConnectError("no route"), StageError),
        (LocalTokenNotFoundError("no token"), InputError),
    ):
        with pytest.raises(kind, match=r"log in with|the upload failed"):
            publish(release, "me/mini", hub=FakeHub(error=error))


def test_a_name_that_the_licence_forbids_is_not_uploaded_to(made, tmp_path) -> None:
    folder, upstream = made
    release = write_release(folder, upstream, "llama", license="llama3.1")
    hub = FakeHub()
    with pytest.raises(StageError, match='asks for a name that begins with "Llama"'):
        publish(release, "me/mini", hub=hub)
    assert hub.calls == []
    publish(release, "me/Llama-mini", hub=hub)
    assert len(hub.calls) == 2


def test_the_plan_names_every_file_its_size_and_the_exact_calls(release) -> None:
    lines = plan(release, "me/mini")
    size = (release / "model.safetensors").stat().st_size
    assert any(line.split() == [f"{size:,}", "model.safetensors"] for line in lines)
    names = {line.split()[-1] for line in lines[: len(lines) - 4]}
    present = {str(f.relative_to(release)) for f in release.rglob("*") if f.is_file()}
    assert names == present
    text = "\n".join(lines)
    assert "HfApi().create_repo('me/mini', private=True, exist_ok=True)" in text
    assert "repo_id='me/mini'" in text
    total = sum((release / name).stat().st_size for name in present)
    assert f"{total:,} bytes in {len(present)} files" in text


def test_the_command_uploads_only_when_asked(release, monkeypatch, capsys) -> None:
    hub = FakeHub()
    monkeypatch.setattr(publication, "HfApi", lambda: hub)
    for asked in ([], ["--dry-run"], ["--repo-id", "me/mini"], ["--dry-run", "--repo-id", "a/b"]):
        assert main(["publish", str(release), *asked]) == 0
        assert "no problems; nothing was uploaded" in capsys.readouterr().out
    assert main(["publish", str(release), "--upload"]) == 2
    assert main(["publish", str(release), "--public"]) == 2
    assert main(["publish", str(release), "--upload", "--repo-id", "mini"]) == 2
    with pytest.raises(SystemExit) as ended:
        main(["publish", str(release), "--upload", "--dry-run", "--repo-id", "me/mini"])
    assert ended.value.code == 2
    assert hub.calls == []
    assert main(["publish", str(release), "--upload", "--repo-id", "me/mini"]) == 0
    assert "uploaded to https://huggingface.co/me/mini" in capsys.readouterr().out
    assert [name for name, _ in hub.calls] == ["create_repo", "upload_folder"]


def test_the_command_says_what_is_wrong_and_ends_with_1(release, capsys) -> None:
    (release / "LICENSE").unlink()
    (release / "README.md").unlink()
    assert main(["publish", str(release), "--dry-run"]) == 1
    told = capsys.readouterr().err
    assert "PROBLEM  LICENSE of the base is missing" in told
    assert "PROBLEM  README.md: there is no card" in told
    assert main(["publish", str(release.parent)]) == 2


def test_a_recipe_uploads_its_release_once_the_gates_have_passed(
    made, tmp_path, monkeypatch
) -> None:
    folder, upstream = made
    recipe = recipe_of(folder, push_to_hub="me/mini")
    hub = FakeHub()
    monkeypatch.setattr(publication, "HfApi", lambda: hub)
    target = tmp_path / "release"
    target.mkdir()
    stage.run(recipe, target, upstream, Tracker())
    (_, made_private), (_, sent) = hub.calls
    assert made_private["private"] is True
    assert sent["folder_path"] == target
    assert stage.inputs(recipe) != stage.inputs(recipe_of(folder))

    missed = tmp_path / "eval"
    shutil.copytree(upstream["eval"], missed)
    gate = {"name": "pooled.n", "value": 0, "bound": "min", "limit": 5, "passed": False}
    in_json("results.json", lambda d: d.update(accept={"passed": False, "gates": [gate]}))(missed)
    with pytest.raises(GateError):
        stage.run(recipe, target, {**upstream, "eval": missed}, Tracker())
    assert len(hub.calls) == 2
