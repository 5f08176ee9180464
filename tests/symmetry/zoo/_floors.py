FLOORS: dict[str, tuple[int, float]] = {}
