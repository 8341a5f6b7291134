"""Speed and memory of each operator against everything a user could pick instead.

``python -m benchmarks --help`` lists what there is; results/ holds what was measured.
"""


class BadInput(Exception):
    """An argument that cannot be right; its message is all that the user sees."""
