"""e**x, ln x and x**y of floats by way of decimal numbers: the same float64 on every machine.

libm's last bits change from system to system. exp and log are the float64 nearest to the result, power nearly always.
"""

from decimal import Context, Decimal

DIGITS = Context(prec=30)  # whatever precision the caller's thread has


def exp(x: float) -> float:
    return float(Decimal(x).exp(DIGITS))


def log(x: float) -> float:
    return float(Decimal(x).ln(DIGITS))


def power(x: float, y: float) -> float:
    return float(DIGITS.power(Decimal(x), Decimal(y)))
