# SPDX-License-Identifier: Apache-2.0
"""What the papers claim, as far as it can be tested at this size, beside what was found, from the committed results.

python benchmarks/claims.py
"""

from harness.claims import claims


def main() -> None:
    for claim in claims():
        print(f"{claim.paper}: {claim.says}; {claim.task} ({claim.budget}): {claim.found or '-'}: {claim.verdict}")


if __name__ == "__main__":
    main()
