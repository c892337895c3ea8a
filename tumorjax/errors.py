"""Errors that are no defects of tumorjax: what a user can cause, and what befalls a job."""


class UserError(Exception):
    """Wrong use or configuration: reported in one line, exit code 2."""


class CaseError(Exception):
    """One case cannot be used: it is set aside with its reason and the rest goes on.

    Args:
        case: the case or file that is meant.
        found: what was found and what was expected instead.
        action: what the user can do about it.
    """

    def __init__(self, case: str, found: str, action: str):
        super().__init__(f"{case}: {found}. {action}")
        self.case = case
        self.found = found
        self.action = action

    def __reduce__(self):
        # Exceptions cross process borders by their arguments.
        return type(self), (self.case, self.found, self.action)


class Preempted(Exception):
    """The machine is about to be taken away, and what there was is saved: exit code 75."""


class Lost(Exception):
    """Another process of the job is gone or stuck: exit code 69."""
