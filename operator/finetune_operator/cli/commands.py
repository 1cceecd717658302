"""The commands. Each is a thin shell around a function that could be called from anywhere.

Exit codes: 0 success, 1 the job failed, the manifest is wrong or not all could be removed, 2 wrong usage, 3 time ran
out, 4 the cluster said no.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, TextIO, TypeVar

import aiohttp
import click
import yaml
from kubernetes.aio.config import ConfigException
from rich.console import Console
from rich.live import Live

from finetune_api.status import ConditionType, Phase
from finetune_operator.cli import show
from finetune_operator.cli.manifests import Manifest, read
from finetune_operator.cli.validation import Verdict, check, validate
from finetune_operator.kube import FINETUNE_JOBS, PODS, ApiError, Kube, load_client_of_user
from finetune_operator.observe import read_pods
from finetune_operator.resource import FineTuneJob

T = TypeVar("T")

EXIT_FAILED = 1
EXIT_TIMEOUT = 3
EXIT_CLUSTER = 4
POLL_SECONDS = 1.0
PATIENCE_SECONDS = 60.0
"""A cluster that cannot be reached while a job is followed is asked again for so long."""

# What reads the output is not a terminal of 80 columns.
console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 250)


@dataclass
class Target:
    """Which cluster and namespace the user means."""

    kubeconfig: str | None
    context: str | None
    namespace: str | None


class Stop(Exception):
    """End with a message and an exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@contextlib.asynccontextmanager
async def connect(target: Target) -> AsyncIterator[tuple[Kube, str]]:
    """The API and the namespace to use."""
    try:
        api, default = await load_client_of_user(target.kubeconfig, target.context)
    except (ConfigException, OSError, yaml.YAMLError, UnicodeError, TypeError, AttributeError) as error:
        hint = "Set KUBECONFIG, or start a cluster of your own with: finetune local up"
        raise Stop(f"no cluster: {error}. {hint}", EXIT_CLUSTER) from error
    async with api:
        yield Kube(api), target.namespace or default


def run(work: Awaitable[int]) -> None:
    """Run an asynchronous command and exit with its code."""
    sys.exit(result_of(work))


def result_of(work: Awaitable[T]) -> T:
    """The result of asynchronous work. Where there is none, exit with a message and the code that says why."""

    async def main() -> T:
        # Stopped politely, it puts away what it has started, as after Ctrl-C.
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await work

    try:
        return asyncio.run(main())
    except Stop as stop:
        click.echo(f"error: {stop}", err=True)
        sys.exit(stop.code)
    except ApiError as error:
        click.echo(f"error: the cluster answered {error.status}: {error.message}", err=True)
        sys.exit(EXIT_CLUSTER)
    except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
        click.echo(f"error: the cluster cannot be reached: {error or type(error).__name__}", err=True)
        sys.exit(EXIT_CLUSTER)
    except KeyboardInterrupt:
        sys.exit(130)
    except asyncio.CancelledError:
        sys.exit(143)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--kubeconfig", help="Path of the kubeconfig file; $KUBECONFIG by default.")
@click.option("--context", "kube_context", help="Context of the kubeconfig file.")
@click.option("-n", "--namespace", help="Namespace; the context's own by default.")
@click.version_option(package_name="finetune-operator")
@click.pass_context
def main(context: click.Context, /, kubeconfig: str | None, kube_context: str | None, namespace: str | None) -> None:
    """Fine-tune language models on Kubernetes: one manifest in, a tuned and verified model out.

    \b
    finetune validate job.yaml     check a manifest without a cluster
    finetune data check FILE...    see what a job would learn from data files
    finetune submit job.yaml       create the job
    finetune watch NAME            follow it live
    finetune local run job.yaml    do it all on this machine, without a cluster

    Exit codes: 0 success, 1 the job failed, the manifest is wrong or not all could be removed, 2 wrong usage, 3 time
    ran out, 4 the cluster said no.
    """
    context.obj = Target(kubeconfig, kube_context, namespace)


def pass_target(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the target, whose namespace may be named behind the command too, as people type it."""

    def with_target(target: Target, /, *args: Any, own_namespace: str | None, **options: Any) -> None:
        command(replace(target, namespace=own_namespace or target.namespace), *args, **options)

    functools.update_wrapper(with_target, command)
    option = click.option("-n", "--namespace", "own_namespace", help="Namespace; the context's own by default.")
    return option(click.make_pass_decorator(Target)(with_target))


@main.command("validate")
@click.argument("files", type=click.File("r"), nargs=-1, required=True)
def validate_command(files: tuple[TextIO, ...]) -> None:
    """Check manifests as the API server would, without one.

    Messages name file, line and field. FILES may be - for standard input. Exits with 1 when something is wrong.
    """
    verdicts = [validate(_text(file)) for file in files]
    for file, verdict in zip(files, verdicts, strict=True):
        _print_verdict(file.name, verdict)
    wrong = any(verdict.problems for verdict in verdicts)
    if not wrong and not any(verdict.jobs for verdict in verdicts):
        click.echo("there is no FineTuneJob to check", err=True)
        wrong = True
    sys.exit(EXIT_FAILED if wrong else 0)


def _text(file: TextIO) -> str:
    try:
        return file.read()
    except UnicodeDecodeError as error:
        raise click.ClickException(f"{file.name} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def _print_verdict(name: str, verdict: Verdict) -> None:
    for problem in verdict.problems:
        field = f"{problem.field}: " if problem.field not in ("", "<nil>") else ""
        click.echo(f"{name}:{problem.line}: {field}{problem.message}", err=True)
    for kind in verdict.skipped:
        click.echo(f"{name}: {kind} is not checked")
    for job in verdict.jobs:
        click.echo(f"{name}: FineTuneJob {job} is valid")


@main.command()
@click.argument("file", type=click.File("r"))
@click.option("--watch", is_flag=True, help="Follow the job until it ends.")
@pass_target
def submit(target: Target, file: TextIO, watch: bool) -> None:
    """Create the FineTuneJobs of a manifest. Unlike kubectl apply it never changes a job that is there."""
    manifests = _valid_manifests(file)

    async def work() -> int:
        async with connect(target) as (kube, namespace):
            names = []
            for manifest in manifests:
                names.append(await create(kube, namespace, manifest))
                click.echo("FineTuneJob {}/{} created".format(*names[-1]))
            codes = [await follow(kube, place, name) for place, name in names if watch]
            return max(codes, default=0)

    run(work())


def _valid_manifests(file: TextIO) -> list[Manifest]:
    text = _text(file)
    verdict = validate(text)
    if verdict.problems or not verdict.jobs:
        _print_verdict(file.name, verdict)
        if not verdict.problems:
            click.echo(f"{file.name}: there is no FineTuneJob in it", err=True)
        sys.exit(EXIT_FAILED)
    return [manifest for manifest in read(text) if manifest.is_finetune_job and not check(manifest)]


async def create(kube: Kube, namespace: str, manifest: Manifest) -> tuple[str, str]:
    """Create a job; returns its namespace and name."""
    place = manifest.body["metadata"].get("namespace") or namespace
    made = await kube.create(FINETUNE_JOBS, place, manifest.body, fieldManager="finetune", fieldValidation="Strict")
    return place, made["metadata"]["name"]


@main.command("list")
@click.option("-A", "--all-namespaces", is_flag=True, help="Jobs of all namespaces.")
@click.option("--phase", type=click.Choice([str(phase) for phase in Phase]), help="Only jobs in this phase.")
@click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)
@pass_target
def list_command(target: Target, all_namespaces: bool, phase: str | None, output: str) -> None:
    """List jobs."""

    async def work() -> int:
        async with connect(target) as (kube, namespace):
            query = {"fieldSelector": f"status.phase={phase}"} if phase else {}
            items = await kube.list(FINETUNE_JOBS, None if all_namespaces else namespace, **query)
        if output == "json":
            click.echo(json.dumps(items, indent=2))
        elif not items:
            click.echo("no FineTuneJobs found", err=True)
        else:
            jobs = [(FineTuneJob.parse(item), item["metadata"]["creationTimestamp"]) for item in items]
            console.print(show.jobs_table(jobs, namespaces=all_namespaces))
        return 0

    run(work())


@main.command("get")
@click.argument("name")
@click.option("-o", "--output", type=click.Choice(["summary", "json", "yaml"]), default="summary", show_default=True)
@pass_target
def get_command(target: Target, name: str, output: str) -> None:
    """Show one job: what it does, how far it is, what came out, and what to do when it failed."""

    async def work() -> int:
        async with connect(target) as (kube, namespace):
            body = await fetch(kube, namespace, name)
        if output == "json":
            click.echo(json.dumps(body, indent=2))
        elif output == "yaml":
            click.echo(yaml.safe_dump(body, sort_keys=False), nl=False)
        else:
            console.print(show.summary(FineTuneJob.parse(body)))
        return 0

    run(work())


async def fetch(kube: Kube, namespace: str, name: str) -> dict[str, Any]:
    body = await kube.get(FINETUNE_JOBS, namespace, name)
    if body is None:
        raise Stop(f"there is no FineTuneJob {namespace}/{name}: see finetune list -A", EXIT_CLUSTER)
    return body


@main.command()
@click.argument("name")
@pass_target
def watch(target: Target, name: str) -> None:
    """Follow a job live until it ends: progress, loss, tokens per second, time left.

    Exits with 0 when the job is Complete and with 1 when it Failed.
    """

    async def work() -> int:
        async with connect(target) as (kube, namespace):
            return await follow(kube, namespace, name)

    run(work())


async def follow(kube: Kube, namespace: str, name: str) -> int:
    """Show a job until it ends; on a terminal as a live bar, else a line for each change."""
    last = ""
    with contextlib.ExitStack() as stack:
        display = stack.enter_context(Live(console=console, refresh_per_second=4)) if console.is_terminal else None
        async for job in states(kube, namespace, name):
            if display:
                display.update(show.live(job))
            elif (text := show.line(job)) != last:
                click.echo(text)
                last = text
    console.print(show.summary(job))
    return 0 if _ended(job) is ConditionType.COMPLETE else EXIT_FAILED


async def states(kube: Kube, namespace: str, name: str) -> AsyncIterator[FineTuneJob]:
    """The job again and again, until it has ended. A cluster that does not answer for a while is asked again."""
    patience = PATIENCE_SECONDS
    while True:
        try:
            job = FineTuneJob.parse(await fetch(kube, namespace, name))
        except (ApiError, aiohttp.ClientError, TimeoutError, ConnectionError) as error:
            passing = not isinstance(error, ApiError) or error.status == 429 or error.status >= 500
            if not passing or patience <= 0:
                raise
            patience -= POLL_SECONDS
        else:
            patience = PATIENCE_SECONDS
            yield job
            if _ended(job):
                return
        await asyncio.sleep(POLL_SECONDS)


def _ended(job: FineTuneJob) -> ConditionType | None:
    true = {condition.type for condition in job.status.conditions if condition.status == "True"}
    return next((kind for kind in (ConditionType.COMPLETE, ConditionType.FAILED) if kind in true), None)


@main.command()
@click.argument("name")
@click.option("--timeout", type=float, default=0, help="Seconds to wait at most; 0 waits for ever.")
@pass_target
def wait(target: Target, name: str, timeout: float) -> None:
    """Wait until a job ends. Exits with 0 when it is Complete, 1 when it Failed, 3 when the time ran out."""

    async def work() -> int:
        until = time.monotonic() + timeout if timeout else float("inf")
        async with connect(target) as (kube, namespace):
            async for job in states(kube, namespace, name):
                ended = _ended(job)
                if ended:
                    click.echo(f"{name}: {show.what_it_does(job.status)}")
                    return 0 if ended is ConditionType.COMPLETE else EXIT_FAILED
                if time.monotonic() >= until:
                    click.echo(f"{name}: not finished after {timeout:g} s, {show.line(job)}", err=True)
                    return EXIT_TIMEOUT
        raise AssertionError("states ends with a job that ended")

    run(work())


@main.command()
@click.argument("name")
@click.option("--wait", "waiting", is_flag=True, help="Until no pod of the job is left.")
@pass_target
def suspend(target: Target, name: str, waiting: bool) -> None:
    """Stop a job and keep its state. A running pod has time to save; resume goes on from there."""

    async def work() -> int:
        async with connect(target) as (kube, namespace):
            await _set_suspend(kube, namespace, name, True)
            click.echo(f"FineTuneJob {namespace}/{name} is told to stop")
            if not waiting:
                return 0
            async for job in states(kube, namespace, name):
                if job.status.phase is Phase.SUSPENDED or _ended(job):
                    click.echo(f"{name}: {show.what_it_does(job.status)}")
                    return 0 if job.status.phase is Phase.SUSPENDED else EXIT_FAILED
        raise AssertionError("states ends with a job that ended")

    run(work())


@main.command()
@click.argument("name")
@pass_target
def resume(target: Target, name: str) -> None:
    """Let a suspended job go on from its newest checkpoint."""

    async def work() -> int:
        async with connect(target) as (kube, namespace):
            await _set_suspend(kube, namespace, name, False)
            click.echo(f"FineTuneJob {namespace}/{name} goes on")
        return 0

    run(work())


async def _set_suspend(kube: Kube, namespace: str, name: str, value: bool) -> None:
    job = FineTuneJob.parse(await fetch(kube, namespace, name))
    if _ended(job):
        raise Stop(f"FineTuneJob {namespace}/{name} is over: {show.what_it_does(job.status)}", EXIT_FAILED)
    await kube.patch(FINETUNE_JOBS, namespace, name, {"metadata": {"uid": job.uid}, "spec": {"suspend": value}})


@main.command()
@click.argument("name")
@click.option("--stage", type=click.Choice(["prepare", "train", "export"]), help="Stage; the present one by default.")
@click.option("--attempt", type=int, help="Attempt of the stage; the last one by default.")
@click.option("-f", "--follow", "following", is_flag=True, help="Go on until the pod ends.")
@pass_target
def logs(target: Target, name: str, stage: str | None, attempt: int | None, following: bool) -> None:
    """Print the log of a job's pod. When the pod is gone, says where the log is kept."""

    async def work() -> int:
        async with connect(target) as (kube, namespace):
            job = FineTuneJob.parse(await fetch(kube, namespace, name))
            selector = f"finetune.dev/job-uid={job.uid}" + (f",finetune.dev/stage={stage}" if stage else "")
            pods = read_pods(await kube.list(PODS, namespace, labelSelector=selector))
            if attempt is not None:
                pods = tuple(pod for pod in pods if pod.attempt == attempt)
            if not pods:
                failure = job.status.failure
                kept = failure.log_uri if failure and failure.log_uri else None
                kept = kept or (job.status.resolved.work_uri if job.status.resolved else None)
                hint = f": its log is below {kept}" if kept else ""
                raise Stop(f"there is no pod for this{hint}", EXIT_CLUSTER)
            query = {"follow": "true"} if following else {}
            # Of several pods of the newest attempt the first one knows most.
            newest = [pod for pod in pods if (pod.stage, pod.attempt) == (pods[-1].stage, pods[-1].attempt)]
            pod = next((pod for pod in reversed(newest) if pod.index == 0), newest[-1])
            async for piece in kube.stream_log(namespace, pod.name, container="main", **query):
                sys.stdout.buffer.write(piece)
                sys.stdout.buffer.flush()
        return 0

    run(work())


def _local() -> None:
    """`finetune local` needs the extra [local]; without it the other commands work."""
    try:
        from finetune_operator.cli.local import local
    except ImportError as error:
        missing = error.name

        @main.group("local")
        def local() -> None:
            """Run everything on this machine (needs: pip install 'finetune-operator[local]')."""
            raise click.ClickException(f"{missing} is not installed: pip install 'finetune-operator[local]'")

    else:
        main.add_command(local)


def _others() -> None:
    """These commands are in modules of their own, which use this one."""
    from finetune_operator.cli.data import data_group
    from finetune_operator.cli.gc import gc_command

    main.add_command(gc_command)
    main.add_command(data_group)


_others()
_local()
