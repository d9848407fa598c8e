"""Tables and figure of a study."""


def write_results(study, page): ...
