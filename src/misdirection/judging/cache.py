"""Verdicts that were paid for, with what was asked and said, in one SQLite file that all runs and processes share."""

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields
from pathlib import Path

from misdirection.errors import InputError
from misdirection.files import cache_folder, write_errors
from misdirection.judging.verdicts import JudgeVerdict

_COLUMNS = tuple(field.name for field in fields(JudgeVerdict))
_CREATE = """
CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, score REAL, by TEXT NOT NULL, reason TEXT NOT NULL,
    calls INTEGER NOT NULL, tokens_in INTEGER NOT NULL, tokens_out INTEGER NOT NULL, reply TEXT NOT NULL,
    parameters TEXT NOT NULL, made TEXT NOT NULL, version TEXT NOT NULL, asked INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS asked (id INTEGER PRIMARY KEY, text TEXT NOT NULL UNIQUE);
"""
# How long a process waits for another one that is writing, in seconds.
_PATIENCE = 60.0
_AT_ONCE = 500


class VerdictCache:
    """Verdicts by key; each is on disk when `put` returns, and two processes may write at the same time.

    Args:
        path: the SQLite file; by default `verdicts-2.sqlite` in the package's cache folder.

    Raises `InputError` that names the file when it cannot be opened, read or written.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = Path(path) if path else cache_folder() / "verdicts-2.sqlite"
        with write_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._errors():
            # Verdicts arrive in whichever thread runs the judge, one at a time.
            self._base = sqlite3.connect(self.path, _PATIENCE, isolation_level=None, check_same_thread=False)
            # Readers do not block a writer, and a killed process loses nothing that was committed. Only a machine that
            # goes down may lose the last few, which are then asked again.
            self._base.execute("PRAGMA journal_mode=WAL")
            self._base.execute("PRAGMA synchronous=NORMAL")
            self._base.executescript(_CREATE)

    def get(self, keys: Iterable[str]) -> dict[str, JudgeVerdict]:
        """The verdicts of those keys that are there."""
        wanted = list(keys)
        verdicts: dict[str, JudgeVerdict] = {}
        with self._errors():
            for first in range(0, len(wanted), _AT_ONCE):
                batch = wanted[first : first + _AT_ONCE]
                query = f"SELECT key, {', '.join(_COLUMNS)} FROM verdicts WHERE key IN ({', '.join('?' * len(batch))})"
                verdicts |= {key: JudgeVerdict(*values) for key, *values in self._base.execute(query, batch)}
        return verdicts

    def put(self, key: str, verdict: JudgeVerdict, asked: str = "") -> None:
        """Keeps one verdict, and who was asked by which rubric, as JSON.

        A failed one is refused with a `ValueError`, since it is none.
        """
        if verdict.by == "failed":
            raise ValueError("a failed request is no verdict")
        values = ", ".join(f":{name}" for name in _COLUMNS)
        statement = (
            f"INSERT OR REPLACE INTO verdicts (key, {', '.join(_COLUMNS)}, asked) "
            f"VALUES (:key, {values}, (SELECT id FROM asked WHERE text = :asked))"
        )
        with self._errors():
            self._base.execute("INSERT OR IGNORE INTO asked (text) VALUES (?)", (asked,))
            self._base.execute(statement, {"key": key, "asked": asked, **asdict(verdict)})

    def asked(self, key: str) -> str:
        """Who was asked for a verdict, and by which rubric, as JSON; empty where it is not known."""
        query = "SELECT text FROM asked JOIN verdicts ON asked = id WHERE key = ?"
        with self._errors():
            row = self._base.execute(query, (key,)).fetchone()
        return str(row[0]) if row else ""

    def __len__(self) -> int:
        with self._errors():
            return int(self._base.execute("SELECT count(*) FROM verdicts").fetchone()[0])

    def close(self) -> None:
        """Closes the file."""
        self._base.close()

    def __enter__(self) -> "VerdictCache":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise InputError(
                f"{self.path}: the cache of verdicts cannot be used ({error}); free space, or move the file away to "
                "start a new one"
            ) from error
