"""Keystone and Glance as a WSGI server starts them, and their first set-up. Runs in their own virtual environment.

    python -I local_cloud_services.py setup FOLDER    (reads FOLDER/setup.json)
    uwsgi --wsgi-file local_cloud_services.py      (with LOCAL_CLOUD_SERVICE and LOCAL_CLOUD_FOLDER set)

It knows nothing of Bakehouse: what is imported is the standard library, and what these services bring.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import Engine


@event.listens_for(Engine, "before_cursor_execute", retval=True)  # type: ignore[untyped-decorator, unused-ignore]
def _begin_immediately(
    _connection: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, _many: Any
) -> tuple[str, Any]:
    """Let SQLite's writers wait for each other.

    SQLite refuses at once ("database is locked") where two transactions that began by reading both want to write, and
    no timeout helps: https://www.sqlite.org/lang_transaction.html
    """
    return ("BEGIN IMMEDIATE" if statement == "BEGIN" else statement), parameters


@event.listens_for(Engine, "connect")  # type: ignore[untyped-decorator, unused-ignore]
def _set_pragmas(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA busy_timeout = 60000")
    cursor.close()


def application_of(service: str, folder: Path) -> Any:
    """Return a service's WSGI application."""
    if service == "keystone":
        # It reads its command line.
        sys.argv = ["keystone", "--config-file", str(folder / "keystone.conf")]
        from keystone.wsgi.api import application
    else:
        os.environ["OS_GLANCE_CONFIG_DIR"] = str(folder)
        from glance.wsgi.api import application
    return application


def setup(folder: Path) -> None:
    """Make databases and keys, and what a cloud has from its first day on."""
    wanted = json.loads((folder / "setup.json").read_text())
    # Side by side, since most of it is imports.
    glance = subprocess.Popen([sys.executable, "-I", __file__, "glance-db", str(folder)])
    _keystone(folder, wanted)
    if glance.wait() != 0:
        sys.exit("the database of Glance could not be made")


def _keystone(folder: Path, wanted: dict[str, Any]) -> None:
    from keystone.cmd import cli

    configuration = ["--config-file", str(folder / "keystone.conf")]
    owner = ["--keystone-user", str(os.getuid()), "--keystone-group", str(os.getgid())]
    os.environ["OS_BOOTSTRAP_PASSWORD"] = wanted["admin_password"]
    addresses = [
        word for kind in ("admin", "public", "internal") for word in (f"--bootstrap-{kind}-url", wanted["keystone"])
    ]
    for command in (
        ["db_sync"],
        ["fernet_setup", *owner],
        ["credential_setup", *owner],
        ["bootstrap", "--bootstrap-region-id", wanted["region"], *addresses],
    ):
        child = os.fork()
        if child == 0:
            # A process each, since each leaves its settings behind; forked, since importing takes seconds.
            cli.main(argv=["keystone-manage", *configuration, *command])
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
            sys.exit(f"keystone-manage {command[0]} failed")


def glance_database(folder: Path) -> None:
    """Make the database of Glance."""
    from glance.cmd import manage

    sys.argv = ["glance-manage", "--config-file", str(folder / "glance-api.conf"), "db", "sync"]
    sys.exit(manage.main())


if __name__ == "__main__":
    {"setup": setup, "glance-db": glance_database}[sys.argv[1]](Path(sys.argv[2]))
elif "LOCAL_CLOUD_SERVICE" in os.environ:
    application = application_of(os.environ["LOCAL_CLOUD_SERVICE"], Path(os.environ["LOCAL_CLOUD_FOLDER"]))
