"""One file a row: `measure() -> Row`. Adding a row is adding a file."""
