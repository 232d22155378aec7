"""Of the audit: tiles in shared memory that are overwritten while a product still reads them (triton#6691).

Triton pipelines a loop's loads into as many buffers as there are stages. A tile that registers read, and also a product
of a warp group, has one less: it is free again, as Triton sees it, once registers have it. If products stay under way
into the next step, the next copy may arrive before they have read. Whether they do is in the code for the GPU: a wait
that leaves some of them pending.
"""

from __future__ import annotations

import re

_MADE = re.compile(
    r"(%\w+)(?::\d+)? = "
    r"(?:ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x|ttg\.memdesc_(?:index|trans|subslice|reinterpret) (%\w+))?"
)
_COPIED = re.compile(r"ttg\.async_copy_global_to_local %\w+, (%\w+)")
_PENDING = re.compile(r"ttng\.warp_group_dot_wait ([^{]*)\{pendings = [1-9]")


def overwritten(ttgir: str, stages: int) -> int:
    """How many tiles with fewer buffers than ``stages`` are read by products that nothing waits for in the step."""
    of: dict[str, tuple[int, int]] = {}  # line that makes its buffers, and their number; names come again
    copied, read = set(), set()
    for number, line in enumerate(ttgir.splitlines()):
        if found := _COPIED.search(line):
            copied.add(of.get(found[1]))
        if found := _PENDING.search(line):
            read |= {of.get(value) for value in re.findall(r"%\w+", found[1])}
        if found := _MADE.search(line):
            name, buffers, source = found.groups()
            of.pop(name, None)
            if buffers or source in of:
                of[name] = (number, int(buffers)) if buffers else of[source]
    return sum(each is not None and each[1] < stages for each in copied & read)
