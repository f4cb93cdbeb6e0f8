"""
For machines without tqdm, which only draws progress bars: bench.py gpu puts this folder
behind all others on the path.
"""


class tqdm:  # noqa: N801
    """Iterates, and draws nothing."""

    def __init__(self, iterable=(), **options):
        self.iterable = iterable

    def __iter__(self):
        return iter(self.iterable)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def update(self, number=1):
        pass

    def close(self):
        pass

    @staticmethod
    def write(text):
        print(text, flush=True)
