"""Counters of a server in Prometheus' text format."""

import collections
import threading

_HELP = {
    "puna_requests_total": ("counter", "answered requests by path and status"),
    "puna_prompt_tokens_total": ("counter", "tokens of prompts that were taken"),
    "puna_prompt_tokens_reused_total": ("counter", "of those, taken from texts before"),
    "puna_generated_tokens_total": ("counter", "tokens that were made"),
    "puna_proposed_tokens_total": ("counter", "tokens that speculation has proposed"),
    "puna_accepted_tokens_total": ("counter", "of those, that were right"),
    "puna_cancelled_total": ("counter", "requests whose client left before the end"),
    "puna_guard_total": ("counter", "what the guard refused, and how often it failed"),
    "puna_first_token_seconds": ("summary", "from a request's arrival to its first token"),
    "puna_request_seconds": ("summary", "from a request's arrival to its end"),
    "puna_slots": ("gauge", "texts that can be written at a time"),
    "puna_running": ("gauge", "texts that are being written"),
    "puna_waiting": ("gauge", "texts that wait for a slot"),
}


class Metrics:
    """Sums by name and labels; safe to use from any thread."""

    def __init__(self):
        self._sums = collections.Counter()
        self._lock = threading.Lock()

    def add(self, name: str, amount: float = 1, **labels: object) -> None:
        """Add to a counter; labels must be of few values, and never a client's words."""
        with self._lock:
            self._sums[name, tuple(labels.items())] += amount

    def observe(self, name: str, seconds: float) -> None:
        """Add to a summary."""
        self.add(f"{name}_sum", seconds)
        self.add(f"{name}_count")

    def text(self, **gauges: int) -> str:
        """All of them; `gauges` are values of now."""
        with self._lock:
            sums = sorted(self._sums.items())
        sums += [((name, ()), value) for name, value in gauges.items()]
        lines = []
        for name, (kind, doc) in _HELP.items():
            lines += [f"# HELP {name} {doc}", f"# TYPE {name} {kind}"]
            for (found, labels), value in sums:
                if found in (name, f"{name}_sum", f"{name}_count"):
                    inside = ",".join(f'{key}="{label}"' for key, label in labels)
                    lines.append(f"{found}{{{inside}}} {value}" if inside else f"{found} {value}")
        return "\n".join(lines) + "\n"
