"""The balance in other libraries, run beside the library's own loss.

    make integrations            install the libraries, run everything, write the results
    python -m integrations [--only NAME ...] [--seeds 3] [--json FILE]
    python -m integrations --page    write the table of the JSON file into docs/your-loop.md

Each module trains one model twice for each seed, with the same data, order, noise and number of
steps: with the loss that the library or its users have, and with `poise.ComputedBalance`. Lines
that the balance needs have a comment "# poise".
"""
