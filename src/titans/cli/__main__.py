"""python -m titans.cli"""

from titans.cli import main

if __name__ == "__main__":
    main()
