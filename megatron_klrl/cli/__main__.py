"""``python -m megatron_klrl.cli`` is ``klrl``; the launcher starts ranks this way."""

from megatron_klrl.cli.main import main

if __name__ == "__main__":
    main()
