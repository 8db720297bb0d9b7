# SPDX-License-Identifier: Apache-2.0
"""What the package is meant to cost at most, beside what it costs, from the committed results.

python benchmarks/targets.py
"""

from harness.targets import targets


def main() -> None:
    for target in targets():
        print(f"{target.name}  {target.what:75} {target.limit:>12}  {target.verdict:23} {target.measured}")


if __name__ == "__main__":
    main()
