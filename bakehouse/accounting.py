"""Accounting for the test controller: slurmdbd and its database, installed from the mirrors and run beside it."""

from __future__ import annotations

from bakehouse import waiting
from bakehouse.slurm import NAME, Controller

PORT = 6819
DATABASE = "slurm_acct_db"
SOCKET = "run/mysqld/mysqld.sock"
START_SECONDS = 120

SLURMDBD_CONF = """\
AuthType=auth/{authentication}
{auth_info}DbdHost={name}
DbdPort={port}
SlurmUser=slurm
LogFile=/var/log/slurm/slurmdbd.log
PidFile=/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=slurm
StorageLoc={database}
"""

SLURM_CONF = f"""\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={NAME}
AccountingStoragePort={PORT}
AccountingStoreFlags=job_comment
"""
"""Lines of slurm.conf in place of the one that says that there is none."""


def install(controller: Controller, release: str, mirrors: tuple[str, str]) -> None:
    """Install slurmdbd and MariaDB into the controller's root, which is thrown away with it.

    Args:
        controller: prepared, not started.
        release: Debian release of its image.
        mirrors: archive and security archive to install from.

    Raises:
        BakehouseError: the mirrors do not serve them.
    """
    controller.install(release, mirrors, "slurmdbd", "mariadb-server", "slurm-wlm-mysql-plugin")
    controller.replace_in_configuration("AccountingStorageType=accounting_storage/none\n", SLURM_CONF)


def start(controller: Controller) -> None:
    """Start the database and slurmdbd. munged must run already, where it is used.

    Raises:
        BakehouseError: one of them does not come up.
    """
    controller.run(
        "sh", "-euc", "install -d -o mysql -g mysql /run/mysqld; install -d -o slurm /var/log/slurm", check=True
    )
    controller.daemon("mariadbd", ["/usr/sbin/mariadbd", "--user=mysql", "--skip-networking"])
    waiting.until(
        "database", lambda: controller.run("mariadb-admin", "ping").returncode == 0, START_SECONDS, poll=0.3,
        check=lambda: controller.must_run("mariadbd"), last_words=lambda: controller.log("mariadbd")[-3000:],
    )  # fmt: skip
    # Its user is known by the socket that it comes through: no password is needed.
    statements = (
        f"CREATE DATABASE IF NOT EXISTS {DATABASE}; "
        "CREATE USER IF NOT EXISTS slurm@localhost IDENTIFIED VIA unix_socket; "
        f"GRANT ALL ON {DATABASE}.* TO slurm@localhost;"
    )
    controller.run("mariadb", "--execute", statements, check=True)
    authentication = controller.authentication
    text = SLURMDBD_CONF.format(
        authentication=authentication, name=NAME, port=PORT, database=DATABASE,
        auth_info="AuthInfo=use_client_ids\n" if authentication == "slurm" else "",
    )  # fmt: skip
    controller.write("etc/slurm/slurmdbd.conf", text)
    controller.run(
        "sh", "-euc", "chown slurm: /etc/slurm/slurmdbd.conf; chmod 600 /etc/slurm/slurmdbd.conf", check=True
    )
    controller.daemon("slurmdbd", ["unshare", "--uts", "sh", "-c", f"hostname {NAME}; exec /usr/sbin/slurmdbd -D"])
    waiting.until(
        "answer from slurmdbd", lambda: controller.run("sacctmgr", "--noheader", "list", "cluster").returncode == 0,
        START_SECONDS, poll=0.3, check=lambda: controller.must_run("slurmdbd"),
        last_words=lambda: controller.log("slurmdbd")[-3000:],
    )  # fmt: skip
