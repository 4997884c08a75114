"""`python -m llmquant`: the same as the command `llmquant`."""

import sys

if __name__ == "__main__":
    try:
        from llmquant.cli.main import main
    except KeyboardInterrupt:  # while the modules are being read
        sys.exit(sys.stderr.write("llmquant: stopped\n") and 130)
    sys.exit(main())
