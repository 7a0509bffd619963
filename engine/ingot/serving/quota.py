"""How much a caller may ask for in a minute."""

import time


class Bucket:
    """Fills evenly to `per_minute`, and starts full. What was taken after the fact may leave it below zero."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute, self._held, self._at = per_minute, float(per_minute), time.monotonic()

    def _fill(self) -> None:
        moment = time.monotonic()
        self._held = min(self.per_minute, self._held + (moment - self._at) * self.per_minute / 60)
        self._at = moment

    def wait_s(self, wanted: float) -> float:
        """Seconds until it holds so much; 0: it does."""
        self._fill()
        return max(0.0, (wanted - self._held) * 60 / self.per_minute)

    def take(self, amount: float) -> None:
        """Take it, held or not."""
        self._fill()
        self._held -= amount


class Quota:
    """One caller's requests and tokens in a minute. None: as many as wanted."""

    def __init__(self, requests: int | None, tokens: int | None) -> None:
        self.limits = (requests, tokens)
        self._requests = None if requests is None else Bucket(requests)
        self._tokens = None if tokens is None else Bucket(tokens)

    def enter(self) -> tuple[str, float]:
        """("", 0) for a request that may go on, which is counted; else what there was too much of, and the seconds
        until there is room.
        """
        # How many tokens a request takes is known when it has ended: the next one waits until they are made up for.
        for cause, bucket, wanted in (("rate_requests", self._requests, 1.0), ("rate_tokens", self._tokens, 1.0)):
            if bucket is not None and (wait_s := bucket.wait_s(wanted)):
                return cause, wait_s
        if self._requests is not None:
            self._requests.take(1)
        return "", 0.0

    def spend(self, tokens: int) -> None:
        """Count the tokens of a request that has ended."""
        if self._tokens is not None:
            self._tokens.take(tokens)
