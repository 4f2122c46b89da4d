"""Several hosts on one Linux machine, for tests that cross a network: a client, a head and two workers behind one switch.

Every host has its own network, mount, process and host-name namespace, its own /tmp, /root and /dev/shm, and its own sshd, which a key of this test bed
opens. There is no default route: nothing leaves the machine. A host ends by itself after `LIFETIME_SECONDS`, whatever became of the test.
Needs root and: openssh-server rsync iproute2 util-linux procps.

    python tests/hosts.py up   DIR                  make the hosts; DIR holds all that is made
    python tests/hosts.py on   DIR HOST COMMAND...  run a command on a host, as root, in /root
    python tests/hosts.py kill DIR HOST             the host dies at once;   back: it boots again, with an empty /tmp
    python tests/hosts.py cut  DIR HOST             its cable is pulled;     mend: plugged in again
    python tests/hosts.py down DIR                  remove everything that `up` made
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

HOSTS = {"client": "10.77.0.9", "head": "10.77.0.10", "worker1": "10.77.0.11", "worker2": "10.77.0.12"}
LIFETIME_SECONDS = 3600
_PREFIX = "clipq-"
_SWITCH = f"{_PREFIX}switch"
_PROGRAMS = ("/usr/sbin/sshd", "rsync", "ssh", "ssh-keygen", "ip", "unshare", "nsenter", "hostname")
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_SSHD = """ListenAddress {address}
HostKey {folder}/hostkey
PermitRootLogin prohibit-password
AuthorizedKeysFile /root/.ssh/authorized_keys
StrictModes no
UsePAM no
PidFile none
Subsystem sftp /usr/lib/openssh/sftp-server
MaxSessions 100
MaxStartups 100
"""


def missing() -> str | None:
    """Why this machine cannot hold the hosts; None where it can."""
    if os.geteuid() != 0:
        return "root is needed to make network namespaces"
    absent = [
        program for program in _PROGRAMS if shutil.which(program, path=f"{os.defpath}:{_SYSTEM_PATH}") is None
    ]
    if absent:
        return f"not installed: {', '.join(absent)} (openssh-server, rsync, iproute2, util-linux, hostname)"
    probe = f"{_PREFIX}probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", probe], capture_output=True, check=False)
    return None if made.returncode == 0 else f"no network namespaces here: {made.stderr.strip()}"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Bed:
    """The hosts, by what lies in `folder`. `visible`: folders below /tmp or /root that every host sees; `python`: the interpreter of the
    environment that comes first in their PATH."""

    def __init__(self, folder: Path, *, python: Path | None = None, visible: Sequence[Path] = ()) -> None:
        self.folder = folder.resolve()
        interpreter = python or Path(sys.executable)
        self.environment = interpreter.parent.parent
        home = interpreter.resolve().parent.parent  # the interpreter of an environment is a link
        self._visible = [self.folder, self.environment, home, *visible]

    def up(self) -> None:
        """Make the hosts; what an attempt before left is removed."""
        self.down()
        self.folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / "key"], check=True)
        names = "".join(f"{address} {name}\n" for name, address in HOSTS.items())
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        _ip("netns", "add", _SWITCH)
        _ip("-n", _SWITCH, "link", "add", "bridge", "type", "bridge")
        _ip("-n", _SWITCH, "link", "set", "bridge", "up")
        for name, address in HOSTS.items():
            self._create(name, address)
        for name in HOSTS:
            self._until_ssh(name)

    def _create(self, name: str, address: str) -> None:
        space, folder = _PREFIX + name, self.folder / name
        _ip("netns", "add", space)
        _ip("link", "add", f"to-{name}", "netns", _SWITCH, "type", "veth", "peer", "name", "eth0", "netns", space)  # fmt: skip
        _ip("-n", _SWITCH, "link", "set", f"to-{name}", "master", "bridge", "up")
        _ip("-n", space, "link", "set", "lo", "up")
        _ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
        _ip("-n", space, "link", "set", "eth0", "up")
        (folder / "tmp").mkdir(parents=True)
        (folder / "tmp").chmod(0o1777)
        keys = folder / "root" / ".ssh"
        keys.mkdir(parents=True, mode=0o700)
        shutil.copy(self.folder / "key", keys / "id_ed25519")
        shutil.copy(self.folder / "key.pub", keys / "authorized_keys")
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "hostkey"], check=True)
        (folder / "sshd_config").write_text(_SSHD.format(address=address, folder=folder))
        (folder / "init.sh").write_text(self._init(name))
        self._boot(name)

    def _init(self, name: str) -> str:
        """The first process of a host: a shell, which reaps what is orphaned, and ends with its sshd or after the lifetime."""
        folder = self.folder / name
        lines = [f"hostname {name}", "mount --make-rprivate /"]
        for path in self._visible:
            for place in ("tmp", "root"):
                if path.is_relative_to(f"/{place}"):
                    inside = folder / place / path.relative_to(f"/{place}")
                    lines += [f"mkdir -p {inside}", f"mount --rbind {path} {inside}"]
        lines += [
            f"mount --rbind {folder}/root /root", f"mount --rbind {folder}/tmp /tmp", "mount -t tmpfs -o size=1g tmpfs /dev/shm",
            f"mount --bind {self.folder}/hosts /etc/hosts", "mkdir -p /run/sshd",
            f"/usr/sbin/sshd -D -e -f {folder}/sshd_config & sleep {LIFETIME_SECONDS} & wait -n",
        ]  # fmt: skip
        return "set -e\n" + "\n".join(lines) + "\n"

    def _boot(self, name: str) -> None:
        folder = self.folder / name
        words = [
            "ip", "netns", "exec", _PREFIX + name, "unshare", "--mount", "--pid", "--fork", "--uts", "--mount-proc", "--kill-child",
            "bash", str(folder / "init.sh"),
        ]  # fmt: skip
        environment = {"HOME": "/root", "PATH": f"{self.environment}/bin:{_SYSTEM_PATH}"}
        with (folder / "sshd.log").open("a") as log:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        (folder / "pid").write_text(str(process.pid))

    def _until_ssh(self, name: str) -> None:
        limit = time.monotonic() + 30
        probe = ["ip", "netns", "exec", _PREFIX + name, "bash", "-c", f"exec 3<>/dev/tcp/{HOSTS[name]}/22"]
        while subprocess.run(probe, capture_output=True, check=False).returncode:
            if time.monotonic() > limit:
                raise RuntimeError(
                    f"{name} did not start: {(self.folder / name / 'sshd.log').read_text()[-500:]}"
                )
            time.sleep(0.1)

    def _first(self, name: str) -> int:
        """The first process inside a host, by this machine's numbers."""
        outer = (self.folder / name / "pid").read_text()
        return int(Path(f"/proc/{outer}/task/{outer}/children").read_text().split()[0])

    def words(self, name: str, command: str, environment: Mapping[str, str] | None = None) -> list[str]:
        """What runs `command` on a host by bash, as root, in /root."""
        given = {
            "HOME": "/root", "USER": "root", "TERM": "dumb", "LANG": "C.UTF-8", "RAY_USAGE_STATS_ENABLED": "0",
            "PATH": f"{self.environment}/bin:{_SYSTEM_PATH}", **(environment or {}),
        }  # fmt: skip
        space = ["nsenter", "-t", str(self._first(name)), "-n", "-m", "-p", "-u", "--wd=/root"]
        return [*space, "env", "-i", *(f"{key}={value}" for key, value in given.items()), "bash", "-c", command]  # fmt: skip

    def run(
        self, name: str, command: str, *, timeout: float = 120, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """`command` on a host, to its end."""
        return subprocess.run(
            self.words(name, command, environment), capture_output=True, text=True, timeout=timeout, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def start(
        self, name: str, command: str, log: Path, *, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[Any]:
        """`command` on a host, left running in a session of its own; what it says goes to `log`."""
        with log.open("w") as stream:
            return subprocess.Popen(
                self.words(name, command, environment), stdin=subprocess.DEVNULL, stdout=stream, stderr=stream,
                start_new_session=True,
            )  # fmt: skip

    def cut(self, name: str) -> None:
        """Pull the cable."""
        _ip("-n", _SWITCH, "link", "set", f"to-{name}", "down")

    def mend(self, name: str) -> None:
        """Plug it in again."""
        _ip("-n", _SWITCH, "link", "set", f"to-{name}", "up")

    def kill(self, name: str) -> None:
        """The host dies at once, with all its processes."""
        path = self.folder / name / "pid"
        number = int(path.read_text())
        with suppress(OSError):  # it is gone already
            if str(self.folder / name / "init.sh").encode() in Path(f"/proc/{number}/cmdline").read_bytes():
                os.kill(number, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(number, 0)
        path.unlink()

    def back(self, name: str) -> None:
        """It boots again; /root was kept, /tmp is empty."""
        for path in (self.folder / name / "tmp").iterdir():
            if path.name.startswith("ray"):
                shutil.rmtree(path, ignore_errors=True)
        self._boot(name)
        self._until_ssh(name)

    def down(self) -> None:
        """Remove all that `up` made, as far as it is there."""
        for name in HOSTS:
            if (self.folder / name / "pid").exists():
                self.kill(name)
        for space in (*(_PREFIX + name for name in HOSTS), _SWITCH):
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)
        for name in HOSTS:  # what a host mounted went with it
            subprocess.run(["rm", "-rf", "--one-file-system", self.folder / name], check=False)
        for name in ("key", "key.pub", "hosts"):
            (self.folder / name).unlink(missing_ok=True)


def main(arguments: list[str]) -> int:
    """The command line."""
    verb, folder, *rest = [*arguments, "", ""][: max(2, len(arguments))]
    bed = Bed(Path(folder))
    if verb in ("up", "down") and folder:
        if verb == "up" and (why := missing()):
            print(f"hosts: {why}", file=sys.stderr)
            return 2
        getattr(bed, verb)()
        return 0
    if verb == "on" and len(rest) > 1:
        return subprocess.run(bed.words(rest[0], shlex.join(rest[1:]) if len(rest) > 2 else rest[1]), check=False).returncode  # fmt: skip
    if verb in ("kill", "back", "cut", "mend") and rest:
        getattr(bed, verb)(rest[0])
        return 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
