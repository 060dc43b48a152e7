"""Upload of a finished run to the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import httpx

from .config import HubConfig, InputError, one_line

REASONS = {
    401: "the token was refused; log in with `hf auth login`, or set HF_TOKEN",
    403: "the token may not write there",
    409: "a repository of this name exists",
}


def push_folder(folder: Path, hub: HubConfig) -> str:
    """Upload model, tokenizer, code and card in `folder`, without checkpoints, to a new repository; return its URL.

    Raises InputError if the Hub refuses or the connection fails; `folder` stays as it is.
    """
    api = HfApi()
    try:
        url = api.create_repo(hub.repository, private=hub.private)
        api.upload_folder(
            repo_id=url.repo_id, folder_path=folder, ignore_patterns="checkpoints/*", commit_message="Trained model"
        )
    except (httpx.HTTPError, OSError, RuntimeError) as error:  # RuntimeError: around what happened to a large file
        status = getattr(getattr(error, "response", None), "status_code", None)
        causes = [one_line(cause).rstrip(".") for cause in (error, error.__cause__) if cause]
        reason = REASONS.get(status) or ": ".join(causes)
        private = " --private" if hub.private else ""
        raise InputError(
            f"hub.repository {hub.repository}: {reason}. The run is complete in {folder}; to upload it: "
            f"hf upload {hub.repository} {folder} . --exclude 'checkpoints/*'{private}"
        ) from error
    return url
