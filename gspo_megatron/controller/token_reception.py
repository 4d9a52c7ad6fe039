"""What a server sends for one request, and the requests that go to it together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from gspo_megatron.controller import vllm_format
from gspo_megatron.controller.server_admin import ServerError
from gspo_megatron.controller.vllm_format import Ending, FormatError, RefusedRequest
from gspo_megatron.transport.token_frames import Frame, FrameError, SamplingRequest


class Reception:
    """The frames of one request. They are taken in as they are read: no task wakes up for one."""

    def __init__(self, request: SamplingRequest, url: str, take: Callable[[Frame], None]) -> None:
        """
        Args:
            request: what is asked.
            url: of the server, for its errors.
            take: called with every frame in order. Whatever it raises of FrameError ends the request.
        """
        self.request, self._url, self._take = request, url, take
        self.ended: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        """Raises what `fail` was given; cancelled when nobody waits for it any more."""
        self.is_over = False
        """Whether nothing more will come."""

    def receive(self, frame: Frame) -> None:
        """Take in one frame."""
        self.is_over = bool(frame.ending)
        if self.ended.done():
            return
        try:
            self._take(frame)
            if frame.ending:
                self.ended.set_result(vllm_format.read_ending(frame.ending))
        except RefusedRequest as error:
            self.fail(error)
        except FrameError as error:
            self.fail(ServerError(f"server {self._url}: {error}"))
        except FormatError as error:  # an error in place of tokens: so ends a dying engine
            self.fail(ServerError(f"server {self._url} is gone: {error}"))
        except Exception as error:  # a fault of ours belongs to the waiter, and not to the other requests
            self.ended.set_exception(error)

    def fail(self, error: ServerError | RefusedRequest) -> None:
        """End with an error, unless it has ended."""
        self.is_over = True
        if not self.ended.done():
            # Every waiter needs an error of its own: a raised one collects the stacks of all.
            self.ended.set_exception(type(error)(str(error)))


class Outbox:
    """Receptions that wait for the end of the event loop's round, and then leave in one message."""

    def __init__(self, send: Callable[[Sequence[Reception]], None]) -> None:
        self._send = send
        self._waiting: list[Reception] = []

    def add(self, reception: Reception) -> None:
        """Send with the others of this round."""
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._flush)
        self._waiting.append(reception)

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        for reception in waiting:
            reception.is_over = reception.ended.done()
        if left := [reception for reception in waiting if not reception.is_over]:
            self._send(left)
