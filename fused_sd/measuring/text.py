"""Numbers as the tables of several commands print them."""

UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


def size_text(num_bytes: int) -> str:
    """Format bytes in the largest unit of which there is at least one, with three digits."""
    for unit, size in UNITS:
        if num_bytes >= size:
            amount = num_bytes / size
            return f"{amount:.3g} {unit}" if amount < 1000 else f"{amount:.0f} {unit}"
    return f"{num_bytes} B"
