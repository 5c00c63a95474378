"""Refused: a request that is refused, and the JSON of every error."""

from typing import Any


class Refused(Exception):
    """A request that is refused; the answer is {"error": {"code", "message", ...}}.

    Args:
      status: the HTTP status.
      code: one word for programs.
      message: one sentence for people.
      more: other members of the error, such as the field and the limit.
    """

    def __init__(self, status: int, code: str, message: str, more: dict[str, Any] | None = None):
        super().__init__(message)
        self.status, self.code, self.message, self.more = status, code, message, more or {}

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        return {'error': {'code': self.code, 'message': self.message, **self.more}}


def invalid(field: str, message: str, **more: Any) -> Refused:
    """A field with a wrong type or value, status 422."""
    return Refused(422, 'invalid', f'{field}: {message}', {'field': field, **more})
