"""The databases of the study tests: a SQLite file, and a PostgreSQL server of our own, started once in a temporary folder on a Unix socket."""
from contextlib import contextmanager
from functools import lru_cache
import os
from pathlib import Path
import shutil
import subprocess
import tempfile
import uuid

import pytest

BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True) + [Path(found).parent for name in ("initdb",) if (found := shutil.which(name))]


def as_postgres(*command) -> list[str]:
    "PostgreSQL refuses to run as root; Debian's package brings a user for it."
    return (["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []) + [str(part) for part in command]


def why_no_postgres() -> str | None:
    if not any((b / "initdb").is_file() and (b / "pg_ctl").is_file() for b in BINARIES): return "no PostgreSQL on this machine: apt install postgresql"
    try: import psycopg  # noqa: F401
    except ImportError: return "no driver for PostgreSQL: pip install 'clip_lab[postgres]'"
    if os.geteuid() == 0 and (not shutil.which("runuser") or subprocess.run(["id", "postgres"], capture_output=True).returncode): return "PostgreSQL does not run as root, and there is no user postgres"
    return None


@contextmanager
def postgres_server():
    "The folder of the socket of a running server; everything is gone afterwards."
    folder = Path(tempfile.mkdtemp(prefix="clip-lab-pg-", dir="/tmp"))          # a socket's path must be short
    binaries = next(b for b in BINARIES if (b / "initdb").is_file())
    if os.geteuid() == 0: shutil.chown(folder, "postgres")
    def pg(name, *arguments): subprocess.run(as_postgres(binaries / name, *arguments), check=True, capture_output=True, text=True, timeout=120, cwd="/")
    try:
        pg("initdb", "-D", folder / "data", "-A", "trust", "-U", "clip_lab", "--no-sync", "-E", "UTF8", "--locale=C")
        pg("pg_ctl", "-D", folder / "data", "-w", "-l", folder / "log", "-o", f"-k {folder} -c listen_addresses= -c max_connections=120", "start")
        try: yield folder
        finally: pg("pg_ctl", "-D", folder / "data", "-m", "immediate", "-w", "stop")
    finally: shutil.rmtree(folder, ignore_errors=True)


def new_database(folder: Path) -> str:
    "The URL of a new empty database on that server."
    import psycopg
    name = "study_" + uuid.uuid4().hex[:12]
    with psycopg.connect(host=str(folder), user="clip_lab", dbname="postgres", autocommit=True) as connection: connection.execute(f"CREATE DATABASE {name}")
    return f"postgresql://clip_lab@/{name}?host={folder}"
