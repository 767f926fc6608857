"""A local OpenStack: real Keystone and Glance on this host's loopback, to try publishing with and to test against.

They run in a virtual environment of their own, on SQLite and a folder, and outlive the command that started them. No
root is needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal

import openstack.connection
import openstack.exceptions
import tenacity
from platformdirs import user_state_path

from bakehouse import REPOSITORY, clouds_yaml, lock
from bakehouse.cache import disk_usage
from bakehouse.daemon import Daemon, Process, free_ports
from bakehouse.errors import BakehouseError

LOCK = REPOSITORY / "requirements-openstack.lock"
SERVICES_FILE = REPOSITORY / "bakehouse" / "local_cloud_services.py"
REGION = "RegionOne"
PROJECT, USER = "research", "publisher"
DOMAIN = "default"

NOTE = "cloud.json"
"""The file that says what it is; it is written when its databases are there."""

Service = Literal["keystone", "glance"]
SERVICES: tuple[Service, ...] = ("keystone", "glance")

SERVER_OPTIONS = {
    "threads": "8",
    "lazy-apps": "true",
    "need-app": "true",
    "die-on-term": "true",
    "no-orphans": "true",
    "thunder-lock": "true",
    "buffer-size": "65535",
    # A chunk of an upload; the default gives an error 500 for 1 MiB.
    "chunked-input-limit": str(64 << 20),
    # Without it a connection that Glance has not read to its end is used again.
    "add-header": "Connection: close",
    "disable-logging": "true",
}
"""Of uWSGI: one process, since SQLite and Keystone's cache in memory are shared in it."""


@dataclass(frozen=True)
class Member:
    """A user of a project, and how to be it."""

    user: str
    project: str
    role: str
    credential: Mapping[str, str]
    """``auth`` of clouds.yaml, for an application credential."""


@dataclass(frozen=True)
class LocalCloud:
    """A local OpenStack in a folder: its settings, databases and images."""

    folder: Path
    environment: Path
    """The virtual environment of the services."""
    ports: Mapping[Service, int]
    admin_password: str
    name: str
    """Of its entry in clouds.yaml."""
    clouds_file: Path
    since: str
    """When it was made, ISO 8601."""
    tied: bool = False
    """Whether its services end together with who started them: for tests."""

    # Where things are.

    @property
    def auth_url(self) -> str:
        """Keystone's address."""
        return f"http://127.0.0.1:{self.ports['keystone']}/v3"

    @property
    def image_url(self) -> str:
        """Glance's address."""
        return f"http://127.0.0.1:{self.ports['glance']}"

    @property
    def filestore(self) -> Path:
        """Where Glance keeps the data of images."""
        return self.folder / "images"

    @property
    def admin_name(self) -> str:
        """The administrator's entry in clouds.yaml."""
        return f"{self.name}-admin"

    def log(self, service: Service) -> Path:
        """Return a service's log."""
        return self._daemon(service).log

    # The services.

    def _daemon(self, service: Service) -> Daemon:
        address = f"{self.auth_url}/" if service == "keystone" else f"{self.image_url}/versions"
        return Daemon(service, self.folder, address)

    def process(self, service: Service) -> Process | None:
        """Return a service's process, where it runs."""
        return self._daemon(service).process()

    @property
    def running(self) -> bool:
        """Whether all of it runs."""
        return all(self.process(service) for service in SERVICES)

    def start(self, service: Service) -> None:
        """Start a service, if it does not run, and wait until it answers.

        Raises:
            BakehouseError: it does not come up.
        """
        command = [str(self.environment / "bin" / "uwsgi"), "--ini", f"{self.folder}/{service}.ini"]
        variables = {"LOCAL_CLOUD_SERVICE": service, "LOCAL_CLOUD_FOLDER": str(self.folder)}
        self._daemon(service).start(command, _environment() | variables, tied=self.tied)

    def stop(self, service: Service, how: signal.Signals = signal.SIGTERM) -> bool:
        """End a service. Return whether it ran.

        Args:
            service: which.
            how: SIGTERM or SIGKILL.
        """
        return self._daemon(service).stop(how)

    # Its users.

    def admin(self) -> openstack.connection.Connection:
        """Return a connection as the administrator. Who calls closes it."""
        return openstack.connection.Connection(
            auth={**self.admin_auth(), "auth_url": self.auth_url},
            region_name=REGION,
            identity_api_version="3",
            app_name="bakehouse",
        )

    def admin_auth(self) -> dict[str, str]:
        """Return the administrator's ``auth`` of clouds.yaml."""
        return {
            "auth_url": self.auth_url,
            "username": "admin",
            "password": self.admin_password,
            "project_name": "admin",
            "user_domain_id": DOMAIN,
            "project_domain_id": DOMAIN,
        }

    def add_member(self, user: str, project: str, role: str = "member") -> Member:
        """Make a user with a role in a project, both of them where they are missing, and a credential for it."""
        password = secrets.token_urlsafe(24)
        admin = self.admin()
        try:
            identity = _identity(admin)
            where = _found(identity.find_project, project) or identity.create_project(name=project, domain_id=DOMAIN)
            who = _found(identity.find_user, user)
            if who is None:
                who = identity.create_user(name=user, domain_id=DOMAIN, password=password)
            else:
                identity.update_user(who, password=password)
            identity.assign_project_role_to_user(where, who, _found(identity.find_role, role))
        finally:
            admin.close()
        auth = {
            "auth_url": self.auth_url,
            "username": user,
            "password": password,
            "project_name": project,
            "user_domain_id": DOMAIN,
            "project_domain_id": DOMAIN,
        }
        made = _credential(auth)
        credential = {
            "auth_url": self.auth_url,
            "application_credential_id": made.id,
            "application_credential_secret": made.secret,
        }
        return Member(user, project, role, credential)

    def entry(self, member: Member) -> dict[str, object]:
        """Return what clouds.yaml says of a member."""
        return {
            "auth_type": "v3applicationcredential",
            "auth": dict(member.credential),
            "region_name": REGION,
            "identity_api_version": 3,
        }

    def admin_entry(self) -> dict[str, object]:
        """Return what clouds.yaml says of the administrator."""
        return {"auth": self.admin_auth(), "region_name": REGION, "identity_api_version": 3}

    def disk(self) -> int:
        """Return the bytes that it takes on disk."""
        return disk_usage(self.folder)


def default_folder() -> Path:
    """Return where the one of ``invoke openstack.up`` is."""
    return user_state_path("bakehouse") / "openstack"


def find(folder: Path | None = None) -> LocalCloud | None:
    """Return the local OpenStack in a folder, running or not."""
    where = folder or default_folder()
    try:
        data = json.loads((where / NOTE).read_text())
        return LocalCloud(
            folder=where,
            environment=Path(data["environment"]),
            ports={service: int(data["ports"][service]) for service in SERVICES},
            admin_password=data["admin_password"],
            name=data["name"],
            clouds_file=Path(data["clouds_file"]),
            since=data["since"],
            tied=bool(data.get("tied")),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def up(
    cache: Path,
    *,
    folder: Path | None = None,
    name: str = "bakehouse",
    clouds_file: Path | None = None,
    say: Callable[[str], None] = lambda _text: None,
    tied: bool = False,
) -> LocalCloud:
    """Bring a local OpenStack up: made where there is none, started where it does not run.

    Args:
        cache: the folder below which the services' virtual environment is.
        folder: where it is or shall be.
        name: of its entry in clouds.yaml.
        clouds_file: that file; the user's own by default.
        say: takes lines about what is done.
        tied: its services end together with this process: for tests.

    Raises:
        BakehouseError: the services cannot be installed, or do not come up.
    """
    where = folder or default_folder()
    where.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _held(where, say):
        environment = install(cache, say)
        found = find(where)
        if found is None and (where / NOTE).exists():
            raise BakehouseError(
                f"{where / NOTE} cannot be read", hint=f"mend it, or remove {where} with all that is in it"
            )
        if found is None:
            # A run that was killed while it made it.
            for left in where.iterdir():
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            say("making Keystone and Glance")
            found = _make(where, environment, name, clouds_file or clouds_yaml.user_file(), tied=tied)
        elif found.environment != environment:
            for service in SERVICES:
                found.stop(service)
            found = dataclasses.replace(found, environment=environment)
            _prepare(found)
        for service in SERVICES:
            if not found.process(service):
                say(f"starting {service}")
                found.start(service)
        if not (where / "ready").exists():
            _furnish(found, say)
            (where / "ready").touch()
        elif found.name not in clouds_yaml.names(found.clouds_file):
            # Somebody took it out.
            _enter(found, say)
    return found


def down(
    folder: Path | None = None, *, delete: bool = False, say: Callable[[str], None] = lambda _text: None
) -> LocalCloud:
    """End a local OpenStack; its data stays, unless it shall be deleted.

    Raises:
        BakehouseError: there is none.
    """
    with _held(folder or default_folder(), say):
        found = find(folder)
        if found is None:
            raise BakehouseError("there is no local OpenStack here", hint="`invoke openstack.up` makes one")
        for service in SERVICES:
            found.stop(service)
        if delete:
            for name in (found.name, found.admin_name):
                clouds_yaml.remove(found.clouds_file, name)
            shutil.rmtree(found.folder)
    return found


def _held(folder: Path, say: Callable[[str], None]) -> contextlib.AbstractContextManager[None]:
    """Keep others from bringing it up or down."""
    return lock.held(folder.with_suffix(".lock"), "the local OpenStack", wait=True, say=say)


# Installing.


def install(cache: Path, say: Callable[[str], None]) -> Path:
    """Return the virtual environment of the services, made where it is missing.

    Raises:
        BakehouseError: it cannot be made.
    """
    digest = hashlib.sha256(LOCK.read_bytes() + sys.version.encode()).hexdigest()[:12]
    target = cache / f"openstack-{digest}"
    if (target / "complete").exists():
        # When it was last used: the cache removes the longest unused first.
        (target / "complete").touch()
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with lock.held(cache / "openstack.lock", "the installation of Keystone and Glance", wait=True, say=say):
        if (target / "complete").exists():
            return target
        say("installing Keystone and Glance from PyPI into an environment of their own (once, 300 MB)")
        shutil.rmtree(target, ignore_errors=True)
        pip: list[str | Path] = [target / "bin" / "python", "-m", "pip", "--disable-pip-version-check"]
        commands: list[list[str | Path]] = [
            [sys.executable, "-m", "venv", target],
            [*pip, "install", "--quiet", "--no-deps", "--require-hashes", "--requirement", LOCK],
        ]
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment())
            if done.returncode != 0:
                raise BakehouseError(
                    "Keystone and Glance could not be installed",
                    hint="no network? pip's index is set with: pip config set global.index-url ...",
                    log="\n".join((done.stdout + done.stderr).splitlines()[-12:]),
                )
        (target / "complete").touch()
    return target


def _environment() -> dict[str, str]:
    """Return the variables of the services: without those that keep Python from compiling, or name another cloud."""
    unwanted = ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    return {key: value for key, value in os.environ.items() if key not in unwanted and not key.startswith("OS_")}


# Making.


def _make(folder: Path, environment: Path, name: str, clouds_file: Path, *, tied: bool) -> LocalCloud:
    ports = dict(zip(SERVICES, free_ports(len(SERVICES)), strict=True))
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    made = LocalCloud(folder, environment, ports, secrets.token_urlsafe(24), name, clouds_file, now, tied)
    for part in ("images", "staging", "tasks", "fernet", "credential"):
        (folder / part).mkdir()
    service_password = secrets.token_urlsafe(24)
    _write(folder / "keystone.conf", _keystone_conf(folder))
    _write(folder / "glance-api.conf", _glance_conf(made, service_password))
    shutil.copy(environment / "etc" / "glance" / "glance-api-paste.ini", folder)
    setup = {"region": REGION, "keystone": made.auth_url, "admin_password": made.admin_password}
    _write(folder / "setup.json", json.dumps(setup | {"service_password": service_password}))
    _prepare(made)
    return made


def _prepare(made: LocalCloud) -> None:
    """Write what depends on the virtual environment, and bring the databases to its state."""
    for service in SERVICES:
        lines = [f"{key} = {value}" for key, value in SERVER_OPTIONS.items()]
        lines += [f"http-socket = 127.0.0.1:{made.ports[service]}", f"wsgi-file = {SERVICES_FILE}"]
        lines += [f"virtualenv = {made.environment}"]
        _write(made.folder / f"{service}.ini", "\n".join(["[uwsgi]", *lines, ""]))
    done = subprocess.run(
        [made.environment / "bin" / "python", "-I", SERVICES_FILE, "setup", made.folder],
        capture_output=True, text=True, check=False, env=_environment(), stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if done.returncode != 0:
        raise BakehouseError(
            "the databases of Keystone and Glance could not be made",
            hint=f"see {made.folder}/keystone.log and glance.log",
            log="\n".join((done.stdout + done.stderr).splitlines()[-12:]),
        )
    _save(made)


def _furnish(made: LocalCloud, say: Callable[[str], None]) -> None:
    """Make what Keystone knows of Glance, the first project and its user, and write clouds.yaml."""
    setup = json.loads((made.folder / "setup.json").read_text())
    admin = made.admin()
    try:
        identity = _identity(admin)
        service = _found(identity.find_service, "glance") or identity.create_service(name="glance", type="image")
        if not [*identity.endpoints(service_id=service.id)]:
            for interface in ("public", "internal", "admin"):
                identity.create_endpoint(
                    service_id=service.id, interface=interface, url=made.image_url, region_id=REGION
                )
        project = _found(identity.find_project, "service") or identity.create_project(name="service", domain_id=DOMAIN)
        user = _found(identity.find_user, "glance")
        if user is None:
            user = identity.create_user(name="glance", password=setup["service_password"], domain_id=DOMAIN)
        for role in ("service", "admin"):
            found = _found(identity.find_role, role) or identity.create_role(name=role)
            identity.assign_project_role_to_user(project, user, found)
        # For limits: Glance asks Keystone for its own.
        identity.assign_system_role_to_user(user, _found(identity.find_role, "reader"), "all")
    finally:
        admin.close()
    _enter(made, say)


def _identity(connection: openstack.connection.Connection) -> Any:
    """Return the Identity API, version 3."""
    return connection.identity


def _is_refused(error: BaseException) -> bool:
    return isinstance(error, openstack.exceptions.HttpException) and error.status_code == HTTPStatus.UNAUTHORIZED


@tenacity.retry(
    retry=tenacity.retry_if_exception(_is_refused),
    wait=tenacity.wait_fixed(0.5),
    stop=tenacity.stop_after_delay(10),
    reraise=True,
)
def _credential(auth: Mapping[str, str]) -> Any:
    """Make an application credential as a user whose password was set just now.

    A new password revokes the tokens of before. A token's time is in whole seconds, so that one which is issued within
    the second of the change counts as one of before and is refused; the next second's is not.
    """
    own = openstack.connection.Connection(auth=auth, identity_api_version="3", app_name="bakehouse")
    try:
        return _identity(own).create_application_credential(
            user=own.current_user_id, name=f"bakehouse-{secrets.token_hex(4)}", unrestricted=False
        )
    finally:
        own.close()


def _found(find: Callable[..., Any], name: str) -> Any:
    """Return what a name stands for, or None."""
    try:
        return find(name, ignore_missing=False)
    except openstack.exceptions.NotFoundException:
        return None


def _enter(made: LocalCloud, say: Callable[[str], None]) -> None:
    member = made.add_member(USER, PROJECT)
    clouds_yaml.add(made.clouds_file, made.name, made.entry(member), say)
    clouds_yaml.add(made.clouds_file, made.admin_name, made.admin_entry(), say)


def _keystone_conf(folder: Path) -> str:
    return f"""\
[DEFAULT]
log_file = {folder}/keystone.log
[database]
connection = sqlite:///{folder}/keystone.db
sqlite_synchronous = false
[fernet_tokens]
key_repository = {folder}/fernet
[credential]
key_repository = {folder}/credential
[cache]
enabled = true
backend = oslo_cache.dict
[identity]
# Its passwords are random and long.
password_hash_rounds = 4
"""


def _glance_conf(made: LocalCloud, password: str) -> str:
    folder = made.folder
    return f"""\
[DEFAULT]
log_file = {folder}/glance.log
enabled_backends = file:file
[database]
connection = sqlite:///{folder}/glance.db
[glance_store]
default_backend = file
[file]
filesystem_store_datadir = {folder}/images
filesystem_store_chunk_size = {1 << 20}
[os_glance_staging_store]
filesystem_store_datadir = {folder}/staging
[os_glance_tasks_store]
filesystem_store_datadir = {folder}/tasks
[keystone_authtoken]
auth_type = password
auth_url = {made.auth_url}
www_authenticate_uri = {made.auth_url}
username = glance
password = {password}
project_name = service
user_domain_id = {DOMAIN}
project_domain_id = {DOMAIN}
region_name = {REGION}
[paste_deploy]
flavor = keystone
config_file = {folder}/glance-api-paste.ini
[oslo_limit]
auth_type = password
auth_url = {made.auth_url}
username = glance
password = {password}
system_scope = all
user_domain_id = {DOMAIN}
service_type = image
region_name = {REGION}
"""


def _save(made: LocalCloud) -> None:
    data: dict[str, Any] = dataclasses.asdict(made) | {"ports": dict(made.ports)}
    data = {key: str(value) if isinstance(value, Path) else value for key, value in data.items() if key != "folder"}
    _write(made.folder / NOTE, json.dumps(data, indent=1))


def _write(path: Path, text: str) -> None:
    """Write a file that holds a secret: it never exists readable by others."""
    path.touch(mode=0o600)
    path.write_text(text)
