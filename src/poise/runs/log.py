"""The training log: metrics.jsonl of a run, and TensorBoard files."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from poise.support.files import write_failure, write_file


class Log:
    """Writes metrics.jsonl and, if asked, TensorBoard files.

    When training resumes from a checkpoint, entries after that position are deleted.

    Args:
        folder: folder of the run.
        stage, step: position that training resumes from.
        tensorboard: whether to write TensorBoard files.
    """

    def __init__(self, folder: Path, stage: int, step: int, *, tensorboard: bool) -> None:
        path = folder / "metrics.jsonl"
        kept = [line for line in _entries(path) if (line["stage"], line["step"]) <= (stage, step)]
        write_file(path, "".join(json.dumps(entry) + "\n" for entry in kept).encode())
        self._file = open(path, "a", encoding="utf-8")
        self._boards = _tensorboards(folder / "tensorboard", {stage: step}) if tensorboard else {}

    def write(self, entry: dict[str, float]) -> None:
        """Append an entry.

        Raises:
            RunError: the disk is full or not writable.
        """
        try:
            print(json.dumps(entry), file=self._file, flush=True)
        except OSError as error:
            raise write_failure(Path(self._file.name), error) from error
        if self._boards:
            for name in set(entry) - {"stage", "step"}:
                self._boards[int(entry["stage"])].add_scalar(name, entry[name], int(entry["step"]))

    def close(self) -> None:
        with suppress(OSError):  # a full disk was reported when the entry was written
            self._file.close()
        for board in self._boards.values():
            board.close()


def _entries(path: Path) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            entries.append(json.loads(line))
        except ValueError:
            break  # a line cut off by a kill; steps after the checkpoint are logged again
    return entries


def _tensorboards(folder: Path, resumed: dict[int, int]) -> dict[int, Any]:
    """Return one writer per stage. In the resumed stage, steps after the checkpoint are purged."""
    from torch.utils.tensorboard import SummaryWriter

    purged = {stage: resumed[stage] + 1 if stage in resumed else None for stage in (1, 2)}
    return {
        stage: SummaryWriter(str(folder / f"stage{stage}"), purge_step=step)
        for stage, step in purged.items()
    }
