"""Process trees, from /proc."""

from pathlib import Path

_PARENT = 1
"""Position of the parent's id among the fields of /proc/PID/stat after the name."""
_RESIDENT_PAGES = 1
"""Position of the resident pages in /proc/PID/statm."""


def descendants(pid: int) -> list[int]:
    """The children of a process, their children, and so on."""
    parents: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                after_name = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            parents.setdefault(int(after_name[_PARENT]), []).append(int(folder.name))
    found, new = [], [pid]
    while new:
        new = [child for parent in new for child in parents.get(parent, [])]
        found += new
    return found


def resident_pages(pid: int) -> int:
    """Pages of memory that a process has in use; 0 if it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[_RESIDENT_PAGES])
    except OSError:
        return 0


def matching(text: str) -> list[int]:
    """The processes whose command line contains a text, this one excepted."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and folder.resolve() != Path("/proc/self").resolve():
            try:
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if text in line:
                found.append(int(folder.name))
    return sorted(found)
