"""What can go wrong, as a user sees it.

Every error that a user can cause or cure is a `DistftError`: it says what is wrong with values, where (config path, file, row,
rank), and what to do. The command line prints those three and ends with the class's exit status; it never shows a traceback for
one of these. Anything else that escapes is our bug and keeps its traceback.

To add one: subclass the nearest class below, give it no new constructor arguments (errors cross process borders, so they must
pickle), and raise it with keywords.
"""

from __future__ import annotations


class DistftError(Exception):
    """Base of all errors meant for a user: `problem`, `where` it is, and `help`, the way out."""

    exit_status = 1

    def __init__(self, problem: str, *, where: str = "", help: str = "") -> None:
        super().__init__(problem, where, help)
        self.problem = problem
        self.where = where
        self.help = help

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.problem, self.where, self.help))

    def __str__(self) -> str:
        return "\n".join(part for part in (self.problem, self.where and f"  at {self.where}", self.help) if part)


def _rebuild(kind: type[DistftError], problem: str, where: str, help: str) -> DistftError:
    return kind(problem, where=where, help=help)


class UserInputError(DistftError):
    """The user's input is wrong: config, data, or a file that is missing."""

    exit_status = 2


class ConfigError(UserInputError):
    """The config file or an override; `problem` may hold many lines, one per problem."""


class DataError(UserInputError):
    """A row or file of the user's data."""


class ModelError(UserInputError):
    """A model folder that cannot serve: no weights, a foreign tokenizer, an unsupported head."""


class StoreError(UserInputError):
    """The store cannot be read or written: no permission, no space, no credentials, no such bucket."""


class ArtifactError(DistftError):
    """An artifact is not the one that was asked for."""

    exit_status = 3


class MissingArtifactError(ArtifactError):
    """No committed artifact of this identity; `help` names the command that makes it."""


class StaleArtifactError(ArtifactError):
    """An artifact exists, made from something else; `problem` lists the fields that differ."""


class CorruptArtifactError(ArtifactError):
    """Bytes that are not those the manifest promised."""


class LostRankError(DistftError):
    """Another rank is gone while this one waits for it: an echo, whose cause is with the other."""


class TrainingError(DistftError):
    """A number that must not be: a non-finite loss or gradient, a treatment with no weight."""
