"""Who may read what is written: safetensors creates its files for their owner alone, whatever the umask."""

import contextlib
import stat
from pathlib import Path

READ = stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH


def make_readable(folder: Path) -> None:
    """Let everybody read the files in `folder` who could read a file that is created there now."""
    probe = folder / ".mode"  # the umask itself can only be read by changing it, for all threads
    probe.touch()
    wanted = stat.S_IMODE(probe.stat().st_mode) & READ
    probe.unlink()
    for path in folder.rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode) if path.is_file() else READ
        if wanted & ~mode:
            with contextlib.suppress(OSError):  # a link to somebody else's file, a file system without modes
                path.chmod(mode | wanted)
