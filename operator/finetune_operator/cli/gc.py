"""`finetune gc`: remove the work files of jobs that are over.

What may go is proven twice: the cluster says that the job is over, or does not know it; and the folder is named by the
job's uid, holds nothing but work files, and names that job as its owner. Whatever is in doubt is kept, and said so.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import click
from pydantic import ValidationError

from finetune_api.document import JobIdentity
from finetune_api.names import OWNER_FILE
from finetune_api.spec import AddressingStyle
from finetune_api.status import ConditionType
from finetune_api.uri import FileLocation, S3Location, parse
from finetune_operator.children import work_uri
from finetune_operator.cli import commands, show
from finetune_operator.cli.commands import Target, connect, pass_target, result_of
from finetune_operator.cli.storage import Access, FileStore, S3Store, StorageError, Store, Upload
from finetune_operator.kube import FINETUNE_JOBS
from finetune_operator.resource import FineTuneJob

WORK_FILE = re.compile(
    r"""
      prepare/[^/]+                              # plan, rows, owner
    | evaluation/[^/]+
    | (prepare|train|export)/\d+/[^/]+           # report, log
    | train/\d+/(checkpoints/\d+|final)/.+
    """,
    re.VERBOSE,
)
"""Names below a folder of work files, see finetune_trainer/layout.py. Other files are not ours."""
_UID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_CANDIDATE = re.compile(rf"((?:.*?/)?({_UID}))/(?:prepare|evaluation|train|export)/")
_LONG_AGO = datetime.min.replace(tzinfo=UTC)
MOST_OWNER = 4096
"""Bytes; a larger file names no owner."""
MOST_PROBLEMS = 10
"""Problems of one folder that are printed; they tend to be the same."""


@dataclass(frozen=True)
class KnownJob:
    """A job that the cluster has."""

    job: FineTuneJob
    mentions: str
    """Its spec as text."""

    @classmethod
    def parse(cls, body: dict[str, Any]) -> KnownJob:
        return cls(FineTuneJob.parse(body), json.dumps(body.get("spec")))

    @property
    def ended(self) -> ConditionType | None:
        """None also when it cannot be read: then nothing is known of it."""
        return None if self.job.spec is None else commands._ended(self.job)

    @property
    def work_files(self) -> str:
        """URI of its folder; empty when its spec cannot be read."""
        return str(parse(work_uri(self.job.uid, self.job.spec))) if self.job.spec else ""

    def uses(self, uid: str) -> bool:
        """Whether it reads from the folder of another job, or has published its model there."""
        published = self.job.spec.output.uri if self.job.spec else ""
        return uid in (published if self.ended else self.mentions)

    @property
    def name(self) -> str:
        return f"{self.job.namespace}/{self.job.name}"


@dataclass(frozen=True)
class Place:
    """A folder that may be one of work files."""

    store: Store
    key: str
    uid: str

    @property
    def uri(self) -> str:
        return self.store.uri(self.key)


@dataclass
class Contents:
    """What is in a folder."""

    count: int = 0
    size: int = 0
    newest: datetime = _LONG_AGO
    uploads: list[Upload] = field(default_factory=list)
    manifests: list[str] = field(default_factory=list)
    """Keys of what makes checkpoints and results complete; a few in each attempt."""
    foreign: str | None = None
    """The first file that is no work file."""
    owner: JobIdentity | None = None


@dataclass(frozen=True)
class Verdict:
    remove: bool
    why: str
    uploads: list[Upload] = field(default_factory=list)
    """To be aborted."""


@dataclass(frozen=True)
class Rules:
    now: datetime
    keep: timedelta
    """Work files of a Complete job, and unfinished uploads."""
    keep_failed: timedelta
    """Work files of a Failed job."""


def look(place: Place) -> Contents:
    """
    Raises:
        StorageError: it cannot be read.
    """
    contents = Contents(uploads=list(place.store.uploads(place.key)))
    owned = False
    for item in place.store.objects(place.key):
        name = item.key.removeprefix(f"{place.key}/")
        contents.count += 1
        contents.size += item.size
        contents.newest = max(contents.newest, item.modified)
        owned = owned or (name == OWNER_FILE and item.size <= MOST_OWNER)
        if name.endswith("/manifest.json"):
            contents.manifests.append(item.key)
        if not WORK_FILE.fullmatch(name):
            contents.foreign = contents.foreign or name
    contents.newest = max([contents.newest, *(upload.started for upload in contents.uploads)])
    if owned:
        try:
            contents.owner = JobIdentity.model_validate_json(place.store.read(f"{place.key}/{OWNER_FILE}"))
        except ValidationError:
            contents.owner = None
    return contents


def judge(place: Place, contents: Contents, jobs: Iterable[KnownJob], rules: Rules) -> Verdict:
    """What is to be done with a folder. Pure."""
    known = None
    for other in jobs:
        if other.job.uid == place.uid:
            known = other
        elif other.uses(place.uid):
            return Verdict(False, f"job {other.name} uses it")
    if known is not None and known.ended is None:
        return Verdict(False, f"the job is not over: {known.job.status.phase or 'Pending'}")
    if known is not None and known.work_files != place.uri:
        return Verdict(False, "the job's work files are elsewhere; this is a copy")
    if contents.foreign:
        return Verdict(False, f"{contents.foreign} is no work file")
    if contents.owner is None:
        # A job that the cluster has is proof enough: nothing else has its uid.
        if known is None:
            return Verdict(False, f"no {OWNER_FILE} says whose files these are")
    elif contents.owner.uid != place.uid:
        return Verdict(False, f"{OWNER_FILE} names another job")
    if known is None:
        # Whether it has failed is not known any more.
        what, keep = "Gone", max(rules.keep, rules.keep_failed)
    else:
        what, keep = str(known.ended), rules.keep if known.ended is ConditionType.COMPLETE else rules.keep_failed
    # The server's clock may be ahead of ours.
    age = max(rules.now - contents.newest, timedelta())
    why = f"{what}, untouched for {_count(age.days, 'day')}"
    if age >= keep:
        return Verdict(True, why, contents.uploads)
    # Nobody goes on with an upload of a job that is over, however long its files are kept.
    return Verdict(
        False,
        f"{why}: kept for {_count(keep.days, 'day')}",
        [upload for upload in contents.uploads if rules.now - upload.started >= rules.keep],
    )


def remove(place: Place, contents: Contents) -> Iterator[str]:
    """Delete a folder of work files; yields a message for each file that is still there.

    Manifests go first, so that a run that breaks off leaves nothing that looks complete; the owner goes last, so that
    the next run knows what is left.
    """
    owner = f"{place.key}/{OWNER_FILE}"
    rest = (
        item.key
        for item in place.store.objects(place.key)
        # What somebody has put there since the first look is not ours either.
        if item.key != owner and WORK_FILE.fullmatch(item.key.removeprefix(f"{place.key}/"))
    )
    for keys in (contents.manifests, rest, [owner]):
        problems = 0
        for problem in place.store.delete(keys):
            problems += 1
            yield problem
        if problems:
            return
    place.store.tidy(place.key)


def places_of(jobs: Iterable[KnownJob], access: Access) -> Iterator[Place]:
    """The folders of the jobs that are over, as the cluster knows them."""
    for known in jobs:
        if known.ended is not None and known.job.spec is not None:
            storage = known.job.spec.storage
            style = {AddressingStyle.PATH: True, AddressingStyle.VIRTUAL: False}.get(storage.addressing_style)
            own = Access(
                endpoint=access.endpoint or storage.endpoint,
                region=access.region or storage.region,
                path_style=style,
                key_id=access.key_id,
                secret=access.secret,
            )
            store, key = open_store(known.work_files, own)
            yield Place(store, key, known.job.uid)


def open_store(uri: str, access: Access) -> tuple[Store, str]:
    """The store of a URI, and the key of the folder in it.

    Raises:
        ValueError: the URI is none of storage that can be cleaned.
    """
    # A whole bucket is no place for a model, but one to clean.
    bucket = re.fullmatch(r"s3://([^/]+)/?", uri)
    location = S3Location(bucket[1], "") if bucket else parse(uri)
    match location:
        case S3Location(name, key):
            if access.path_style is None and access.endpoint:
                # As the operator does: servers other than AWS rarely have a host name for each bucket.
                access = Access(access.endpoint, access.region, True, access.key_id, access.secret)
            return S3Store(name, access), key
        case FileLocation(path):
            return FileStore(), path
    raise ValueError(f"{uri} is on the model hub: write s3://BUCKET/PATH")


def places_below(uri: str, access: Access) -> list[Place]:
    """Folders below a URI that look like work files.

    Raises:
        StorageError: they cannot be listed.
    """
    try:
        store, folder = open_store(uri, access)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    found: dict[str, Place] = {}
    for objects in (store.objects(folder), store.uploads(folder)):
        for item in objects:
            match = _CANDIDATE.match(item.key)
            # Not a folder around the one that was asked for.
            if match and (match[1] == folder or match[1].startswith(f"{folder}/" if folder else "")):
                found.setdefault(match[1], Place(store, match[1], match[2]))
    return list(found.values())


async def known_jobs(target: Target, *, everywhere: bool) -> tuple[list[KnownJob], str]:
    """The jobs of the namespace or of all, and the URL of the cluster that was asked."""
    async with connect(target) as (kube, namespace):
        items = await kube.list(FINETUNE_JOBS, None if everywhere else namespace)
        return [KnownJob.parse(item) for item in items], kube.server


@dataclass
class Sweep:
    """One run over many folders."""

    jobs: list[KnownJob]
    rules: Rules
    yes: bool
    """Whether anything is deleted at all."""
    folders: int = 0
    files: int = 0
    size: int = 0
    uploads: int = 0
    troubled: bool = False

    def run(self, places: Iterable[Place]) -> int:
        """Returns the exit code."""
        for place in places:
            try:
                self._visit(place)
            except StorageError as error:
                self._trouble(str(error))
        files = f"{_count(self.files, 'file')} ({show.format_size(self.size)}) of {_count(self.folders, 'job')}"
        uploads = _count(self.uploads, "upload")
        click.echo(f"removed {files}, aborted {uploads}" if self.yes else f"would remove {files}, abort {uploads}")
        if not self.yes and (self.folders or self.uploads):
            click.echo("nothing was changed: add --yes to do it")
        return commands.EXIT_FAILED if self.troubled else 0

    def _visit(self, place: Place) -> None:
        contents = look(place)
        if not contents.count and not contents.uploads:
            return
        verdict = judge(place, contents, self.jobs, self.rules)
        owner = next((known.name for known in self.jobs if known.job.uid == place.uid), None)
        if owner is None and contents.owner is not None:
            owner = f"{contents.owner.namespace}/{contents.owner.name}"
        facts = [_count(contents.count, "file"), show.format_size(contents.size)]
        if contents.uploads:
            facts.append(f"{len(verdict.uploads)} of {_count(len(contents.uploads), 'upload')} to abort")
        word = "remove" if verdict.remove else "keep"
        _say(f"{word:<7} {place.uid}  {owner or '?'}  {', '.join(facts)}  ({verdict.why})  {place.uri}")
        if self.yes:
            for upload in verdict.uploads:
                place.store.abort(upload)
        self.uploads += len(verdict.uploads)
        if not verdict.remove:
            return
        problems = 0
        for problem in remove(place, contents) if self.yes else ():
            problems += 1
            if problems <= MOST_PROBLEMS:
                self._trouble(problem)
        if problems > MOST_PROBLEMS:
            self._trouble(f"{place.uri}: {problems - MOST_PROBLEMS} more files are still there")
        if not problems:
            self.folders += 1
            self.files += contents.count
            self.size += contents.size

    def _trouble(self, message: str) -> None:
        _say(f"error: {message}", err=True)
        self.troubled = True


def _say(text: str, *, err: bool = False) -> None:
    """Print what has names from storage in it, where anybody may have written; a terminal obeys some characters."""
    click.echo("".join(letter if letter.isprintable() else "?" for letter in text), err=err)


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def pass_rules(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that say what goes."""

    def with_rules(*args: Any, keep_days: int, keep_failed_days: int, **options: Any) -> None:
        now = datetime.now(UTC)
        rules = Rules(now, keep=timedelta(days=keep_days), keep_failed=timedelta(days=keep_failed_days))
        command(*args, rules=rules, **options)

    functools.update_wrapper(with_rules, command)
    days = functools.partial(click.option, type=click.IntRange(min=0), show_default=True)
    for option in (
        click.option("--yes", is_flag=True, help="Do it; without this, only say what would be done."),
        days("--keep-failed-days", default=30, help="The same for jobs that Failed, or of which nothing is known."),
        days("--keep-days", default=7, help="Keep what was touched in so many days, of jobs that are Complete."),
        click.argument("uri", required=False),
    ):
        with_rules = option(with_rules)
    return with_rules


@click.command("gc")
@pass_rules
@click.option("-A", "--all-namespaces", is_flag=True, help="Jobs of all namespaces.")
@click.option("--endpoint", help="S3 server; the job's own by default, or that of your AWS profile.")
@click.option("--region", help="S3 region; the job's own by default, or that of your AWS profile.")
@pass_target
def gc_command(
    target: Target,
    uri: str | None,
    all_namespaces: bool,
    endpoint: str | None,
    region: str | None,
    yes: bool,
    rules: Rules,
) -> None:
    """Remove the work files of jobs that are over: prepared rows, checkpoints, logs. Models that were published stay.

    Without URI: of the FineTuneJobs that the namespace has. With s3://BUCKET/PATH: all below it that belongs to jobs
    that are over or that no longer exist; only for a PATH that no other cluster writes to.

    \b
    finetune gc                        say what would go
    finetune gc --yes                  remove it
    finetune gc s3://models --yes      also of jobs that were deleted

    Storage is reached with your own credentials, as the AWS tools find them. Exits with 1 when something could not be
    read or removed.
    """
    if uri and (all_namespaces or target.namespace):
        raise click.UsageError("with a URI all namespaces are asked: leave -n and -A out")
    access = Access(endpoint, region)
    try:
        places = places_below(uri, access) if uri else None
        # The jobs after the folders: each folder that was seen belongs to a job that was there before.
        jobs, server = result_of(known_jobs(target, everywhere=all_namespaces or uri is not None))
        if uri:
            click.echo(f"jobs are those of the cluster {server}")
        sys.exit(Sweep(jobs, rules, yes).run(places_of(jobs, access) if places is None else places))
    except StorageError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(commands.EXIT_FAILED)
    except KeyboardInterrupt:
        # What is left is found by the next run.
        sys.exit(130)
