"""Answers that are errors, in the form of OpenAI's API."""


class ApiError(Exception):
    """An answer that is an error: status, and OpenAI's {"error": {...}} as `body`."""

    def __init__(self, status: int, message: str, param: str | None = None,
                 code: str | None = None, kind: str = "invalid_request_error",
                 headers: dict[str, str] | None = None):  # fmt: skip
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        self.body = {
            "error": {"message": message, "type": kind, "param": param, "code": code},
        }


def of(body: dict, name: str, kind: type, default):
    """A field of a body, the default where it is absent or null; ApiError for another type."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kind):
        words = {str: "a string", dict: "an object", bool: "true or false", list: "a list"}
        raise ApiError(400, f"{name} must be {words[kind]}", name)
    return value
