"""``python -m lit_rlhf``: the command ``lit-rlhf``."""

from lit_rlhf.pipeline import main

if __name__ == "__main__":
    main()
