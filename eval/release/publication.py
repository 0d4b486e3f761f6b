"""A release to the hub: only what the lint lets pass, only when asked, and private unless asked otherwise."""

from pathlib import Path
from typing import Protocol

from httpx import HTTPError
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from common.errors import InputError, StageError
from eval.release import folder as release_folder
from eval.release import licences
from eval.release.lint import lint, read_card

MESSAGE = "Upload the release"


class Hub(Protocol):
    """What of `huggingface_hub.HfApi` is used."""

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> object:
        """Make a repository where there is none."""

    def repo_info(self, repo_id: str) -> object:
        """Look at one."""

    def upload_folder(
        self,
        *,
        repo_id: str,
        folder_path: Path,
        ignore_patterns: list[str],
        commit_message: str,
    ) -> object:
        """Upload a folder."""


def problems_of(folder: Path, repo_id: str | None, base: Path | None = None) -> list[str]:
    """What keeps a release from being published, its name included."""
    problems = lint(folder, base)
    front, _ = read_card(folder)
    if repo_id is not None and front.get("license"):
        wrong = licences.name_problem(repo_id, str(front["license"]), front.get("license_name"))
        problems += [wrong] if wrong else []
    return problems


def plan(folder: Path, repo_id: str | None, *, public: bool = False) -> list[str]:
    """What an upload would send, file by file, and the calls that would do it."""
    names = [*release_folder.released_files(folder), release_folder.SUMS]
    sizes = {name: (folder / name).stat().st_size for name in names}
    width = max(len(f"{size:,}") for size in sizes.values())
    named = repo_id if repo_id is not None else "OWNER/NAME"
    arguments = ",\n    ".join(f"{key}={value!r}" for key, value in _upload(folder, named).items())
    return [
        *(f"{size:>{width},}  {name}" for name, size in sizes.items()),
        f"{sum(sizes.values()):,} bytes in {len(sizes)} files",
        "",
        f"HfApi().create_repo({named!r}, private={not public}, exist_ok=True)",
        f"HfApi().upload_folder(\n    {arguments},\n)",
    ]


def publish(
    folder: Path,
    repo_id: str,
    *,
    public: bool = False,
    base: Path | None = None,
    hub: Hub | None = None,
) -> str:
    """Upload a release.

    Args:
        folder: of the release.
        repo_id: owner/name; the repository is made where there is none.
        public: whether everyone may see it.
        base: folder of the base, for the lint.
        hub: in place of the hub's own client.

    Returns:
        The address of the repository.

    Raises:
        StageError: if the lint finds a problem, or the upload fails. Nothing has been uploaded after the first.
        InputError: if there is no token, or the repository is public where a private one was asked for.
    """
    problems = problems_of(folder, repo_id, base)
    if problems:
        raise StageError("\n".join(["it is not published, since", *(f"- {p}" for p in problems)]))
    api: Hub = hub if hub is not None else HfApi()
    try:
        api.create_repo(repo_id, private=not public, exist_ok=True)
        # One that was there already keeps its own visibility.
        if not public and not getattr(api.repo_info(repo_id), "private", False):
            raise InputError(
                f"{repo_id} is public already; make it private in its settings, name another one, or ask for a public "
                "one (--public)"
            )
        api.upload_folder(**_upload(folder, repo_id))  # type: ignore[arg-type]  # each value fits its own name
    except (LocalTokenNotFoundError, OfflineModeIsEnabled) as error:
        raise InputError(
            f"the hub was not asked ({_first_line(error)}); log in with `hf auth login`, or unset HF_HUB_OFFLINE"
        ) from error
    except (HfHubHTTPError, HTTPError, OSError, ValueError) as error:
        raise StageError(
            f"{repo_id}: the upload failed ({_first_line(error)}); check name, rights and network, and run it again: "
            "what has been sent is not sent twice"
        ) from error
    return f"https://huggingface.co/{repo_id}"


def _upload(folder: Path, repo_id: str) -> dict[str, object]:
    """The arguments of the upload; nothing that is in the repository already is deleted."""
    return {
        "repo_id": repo_id,
        "folder_path": folder,
        "ignore_patterns": [
            *sorted(release_folder.NOT_RELEASED - {release_folder.SUMS}),
            ".git*",
            ".cache/*",
        ],
        "commit_message": MESSAGE,
    }


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
