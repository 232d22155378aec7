"""The few functions of the CUDA driver that loading and launching take: by ``cuda.bindings`` if that is installed, else
by ctypes. No toolkit and no runtime library are needed; importing this loads nothing.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

# Of the driver's header cuda.h.
_MAX_DYNAMIC_SHARED = 8
_CAPTURE_RELAXED = 2
_BUFFER_POINTER, _BUFFER_SIZE, _END = 1, 2, 0


class DriverError(RuntimeError):
    """The driver is missing, or refused a call: the message says which and why."""


class Arguments(NamedTuple):
    """A kernel's arguments as the driver takes them: keep this until the launch has returned."""

    extra: Any
    """An array of what the data is, where it lies and how long it is."""
    buffer: Any
    size: Any

    @classmethod
    def of(cls, data: bytes) -> Arguments:
        """Of bytes that are laid as the kernel's parameters are."""
        buffer, size = ctypes.create_string_buffer(data, len(data)), ctypes.c_size_t(len(data))
        words = _BUFFER_POINTER, ctypes.addressof(buffer), _BUFFER_SIZE, ctypes.addressof(size), _END
        return cls((ctypes.c_void_p * 5)(*words), buffer, size)


class Driver:
    """The driver by ctypes. Handles are ints."""

    def __init__(self) -> None:
        name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
        try:
            self._library = ctypes.CDLL(name)
        except OSError as error:
            raise DriverError(f"no CUDA driver: {' '.join(str(error).split())}") from None
        handle, number = ctypes.c_void_p, ctypes.c_uint
        self._library.cuModuleGetFunction.argtypes = [ctypes.POINTER(handle), handle, ctypes.c_char_p]
        self._library.cuFuncSetAttribute.argtypes = [handle, ctypes.c_int, ctypes.c_int]
        self._library.cuLaunchKernel.argtypes = [handle, *[number] * 7, handle, handle, handle]
        self._library.cuCtxSetCurrent.argtypes = [handle]
        self._launch = self._library.cuLaunchKernel

    def _call(self, name: str, *arguments: Any) -> None:
        self._check(name, getattr(self._library, name)(*arguments))

    def _check(self, name: str, code: int) -> None:
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(code, ctypes.byref(text))
            raise DriverError(f"{name}: {(text.value or b'unknown error').decode()} ({code})")

    def version(self) -> int:
        """Of the newest CUDA that the driver knows: 13000 for 13.0."""
        found = ctypes.c_int()
        self._call("cuDriverGetVersion", ctypes.byref(found))
        return found.value

    def enter(self, device: int) -> None:
        """Make the primary context of a device current if this thread has none: torch keeps its tensors there."""
        context = ctypes.c_void_p()
        self._call("cuCtxGetCurrent", ctypes.byref(context))
        if not context.value:
            self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), ctypes.c_int(device))
            self._call("cuCtxSetCurrent", context)

    @contextmanager
    def relaxed(self) -> Iterator[None]:
        """Within: calls that a stream capture of another thread, or of this one, does not forbid."""
        mode = ctypes.c_int(_CAPTURE_RELAXED)
        self._call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
        try:
            yield
        finally:
            self._call("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))

    def load(self, image: bytes) -> int:
        """Load a cubin, or PTX (ended by a zero), into the current context."""
        module = ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), image)
        return module.value or 0

    def function(self, module: int, name: str) -> int:
        """A kernel of a module."""
        found = ctypes.c_void_p()
        self._call("cuModuleGetFunction", ctypes.byref(found), module, name.encode())
        return found.value or 0

    def allow_shared(self, function: int, shared_bytes: int) -> None:
        """Let a kernel have so much dynamic shared memory: more than 48 KiB have to be asked for."""
        self._call("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED, shared_bytes)

    def launch(
        self, function: int, grid: int, threads: int, shared_bytes: int, stream: int, arguments: Arguments
    ) -> None:
        """Launch on a stream of the current context."""
        code = self._launch(function, grid, 1, 1, threads, 1, 1, shared_bytes, stream, None, arguments.extra)
        if code:
            self._check("cuLaunchKernel", code)


class Bindings(Driver):
    """The driver by NVIDIA's ``cuda.bindings``, whose calls cost less than those of ctypes."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self._launch = driver.cuLaunchKernel

    def _take(self, name: str, *arguments: Any) -> Any:
        try:
            code, *found = getattr(self._driver, name)(*arguments)
        except RuntimeError as error:  # the driver is not there, or lacks a function
            raise DriverError(f"{name}: {' '.join(str(error).split())}") from None
        self._check(name, int(code))
        return found[0] if found else None

    def _check(self, name: str, code: int) -> None:
        if code:
            _, text = self._driver.cuGetErrorString(self._driver.CUresult(code))
            raise DriverError(f"{name}: {(text or b'unknown error').decode()} ({code})")

    def version(self) -> int:
        return int(self._take("cuDriverGetVersion"))

    def enter(self, device: int) -> None:
        if not int(self._take("cuCtxGetCurrent")):
            self._take("cuCtxSetCurrent", self._take("cuDevicePrimaryCtxRetain", device))

    @contextmanager
    def relaxed(self) -> Iterator[None]:
        relaxed = self._driver.CUstreamCaptureMode(_CAPTURE_RELAXED)
        before = self._take("cuThreadExchangeStreamCaptureMode", relaxed)
        try:
            yield
        finally:
            self._take("cuThreadExchangeStreamCaptureMode", before)

    def load(self, image: bytes) -> int:
        return int(self._take("cuModuleLoadData", image))

    def function(self, module: int, name: str) -> int:
        return int(self._take("cuModuleGetFunction", module, name.encode()))

    def allow_shared(self, function: int, shared_bytes: int) -> None:
        attribute = self._driver.CUfunction_attribute(_MAX_DYNAMIC_SHARED)
        self._take("cuFuncSetAttribute", function, attribute, shared_bytes)

    def launch(
        self, function: int, grid: int, threads: int, shared_bytes: int, stream: int, arguments: Arguments
    ) -> None:
        extra = ctypes.addressof(arguments.extra)
        (code,) = self._launch(function, grid, 1, 1, threads, 1, 1, shared_bytes, stream, 0, extra)
        if code:
            self._check("cuLaunchKernel", int(code))


@cache
def driver() -> Driver | DriverError:
    """The driver, or why there is none."""
    try:
        from cuda.bindings import driver as bindings

        bindings.cuDriverGetVersion()  # it looks for the driver when it is first called
        return Bindings(bindings)
    except Exception:  # not installed, or it finds no driver, which ctypes says in plainer words
        pass
    try:
        return Driver()
    except DriverError as error:
        return error
