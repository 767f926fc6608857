"""A real Nova API on SQLite, and servers in it that no hypervisor runs. Runs in the services' environment.

python -I nova_services.py setup FOLDER
python -I nova_services.py add FOLDER PROJECT IMAGE
uwsgi --wsgi-file nova_services.py      (with NOVA_FOLDER set)
"""

from __future__ import annotations

import os
import sys
import uuid
from pathlib import Path
from typing import Any

os.environ.setdefault("OS_NOVA_DISABLE_EVENTLET_PATCHING", "1")


def manage(folder: Path, *words: str) -> None:
    """Run nova-manage in a process of its own: forked, since importing it takes seconds."""
    child = os.fork()
    if child == 0:
        from nova.cmd import manage as command

        sys.argv = ["nova-manage", "--config-file", str(folder / "nova.conf"), *words]
        os._exit(command.main() or 0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        sys.exit(f"nova-manage {' '.join(words)} failed: {status}")


def setup(folder: Path) -> None:
    import nova.cmd.manage  # noqa: F401 - before the forks

    manage(folder, "api_db", "sync")
    manage(folder, "cell_v2", "map_cell0", "--database_connection", f"sqlite:///{folder}/cell0.db")
    manage(folder, "cell_v2", "create_cell", "--name", "cell1")
    manage(folder, "db", "sync")


def add(folder: Path, project: str, image: str) -> None:
    """Put a server into the database, as nova-conductor would."""
    from nova import config, context, objects
    from nova.db.main import api as database

    config.parse_args(["nova", "--config-file", str(folder / "nova.conf")])
    objects.register_all()
    admin = context.RequestContext(user_id="u", project_id=project, is_admin=True)
    cell = next(cell for cell in objects.CellMappingList.get_all(admin) if cell.name == "cell1")
    flavor: dict[str, Any] = {
        "id": 1, "name": "f", "memory_mb": 1024, "vcpus": 1, "root_gb": 1, "ephemeral_gb": 0, "swap": 0,
        "flavorid": "1", "extra_specs": {}, "rxtx_factor": 1.0, "vcpu_weight": 0, "disabled": False, "is_public": True,
        "description": None,
    }  # fmt: skip
    with context.target_cell(admin, cell) as there:
        server = objects.Instance(
            there, uuid=str(uuid.uuid4()), project_id=project, user_id="u", image_ref=image, display_name="node",
            hostname="node", vm_state="active", root_gb=1, memory_mb=1024, vcpus=1, launch_index=0, locked=False,
            flavor=objects.Flavor(**flavor), old_flavor=None, new_flavor=None, metadata={}, system_metadata={},
        )  # fmt: skip
        server.create()
        database.instance_info_cache_update(there, server.uuid, {"network_info": "[]"})
    objects.InstanceMapping(
        admin, instance_uuid=server.uuid, cell_mapping=cell, project_id=project, user_id="u", queued_for_delete=False
    ).create()


if __name__ == "__main__":
    setup(Path(sys.argv[2])) if sys.argv[1] == "setup" else add(Path(sys.argv[2]), sys.argv[3], sys.argv[4])
elif "NOVA_FOLDER" in os.environ:
    os.environ["OS_NOVA_CONFIG_DIR"] = os.environ["NOVA_FOLDER"]
    sys.argv = ["nova-api", "--config-file", f"{os.environ['NOVA_FOLDER']}/nova.conf"]
    from nova.wsgi.osapi_compute import application  # noqa: F401 - what uWSGI looks for
