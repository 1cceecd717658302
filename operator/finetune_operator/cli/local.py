"""`finetune local`: the whole product on one machine, without a cluster, Docker or a GPU."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TextIO

import click

from finetune_api import uri
from finetune_operator.cli import commands, gc
from finetune_operator.cli.commands import Stop, Target, connect
from finetune_operator.cli.storage import Access, StorageError
from finetune_operator.kube import FINETUNE_JOBS, ApiError, Kube
from finetune_operator.local import stack
from finetune_operator.local.stack import Stack, StackError

DEFAULT_STATE = Path(".finetune")

state_option = click.option(
    "--state",
    type=click.Path(file_okay=False, path_type=Path),
    default=DEFAULT_STATE,
    show_default=True,
    help="Folder that keeps cluster, buckets and logs.",
)


@click.group()
def local() -> None:
    """Run everything on this machine: cluster, S3 and operator, without Docker or a GPU.

    Pods are your own processes. Everything listens on 127.0.0.1 only and is kept in one folder.
    """


@local.command()
@state_option
def up(state: Path) -> None:
    """Start the local cluster and keep it running until Ctrl-C.

    kubectl, the other finetune commands and any S3 client can use it meanwhile.
    """

    async def work() -> int:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        async with starting(state) as started:
            click.echo(how_to_look(started))
            click.echo("\nCtrl-C stops it; the state stays.")
            await stop.wait()
        return 0

    commands.run(work())


def how_to_look(started: Stack) -> str:
    """What a person types to look at the cluster, the buckets and the metrics."""
    kubeconfig, folder = _short(started.kubeconfig), _short(started.s3_folder)
    return "\n".join(
        [
            f"cluster   export KUBECONFIG={kubeconfig}   then: kubectl get ftj -w",
            f"buckets   {folder}   (S3 at {started.s3_endpoint})",
            f"metrics   curl {started.metrics_url}",
        ]
    )


def _short(path: str) -> str:
    """A path as a person in this folder would write it."""
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative


@contextlib.asynccontextmanager
async def starting(state: Path, *, with_cluster: bool = True) -> AsyncIterator[Stack]:
    try:
        async with stack.start(state, with_cluster=with_cluster) as started:
            yield started
    except StackError as error:
        raise Stop(str(error), commands.EXIT_CLUSTER) from error


@contextlib.asynccontextmanager
async def using(state: Path, *, with_cluster: bool = True) -> AsyncIterator[Stack]:
    """The stack that runs on this state already, or one for the time of the command."""
    found = stack.running(state)
    if found is not None:
        yield found
        return
    async with starting(state, with_cluster=with_cluster) as started:
        yield started


@local.command("run")
@click.argument("manifest", type=click.File("r"))
@click.option("--replace", is_flag=True, help="Delete a job of the same name first.")
@state_option
def run_command(manifest: TextIO, replace: bool, state: Path) -> None:
    """Run the job of a manifest to its end and show its progress.

    Uses the cluster of `finetune local up` on the same state, or starts one for the time of the job. Exits with 0 when
    the job is Complete and with 1 when it Failed.
    """
    jobs = commands._valid_manifests(manifest)
    if len(jobs) != 1:
        raise click.UsageError(f"the manifest holds {len(jobs)} FineTuneJobs; run takes one")

    async def work() -> int:
        async with using(state) as started:
            click.echo(how_to_look(started) + "\n")
            async with connect(Target(started.kubeconfig, None, None)) as (kube, namespace):
                name = jobs[0].body["metadata"].get("name", "")
                if replace and name:
                    await delete(kube, jobs[0].body["metadata"].get("namespace") or namespace, name)
                try:
                    place, name = await commands.create(kube, namespace, jobs[0])
                except ApiError as error:
                    if error.status != 409:
                        raise
                    hint = "use --replace to delete it first, or rename the job"
                    raise Stop(f"there is a FineTuneJob {name} already: {hint}", commands.EXIT_FAILED) from error
                return await commands.follow(kube, place, name)

    commands.run(work())


async def delete(kube: Kube, namespace: str, name: str) -> None:
    """Delete a job and wait until it is gone."""
    if await kube.get(FINETUNE_JOBS, namespace, name) is None:
        return
    await kube.delete(FINETUNE_JOBS, namespace, name)
    while await kube.get(FINETUNE_JOBS, namespace, name) is not None:
        await asyncio.sleep(0.2)


@local.command()
@click.argument("source")
@click.argument("destination")
@state_option
def cp(source: str, destination: str, state: Path) -> None:
    """Copy a file or folder into a bucket, or out of it. A DESTINATION that ends in a slash is a folder to copy into.

    \b
    finetune local cp ./llama s3://models/llama          a folder
    finetune local cp train.jsonl s3://data/train.jsonl  a file
    finetune local cp train.jsonl s3://data/             the same
    finetune local cp s3://models/tuned ./tuned
    """
    into = destination.startswith("s3://")
    if into == source.startswith("s3://"):
        raise click.UsageError("one of SOURCE and DESTINATION must be an s3:// URI")

    async def work() -> int:
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        async with using(state, with_cluster=False) as started:
            try:
                count = await asyncio.to_thread(_copy, started, source, destination)
            except (Boto3Error, BotoCoreError, ClientError, OSError) as error:
                raise Stop(f"{source} cannot be copied to {destination}: {error}", commands.EXIT_FAILED) from error
        click.echo(f"{count} files copied to {destination}")
        return 0

    commands.run(work())


def _copy(started: Stack, source: str, destination: str) -> int:
    """Copy in or out; returns the number of files."""
    import boto3

    if destination.endswith("/"):
        destination += Path(source.rstrip("/")).name

    s3 = boto3.client(
        "s3",
        endpoint_url=started.s3_endpoint,
        aws_access_key_id=started.access_key,
        aws_secret_access_key=started.secret_key,
        region_name="us-east-1",
    )
    buckets = {item["Name"] for item in s3.list_buckets()["Buckets"]}
    if destination.startswith("s3://"):
        bucket, prefix = _location(destination)
        files = _files(Path(source), prefix)
        if bucket not in buckets:
            s3.create_bucket(Bucket=bucket)
        for path, key in files:
            s3.upload_file(str(path), bucket, key)
        return len(files)
    bucket, prefix = _location(source)
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix) if bucket in buckets else ()
    keys = [
        item["Key"]
        for page in pages
        for item in page.get("Contents", [])
        if item["Key"] == prefix or item["Key"].startswith(f"{prefix}/")
    ]
    if not keys:
        raise Stop(f"there is nothing at {source}", commands.EXIT_FAILED)
    target = Path(destination)
    if keys == [prefix] and target.is_dir():
        target /= Path(prefix).name
    for key in keys:
        path = target / key.removeprefix(prefix).lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        s3.download_file(bucket, key, str(path))
    return len(keys)


def _location(text: str) -> tuple[str, str]:
    try:
        location = uri.parse(text)
    except ValueError as error:
        raise Stop(str(error), commands.EXIT_FAILED) from error
    assert isinstance(location, uri.S3Location)
    return location.bucket, location.key


def _files(source: Path, prefix: str) -> list[tuple[Path, str]]:
    if source.is_file():
        return [(source, prefix)]
    if source.is_dir():
        found = sorted(path for path in source.rglob("*") if path.is_file())
        return [(path, f"{prefix}/{path.relative_to(source).as_posix()}") for path in found]
    raise Stop(f"{source} does not exist", commands.EXIT_FAILED)


@local.command("gc")
@gc.pass_rules
@state_option
def gc_command(uri: str | None, state: Path, yes: bool, rules: gc.Rules) -> None:
    """Remove the work files of jobs that are over, as `finetune gc` does, from the local buckets.

    Without URI: of the jobs that the local cluster has. With s3://BUCKET/PATH: also of jobs that no longer exist.
    """

    async def work() -> int:
        async with using(state) as started:
            access = Access(started.s3_endpoint, "us-east-1", True, started.access_key, started.secret_key)
            try:
                places = await asyncio.to_thread(gc.places_below, uri, access) if uri else None
            except StorageError as error:
                raise Stop(str(error), commands.EXIT_FAILED) from error
            jobs, _ = await gc.known_jobs(Target(started.kubeconfig, None, None), everywhere=True)
            sweep = gc.Sweep(jobs, rules, yes)
            return await asyncio.to_thread(sweep.run, gc.places_of(jobs, access) if places is None else places)

    commands.run(work())
