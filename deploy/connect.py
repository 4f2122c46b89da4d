"""The token of a cluster, for this shell: `eval "$(python deploy/connect.py cluster.yaml)"`, while `ray dashboard cluster.yaml` runs in another one.

Fetches the token from the head through SSH into a file that only its owner reads, checks that the job server answers to it and runs the Ray that is installed
here, and prints the commands that set the three variables which `ray job` reads. What is wrong is one line with exit code 2, and then the shell (sh, bash, zsh) is
connected to no cluster: not to the one of before either.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import os
import shlex
import subprocess
import sys
import urllib.error
import urllib.request
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn

import yaml


class Refused(Exception):
    """What is wrong, in one line."""


def edited(cluster: str) -> None:
    """`Refused` with the line where the file is no YAML, as long as it has a mark."""
    try:
        content = yaml.safe_load(Path(cluster).read_text(encoding="utf-8"))
        if not isinstance(content, dict) or "provider" not in content:
            raise Refused(
                f"{cluster}: expected a cluster file, got one without provider:; give the one that `ray up` takes"
            )
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(
            f"{cluster}: expected a cluster file as UTF-8 text, got what cannot be read as such ({error})"
        ) from error
    except yaml.MarkedYAMLError as error:
        line = (error.problem_mark.line if error.problem_mark else 0) + 1
        raise Refused(
            f"{cluster}, line {line}: {error.problem}; mend that line (those with an '@' are yours to edit)"
        ) from error
    except yaml.YAMLError as error:
        raise Refused(f"{cluster}: expected YAML, got {' '.join(str(error).split())}; mend it") from error


def fetched(cluster: str) -> Path:
    """The file with the token of the head of `cluster`, a cluster file."""
    if not Path(cluster).is_file():
        raise Refused(f"expected a cluster file, got {cluster!r}, which is none")
    edited(cluster)
    name = hashlib.sha256(Path(cluster).resolve().as_posix().encode()).hexdigest()[:12]
    folder = Path.home() / ".ray" / "tokens"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    target = folder / name
    target.unlink(missing_ok=True)
    command = ["ray", "rsync-down", cluster, "~/.ray/auth_token", str(target)]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise Refused(
            "expected the command `ray`, got none; activate the environment that has it (. .venv/bin/activate)"
        ) from error
    if ended.returncode or not target.is_file():
        said = [line.strip() for line in (ended.stderr or ended.stdout).splitlines() if line.strip()]
        raise Refused(
            f"the head gave no token ({said[-1] if said else 'it said nothing'}); is the cluster up? ray up {cluster}"
        )
    target.chmod(0o600)
    return target


def check(address: str, token: str, cluster: str) -> None:
    """The job server at `address` answers to `token`, and its Ray is the one that is installed here."""
    request = urllib.request.Request(f"{address}/api/version", headers={"Authorization": f"Bearer {token}"})
    try:
        # past any proxy, which would learn the token
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=15) as answer:
            theirs = json.load(answer)["ray_version"]
    except urllib.error.HTTPError as error:
        raise Refused(
            f"what answers at {address} does not take the token of {cluster} ({error.code} {error.reason}); another cluster is forwarded to "
            f"that port: end its `ray dashboard`, or use --port"
        ) from error
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        raise Refused(
            f"no job server answers at {address} ({error}); run `ray dashboard {cluster}` in another terminal and leave it"
        ) from error
    try:
        ours = version("ray")
    except PackageNotFoundError as error:
        raise Refused(
            f"expected Ray {theirs} on this machine, got none; pip install 'ray[default]=={theirs}'"
        ) from error
    if theirs != ours:
        raise Refused(
            f"expected the cluster's Ray {theirs} on this machine, got {ours}; pip install 'ray[default]=={theirs}', "
            f"or bring this one to the cluster: ray up {cluster}"
        )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of the usage."""
        self.exit(2, f"connect: {message}; see --help\n")


def main() -> int:
    """The command line."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cluster", help="the cluster file that `ray up` was called with")
    parser.add_argument(
        "--port", type=int, default=8265, help="of `ray dashboard` on this machine (default: 8265)"
    )
    given = parser.parse_args()
    address = f"http://localhost:{given.port}"
    try:
        path = fetched(given.cluster)
        check(address, path.read_text(encoding="utf-8").strip(), given.cluster)
    except Refused as refused:
        print(f"connect: {refused}", file=sys.stderr)
        return 2
    variables = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": os.fspath(path),
        "RAY_API_SERVER_ADDRESS": address,
    }
    if urllib.request.getproxies_environment():  # `ray job` would go through it
        before = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
        said = before.split(",") if before else []
        variables["no_proxy"] = ",".join(said if "localhost" in said else ["localhost", *said])
    # that variable would be taken before the file, and may be another cluster's
    print(
        "unset RAY_AUTH_TOKEN; export "
        + " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
    )
    return 0


if __name__ == "__main__":
    code: object = 1
    try:
        code = main()
    except SystemExit as ended:  # argparse's
        code = ended.code
        raise
    finally:
        # nothing would be success to `eval`, and the next `ray job submit` would go to the cluster of before
        if code and not sys.stdout.isatty():
            print("unset RAY_AUTH_TOKEN RAY_AUTH_TOKEN_PATH RAY_API_SERVER_ADDRESS; false")
    sys.exit(code)
