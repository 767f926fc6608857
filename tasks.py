"""Invoke tasks: parse, call the library, print."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

from invoke import Collection, Context, Exit, task

from bakehouse import (
    cli,
    cli_bootstrap,
    cli_cloud,
    cli_compare,
    cli_containers,
    cli_images,
    cli_nightly,
    cli_nodes,
    cli_openstack,
    cli_roce,
    cli_up,
    cli_up_qemu,
    terminal,
)
from bakehouse import userdata as users_data
from bakehouse.errors import BakehouseError
from bakehouse.server_checks import Wanted


def command(function: Callable[..., None], **options: Any) -> Any:
    """Make a task whose errors are one sentence, one hint, exit status 1; a traceback with --debug."""

    @functools.wraps(function)
    def run(*arguments: Any, **named: Any) -> None:
        # Where users do not have the system's own tools on their PATH.
        os.environ["PATH"] = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
        try:
            function(*arguments, **named)
        except BakehouseError as error:
            if os.environ.get("BAKEHOUSE_DEBUG") or {"--debug", "-d"} & set(sys.argv[1:]):
                raise
            terminal.show_error(error)
            raise Exit(code=1) from error
        except KeyboardInterrupt:
            raise Exit("stopped", code=130) from None
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise Exit(code=141) from None

    return task(run, **options)


def _doctor(_context: Context, json: bool = False) -> None:
    """Check this host: tools, root, disk, memory, mirrors, KVM, clouds; says how to mend what is amiss.

    Example: invoke doctor
    """
    cli.doctor(as_json=json)


def _bake(
    _context: Context,
    platform: str,
    release: str = "",
    format: str = "",
    builder: str = "dib",
    base: str = "",
    base_checksum: str = "",
    in_cloud: str = "",
    flavor: str = "",
    network: str = "",
    volume_size: int = 0,
    floating_network: str = "",
    security_group: str = "default",
    refresh: bool = False,
    force: bool = False,
    verbose: bool = False,
    wait: bool = True,
    verify: bool = True,
    upload: bool = False,
    cloud: str = "",
    region: str = "",
    json: bool = False,
) -> None:
    """Bake an image: what a manifest declares becomes a disk image in the store, and verify it by booting it.

    Does nothing where nothing changed.

    Examples:
      invoke bake --platform slurm
      invoke bake --platform slurm --release bookworm
      invoke bake --platform slurm --format qcow2,raw
      invoke bake --platform slurm --refresh
      invoke bake --platform slurm --no-verify
      invoke bake --platform slurm --builder packer
      invoke bake --platform slurm --builder packer --in-cloud mycloud --flavor m1.small --network private
      invoke bake --platform slurm --builder packer --base https://.../image.qcow2 --base-checksum sha512:...
      invoke bake --platform slurm --upload --cloud mycloud
    """
    server = cli.server(in_cloud, flavor, network, volume_size, floating_network, security_group)
    cli.bake(
        platform,
        release=release,
        formats=format,
        builder=cli.Builder(builder, base, base_checksum, server),
        refresh=refresh,
        force=force,
        verbose=verbose,
        wait=wait,
        verify=verify,
        upload=cli_cloud.target(cloud, region, upload=upload),
        as_json=json,
    )


def _plan(
    _context: Context,
    platform: str,
    release: str = "",
    format: str = "",
    builder: str = "dib",
    base: str = "",
    base_checksum: str = "",
    json: bool = False,
) -> None:
    """Show what a bake would do: elements, packages, input digest, what is cached, what would be built and why.

    Example: invoke plan --platform slurm
    """
    made_by = cli.Builder(builder, base, base_checksum)
    cli.plan(platform, release=release, formats=format, builder=made_by, as_json=json)


def _manifests(_context: Context, json: bool = False) -> None:
    """List the manifests: what can be baked."""
    cli.manifests(as_json=json)


def _schema(_context: Context) -> None:
    """Print the JSON Schema of manifests, for editors.

    Example: invoke manifests.schema > manifest.schema.json
    """
    cli.schema()


def _images(_context: Context, cloud: str = "", region: str = "", json: bool = False) -> None:
    """List the images in the store, or those in a cloud: channel, age, size, verified, servers that use them.

    Examples:
      invoke images
      invoke images --cloud mycloud
    """
    if cloud or region:
        cli_cloud.images(cloud=cloud, region=region, as_json=json)
    else:
        cli.images(as_json=json)


def _images_verify(_context: Context, tag: str, cloud: str = "", region: str = "", json: bool = False) -> None:
    """Download an image from a cloud and check that it is what was baked: hash, record, signature.

    Example: invoke images.verify 20261123-5853cc9 --cloud mycloud
    """
    cli_cloud.verify(tag, cloud=cloud, region=region, as_json=json)


def _images_diff(_context: Context, old: str, new: str, by_size: bool = False, json: bool = False) -> None:
    """Show which packages changed between two images of the store, with version and origin.

    Examples:
      invoke images.diff 20261122-3f2a9c1 20261123-5853cc9
      invoke images.diff debian-cloud roce --by-size
    """
    cli_images.diff(old, new, by_size=by_size, as_json=json)


def _sign(_context: Context, tag: str, dry_run: bool = False) -> None:
    """Sign an image of the store with the site's key; publish does it by itself.

    Example: invoke sign slurm
    """
    cli_images.sign(tag, dry_run=dry_run)


def _sign_check(_context: Context, tag: str) -> None:
    """Check that an image of the store is as it was signed: image file, record and SBOM.

    Example: invoke sign.check slurm
    """
    cli_images.check(tag)


def _sign_key(_context: Context, path: str) -> None:
    """Make a key to sign with (Ed25519), and its public half beside it.

    Example: invoke sign.key ~/.config/bakehouse/signing.key
    """
    cli_images.make_key(path)


def _publish(
    _context: Context,
    tag: str,
    cloud: str = "",
    region: str = "",
    visibility: str = "",
    format: str = "",
    dry_run: bool = False,
    json: bool = False,
) -> None:
    """Publish an image: send it to Glance, compare, describe, and only then show it.

    Does nothing where it is there already; finishes what a killed run began.

    Examples:
      invoke publish slurm --cloud mycloud
      invoke publish 20261123-5853cc9 --cloud mycloud --visibility community
      invoke publish slurm --dry-run                 (with OS_CLOUD, or 'cloud' in bakehouse.yaml)
    """
    cli_cloud.publish(
        tag,
        cloud=cloud,
        region=region,
        visibility=visibility,
        file_format=format,
        dry_run=dry_run,
        as_json=json,
    )


def _publish_check(_context: Context, cloud: str = "", region: str = "", json: bool = False) -> None:
    """List what is in the store or in the cloud only, half-uploaded, lost, or other than it should be.

    Example: invoke publish.check --cloud mycloud
    """
    cli_cloud.check(cloud=cloud, region=region, as_json=json)


def _promote(
    _context: Context,
    tag: str,
    to: str,
    cloud: str = "",
    region: str = "",
    force: bool = False,
    dry_run: bool = False,
    json: bool = False,
) -> None:
    """Move a channel to a published image. Refuses one that is not verified.

    The image before is hidden; servers and lock files keep it. History is kept in Glance: see channels.

    Examples:
      invoke promote 20261123-5853cc9 --to candidate --cloud mycloud
      invoke promote 20261123-5853cc9 --to stable --cloud mycloud --dry-run
    """
    cli_cloud.promote(tag, to=to, cloud=cloud, region=region, force=force, dry_run=dry_run, as_json=json)


def _rollback(
    _context: Context,
    platform: str,
    channel: str,
    cloud: str = "",
    region: str = "",
    force: bool = False,
    dry_run: bool = False,
    json: bool = False,
) -> None:
    """Move a channel back to the image before. Refuses one that is not verified.

    Example: invoke rollback --platform slurm --channel stable --cloud mycloud
    """
    cli_cloud.rollback(platform, of=channel, cloud=cloud, region=region, force=force, dry_run=dry_run, as_json=json)


def _channels(_context: Context, platform: str = "", cloud: str = "", region: str = "", json: bool = False) -> None:
    """Show where channels point to, and their history: who moved them, when, from where.

    Example: invoke channels --platform slurm --cloud mycloud
    """
    cli_cloud.channels(cloud=cloud, region=region, platform=platform, as_json=json)


def _prune_images(
    _context: Context,
    keep: int = 3,
    platform: list[str] = [],  # noqa: B006 - how Invoke declares a flag that may be repeated
    cloud: str = "",
    region: str = "",
    lock: list[str] = [],  # noqa: B006
    yes: bool = False,
    dry_run: bool = False,
    json: bool = False,
) -> None:
    """Show which published images are not needed any more and why; delete them with --yes.

    Stays: what a channel points to or may be rolled back to, what an images.lock.yaml in this git repository pins,
    what a server was made of, and the newest of each manifest.

    Examples:
      invoke prune --keep 3 --cloud mycloud
      invoke prune --keep 3 --cloud mycloud --platform slurm --yes
    """
    cli_cloud.prune(
        keep=keep,
        cloud=cloud,
        region=region,
        platforms=platform,
        locks=lock,
        yes=yes and not dry_run,
        as_json=json,
    )


def _resolve(
    _context: Context,
    platform: str,
    channel: str = "stable",
    tag: str = "",
    format: str = "id",
    cloud: str = "",
    region: str = "",
) -> None:
    """Print one image, for a deploy config: the one that a channel points to, or that has a tag.

    Examples:
      invoke resolve --platform slurm --channel stable --cloud mycloud
      invoke resolve --platform slurm --channel stable --format tfvars > images.auto.tfvars
    """
    cli_cloud.resolve(platform, of=channel, tag=tag, cloud=cloud, region=region, form=format)


def _pin(
    _context: Context,
    platform: str = "",
    channel: str = "stable",
    tag: str = "",
    cloud: str = "",
    region: str = "",
    file: str = "",
    check: bool = False,
    allow_behind: bool = False,
    dry_run: bool = False,
    json: bool = False,
) -> None:
    """Write an image into images.lock.yaml, to commit beside a deploy config; or check what stands there.

    --check fails where a pinned image is behind its channel, hidden, gone or altered.

    Examples:
      invoke pin --platform slurm --channel stable --cloud mycloud
      invoke pin --check
      invoke pin --check --allow-behind --file deploy/images.lock.yaml
    """
    cli_cloud.pin_image(
        platform=platform,
        of=channel,
        tag=tag,
        cloud=cloud,
        region=region,
        file=file,
        check_only=check,
        allow_behind=allow_behind,
        dry_run=dry_run,
        as_json=json,
    )


def _nightly(
    _context: Context,
    platform: list[str] = [],  # noqa: B006 - how Invoke declares a flag that may be repeated
    cloud: str = "",
    region: str = "",
    publish: bool = True,
    verify: bool = True,
    executor: str = "local",
    clock_is_right: bool = False,
    dry_run: bool = False,
    verbose: bool = False,
    json: bool = False,
) -> None:
    """Run a night: renew, bake what has changed, verify, publish as candidate, promote by the site's policy, prune.

    Where no cloud is named (--cloud, 'cloud' in bakehouse.yaml, OS_CLOUD) nothing is published. A night that was killed
    goes on where it was. Exit status 1 where an image failed. The policy stands in bakehouse.yaml: docs/nightly.md.

    Examples:
      invoke nightly
      invoke nightly --platform slurm --platform kubernetes --cloud mycloud
      invoke nightly --dry-run
      invoke nightly --executor slurm
    """
    cli_nightly.run(
        platform,
        cloud=cloud,
        region=region,
        publish=publish,
        verify=verify,
        executor=executor,
        clock_is_right=clock_is_right,
        dry_run=dry_run,
        verbose=verbose,
        as_json=json,
    )


def _nightly_bake(_context: Context, night: str, image: str, verify: bool = True) -> None:
    """Bake one image of a night that is going on elsewhere: what each task of --executor slurm does.

    Example: invoke nightly.bake --night 2026-11-27 --image slurm
    """
    cli_nightly.bake(night, image, verify=verify)


def _nightly_show(_context: Context, night: str = "", builders: int = 0, json: bool = False) -> None:
    """Show what a night came to; the last one by default.

    Examples:
      invoke nightly.show
      invoke nightly.show --night 2026-11-27
      invoke nightly.show --builders 2       (how two builders would have shared its bakes)
    """
    cli_nightly.show(night, builders=builders, as_json=json)


def _nightly_list(_context: Context, json: bool = False) -> None:
    """List the nights.

    Example: invoke nightly.list
    """
    cli_nightly.list_all(as_json=json)


def _outdated(
    _context: Context,
    platform: list[str] = [],  # noqa: B006
    cloud: str = "",
    region: str = "",
    check: bool = False,
    json: bool = False,
) -> None:
    """List of which packages of the images the mirror has newer versions, security updates first.

    The newest image of each manifest in the store, or, with --cloud, those that channels point to.

    Examples:
      invoke outdated
      invoke outdated --cloud mycloud --check       (fails where security updates are missing)
    """
    cli_nightly.show_outdated(cloud=cloud, region=region, platforms=platform, check=check, as_json=json)


def _ci_render(
    _context: Context,
    system: str,
    platform: list[str] = [],  # noqa: B006
    cloud: str = "",
    runner: str = "",
    at: str = "02:17",
    folder: str = "",
    output: str = "",
) -> None:
    """Render a pipeline that runs nights: for GitLab CI, GitHub Actions, Zuul, or a systemd timer.

    Examples:
      invoke ci.render --system gitlab
      invoke ci.render --system github --platform slurm --cloud mycloud --output /tmp/pipeline
      invoke ci.render --system systemd --at 03:30 --folder /opt/bakehouse --output /tmp/units
    """
    cli_nightly.render(
        system=system, platforms=platform, cloud=cloud, runner=runner, at=at, folder=folder, output=output
    )


def _show(_context: Context, tag: str, json: bool = False) -> None:
    """Show one image: files, digests, versions, seconds by stage.

    TAG may be the beginning of a tag, or a manifest's name for its newest image.
    Example: invoke images.show slurm
    """
    cli.show(tag, as_json=json)


def _remove(_context: Context, tag: str, dry_run: bool = False) -> None:
    """Remove an image from the store.

    Example: invoke images.remove 20261123-5853cc9
    """
    cli.remove(tag, dry_run=dry_run)


def _cache(_context: Context, json: bool = False) -> None:
    """Show what the cache holds, its size and age."""
    cli.cache(as_json=json)


def _prune(_context: Context, limit: str = "", everything: bool = False, dry_run: bool = False) -> None:
    """Shrink the cache to its limit, the longest unused first.

    Examples:
      invoke cache.prune
      invoke cache.prune --limit 5GiB
      invoke cache.prune --everything
    """
    cli.prune(limit=limit, everything=everything, dry_run=dry_run)


def _verify(_context: Context, tag: str, firmware: str = "", verbose: bool = False, json: bool = False) -> None:
    """Verify an image: boot it, join it to a real cluster, run jobs, reboot it, run its testinfra suites.

    The result and the timeline go into the image's record; an image that failed is marked. Needs root or sudo.

    Examples:
      invoke verify slurm
      invoke verify 20261123-5853cc9 --firmware uefi
    """
    cli_nodes.verify(tag, firmware=firmware, verbose=verbose, as_json=json)


def _verify_host(
    _context: Context,
    host: str,
    platform: str,
    tag: str = "",
    report: str = "",
    ssh_config: str = "",
    json: bool = False,
) -> None:
    """Ask a node that runs what its testinfra suites ask, over SSH. It changes nothing there.

    Examples:
      invoke verify.host --host root@node-1 --platform roce
      invoke verify.host --host debian@node-1 --platform slurm,roce --tag 20261123-5853cc9 --report node-1.xml
    """
    cli_nodes.verify_host(host, platform=platform, tag=tag, report=report, ssh_config=ssh_config, as_json=json)


def _timeline(_context: Context, tag: str, json: bool = False) -> None:
    """Show what an image's boot waited for, from power-on to its first job, as its verification saw it.

    Example: invoke images.timeline slurm
    """
    cli_nodes.show_timeline(tag, as_json=json)


def _boot(
    _context: Context,
    tag: str,
    firmware: str = "bios",
    memory: str = "1GiB",
    cpus: int = 1,
    disk: str = "",
    key: str = "",
    user_data: str = "",
    timeout: int = 900,
    exec: str = "",
    data_source: str = "nocloud",
    name: str = "",
    join: bool = False,
) -> None:
    """Boot an image in QEMU, show its console, give an SSH command, and stop it cleanly on Ctrl-C.

    The image itself is not changed: what the machine writes is thrown away.

    Examples:
      invoke boot slurm
      invoke boot 20261123-5853cc9 --firmware uefi --memory 2GiB --disk 10GiB
      invoke boot slurm --exec 'systemd-analyze'
      invoke boot slurm --join --name node-1         (after: invoke cluster.up slurm)
      invoke boot slurm --data-source metadata
    """
    cli_nodes.boot(
        tag,
        firmware=firmware,
        memory=memory,
        cpus=cpus,
        disk=disk,
        key=key,
        user_data=user_data,
        timeout=timeout,
        execute=exec,
        data_source=data_source,
        name=name,
        join=join,
    )


def _userdata(
    _context: Context,
    platform: str = "slurm",
    path: str = "bake",
    node: str = "",
    controller: list[str] = [],  # noqa: B006 - how Invoke declares a flag that may be repeated
    authentication: str = "munge",
    feature: list[str] = [],  # noqa: B006
    hardware: str = "",
    key_file: str = "",
    api_server: str = "",
    ca_hash: list[str] = [],  # noqa: B006
    discovery_file: str = "",
    label: list[str] = [],  # noqa: B006
    taint: list[str] = [],  # noqa: B006
    provider_id: str = "",
    cloud_provider: str = "",
    broker: str = "",
    ca: str = "",
    token_file: str = "",
    ssh_key: list[str] = [],  # noqa: B006
    roce: str = "",
    devices: int = 1,
    bundle: str = "",
    bundle_url: str = "",
    container: str = "",
    insecure_registry: bool = False,
    output: str = "",
) -> None:
    r"""Print cloud-init user-data that brings a node into its cluster. Secrets come from files, never from flags.

    Examples:
      invoke join.token --platform slurm --node node-1 > token
      invoke userdata --controller ctl.example.org --node node-1 --broker https://ctl.example.org:8444 \
          --ca ca.crt --token-file token --output node-1.yaml
      invoke userdata --controller ctl.example.org --key-file /etc/munge/munge.key --output nodes.yaml
      kubeadm token create --ttl 30m > token
      invoke userdata --platform kubernetes --api-server api.example.org:6443 --ca-hash sha256:0123... \
          --key-file token --label zone=a --taint gpu=yes:NoSchedule --output nodes.yaml
      invoke userdata --platform roce --devices 2 --roce roce.yaml --output nodes.yaml
      invoke userdata --path bootstrap --bundle slurm-71d3947.tar.gz --bundle-url https://web/slurm-71d3947.tar.gz \
          --controller ctl.example.org --key-file /etc/munge/munge.key --output nodes.yaml
      invoke userdata --path hybrid --container registry.example.org/bakehouse/slurm@sha256:0123... \
          --controller ctl.example.org --key-file /etc/munge/munge.key --output nodes.yaml
    """
    shared = cli_nodes.Shared(
        path=path,
        node=node,
        key_file=key_file,
        broker=broker,
        ca=ca,
        token_file=token_file,
        ssh_keys=ssh_key,
        bundle=bundle,
        bundle_url=bundle_url,
        container=container,
        insecure_registry=insecure_registry,
    )
    join: users_data.Join | users_data.KubernetesJoin | users_data.RoceJoin
    if platform == "roce":
        join = cli_nodes.roce_join(shared, devices=devices, roce=roce)
    elif platform == "kubernetes":
        if roce:
            raise BakehouseError("--roce is not for Kubernetes nodes yet", hint="--platform slurm or roce")
        join = cli_nodes.kubernetes_join(
            shared,
            api_server=api_server,
            ca_hashes=ca_hash,
            discovery_file=discovery_file,
            labels=label,
            taints=taint,
            provider_id=provider_id,
            cloud_provider=cloud_provider,
        )
    else:
        join = cli_nodes.slurm_join(
            shared,
            platform=platform,
            controllers=controller,
            authentication=authentication,
            features=feature,
            hardware=hardware,
            roce=roce,
        )
    cli_nodes.render_userdata(join, output)


def _bootstrap_bundle(_context: Context, platform: str, output: str = "", json: bool = False) -> None:
    """Write the bundle that makes plain nodes those of a platform at boot: definition, files and Ansible play.

    The same definition gives the same bytes.

    Example: invoke bootstrap.bundle --platform slurm
    """
    cli_bootstrap.bundle(platform, output, as_json=json)


def _bootstrap_push(_context: Context, platform: str, host: str, ssh_config: str = "") -> None:
    """Make a running plain node one of a platform, over SSH. A node that is so already is not changed.

    Example: invoke bootstrap.push --platform slurm --host root@node-1
    """
    cli_bootstrap.push(platform, host, ssh_config=ssh_config)


def _container_build(
    _context: Context, platform: str, refresh: bool = False, verbose: bool = False, json: bool = False
) -> None:
    """Build the container image of a platform: what its manifest declares, in a layer on a small Debian root.

    Does nothing where nothing changed. No container engine is needed.

    Examples:
      invoke container.build --platform slurm
      invoke container.build --platform slurm --refresh
    """
    cli_containers.build(platform, refresh=refresh, verbose=verbose, as_json=json)


def _container_push(
    _context: Context,
    platform: str,
    registry: str = "",
    insecure: bool = False,
    verbose: bool = False,
    json: bool = False,
) -> None:
    """Push the container image of a platform to a registry, built where it is not there; print its name by digest.

    Once: the next time the registry is only asked whether it has it. Credentials are those of `buildah login` and
    `podman login` (containers-auth.json(5)), or of the file that REGISTRY_AUTH_FILE names.

    Examples:
      invoke container.push --platform slurm
      invoke container.push --platform slurm --registry registry.example.org/hpc
      invoke container.push --platform slurm --registry 10.0.0.5:5000 --insecure
    """
    cli_containers.push(platform, address=registry, insecure=insecure, verbose=verbose, as_json=json)


def _registry_up(_context: Context, address: str = "", port: int = 0) -> None:
    """Bring up a container registry on this host: Debian's docker-registry, in a folder of your own; no root needed.

    It asks for no password, so it listens on the loopback, where no other is named.

    Examples:
      invoke registry.up
      invoke registry.up --address 10.0.0.5 --port 5000
    """
    cli_containers.registry_up(address=address, port=port)


def _registry_down(_context: Context, purge: bool = False, dry_run: bool = False) -> None:
    """Stop the registry on this host; what was pushed to it stays.

    Examples:
      invoke registry.down
      invoke registry.down --purge
    """
    cli_containers.registry_down(purge=purge, dry_run=dry_run)


def _registry_status(_context: Context, json: bool = False) -> None:
    """Say whether the registry on this host runs, where, and what it holds."""
    cli_containers.registry_status(as_json=json)


def _roce_report(_context: Context, host: str = "", ssh_config: str = "", json: bool = False) -> None:
    """Compare a node's RDMA devices with what is wanted, knob by knob, now. Fails where something is not as wanted.

    Examples:
      invoke roce.report --host root@node-1
      invoke roce.report                             (this host)
    """
    cli_roce.report(host, ssh_config=ssh_config, as_json=json)


def _join_token(_context: Context, platform: str, node: str, lifetime: str = "1h") -> None:
    """Make a one-time token with which a node fetches its cluster's key, and print it.

    Run it beside the join broker (setting 'broker'); where there is none, the cluster of cluster.up is asked.

    Example: invoke join.token --platform slurm --node node-1 --lifetime 30m
    """
    cli_nodes.join_token(platform=platform, node=node, lifetime=lifetime)


def _join_tokens(_context: Context, json: bool = False) -> None:
    """List the tokens of the join broker on this host: for whom, until when, used from where."""
    cli_nodes.join_tokens(as_json=json)


def _join_revoke(_context: Context, which: str) -> None:
    """Make the tokens of a node void, or the one with this id.

    Example: invoke join.revoke node-1
    """
    cli_nodes.join_revoke(which)


def _up(
    _context: Context,
    platform: str,
    path: str = "bake",
    on: str = cli_up.OPENSTACK,
    name: str = "",
    count: int = 1,
    until: str = "joined",
    join_timeout: int = 900,
    keep: bool = False,
    cloud: str = "",
    region: str = "",
    channel: str = "stable",
    tag: str = "",
    image: str = "",
    flavor: str = "",
    network: list[str] = [],  # noqa: B006 - how Invoke declares a flag that may be repeated
    security_group: list[str] = [],  # noqa: B006
    vnic_type: str = "",
    floating_network: str = "",
    key_pair: str = "",
    identity: str = "",
    login: str = "",
    config_drive: bool = False,
    volume_size: int = 0,
    volume_type: str = "",
    keep_volume: bool = False,
    server_group: str = "",
    zone: str = "",
    timeout: int = 1800,
    user_data: str = "",
    controller: list[str] = [],  # noqa: B006
    authentication: str = "munge",
    feature: list[str] = [],  # noqa: B006
    key_file: str = "",
    broker: str = "",
    ca: str = "",
    token_file: str = "",
    ssh_key: list[str] = [],  # noqa: B006
    bundle: str = "",
    bundle_url: str = "",
    container: str = "",
    insecure_registry: bool = False,
    json: bool = False,
) -> None:
    r"""Bring nodes up, wait until they have joined their cluster, and show what their boots waited for.

    On a cloud from a published image; on this host (--on qemu) from the local store, with a cluster of their own.
    All or none: where one fails, or on Ctrl-C, all that was made is deleted. They cost until: invoke down.

    Examples:
      invoke up --platform slurm --on qemu
      invoke up --platform slurm --on qemu --path bootstrap --join-timeout 1800
      invoke join.token --platform slurm --node slurm-1 > token
      invoke up --platform slurm --cloud mycloud --flavor m1.large --network cluster \
          --controller ctl.example.org --broker https://ctl.example.org:8444 --ca ca.crt --token-file token
      invoke up --platform slurm --name blue --count 4 --flavor m1.large --network cluster \
          --server-group anti-affinity --user-data 'blue-{node}.yaml'
      invoke up --platform kubernetes --tag 20261123-5853cc9 --flavor m1.large --volume-size 20 --user-data nodes.yaml
      invoke up --platform slurm --path bootstrap --bundle slurm.tar.gz --bundle-url https://web/slurm.tar.gz \
          --flavor m1.large --controller ctl.example.org --key-file munge.key
      invoke up --platform slurm --path hybrid --container registry.example.org/bakehouse/slurm@sha256:0123... \
          --flavor m1.large --controller ctl.example.org --key-file munge.key
    """
    given = dict(locals())
    cli_nodes.one_of("--on", on, cli_up.MACHINES)
    wish = cli_up.Wish(
        platform=platform,
        path=path,
        name=name or platform,
        count=count,
        until=until,
        join_seconds=join_timeout,
        keep=keep,
    )
    if on == cli_up.QEMU:
        cli_up_qemu.refuse_others(_up, given, cli_up_qemu.UP_FLAGS)
        cli_up_qemu.up(wish, tag=tag, authentication=authentication, as_json=json)
        return
    shared = cli_nodes.Shared(
        path=path,
        node="",
        key_file=key_file,
        broker=broker,
        ca=ca,
        token_file=token_file,
        ssh_keys=ssh_key,
        bundle=bundle,
        bundle_url=bundle_url,
        container=container,
        insecure_registry=insecure_registry,
    )
    joining = cli_up.user_data(
        wish, shared, file=user_data, controllers=controller, authentication=authentication, features=feature
    )
    options = cli_up.OpenStack(
        target=cli_cloud.Target(cloud, region),
        choice=cli_up.Choice(channel=channel, tag=tag, image=image),
        wanted=Wanted(
            flavor,
            networks=tuple(network),
            security_groups=tuple(security_group),
            vnic_type=vnic_type,
            key_pair=key_pair,
            config_drive=config_drive,
            volume=cli_up.volume(volume_size, volume_type, keep=keep_volume),
            group=server_group,
            zone=zone,
            floating_network=floating_network,
        ),
        identity=identity,
        login=login,
        timeout=timeout,
    )
    cli_up.up_on_openstack(wish, joining, options, as_json=json)


def _down(
    _context: Context,
    name: str = "",
    on: str = cli_up.OPENSTACK,
    all: bool = False,
    any_user: bool = False,
    with_volumes: bool = False,
    cloud: str = "",
    region: str = "",
    dry_run: bool = False,
    json: bool = False,
) -> None:
    """Delete all that `up` made: it is found by its mark in the cloud, also where this host knows nothing of it.

    A second time does nothing. What has no mark is never touched.

    Examples:
      invoke down --name slurm
      invoke down --all --cloud mycloud --dry-run
      invoke down --on qemu
    """
    given = dict(locals())
    cli_nodes.one_of("--on", on, cli_up.MACHINES)
    if on == cli_up.QEMU:
        cli_up_qemu.refuse_others(_down, given, cli_up_qemu.DOWN_FLAGS)
        cli_up_qemu.down(name, everything=all, dry_run=dry_run, as_json=json)
        return
    cli_up.down_on_openstack(
        name,
        target=cli_cloud.Target(cloud, region),
        everything=all,
        any_user=any_user,
        with_volumes=with_volumes,
        dry_run=dry_run,
        as_json=json,
    )


def _cluster_up(
    _context: Context,
    platform: str,
    image: str = "",
    authentication: str = "munge",
    accounting: bool = False,
) -> None:
    """Start a real controller on this host, in a private network, from an image's own root. Needs root or sudo.

    Examples:
      invoke cluster.up slurm
      invoke cluster.up slurm --authentication slurm --accounting
      invoke cluster.up kubernetes
    """
    cli_nodes.cluster_up(platform, image=image, authentication=authentication, accounting=accounting)


def _cluster_down(_context: Context, platform: str) -> None:
    """End the cluster of cluster.up and all that is in it.

    Example: invoke cluster.down slurm
    """
    cli_nodes.cluster_down(platform)


def _cluster_status(_context: Context, json: bool = False) -> None:
    """Show the cluster that runs here and its nodes."""
    cli_nodes.cluster_status(as_json=json)


def _cluster_run(_context: Context, command: str, platform: str = "") -> None:
    """Run a command on the controller of the cluster that runs here.

    Examples:
      invoke cluster.run 'srun --nodes=2 hostname'
      invoke cluster.run 'kubectl get nodes' --platform kubernetes
    """
    cli_nodes.cluster_run(command, platform=platform)


def _bench_bake(_context: Context, platform: str = "slurm", rounds: int = 1, json: bool = False) -> None:
    """Measure a bake side by side with plain mmdebstrap of the same packages, in one run. Prints ratios.

    Example: invoke bench.bake --rounds 3
    """
    cli.bench_bake(platform, rounds=rounds, as_json=json)


def _bench_boot(_context: Context, platform: str = "slurm", rounds: int = 3, json: bool = False) -> None:
    """Measure power-on to joined against power-on to the login prompt of a plain Debian cloud image, in one run.

    Examples:
      invoke bench.boot --rounds 3
      invoke bench.boot --platform kubernetes
    """
    cli.bench_boot_to_joined(platform, rounds=rounds, as_json=json)


def _bench_preload(_context: Context, platform: str = "kubernetes", rounds: int = 1, json: bool = False) -> None:
    """Measure power-on to a Kubernetes node's first pod: images loaded at bake time, or pulled, in one run.

    Example: invoke bench.preload --rounds 3
    """
    cli.bench_preloading(platform, rounds=rounds, as_json=json)


def _bench_publish(_context: Context, rounds: int = 4, size: str = "512MiB", json: bool = False) -> None:
    """Measure publishing side by side with curl, to the same local Glance, and listing 1,000 images. Prints ratios.

    Example: invoke bench.publish --rounds 5 --size 1GiB
    """
    cli.bench_publishing(rounds=rounds, size=size, as_json=json)


def _compare(
    _context: Context,
    platform: str,
    runs: int = 0,
    together: int = 0,
    mirror_rate: str = "",
    html: str = "",
    json: bool = False,
) -> None:
    """Compare the paths of a platform on this machine: seconds to joined, bytes, memory, and what making costs.

    The paths take turns, with a real controller and a package mirror beside them. --runs: rounds of a node of each
    path; 3 by default, or 1 where KVM does not work and machines are emulated. Needs root or sudo.

    Examples:
      invoke compare --platform slurm
      invoke compare --platform slurm --together 4 --mirror-rate 10mbit --html report.html
    """
    cli_compare.run(platform, runs=runs, together=together, mirror_rate=mirror_rate, html=html, as_json=json)


def _compare_list(_context: Context, platform: str = "", json: bool = False) -> None:
    """List the results of comparisons that are kept, the newest first.

    Example: invoke compare.list --platform slurm
    """
    cli_compare.results(platform, as_json=json)


def _compare_show(_context: Context, result: str = "", html: str = "", open: bool = False, json: bool = False) -> None:
    """Show a comparison of the paths: the last one, or another. Also as one HTML page, which works offline.

    Examples:
      invoke compare.show
      invoke compare.show --result slurm --html report.html
      invoke compare.show --open
    """
    cli_compare.show(result, html=html, open_page=open, as_json=json)


def _compare_regression(
    _context: Context, result: str = "", against: str = "", percent: float = 10.0, json: bool = False
) -> None:
    """Compare a result with an older one of the same platform. Fails where something got worse.

    Worse is a median above all older values, and above their median by more than --percent; and runs that fail more
    often than before.

    Examples:
      invoke compare.regression
      invoke compare.regression --result slurm --against slurm-20261122T020000Z --percent 5
    """
    cli_compare.regression(result, against=against, percent=percent, as_json=json)


def _openstack_up(_context: Context, name: str = "") -> None:
    """Start a real Keystone and Glance on this host, to try publishing with; writes an entry in clouds.yaml.

    Example: invoke openstack.up
    """
    cli_openstack.up(name=name)


def _openstack_down(_context: Context, delete: bool = False, dry_run: bool = False) -> None:
    """Stop the local OpenStack. Its images stay for the next time, unless --delete is given.

    Example: invoke openstack.down --delete
    """
    cli_openstack.down(delete=delete, dry_run=dry_run)


def _openstack_status(_context: Context, json: bool = False) -> None:
    """Show whether the local OpenStack runs, where, and what it holds."""
    cli_openstack.status(as_json=json)


def _settings(_context: Context) -> None:
    """Print the settings that hold here."""
    cli.show_settings()


def _test(_context: Context, fast: bool = False, long: bool = False, only: str = "") -> None:
    """Run the tests: everything that can regress, real bakes and boots included.

    --fast: what is quick, about a minute, for every edit. --long: what is run by hand before a release.
    Example: invoke test --fast --only manifest
    """
    cli.test(fast=fast, long=long, only=only)


BUILDER = {
    "builder": "who makes the root filesystem: dib (diskimage-builder) or packer",
    "base": "what Packer boots: a manifest, an image's tag, or an address",
    "base_checksum": "of what is at the address: sha256:... or sha512:...",
}
PLATFORM = {"platform": "a manifest's name, such as slurm (see: invoke manifests)"}
WHAT = PLATFORM | {
    "release": "another Debian release than the manifest's: trixie, bookworm, 13 or 12",
    "format": "image files to make in place of the manifest's: qcow2, raw, or both with a comma",
}
JSON = {"json": "print JSON"}
SSH = {"ssh_config": "an ssh_config(5) in place of your own"}
CLOUD = {
    "cloud": "a cloud of clouds.yaml; OS_CLOUD, or 'cloud' in bakehouse.yaml, by default",
    "region": "one of the cloud's regions",
}
DRY_RUN = {"dry-run": "say what would be done, and change nothing"}
TAG = {"tag": "a tag, its beginning, or a manifest's name for its newest image"}

bake = command(
    _bake,
    name="bake",
    help=WHAT
    | BUILDER
    | JSON
    | {
        "in_cloud": "let Packer work on a server of this cloud (as in clouds.yaml); the flags below are for it",
        "flavor": "the server's flavor",
        "network": "the server's network; the project's only one by default",
        "volume_size": "GiB of the volume that the server boots from; the flavor's own disk by default",
        "floating_network": "where the server gets a floating IP from",
        "security_group": "the server's security group, which lets SSH in",
        "refresh": "renew the base root, and so its packages",
        "force": "build even where nothing changed",
        "verbose": "show the output of diskimage-builder",
        "verify": "--no-verify: leave out booting and joining the image",
        "upload": "publish it, where its verification did not fail",
        "cloud": "with --upload: to this cloud of clouds.yaml",
        "region": "with --upload: one of the cloud's regions",
        "wait": "wait for a bake of the same platform that is going on (--no-wait: fail)",
    },
)
plan = command(_plan, name="plan", help=WHAT | BUILDER | JSON)
doctor = command(_doctor, name="doctor", help=JSON)
settings = command(_settings, name="settings")
test = command(
    _test,
    name="test",
    help={"fast": "the fast tier only", "long": "the long tier only", "only": "tests whose names hold this"},
)
boot = command(
    _boot,
    name="boot",
    positional=["tag"],
    help=TAG
    | {
        "firmware": "bios, uefi or secure-boot",
        "memory": "such as 1GiB",
        "cpus": "how many",
        "disk": "the disk's size, such as 10GiB; the image's own by default",
        "key": "a private SSH key to log in with; one is made by default",
        "user-data": "a file with user-data for cloud-init, in place of just the key",
        "timeout": "seconds until SSH must answer",
        "exec": "run a command over SSH, print its output, and stop",
        "data-source": "where cloud-init finds its data: nocloud, config-drive, config-drive-partition or metadata",
        "name": "the node's name; the manifest's by default",
        "join": "join the cluster of cluster.up",
    },
)
verify = Collection("verify")
verify.add_task(
    command(
        _verify,
        name="image",
        positional=["tag"],
        help=TAG
        | JSON
        | {
            "firmware": "bios, uefi or secure-boot; the first that the image has by default",
            "verbose": "show what the tools say",
        },
    ),
    default=True,
)
verify.add_task(
    command(
        _verify_host,
        name="host",
        help=JSON
        | SSH
        | {
            "host": "the node, as ssh takes it, such as root@node; another user needs sudo without a password",
            "platform": "slurm, kubernetes, roce or bare-metal; several with commas between",
            "tag": "the image in the store that it was booted from: compare with its record",
            "report": "a file for the result in JUnit's form",
        },
    )
)
CONTAINER = {
    "container": "with the path hybrid: the platform's container image by its digest, as container.push prints it",
    "insecure-registry": "with --container: its registry speaks plain HTTP, or has a certificate that nobody knows",
}
JOINING = {
    "path": "how the node comes to be: bake, or of a plain image by bootstrap or hybrid",
    "bundle": "with the path bootstrap: the file that bootstrap.bundle wrote",
    "bundle-url": "where nodes fetch it",
    "authentication": "munge, or slurm for Slurm's own auth/slurm",
    "feature": "a feature of the node; may be repeated",
    "broker": "address of the join broker, such as https://ctl.example.org:8444",
    "ca": "file with the certificate of the broker's authority",
    "ssh-key": "file with public keys that may log in; may be repeated",
}
userdata = command(
    _userdata,
    name="userdata",
    iterable=["controller", "feature", "ssh_key", "ca_hash", "label", "taint"],
    help=JOINING
    | CONTAINER
    | {
        "platform": "the platform: slurm, kubernetes or roce",
        "node": "the node's name; by default the one that its cloud gives it",
        "controller": "HOST or HOST:PORT of slurmctld; may be repeated",
        "hardware": "in place of what slurmd detects, such as 'CPUs=4 RealMemory=3800'",
        "key-file": "the cluster's key, or a bootstrap token, to stand in the user-data itself (the weaker way)",
        "api-server": "HOST or HOST:PORT of the Kubernetes API server",
        "ca-hash": "hash of the cluster's CA (sha256:...), as kubeadm join commands have it; may be repeated",
        "discovery-file": "in place of hashes: path of a kubeconfig that is on the node",
        "label": "a label of the node, key=value; may be repeated",
        "taint": "a taint of the node, key=value:NoSchedule; may be repeated",
        "provider-id": "in place of openstack:///UUID from the metadata; none for none",
        "cloud-provider": "external, where the cluster has a cloud controller manager",
        "token-file": "file with the token, or - for standard input",
        "roce": "file with settings for RDMA devices (roce.yaml), for the platforms roce and slurm",
        "devices": "with the platform roce: RDMA devices that must be there, set up and connected",
        "output": "write to this file, readable by you only",
    },
)

up = command(
    _up,
    name="up",
    iterable=["network", "security_group", "controller", "feature", "ssh_key"],
    help=PLATFORM
    | CLOUD
    | JSON
    | JOINING
    | CONTAINER
    | {
        "on": "what it runs on: openstack, or qemu on this host",
        "name": "of the launch, whose nodes are NAME-1, NAME-2, ...; the platform's by default",
        "count": "how many nodes",
        "until": "joined (the join agent says so), or active (the servers run)",
        "join-timeout": "seconds until all must have joined",
        "keep": "where nodes do not come up or join: leave them to look at",
        "channel": "take the image that this channel points to",
        "tag": "a published image's tag, or its beginning, in place of a channel",
        "image": "any image of the cloud by its id or name, in place of a channel",
        "flavor": "the servers' flavor",
        "network": "a network; may be repeated; the project's only one by default",
        "security-group": "may be repeated; the project's default by default",
        "vnic-type": "of the ports, such as direct for SR-IOV",
        "floating-network": "give each node a floating IP of this external network",
        "key-pair": "an SSH key pair that the cloud has; one is made for the launch by default",
        "identity": "file with the private key of --key-pair, to ask nodes when they did what",
        "login": "user to log in as; by default the one that the image names",
        "config-drive": "user-data by a config drive, for networks without a metadata service",
        "volume-size": "boot from a volume of so many GiB that is made from the image",
        "volume-type": "of that volume",
        "keep-volume": "leave the volumes when the servers go",
        "server-group": "anti-affinity, affinity, soft-anti-affinity, soft-affinity, or the id of a group",
        "zone": "availability zone",
        "timeout": "seconds until all servers must be active",
        "user-data": "a file with user-data; {node} in its name stands for the node's",
        "controller": "without --user-data: HOST or HOST:PORT of slurmctld; may be repeated",
        "key-file": "the cluster's key, to stand in the user-data itself (the weaker way)",
        "token-file": "file with a node's token; {node} in its name stands for the node's",
    },
)
down = command(
    _down,
    name="down",
    help=CLOUD
    | DRY_RUN
    | JSON
    | {
        "name": "of the launch, or its id; not needed where there is but one",
        "on": "what it runs on: openstack, or qemu on this host",
        "all": "all launches of this user in this project",
        "any-user": "those of the project's other users too",
        "with-volumes": "also volumes that were kept (up --keep-volume)",
    },
)

manifests = Collection("manifests")
manifests.add_task(command(_manifests, name="list", help=JSON), default=True)
manifests.add_task(command(_schema, name="schema"))
images = Collection("images")
images.add_task(command(_images, name="list", help=CLOUD | JSON), default=True)
images.add_task(command(_images_verify, name="verify", positional=["tag"], help=TAG | CLOUD | JSON))
images.add_task(
    command(
        _images_diff,
        name="diff",
        positional=["old", "new"],
        help=JSON
        | {
            "old": "a tag, its beginning, or a manifest's name",
            "new": "the same, of the other image",
            "by-size": "what each part takes in the root that it did not take, by source package",
        },
    )
)
images.add_task(command(_show, name="show", positional=["tag"], help=TAG | JSON))
images.add_task(command(_timeline, name="timeline", positional=["tag"], help=TAG | JSON))
images.add_task(command(_remove, name="remove", positional=["tag"], help=TAG | DRY_RUN))
cache = Collection("cache")
cache.add_task(command(_cache, name="list", help=JSON), default=True)
cache.add_task(
    command(
        _prune,
        name="prune",
        help=DRY_RUN | {"limit": "such as 5GiB; by default 'cache_limit_gib'", "everything": "empty the cache"},
    )
)
bench = Collection("bench")
bench.add_task(
    command(
        _bench_bake,
        name="bake",
        help=PLATFORM | JSON | {"rounds": "measure so many times; medians are shown"},
    )
)

bench.add_task(
    command(
        _bench_boot,
        name="boot",
        help=JSON | {"platform": "the manifest of our image", "rounds": "measure so many times; medians are shown"},
    )
)
bench.add_task(
    command(
        _bench_preload,
        name="preload",
        help=JSON | {"platform": "the manifest of our image", "rounds": "measure so many times; medians are shown"},
    )
)
bench.add_task(
    command(
        _bench_publish,
        name="publish",
        help=JSON | {"rounds": "measure so many times; an even number is fair", "size": "of the image, such as 1GiB"},
    )
)
RESULT = {
    "result": "a kept result's name or its beginning, a platform's for its newest, or a file; the newest by default"
}
compare = Collection("compare")
compare.add_task(
    command(
        _compare,
        name="paths",
        help=PLATFORM
        | JSON
        | {
            "runs": "boot a node of each path so many times",
            "together": "one more round with so many nodes of each path switched on together",
            "mirror-rate": "one more round with the nodes' links held to this, such as 10mbit",
            "html": "a file for the report",
        },
    ),
    default=True,
)
compare.add_task(command(_compare_list, name="list", help=JSON | {"platform": "only results of this platform"}))
compare.add_task(
    command(
        _compare_show,
        name="show",
        help=RESULT | JSON | {"html": "write the report to this file", "open": "open the report in a browser"},
    )
)
compare.add_task(
    command(
        _compare_regression,
        name="regression",
        help=RESULT
        | JSON
        | {
            "against": "the older one, named in the same way; by default the one before",
            "percent": "by how much a median may grow",
        },
    )
)
join = Collection("join")
join.add_task(
    command(
        _join_token,
        name="token",
        help={
            "platform": "the platform: slurm or kubernetes",
            "node": "the node's name",
            "lifetime": "such as 30m, 2h, 1d",
        },
    )
)
join.add_task(command(_join_tokens, name="tokens", help=JSON))
join.add_task(
    command(_join_revoke, name="revoke", positional=["which"], help={"which": "a node's name, or a token's id"})
)
bootstrap = Collection("bootstrap")
bootstrap.add_task(
    command(
        _bootstrap_bundle,
        name="bundle",
        help=PLATFORM | JSON | {"output": "the file; by default named after the definition, in the current folder"},
    )
)
bootstrap.add_task(
    command(
        _bootstrap_push,
        name="push",
        help=PLATFORM
        | SSH
        | {"host": "the node, as ssh takes it, such as root@node-1; another user needs sudo without a password"},
    )
)
container = Collection("container")
CONTAINER = PLATFORM | JSON | {"verbose": "show the output of mmdebstrap and buildah"}
container.add_task(
    command(
        _container_build,
        name="build",
        help=CONTAINER | {"refresh": "renew the base root, and so its packages"},
    )
)
container.add_task(
    command(
        _container_push,
        name="push",
        help=CONTAINER
        | {
            "registry": "HOST[:PORT][/PATH]; by default the setting 'registry', else the one of registry.up",
            "insecure": "it speaks plain HTTP, or has a certificate that is not to be checked",
        },
    )
)
registry = Collection("registry")
registry.add_task(
    command(
        _registry_up,
        name="up",
        help={
            "address": "where it listens; by default where it was last, or 127.0.0.1",
            "port": "by default what it was last, or 5000",
        },
    )
)
registry.add_task(command(_registry_down, name="down", help=DRY_RUN | {"purge": "what was pushed to it, too"}))
registry.add_task(command(_registry_status, name="status", help=JSON), default=True)
roce = Collection("roce")
roce.add_task(
    command(
        _roce_report,
        name="report",
        help=JSON
        | SSH
        | {
            "host": "the node, as ssh takes it, such as root@node-1; another user needs sudo without a password; "
            "this host by default"
        },
    )
)
cluster = Collection("cluster")
CLUSTER = {"platform": "the platform: slurm or kubernetes"}
cluster.add_task(
    command(
        _cluster_up,
        name="up",
        positional=["platform"],
        help=CLUSTER
        | {
            "image": "the image whose root the controller runs from; the platform's newest by default",
            "authentication": "munge, or slurm for Slurm's own auth/slurm",
            "accounting": "with slurmdbd and a database, which are installed from the site's mirrors first",
        },
    )
)
cluster.add_task(command(_cluster_down, name="down", positional=["platform"], help=CLUSTER))
cluster.add_task(command(_cluster_status, name="status", help=JSON), default=True)
cluster.add_task(
    command(_cluster_run, name="run", positional=["command"], help=CLUSTER | {"command": "a shell command line"})
)

publish = Collection("publish")
publish.add_task(
    command(
        _publish,
        name="image",
        positional=["tag"],
        help=TAG
        | CLOUD
        | DRY_RUN
        | JSON
        | {
            "visibility": "private, shared, community or public; the site's by default",
            "format": "the file to send: qcow2 or raw; the first that the image has by default",
        },
    ),
    default=True,
)
publish.add_task(command(_publish_check, name="check", help=CLOUD | JSON))
CHANNEL = {"channel": "such as stable or candidate"}
FORCE = {"force": "also where the image is not verified; kept in the history"}
promote = command(
    _promote,
    name="promote",
    positional=["tag"],
    help=CLOUD
    | FORCE
    | DRY_RUN
    | JSON
    | {
        "tag": "a published image's tag, its beginning, or a manifest's name for its newest",
        "to": "the channel; it is made where it is new",
    },
)
rollback = command(_rollback, name="rollback", help=PLATFORM | CHANNEL | CLOUD | FORCE | DRY_RUN | JSON)
channels = command(_channels, name="channels", help=PLATFORM | CLOUD | JSON)
prune = command(
    _prune_images,
    name="prune",
    iterable=["platform", "lock"],
    help=CLOUD
    | DRY_RUN
    | JSON
    | {
        "keep": "how many of each manifest stay in any case, the newest",
        "platform": "only images of this manifest; may be repeated",
        "lock": "another lock file whose images stay; may be repeated",
        "yes": "delete what the plan says",
    },
)
resolve = command(
    _resolve,
    name="resolve",
    help=PLATFORM
    | CHANNEL
    | CLOUD
    | {
        "tag": "a tag, or its beginning, in place of a channel",
        "format": "id, name, json, yaml, tfvars, env or ansible",
    },
)
pin = command(
    _pin,
    name="pin",
    help=PLATFORM
    | CHANNEL
    | CLOUD
    | DRY_RUN
    | JSON
    | {
        "tag": "a tag, or its beginning, in place of a channel",
        "file": "the lock file; images.lock.yaml by default",
        "check": "check the images in the lock file; exit status 1 where one is not as pinned",
        "allow-behind": "with --check: an image that is behind its channel is no failure",
    },
)

sign = Collection("sign")
sign.add_task(command(_sign, name="image", positional=["tag"], help=TAG | DRY_RUN), default=True)
sign.add_task(command(_sign_check, name="check", positional=["tag"], help=TAG))
sign.add_task(
    command(_sign_key, name="key", positional=["path"], help={"path": "the file of the private key; it must be new"})
)
openstack = Collection("openstack")
openstack.add_task(command(_openstack_up, name="up", help={"name": "its name in clouds.yaml; bakehouse by default"}))
openstack.add_task(
    command(
        _openstack_down, name="down", help=DRY_RUN | {"delete": "its images, databases and clouds.yaml entries too"}
    )
)
openstack.add_task(command(_openstack_status, name="status", help=JSON), default=True)

BUILDERS = {"builders": "simulate so many builders in place of the summary"}
NIGHT = {"night": "its name, such as 2026-11-27"}
nightly = Collection("nightly")
nightly.add_task(
    command(
        _nightly,
        name="run",
        iterable=["platform"],
        help=CLOUD
        | DRY_RUN
        | JSON
        | {
            "platform": "only this manifest; may be repeated; those of nightly.images by default, or all",
            "publish": "--no-publish: keep the images in the store",
            "verify": "--no-verify: do not boot the images; unverified ones become no candidates",
            "executor": "what bakes: local, or slurm for an array job",
            "clock-is-right": "begin also where the last night seems to be still to come",
            "verbose": "show what the tools say",
        },
    ),
    default=True,
)
nightly.add_task(
    command(
        _nightly_bake,
        name="bake",
        help=NIGHT | {"image": "the manifest", "verify": "--no-verify: do not boot the image"},
    )
)
nightly.add_task(command(_nightly_show, name="show", help=NIGHT | JSON | BUILDERS))
nightly.add_task(command(_nightly_list, name="list", help=JSON))
ci = Collection("ci")
ci.add_task(
    command(
        _ci_render,
        name="render",
        iterable=["platform"],
        help={
            "system": "gitlab, gitlab-images (its child pipeline), github, zuul or systemd",
            "platform": "only this manifest; may be repeated; those of nightly.images by default, or all",
            "cloud": "where images are published to, as in clouds.yaml",
            "runner": "label or tag of the machines that can bake; bakehouse by default",
            "at": "when it begins, UTC",
            "folder": "where the checkout is, for systemd; /opt/bakehouse by default",
            "output": "the folder to write the files below; printed where it is left out",
        },
    )
)
outdated = command(
    _outdated,
    name="outdated",
    iterable=["platform"],
    help=CLOUD
    | JSON
    | {
        "platform": "only images of this manifest; may be repeated",
        "check": "exit status 1 where security updates are missing",
    },
)

namespace = Collection(
    bake, plan, doctor, settings, test, boot, verify, userdata, up, down, manifests, images, cache, bench, compare,
    join, cluster, publish, promote, rollback, channels, prune, resolve, pin, sign, openstack, roce, bootstrap,
    container, registry, nightly, outdated, ci,
)  # fmt: skip
