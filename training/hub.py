"""Upload of a finished run to the Hugging Face Hub."""

import shlex
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import httpx

from .checkpoint import CARD_FILE, LOSS_CURVE_FILE, MANIFEST_FILE, read_manifest
from .config import HubConfig, InputError, one_line

REASONS = {
    401: "the token was refused; log in with `hf auth login`, or set HF_TOKEN",
    403: "the token may not write there",
    409: "a repository of this name exists",
}
REFUSED = (httpx.HTTPError, OSError, RuntimeError)  # RuntimeError: around what happened to a large file


def check_repository(hub: HubConfig) -> None:
    """Raises OSError if `push_folder` would be refused: for want of a token, by the name, or because it exists."""
    if get_token() is None:
        raise OSError("there is no token; log in with `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    try:
        user = api.whoami()
        owner, _, name = hub.repository.rpartition("/")
        owners = [user["name"], *(organisation["name"] for organisation in user.get("orgs", []))]
        if owner and owner not in owners:
            raise OSError(f"the token writes to {' or '.join(owners)}, not to {owner}")
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise OSError("the token may read only")
        if api.repo_exists(f"{owner or user['name']}/{name}"):
            raise OSError(REASONS[409])
    except REFUSED as error:
        raise OSError(reason_of(error)) from error


def published_files(folder: Path) -> list[str]:
    """What of a run is for others: the files of the model, by its manifest, with card and curve. No links.

    Raises OSError or ValueError if one of the model is not there.
    """
    names = [*read_manifest(folder), MANIFEST_FILE]
    for name in names:
        path = folder / name
        if path.is_symlink() or not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
            raise OSError(f"{path}: no such file, but {MANIFEST_FILE} lists it")
    return names + [
        name for name in (CARD_FILE, LOSS_CURVE_FILE) if (folder / name).is_file() and not (folder / name).is_symlink()
    ]


def push_folder(folder: Path, hub: HubConfig) -> str:
    """Upload the `published_files` of `folder` to a new repository; return its URL.

    Raises InputError if the Hub refuses or the connection fails; `folder` stays as it is.
    """
    try:
        names = published_files(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"hub.repository {hub.repository}: {one_line(error)}: nothing was uploaded") from error
    api = HfApi()
    try:
        url = api.create_repo(hub.repository, private=hub.private)
        api.upload_folder(
            repo_id=url.repo_id, folder_path=folder, allow_patterns=names, commit_message="Trained model"
        )
    except REFUSED as error:
        include = " ".join(f"--include {shlex.quote(name)}" for name in names)
        private = " --private" if hub.private else ""
        raise InputError(
            f"hub.repository {hub.repository}: {reason_of(error)}. The run is complete in {folder}; to upload it: "
            f"hf upload {hub.repository} {folder} . {include}{private}"
        ) from error
    return url


def reason_of(error: BaseException) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    causes = [one_line(cause).rstrip(".") for cause in (error, error.__cause__) if cause]
    return REASONS.get(status) or ": ".join(causes)
