"""`poise doctor`: check whether Poise works on this machine."""

from dataclasses import dataclass

from poise.cli.options import Device
from poise.errors import RunError


@dataclass(frozen=True)
class Doctor:
    """Check this machine: versions, extras, device, threads, files, ten steps of training.

    The ten steps are compared with stored figures. The exit code is 0 if nothing failed, else 1.
    Add the output to a report of a problem.
    """

    device: Device = "auto"

    def run(self) -> None:
        from poise.runs.checkup import check_machine

        found = check_machine(self.device)
        print(found)
        if not found.ok:
            failed = ", ".join(check.name for check in found.checks if check.outcome == "failed")
            raise RunError(f"not all checks passed ({failed}): see the lines above")
